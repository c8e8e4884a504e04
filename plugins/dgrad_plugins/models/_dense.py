"""The dense models: one linear layer each way, or hidden layers with ReLU."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn

from dgrad import InputError, LatentLayer, run_defaults
from dgrad.vae.likelihoods import Likelihood
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.networks import Decoder, Encoder


def linear_vae(
    layer: LatentLayer, image_shape: tuple[int, int, int], likelihood: Likelihood, hidden: tuple[int, ...] = ()
) -> DiscreteVAE:
    """One linear layer each way (the paper's section 6.1).

    Raises:
        InputError: hidden layers were asked for.
    """
    if hidden:
        raise InputError(
            f"the linear model has no hidden layers; got {','.join(map(str, hidden))}: "
            "use --model mlp, or leave --hidden out"
        )
    return _dense_vae(layer, image_shape, likelihood, ())


@run_defaults(lr="cosine:0.003:0", why="mlp")
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
    decoder = Decoder(layer, [*reversed(hidden), pixels * likelihood.outputs_per_pixel])
    return DiscreteVAE(layer, image_shape, likelihood, encoder, decoder)
