"""The contract of latent layers: what follows from what, and what is missing."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.latent_layer import LISTED, LatentLayer, LogLinear
from dgrad.core.moves import Moves, Toggles
from dgrad.registry import describe
from dgrad.testing import small_logits
from dgrad_plugins.latents import Categorical


@dataclass(frozen=True)
class Bare(LatentLayer):
    """What must be defined and nothing else: two or none of three items."""

    def __str__(self) -> str:
        return "bare"

    @property
    def shape(self) -> tuple[int, ...]:
        return (3,)

    @property
    def support_size(self) -> int:
        return 4

    def argmax(self, potentials: Tensor) -> Tensor:
        value, best = potentials.topk(2, -1)
        return torch.zeros_like(potentials).scatter(-1, best, 1.0) * (value.sum(-1, keepdim=True) > 0)

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        return self.argmax(logits.expand(samples, *logits.shape))

    def indices(self, codes: Tensor) -> Tensor:
        return codes.long()

    def codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return indices.to(dtype)


@dataclass(frozen=True)
class Named(Bare):
    """A layer with a spec: `named:AtoB`."""

    first: int
    last: int
    spec, least = "named:{first}to{last}", 2
    __str__ = LatentLayer.__str__


def test_a_spec_is_written_and_read() -> None:
    layer = Named.parse("2to30")
    assert (layer, str(layer)) == (Named(2, 30), "named:2to30")
    for text in ("1to3", "2to", "2to3to4", "-2to3", ""):
        expected = f"cannot read {text!r}; expected named:FIRSTtoLAST with whole numbers of at least 2"
        with pytest.raises(dgrad.InputError, match=expected):
            Named.parse(text)
    assert describe({"named": Named.parse}) == {"named": "A layer with a spec: `named:AtoB`."}


def test_what_a_layer_leaves_out_says_so_where_it_is_used() -> None:
    layer, logits = Bare(), torch.zeros(1, 3)
    for member in ("mean", "entropy", "kl", "noise"):
        assert not layer.defines(member)
        with pytest.raises(dgrad.InputError, match=f"latent bare does not define {member}; expected a layer that does"):
            getattr(layer, member)(logits)
    assert Categorical(2, 3).defines("kl")
    assert (layer.one_hot_rows, layer.independent_parts, layer.moves) == (False, False, None)


@pytest.mark.parametrize("name", ["gumbel-softmax", "st-gumbel-softmax", "imle", "aimle", "direct-linear"])
def test_estimators_that_need_noise_refuse_a_layer_without(name: str) -> None:
    with pytest.raises(dgrad.InputError, match="needs the noise of a latent, and bare defines none: take rloo"):
        dgrad.estimator(name)(Bare(), torch.zeros(1, 3), lambda codes: codes.sum(-1))


def test_the_support_follows_from_the_argmax() -> None:
    layer = Bare()
    with torch.inference_mode():  # whose tensors could not be differentiated elsewhere
        layer.enumerate(like=torch.zeros(()))
    support = layer.enumerate(like=torch.zeros((), dtype=torch.float64))
    assert support.tolist() == [[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]
    (support * torch.ones(3, dtype=torch.float64, requires_grad=True)).sum().backward()
    again = pickle.loads(pickle.dumps(layer))
    assert again == layer
    assert "_supports" not in vars(again), "what is kept on a device does not travel"


def test_a_support_of_many_coordinates_is_not_searched() -> None:
    class Large(Bare):
        @property
        def shape(self) -> tuple[int, ...]:
            return (LISTED + 1,)

    with pytest.raises(dgrad.InputError, match="bare has 4 codes of 17 coordinates, too many to list; at most 16"):
        Large().enumerate(like=torch.zeros(()))


class Plain(Categorical):
    """Everything that a log-linear layer has from `log_z` alone."""

    mean = LogLinear.mean
    log_prob = LogLinear.log_prob
    entropy = LogLinear.entropy
    kl = LogLinear.kl
    relax = LogLinear.relax
    enumerate = LogLinear.enumerate
    distribution = LogLinear.distribution


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_follows_from_log_z_is_what_formulas_say(dtype: torch.dtype) -> None:
    plain, formulas = Plain(2, 3), Categorical(2, 3)
    logits = small_logits(plain, batch=4).to(dtype)
    codes = plain.sample(logits, 2, generator=Generator().manual_seed(0))
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    for name in ("mean", "entropy", "kl"):
        torch.testing.assert_close(getattr(plain, name)(logits), getattr(formulas, name)(logits), **tolerance)
    torch.testing.assert_close(plain.log_prob(logits, codes), formulas.log_prob(logits, codes), **tolerance)
    torch.testing.assert_close(plain.relax(logits, 0.5), formulas.relax(logits, 0.5), **tolerance)
    assert torch.equal(plain.enumerate(like=logits).unique(dim=0), formulas.enumerate(like=logits).unique(dim=0))


def test_the_mean_is_differentiated_in_every_mode() -> None:
    layer = Plain(2, 3)
    leaf = small_logits(layer, batch=4).requires_grad_()
    truth = leaf.detach().softmax(-1)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            mean = layer.mean(leaf)
        torch.testing.assert_close(mean.detach(), truth)
        assert mean.requires_grad == (mode is torch.enable_grad)
    with torch.inference_mode():
        kept = leaf.detach().clone()
    torch.testing.assert_close(layer.mean(kept), truth)
    assert torch.autograd.gradcheck(layer.mean, (leaf,))
    assert torch.autograd.gradgradcheck(layer.kl, (leaf,))


class Swaps(Moves):
    """Both coordinates of a pair are changed: more moves than coordinates, or fewer."""

    def __init__(self, pairs: list[tuple[int, int]], size: int) -> None:
        self.pairs = torch.zeros(len(pairs), size, dtype=torch.float64)
        for row, pair in zip(self.pairs, pairs, strict=True):
            row[list(pair)] = 1
        self.count = len(pairs)

    def neighbours(self, codes: Tensor) -> Tensor:
        return codes + self.pairs[:, None, None] * (1 - 2 * codes)


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 2), (0, 2), (0, 3), (1, 3)], [(0, 1), (2, 3)]], ids=["more", "fewer"])
def test_fitted_potentials_are_exact_for_linear_losses_and_the_least_squares(pairs: list[tuple[int, int]]) -> None:
    moves = Swaps(pairs, 4)
    codes = torch.bernoulli(torch.full((2, 3, 4), 0.5, dtype=torch.float64), generator=Generator().manual_seed(0))
    steps = (moves.neighbours(codes) - codes).movedim(0, -2)  # [2, 3, C, 4]
    linear = steps @ torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    random = torch.randn(linear.shape, dtype=torch.float64, generator=Generator().manual_seed(1))
    for changes, exact in ((linear, True), (random, False)):
        fitted = moves.potentials(codes, changes.movedim(-1, 0))
        truth = torch.linalg.lstsq(steps, changes.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        torch.testing.assert_close(fitted, truth, rtol=1e-6, atol=1e-6)
        if exact:
            torch.testing.assert_close((steps @ fitted.unsqueeze(-1)).squeeze(-1), changes, rtol=1e-6, atol=1e-6)


def test_toggles_change_one_coordinate_at_a_time() -> None:
    moves, codes = Toggles((1, 2)), torch.tensor([[[[0.0, 1.0]]]])
    assert moves.neighbours(codes).flatten(1).tolist() == [[1, 1], [0, 0]]
    assert moves.potentials(codes, torch.tensor([[[5.0]], [[7.0]]])).flatten().tolist() == [5, -7]


def test_a_wrapper_defines_what_the_layer_in_it_defines() -> None:
    mask, allowed = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    for wrapped in (dgrad.restricted(Bare(), allowed=allowed), dgrad.restricted(Bare(), mask=mask)):
        assert not wrapped.defines("noise")
    with pytest.raises(dgrad.InputError, match="needs the noise of a latent"):
        dgrad.estimator("imle")(Bare(), torch.zeros(1, 2, 3), lambda codes: codes.sum((-2, -1)), mask=mask)


@pytest.mark.parametrize("spec", ["2x3", "2+3", "pairs:3"])
@pytest.mark.parametrize("method", ["kl", "entropy"])
def test_logits_with_other_axes_are_refused_where_they_would_broadcast(spec: str, method: str) -> None:
    layer = dgrad.latent(spec)
    for shape in ((4, 4, *layer.shape), layer.shape):
        with pytest.raises(dgrad.InputError, match=r"expected \[batch, .* take dgrad.restricted"):
            getattr(layer, method)(torch.zeros(shape))


@pytest.mark.parametrize("layer", [Plain(2, 3), dgrad.latent("pairs:3")], ids=["from log_z", "pairs"])
def test_a_logit_of_minus_infinity_forbids_a_coordinate_of_a_structure(layer: LatentLayer) -> None:
    logits = torch.randn(2, *layer.shape, dtype=torch.float64)
    forbidding = logits.flatten(1).index_fill(1, torch.tensor([1]), -torch.inf).view(logits.shape).requires_grad_()
    codes = layer.enumerate(logits)
    possible = codes[codes.flatten(1)[:, 1] == 0]
    kept = possible.flatten(1).bool()
    scores = torch.where(kept, forbidding.flatten(1).unsqueeze(1), 0.0).sum(-1)  # [2, K]
    log_q = scores.log_softmax(-1)
    torch.testing.assert_close(layer.log_prob(forbidding, possible.unsqueeze(1)), log_q.T)
    entropy = layer.entropy(forbidding)
    torch.testing.assert_close(entropy, -(log_q.exp() * log_q).sum(-1))
    torch.testing.assert_close(layer.kl(forbidding), math.log(layer.support_size) - entropy)
    torch.testing.assert_close(layer.mean(forbidding), torch.einsum("bk,k...->b...", log_q.exp(), possible))
    (slope,) = torch.autograd.grad(entropy.sum(), forbidding)
    assert slope.isfinite().all()
