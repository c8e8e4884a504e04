"""Tools for testing estimators: small problems whose exact gradient is known by enumeration, and the conformance kit.

dgrad.testing.check_estimator(MyEstimator())            # raises, naming every check that fails and by how much

@dgrad.testing.parametrize_with_checks([MyEstimator()])  # or one pytest case for each check
def test_conforms(estimator, check):
    check(estimator)
"""

from dgrad.testing._checks import CHECKS, NotApplicable
from dgrad.testing._kit import CheckResult, ConformanceError, check_estimator, parametrize_with_checks, run_checks
from dgrad.testing._objective_checks import ObjectiveError, check_objective
from dgrad.testing._problems import exact_gradient, monte_carlo_gradient, small_logits, small_objectives

__all__ = [
    "CHECKS",
    "CheckResult",
    "ConformanceError",
    "NotApplicable",
    "ObjectiveError",
    "check_estimator",
    "check_objective",
    "exact_gradient",
    "monte_carlo_gradient",
    "parametrize_with_checks",
    "run_checks",
    "small_logits",
    "small_objectives",
]
