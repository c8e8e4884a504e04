"""A linear Bernoulli decoder in C++ (loss, gradient and sweep), and the losses of any decoder.

The library is compiled on the user's machine when first wanted. It has a plain C interface and is called through
ctypes. It reads no headers of torch or Python, so it compiles in a second or two. It stays in the user's cache folder
under a name made of its source, its flags and the machine's processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dgrad.errors import CompilerWarning

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
LIBRARY_FLAGS = ["-shared", "-fPIC"]
THREAD_FLAGS: tuple[list[str], ...] = (["-fopenmp"], [])
"""The second for compilers without OpenMP: one thread."""
SECONDS_TO_COMPILE = 120
SPREAD_LIMIT = 60.0
"""Nats by which the values of a row may lie apart at one pixel; cpu.cpp has the same."""
LONGEST_ROW = 16
"""Over longer ones torch's softmax is as fast."""


def available() -> bool:
    """Whether the kernels can be had here. They are compiled if the cache lacks them; one warning says why not."""
    return _library() is not None


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels are for tensors like these, and can be had. They are for no transformation of torch's."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all((tensor.device.type, tensor.dtype) == ("cpu", torch.float32) for tensor in tensors) and available()


def bernoulli_loss(
    logits: Float[Tensor, "*lead batch pixels"], images: Float[Tensor, "batch pixels"]
) -> Float[Tensor, "*lead batch"]:
    """`sum_d softplus(a_d) - x_d a_d`, in nats, of the outputs a of any decoder.

    For tensors that this module `serves`. The images get no gradient.
    """
    loss: Tensor = _LossOfOutputs.apply(logits, images, "dgrad_loss_of_logits", _bernoulli_slope)
    return loss


def squared_error(
    outputs: Float[Tensor, "*lead batch pixels"], images: Float[Tensor, "batch pixels"]
) -> Float[Tensor, "*lead batch"]:
    """`sum_d (x_d - (1 + tanh a_d) / 2)^2` of the outputs a of any decoder.

    For tensors that this module `serves`. The images get no gradient.
    """
    loss: Tensor = _LossOfOutputs.apply(outputs, images, "dgrad_squared_error", _squared_error_slope)
    return loss


def _bernoulli_slope(logits: Tensor, images: Tensor) -> Tensor:
    return logits.sigmoid() - images


def _squared_error_slope(outputs: Tensor, images: Tensor) -> Tensor:
    mean = (2 * outputs).sigmoid()
    return 4 * (mean - images) * mean * (1 - mean)


class _LossOfOutputs(torch.autograd.Function):
    """A loss of outputs and its slope, both in one pass over the outputs."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, images: Tensor, function: str, slope_of: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        library = _library()
        assert library is not None, "use it where serves()"
        plain, plain_images = outputs.contiguous(), images.contiguous()
        loss = outputs.new_empty(outputs.shape[:-1])
        slope = torch.empty_like(plain) if ctx.needs_input_grad[0] else None
        sizes = (loss.numel(), *images.shape, torch.get_num_threads())
        getattr(library, function)(*map(_at, (plain, plain_images, loss, slope)), *map(_size, sizes))
        ctx.slope_of = slope_of
        ctx.save_for_backward(outputs, images, slope)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        outputs, images, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            slope = ctx.slope_of(outputs, images)
        return slope * gradient.unsqueeze(-1), None, None, None


_rows_compiled = False


def flush_denormals(flush: bool) -> None:
    """Let all of torch's threads take denormal numbers for zeros, or not; where `available()`."""
    library = _library()
    assert library is not None, "use it where available()"
    library.dgrad_flush_denormals(ctypes.c_bool(flush), _size(torch.get_num_threads()))


@contextmanager
def compiled_rows(wanted: bool = True) -> Iterator[None]:
    """Within it, softmaxes and argmaxes over few values are compiled ones, for tensors that this module `serves`.

    They differ from torch's in rounding. With `wanted` false they are torch's.
    """
    global _rows_compiled
    before, _rows_compiled = _rows_compiled, wanted
    try:
        yield
    finally:
        _rows_compiled = before


def serves_rows(x: Float[Tensor, "*lead k"]) -> bool:
    """Whether rows over the last axis are few values long and compiled functions of rows are wanted for them."""
    return _rows_compiled and x.shape[-1] <= LONGEST_ROW and serves(x)


