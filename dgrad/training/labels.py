"""Labels as knowledge about the code: what training does with them. May import torch, objectives and latent layers; no estimator.

A label is the value of one variable of the code. Labels are `[B]`, for a code of one variable, or `[B, n]`, one for each variable; -1 is
unknown. What is known is held at its label in the reconstruction, where the bound becomes that of `log p(x, z)`; and the encoder learns
it from a loss of its own: of the code, which every estimator carries back in its own way, or of the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from dgrad.config import TrainConfig
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import Evaluation, Objective
from dgrad.data import Dataset
from dgrad.errors import InputError
from dgrad.kernels.numerics import log_softmax

PROBE = 0.1
"""The norm of the change at which the virtual adversarial loss looks for the worst direction; float32 tells the difference there."""
MEMORY = 0.9
"""How much of a moving mean stays from step to step."""
INDEPENDENCE_OF_ATTRIBUTES = 1000.0
"""The weight of the independence where the code's variables are attributes and nothing else is said."""


def check_labels(config: TrainConfig, dataset: Dataset, layer: LatentLayer) -> None:
    """Make sure that the classes of the data set, or the attributes, can be values of the code.

    Raises:
        InputError: they cannot.
    """
    if dataset.train.labels is None or (dataset.classes is None and dataset.attributes is None):
        raise InputError(
            f"--labels {config.labels}: {config.dataset} has no labels; leave --labels out, or take data that has some"
        )
    if dataset.attributes is not None:
        _check_attributes(config, dataset.attributes, layer)
        return
    assert dataset.classes is not None
    expected = (1, len(dataset.classes))
    if not layer.one_hot_rows or layer.shape != expected:
        raise InputError(
            f"--labels {config.labels} needs a code of one variable with as many values as classes; got --latent {layer}, expected 1x{expected[1]}"
        )


def _check_attributes(config: TrainConfig, attributes: tuple[str, ...], layer: LatentLayer) -> None:
    if not layer.one_hot_rows or layer.shape != (len(attributes), 2):
        raise InputError(
            f"--labels {config.labels} needs a code of one variable of two values for each attribute; got --latent {layer} and {len(attributes)} "
            f"attributes ({', '.join(attributes)}), expected {len(attributes)}x2: say so, or choose attributes with --attributes"
        )


def label_frequencies(labels: Int[Tensor, "images n"], values: int) -> Float[Tensor, "n values"]:
    """How frequent each value of each variable is among labels, with one more of each, so that none is 0."""
    counts = F.one_hot(labels, values).sum(0) + 1.0
    return counts / counts.sum(-1, keepdim=True)


def known_codes(
    labels: Int[Tensor, "batch *variables"], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Bool[Tensor, "batch n 1"], Float[Tensor, "batch n k"]]:
    """Which rows of a code of `shape` the labels know, and their codes, with rows of zeros where the label is unknown."""
    n, k = shape
    labels = labels.reshape(-1, n, 1)
    return labels >= 0, (labels == torch.arange(k, device=labels.device)).to(dtype)


class ObservedObjective(Objective):
    """An objective with the known rows of the code set to their labels: there nothing changes it."""

    def __init__(
        self, objective: Objective, known: Bool[Tensor, "batch n 1"], codes: Float[Tensor, "batch n k"]
    ) -> None:
        self.objective = objective
        self.known = known
        self.codes = codes

    def __call__(self, codes: Float[Tensor, "samples #batch n k"]) -> Float[Tensor, "samples batch"]:
        return self.objective(self._labelled(codes))

    def evaluate(self, codes: Float[Tensor, "samples #batch n k"]) -> Evaluation:
        return _ObservedEvaluation(self, codes, self.objective.evaluate(self._labelled(codes)))

    def _labelled(self, codes: Tensor) -> Tensor:
        return torch.where(self.known, self.codes, codes)


class _ObservedEvaluation(Evaluation):
    objective: ObservedObjective

    def __init__(self, objective: ObservedObjective, codes: Tensor, labelled: Evaluation) -> None:
        super().__init__(objective, codes, labelled.loss)
        self.labelled = labelled

    @torch.no_grad()
    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        return torch.where(self.objective.known, self.loss[..., None, None], self.labelled.sweep())

    @torch.no_grad()
    def sweep_rows(self, rows: Int[Tensor, "samples batch m"]) -> Float[Tensor, "samples batch n k"]:
        return torch.where(self.objective.known, self.loss[..., None, None], self.labelled.sweep_rows(rows))

    def full_sweep_is_free(self, rows: int) -> bool:
        return self.labelled.full_sweep_is_free(rows)


class LabelObjective(Objective):
    """`weight` for every known variable of the code that has another value than its label; 0 for the unknown ones.

    It is linear in the code. Direct optimization subtracts epsilon times it from the potentials. As the weight grows, the
    perturbed argmax becomes the label, and the gradient `(z - label) / epsilon`. Its mean is `1 / epsilon` times the gradient
    of the cross-entropy (Lorberbom et al. 2019, section 6).
    """

    def __init__(self, weight: float, labels: Int[Tensor, "batch *variables"]) -> None:
        self.weight = weight
        self.labels = labels

    def __call__(self, codes: Float[Tensor, "samples #batch n k"]) -> Float[Tensor, "samples batch"]:
        return (self.cost(codes) * codes).sum((-2, -1))

    def evaluate(self, codes: Float[Tensor, "samples #batch n k"]) -> Evaluation:
        return _LabelEvaluation(self, codes, self(codes))

    def cost(self, codes: Tensor) -> Tensor:
        """The cost of each value of each variable, `[B, n, k]`."""
        known, labelled = known_codes(self.labels, codes.shape[-2:], codes.dtype)
        return self.weight * (known.to(codes.dtype) - labelled)


