"""The sweep of a linear Bernoulli decoder as one Triton kernel, imported where a sweep runs on CUDA.

Each program takes one row of the code and a few examples, walks over the pixels, and keeps the sums of all values of
that row in registers. No changed code and no changed pixel is ever in memory. The program reads the weight as the
decoder has it, takes one exponential for each changed pixel, and is right for weights and logits of any size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

MOST_EXAMPLES = 4
"""Examples that share the weight a program has read; fewer where too few programs would fill a GPU."""
ENOUGH_PROGRAMS = 512
MOST_TOGETHER = 64
"""Factors between 1 and 2 that are multiplied before a logarithm is taken; float32 bears 127."""
MOST_VALUES = 16
"""Values of a row that one program takes; a longer row takes several."""
MOST_PIXELS = 128
"""Pixels that a program has in hand at once, if with examples and values they are not more than `MOST_NUMBERS`."""
MOST_NUMBERS = 4096
WARPS = 4
"""Groups of 32 threads in a program."""


def sweep(
    codes: Float[Tensor, "samples batch n k"],
    weight: Float[Tensor, "pixels n*k"],
    logits: Float[Tensor, "samples batch pixels"],
    images: Float[Tensor, "batch pixels"],
    loss: Float[Tensor, "samples batch"],
) -> Float[Tensor, "samples batch n k"]:
    """The sweep of `f(z) = sum_d softplus(a_d) - x_d a_d`, in nats; all in float32 on one CUDA device.

    Args:
        codes: one-hot rows.
        logits: `a`, its outputs for `codes`.
        images: `x`, in [0, 1].
    """
    samples, batch, n, k = codes.shape
    pixels, count = logits.shape[-1], samples * batch
    codes, weight, logits, images, loss = (tensor.contiguous() for tensor in (codes, weight, logits, images, loss))
    table = torch.empty_like(codes)
    values = min(triton.next_power_of_2(k), MOST_VALUES)
    of_rows = n * triton.cdiv(k, values)
    examples = MOST_EXAMPLES
    while examples > 1 and triton.cdiv(count, examples) * of_rows < ENOUGH_PROGRAMS:
        examples //= 2
    wide = min(MOST_PIXELS, MOST_NUMBERS // (values * examples))
    grid = (triton.cdiv(count, examples), n, triton.cdiv(k, values))
    _sweep_kernel[grid](
        codes, weight, logits, images, loss, table,
        count, batch,
        N=n, K=k, D=pixels, EXAMPLES=examples, VALUES=values, PIXELS=wide,
        TOGETHER=min(triton.cdiv(pixels, wide), MOST_TOGETHER),
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return table


@triton.jit  # type: ignore[untyped-decorator]
def _sweep_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, weight_ptr, logits_ptr, images_ptr, loss_ptr, table_ptr,
    count, batch,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    EXAMPLES: tl.constexpr, VALUES: tl.constexpr, PIXELS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    example = tl.program_id(0) * EXAMPLES + tl.arange(0, EXAMPLES)  # [E]
    row = tl.program_id(1)
    value = tl.program_id(2) * VALUES + tl.arange(0, VALUES)  # [V]
    here = example < count
    column = row * K + value
    image = example % batch

    # Which column the code has now.
    own = tl.zeros([EXAMPLES], dtype=tl.int32)
    for other in range(K):
        own += tl.where(tl.load(codes_ptr + (example * N + row) * K + other, mask=here, other=0.0) > 0.5, other, 0)
    own_column = row * K + own  # [E]

    # softplus(y) = max(y, 0) + log(1 + exp(-|y|)): the factors in the logarithm lie between 1 and 2. Many of them are
    # multiplied before one logarithm is taken. Where there is no pixel, all is 0, every factor 2 and the difference 0.
    total = tl.zeros([EXAMPLES, VALUES, PIXELS], dtype=tl.float32)
    for block in range(0, D, PIXELS * TOGETHER):
        product = tl.full([EXAMPLES, VALUES, PIXELS], 1.0, dtype=tl.float32)
        base_product = tl.full([EXAMPLES, PIXELS], 1.0, dtype=tl.float32)
        for turn in range(TOGETHER):
            pixel = block + turn * PIXELS + tl.arange(0, PIXELS)  # [P]
            inside = pixel < D
            both = here[:, None] & inside[None, :]
            a = tl.load(logits_ptr + example[:, None] * D + pixel[None, :], mask=both, other=0.0)  # [E, P]
            x = tl.load(images_ptr + image[:, None] * D + pixel[None, :], mask=both, other=0.0)
            now = tl.load(weight_ptr + pixel[None, :] * (N * K) + own_column[:, None], mask=both, other=0.0)
            new = tl.load(
                weight_ptr + pixel[None, :] * (N * K) + column[:, None],
                mask=(value < K)[:, None] & inside[None, :],
                other=0.0,
            )  # [V, P]
            difference = new[None, :, :] - now[:, None, :]  # [E, V, P]
            y = a[:, None, :] + difference
            product *= 1.0 + tl.exp(-tl.abs(y))
            base_product *= 1.0 + tl.exp(-tl.abs(a))
            total += tl.maximum(y, 0.0) - tl.maximum(a, 0.0)[:, None, :] - x[:, None, :] * difference
        total += tl.log(product) - tl.log(base_product)[:, None, :]
    change = tl.sum(total, axis=2)  # [E, V]
    place = (example[:, None] * N + row) * K + value[None, :]
    here_too = here[:, None] & (value < K)[None, :]
    tl.store(table_ptr + place, change + tl.load(loss_ptr + example, mask=here, other=0.0)[:, None], mask=here_too)
