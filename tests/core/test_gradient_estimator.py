"""The contract of estimators: what a call refuses of its caller and of a plugin."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

import dgrad
from dgrad.core.estimates import Estimate
from dgrad.core.estimator_tools import replace_gradient
from dgrad.core.gradient_estimator import GradientEstimator


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(
        dgrad.InputError,
        match=r"logits of shape \[2, 10, 20\] do not fit the latent layer 20x10; expected \[batch, 20, 10\]",
    ):
        dgrad.estimator("leg")(dgrad.latent("20x10"), torch.zeros(2, 10, 20), lambda codes: codes.sum((-2, -1)))


def test_an_objective_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(dgrad.InputError, match="expected one loss for each code"):
        dgrad.estimator("leg")(dgrad.latent("2x3"), torch.zeros(2, 2, 3), lambda codes: codes.sum(-1))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss, codes: None, "returned a NoneType; expected an Estimate"),
        (lambda loss, codes: Estimate(loss=loss, codes=codes), r"returned a loss of shape \[1, 4\]; expected .* \[4\]"),
        (
            lambda loss, codes: Estimate(loss=loss.mean(0), codes=codes[0]),
            r"returned codes of shape \[4, 2, 3\]; expected",
        ),
        (lambda loss, codes: Estimate(loss=loss.mean(0).detach(), codes=codes), "returned a loss without a gradient"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_told(
    monkeypatch: pytest.MonkeyPatch, result: object, message: str
) -> None:
    class Wrong(GradientEstimator):
        traits = dgrad.Traits(
            unbiased=True, differentiable_objective=False, evaluations=lambda layer: 1, reference="none"
        )  # type: ignore[assignment]

        def estimate(self, layer, logits, objective, *, generator=None):  # type: ignore[no-untyped-def]
            codes = layer.sample(logits)
            return result(replace_gradient(objective(codes), logits, codes), codes)  # type: ignore[operator]

    # Users run no type checker: the message must come from the estimator.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    logits = torch.zeros(4, 2, 3, requires_grad=True)
    with pytest.raises(dgrad.InputError, match=f"^Wrong.estimate {message}"):
        Wrong()(dgrad.latent("2x3"), logits, lambda codes: codes.sum((-2, -1)))
