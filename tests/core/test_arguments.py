"""What a call refuses at once, with a remedy that works."""

from __future__ import annotations

import re
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

import dgrad
from dgrad.hyperparameters import hyperparameters_of
from dgrad_plugins.estimators import Direct

LOGITS = torch.zeros(4, 20, 10)
LAYER = dgrad.latent("20x10")


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users run no type checker: the message must come from the call."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def _loss(codes: torch.Tensor) -> torch.Tensor:
    return codes[..., 0].sum(-1)


ROWS = Categorical(logits=LOGITS)
CALL = "expected a latent layer: estimator(layer, logits, objective)"
NO_TENSOR = "expected a tensor [batch, *layer.shape]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("20x10", LOGITS, _loss), f"the layer is the text '20x10'; {CALL} with layer=dgrad.latent(\"20x10\")"),
        ((LOGITS, LAYER, _loss), f"a Tensor and the logits are a latent layer; {CALL}: swap the first two"),
        ((LOGITS, _loss, LAYER), f"the layer is a Tensor; {CALL}"),
        ((ROWS, LOGITS, _loss), f'a torch.distributions.Categorical; {CALL} with layer=dgrad.latent("20x10") and its'),
        ((OneHotCategorical(logits=LOGITS[:, 0]), LOGITS, _loss), 'dgrad.latent("1x10") and its logits as [batch, 1'),
        ((Bernoulli(logits=LOGITS), LOGITS, _loss), "and the logits of its variables"),
        ((LAYER, ROWS, _loss), f"the logits are a torch.distributions.Categorical; {NO_TENSOR}"),
        ((LAYER, np.zeros((4, 20, 10)), _loss), f"a ndarray; {NO_TENSOR}: convert them with torch.as_tensor(logits)"),
        ((LAYER, LOGITS, LOGITS[0, 0]), "the objective is a Tensor; expected a function of the codes"),
        ((LAYER, LOGITS, None), "the objective is None; expected a function of the codes"),
    ],
)
def test_arguments_in_the_wrong_place_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(dgrad.InputError, match=re.escape(message)):
        dgrad.estimator("rloo")(*arguments)  # type: ignore[arg-type]


def test_a_seed_is_no_generator() -> None:
    with pytest.raises(dgrad.InputError, match=r"the generator is 0; expected a torch.Generator: .*manual_seed\(0\)"):
        dgrad.estimator("rloo")(LAYER, LOGITS, _loss, generator=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((20, 10), 'dgrad.latent got 20, 10; expected one text such as 20x10: write dgrad.latent("20x10")'),
        (((3, 4),), 'dgrad.latent got (3, 4); expected one text such as 20x10: write dgrad.latent("3x4")'),
        ((LAYER,), "dgrad.latent got a Categorical; expected one text such as 20x10: it is a latent layer already"),
        ((None,), 'dgrad.latent got None; expected one text such as 20x10: write dgrad.latent("20x10")'),
    ],
)
def test_a_latent_is_a_text(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(dgrad.InputError, match=re.escape(message)):
        dgrad.latent(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (Direct, 'got the class Direct; expected a name such as "direct": Direct(...) makes one itself'),
        (Direct(), 'got a Direct; expected a name such as "direct": dgrad estimators lists them'),
    ],
)
def test_an_estimator_is_named(name: object, message: str) -> None:
    with pytest.raises(dgrad.InputError, match=re.escape(message)):
        dgrad.estimator(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", ["20x10", ROWS, None], ids=["text", "distribution", "none"])
def test_a_layer_of_another_kind_is_refused_outside_of_a_call_too(layer: Any) -> None:
    ones = torch.ones(4, 2, dtype=torch.bool)
    for call in (
        lambda: dgrad.restricted(layer, mask=ones),
        lambda: dgrad.KLObjective(layer, LOGITS),
        lambda: dgrad.refine(layer, LOGITS, _loss, 1),
    ):
        with pytest.raises(dgrad.InputError, match=r'expected a latent layer: dgrad.latent\("20x10"\)'):
            call()


NO_HYPERPARAMETERS = [None, "a text", [1], torch.ones(99), torch.tensor(0.5), float("nan"), float("inf"), object()]


@pytest.mark.parametrize("name", sorted(dgrad.estimators()))
def test_whatever_is_no_value_of_a_hyperparameter_is_refused_by_its_name_in_one_line(name: str) -> None:
    for parameter in hyperparameters_of(dgrad.estimators()[name]):
        for value in NO_HYPERPARAMETERS:
            with pytest.raises(dgrad.InputError, match=f"^{parameter}[ :].*$"):
                dgrad.estimator(name, **{parameter: value})


def test_numbers_of_numpy_are_numbers() -> None:
    estimator = dgrad.estimator("direct", epsilon=np.float32(0.5), samples=np.int64(4), sweep_share=np.float64(0.5))
    assert repr(estimator) == repr(dgrad.estimator("direct", epsilon=0.5, samples=4, sweep_share=0.5))
    assert type(estimator.samples) is int


@pytest.mark.parametrize("name", ["direct", "reinforce", "relax"])
def test_a_layer_of_another_kind_has_no_learned_parts(name: str) -> None:
    with pytest.raises(dgrad.InputError, match=r'the layer is .*2x3.; expected a latent layer: dgrad.latent\("2x3"\)'):
        dgrad.estimator(name).set_layer("2x3")  # type: ignore[arg-type]
