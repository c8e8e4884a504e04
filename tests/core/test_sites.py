"""Sequences, masks, forbidden values and mixed sizes, for every estimator, against enumeration by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import dgrad
from dgrad.testing._shared import no_waiting
from dgrad_plugins.latents import UnequalCategorical
from tests.helpers import with_layer

DRAWS = 1500
"""Copies of each example in a batch: the mean over them is the Monte-Carlo mean."""
ERRORS = 5
"""Standard errors that a mean may be off: one false alarm in 1.7 million coordinates of a normal mean.

A run of this file compares some 1,500 coordinates. The seeds are fixed."""

T = 3
LENGTHS = (3, 1, 2)
MASK = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(-1)  # [3, T]


Losses = Callable[[Tensor], Tensor]


def codes_by_hand(log_q: Tensor, reachable: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every code `[R, k]` of the rows that have a reachable value, and its log-probability; other rows are zeros."""
    rows = [row for row in range(len(reachable)) if reachable[row].any()]
    for values in itertools.product(*(reachable[row].nonzero().flatten().tolist() for row in rows)):
        code = torch.zeros(reachable.shape, dtype=torch.float64)
        code[rows, values] = 1
        yield code, log_q[rows, values].sum()


class Problem:
    """Three examples: rows of ragged lengths, a value that is forbidden by `allowed`, another by a logit of -inf.

    Args:
        spec: of the layer.
        shape: of the logits of one example.
    """

    def __init__(self, spec: str, shape: tuple[int, ...], *, masked: bool) -> None:
        self.layer = dgrad.latent(spec)
        generator, k = Generator().manual_seed(0), shape[-1]
        self.logits = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
        self.allowed = torch.ones(self.logits.shape, dtype=torch.bool)
        self.allowed[0].view(-1, k)[1, 0] = False
        self.logits[2].view(-1, k)[0, k - 1] = -torch.inf
        self.mask = MASK if masked else None
        self.reachable = self.allowed & (self.logits > -torch.inf)
        if masked:
            self.logits[~MASK] = torch.nan  # padding may be anything
            self.reachable &= MASK[..., None, None]
        if isinstance(self.layer, UnequalCategorical):
            self.reachable &= self.layer.allowed
        rows = self.reachable[0].numel() // k
        self.site_weight = torch.randn(rows, k, dtype=torch.float64, generator=generator)
        self.mixing = torch.randn(rows * k, rows * k, dtype=torch.float64, generator=generator)

    def losses(self, rows: Tensor, credit: str) -> Tensor:
        """Of codes `[..., R, k]`: a loss for each row with local credit, `[...]` of the whole example otherwise."""
        own = (rows * self.site_weight).sum(-1)  # [..., R]
        if credit == "site":
            return own + own.square()
        if credit == "future":  # a site's loss depends on its code and the earlier ones
            return own.cumsum(-1).square()
        flat = rows.flatten(-2)
        return torch.einsum("...i,ij,...j->...", flat, self.mixing, flat) / 2

    def exact(self, credit: str) -> tuple[Tensor, Tensor]:
        """`E[f]` of each example and its gradient, by a loop over codes. Local losses are summed over the sites."""
        logits = torch.where(self.reachable, self.logits, 0).requires_grad_()
        values = []
        for of_example, reachable in zip(logits, self.reachable, strict=True):
            flat = reachable.flatten(0, -2)
            log_q = torch.where(reachable, of_example, -1e30).log_softmax(-1).flatten(0, -2)
            value = torch.zeros((), dtype=torch.float64)
            for code, log_prob in codes_by_hand(log_q, flat):
                losses = self.losses(code, credit)
                value = value + log_prob.exp() * (losses if credit == "example" else losses[flat.any(-1)].sum())
            values.append(value)
        value = torch.stack(values)
        return value.detach(), torch.autograd.grad(value.sum(), logits)[0]

    def objective(self, credit: str) -> Losses:
        """The same as an estimator gets it. It refuses what it must never see."""

        def loss(codes: Tensor) -> Tensor:
            copies = self.copies(self.reachable, codes.shape[1] // 3)
            assert not ((codes.detach() != 0) & ~copies).any(), "it was evaluated at a forbidden value, or at padding"
            sums = codes.detach().sum(-1)
            torch.testing.assert_close(sums, copies.any(-1).to(sums.dtype).expand_as(sums))
            losses = self.losses(codes.flatten(2, -2), credit)
            if credit == "example":
                return losses
            return torch.where(copies.any(-1).flatten(1), losses, torch.nan)  # padded entries are ignored

        return loss

    @staticmethod
    def copies(tensor: Tensor, count: int) -> Tensor:
        return tensor.repeat(count, *[1] * (tensor.ndim - 1))


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    return {
        "1x2": Problem("1x2", (T, 1, 2), masked=True),
        "1x3": Problem("1x3", (T, 1, 3), masked=True),
        "2x2": Problem("2x2", (2, 2), masked=False),
        "2x3": Problem("2x3", (2, 3), masked=False),
        "2+3": Problem("2+3", (2, 3), masked=False),
    }


BINARY = ("arm", "arms", "bitflip-1", "disarm")
NAMES = sorted(dgrad.estimators())
QUICK = ("aimle", "direct", "exact", "gumbel-softmax", "leg", "reinforce", "sum-and-sample", "unordered-set")
"""One of each kind, for what the others do alike."""


def cases(names: Iterable[str], *more: str) -> list[Any]:
    """The names, or names with other values; slow but for one of each kind."""
    return [
        pytest.param(name, *rest, marks=[pytest.mark.slow] * (name not in QUICK and rest in ((), ("future",))))
        for name in names
        for rest in (itertools.product(more) if more else ((),))
    ]


def check(name: str, problem: Problem, credit: str) -> None:
    """The value and the gradient against enumeration, and no gradient where nothing is free."""
    mask, allowed = (None if part is None else problem.copies(part, DRAWS) for part in (problem.mask, problem.allowed))
    local = credit == "site" or (credit == "future" and dgrad.estimator(name).traits.losses_of_sites)
    layer = problem.layer if mask is None or local else dgrad.restricted(problem.layer, mask=mask)
    estimator = with_layer(name, layer)
    logits = problem.copies(problem.logits, DRAWS).requires_grad_()
    estimate = estimator(
        problem.layer,
        logits,
        problem.objective(credit),
        mask=mask,
        allowed=allowed,
        credit=credit,
        generator=Generator().manual_seed(1),
    )
    assert estimate.loss.shape == (3 * DRAWS,)
    assert estimate.codes.shape[1:] == logits.shape
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
    assert estimate.loss.isfinite().all()
    assert gradient.isfinite().all()
    assert not gradient[~problem.copies(problem.reachable, DRAWS)].any(), "a gradient where nothing is free"
    value, truth = problem.exact(credit)
    if estimator.traits.unbiased:
        _close(gradient.unflatten(0, (DRAWS, 3)), truth)
    if estimator.traits.unbiased_value:
        _close(estimate.loss.detach().view(DRAWS, 3), value)


@pytest.mark.parametrize(("name", "credit"), cases(NAMES, "example", "site", "future"))
def test_sequences_are_right(name: str, credit: str, problems: dict[str, Problem]) -> None:
    """Ragged lengths, `allowed` and -inf in one batch."""
    check(name, problems["1x2" if name in BINARY else "1x3"], credit)


@pytest.mark.parametrize("name", cases(NAMES))
def test_forbidden_values_are_right(name: str, problems: dict[str, Problem]) -> None:
    """`allowed` and -inf in one batch."""
    check(name, problems["2x2" if name in BINARY else "2x3"], "example")


@pytest.mark.parametrize("name", cases(sorted(set(NAMES) - set(BINARY))))
def test_variables_of_different_sizes_are_right(name: str, problems: dict[str, Problem]) -> None:
    check(name, problems["2+3"], "example")


def _close(draws: Tensor, truth: Tensor) -> None:
    """The mean over draws is within 5 standard errors."""
    error = draws.std(0) / len(draws) ** 0.5
    excess = (draws.mean(0) - truth).abs() - ERRORS * error
    assert (excess <= 1e-6).all(), f"off by {(draws.mean(0) - truth).abs().max():.3g}, error {error.max():.2g}"


def test_a_biased_gradient_is_found(problems: dict[str, Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is not so loose that the mean of `straight-through` passes."""
    estimator = type(dgrad.estimator("straight-through"))
    traits = dgrad.estimator("rloo").traits
    monkeypatch.setattr(estimator, "traits", property(lambda self: traits))
    with pytest.raises(AssertionError, match="off by"):
        check("straight-through", problems["1x3"], "example")


# Probabilities


@pytest.fixture(scope="module", params=["1x3", "2x3", "2+3"])
def problem(request: pytest.FixtureRequest, problems: dict[str, Problem]) -> Problem:
    return problems[request.param]


def _by_hand(problem: Problem, of_codes: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`sum over codes` of a function of all codes `[K, R, k]` and their `log q` `[K]`, for each example."""
    results = []
    for of_example, reachable in zip(problem.logits, problem.reachable, strict=True):
        log_q = torch.where(reachable, of_example, -1e30).log_softmax(-1).flatten(0, -2)
        codes, log_probs = zip(*codes_by_hand(log_q, reachable.flatten(0, -2)), strict=True)
        results.append(of_codes(torch.stack(codes), torch.stack(log_probs)))
    return torch.stack(results)


def test_entropy_mean_and_draws_are_right(problem: Problem) -> None:
    layer = dgrad.restricted(problem.layer, mask=problem.mask, allowed=problem.allowed)
    entropy = _by_hand(problem, lambda codes, log_q: -(log_q.exp() * log_q).sum())
    torch.testing.assert_close(layer.entropy(problem.logits), entropy)
    mean = _by_hand(problem, lambda codes, log_q: (log_q.exp()[:, None, None] * codes).sum(0))
    torch.testing.assert_close(layer.mean(problem.logits).flatten(1, -2), mean)
    codes = layer.sample(problem.logits, 4000, generator=Generator().manual_seed(0)).flatten(2, -2)  # [S, 3, R, k]
    _close(codes, mean)
    for name in ("sum", "log_q"):
        of_codes, log_q = layer.support(problem.logits)
        expected = torch.ones(3, dtype=torch.float64) if name == "sum" else -entropy
        weight = torch.ones_like(log_q) if name == "sum" else log_q.nan_to_num(neginf=0.0)
        torch.testing.assert_close((log_q.exp() * weight).sum(0), expected)
        once = log_q > -torch.inf
        torch.testing.assert_close(layer.log_prob(problem.logits, of_codes)[once], log_q[once])


def test_with_allowed_the_prior_is_uniform_over_what_is_allowed(problem: Problem) -> None:
    """A bare -inf leaves the prior as it is."""
    layer = dgrad.restricted(problem.layer, mask=problem.mask, allowed=problem.allowed)
    sizes = problem.reachable.clone()
    sizes[2].view(-1, sizes.shape[-1])[0, -1] |= not isinstance(problem.layer, UnequalCategorical)  # the bare -inf
    log_count = sizes.sum(-1).clamp_min(1).flatten(1).log().sum(-1)
    leaf = problem.logits.clone().requires_grad_()
    kl = layer.kl(leaf)
    torch.testing.assert_close(kl, log_count - layer.entropy(problem.logits), check_dtype=False)
    (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    assert gradient.isfinite().all()
    assert not gradient[~problem.reachable].any()
    objective = dgrad.KLObjective(problem.layer, problem.logits, mask=problem.mask, allowed=problem.allowed)
    codes, log_q = layer.support(problem.logits)
    losses = objective(codes.expand(-1, 3, *codes.shape[2:]))
    torch.testing.assert_close((log_q.exp() * losses).sum(0), kl.detach())


def test_a_categorical_with_a_logit_of_minus_infinity() -> None:
    layer, logits = dgrad.latent("2x3"), torch.randn(4, 2, 3, generator=Generator().manual_seed(0))
    logits[:, 0, 1] = -torch.inf
    low = logits.clamp_min(-200)
    for name in ("kl", "entropy"):
        of_logits, of_low = (tensor.clone().requires_grad_() for tensor in (logits, low))
        value = getattr(layer, name)(of_logits)
        torch.testing.assert_close(value, getattr(layer, name)(of_low))
        for one, other in zip(
            *(torch.autograd.grad(getattr(layer, name)(x).sum(), x) for x in (of_logits, of_low)), strict=True
        ):
            torch.testing.assert_close(one, other)
    codes = layer.sample(logits, 5, generator=Generator().manual_seed(0))
    torch.testing.assert_close(layer.log_prob(logits, codes), layer.log_prob(low, codes))
    assert not codes[..., 0, 1].any()


def test_exact_counts_no_padding_of_a_structured_layer() -> None:
    """Twenty sites, of which an example has three at most: the same as three sites, wherever they are."""
    layer, generator = dgrad.latent("pairs:2"), Generator().manual_seed(0)
    places = torch.tensor([[3, 9, 19], [0, 4, 5], [7, 8, 0]])
    counts = [3, 1, 0]
    short = torch.randn(3, 3, *layer.shape, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(3, *layer.shape, dtype=torch.float64, generator=generator)
    results = []
    for wide in (False, True):
        mask = torch.arange(3) < torch.tensor(counts).unsqueeze(-1)
        logits, weights = short, weight.expand(3, -1, -1)
        if wide:
            of_site = places.unsqueeze(-1).expand_as(short)
            logits = torch.full((3, 20, *layer.shape), torch.nan, dtype=torch.float64).scatter(1, of_site, short)
            weights = torch.zeros_like(logits).scatter(1, of_site, weights)
            mask = torch.zeros(3, 20, dtype=torch.bool).scatter(1, places, mask)
        loss = dgrad.estimator("exact")(
            layer, logits, lambda codes, weights=weights: (codes * weights).sum((-2, -1)).square(), mask=mask
        ).loss
        results.append((loss, *torch.autograd.grad(loss.sum(), short)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(dgrad.InputError, match=r"20 sites of pairs:2 has 1.68e\+07; expected at most 4096"):
        dgrad.estimator("exact")(
            layer, torch.zeros(1, 20, *layer.shape), _loss_of_nothing, mask=torch.arange(20)[None] < 12
        )


def _loss_of_nothing(codes: Tensor) -> Tensor:
    raise AssertionError("nothing is evaluated")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", ["1x3", "2x3", "pairs:2", "2+3"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_a_forbidden_code_has_the_log_probability_of_what_is_impossible(
    spec: str, dtype: torch.dtype, shared: bool
) -> None:
    """-inf by a logit, by `allowed` and in a sequence, without a NaN in the gradient; allowed codes as they were."""
    layer = dgrad.latent(spec)
    support = layer.enumerate(like=torch.zeros((), dtype=dtype)).unsqueeze(1)  # [K, 1, *code]
    allowed = torch.ones(layer.shape, dtype=torch.bool)
    allowed[(0,) * len(layer.shape)] = False
    forbidden = ((support > 0.5) & ~allowed).flatten(2).any(-1).expand(-1, 2)
    codes = support if shared else support.repeat(1, 2, *[1] * len(layer.shape))
    zeros = torch.zeros(2, *layer.shape, dtype=dtype)
    cases = {
        "logits": (layer, torch.where(allowed, zeros, -torch.inf), codes),
        "allowed": (dgrad.restricted(layer, allowed=allowed), zeros, codes),
        "sites": (
            dgrad.restricted(layer, mask=torch.tensor([[True, False]] * 2), allowed=allowed),
            torch.stack([zeros, zeros], 1),
            torch.stack([codes, codes], 2),
        ),
    }
    for name, (of, logits, of_codes) in cases.items():
        leaf = logits.clone().requires_grad_()
        log_q = of.log_prob(leaf, of_codes)
        assert torch.equal(log_q == -torch.inf, forbidden), name
        total = torch.where(forbidden, 0, log_q.exp()).sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=0.02, msg=name)
        for value in (
            log_q.sum(),
            log_q.exp().sum(),
            log_q[~forbidden].sum(),
            of.kl(leaf).sum(),
            of.entropy(leaf).sum(),
        ):
            (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
            assert gradient.isfinite().all(), name


@pytest.mark.parametrize("credit", ["example", "site"])
def test_the_kl_inside_the_objective(credit: str, problems: dict[str, Problem]) -> None:
    """`exact` of the KL's objective is the KL, with the gradient of the KL but for that of log q, whose mean is 0."""
    problem = problems["1x3"]
    restrictions = {"mask": problem.mask, "allowed": problem.allowed}
    leaf = problem.logits.clone().requires_grad_()
    objective = 2.0 * dgrad.KLObjective(problem.layer, problem.logits, credit=credit, **restrictions)
    estimate = dgrad.estimator("exact")(problem.layer, leaf, objective, credit=credit, **restrictions)
    expected = 2 * dgrad.restricted(problem.layer, **restrictions).kl(leaf)
    torch.testing.assert_close(estimate.loss, expected)
    gradients = [torch.autograd.grad(loss.sum(), leaf)[0] for loss in (estimate.loss, expected)]
    torch.testing.assert_close(*gradients)
    table = dgrad.estimator("direct-rb", epsilon=1e-4)(problem.layer, leaf, objective, credit=credit, **restrictions)
    torch.testing.assert_close(torch.autograd.grad(table.loss.sum(), leaf)[0], gradients[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("credit", ["example", "site", "future"])
def test_the_kl_takes_the_restrictions_of_the_call(credit: str, problems: dict[str, Problem]) -> None:
    problem = problems["1x3"]
    restrictions = {"mask": problem.mask, "allowed": problem.allowed}
    kl = dgrad.KLObjective(problem.layer, problem.logits)
    objective = 2.0 * dgrad.objective(kl) - kl
    estimate = dgrad.estimator("exact")(problem.layer, problem.logits, objective, credit=credit, **restrictions)
    torch.testing.assert_close(estimate.loss, dgrad.restricted(problem.layer, **restrictions).kl(problem.logits))


def test_padding_changes_nothing(problems: dict[str, Problem]) -> None:
    """With more padding on the right the same gradient, draw for draw where the noise is that of a site."""
    problem = problems["1x3"]
    layer, mask = problem.layer, MASK

    def loss(codes: Tensor) -> Tensor:
        return (codes.squeeze(-2)[:, :, :T] * problem.site_weight).sum((-2, -1)).square()

    logits = problem.logits.nan_to_num().clamp_min(-5)
    for name in ("exact", "direct-joint"):
        gradients = []
        for extra in (0, 2):
            leaf = torch.cat([logits, torch.zeros(3, extra, 1, 3, dtype=torch.float64)], 1).requires_grad_()
            wide = torch.cat([mask, torch.zeros(3, extra, dtype=torch.bool)], 1)
            estimate = dgrad.estimator(name)(layer, leaf, loss, mask=wide, generator=Generator().manual_seed(0))
            gradients.append(torch.autograd.grad(estimate.loss.sum(), leaf)[0][:, :T])
        torch.testing.assert_close(*gradients)


# Sweeps


@pytest.mark.parametrize(("credit", "expected"), [("example", 1 + 3 * 2), ("site", 1 + 2)])
def test_a_sweep_evaluates_what_is_allowed(credit: str, expected: int, problems: dict[str, Problem]) -> None:
    """As many codes as the example with the most changes; with a loss for each site all sites change at once."""
    problem, evaluated = problems["1x3"], 0

    def loss(codes: Tensor) -> Tensor:
        nonlocal evaluated
        evaluated += len(codes)
        return problem.objective(credit)(codes)

    lengths = torch.tensor([3, 1, 2])
    mask = torch.arange(T) < lengths.unsqueeze(-1)
    dgrad.estimator("leg")(problem.layer, problem.logits, loss, mask=mask, allowed=problem.allowed, credit=credit)
    assert evaluated == expected - (credit == "example")  # a value of the first example is forbidden


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_decoder_that_begins_linear_sweeps_sequences_by_its_columns(
    depth: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same gradient as by calls, padding included; no changed code is made."""
    layer, generator = dgrad.latent("1x4"), Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = nn.Sequential(nn.Linear(T * 4, 6), *[nn.ReLU(), nn.Linear(6, 6)][: 2 * (depth - 1)])
    data = (torch.rand(3, 6, generator=generator) < 0.5).float()
    logits = torch.randn(3, T, 1, 4, generator=generator).requires_grad_()
    mask = MASK if masked else None
    kl = dgrad.KLObjective(layer, logits, mask=mask)

    def by_calls(codes: Tensor) -> Tensor:
        return dgrad.bernoulli(data)(decoder(codes.flatten(2)))

    gradients = []
    fast = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(data))
    monkeypatch.setattr(fast, "changes_per_call", lambda codes, count: pytest.fail("a sweep by calls"))
    for objective in (fast, dgrad.objective(by_calls)):
        estimate = dgrad.estimator("leg")(
            layer, logits, objective + kl, mask=mask, generator=Generator().manual_seed(0)
        )
        gradients.append(torch.autograd.grad(estimate.loss.sum(), logits)[0])
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


# Layers that are no rows

PAIRS = ("direct", "direct-joint", "direct-rb", "exact", "gumbel-softmax", "imle", "muprop", "reinforce", "rloo")


@pytest.mark.parametrize("credit", ["example", "site", "future"])
@pytest.mark.parametrize("name", PAIRS)
def test_sequences_of_a_structured_layer(name: str, credit: str) -> None:
    layer, generator = dgrad.latent("pairs:2"), Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, dtype=torch.float64, generator=generator)
    logits[0, 0, 1] = -torch.inf  # the second bit is never on, and so is the product
    mask = torch.tensor([[True, True], [True, False]])
    logits[1, 1] = torch.nan
    weight = torch.randn(2, 3, dtype=torch.float64, generator=generator)

    def losses(codes: Tensor) -> Tensor:
        assert not codes[:, ::2, 0, 1].any(), "a forbidden bit is on"
        assert not codes[:, 1::2, 1].any(), "padding is on"
        own = (codes * weight).sum(-1)
        if credit == "future":
            own = own.cumsum(-1)
        return own.square() if credit != "example" else own.sum(-1).square()

    totals = []
    leaf = torch.where(mask.unsqueeze(-1) & (logits > -torch.inf), logits, 0).requires_grad_()
    every = layer.enumerate(like=weight)  # [4, 3]
    for b, sites in enumerate((2, 1)):
        total = torch.zeros((), dtype=torch.float64)
        for chosen in itertools.product(range(4), repeat=sites):
            if b == 0 and every[chosen[0], 1]:
                continue
            code = torch.cat([every[list(chosen)], torch.zeros(2 - sites, 3, dtype=torch.float64)])
            log_q = torch.zeros((), dtype=torch.float64)
            for t, value in enumerate(chosen):
                support = every if (b, t) != (0, 0) else every[every[:, 1] == 0]
                log_q = log_q + leaf[b, t] @ every[value] - (support @ leaf[b, t]).logsumexp(0)
            loss = losses(code.expand(1, 2, 2, 3) * mask.unsqueeze(-1) * torch.tensor([b == 0, b == 1])[:, None, None])
            loss = loss[0, b] if credit == "example" else loss[0, b, :sites].sum()
            total = total + log_q.exp() * loss
        totals.append(total)
    (truth,) = torch.autograd.grad(torch.stack(totals).sum(), leaf)
    many = logits.repeat(DRAWS, 1, 1).requires_grad_()
    estimator = dgrad.estimator(name)
    estimate = estimator(
        layer, many, losses, mask=mask.repeat(DRAWS, 1), credit=credit, generator=Generator().manual_seed(0)
    )
    gradient = torch.autograd.grad(estimate.loss.sum(), many)[0].unflatten(0, (DRAWS, 2))
    assert gradient.isfinite().all()
    assert not gradient[:, 0, 0, 1].any()
    assert not gradient[:, 1, 1].any()
    if estimator.traits.unbiased:
        truth[0, 0, 1] = 0
        _close(gradient, truth)
        _close(estimate.loss.detach().view(DRAWS, 2), torch.stack(totals).detach())


# Refusals


@pytest.mark.parametrize(
    ("shape", "keywords", "message"),
    [
        ((2, 4, 3), {}, r"logits of shape \[2, 4, 3\] do not fit .* \[batch, 1, 3\], or \[batch, sites, 1, 3\]"),
        ((2, 1, 3), {"mask": torch.ones(2, 1, dtype=torch.bool)}, r"mask= and credit= are for logits \[batch, sites"),
        ((2, 1, 3), {"credit": "site"}, "mask= and credit= are for logits"),
        ((2, 4, 1, 3), {"credit": "sites"}, "credit must be one of example, site, future; got 'sites'"),
        ((2, 4, 1, 3), {"mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask of shape \[2, 3\]; expected .* \[2, 4\]"),
        ((2, 4, 1, 3), {"mask": torch.ones(2, 4)}, "mask of torch.float32; expected a tensor of torch.bool"),
        ((2, 1, 3), {"allowed": torch.ones(4, dtype=torch.bool)}, r"allowed of shape \[4\]; .* \[2, 1, 3\]"),
        ((2, 1, 3), {"allowed": torch.zeros(3, dtype=torch.bool)}, r"no value of variable 0 is allowed at index \[0\]"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], keywords: dict[str, object], message: str) -> None:
    with pytest.raises(dgrad.InputError, match=message):
        dgrad.estimator("rloo")(
            dgrad.latent("1x3"), torch.zeros(shape), lambda codes: codes.flatten(2).sum(-1), **keywords
        )


def test_a_loss_for_each_site_is_asked_for() -> None:
    with pytest.raises(
        dgrad.InputError, match=r"expected one loss for each site, \[samples, batch, sites\] = \[4, 2, 3\]"
    ):
        dgrad.estimator("rloo")(
            dgrad.latent("1x3"), torch.zeros(2, 3, 1, 3), lambda codes: codes.flatten(2).sum(-1), credit="site"
        )


class _OfExamples(dgrad.Objective):
    """A loss for each example, whatever it is asked for."""

    def __call__(self, codes: Tensor) -> Tensor:
        return codes.flatten(2).sum(-1)


@pytest.mark.parametrize("name", ["exact", "direct", "gumbel-softmax"])
def test_losses_of_examples_are_not_taken_for_losses_of_sites(name: str) -> None:
    """With as many sites as examples, losses `[S, B]` broadcast against `[S, B, T]` and a mask `[B, T]`."""
    layer, logits = dgrad.latent("1x3"), torch.zeros(3, 3, 1, 3)
    of_example = _OfExamples()
    with pytest.raises(dgrad.InputError, match=r"credit='site' expects one loss for each site, \[\d+, 3, 3\]"):
        dgrad.estimator(name)(layer, logits, of_example, mask=MASK, credit="site")
    total = dgrad.objective(lambda codes: codes[..., 0, 0]) + of_example
    with pytest.raises(
        dgrad.InputError, match=r"losses of shapes \[\d+, 3, 3\] and \[\d+, 3\]; expected a loss for each"
    ):
        dgrad.estimator(name)(layer, logits, total, mask=MASK, credit="site")


def test_a_restriction_needs_a_restriction() -> None:
    with pytest.raises(dgrad.InputError, match="nothing is restricted; expected mask= or allowed="):
        dgrad.restricted(dgrad.latent("1x3"))
    with pytest.raises(dgrad.InputError, match=r"no value of variable 1 is allowed at index \[0\] of the batch"):
        dgrad.restricted(dgrad.latent("2x3"), allowed=torch.tensor([[True] * 3, [False] * 3]))


def test_the_prior_of_sequences_knows_padding_and_forbidden_values() -> None:
    layer, allowed = dgrad.latent("2x3"), torch.tensor([True, True, False])
    restricted = dgrad.restricted(layer, mask=MASK, allowed=allowed)
    logits = torch.randn(3, T, 2, 3)
    # KL = -H - log p(z)
    expected = -restricted.kl(logits) - restricted.entropy(logits)
    torch.testing.assert_close(torch.as_tensor(restricted.log_prior), expected, check_dtype=False)


def test_a_restricted_layer_is_restricted_further() -> None:
    layer, allowed, logits = dgrad.latent("2x3"), torch.tensor([True, True, False]), torch.randn(3, T, 2, 3)
    once = dgrad.restricted(layer, mask=MASK, allowed=allowed)
    twice = dgrad.restricted(dgrad.restricted(layer, mask=MASK), allowed=allowed)
    torch.testing.assert_close(twice.kl(logits), once.kl(logits))
    with pytest.raises(dgrad.InputError, match=r"mask of shape \[2, 3\] for a layer with one of \[3, 3\]; expected"):
        dgrad.restricted(once, mask=MASK[:2])


def test_a_layer_is_refused_by_its_own_name() -> None:
    with pytest.raises(dgrad.InputError, match=r"arm is for binary variables, such as 20x2; got 2\+3"):
        dgrad.estimator("arm")(dgrad.latent("2+3"), torch.zeros(2, 2, 3), lambda codes: codes.flatten(2).sum(-1))


@pytest.mark.parametrize("spec", ["2+1", "2+", "a+3", "+3"])
def test_sizes_that_cannot_be_read(spec: str) -> None:
    with pytest.raises(dgrad.InputError, match=r"a categorical variable needs at least 2 values|cannot read"):
        dgrad.latent(spec)


def test_sizes_that_are_alike_are_rows() -> None:
    assert dgrad.latent("3+3") == dgrad.latent("2x3")
    assert str(dgrad.latent("2+3+5")) == "2+3+5"


# Edges


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        ([[True, False], [False, False]], torch.float32),
        ([[False, False]], torch.float32),
        ([], torch.float32),
        ([[True], [True]], torch.float32),
        ([[True, False], [True, True]], torch.bfloat16),
        ([[True, False], [True, True]], torch.float16),
    ],
    ids=["an empty sequence", "nothing but padding", "no example", "one site", "bfloat16", "float16"],
)
@pytest.mark.parametrize("name", NAMES)
def test_edges(name: str, mask: list[list[bool]], dtype: torch.dtype) -> None:
    """Finite values, gradients and buffers, codes in the dtype of the logits."""
    layer = dgrad.latent("1x2" if name in BINARY else "1x3")
    of_sites = torch.tensor(mask).bool().view(len(mask), len(mask[0]) if mask else 2)
    estimator = with_layer(name, dgrad.restricted(layer, mask=of_sites))
    logits = torch.randn(*of_sites.shape, *layer.shape, generator=Generator().manual_seed(0)).to(dtype).requires_grad_()

    def loss(codes: Tensor) -> Tensor:
        assert codes.dtype == dtype
        return codes[..., 0].flatten(2).sum(-1).square()

    estimate = estimator(layer, logits, loss, mask=of_sites, generator=Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
    assert gradient.dtype == dtype
    assert not gradient[~of_sites].any()
    for tensor in (estimate.loss, gradient, *estimator.buffers()):
        assert tensor.isfinite().all()


# Other devices, where nobody may look


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("evaluations", "restricted", "sites"):
        monkeypatch.setattr(f"dgrad.core.{module}.visible", lambda tensor: None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("unseen")
def test_nothing_waits_for_another_device(name: str) -> None:
    layer, mask = dgrad.latent("1x2" if name in BINARY else "1x3"), torch.tensor([[True, True], [True, False]])
    k = layer.shape[-1]
    allowed = torch.ones(2, 2, 1, k, dtype=torch.bool)
    allowed[0, 1, 0, 0] = False
    logits = torch.randn(2, 2, 1, k, generator=Generator().manual_seed(0)).requires_grad_()
    estimator = with_layer(name, dgrad.restricted(layer, mask=mask))
    weight = torch.arange(2.0 * k).view(2, 1, k)

    def loss(codes: Tensor) -> Tensor:
        return (codes * weight).flatten(2).sum(-1).square()

    with no_waiting():
        estimate = estimator(layer, logits, loss, mask=mask, allowed=allowed, generator=Generator().manual_seed(0))
        estimate.loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[~(allowed & mask[..., None, None])].any()
    assert not estimate.codes[:, 0, 1, 0, 0].any()


@pytest.mark.parametrize("name", ["exact", "leg"])
def test_without_a_look_at_the_logits_the_gradient_is_the_same(name: str, request: pytest.FixtureRequest) -> None:
    """Of a bare -inf too: a sweep evaluates forbidden values and discards them."""
    layer, logits = dgrad.latent("2x3"), torch.randn(4, 2, 3, generator=Generator().manual_seed(0))
    logits[:, 0, 1] = -torch.inf

    def gradient() -> Tensor:
        leaf = logits.clone().requires_grad_()
        loss = dgrad.estimator(name)(
            layer, leaf, lambda codes: (codes[..., 0] * codes[..., 1]).sum(-1), generator=Generator().manual_seed(0)
        ).loss
        return torch.autograd.grad(loss.sum(), leaf)[0]

    looked = gradient()
    request.getfixturevalue("unseen")
    torch.testing.assert_close(gradient(), looked)


@pytest.mark.parametrize("name", sorted(dgrad.estimators()))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("look", [True, False], ids=["seen", "unseen"])
def test_a_logit_that_is_no_number_comes_out(name: str, bad: float, look: bool, request: pytest.FixtureRequest) -> None:
    """In the loss and in all gradients, whoever may look at the logits. Other examples are as they were."""
    if not look:
        request.getfixturevalue("unseen")
    layer = dgrad.latent("2x2" if name in BINARY else "2x3")
    logits, weight = torch.zeros(2, *layer.shape), torch.ones(*layer.shape, requires_grad=True)
    logits[0, 1, 0] = bad
    logits.requires_grad_()
    estimator = with_layer(name, layer)
    loss = estimator(layer, logits, lambda codes: (codes * weight).sum((-2, -1)).square()).loss
    assert loss[0].isnan()
    (gradient,) = torch.autograd.grad(loss[0], weight, retain_graph=True)
    assert gradient.isnan().all()
    assert torch.autograd.grad(loss[0], logits)[0][0].isnan().any()
    assert loss[1].isfinite()
    if estimator.traits.pathwise:
        assert estimator.codes(layer, logits)[:, 0].isnan().all()
    if estimator.traits.one_pass:
        draw = estimator.draw(layer, logits)
        assert draw.estimate(torch.ones(draw.codes.shape[:2])).loss[0].isnan()


def test_a_padded_logit_may_be_anything() -> None:
    layer, logits = dgrad.latent("1x3"), torch.zeros(1, 2, 1, 3)
    logits[0, 1] = torch.nan
    mask = torch.tensor([[True, False]])
    whole = dgrad.estimator("direct")(layer, logits, lambda codes: codes[..., 0].sum((-2, -1)), mask=mask)
    local = dgrad.estimator("direct")(layer, logits, lambda codes: codes[..., 0].sum(-1), mask=mask, credit="site")
    assert whole.loss.isfinite().all()
    assert local.loss.isfinite().all()


def test_refined_logits_are_no_numbers_where_the_given_are_none() -> None:
    for spec in ("1x3", "2x3"):
        logits = torch.zeros(2, *dgrad.latent(spec).shape)
        logits[0, 0, 0] = torch.nan
        refined = dgrad.refine(dgrad.latent(spec), logits, lambda codes: codes[..., 0].sum(-1), 2)
        assert refined[0].isnan().any()
        assert refined[1].isfinite().all()
