"""The conformance kit against mutants: each has one fault, which the check that names it must catch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.core.estimates import Drawn, Estimate
from dgrad.core.estimator_tools import add_gradient, replace_gradient
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import CodeLoss, Objective
from dgrad.core.traits import Traits
from dgrad.testing import CHECKS, CheckResult, ConformanceError, check_estimator, parametrize_with_checks, run_checks
from dgrad.testing._kit import LATENTS, name_of, run_check


class Mutant(GradientEstimator):
    """Leave-one-out with two samples, correct as it stands; a mutant overrides one step of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(()))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, differentiable_objective=False, evaluations=lambda layer: 2, reference="this test")

    def sample(self, layer: LatentLayer, logits: Tensor, generator: Generator | None) -> Tensor:
        return layer.sample(logits, 2, generator=generator)

    def baseline(self, loss: Tensor) -> Tensor:
        return loss.flip(0)

    def direction(self, layer: LatentLayer, logits: Tensor, codes: Tensor, loss: Tensor) -> Tensor:
        weights = (loss - self.baseline(loss)).detach().reshape(*loss.shape, *[1] * len(layer.shape))
        return weights * (codes - layer.mean(logits.detach()))

    def loss(self, objective: Objective, codes: Tensor) -> Tensor:
        return objective(codes)

    def estimate(
        self, layer: LatentLayer, logits: Tensor, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        codes = self.sample(layer, logits, generator)
        loss = self.loss(objective, codes)
        direction = self.direction(layer, logits, codes, loss)
        return Estimate(loss=replace_gradient(loss, logits, direction).mean(0), codes=codes)


class WrongSign(Mutant):
    def direction(self, layer: LatentLayer, logits: Tensor, codes: Tensor, loss: Tensor) -> Tensor:
        return -super().direction(layer, logits, codes, loss)


class WrongScale(Mutant):
    """Five per cent too large."""

    def direction(self, layer: LatentLayer, logits: Tensor, codes: Tensor, loss: Tensor) -> Tensor:
        return 1.05 * super().direction(layer, logits, codes, loss)


class SharedNoise(Mutant):
    def sample(self, layer: LatentLayer, logits: Tensor, generator: Generator | None) -> Tensor:
        noise = layer.noise(logits[:1], 2, generator=generator)
        return layer.argmax(logits.detach() + noise)


class BaselineSeesItsSample(Mutant):
    """The mean over all samples, its own included."""

    def baseline(self, loss: Tensor) -> Tensor:
        return loss.mean(0)


class AverageSeesItsSample(Mutant):
    """A moving average that takes the loss in before it is used."""

    def baseline(self, loss: Tensor) -> Tensor:
        self.average.mul_(0.99).add_(0.01 * loss.detach().mean())
        return self.average


class LearningAverageSeesItsSample(AverageSeesItsSample):
    """The same in training alone."""

    def baseline(self, loss: Tensor) -> Tensor:
        return super().baseline(loss) if self.learning() else self.average


class BatchMeanBaseline(Mutant):
    def baseline(self, loss: Tensor) -> Tensor:
        return loss.mean()


class LeastLogit(Mutant):
    """Draws as if no logit were below -2, forbidden values neither."""

    def sample(self, layer: LatentLayer, logits: Tensor, generator: Generator | None) -> Tensor:
        potentials = logits.detach().clamp_min(-2) + layer.noise(logits, 2, generator=generator)
        return torch.zeros_like(potentials).scatter(-1, potentials.argmax(-1, keepdim=True), 1.0)

    def direction(self, layer: LatentLayer, logits: Tensor, codes: Tensor, loss: Tensor) -> Tensor:
        weights = (loss - self.baseline(loss)).detach()[..., None, None]
        return weights * (codes - logits.detach().clamp_min(-2).softmax(-1))


class GlobalGenerator(Mutant):
    def sample(self, layer: LatentLayer, logits: Tensor, generator: Generator | None) -> Tensor:
        return layer.sample(logits, 2)


class DoubledDecoderGradient(Mutant):
    def loss(self, objective: Objective, codes: Tensor) -> Tensor:
        loss = objective(codes)
        return loss + (loss - loss.detach())


class WrongValue(Mutant):
    """The loss of the more probable code where that of a sample is expected."""

    def loss(self, objective: Objective, codes: Tensor) -> Tensor:
        return objective(codes).amin(0, keepdim=True).expand(2, -1)


class OneEvaluationMore(Mutant):
    def loss(self, objective: Objective, codes: Tensor) -> Tensor:
        objective(codes[:1])
        return objective(codes)


class OneEvaluationMoreInBfloat16(Mutant):
    """Counts right in float32, and once more where codes change their dtype."""

    def forward(
        self, layer: LatentLayer, logits: Tensor, objective: CodeLoss, *, generator: Generator | None = None
    ) -> Estimate:
        if logits.dtype == torch.bfloat16:
            objective(layer.sample(logits))
        return super().forward(layer, logits, objective, generator=generator)


class ForgetsItsState(Mutant):
    """What it averages is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = 0.0

    def baseline(self, loss: Tensor) -> Tensor:
        before = self.mean
        self.mean = 0.9 * self.mean + 0.1 * float(loss.detach().mean())
        return torch.full_like(loss, before)


class AsksForAValue(Mutant):
    """Centres the loss by a number that Python has read."""

    def baseline(self, loss: Tensor) -> Tensor:
        return loss.flip(0) + 0 * float(loss.detach().mean())


class IndexesByAMask(Mutant):
    def sample(self, layer: LatentLayer, logits: Tensor, generator: Generator | None) -> Tensor:
        codes = super().sample(layer, logits, generator)
        return codes * codes[codes > 0.5].mean()


class ReplacesItsBuffer(Mutant):
    """Right, but a recorded step would go on from the old average for ever."""

    def baseline(self, loss: Tensor) -> Tensor:
        before = self.average
        self.average = before.lerp(loss.detach().mean(), 0.01)
        return before


class View(Mutant):
    def direction(self, layer: LatentLayer, logits: Tensor, codes: Tensor, loss: Tensor) -> Tensor:
        logits.view(-1)
        return super().direction(layer, logits, codes, loss)


class Overflow(Mutant):
    """A softmax without a shift."""

    def direction(self, layer: LatentLayer, logits: Tensor, codes: Tensor, loss: Tensor) -> Tensor:
        weights = logits.detach().exp()
        p = weights / weights.sum(-1, keepdim=True)
        return (loss - self.baseline(loss)).detach()[..., None, None] * (codes - p)


class SoftCodes(Mutant):
    def estimate(
        self, layer: LatentLayer, logits: Tensor, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        estimate = super().estimate(layer, logits, objective, generator=generator)
        return replace(estimate, codes=layer.relax(logits.detach(), 1.0).expand_as(estimate.codes))


class OtherCodesWithoutGradient(Mutant):
    def sample(self, layer: LatentLayer, logits: Tensor, generator: Generator | None) -> Tensor:
        codes = super().sample(layer, logits, generator)
        return codes if torch.is_grad_enabled() else codes.flip(0).roll(1, 1)


class LearnsNothing(Mutant):
    """A parameter that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def baseline(self, loss: Tensor) -> Tensor:
        return loss.flip(0) * self.scale.detach()


class NeverReachesItsLimit(Mutant):
    """Biased, and says that the bias vanishes."""

    def __init__(self) -> None:
        super().__init__()
        self.hyperparameter("epsilon", 1.0)

    @property
    def traits(self) -> Traits:
        return replace(super().traits, unbiased=False, limit=dgrad.ExactLimit("any", {"epsilon": 0.01}))

    def direction(self, layer: LatentLayer, logits: Tensor, codes: Tensor, loss: Tensor) -> Tensor:
        return 0.8 * super().direction(layer, logits, codes, loss)


class InHalves(Mutant):
    """Draws now and learns later, correct as it stands."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, one_pass=True)

    def draw_codes(self, layer: LatentLayer, logits: Tensor, *, generator: Generator | None = None) -> Drawn:
        return Drawn(self.sample(layer, logits, generator))

    def estimate_from(self, layer: LatentLayer, logits: Tensor, drawn: Drawn, loss: Tensor) -> Estimate:
        direction = self.direction(layer, logits, drawn.codes, loss)
        return Estimate(loss=replace_gradient(loss, logits, direction).mean(0), codes=drawn.codes)


class DrawsOnceMore(InHalves):
    """Its draw is not that of its call."""

    def draw_codes(self, layer: LatentLayer, logits: Tensor, *, generator: Generator | None = None) -> Drawn:
        self.sample(layer, logits, generator)
        return super().draw_codes(layer, logits, generator=generator)


class ReadsItsAverageLate(InHalves):
    """The baseline of a draw knows the losses of draws that came later."""

    def baseline(self, loss: Tensor) -> Tensor:
        before = self.average.clone()
        self.average.lerp_(loss.detach().mean().to(before.dtype), 0.1)
        return before


class OtherCodesThanItsCall(Mutant):
    """Straight-through as a call, and half of it as codes."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, unbiased=False, differentiable_objective=True, pathwise=True)

    def differentiable_codes(
        self, layer: LatentLayer, logits: Tensor, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        codes = self.sample(layer, logits, generator)
        return add_gradient(codes, layer.mean(logits) / 2), codes

    def estimate(
        self, layer: LatentLayer, logits: Tensor, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        codes = self.sample(layer, logits, generator)
        return Estimate(loss=objective(add_gradient(codes, layer.mean(logits))).mean(0), codes=codes)


MUTANTS: list[tuple[Callable[[], GradientEstimator], str]] = [
    (WrongSign, "unbiased"),
    (WrongScale, "unbiased"),
    (SharedNoise, "noise differs across the batch"),
    (BaselineSeesItsSample, "unbiased"),
    (BaselineSeesItsSample, "baseline has not seen its sample"),
    (AverageSeesItsSample, "baseline has not seen its sample"),
    (LearningAverageSeesItsSample, "baseline has not seen its sample"),
    (AverageSeesItsSample, "independent examples"),
    (AverageSeesItsSample, "frozen in eval"),
    (BatchMeanBaseline, "independent examples"),
    (BatchMeanBaseline, "baseline has not seen its sample"),
    (GlobalGenerator, "repeatable"),
    (DoubledDecoderGradient, "decoder gradient"),
    (WrongValue, "value"),
    (OneEvaluationMore, "evaluations"),
    (OneEvaluationMoreInBfloat16, "evaluations"),
    (ForgetsItsState, "state"),
    (AsksForAValue, "asks the device nothing"),
    (IndexesByAMask, "asks the device nothing"),
    (ReplacesItsBuffer, "asks the device nothing"),
    (View, "non contiguous logits"),
    (Overflow, "extreme logits"),
    (SoftCodes, "shapes and dtypes"),
    (OtherCodesWithoutGradient, "values without gradients"),
    (LearnsNothing, "learned parts"),
    (NeverReachesItsLimit, "limit"),
    (DrawsOnceMore, "draw now learn later"),
    (ReadsItsAverageLate, "draw now learn later"),
    (OtherCodesThanItsCall, "codes with a gradient"),
    (LeastLogit, "forbidden values and padding"),
]
CUDA_CHECKS = {"other devices", "no host synchronisation"}


def _result(estimator: GradientEstimator, name: str) -> CheckResult:
    (check,) = [check for check in CHECKS if name_of(check) == name]
    layers = [dgrad.latent(spec) for spec in LATENTS]
    return run_check(check, estimator, layers)


@pytest.mark.slow
def test_the_sound_estimator_that_the_mutants_are_made_from_passes() -> None:
    results = run_checks(Mutant())
    assert {result.name for result in results if result.status == "failed"} == set()
    assert {result.name for result in results if result.status == "passed"} >= {"unbiased", "state", "value"}


@pytest.mark.parametrize(
    ("mutant", "check"),
    [pytest.param(*case, marks=[pytest.mark.slow] * case[1].startswith("baseline")) for case in MUTANTS],
    ids=lambda case: case if isinstance(case, str) else case.__name__,
)
def test_every_mutant_is_caught_by_the_check_that_names_its_fault(
    mutant: Callable[[], GradientEstimator], check: str
) -> None:
    assert _result(mutant(), check).status == "failed"


def test_every_check_that_runs_here_catches_a_mutant() -> None:
    assert {name_of(check) for check in CHECKS} - CUDA_CHECKS == {check for _, check in MUTANTS}


def test_a_failure_says_which_check_and_by_how_much() -> None:
    with pytest.raises(
        ConformanceError, match=r"WrongSign fails \d+ of \d+ checks:\n(.*\n)*.*unbiased: failed: .*by enumeration"
    ):
        check_estimator(WrongSign(), dgrad.latent("1x5"))


@pytest.mark.slow
def test_expected_failures_carry_a_reason_and_are_strict() -> None:
    layer = dgrad.latent("1x5")
    check_estimator(OneEvaluationMore(), layer, expected_failures={"evaluations": "counted twice on purpose"})
    results = run_checks(OneEvaluationMore(), layer, expected_failures={"evaluations": "on purpose"})
    (result,) = [result for result in results if result.name == "evaluations"]
    assert result.status == "expected failure"
    assert result.detail.startswith("on purpose (")
    with pytest.raises(ConformanceError, match="value: unexpected pass: thought so"):
        check_estimator(Mutant(), layer, expected_failures={"value": "thought so"})
    with pytest.raises(dgrad.InputError, match="no check is named 'valu'; expected one of: shapes and dtypes"):
        run_checks(Mutant(), expected_failures={"valu": "a slip"})


@pytest.mark.slow
def test_a_given_layer_is_the_one_that_is_used() -> None:
    seen = set()

    class Noted(Mutant):
        def sample(self, layer: LatentLayer, logits: Tensor, generator: Generator | None) -> Tensor:
            seen.add(str(layer))
            return super().sample(layer, logits, generator)

    results = {result.name: result for result in run_checks(Noted(), dgrad.latent("20x10"))}
    assert seen == {"20x10"}
    assert results["unbiased"].status == "skipped"
    assert results["unbiased"].detail == "latent 20x10 has too many codes to enumerate"
    with pytest.raises(dgrad.InputError, match="20x10 has 1e"):
        run_checks(dgrad.estimator("exact"), dgrad.latent("20x10"))


def test_an_estimator_that_supports_none_of_the_latents_says_so() -> None:
    class Picky(Mutant):
        @property
        def traits(self) -> Traits:
            return replace(super().traits, why_unsupported=lambda layer: "no")

    with pytest.raises(dgrad.InputError, match=r"supports none of the latents 1x2, 1x5, 3x2, 2x4; expected a layer"):
        run_checks(Picky())


def test_the_estimator_stays_as_it_is() -> None:
    estimator = dgrad.estimator("reinforce")
    before = copy.deepcopy(estimator.state_dict())
    random = torch.get_rng_state()
    run_checks(estimator, dgrad.latent("3x2"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in estimator.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.slow
@parametrize_with_checks(["rloo", Mutant()])
def test_conforms(estimator: GradientEstimator, check: Callable[[GradientEstimator], None]) -> None:
    check(estimator)


@parametrize_with_checks([WrongSign()], layer=dgrad.latent("1x5"), expected_failures={"unbiased": "the sign is wrong"})
def test_expected_failures_are_strict_xfails(
    estimator: GradientEstimator, check: Callable[[GradientEstimator], None], request: pytest.FixtureRequest
) -> None:
    try:
        check(estimator)
    except ConformanceError:
        if not list(request.node.iter_markers("xfail")):
            pytest.skip("this mutant fails other checks too")
        raise


def test_results_are_read_as_ok_or_not() -> None:
    ok = {status: CheckResult("x", status, "", 0.0).ok for status in ("passed", "failed", "unexpected pass")}
    assert ok == {"passed": True, "failed": False, "unexpected pass": False}
    assert len(CHECKS) == len({check.__name__ for check in CHECKS})