class _LabelEvaluation(Evaluation):
    objective: LabelObjective

    @torch.no_grad()
    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        cost = self.objective.cost(self.codes)
        return self.loss[..., None, None] + cost - (cost * self.codes).sum(-1, keepdim=True)

    def full_sweep_is_free(self, rows: int) -> bool:
        return True


def adversarial_change(
    logits_of: Callable[[Tensor], Tensor],
    images: Float[Tensor, "batch c h w"],
    logits: Float[Tensor, "batch n k"],
    radius: float,
    *,
    generator: Generator | None = None,
) -> Float[Tensor, ""]:
    """The virtual adversarial loss (Miyato et al. 2018): `KL(q(x) || q(x + r))` in nats, the mean over images, r the worst change of norm `radius`.

    r is found by one step of the power method from a random direction; it and q(x) are held.
    """
    log_q = log_softmax(logits.detach())

    def divergence(change: Tensor) -> Tensor:
        return (log_q.exp() * (log_q - log_softmax(logits_of(images + change)))).sum((-2, -1)).mean()

    direction = torch.randn(images.shape, dtype=images.dtype, device=images.device, generator=generator)
    small = _of_norm(direction, PROBE).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(divergence(small), small)
    return divergence(_of_norm(slope, radius))


def _of_norm(change: Tensor, norm: float) -> Tensor:
    """Each image's change, scaled to a Euclidean norm."""
    length = change.flatten(1).norm(dim=1).clamp_min(torch.finfo(change.dtype).tiny)
    return norm * change / length.view(-1, *[1] * (change.ndim - 1))


class Supervision(nn.Module):
    """What training with few labels adds to the bound: a loss of the logits of labelled images, and the balance of the classes.

    The balance is `weight * sum m log(m / f)` over the values of each variable, the KL between m and frequencies f; m is a
    moving mean of `q` over the unlabelled images, its gradient that of the batch's mean. Without it, classes merge.

    Beside Gaussian variables there is their independence of the code: `weight / 2 * sum C^2`, C the covariances between the values of
    the code's variables and the means of the Gaussian ones (the XCov penalty of Cheung et al. 2014), moving in the same way. Without it the Gaussian
    variables say all that the code says, and a decoder that listens to them has no attribute to switch.

    Args:
        frequencies: f, `[n, k]`; equal ones, the default, suit classes, of which the labelled images have equally many.
        gaussian: how many Gaussian variables there are.
    """

    mean: Tensor
    frequencies: Tensor
    covariance: Tensor

    def __init__(
        self, config: TrainConfig, layer: LatentLayer, frequencies: Tensor | None = None, gaussian: int = 0
    ) -> None:
        super().__init__()
        self.label_weight = config.label_weight if config.label_loss == "cross-entropy" else 0.0
        self.balance_weight = config.balance_weight
        weight = config.independence_weight
        if weight is None:
            weight = INDEPENDENCE_OF_ATTRIBUTES if config.attributes else 0.0
        self.independence_weight = weight if gaussian else 0.0
        if self.independence_weight > 0:
            self.register_buffer("covariance", torch.zeros(*layer.shape, gaussian))
        equal = torch.full(layer.shape, 1 / layer.shape[-1])
        self.register_buffer("mean", equal if frequencies is None else frequencies.clone())
        self.register_buffer("frequencies", equal.clone() if frequencies is None else frequencies, persistent=False)

    def forward(
        self,
        logits: Float[Tensor, "batch n k"],
        known: Bool[Tensor, "batch n 1"],
        codes: Float[Tensor, "batch n k"],
        gaussian: Float[Tensor, "batch g"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch, the mean over its images, in nats; `gaussian` are the means of the Gaussian variables."""
        log_q = log_softmax(logits)
        loss = -self.label_weight * (codes * log_q).sum((-2, -1)).mean()
        if self.balance_weight > 0:
            loss = loss + self.balance_weight * self._balance(log_q.exp(), known)
        if self.independence_weight > 0 and gaussian is not None:
            values = torch.where(known, codes, log_q.exp()).detach()  # the code stays what it is
            loss = loss + self.independence_weight * self._dependence(values, gaussian)
        return loss

    def _dependence(self, values: Tensor, gaussian: Tensor) -> Tensor:
        covariance = torch.einsum("bnk,bg->nkg", values - values.mean(0), gaussian - gaussian.mean(0)) / len(values)
        with torch.no_grad():
            self.covariance.mul_(MEMORY).add_(covariance, alpha=1 - MEMORY)
        # d sum C^2 / 2 = sum C dC
        return (self.covariance * covariance).sum()

    def _balance(self, q: Tensor, known: Tensor) -> Tensor:
        unknown = (~known).to(q.dtype)  # [B, n, 1]
        batch_mean = (unknown * q).sum(0) / unknown.sum(0).clamp_min(1)  # [n, k]
        with torch.no_grad():
            self.mean.mul_(MEMORY).add_(batch_mean, alpha=1 - MEMORY)
        # d sum m log m = sum log m dm, as the changes of m add up to 0; a class that nothing has stays finite
        return (batch_mean * (self.mean.clamp_min(1e-9) / self.frequencies).log()).sum()
