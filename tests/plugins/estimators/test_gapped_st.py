"""Gapped straight-through: the moved logits, and the expected gap."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BEYOND, EveryCode, gradient_of, slope_at, softmax_jacobian, times
from torch import Generator

import dgrad
from dgrad.testing import small_logits, small_objectives
from dgrad_plugins.estimators._conditional import conditional_potentials


@pytest.mark.parametrize("gap", [1.0, 0.3, "expected"])
def test_gapped_st_moves_the_logits_until_the_code_leads_by_the_gap(gap: float | str) -> None:
    layer, loss = dgrad.latent("2x4"), small_objectives(dgrad.latent("2x4"))[BEYOND]
    logits = small_logits(layer, batch=50)
    codes = layer.sample(logits, generator=Generator().manual_seed(0))[0]
    moved = torch.empty_like(logits)
    for b in range(50):
        for i in range(2):
            phi, z = logits[b, i], int(codes[b, i].argmax())
            p = phi.softmax(-1)[z]
            size = float(-(1 - p).log() / p) if gap == "expected" else float(torch.tensor(gap))
            for j in range(4):
                moved[b, i, j] = phi.max() if j == z else phi[j] - max(0.0, float(phi[j] - phi.max()) + size)
            others = torch.cat([moved[b, i, :z], moved[b, i, z + 1 :]])
            assert moved[b, i, z] - others.max() >= size - 1e-9
    expected = times(softmax_jacobian((moved / 0.5).softmax(-1)), slope_at(loss, codes.unsqueeze(0))[0]) / 0.5
    estimator = dgrad.estimator("gapped-st", temperature=0.5, gap=gap)
    torch.testing.assert_close(gradient_of(estimator, layer, logits, loss), expected)


def test_the_expected_gap_is_the_mean_lead_of_the_code() -> None:
    """`-log(1 - p_z) / p_z` against draws of the perturbed logits given the code."""
    log_p = torch.tensor([[[0.6, 0.3, 0.1]]], dtype=torch.float64).log()
    for z, p in enumerate((0.6, 0.3, 0.1)):
        codes = torch.eye(3, dtype=torch.float64)[z].view(1, 1, 1, 3)
        potentials = conditional_potentials(log_p, codes, 100_000, generator=Generator().manual_seed(0)).flatten(0, 3)
        lead = potentials[:, z] - torch.cat([potentials[:, :z], potentials[:, z + 1 :]], dim=1).amax(1)
        assert abs(float(lead.mean()) + math.log(1 - p) / p) < 5 * float(lead.std()) / 100_000**0.5


def test_the_expected_gap_is_finite_at_its_ends() -> None:
    """A code that is all but certain (gap without bound) and codes of probability 0 (gap 1), in float32."""
    layer = EveryCode(1, 2)
    logits = torch.tensor([[[200.0, 0.0]], [[200.0, 0.0]]])
    gradient = gradient_of(dgrad.estimator("gapped-st", gap="expected"), layer, logits, lambda codes: codes[..., 0, 1])
    assert gradient.isfinite().all()
    assert gradient[0].norm() == 0, "certain: its gap of 200 leaves no gradient"
    assert gradient[1, 0, 1] == pytest.approx(math.e / (1 + math.e) ** 2), "the other code leads by a gap of 1"
