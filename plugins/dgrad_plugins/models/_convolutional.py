"""The convolutional model: a code, alone or, such as the attributes of a picture, beside Gaussian variables.

Between its layers stands SiLU. With ReLU, whose units die, 300 steps on drawn faces (widths 8, 16, 32) came to 7054
nats instead of 6599.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dgrad import LatentLayer, run_defaults
from dgrad.kernels.numerics import softplus
from dgrad.vae.likelihoods import Likelihood
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.networks import Decoder, check_image_shape

WIDTHS = (32, 64, 128, 256)
HEAD = 256
"""The width of the hidden layer of each head."""
CODE_SCALE = 0.1
"""Of the initial weights of the code in the decoder."""
LAST_SCALE = 0.1
"""Of the initial weights of each network's last layer: outputs near 0 at first, so that no loss is far off."""
LARGEST_LOG_VARIANCE = 5.0
"""Of the Gaussian variables, whose prior has 0. It is approached smoothly."""
SMALLEST_SIDE = 7
"""Without `hidden` the sides are halved until the shorter one is at most that."""


class Halving(NamedTuple):
    """A convolution that halves sides of at least 2, and the one that makes an image of that size again.

    An odd side loses a half: 7 becomes 3, and 3 becomes 7 with one more row at its end. A side of 1 stays.
    """

    height: int
    width: int

    @property
    def halved(self) -> tuple[int, int]:
        """The height and width behind the convolution."""
        return max(1, self.height // 2), max(1, self.width // 2)

    def convolution(self, channels: int, outputs: int) -> nn.Conv2d:
        return nn.Conv2d(channels, outputs, self._of_sides(4, 3), self._of_sides(2, 1), padding=1)

    def transposed(self, channels: int, outputs: int) -> nn.ConvTranspose2d:
        added = (self.height % 2 if self.height > 1 else 0, self.width % 2 if self.width > 1 else 0)
        sizes = self._of_sides(4, 3), self._of_sides(2, 1)
        return nn.ConvTranspose2d(channels, outputs, *sizes, padding=1, output_padding=added)

    def _of_sides(self, halved: int, kept: int) -> tuple[int, int]:
        return halved if self.height > 1 else kept, halved if self.width > 1 else kept


def halvings(image_shape: tuple[int, int, int], count: int) -> list[Halving]:
    """So many halvings of an image, the first of its own size.

    >>> [tuple(halving) for halving in halvings((1, 28, 9), 3)]
    [(28, 9), (14, 4), (7, 2)]
    """
    steps = [Halving(*image_shape[1:])]
    while len(steps) < count:
        steps.append(Halving(*steps[-1].halved))
    return steps


class ConvEncoder(nn.Module):
    """From images to logits and Gaussian parameters: convolutions, then a head for each.

    Logits are `[B, *code]`. The parameters are `[B, 2 gaussian]`: means and log-variances. The Gaussian variables'
    head, its last two layers, is the same for all codes: they share its parameters.
    """

    def __init__(
        self, layer: LatentLayer, image_shape: tuple[int, int, int], widths: tuple[int, ...], gaussian: int
    ) -> None:
        super().__init__()
        self.code_shape = layer.shape
        self.image_shape = tuple(image_shape)
        channels = pairwise([image_shape[0], *widths])
        steps = zip(halvings(image_shape, len(widths)), channels, strict=True)
        self.features = nn.Sequential(
            *[module for halving, wide in steps for module in (halving.convolution(*wide), nn.SiLU())],
            nn.Flatten(),
        )
        features = math.prod(_smallest(image_shape, widths))
        self.discrete = nn.Sequential(nn.Linear(features, HEAD), nn.SiLU(), nn.Linear(HEAD, math.prod(layer.shape)))
        self.continuous = (
            nn.Sequential(nn.Linear(features, HEAD), nn.SiLU(), nn.Linear(HEAD, 2 * gaussian)) if gaussian else None
        )

    def forward(
        self, images: Float[Tensor, "batch c h w"]
    ) -> Float[Tensor, "batch *code"] | tuple[Float[Tensor, "batch *code"], Float[Tensor, "batch g"]]:
        """The logits, and with Gaussian variables their parameters.

        Raises:
            InputError: the images have another size than the encoder was built for.
        """
        check_image_shape(images, self.image_shape)
        features = self.features(images)
        logits = self.discrete(features).unflatten(-1, self.code_shape)
        if self.continuous is None:
            return logits
        mean, log_variance = self.continuous(features).chunk(2, dim=-1)
        # Without an end to it, one step too large ends in exp(log-variance) = inf. Below, this changes nothing.
        log_variance = LARGEST_LOG_VARIANCE - softplus(LARGEST_LOG_VARIANCE - log_variance)
        return logits, torch.cat([mean, log_variance], -1)


class Upwards(nn.Module):
    """From the first layer's outputs `[..., width]` to `[..., C*H*W]`: the encoder's convolutions reversed."""

    def __init__(self, image_shape: tuple[int, int, int], widths: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.smallest = _smallest(image_shape, widths)
        channels = pairwise([*reversed(widths), outputs])
        steps = zip(reversed(halvings(image_shape, len(widths))), channels, strict=True)
        layers = [module for halving, wide in steps for module in (nn.SiLU(), halving.transposed(*wide))]
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead pixels"]:
        lead = hidden.shape[:-1]
        outputs = self.layers(hidden.reshape(-1, *self.smallest))  # a convolution knows one leading axis only
        return outputs.flatten(1).unflatten(0, lead)


class ConvDecoder(Decoder):
    """From codes, perhaps with Gaussian variables beside them, `[..., n*k + gaussian]`, to outputs `[..., C*H*W]`.

    The first layer adds a vector for the value of each of the code's variables to a linear map of the Gaussian ones:
    the code shifts what these say, and all that follows is the same for all codes.
    """

    def __init__(
        self,
        layer: LatentLayer,
        image_shape: tuple[int, int, int],
        widths: tuple[int, ...],
        gaussian: int,
        outputs: int,
    ) -> None:
        smallest = math.prod(_smallest(image_shape, widths))
        super().__init__(layer, [smallest], gaussian, concatenate_gaussian=gaussian > 0)
        self.rest = nn.Sequential(Upwards(image_shape, widths, outputs))
        channels = [outputs, *widths]
        sizes = halvings(image_shape, len(widths))
        self.numbers_per_code = smallest + sum(
            width * math.prod(size) for width, size in zip(channels, sizes, strict=False)
        )


@run_defaults(lr="cosine:0.003:0", gaussian=0, evaluations=10, why="conv")
def conv_vae(
    layer: LatentLayer,
    image_shape: tuple[int, int, int],
    likelihood: Likelihood,
    hidden: tuple[int, ...] = (),
    gaussian: int = 64,
) -> DiscreteVAE:
    """Strided convolutions each way, for images of any size, perhaps with Gaussian variables beside the code.

    Args:
        hidden: channels after each convolution from the image to the code, mirrored in the decoder. Each convolution
            halves the image's sides. Empty: of 32,64,128,256 as many as leave the shorter side at most 7.
        gaussian: how many; 0 for a code alone.
    """
    widths = hidden or default_widths(image_shape)
    encoder = ConvEncoder(layer, image_shape, widths, gaussian)
    decoder = ConvDecoder(layer, image_shape, widths, gaussian, image_shape[0] * likelihood.outputs_per_pixel)
    _initialise(encoder, decoder)
    return DiscreteVAE(layer, image_shape, likelihood, encoder, decoder, gaussian, concatenate_gaussian=gaussian > 0)


def default_widths(image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    """The channels of a model for images of this size.

    >>> default_widths((1, 8, 8)), default_widths((1, 28, 28)), default_widths((3, 64, 64))
    ((32,), (32, 64), (32, 64, 128, 256))
    """
    sides = [min(halving) for halving in halvings(image_shape, len(WIDTHS))]
    return WIDTHS[: max(1, sum(side > SMALLEST_SIDE for side in sides))]


def _smallest(image_shape: tuple[int, int, int], widths: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width where the image is smallest."""
    return widths[-1], *halvings(image_shape, len(widths))[-1].halved


@torch.no_grad()
def _initialise(encoder: ConvEncoder, decoder: ConvDecoder) -> None:
    """Weights that keep the scale of the signals (He et al. 2015), but small ones of last layers and of the code.

    Beside Gaussian variables a value of the code should change little of a picture. With larger weights its random
    pattern on the picture goes slowly.
    """
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.ConvTranspose2d):
            taps = math.prod(module.kernel_size) // math.prod(module.stride)  # so many reach one output
            nn.init.normal_(module.weight, std=math.sqrt(2 / (module.in_channels * taps)))
        else:
            continue
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    upwards = decoder.rest[-1]
    assert isinstance(upwards, Upwards)
    lasts = [encoder.discrete, upwards.layers, *([] if encoder.continuous is None else [encoder.continuous])]
    for network in lasts:
        last = network[-1]
        assert isinstance(last, nn.Linear | nn.ConvTranspose2d)
        last.weight *= LAST_SCALE
    if encoder.continuous is not None:
        decoder.first.weight[:, : math.prod(encoder.code_shape)] *= CODE_SCALE
