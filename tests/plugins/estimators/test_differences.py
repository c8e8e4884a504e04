"""The finite differences of the direct family: their bias falls at the stated order."""

from __future__ import annotations

import pytest
from helpers import mean_of_direct
from torch import Tensor

import dgrad
from dgrad.testing import exact_gradient, small_logits, small_objectives


@pytest.mark.slow
@pytest.mark.parametrize(("difference", "order"), [("backward", 1), ("forward", 1), ("central", 2)])
@pytest.mark.parametrize("name", ["direct-rb", "direct-joint", "direct"])
def test_the_bias_falls_at_its_order(name: str, difference: str, order: int) -> None:
    """With one variable all three means have a closed form, like `[softmax(phi + eps f) - softmax(phi)] / eps`.

    The means agree with it within 5 standard errors, and halving epsilon divides its bias by 2 (by 4 for central).
    """
    layer = dgrad.latent("1x5")
    logits, loss = small_logits(layer), small_objectives(layer)["cross-entropy"]
    losses = loss(layer.enumerate(like=logits).unsqueeze(1)).T.unsqueeze(1)  # [1, 1, k]
    truth = exact_gradient(layer, logits, loss)[0]

    def closed_form(epsilon: float) -> Tensor:
        up, down = (logits + epsilon * losses).softmax(-1), (logits - epsilon * losses).softmax(-1)
        middle = logits.softmax(-1)
        return {"backward": middle - down, "forward": up - middle, "central": (up - down) / 2}[difference][0] / epsilon

    for epsilon in (0.4, 0.1):
        mean, error = mean_of_direct(name, layer, logits, loss, epsilon=epsilon, difference=difference)
        # epsilon itself is held in float32
        assert ((mean - closed_form(epsilon)).abs() <= 5 * error + 1e-6).all()
    biases = [(closed_form(epsilon) - truth).norm() for epsilon in (0.02, 0.01)]
    assert biases[0] / biases[1] == pytest.approx(2**order, rel=0.05)
