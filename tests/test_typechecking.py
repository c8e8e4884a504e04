"""Types and shapes of calls are checked while tests run, by beartype and jaxtyping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

import dgrad
from dgrad.core.gradient_estimator import Estimate
from dgrad.testing import small_logits

LAYER: Any = dgrad.latent("3x4")


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        pytest.param(small_logits, ("3x4",), id="a function"),
        pytest.param(LAYER.log_prob, (torch.zeros(2, 3, 4), torch.zeros(5, 3, 3, 4)), id="axes of two arguments"),
        pytest.param(LAYER.entropy, (torch.zeros(2, 3, 4).long(),), id="a dtype"),
        pytest.param(Estimate, (torch.zeros(2), torch.zeros(1, 3, 3, 4)), id="a dataclass"),
    ],
)
def test_what_an_annotation_does_not_allow_is_refused(function: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(BeartypeCallHintViolation, match="violates type hint"):
        function(*arguments)
