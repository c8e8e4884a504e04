"""Likelihoods: what a decoder's outputs say about an image.

A likelihood has no parameters: it turns outputs `[..., D]` and images `[B, D]` in [0, 1] into losses `[..., ]`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from dgrad.errors import InputError, unknown_name
from dgrad.kernels.numerics import softplus


class Likelihood(ABC):
    """The distribution of an image given the decoder's outputs.

    Attributes:
        outputs_per_pixel: how many outputs of the decoder a pixel has. All first ones come before all second ones.
        grey_levels: of how many levels of grey a pixel's loss is `-log` of a probability. 0 where grey pixels have no
            probability: then the bound is none on their code length, and has no bits per dimension.
    """

    name: str
    unit: str
    outputs_per_pixel = 1
    grey_levels = 0

    @abstractmethod
    def loss(
        self, outputs: Float[Tensor, "*lead #batch d"], images: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "*lead batch"]:
        """`-log p(image | outputs)` summed over the pixels, in `unit`."""

    @abstractmethod
    def root_curvature(self, outputs: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        """The root of the loss's Gauss-Newton curvature in each output."""

    @abstractmethod
    def mean(self, outputs: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        """The expected image, in [0, 1]."""


class Bernoulli(Likelihood):
    """Independent binary pixels, the outputs their logits: `sum_d softplus(a_d) - x_d a_d`, in nats.

    `x` may be grey. The loss is then a cross-entropy, at least the entropy of a coin of each pixel's grey, and no
    probability of the grey.
    """

    name = "bernoulli"
    unit = "nats"

    def loss(
        self, outputs: Float[Tensor, "*lead #batch d"], images: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "*lead batch"]:
        return softplus(outputs).sum(-1) - _products(outputs, images)

    def root_curvature(self, outputs: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        mean = outputs.sigmoid()
        return (mean * (1 - mean)).sqrt()

    def mean(self, outputs: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        return outputs.sigmoid()


class SquaredError(Likelihood):
    """Squared error behind a tanh: `sum_d (x_d - (1 + tanh a_d) / 2)^2`.

    The same as the nats of a Gaussian with variance 1/2 for each pixel, less its constant `D/2 log pi`.
    """

    name = "squared-error"
    unit = "squared error"

    def loss(
        self, outputs: Float[Tensor, "*lead #batch d"], images: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "*lead batch"]:
        mean = self.mean(outputs)
        if _of_all_images(mean):
            return mean.square().sum(-1) - 2 * _products(mean, images) + images.square().sum(-1)
        return (images - mean).square().sum(-1)

    def root_curvature(self, outputs: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        return (1 - outputs.tanh().square()) / 2**0.5  # sqrt(2) times the slope of the mean

    def mean(self, outputs: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        return (1 + torch.tanh(outputs)) / 2


class DiscretizedLogistic(Likelihood):
    """Independent pixels of 256 levels, each a logistic variable rounded to its level, in nats.

    With `x` from -1 to 1, location `m` and scale `s`, and half a level `h = 1/255`:

        p(x) = sigmoid((x + h - m) / s) - sigmoid((x - h - m) / s)

    The darkest level has all that lies below it, the brightest all above, so that the levels add up to 1. The outputs
    are the locations of all pixels, then the logarithms of all scales. Pixels are rounded to the nearest level.

    Reference:
        Kingma et al. 2016 (arXiv 1606.04934); Salimans et al. 2017, PixelCNN++ (arXiv 1701.05517), with one component.
    """

    name = "discretized-logistic"
    unit = "nats"
    outputs_per_pixel = 2
    grey_levels = 256

    def loss(
        self, outputs: Float[Tensor, "*lead #batch d2"], images: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "*lead batch"]:
        location, log_scale = outputs.chunk(2, dim=-1)
        level = (images * (self.grey_levels - 1)).round()
        half, dark, bright = 1 / (self.grey_levels - 1), level == 0, level == self.grey_levels - 1
        inverse = (-log_scale.clamp(min=LEAST_LOG_SCALE)).exp()
        middle = (2 * half * level - 1 - location) * inverse
        # sigmoid(u) - sigmoid(v) = sigmoid(u) sigmoid(-v) (1 - exp(v - u)), where nothing cancels
        below = softplus(-middle - half * inverse).masked_fill(bright, 0.0)
        above = softplus(middle - half * inverse).masked_fill(dark, 0.0)
        width = (-torch.expm1(-2 * half * inverse)).log()
        return (below + above - torch.where(dark | bright, 0.0, width)).sum(-1)

    def root_curvature(self, outputs: Float[Tensor, "*lead d2"]) -> Float[Tensor, "*lead d2"]:
        """That of a logistic variable that is not rounded: its Fisher information, which is diagonal."""
        log_scale = outputs.chunk(2, dim=-1)[1]
        of_location = (-log_scale.clamp(min=LEAST_LOG_SCALE)).exp() / 3**0.5
        of_log_scale = torch.full_like(log_scale, ((math.pi**2 + 3) / 9) ** 0.5)
        return torch.cat([of_location, of_log_scale], -1)

    def mean(self, outputs: Float[Tensor, "*lead d2"]) -> Float[Tensor, "*lead d"]:
        """The locations, in [0, 1]."""
        return ((1 + outputs.chunk(2, dim=-1)[0]) / 2).clamp(0, 1)


LEAST_LOG_SCALE = -7.0
"""A smaller scale is a fifth of a level, and changes no probability."""


def bits_per_dimension(likelihood: Likelihood, bound: float, dimensions: int) -> float | None:
    """A bound in nats as bits for each pixel and channel; None for a likelihood without probabilities of grey pixels.

    >>> bits_per_dimension(DiscretizedLogistic(), 8 * math.log(2), 8)
    1.0
    """
    return bound / (dimensions * math.log(2)) if likelihood.grey_levels else None


def _of_all_images(outputs: Float[Tensor, "*lead #batch d"]) -> bool:
    """Whether the outputs are the same for every image."""
    return outputs.shape[-2] == 1


def _products(
    outputs: Float[Tensor, "*lead #batch d"], images: Float[Tensor, "batch d"]
) -> Float[Tensor, "*lead batch"]:
    """`sum_d x_d a_d`; for outputs that all images share nothing of the size of `[*lead, B, D]` is computed."""
    if _of_all_images(outputs):
        dtype = torch.promote_types(outputs.dtype, images.dtype)
        return outputs.squeeze(-2).to(dtype) @ images.mT.to(dtype)
    return (images * outputs).sum(-1)


class DataLoss:
    """A likelihood with the data of a batch: a loss of a decoder's outputs, `[S, B, *data] -> [S, B]`.

    Args:
        likelihood: what the outputs mean.
        data: `[B, *data]`.
    """

    def __init__(self, likelihood: Likelihood, data: Shaped[Tensor, "batch *data"]) -> None:
        self.likelihood = likelihood
        if not isinstance(data, Tensor) or data.ndim == 0:
            got = f"of shape {list(data.shape)}" if isinstance(data, Tensor) else f"of type {type(data).__name__}"
            raise InputError(f"data {got}; expected a tensor [batch, ...]: convert them with torch.as_tensor(x)")
        data = data.flatten(1) if data.ndim > 1 else data.unsqueeze(1)
        self.data = data if data.is_floating_point() else data.to(torch.get_default_dtype())

    def __call__(self, outputs: Float[Tensor, "samples #batch *data"]) -> Float[Tensor, "samples batch"]:
        flat = outputs.flatten(2)
        each = self.likelihood.outputs_per_pixel
        if flat.shape[-1] != each * self.data.shape[-1] or flat.shape[1] not in (1, len(self.data)):
            expected = "the same of both" if each == 1 else f"{each} outputs for each number of as many examples"
            raise InputError(
                f"the decoder gives {flat.shape[-1]} outputs for each of {flat.shape[1]} examples, and the data are "
                f"{len(self.data)} examples of {self.data.shape[-1]} numbers; expected {expected}"
            )
        return self.likelihood.loss(flat, self.data)


def _of_unit_range(name: str, data: Tensor) -> DataLoss:
    """The loss, for data in [0, 1]. Their values are looked at on a CPU alone, where nothing waits."""
    loss = DataLoss(LIKELIHOODS[name], data)
    if data.device.type == "cpu" and data.numel() and not torch.compiler.is_compiling():
        low, high = map(float, data.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"data from {low:g} to {high:g} for a {name} loss; expected numbers in [0, 1]: divide bytes by 255"
            )
    return loss


def bernoulli(x: Shaped[Tensor, "batch *data"]) -> DataLoss:
    """The loss of Bernoulli logits: `-log p(x | outputs)`, summed over an example, in nats.

    Args:
        x: the data, `[B, *data]`, also bools; grey values in [0, 1] are allowed.

    Raises:
        InputError: x is not in [0, 1].

    >>> bernoulli(torch.ones(1, 2))(torch.zeros(1, 1, 2))
    tensor([[1.3863]])
    """
    return _of_unit_range("bernoulli", x)


def squared_error(x: Shaped[Tensor, "batch *data"]) -> DataLoss:
    """The squared error of outputs behind a tanh: `sum_d (x_d - (1 + tanh a_d) / 2)^2`.

    For the plain squared error of the outputs themselves give a function as the loss.

    Args:
        x: the data, `[B, *data]`, in [0, 1].

    Raises:
        InputError: x is not in [0, 1].

    >>> squared_error(torch.ones(1, 2))(torch.zeros(1, 1, 2))
    tensor([[0.5000]])
    """
    return _of_unit_range("squared-error", x)


def discretized_logistic(x: Shaped[Tensor, "batch *data"]) -> DataLoss:
    """The loss of locations and log-scales: `-log p(x | outputs)` of pixels of 256 levels, in nats.

    The decoder has two outputs for each number of x: `[..., 2 D]` when flat, all locations first.

    Args:
        x: the data, `[B, *data]`, in [0, 1]; rounded to the nearest level.

    Raises:
        InputError: x is not in [0, 1].

    >>> round(float(discretized_logistic(torch.ones(1, 1))(torch.zeros(1, 1, 2))), 4)
    1.3104
    """
    return _of_unit_range("discretized-logistic", x)


LIKELIHOODS: dict[str, Likelihood] = {
    likelihood.name: likelihood for likelihood in (Bernoulli(), SquaredError(), DiscretizedLogistic())
}


def likelihood(name: str) -> Likelihood:
    """A likelihood by name.

    Raises:
        InputError: the name is unknown.
    """
    if name not in LIKELIHOODS:
        raise unknown_name("likelihood", name, LIKELIHOODS)
    return LIKELIHOODS[name]
