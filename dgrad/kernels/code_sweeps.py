"""Sweeps of decoders whose first layer is linear in the code: every changed code at the price of its difference.

With `a = z W' + bias` the output of the first layer, a code whose row i changes from its own value z to j has `a + W[:,
(i, j)] - W[:, (i, z)]`. The functions here evaluate those differences instead of whole decoders. None builds a graph,
and none waits for the device. Matrix products are meant in full float32, torch's default (no TF32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dgrad.kernels import cpu, cuda
from dgrad.kernels.numerics import softplus

GROUP = 8
"""Pixels whose factors are multiplied before one logarithm is taken."""
SPREAD_LIMIT = 60.0
"""Nats by which the factors of one group may spread; see `_grouped_is_safe`."""
NUMBERS_AT_ONCE = 2**20
"""Numbers in a temporary: 4 MiB, about the second-level caches of two cores. Half and twice of it measured slower."""
BYTES_PER_CALL = 2**23
"""On a CPU, what the layers' outputs may take in one call of the rest of a decoder.

With 300 hidden units and 784 pixels half of it is as fast and twice of it 15 % slower. Wider decoders hardly care."""
BYTES_PER_CALL_ELSEWHERE = 2**26
"""Fewer, larger calls where there are many cores to fill (not measured); the loss's own temporaries come on top."""


