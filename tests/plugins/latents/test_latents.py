"""The built-in latents against enumeration and torch.distributions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Generator

import dgrad
from dgrad.core.latent_layer import LatentLayer
from dgrad.testing import check_latent, parametrize_with_latent_checks, small_logits

SPECS = ["1x2", "1x7", "3x2", "2x5", "20x10"]
LARGE = SPECS[-1]


@pytest.fixture(params=SPECS)
def layer(request: pytest.FixtureRequest) -> LatentLayer:
    return dgrad.latent(request.param)


@parametrize_with_latent_checks([*SPECS[:-1], "2+3+2", "pairs:1", "pairs:3"])
def test_it_conforms(layer: LatentLayer, check: Callable[[LatentLayer], None]) -> None:
    check(layer)


def test_a_large_one_conforms_as_far_as_it_can_be_checked() -> None:
    check_latent(dgrad.latent(LARGE))


def test_the_name_may_stand_in_the_spec(layer: LatentLayer) -> None:
    assert dgrad.latent(f"categorical:{layer}") == layer


def test_torch_distributions_agrees(layer: LatentLayer) -> None:
    logits = small_logits(layer, batch=4)
    codes = layer.sample(logits, 3, generator=Generator().manual_seed(1))
    other = layer.distribution(logits)
    torch.testing.assert_close(layer.log_prob(logits, codes), other.log_prob(codes))
    torch.testing.assert_close(layer.entropy(logits), other.entropy())
    uniform = layer.distribution(torch.zeros_like(logits))
    torch.testing.assert_close(layer.kl(logits), torch.distributions.kl_divergence(other, uniform))
    torch.testing.assert_close(layer.mean(logits), other.mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_are_kept_and_noise_is_wide(dtype: torch.dtype) -> None:
    layer = dgrad.latent("3x4")
    logits = small_logits(layer, batch=2).to(dtype)
    assert layer.sample(logits).dtype == dtype
    assert layer.noise(logits).dtype == torch.promote_types(dtype, torch.float32)
    assert layer.argmax(logits).dtype == dtype


def test_noise_is_finite_and_differs_everywhere(layer: LatentLayer) -> None:
    noise = layer.noise(torch.zeros(50, *layer.shape), 20, generator=Generator().manual_seed(0))
    assert noise.isfinite().all()
    assert noise.unique().numel() > 0.99 * noise.numel()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        *(
            (spec, f"cannot read '{spec}' as a categorical latent; expected VARIABLESxVALUES")
            for spec in ("20by10", "x", "", "20x", "-1x4", "2x3x4", "20×10", "1e3x2")
        ),
        ("categorical:", "cannot read '' as a categorical latent"),
        ("0x10", "at least 1 variable and 2 values; got 0x10"),
        ("5x1", "at least 1 variable and 2 values; got 5x1"),
        ("nothing:3", "unknown latent 'nothing'; known: categorical, pairs"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(dgrad.InputError, match=message):
        dgrad.latent(spec)


def test_a_large_support_is_not_listed() -> None:
    with pytest.raises(dgrad.InputError, match=r"20x10 has 1e\+20 codes"):
        dgrad.latent("20x10").enumerate(like=torch.zeros(1))
