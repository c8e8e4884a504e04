"""Sweeps: the loss of every code that differs from a sampled code in one coordinate.

A code is n one-hot rows of k values, ``codes`` of shape [S, B, n, k]. The sweep is
T[s, b, i, j] = f(codes[s, b] with row i replaced by onehot(j)), in nats, [S, B, n, k].
The own values, T[s, b, i, z_i], are f(codes[s, b]) itself.

All functions here need a first decoder layer a = codes.flatten(-2) @ weight.T + bias
and evaluate changes of ``a`` instead of whole decoders. None of them builds a graph.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bernoulli_linear_sweep", "difference_sweep", "gaussian_linear_sweep", "grouped_is_safe"]

GROUP = 8  # pixels whose factors are multiplied before one logarithm is taken
SPREAD_LIMIT = 60.0  # nats; see grouped_is_safe
CHUNK = 1 << 20  # numbers per temporary on the CPU: 4 MiB, about the second-level caches


@torch.no_grad()
def bernoulli_linear_sweep(
    codes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    loss: Tensor | None = None,
    form: Literal["auto", "grouped", "exact"] = "auto",
) -> Tensor:
    """Sweep of the Bernoulli loss f(z) = sum_d softplus(a_d) - x_d a_d of a linear decoder.

    codes [S, B, n, k] one-hot, weight [D, n*k], bias [D], images [B, D] in [0, 1],
    loss [S, B] = f(codes) in nats if it is known. Returns nats, [S, B, n, k].

    form "exact" takes one softplus per changed logit and is right for any weights.
    "grouped" is about three times as fast on a CPU; it is right where grouped_is_safe(weight, k)
    holds and NaN everywhere otherwise. "auto" is "exact" on accelerators, where reading
    the condition would wait for the device, and on the CPU it is "grouped" where that is safe.
    """
    samples, batch, n, k = codes.shape
    codes = codes.flatten(0, 1)  # [N, n, k] with N = S*B
    logits = F.linear(codes.flatten(1), weight, bias)  # [N, D]
    own = codes.argmax(-1, keepdim=True)  # [N, n, 1]

    # x part of the change: x . (W[:, (i, j)] - W[:, (i, z_i)])
    columns = (images @ weight).unflatten(-1, (n, k)).repeat(samples, 1, 1)  # [N, n, k]
    linear = columns - columns.gather(-1, own)  # [N, n, k]

    safe = grouped_is_safe(weight, k) if form != "exact" else None
    if form == "auto" and (safe.device.type != "cpu" or not safe):
        form = "exact"
    if form == "grouped":
        change = _grouped_change(logits, weight, own.squeeze(-1), k)
        change = torch.where(safe, change, torch.nan)
    else:
        change = _exact_change(logits, weight, own.squeeze(-1), k)

    change = (change - linear).unflatten(0, (samples, batch))  # [S, B, n, k]
    if loss is None:
        logits = logits.unflatten(0, (samples, batch))
        loss = (F.softplus(logits) - images * logits).sum(-1)  # [S, B]
    return change.add_(loss[..., None, None])


def grouped_is_safe(weight: Tensor, k: int) -> Tensor:
    """Whether the grouped form is right for this weight [D, n*k]: a boolean scalar tensor.

    A factor lies within exp(+-spread) of 1, where spread is max_j - min_j of its row of
    weights. SPREAD_LIMIT = 60 nats per group keeps products of factors inside float32
    (which ends at exp(+-87)), and what sigmoid(a) loses to underflow below exp(60 - 87).
    The condition reads the weights only: biases and logits may be of any size.
    """
    table = _table(weight, k)  # [n, k, G*H]
    spread = table.amax(1) - table.amin(1)  # [n, G*H]
    return (spread.unflatten(-1, (GROUP, -1)).sum(1) <= SPREAD_LIMIT).all()


def _table(weight: Tensor, k: int) -> Tensor:
    """Weight [D, n*k] as rows of pixels, [n, k, G*H], with zeros up to a multiple of G."""
    rows = F.pad(weight.T, (0, -weight.shape[0] % GROUP))  # [n*k, G*H]
    return rows.contiguous().unflatten(0, (-1, k))


def _grouped_change(logits: Tensor, weight: Tensor, own: Tensor, k: int) -> Tensor:
    """Changes of sum_d softplus(a_d) from products of GROUP pixels: [N, n, k] in nats.

    With s = sigmoid(a), v_j = exp(W_j) and own value z:
        softplus(a + W_j - W_z) - softplus(a) = log(p + q v_j),  p = 1 - s,  q = s / v_z.
    """
    table = _table(weight, k)
    n, _, pixels = table.shape
    # v only enters as v_j / v_z, so a row may be centred to keep it in range
    v = (table - (table.amax(1, True) + table.amin(1, True)) / 2).exp_()  # [n, k, G*H]
    inverse = v.reciprocal().flatten(0, 1)  # [n*k, G*H]
    own = own + k * torch.arange(n, device=own.device)  # [N, n], rows of inverse
    logits = F.pad(logits, (0, pixels - logits.shape[-1]), value=-torch.inf)  # factor 1
    p, s = torch.sigmoid(-logits), torch.sigmoid(logits)  # [N, G*H]

    change = logits.new_empty(len(logits), n, k)
    for e, i in _chunks(len(logits), n, k * pixels):
        index = own[e, i]  # [E, R]
        q = inverse.index_select(0, index.flatten()).unflatten(0, index.shape)  # [E, R, G*H]
        q *= s[e, None]
        # examples outermost: each thread then finds its own examples in its own cache
        factors = torch.addcmul(p[e, None, None], q[:, :, None], v[i])  # [E, R, k, G*H]
        products = factors.unflatten(-1, (GROUP, -1)).prod(-2)  # [E, R, k, H]
        torch.sum(products.log_(), -1, out=change[e, i])
    return change


def _exact_change(logits: Tensor, weight: Tensor, own: Tensor, k: int) -> Tensor:
    """Changes of sum_d softplus(a_d), one softplus per changed logit: [N, n, k] in nats."""
    table = weight.T.contiguous().unflatten(0, (-1, k))  # [n, k, D]
    n = len(table)
    base = F.softplus(logits)  # [N, D]
    rows = torch.arange(n, device=own.device)
    change = logits.new_empty(len(logits), n, k)
    for e, i in _chunks(len(logits), n, table[0].numel()):
        rest = logits[e, None] - table[rows[i], own[e, i]]  # [E, R, D], a without row i
        changed = rest[:, :, None] + table[i]  # [E, R, k, D]
        change[e, i] = F.softplus(changed).sub_(base[e, None, None]).sum(-1)
    return change


def _chunks(examples: int, rows: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Slices of examples and of rows whose product times size is at most about CHUNK."""
    e = max(1, min(examples, CHUNK // size))
    r = max(1, min(rows, CHUNK // (size * e)))
    for start in range(0, examples, e):
        for row in range(0, rows, r):
            yield slice(start, start + e), slice(row, row + r)


@torch.no_grad()
def difference_sweep(codes, weight, bias, rest_loss, loss):
    S, B, n, k = codes.shape
    hidden = F.linear(codes.flatten(-2), weight, bias)
    columns = weight.T.view(n, k, -1)
    out = torch.empty_like(codes)
    for i in range(n):
        own = codes[:, :, i] @ columns[i]
        for j in range(k):
            out[:, :, i, j] = rest_loss(hidden + columns[i, j] - own)
    return out