@torch.no_grad()
def difference_sweep(
    codes: Float[Tensor, "samples batch n k"],
    rows: Int[Tensor, "samples batch changes"],
    values: Int[Tensor, "samples batch changes"],
    weight: Float[Tensor, "*each width n*k"],
    hidden: Float[Tensor, "samples batch width"],
    rest_loss: Callable[[Tensor], Tensor],
    loss: Float[Tensor, "samples batch"],
    *,
    numbers_per_code: int | None = None,
    bytes_per_call: int | None = None,
) -> Float[Tensor, "samples batch n k"]:
    """The sweep through any decoder whose first layer is linear, from its first layer's outputs on.

    Args:
        codes: one-hot rows.
        rows, values: the row of each change, and its new value; all others hold the loss of the code.
        weight: of the first layer; `[B, width, n*k]` where each example has one of its own.
        hidden: the first layer's outputs for `codes`.
        rest_loss: the loss as a function of the first layer's outputs, `[R, B, width] -> [R, B]` for any R.
        numbers_per_code: how many outputs all layers have for one code; None where there is only the first.
        bytes_per_call: a budget for these outputs in one call of `rest_loss`; None for what suits the device. A call
            gets at least one change of each example.
    """
    samples, batch, n, k = codes.shape
    own = codes.argmax(-1)  # [S, B, n]
    indices = k * rows + values  # [S, B, C]
    new = indices.movedim(-1, 0)  # [C, S, B]
    old = (k * rows + own.gather(-1, rows)).movedim(-1, 0)  # [C, S, B]
    # [n*k, width], or those of all examples one after the other, in rows that a lookup reads fast
    columns = weight.mT.contiguous().reshape(-1, weight.shape[-2])
    if weight.ndim == 3:
        own_columns = n * k * torch.arange(batch, device=own.device)  # [B]
        new, old = new + own_columns, old + own_columns
    if bytes_per_call is None:
        bytes_per_call = _bytes_per_call(hidden)
    bytes_of_a_change = samples * batch * (numbers_per_code or hidden.shape[-1]) * hidden.element_size()
    per_call = max(1, bytes_per_call // max(1, bytes_of_a_change))  # an empty batch takes nothing
    # Preallocate: keeping each call's result separately fragments memory.
    losses = loss.new_empty(len(new), samples, batch)
    for part, after, before in zip(losses.split(per_call), new.split(per_call), old.split(per_call), strict=True):
        # f(a + W[:, new] - W[:, old])
        changed = hidden - F.embedding(before, columns) + F.embedding(after, columns)
        part.copy_(rest_loss(changed.flatten(0, 1)).unflatten(0, (-1, samples)))
    table = loss.unsqueeze(-1).expand(-1, -1, n * k).scatter(-1, indices, losses.movedim(0, -1))  # [S, B, n*k]
    return table.view_as(codes)


def support_is_smaller(codes: Float[Tensor, "samples batch n k"], rows: int | None = None) -> bool:
    """Whether `support_sweep` is the fastest way: there are fewer codes in all than changes.

    For a decoder that costs the same for every code. With hidden layers the two took the same time at equal counts (k^n
    from 8 to 900, batches of 10 and 100).

    Args:
        rows: how many of each code are changed; None for all.
    """
    samples, batch, n, k = codes.shape
    return k**n <= samples * batch * (n if rows is None else rows) * (k - 1)


@torch.no_grad()
def support_sweep(
    codes: Float[Tensor, "samples batch n k"], losses_of: Callable[[Tensor], Tensor], *, numbers_per_code: int
) -> Float[Tensor, "samples batch n k"]:
    """The sweep by looking it up: each of the `k^n` codes there are is evaluated once, for the whole batch.

    Args:
        codes: one-hot rows.
        losses_of: the loss of every example at codes given by the values of their rows, `[R, n] -> [R, B]` for any R.
        numbers_per_code: how many numbers such an evaluation holds for one code.
    """
    _, _, n, k = codes.shape
    values = torch.arange(k, device=codes.device)
    support = torch.cartesian_prod(*[values] * n).view(
        -1, n
    )  # [K, n]; the place of a code in it is its values read as digits
    per_call = max(1, _bytes_per_call(codes) // (numbers_per_code * codes.element_size()))
    losses = torch.cat([losses_of(part) for part in support.split(per_call)]).T  # [B, K]
    if n == 1:
        return losses.unsqueeze(-2).expand(codes.shape).contiguous()
    digits = k ** torch.arange(n - 1, -1, -1, device=codes.device)  # what one more in each row adds to the place
    own = codes.argmax(-1, keepdim=True)  # [S, B, n, 1]
    indices = (own.squeeze(-1) * digits).sum(-1)[..., None, None] + (values - own) * digits[:, None]  # [S, B, n, k]
    return losses.expand(len(codes), -1, -1).gather(-1, indices.flatten(2)).view_as(codes)


@torch.no_grad()
def bernoulli_linear_sweep(
    codes: Float[Tensor, "samples batch n k"],
    weight: Float[Tensor, "pixels n*k"],
    logits: Float[Tensor, "samples batch pixels"],
    images: Float[Tensor, "batch pixels"],
    loss: Float[Tensor, "samples batch"],
    *,
    compiled: bool = False,
) -> Float[Tensor, "samples batch n k"]:
    """The sweep of `f(z) = sum_d softplus(a_d) - x_d a_d`, in nats, for a decoder that is one linear layer.

    On a CPU the softplus part takes one logarithm for eight pixels where the weights allow it (they do unless they are
    huge). On other devices, where asking would wait for the device, it takes one softplus for each changed pixel, right
    for any weights. Compiled kernels are for the CPU (`kernels.cpu`) and for CUDA (`kernels.cuda`).

    Args:
        codes: one-hot rows.
        logits: its outputs for `codes`.
        images: in [0, 1].
        compiled: whether to use a compiled kernel where the device has one. It may be compiled now, which takes
            seconds.
    """
    if compiled and codes.device.type == "cuda" and codes.dtype == torch.float32 and cuda.available():
        return cuda.sweep(codes, weight, logits, images, loss)
    if compiled and cpu.serves(codes):
        table = cpu.BernoulliLinear(weight, None, images, (codes.shape[2], codes.shape[3])).sweep_from(
            codes, logits, loss
        )
        if table is not None:
            return table
    samples, _, n, k = codes.shape
    logits, images = logits.to(weight.dtype), images.to(weight.dtype)  # of autocast, or as they were given
    own = codes.argmax(-1).flatten(0, 1)  # [N, n], N = S*B
    rows = weight.T.contiguous().unflatten(0, (n, k))  # [n, k, D]
    flat_logits = logits.flatten(0, 1)  # [N, D]
    change = _softplus_change(flat_logits, rows, own)  # [N, n, k]
    # the x part of the change is linear: x . (W[:, (i, j)] - W[:, (i, z_i)])
    linear = (images @ weight).unflatten(-1, (n, k)).repeat(samples, 1, 1)  # [N, n, k]
    change -= linear - linear.gather(-1, own.unsqueeze(-1))
    return change.view_as(codes) + loss[..., None, None]


def _softplus_change(
    logits: Float[Tensor, "examples pixels"], rows: Float[Tensor, "n k pixels"], own: Int[Tensor, "examples n"]
) -> Float[Tensor, "examples n k"]:
    """By how much `sum_d softplus(a_d)` changes, in the fastest way that is right for these weights on this device."""
    host = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    if host and _grouped_is_safe(rows):  # on a CPU nothing waits
        return _grouped_change(logits, rows, own)
    return _exact_change(logits, rows, own)


def _grouped_is_safe(rows: Float[Tensor, "n k pixels"]) -> Bool[Tensor, ""]:
    """Whether the grouped form is exact for these weights, whatever the bias and the logits.

    A factor lies within `exp(+-spread)` of 1, `spread = max_j W_j - min_j W_j` at its pixel and row. While no eight of
    them spread over more than 60 nats, every product stays within float32, up to `exp(+-87)`. What underflows in
    `sigmoid(a)`, below `exp(60 - 87)`, makes no difference.
    """
    spread = rows.amax(1) - rows.amin(1)  # [n, D]
    return F.pad(spread, (0, -spread.shape[-1] % GROUP)).unflatten(-1, (GROUP, -1)).sum(1).amax() <= SPREAD_LIMIT


def _grouped_change(
    logits: Float[Tensor, "examples pixels"], rows: Float[Tensor, "n k pixels"], own: Int[Tensor, "examples n"]
) -> Float[Tensor, "examples n k"]:
    """By how much `sum_d softplus(a_d)` changes, with one logarithm for GROUP pixels.

    With `s = sigmoid(a)` and `v_j = exp(W_j)`: `softplus(a + W_j - W_z) - softplus(a) = log(p + q v_j)`, `p = 1 - s`,
    `q = s / v_z`.
    """
    n, k, pixels = rows.shape
    padding = (0, -pixels % GROUP)
    width, examples = pixels + padding[1], len(logits)
    table = F.pad(rows, padding)  # [n, k, W]
    # v enters only as v_j / v_z, so that each pixel may be centred to keep the exponential in range.
    v = (table - (table.amin(1, True) + table.amax(1, True)) / 2).exp_()  # [n, k, W]
    inverse = v.reciprocal()
    if k == 2:  # only the other value is computed: q = s v_other / v_z, half the factors
        inverse, v = v.flip(1) * inverse, torch.ones_like(v[:, :1])
    values = v.shape[1]
    logits = F.pad(logits, padding, value=-torch.inf)  # a factor of 1
    p, s = torch.sigmoid(-logits)[:, None], torch.sigmoid(logits)  # [N, 1, W], [N, W]

    change = logits.new_empty(n, examples, values)
    count = max(1, min(examples, NUMBERS_AT_ONCE // (values * width)))
    # Temporaries that every turn uses again stay in the cache.
    q_buffer = logits.new_empty(count, width)
    factors_buffer = logits.new_empty(count, values, width)
    products_buffer = logits.new_empty(count, values, width // GROUP)
    for part in _parts(examples, count):
        size = part.stop - part.start
        q, factors, products = q_buffer[:size], factors_buffer[:size], products_buffer[:size]
        groups = factors.view(size, values, GROUP, -1)
        of_rows = zip(inverse, v, own[part].T.contiguous(), change[:, part], strict=True)
        p_part, s_part, q_each = p[part], s[part], q.unsqueeze(1)
        for row_inverse, row_v, row_own, row_change in of_rows:
            torch.index_select(row_inverse, 0, row_own, out=q).mul_(s_part)
            torch.addcmul(p_part, q_each, row_v, out=factors)  # [N, k, W]
            torch.prod(groups, -2, out=products)
            torch.sum(products.log_(), -1, out=row_change)
    change = change.transpose(0, 1)  # [N, n, k]
    return change * torch.stack([own, 1 - own], -1) if k == 2 else change.contiguous()


def _exact_change(
    logits: Float[Tensor, "examples pixels"], rows: Float[Tensor, "n k pixels"], own: Int[Tensor, "examples n"]
) -> Float[Tensor, "examples n k"]:
    """By how much `sum_d softplus(a_d)` changes, with one softplus for each changed pixel."""
    n, k, pixels = rows.shape
    base = softplus(logits).unsqueeze(1)  # [N, 1, D]
    change = logits.new_empty(n, len(logits), k)
    for row in range(n):
        for part in _parts(len(logits), max(1, NUMBERS_AT_ONCE // (k * pixels))):
            without = logits[part] - rows[row].index_select(0, own[part, row])  # [N, D]
            changed = softplus(without.unsqueeze(1) + rows[row])  # [N, k, D]
            # The sum of differences, not the difference of sums, which would lose digits.
            torch.sum(changed.sub_(base[part]), -1, out=change[row, part])
    return change.transpose(0, 1).contiguous()  # [N, n, k]


def _bytes_per_call(like: Tensor) -> int:
    return BYTES_PER_CALL if like.device.type == "cpu" else BYTES_PER_CALL_ELSEWHERE


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
