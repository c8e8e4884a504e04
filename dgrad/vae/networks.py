"""The networks of a discrete variational auto-encoder."""

from __future__ import annotations

import math
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from dgrad.core.latent_layer import LatentLayer
from dgrad.errors import InputError
from dgrad.vae.dropout import Dropout

HEAD_OF_THE_CODE = (100,)
HEAD_OF_THE_GAUSSIAN = (100, 66)


class Encoder(nn.Module):
    """A network from images to the logits of a latent layer."""

    def __init__(self, layer: LatentLayer, image_shape: tuple[int, int, int], body: nn.Module) -> None:
        super().__init__()
        self.code_shape = layer.shape
        self.image_shape = tuple(image_shape)
        self.body = body

    def forward(self, images: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch *code"]:
        """The logits of each image.

        Raises:
            InputError: the images have another size than the encoder was built for.
        """
        check_image_shape(images, self.image_shape)
        return self.body(images.flatten(1)).view(-1, *self.code_shape)


def check_image_shape(images: Tensor, expected: tuple[int, ...]) -> None:
    """Make sure that the images have the size that a model was built for.

    Raises:
        InputError: they have another.
    """
    if images.shape[1:] != expected:
        raise InputError(
            f"images of shape {list(images.shape[1:])}; this model takes {list(expected)} (channels, height, width)"
        )


class Decoder(nn.Module):
    """A network from codes to outputs, whose first layer is linear in the code.

    A sweep changes a coordinate behind the first layer, as the difference of two columns of its weight. With Gaussian
    variables the inputs are `[..., *code, c]`: each coordinate of the code times all of the variables. Where these
    stand beside the code (`concatenate_gaussian`), the inputs are `[..., n*k + c]`.

    Attributes:
        numbers_per_code: how many outputs all layers have for one code.
    """

    def __init__(
        self, layer: LatentLayer, widths: list[int], gaussian: int = 0, *, concatenate_gaussian: bool = False
    ) -> None:
        super().__init__()
        coordinates = math.prod(layer.decoded_shape)
        self.numbers_per_code = sum(widths)
        self.input_axes = 1 if concatenate_gaussian else len(layer.decoded_shape) + (gaussian > 0)
        self.first = nn.Linear(
            coordinates + gaussian if concatenate_gaussian else coordinates * max(gaussian, 1), widths[0]
        )
        self.rest = nn.Sequential(*[module for wide in pairwise(widths) for module in (nn.ReLU(), nn.Linear(*wide))])

    def forward(self, codes: Float[Tensor, "*codes"]) -> Float[Tensor, "*outputs"]:
        return self.rest(self.first(codes.flatten(-self.input_axes)))


class MixtureEncoder(nn.Module):
    """From images to logits and Gaussian parameters: shared layers, then a head for each.

    Logits are `[B, *code]`. The parameters are `[B, 2 gaussian]`: means and log-variances.
    """

    def __init__(
        self,
        layer: LatentLayer,
        image_shape: tuple[int, int, int],
        shared: tuple[int, ...],
        gaussian: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.code_shape = layer.shape
        self.image_shape = tuple(image_shape)
        self.shared = _hidden_layers([math.prod(image_shape), *shared])
        self.discrete = _head([shared[-1], *HEAD_OF_THE_CODE], math.prod(layer.shape))
        self.continuous = nn.Sequential(Dropout(dropout), *_head([shared[-1], *HEAD_OF_THE_GAUSSIAN], 2 * gaussian))

    def forward(
        self, images: Float[Tensor, "batch c h w"]
    ) -> tuple[Float[Tensor, "batch *code"], Float[Tensor, "batch g"]]:
        """The logits and the parameters of the Gaussian variables.

        Raises:
            InputError: the images have another size than the encoder was built for.
        """
        check_image_shape(images, self.image_shape)
        features = self.shared(images.flatten(1))
        return self.discrete(features).view(-1, *self.code_shape), self.continuous(features)


def _hidden_layers(widths: list[int]) -> nn.Sequential:
    return nn.Sequential(*[module for wide in pairwise(widths) for module in (nn.Linear(*wide), nn.ReLU())])


def _head(widths: list[int], outputs: int) -> nn.Sequential:
    return nn.Sequential(*_hidden_layers(widths), nn.Linear(widths[-1], outputs))
