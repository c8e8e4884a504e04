"""alpha-entmax: against the closed forms, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad.kernels.numerics import entmax


def _by_sorting(x: Tensor, alpha: float) -> Tensor:
    """Sparsemax and 1.5-entmax by their closed forms: the threshold for each size of the support."""
    y = (alpha - 1) * (x - x.amax(-1, keepdim=True))
    ordered = y.sort(-1, descending=True).values
    size = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    mean = ordered.cumsum(-1) / size
    if alpha == 2:
        thresholds = mean - 1 / size
    else:
        spread = ordered.square().cumsum(-1) - size * mean.square()
        thresholds = mean - ((1 - spread).clamp_min(0) / size).sqrt()
    count = (thresholds <= ordered).sum(-1, keepdim=True)
    return (y - thresholds.gather(-1, count - 1)).clamp_min(0).pow(1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e4])
@pytest.mark.parametrize("values", [2, 10, 512])
def test_entmax_has_its_closed_forms(values: int, scale: float, alpha: float) -> None:
    x = scale * torch.randn(50, values, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(entmax(x, alpha), _by_sorting(x, alpha), rtol=0, atol=1e-9)
    single = x.float()
    torch.testing.assert_close(entmax(single, alpha), entmax(single.double(), alpha).float(), rtol=0, atol=2e-5)


def test_entmax_near_1_is_softmax() -> None:
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(entmax(x, 1.001), x.softmax(-1), rtol=0, atol=2e-3)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_entmax_may_be_differentiated_twice(alpha: float) -> None:
    x = 5 * torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    assert (entmax(x, alpha) == 0).any()
    torch.autograd.gradcheck(lambda x: entmax(x, alpha), x)
    torch.autograd.gradgradcheck(lambda x: entmax(x, alpha), x)


def test_a_forbidden_value_has_no_share_and_no_gradient() -> None:
    layer, forbidden = dgrad.latent("2x3"), torch.tensor([[[0.0, -torch.inf, 1.0], [0.5, 0.0, -torch.inf]]])
    logits = forbidden.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    codes = dgrad.estimator("gumbel-softmax", alpha=1.5, temperature=5.0).codes(layer, logits, generator=generator)
    assert not codes[0][forbidden == -torch.inf].any()
    codes.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.any()
    assert not logits.grad[forbidden == -torch.inf].any()


def test_other_than_one_hot_rows_are_refused() -> None:
    estimator = dgrad.estimator("gumbel-softmax", alpha=2.0)
    assert estimator.traits.supports(dgrad.latent("2+3+5"))
    with pytest.raises(dgrad.InputError, match="gumbel-softmax with alpha=2 needs a code of independent categorical"):
        estimator(dgrad.latent("pairs:6"), torch.zeros(1, 21), lambda codes: codes.sum(-1))
