"""The sweep of a linear Bernoulli decoder in Triton, where there is a Triton that can compile.

Triton comes with torch's CUDA builds; it compiles when it is first called, with a C compiler for its launcher.
"""

from __future__ import annotations

import functools
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from dgrad.errors import CompilerWarning


@functools.cache
def available() -> bool:
    """Whether the kernel runs here, tried once; where it does not, one warning says why."""
    try:
        one = torch.ones(1, 1, 1, device="cuda")
        sweep(one[None], one[0], one, one[0], one[0])
    except Exception as error:  # whatever Triton, the driver or a compiler says: torch alone is right, only slower
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"the fast sweep could not be compiled with Triton ({reason}): training goes on with torch alone, "
            "more slowly; install a C compiler and the Triton that torch was built with, or say --compile off",
            CompilerWarning,
            stacklevel=2,
        )
        return False
    return True


def sweep(
    codes: Float[Tensor, "samples batch n k"],
    weight: Float[Tensor, "pixels n*k"],
    logits: Float[Tensor, "samples batch pixels"],
    images: Float[Tensor, "batch pixels"],
    loss: Float[Tensor, "samples batch"],
) -> Float[Tensor, "samples batch n k"]:
    """The sweep of `f(z) = sum_d softplus(a_d) - x_d a_d`, in nats: see `triton_sweep`."""
    from dgrad.kernels import triton_sweep

    return triton_sweep.sweep(codes, weight, logits, images, loss)
