"""Fenchel-Young losses: training logits towards codes that are known."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.core.estimator_tools import check_choice, check_count
from dgrad.core.latent_layer import LatentLayer, check_batch
from dgrad.errors import InputError

REGULARISERS = ("entropy", "perturbed")


def fenchel_young(
    layer: LatentLayer,
    logits: Float[Tensor, "batch *code"],
    target: Float[Tensor, "*target"],
    *,
    regulariser: str = "entropy",
    sigma: float = 1.0,
    samples: int = 1,
    generator: Generator | None = None,
) -> Float[Tensor, " batch"]:
    """The Fenchel-Young loss of logits for the code that they should give, convex in the logits.

    - `entropy`: `log Z - <logits, target>`, minus the log-probability of the target. On one-hot rows it is the
      cross-entropy, on a chain the loss of a conditional random field.
    - `perturbed`: `E max_z <logits + sigma N, z> - <logits, target>`, N the noise of the layer. It needs no `log Z`,
      only an argmax. Its gradient is the mean of the perturbed argmax less the target.

    On one-hot rows with sigma 1 both have the same gradient in the mean. Their values differ by a constant there, 0.577
    for each row.

    Args:
        layer: any latent layer, for `perturbed` with noise and argmax, for `entropy` with `log_prob`.
        logits: `[B, *layer.shape]`. A logit of -inf forbids a value. The loss of a forbidden target is infinite or
            huge.
        target: `[B, *layer.shape]`, hard codes. `perturbed` takes their means too: the loss is then right but for a
            constant.
        sigma: the scale of the noise.
        samples: how many draws of the noise are averaged.

    Returns:
        the loss of each example, in nats for `entropy`.

    Raises:
        InputError: the shapes do not fit, or the layer lacks what the regulariser needs.

    Reference: Blondel, Martins & Niculae 2020, Learning with Fenchel-Young losses (arXiv 1901.02324); the perturbed
    ones: Berthet et al. 2020, Learning with differentiable perturbed optimizers (arXiv 2002.08676).

    >>> import torch, dgrad
    >>> layer, target = dgrad.latent("1x3"), torch.tensor([[[0.0, 1.0, 0.0]]])
    >>> fenchel_young(layer, torch.zeros(1, 1, 3), target)
    tensor([1.0986])
    """
    check_choice("regulariser", regulariser, REGULARISERS)
    check_count("samples", samples)
    check_batch(layer, logits)
    if target.shape != logits.shape:
        raise InputError(
            f"a target of shape {list(target.shape)} for logits of shape {list(logits.shape)}; expected the same shape"
        )
    if regulariser == "entropy":
        return -layer.log_prob(logits, target.unsqueeze(0)).squeeze(0)
    if not sigma > 0:
        raise InputError(f"sigma must stay above 0; got {sigma}: give a larger one")
    potentials = logits + sigma * layer.noise(logits, samples, generator=generator)  # [S, B, *code]
    best = layer.argmax(potentials.detach())
    # max_z <logits + sigma N, z>, whose gradient is that z
    code_axes = len(layer.shape)
    return _inner(potentials, best, code_axes).mean(0) - _inner(logits, target, code_axes)


def _inner(potentials: Tensor, codes: Tensor, code_axes: int) -> Tensor:
    """`<potentials, codes>` `[*lead, B]`: a potential of -inf counts where its coordinate is not 0."""
    return (torch.where(codes != 0, potentials, 0) * codes).flatten(-code_axes).sum(-1)
