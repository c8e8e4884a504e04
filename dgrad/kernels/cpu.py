"""A linear Bernoulli decoder in C++ (its loss, gradient and sweep) and the losses of any decoder, compiled on the user's machine when first wanted. May import torch and dgrad.errors.

The library has a plain C interface and is called through ctypes: no headers of torch or Python are read, so that it compiles in a
second or two. It is kept in the user's cache folder under a name made of its source, its flags and the machine's processor.
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
from collections.abc import Iterator
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
"""Nats within which a product of factors has to stay between two normalisations; float32 reaches 87."""
MOST_TOGETHER = 8
"""Factors multiplied between two normalisations; beyond it nothing is gained."""


def available() -> bool:
    """Whether the kernels can be had here, compiling them where they are not in the cache; where they cannot, one warning says why."""
    return _library() is not None


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels are for tensors like these, and can be had."""
    return all((tensor.device.type, tensor.dtype) == ("cpu", torch.float32) for tensor in tensors) and available()


@torch.no_grad()
def bernoulli_loss(
    logits: Float[Tensor, "*lead batch pixels"], images: Float[Tensor, "batch pixels"]
) -> Float[Tensor, "*lead batch"]:
    """`sum_d softplus(a_d) - x_d a_d`, in nats, of the outputs a of any decoder; no gradient.

    For tensors that this module `serves`.
    """
    return _loss_of_outputs("dgrad_loss_of_logits", logits, images)


@torch.no_grad()
def squared_error(
    outputs: Float[Tensor, "*lead batch pixels"], images: Float[Tensor, "batch pixels"]
) -> Float[Tensor, "*lead batch"]:
    """`sum_d (x_d - (1 + tanh a_d) / 2)^2` of the outputs a of any decoder; no gradient.

    For tensors that this module `serves`.
    """
    return _loss_of_outputs("dgrad_squared_error", outputs, images)


def _loss_of_outputs(function: str, outputs: Tensor, images: Tensor) -> Tensor:
    library = _library()
    assert library is not None, "use it where serves()"
    outputs, images = outputs.contiguous(), images.contiguous()
    loss = outputs.new_empty(outputs.shape[:-1])
    sizes = (loss.numel(), *images.shape, torch.get_num_threads())
    getattr(library, function)(*map(_at, (outputs, images, loss)), *map(_size, sizes))
    return loss


