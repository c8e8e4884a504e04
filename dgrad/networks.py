"""The discrete variational auto-encoder and the networks it is made of. May import torch, latents, likelihoods and objectives."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dgrad.errors import InputError
from dgrad.latent_layer import LatentLayer
from dgrad.likelihoods import Bernoulli, Likelihood
from dgrad.objectives import FunctionObjective, Objective
from dgrad.sweeps import bernoulli_linear_sweep, difference_sweep


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
        if images.shape[1:] != self.image_shape:
            raise InputError(
                f"images of shape {list(images.shape[1:])}; this model takes {list(self.image_shape)} (channels, height, width)"
            )
        return self.body(images.flatten(1)).view(-1, *self.code_shape)


class Decoder(nn.Module):
    """A network from codes to outputs, whose first layer is linear in the code.

    That lets the sweep change a coordinate after the first layer, as the difference of two columns of its weight, instead of
    before it.

    Attributes:
        numbers_per_code: how many outputs all layers have for one code.
    """

    def __init__(self, layer: LatentLayer, widths: list[int]) -> None:
        super().__init__()
        self.numbers_per_code = sum(widths)
        self.code_axes = len(layer.shape)
        self.first = nn.Linear(math.prod(layer.shape), widths[0])
        self.rest = nn.Sequential(*[module for wide in pairwise(widths) for module in (nn.ReLU(), nn.Linear(*wide))])

    def forward(self, codes: Float[Tensor, "*codes"]) -> Float[Tensor, "*outputs"]:
        return self.rest(self.first(codes.flatten(-self.code_axes)))


class DiscreteVAE(nn.Module):
    """An encoder, a discrete code and a decoder.

    A model of one's own is an instance with other networks: any `encoder` from images `[B, C, H, W]` to logits
    `[B, *layer.shape]`, any `decoder` from codes `[..., *layer.shape]` to outputs `[..., C*H*W]`.

    Attributes:
        compiled_sweep: whether the sweep may use a compiled kernel; the first one that does so may take seconds to compile it.
    """

    def __init__(
        self,
        layer: LatentLayer,
        image_shape: tuple[int, int, int],
        likelihood: Likelihood,
        encoder: nn.Module,
        decoder: nn.Module,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.image_shape = tuple(image_shape)
        self.likelihood = likelihood
        self.encoder = encoder
        self.decoder = decoder
        self.compiled_sweep = False

    def reconstruction(self, images: Float[Tensor, "batch c h w"]) -> Objective:
        """`-log p(image | code)` of these images, as an objective of their codes."""
        return Reconstruction(self, images.flatten(1))

    def decode(self, codes: Float[Tensor, "*codes"]) -> Float[Tensor, "*lead c h w"]:
        """The expected images of codes, in [0, 1]."""
        mean = self.likelihood.mean(self.decoder(codes))
        return mean.unflatten(-1, self.image_shape)


class Reconstruction(Objective):
    """`-log p(image | code)`, with the fastest sweep that the decoder allows."""

    def __init__(self, model: DiscreteVAE, pixels: Float[Tensor, "batch d"]) -> None:
        self.decoder = model.decoder
        self.likelihood = model.likelihood
        self.compiled = model.compiled_sweep
        self.pixels = pixels
        self._hidden: tuple[Tensor, Tensor] | None = None

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch"]:
        if not isinstance(self.decoder, Decoder):
            return self.likelihood.loss(self.decoder(codes), self.pixels)
        hidden = self.decoder.first(codes.flatten(2))
        self._hidden = (codes, hidden.detach())  # an estimator sweeps the codes that it has just evaluated
        return self._rest_loss(hidden)

    @torch.no_grad()
    def sweep(
        self, codes: Float[Tensor, "samples batch n k"], loss: Float[Tensor, "samples batch"] | None = None
    ) -> Float[Tensor, "samples batch n k"]:
        if not isinstance(self.decoder, Decoder):
            return FunctionObjective(self).sweep(codes, loss)
        if loss is None or self._hidden is None or self._hidden[0] is not codes:
            loss = self(codes)
        assert self._hidden is not None
        weight, hidden = self.decoder.first.weight, self._hidden[1]
        if isinstance(self.likelihood, Bernoulli) and len(self.decoder.rest) == 0:
            return bernoulli_linear_sweep(codes, weight, hidden, self.pixels, loss, compiled=self.compiled)
        per_code = self.decoder.numbers_per_code
        return difference_sweep(codes, weight, hidden, self._rest_loss, loss, numbers_per_code=per_code)

    def _rest_loss(self, hidden: Tensor) -> Tensor:
        """The loss as a function of the outputs of the decoder's first layer."""
        assert isinstance(self.decoder, Decoder)
        return self.likelihood.loss(self.decoder.rest(hidden), self.pixels)


def linear_vae(
    layer: LatentLayer, image_shape: tuple[int, int, int], likelihood: Likelihood, hidden: tuple[int, ...] = ()
) -> DiscreteVAE:
    """One linear layer each way (the paper's section 6.1).

    Raises:
        InputError: hidden layers were asked for.
    """
    if hidden:
        raise InputError(
            f"the linear model has no hidden layers; got {','.join(map(str, hidden))}: use --model mlp, or leave --hidden out"
        )
    return _dense_vae(layer, image_shape, likelihood, ())


def mlp_vae(
    layer: LatentLayer, image_shape: tuple[int, int, int], likelihood: Likelihood, hidden: tuple[int, ...] = (300,)
) -> DiscreteVAE:
    """Hidden layers with ReLU, `hidden` wide from the image to the code, mirrored in the decoder."""
    return _dense_vae(layer, image_shape, likelihood, hidden or (300,))


def _dense_vae(
    layer: LatentLayer, image_shape: tuple[int, int, int], likelihood: Likelihood, hidden: tuple[int, ...]
) -> DiscreteVAE:
    pixels, coordinates = math.prod(image_shape), math.prod(layer.shape)
    first, *wider = [pixels, *hidden, coordinates]
    body: list[nn.Module] = [nn.Linear(first, wider[0])]
    for wide in pairwise(wider):
        body += [nn.ReLU(), nn.Linear(*wide)]
    encoder = Encoder(layer, image_shape, nn.Sequential(*body))
    return DiscreteVAE(layer, image_shape, likelihood, encoder, Decoder(layer, [*reversed(hidden), pixels]))
