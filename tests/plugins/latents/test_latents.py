"""The latent layer against enumeration and torch.distributions."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Generator

import dgrad
from dgrad.core.latent_layer import LatentLayer
from dgrad.testing import small_logits

SPECS = ["1x2", "1x7", "3x2", "2x5", "20x10"]
SMALL = SPECS[:-1]


@pytest.fixture(params=SPECS)
def layer(request: pytest.FixtureRequest) -> LatentLayer:
    return dgrad.latent(request.param)


def test_the_spec_parses_and_prints(layer: LatentLayer) -> None:
    again = dgrad.latent(str(layer))
    assert again == layer == pickle.loads(pickle.dumps(layer)) == dgrad.latent(f"categorical:{layer}")


def test_torch_distributions_agrees(layer: LatentLayer) -> None:
    logits = small_logits(layer, batch=4)
    codes = layer.sample(logits, 3, generator=Generator().manual_seed(1))
    other = layer.distribution(logits)
    torch.testing.assert_close(layer.log_prob(logits, codes), other.log_prob(codes))
    torch.testing.assert_close(layer.entropy(logits), other.entropy())
    uniform = layer.distribution(torch.zeros_like(logits))
    torch.testing.assert_close(layer.kl(logits), torch.distributions.kl_divergence(other, uniform))
    torch.testing.assert_close(layer.mean(logits), other.mean)


@pytest.mark.parametrize("spec", SMALL)
def test_enumeration_lists_every_code_once_and_sums_to_one(spec: str) -> None:
    layer = dgrad.latent(spec)
    logits = small_logits(layer, batch=2)
    support = layer.enumerate(like=logits)
    assert support.shape == (layer.support_size, *layer.shape)
    assert support.dtype == logits.dtype
    assert len(support.flatten(1).unique(dim=0)) == layer.support_size
    log_q = layer.log_prob(logits, support.unsqueeze(1).expand(-1, *logits.shape))
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones(2, dtype=logits.dtype))
    torch.testing.assert_close(layer.entropy(logits), -(log_q.exp() * log_q).sum(0))
    torch.testing.assert_close(layer.mean(logits), torch.einsum("kb,knv->bnv", log_q.exp(), support))


@pytest.mark.parametrize("spec", SMALL)
def test_samples_have_the_right_frequencies(spec: str) -> None:
    """A chi-squared statistic below its 1 - 1e-6 quantile.

    Were the seed not fixed, one false alarm in a million for each spec.
    """
    layer = dgrad.latent(spec)
    logits = small_logits(layer, batch=1)
    draws = 20_000
    codes = layer.sample(logits, draws, generator=Generator().manual_seed(0)).flatten(1)
    support = layer.enumerate(like=logits)
    counts = (codes @ support.flatten(1).T == layer.shape[0]).double().sum(0)
    expected = draws * layer.log_prob(logits, support.unsqueeze(1)).exp().squeeze(1)
    freedom = torch.tensor(layer.support_size - 1.0)
    # The Wilson-Hilferty approximation of the quantile; 4.7534 is the normal quantile of 1 - 1e-6.
    quantile = freedom * (1 - 2 / (9 * freedom) + 4.7534 * (2 / (9 * freedom)).sqrt()) ** 3
    assert ((counts - expected).square() / expected).sum() < quantile


def test_indices_and_codes_are_inverse(layer: LatentLayer) -> None:
    codes = layer.sample(small_logits(layer, batch=5), 2, generator=Generator().manual_seed(0))
    indices = layer.indices(codes)
    assert indices.dtype == torch.int64
    assert torch.equal(layer.codes(indices, codes.dtype), codes)


def test_relaxation_becomes_the_argmax(layer: LatentLayer) -> None:
    potentials = small_logits(layer, batch=3)
    torch.testing.assert_close(layer.relax(potentials, 1e-4), layer.argmax(potentials))


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


def test_the_global_generator_stays_where_it_is(layer: LatentLayer) -> None:
    before = torch.get_rng_state()
    layer.sample(small_logits(layer, batch=2), 2, generator=Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("logits", [1e4, -1e4, 0.0])
def test_extreme_logits_stay_finite(logits: float) -> None:
    layer = dgrad.latent("2x3")
    extreme = torch.tensor([[[logits, 0.0, 0.0], [0.0, logits, -logits]]], requires_grad=True)
    (layer.kl(extreme) + layer.entropy(extreme)).sum().backward()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


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
