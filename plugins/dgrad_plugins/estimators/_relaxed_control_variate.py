"""REINFORCE with a control variate that sees the relaxed code: what REBAR and RELAX share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from dgrad import Drawn, Estimate, LatentLayer, add_gradient, replace_gradient
from dgrad.core.estimator_tools import constant_directions, leaf, slope_of
from dgrad.core.random import gumbel
from dgrad.kernels.numerics import log_softmax
from dgrad_plugins.estimators._conditional import given_code


def draw_codes_and_noise(
    layer: LatentLayer, logits: Tensor, samples: int, *, generator: Generator | None = None
) -> Drawn:
    """Codes `[S, B, n, k]`, the noise that they come from, and that of the second draw, given the code."""
    noise = gumbel(logits, samples, generator=generator)
    codes = layer.argmax(log_softmax(logits.detach()) + noise)
    return Drawn(codes, (noise, gumbel(codes, generator=generator)[0]))


def relaxed_control_variate(
    layer: LatentLayer,
    logits: Tensor,
    drawn: Drawn,
    loss: Tensor,
    surrogate: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
) -> Estimate:
    """`(f(z) - c(zt)) (z - p) + d/dphi [c(zeta) - c(zt)]`.

    `zeta = log p + G`, `z = argmax zeta`, and `zt` is drawn as `zeta` given `z`.

    Args:
        layer: independent categorical rows.
        logits: `[B, n, k]`, the `phi` of the formula.
        drawn: what `draw_codes_and_noise` drew.
        loss: `f(z)` `[S, B]`; the decoder gets its gradient at `z`.
        surrogate: `c`, from perturbed logits `[S, B, n, k]` to `[S, B]`. It has a gradient for `parameters` alone.
        parameters: the parameters of `c`. They learn by lowering the squared norm of the gradient: its mean is the
            variance and a constant.
    """
    codes, (noise, second) = drawn.codes, drawn.kept[:2]
    learn = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    phi = leaf(logits)
    with torch.enable_grad():
        log_p = log_softmax(phi)
        potentials = log_p + noise  # zeta, [S, B, n, k]
        conditional = given_code(log_p, codes, second)  # zt, [S, B, n, k]
    with torch.enable_grad():
        free, bound = surrogate(torch.cat([potentials, conditional])).chunk(2)  # c(zeta), c(zt): [S, B]
        # Zeros where the surrogate does not depend on the code: then it is a baseline.
        with constant_directions():
            slope = slope_of((free - bound).mean(0).sum(), phi, create_graph=learn)  # [B, n, k]
        score = codes - layer.mean(logits.detach())  # [S, B, n, k]
        # (f(z) - c(zt)) (z - p) + d/dphi [c(zeta) - c(zt)]
        gradient = ((loss.detach() - bound)[..., None, None] * score).mean(0) + slope
    estimate = replace_gradient(loss.mean(0, keepdim=True), logits, gradient.unsqueeze(0))[0]  # [B]
    if learn:
        # Differentiated here, for these parameters alone: in the estimate's own graph it would reach the decoder.
        penalty = gradient.square().flatten(1).sum(-1).mean()
        descents = torch.autograd.grad(penalty, parameters, materialize_grads=True)
        for parameter, descent in zip(parameters, descents, strict=True):
            # The same for every example, so that the mean over the batch has the gradient of the mean penalty.
            estimate = add_gradient(estimate, (descent * parameter).sum().expand_as(estimate))
    return Estimate(loss=estimate, codes=codes)
