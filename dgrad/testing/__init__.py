"""Tools for testing estimators and latents: small problems solved by enumeration, and the conformance kits.

dgrad.testing.check_estimator(MyEstimator())            # raises, naming every check that fails and by how much
dgrad.testing.check_latent(MyLayer(4))

@dgrad.testing.parametrize_with_checks([MyEstimator()])  # or one pytest case for each check
def test_conforms(estimator, check):
    check(estimator)

@dgrad.testing.parametrize_with_latent_checks([MyLayer(4)])
def test_layer_conforms(layer, check):
    check(layer)
"""

from dgrad.testing._checks import CHECKS
from dgrad.testing._kit import (
    CheckResult,
    ConformanceError,
    check_estimator,
    check_latent,
    parametrize_with_checks,
    parametrize_with_latent_checks,
    run_checks,
    run_latent_checks,
)
from dgrad.testing._latent_checks import LATENT_CHECKS
from dgrad.testing._objective_checks import ObjectiveError, check_objective
from dgrad.testing._problems import exact_gradient, monte_carlo_gradient, small_logits, small_objectives
from dgrad.testing._shared import NotApplicable

__all__ = [
    "CHECKS",
    "LATENT_CHECKS",
    "CheckResult",
    "ConformanceError",
    "NotApplicable",
    "ObjectiveError",
    "check_estimator",
    "check_latent",
    "check_objective",
    "exact_gradient",
    "monte_carlo_gradient",
    "parametrize_with_checks",
    "parametrize_with_latent_checks",
    "run_checks",
    "run_latent_checks",
    "small_logits",
    "small_objectives",
]
