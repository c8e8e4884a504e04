"""The augment-REINFORCE-swap-merge estimator."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Drawn, Estimate, GradientEstimator, LatentLayer, Objective, Traits, replace_gradient
from dgrad.core.estimator_tools import needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad.core.random import gumbel
from dgrad.kernels.numerics import full_precision, softmax

_einsum = full_precision(torch.einsum)
CODES_PER_CALL = 16384
"""How many swapped codes, over the batch, the objective gets at once: a bound on memory."""


class AugmentReinforceSwapMerge(GradientEstimator):
    """ARSM: the noise of every two values swapped, in all variables at once.

    `g_c = sum_j [f(z^(c<->j)) - mean_m f(z^(m<->j))] (1/k - pi_j)`, with pi ~ Dirichlet(1) for each variable.
    `z^(c<->j)` is `argmin_m pi_m exp(-phi_m)` with pi_c and pi_j exchanged.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[1, B, n, k]`. Loss and code are those without a swap: a sample of
    `q`.

    Bias: none. Often behind `rloo` with as many evaluations.

    Cost: k(k-1)/2 + 1 evaluations of any objective, whatever the number of variables. Swaps that change no code are
    evaluated too: the count is constant and nothing waits for the device.

    Reference: Yin, Yue & Zhou 2019, ARSM: augment-REINFORCE-swap-merge estimator for gradient backpropagation through
    categorical variables.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimator = dgrad.estimator("arsm")
    >>> estimator.traits.evaluations(layer), estimator(layer, logits, lambda codes: codes[..., 0].sum(-1)).codes.shape
    (4, torch.Size([1, 4, 2, 3]))
    """

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=_evaluations,
            reference="Yin et al. 2019",
            why_unsupported=needs_one_hot_rows("arsm"),
            one_pass=True,
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        noise = gumbel(logits, generator=generator)  # [1, B, n, k], -log E
        loss = objective(_code(layer, logits, noise))  # [1, B]
        with torch.no_grad():
            parts = _pairs(logits).split(max(1, CODES_PER_CALL // max(1, len(logits))), 1)
            swapped = [objective(_code(layer, logits, _swap(noise[0], *part))) for part in parts]
        return self._combine(layer, logits, noise, loss, torch.cat(swapped))

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        noise = gumbel(logits, generator=generator)  # [1, B, n, k]
        swapped = _swap(noise[0], *_pairs(logits))  # [k(k-1)/2, B, n, k]
        return Drawn(_code(layer, logits, torch.cat([noise, swapped])), (noise,))

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        (noise,) = drawn.kept
        return self._combine(layer, logits, noise, loss[:1], loss[1:])

    def _combine(self, layer: LatentLayer, logits: Logits, noise: Tensor, loss: Tensor, swapped: Tensor) -> Estimate:
        """From the losses without a swap `[1, B]`, and with each `[k(k-1)/2, B]`."""
        k = logits.shape[-1]
        with torch.no_grad():
            # F[b, c, j] = f(z^(c<->j)), symmetric, the code itself on its diagonal
            losses = loss[0].to(logits.dtype)[:, None, None].repeat(1, k, k)  # [B, k, k]
            c, j = _pairs(logits)
            losses[:, c, j] = losses[:, j, c] = swapped.to(logits.dtype).T
            pi = softmax(-noise)  # [1, B, n, k]
            # g_c = sum_j (F_cj - mean_m F_mj) (1/k - pi_j)
            centred = losses - losses.mean(1, keepdim=True)
            direction = _einsum("bcj,sbnj->sbnc", centred, 1 / k - pi.to(logits.dtype))
        return Estimate(loss=replace_gradient(loss, logits, direction)[0], codes=_code(layer, logits, noise))


def _code(layer: LatentLayer, logits: Tensor, noise: Tensor) -> Tensor:
    """`argmin_m pi_m exp(-phi_m) = argmax_m (phi_m - log E_m)`, because `pi = E / sum E`."""
    return layer.argmax(logits.detach() + noise).to(logits.dtype)


def _pairs(logits: Tensor) -> Tensor:
    """Every two different values, `[2, k(k-1)/2]`."""
    k = logits.shape[-1]
    return torch.triu_indices(k, k, 1, device=logits.device)


def _swap(noise: Tensor, c: Tensor, j: Tensor) -> Tensor:
    """`[pairs, B, n, k]`: the noise with its coordinates c and j exchanged, for each pair of them."""
    order = torch.arange(noise.shape[-1], device=noise.device).repeat(len(c), 1)  # [pairs, k]
    order.scatter_(1, torch.stack([c, j], 1), torch.stack([j, c], 1))
    return noise[..., order].movedim(-2, 0)


def _evaluations(layer: LatentLayer) -> int:
    k = layer.shape[-1]
    return k * (k - 1) // 2 + 1