class BernoulliLinear:
    """`f(z) = sum_d softplus(a_d) - x_d a_d`, in nats, `a = W z + bias`, of one-hot codes: its value, its gradient in W and bias, its sweep.

    For float32 on a CPU, where `available()`. It keeps what the loss and the sweep of the same codes have in common; W and bias must
    not change while it is in use.

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
        self._plain_weight = weight.detach().contiguous()
        self.rows = self._plain_weight.new_empty(self.n * self.k, self.width)
        sizes = (self.n, self.k, self.pixels, torch.get_num_threads())
        self.spread: float = library.dgrad_rows(_at(self._plain_weight), _at(self.rows), *map(_size, sizes))
        self._codes: Tensor | None = None

    def loss(self, codes: Float[Tensor, "samples batch n k"]) -> Float[Tensor, "samples batch"] | None:
        """The loss, with a gradient for the weight and the bias and none for the codes; None for codes that are not one-hot."""
        if not self._know(codes):
            return None
        self._codes = codes
        loss: Tensor = _Loss.apply(self.weight, self.bias, self, codes.shape[:2])
        return loss

    def sweep(
        self, codes: Float[Tensor, "samples batch n k"], loss: Float[Tensor, "samples batch"]
    ) -> Float[Tensor, "samples batch n k"] | None:
        """The sweep of the codes whose loss was asked for last; None for others, or where the weights are too large."""
        return self._sweep(loss) if self._codes is codes else None

    def sweep_from(
        self,
        codes: Float[Tensor, "samples batch n k"],
        logits: Float[Tensor, "samples batch pixels"],
        loss: Float[Tensor, "samples batch"],
    ) -> Float[Tensor, "samples batch n k"] | None:
        """The sweep of codes whose logits `a` are known; None for codes that are not one-hot, or where the weights are too large."""
        if not self._know(codes):
            return None
        logits = logits.detach().contiguous()
        sizes = (len(self.own), self.pixels, torch.get_num_threads())
        self.library.dgrad_sigmoids(_at(logits), _at(self.of_minus), _at(self.of_plus), *map(_size, sizes))
        return self._sweep(loss)

    def _know(self, codes: Tensor) -> bool:
        """Take in codes; False if they are not one-hot."""
        codes = codes.detach()
        flat = codes.contiguous().view(-1, self.n)
        own = torch.empty(codes.shape[0] * codes.shape[1], self.n, dtype=torch.int32)
        if not self.library.dgrad_values(_at(flat), _at(own), _size(own.numel()), _size(self.k)):
            return False
        self.own = own
        # the sigmoids of -a and a
        self.of_minus, self.of_plus = self.rows.new_empty(2, len(own), self.width)
        return True

    def _sweep(self, loss: Tensor) -> Tensor | None:
        if not self.spread <= SPREAD_LIMIT:  # not a number either
            return None
        together = min(MOST_TOGETHER, int(SPREAD_LIMIT / max(self.spread, 1.0)))
        loss = loss.detach().contiguous()
        table = loss.new_empty(*loss.shape, self.n, self.k)
        tensors = (self.own, self.rows, self._linear(), self.of_minus, self.of_plus, loss, table)
        self.library.dgrad_sweep(*map(_at, tensors), _size(together), *self._sizes())
        return table

    def _linear(self) -> Tensor:
        """The images times the weight, `[batch, n*k]`."""
        batch, columns = len(self.images), self.n * self.k
        linear = self.images.new_empty(batch, columns)
        tensors = (self.images, self._plain_weight, linear)
        sizes = (batch, self.pixels, columns, torch.get_num_threads())
        of_few_pixels = self.library.dgrad_products(*map(_at, tensors), *map(_size, sizes))
        return linear if of_few_pixels else self.images @ self._plain_weight

    def _sizes(self) -> Iterator[ctypes.c_int64]:
        sizes = (len(self.own), len(self.images), self.n, self.k, self.pixels, torch.get_num_threads())
        return map(_size, sizes)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, kernel: BernoulliLinear, lead: torch.Size) -> Tensor:
        loss = weight.new_empty(lead)
        plain_bias = bias.detach().contiguous()
        tensors = (kernel.own, kernel.rows, plain_bias, kernel.images, kernel.of_minus, kernel.of_plus, loss)
        kernel.library.dgrad_loss(*map(_at, tensors), *kernel._sizes())
        ctx.kernel, ctx.own, ctx.of_plus = kernel, kernel.own, kernel.of_plus
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        kernel: BernoulliLinear = ctx.kernel
        scale = scale.contiguous()
        weight_gradient, bias_gradient = (
            torch.empty_like(kernel._plain_weight),
            torch.empty_like(kernel._plain_weight[:, 0]),
        )
        tensors = (ctx.own, ctx.of_plus, kernel.images, scale, weight_gradient, bias_gradient)
        sizes = (len(ctx.own), len(kernel.images), kernel.n, kernel.k, kernel.pixels, torch.get_num_threads())
        kernel.library.dgrad_gradient(*map(_at, tensors), *map(_size, sizes))
        return weight_gradient, bias_gradient, None, None


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


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
            f"the fast sweep could not be compiled with {compiler[0]!r} ({reason}): training goes on with torch alone, more slowly; "
            "install a C++ compiler, set CXX, or say --compile off",
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
    """Of everything that decides what the library is; a cache folder may be shared by machines with other processors."""
    processor = [platform.machine(), platform.processor()]
    features = Path("/proc/cpuinfo")
    if features.exists():
        processor += sorted(
            {line for line in features.read_text().splitlines() if line.startswith(("flags", "Features"))}
        )
    parts = [SOURCE.read_text(), *compiler, *FLAGS, *LIBRARY_FLAGS, *processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
