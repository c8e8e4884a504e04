"""The sweep of a linear Bernoulli decoder in C++, compiled on the user's machine when it is first wanted. May import torch and dgrad.errors.

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
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dgrad.errors import CompilerWarning

SOURCE = Path(__file__).with_name("sweep.cpp")
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
    """Whether the kernel can be had here, compiling it where it is not in the cache; where it cannot, one warning says why."""
    return _library() is not None


def softplus_change(
    logits: Float[Tensor, "examples pixels"],
    rows: Float[Tensor, "n k pixels"],
    own: Int[Tensor, "examples n"],
) -> Float[Tensor, "examples n k"] | None:
    """By how much `sum_d softplus(a_d)` changes, in nats, when row i of the code takes the value j; None where the weights are too large.

    Args:
        logits: `a`, the outputs of the linear decoder, float32.
        rows: its weight, by row and value of the code.
        own: the value that each row has.
    """
    library = _library()
    assert library is not None, "call it where available()"
    n, k, pixels = rows.shape
    spread = float((rows.amax(1) - rows.amin(1)).amax())
    if not spread <= SPREAD_LIMIT:  # not a number either
        return None
    together = min(MOST_TOGETHER, int(SPREAD_LIMIT / max(spread, 1.0)))
    logits, rows, own = logits.contiguous(), rows.contiguous(), own.long().contiguous()
    change = logits.new_empty(len(logits), n, k)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (logits, rows, own, change))
    sizes = (ctypes.c_int64(size) for size in (together, len(logits), n, k, pixels, torch.get_num_threads()))
    library.dgrad_softplus_sweep(*pointers, *sizes)  # other threads of Python go on meanwhile
    return change


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, from the cache where it is there."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
    try:
        path = _cache_folder() / f"sweep-{_fingerprint(compiler)}.so"
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
    library.dgrad_softplus_sweep.restype = None
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
