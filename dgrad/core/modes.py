"""In which mode of torch a call runs. While `torch.compile` traces, each answer is no: it cannot trace the question."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def in_inference_mode() -> bool:
    """Whether `torch.inference_mode` holds: no graph is recorded, and nobody has a use for gradients."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def in_transform() -> bool:
    """Whether a transform of `torch.func` calls, which allows no `torch.autograd` inside."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def in_backward_pass() -> bool:
    """Whether a backward pass calls, as where `torch.utils.checkpoint` repeats an earlier call."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def needs_transforms() -> bool:
    """Whether a gradient inside the call must come from `torch.func`, since `torch.autograd` would be refused."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def without_gradient(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`torch.no_grad()` as a decorator that `torch.compile` can trace for methods of objects that it makes itself."""

    @functools.wraps(method)
    def run(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        with torch.no_grad():
            return method(*arguments, **keywords)

    return run
