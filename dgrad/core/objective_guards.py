"""What an objective is refused or warned for: batch statistics, codes that it ignores, sweeps that cost too much."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from dgrad.errors import CostWarning, InputError

EXPENSIVE = 4096
"""The most evaluations for one example that a sweep makes without a warning."""
BATCH_NORM = (
    "BatchNorm in training mode inside a sweep: its statistics would count imagined codes and tie the examples "
    "together; expected .eval() on it, GroupNorm or LayerNorm instead, or an estimator without a sweep such as "
    "gumbel-softmax"
)
_warned: set[object] = set()


class BatchNormError(InputError):
    """A BatchNorm in training mode met imagined codes."""

    def __init__(self) -> None:
        super().__init__(BATCH_NORM)


def refuse_batch_norm(network: nn.Module) -> None:
    """Make sure that a network, evaluated at imagined codes, has no BatchNorm that uses statistics of the batch.

    Raises:
        InputError: it has one.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if any(norm.training or norm.running_mean is None for norm in norms):
        raise BatchNormError


class _RefusingBatchNorm(TorchFunctionMode):
    """Raises an InputError where a function of codes comes to a BatchNorm in training mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (F.batch_norm, torch.batch_norm) and kwargs.get("training", args[5] if len(args) > 5 else False):
            raise BatchNormError
        return function(*args, **kwargs)


def refusing_batch_norm() -> AbstractContextManager[object]:
    """Within it, a BatchNorm in training mode raises an InputError. Under `torch.compile` it sees nothing."""
    return nullcontext() if torch.compiler.is_compiling() else _RefusingBatchNorm()


def check_dependence(loss: Tensor, codes: Tensor, name: str) -> None:
    """Make sure that a loss of codes that are differentiated has a gradient in them.

    It looks at the graph alone: a loss whose gradient happens to be zero passes.

    Raises:
        InputError: it has none.
    """
    if not codes.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if not loss.requires_grad or not _leads_to(loss, codes):
        raise InputError(
            f"{name} needs the objective's gradient in the codes, and this loss does not depend on them by a gradient: "
            "an argmax, an index, .detach() or numpy stands between; expected a loss that computes with the codes "
            "themselves, or an estimator that evaluates hard codes, such as direct-rb, leg or rloo"
        )


def _leads_to(loss: Tensor, codes: Tensor) -> bool:
    """Whether the graph behind the loss contains the codes."""
    end = torch.autograd.graph.get_gradient_edge(codes).node
    nodes: list[Any] = [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is end:
            return True
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return False


def warn_if_expensive(evaluations: int, who: object, remedies: Iterable[str]) -> None:
    """Warn once for each `who` where a sweep evaluates an objective very often for each example."""
    if evaluations <= EXPENSIVE or who in _warned or torch.compiler.is_compiling():
        return
    _warned.add(who)
    warnings.warn(
        f"a sweep evaluates this objective {evaluations:,} times for each example; cheaper: {', '.join(remedies)}, "
        "sweep_share=0.1 of the estimator, or an estimator without a sweep such as rloo",
        CostWarning,
        stacklevel=2,
    )


def identity_of(function: Callable[..., Any]) -> object:
    """What tells callables apart that a training loop makes anew for each batch: their code, or their type."""
    return getattr(function, "__code__", type(function))


def agree(losses: Tensor, others: Tensor, *, exact: bool = False) -> bool:
    """Whether losses are the same but for rounding.

    Where asking would wait for a device, and under `torch.compile`, they are taken to be. Inside a
    transformation of `torch.func` values cannot be compared, and they are taken to differ.

    Args:
        exact: whether they were computed in the same way, so that only the last digits may differ.
    """
    if losses.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    try:
        ours, theirs = losses.detach().double().numpy(), others.detach().double().numpy()  # numpy waits for nothing
    except RuntimeError:
        return False
    eps = torch.finfo(losses.dtype).eps
    return bool((abs(ours - theirs) <= (32 * eps if exact else math.sqrt(eps)) * (1 + abs(theirs))).all())
