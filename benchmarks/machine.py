"""What a measurement was made on, and what that machine can do at most."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dgrad
from dgrad.devices import describe_device
from dgrad.kernels import cpu

FEATURES = re.compile(r"^(fma|avx.*|amx.*|sse4_2|asimd.*|sve.*|bf16|f16c)$")
"""The flags of a processor that matter to arithmetic."""
ELEMENTWISE_SIZES = [2**11, 2**13, 2**14, 2**16]
"""Numbers in each of torch's four operands; one of them suits the caches best."""
LOOP_SOURCE = Path(__file__).with_name("multiply_add.cpp")
LOOP_SIZES = [2**9, 2**10, 2**11]
LOOP_NUMBERS_IN_A_TRIAL = 2**22


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, the versions, the threads and the time, as they are now."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": describe_device(device),
        "processor": _from_cpuinfo("model name") or platform.processor() or platform.machine(),
        "features": " ".join(sorted(filter(FEATURES.match, (_from_cpuinfo("flags", "Features") or "").split()))),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "dgrad": dgrad.__version__,
        "compiler": _compiler_version(),
    }


def _from_cpuinfo(*names: str) -> str | None:
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    found = re.search(rf"^(?:{'|'.join(names)})\s*:\s*(.*)$", text, re.MULTILINE)
    return found and found[1]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]


def _compiler_version() -> str | None:
    try:
        done = subprocess.run([*_compiler(), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0]


@dataclass(frozen=True)
class Trial:
    """An action that shows what the machine can do, how much it does, and the peak that it is a measure of."""

    peak: str
    amount: float
    action: Callable[[], object]


def trials(device: torch.device, *, small: bool = False) -> dict[str, Trial]:
    """What the machine's peaks are measured by; several trials of one peak differ in size.

    `matrix`: multiply-adds of a large float32 matrix product. `memory`: bytes read and written by a copy of more
    than the caches hold. The others are elementwise kernels on operands that fit the caches, torch's:
    `elementwise`, multiply-adds; `exponentials`; `logarithms`. On a CPU with a compiler, `elementwise` is also
    tried with a plain loop in C++, which has no call to pay for.
    """
    side, length = (256, 2**20) if small else (1024, 2**25)
    left, right, product = (torch.rand(side, side, device=device) for _ in range(3))
    source, copy = torch.rand(length, device=device), torch.empty(length, device=device)
    result = {
        "matrix": Trial("matrix", side**3, lambda: torch.mm(left, right, out=product)),
        "memory": Trial("memory", 2 * source.nbytes, lambda: copy.copy_(source)),
    }
    for size in ELEMENTWISE_SIZES:
        repeats = max(1, ELEMENTWISE_SIZES[-1] // size)
        for name, kernel in _elementwise(torch.rand(4, size, device=device)).items():
            result[f"{name} of {size}"] = Trial(name, size * repeats, _repeated(kernel, repeats))
    loop = _compiled_loop() if device.type == "cpu" else None
    if loop is not None:
        for size in LOOP_SIZES:
            repeats = LOOP_NUMBERS_IN_A_TRIAL // size
            result[f"loop of {size}"] = Trial(
                "elementwise", size * repeats, partial(loop, torch.rand(3, size), repeats)
            )
    return result


def _compiled_loop() -> Callable[[Tensor, int], None] | None:
    """`c += a b` for three rows, so many times over, compiled as the sweep's kernel is; None without a compiler."""
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "multiply_add.so"
        command = [*_compiler(), *cpu.FLAGS, *cpu.LIBRARY_FLAGS, str(LOOP_SOURCE), "-o", str(made)]
        try:
            subprocess.run(command, capture_output=True, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        library = ctypes.CDLL(str(made))

    def loop(operands: Tensor, times: int) -> None:
        pointers = (ctypes.c_void_p(operand.data_ptr()) for operand in operands)
        library.multiply_add(*pointers, ctypes.c_int64(operands.shape[1]), ctypes.c_int64(times))

    return loop


def _elementwise(operands: Tensor) -> dict[str, Callable[[], object]]:
    a, b, c, result = operands
    return {
        "elementwise": lambda: torch.addcmul(a, b, c, out=result),
        "exponentials": lambda: torch.exp(a, out=result),
        "logarithms": lambda: torch.log(a, out=result),
    }


def _repeated(kernel: Callable[[], object], repeats: int) -> Callable[[], object]:
    def action() -> None:
        for _ in range(repeats):
            kernel()

    return action


def peaks(tried: dict[str, Trial], times: dict[str, list[float]]) -> dict[str, float]:
    """How much the machine does in a second at best: by the median times, at the best size of each kind."""
    best: dict[str, float] = {}
    for name, trial in tried.items():
        best[trial.peak] = max(best.get(trial.peak, 0.0), trial.amount / statistics.median(times[name]))
    return best
