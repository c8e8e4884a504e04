"""The beams over rows: the most probable codes, and draws without replacement, against enumeration."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.testing import small_logits
from dgrad_plugins.estimators._beam import codes_without_replacement, top_codes


def _enumerated(spec: str, logits: Tensor) -> Tensor:
    """`log q` of the whole support, `[B, K]`, in the order of `_number`."""
    layer = dgrad.latent(spec)
    return layer.log_prob(logits, layer.enumerate(like=logits).unsqueeze(1)).T


def _number(values: Tensor, k: int) -> Tensor:
    """Each code `[..., n]` as its place in the enumeration."""
    places = k ** torch.arange(values.shape[-1] - 1, -1, -1)
    return (values * places).sum(-1)


@pytest.mark.parametrize("spec", ["1x5", "3x2", "2x4", "4x3"])
@pytest.mark.parametrize("count", [1, 3, 7, 1000])
def test_top_codes_are_those_of_enumeration(spec: str, count: int) -> None:
    layer = dgrad.latent(spec)
    logits = small_logits(layer, batch=20)
    log_probs, values = top_codes(logits.log_softmax(-1), count)
    everything = _enumerated(spec, logits)
    count = min(count, layer.support_size)
    torch.testing.assert_close(log_probs.T, everything.topk(count).values)
    torch.testing.assert_close(everything.gather(1, _number(values, layer.shape[1]).T), log_probs.T)


def test_draws_without_replacement_have_the_right_distribution() -> None:
    """Ordered pairs against `p_a p_b / (1 - p_a)`, in 5 standard errors (64 numbers: a false alarm in 27,000 seeds)."""
    layer, draws = dgrad.latent("3x2"), 100_000
    logits = small_logits(layer)
    log_p = logits.log_softmax(-1).expand(draws, -1, -1)
    log_probs, values = codes_without_replacement(log_p, 2, generator=Generator().manual_seed(0))
    numbers = _number(values, 2)  # [2, draws]
    q = _enumerated("3x2", logits)[0]
    torch.testing.assert_close(q[numbers], log_probs)
    frequency = torch.bincount(numbers[0] * 8 + numbers[1], minlength=64).view(8, 8) / draws
    p = q.exp()
    truth = p[:, None] * p / (1 - p[:, None])
    truth.fill_diagonal_(0)
    assert ((frequency - truth).abs() <= 5 * (truth * (1 - truth) / draws).sqrt()).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_draws_never_repeat_and_a_count_beyond_the_support_gives_all_of_it(scale: float) -> None:
    layer = dgrad.latent("2x4")
    log_p = (scale * small_logits(layer, batch=50)).float().log_softmax(-1)
    log_probs, values = codes_without_replacement(log_p, 100, generator=Generator().manual_seed(0))
    assert values.shape == (16, 50, 2)
    assert torch.equal(_number(values, 4).sort(0).values, torch.arange(16).unsqueeze(-1).expand(-1, 50))
    assert log_probs.isfinite().all()
    torch.testing.assert_close(log_probs.exp().sum(0), torch.ones(50, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_support_that_no_one_could_list() -> None:
    layer = dgrad.latent("20x10")
    log_p = small_logits(layer, batch=5).log_softmax(-1)
    log_probs, values = top_codes(log_p, 4)
    torch.testing.assert_close(log_probs[0], log_p.amax(-1).sum(-1))
    assert torch.equal(values[0], log_p.argmax(-1))
    second = log_p.topk(2, -1).values
    torch.testing.assert_close(log_probs[1], log_probs[0] - (second[..., 0] - second[..., 1]).amin(-1))
    log_probs, values = codes_without_replacement(log_p, 8)
    drawn = layer.codes(values, torch.float64)
    torch.testing.assert_close(layer.log_prob(log_p, drawn), log_probs)
