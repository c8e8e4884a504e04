"""A convolutional model: `dgrad train --plugin examples/model.py --model small-conv --hidden 16,32`."""

import math

from torch import Tensor, nn

import dgrad
from dgrad.core.latent_layer import LatentLayer
from dgrad.vae.likelihoods import Likelihood
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.networks import Decoder


class ConvEncoder(nn.Module):
    """Images `[B, C, H, W]` to logits `[B, *layer.shape]`: two convolutions, then one linear layer."""

    def __init__(self, layer: LatentLayer, image_shape: tuple[int, int, int], wide: tuple[int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.code_shape = layer.shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide[0], 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(wide[0], wide[1], 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(wide[1] * (height // 4) * (width // 4), math.prod(layer.shape)),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).view(-1, *self.code_shape)


class Upwards(nn.Module):
    """Features `[..., F]` to outputs `[..., C*H*W]`: the encoder's convolutions turned around."""

    def __init__(self, image_shape: tuple[int, int, int], wide: tuple[int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Unflatten(-1, (wide[1], height // 4, width // 4)),
            nn.ConvTranspose2d(wide[1], wide[0], 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(wide[0], channels, 4, stride=2, padding=1),
            nn.Flatten(),
        )

    def forward(self, features: Tensor) -> Tensor:
        outputs = self.body(features.reshape(-1, features.shape[-1]))  # a convolution knows one leading axis only
        return outputs.view(*features.shape[:-1], outputs.shape[-1])


class ConvDecoder(Decoder):
    """Codes `[..., *layer.shape]` to outputs `[..., C*H*W]`.

    It is a `Decoder`, because its first layer is linear in the code. The sweep of `direct` and `leg` changes a
    coordinate behind that layer. Any other module serves too: its sweep evaluates every changed code in full.
    """

    def __init__(self, layer: LatentLayer, image_shape: tuple[int, int, int], wide: tuple[int, int]) -> None:
        super().__init__(layer, [wide[1] * (image_shape[1] // 4) * (image_shape[2] // 4)])
        self.rest = nn.Sequential(Upwards(image_shape, wide))


def conv_vae(
    layer: LatentLayer, image_shape: tuple[int, int, int], likelihood: Likelihood, hidden: tuple[int, ...] = ()
) -> DiscreteVAE:
    """Two convolutions each way, `hidden` channels wide (16,32), for images whose sides are multiples of 4."""
    wide = hidden or (16, 32)
    if len(wide) != 2:
        raise dgrad.InputError(
            f"the small-conv model has two convolutions; got --hidden {','.join(map(str, wide))}: try 16,32"
        )
    if image_shape[1] % 4 or image_shape[2] % 4:
        raise dgrad.InputError(
            f"the small-conv model needs sides that are multiples of 4; got images of shape {list(image_shape)}: "
            "use --model mlp"
        )
    encoder = ConvEncoder(layer, image_shape, wide)
    return DiscreteVAE(layer, image_shape, likelihood, encoder, ConvDecoder(layer, image_shape, wide))


@dgrad.hookimpl
def dgrad_register_models(register):
    register("small-conv", conv_vae)
