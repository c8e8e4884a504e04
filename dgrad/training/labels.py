"""Labels as knowledge about the code: which rows are known, and objectives that know them.

A label is the value of one variable of the code. Labels are `[B]`, for a code of one variable, or `[B, n]`, one for
each variable; -1 is unknown. The reconstruction holds known variables at their labels, so that the bound becomes that
of `log p(x, z)`. The encoder learns the labels from losses of their own: of the code, which every estimator carries
back in its own way, or of the logits (`dgrad_batch_losses`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dgrad.config import TrainConfig
from dgrad.core.curvature import Curvature
from dgrad.core.evaluations import Evaluation
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import Objective
from dgrad.data import Dataset
from dgrad.errors import InputError


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
            f"--labels {config.labels} needs a code of one variable with as many values as classes; got --latent "
            f"{layer}, expected 1x{expected[1]}"
        )


def _check_attributes(config: TrainConfig, attributes: tuple[str, ...], layer: LatentLayer) -> None:
    if not layer.one_hot_rows or layer.shape != (len(attributes), 2):
        raise InputError(
            f"--labels {config.labels} needs a code of one variable of two values for each attribute; got --latent "
            f"{layer} and {len(attributes)} attributes ({', '.join(attributes)}), expected {len(attributes)}x2: say "
            "so, or choose attributes with --attributes"
        )


def known_codes(
    labels: Int[Tensor, "batch *variables"], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Bool[Tensor, "batch n 1"], Float[Tensor, "batch n k"]]:
    """Which rows of a code of `shape` the labels know, and their codes: zeros where the label is unknown."""
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

    def curvature(self, codes: Float[Tensor, "one batch n k"], *, generator: Generator | None = None) -> Curvature:
        raise InputError(
            "a surrogate of the sweep has one curvature for all examples, and their known variables differ; expected "
            "sweep=exact with --labels"
        )

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
    """`weight` for every known variable of the code whose value is not its label, else 0.

    It is linear in the code. Direct optimization subtracts epsilon times it from the potentials. As the weight grows,
    the perturbed argmax becomes the label, and the gradient `(z - label) / epsilon`. Its mean is `1 / epsilon` times
    the gradient of the cross-entropy.

    Reference:
        Lorberbom et al. 2019, section 6.
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