def softmax(x: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead k"]:
    """The softmax over the last axis, where this module `serves_rows`."""
    result: Tensor = _OfRows.apply(x, "dgrad_softmax", _softmax_gradient)
    return result


def log_softmax(x: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead k"]:
    """The log-softmax over the last axis, where this module `serves_rows`."""
    result: Tensor = _OfRows.apply(x, "dgrad_log_softmax", _log_softmax_gradient)
    return result


def one_hot_argmax(x: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead k"]:
    """The argmax over the last axis as one-hot rows without a gradient, where this module `serves_rows`."""
    return _of_rows("dgrad_argmax", x)


def kl_to_uniform(x: Float[Tensor, "*lead n k"]) -> Float[Tensor, "*lead"]:
    """`KL(softmax(x) || uniform)` summed over the rows, in nats, where this module `serves_rows`."""
    result: Tensor = _KLToUniform.apply(x)
    return result.sum(-1)


class _KLToUniform(torch.autograd.Function):
    """For each row the KL and its slope, both in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.new_empty(x.shape[:-1])
        slope = _of_rows("dgrad_kl_to_uniform", x, result)
        ctx.save_for_backward(x, slope)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            log_p = x.log_softmax(-1)
            slope = log_p.exp() * (log_p - (log_p.exp() * log_p).sum(-1, keepdim=True))
        return slope * gradient.unsqueeze(-1)


class _OfRows(torch.autograd.Function):
    """A function of rows whose gradient follows from its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: str, gradient_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        result = _of_rows(function, x)
        ctx.function, ctx.gradient_of = function, gradient_of
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (result,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            return ctx.gradient_of(result, gradient), None, None
        return _of_rows(f"{ctx.function}_gradient", result, gradient), None, None


def _softmax_gradient(result: Tensor, gradient: Tensor) -> Tensor:
    return result * (gradient - (result * gradient).sum(-1, keepdim=True))


def _log_softmax_gradient(result: Tensor, gradient: Tensor) -> Tensor:
    return gradient - result.exp() * gradient.sum(-1, keepdim=True)


def _of_rows(function: str, x: Tensor, y: Tensor | None = None) -> Tensor:
    """What a function of the library makes of the rows of x, and of those of y beside them."""
    library = _library()
    assert library is not None, "use it where serves_rows()"
    x, y = x.contiguous(), None if y is None else y.contiguous()
    result = torch.empty_like(x)
    k = x.shape[-1]
    getattr(library, function)(*map(_at, (x, y, result)), *map(_size, (x.numel() // k, k, torch.get_num_threads())))
    return result


class BernoulliLinear:
    """`f(z) = sum_d softplus(a_d) - x_d a_d`, in nats, `a = W z + bias`, of one-hot codes: value, gradient and sweep.

    For float32 on a CPU, where `available()`. W and bias must not change while it is in use.

    Args:
        weight: `[pixels, n*k]`.
        bias: `[pixels]`; None where only `sweep_from` is called.
        images: `x`, in [0, 1], `[batch, pixels]`.
        shape: `n, k`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, images: Tensor, shape: tuple[int, int]) -> None:
        library = _library()
        assert library is not None, "use it where available()"
        self.library = library
        self.weight, self.bias, self.images = weight, bias, images.contiguous()
        self.n, self.k = shape
        self.pixels = weight.shape[0]
        self.width = library.dgrad_width(_size(self.pixels))
        self.plain_weight = weight.detach().contiguous()

    @functools.cached_property
    def packed(self) -> tuple[Tensor, Tensor, float]:
        """The rows of the transposed weight, `[n*k, width]`, and how far their values lie apart.

        Made when hard codes first come: relaxed codes need none of it. The second is for some pixels at a time, the
        third the largest of all.
        """
        rows = self.plain_weight.new_empty(self.n * self.k, self.width)
        apart = self.plain_weight.new_empty(self.n, self.width)
        sizes = (self.n, self.k, self.pixels, torch.get_num_threads())
        spread: float = self.library.dgrad_rows(*map(_at, (self.plain_weight, rows, apart)), *map(_size, sizes))
        return rows, apart, spread

    def at(self, codes: Float[Tensor, "samples batch n k"]) -> LinearCodes | None:
        """Codes with their loss, or None for codes that are not one-hot.

        The loss has a gradient for the weight and the bias, and none for the codes.
        """
        at = self._read(codes)
        if at is not None:
            at.loss = _Loss.apply(self.weight, self.bias, at, codes.shape[:2])
        return at

    def sweep_from(
        self,
        codes: Float[Tensor, "samples batch n k"],
        logits: Float[Tensor, "samples batch pixels"],
        loss: Float[Tensor, "samples batch"],
    ) -> Float[Tensor, "samples batch n k"] | None:
        """The sweep of codes whose logits `a` and loss are known.

        None for codes that are not one-hot, or where the weights are too large.
        """
        at = self._read(codes)
        if at is None:
            return None
        at.loss = loss
        logits = logits.detach().contiguous()
        sizes = (len(at.own), self.pixels, torch.get_num_threads())
        self.library.dgrad_sigmoids(_at(logits), _at(at.of_minus), _at(at.of_plus), *map(_size, sizes))
        return at.sweep()

    def _read(self, codes: Tensor) -> LinearCodes | None:
        codes = codes.detach()
        flat = codes.contiguous().view(-1, self.n)
        own = torch.empty(codes.shape[0] * codes.shape[1], self.n, dtype=torch.int32)
        one_hot = self.library.dgrad_values(_at(flat), _at(own), _size(own.numel()), _size(self.k))
        return LinearCodes(self, own) if one_hot else None

    def sizes(self, own: Tensor) -> Iterator[ctypes.c_int64]:
        """As the functions of the library take them."""
        sizes = (len(own), len(self.images), self.n, self.k, self.pixels, torch.get_num_threads())
        return map(_size, sizes)

    def linear(self) -> Tensor:
        """The images times the weight, `[batch, n*k]`."""
        batch, columns = len(self.images), self.n * self.k
        linear = self.images.new_empty(batch, columns)
        tensors = (self.images, self.plain_weight, linear)
        sizes = (batch, self.pixels, columns, torch.get_num_threads())
        of_few_pixels = self.library.dgrad_products(*map(_at, tensors), *map(_size, sizes))
        return linear if of_few_pixels else self.images @ self.plain_weight


class LinearCodes:
    """Codes in the kernel, with what their loss and their sweep have in common.

    Attributes:
        own: the values of their rows, `[samples * batch, n]`.
        of_minus, of_plus: the sigmoids of -a and a, `[samples * batch, width]`, which the kernel fills in.
        loss: `[samples, batch]`.
    """

    loss: Tensor

    def __init__(self, kernel: BernoulliLinear, own: Tensor) -> None:
        self.kernel = kernel
        self.own = own
        self.of_minus, self.of_plus = kernel.images.new_empty(2, len(own), kernel.width)

    def sweep(self) -> Float[Tensor, "samples batch n k"] | None:
        """The sweep, or None where the weights are too large."""
        kernel = self.kernel
        rows, apart, spread = kernel.packed
        if not spread <= SPREAD_LIMIT:  # not a number either
            return None
        loss = self.loss.detach().contiguous()
        table = loss.new_empty(*loss.shape, kernel.n, kernel.k)
        tensors = (self.own, rows, apart, kernel.linear(), self.of_minus, self.of_plus, loss, table)
        kernel.library.dgrad_sweep(*map(_at, tensors), *kernel.sizes(self.own))
        return table


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, at: LinearCodes, lead: torch.Size) -> Tensor:
        kernel, loss = at.kernel, weight.new_empty(lead)
        plain_bias = bias.detach().contiguous()
        tensors = (at.own, kernel.packed[0], plain_bias, kernel.images, at.of_minus, at.of_plus, loss)
        kernel.library.dgrad_loss(*map(_at, tensors), *kernel.sizes(at.own))
        ctx.kernel, ctx.own, ctx.of_plus = kernel, at.own, at.of_plus  # not `at`, which holds the loss: a circle
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        kernel: BernoulliLinear = ctx.kernel
        scale = scale.contiguous()
        of_weight = torch.empty_like(kernel.plain_weight)
        of_bias = torch.empty_like(kernel.plain_weight[:, 0])
        tensors = (ctx.own, ctx.of_plus, kernel.images, scale, of_weight, of_bias)
        kernel.library.dgrad_gradient(*map(_at, tensors), *kernel.sizes(ctx.own))
        return of_weight, of_bias, None, None


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _size(size: int) -> ctypes.c_int64:
    return ctypes.c_int64(size)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, from the cache where it is there."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
    try:
        path = _cache_folder() / f"cpu-{_fingerprint(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home directory
        output = getattr(error, "stderr", None) or str(error)
        reason = output.strip().splitlines()[0] if output.strip() else type(error).__name__
        warnings.warn(
            f"the fast sweep could not be compiled with {compiler[0]!r} ({reason}): training goes on with torch alone, "
            "more slowly; install a C++ compiler, set CXX, or say --compile off",
            CompilerWarning,
            stacklevel=2,
        )
        return None
    library.dgrad_width.restype = ctypes.c_int64
    library.dgrad_values.restype = ctypes.c_bool
    library.dgrad_products.restype = ctypes.c_bool
    library.dgrad_rows.restype = ctypes.c_float
    return library


def _compile(compiler: list[str], path: Path) -> None:
    """Compile the source to `path`; another process that does the same at the same time does no harm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for threads in THREAD_FLAGS:
            command = [*compiler, *FLAGS, *LIBRARY_FLAGS, *threads, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_COMPILE)
            if done.returncode == 0:
                break
        done.check_returncode()
        made.replace(path)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgrad" / "kernels"


def _fingerprint(compiler: list[str]) -> str:
    """A name for all that decides the library. Machines with other processors may share a cache folder."""
    processor = [platform.machine(), platform.processor()]
    features = Path("/proc/cpuinfo")
    if features.exists():
        processor += sorted(
            {line for line in features.read_text().splitlines() if line.startswith(("flags", "Features"))}
        )
    parts = [SOURCE.read_text(), *compiler, *FLAGS, *LIBRARY_FLAGS, *processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
