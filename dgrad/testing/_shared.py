"""What the checks of estimators and of latents share: when they apply, and whether anything waits for a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dgrad.core.latent_layer import LatentLayer

LARGEST_SUPPORT = 4096


class NotApplicable(Exception):
    """The check says nothing here; the text says why."""


def needs_small_support(layer: LatentLayer) -> None:
    if layer.support_size > LARGEST_SUPPORT:
        raise NotApplicable(f"latent {layer} has too many codes to enumerate")


def needs_cuda() -> None:
    if not torch.cuda.is_available():
        raise NotApplicable("there is no CUDA device")


def other_strides(tensor: Tensor) -> Tensor:
    """The same numbers in another order of memory."""
    order = range(tensor.ndim - 1, -1, -1)
    return tensor.permute(*order).contiguous().permute(*order)


@contextmanager
def no_waiting_on_cuda() -> Iterator[None]:
    """Within it, an operation that waits for the CUDA device is an AssertionError."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        raise AssertionError(f"it waits for the device: {error}") from None
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def no_waiting() -> Iterator[None]:
    """The same on a CPU, for operations that would wait for a GPU."""
    with _OneHotAsOnGPU(), _NoWaiting():  # type: ignore[no-untyped-call]
        yield


class _NoWaiting(TorchDispatchMode):
    """Raises an AssertionError at operations whose result, or its shape, depends on values on a GPU."""

    WAITING = frozenset(
        [
            "_local_scalar_dense",
            "is_nonzero",
            "equal",
            "nonzero",
            "masked_select",
            "_unique2",
            "unique_dim",
            "bincount",
            "_linalg_check_errors",
        ]
    )

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        assert name not in self.WAITING and not by_mask, (
            f"it would wait for a GPU at aten.{name}; expected no .item(), no bool(tensor), "
            "no boolean mask as an index: torch.where instead"
        )
        return function(*args, **(kwargs or {}))


class _OneHotAsOnGPU(TorchFunctionMode):
    """On a CPU one_hot looks at its indices, on a GPU it does not."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.one_hot:
            indices, count = args
            return (indices.unsqueeze(-1) == torch.arange(count, device=indices.device)).long()
        return function(*args, **(kwargs or {}))
