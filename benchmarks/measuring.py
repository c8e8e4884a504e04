"""Measuring time and memory: contestants take turns, so that a machine whose speed drifts slows all of them alike.

Times are in seconds.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dgrad.devices import synchronize

LEAST_ROUNDS = 3
"""Measured for every contestant, however slow it is."""


def seconds_of(action: Callable[[], object], device: torch.device, *, of_processor: bool = False) -> float:
    """How long `action` takes, the device's work included.

    Args:
        of_processor: count the time of this process alone, which other work on the machine hardly disturbs.
    """
    clock = time.process_time if of_processor else time.perf_counter
    synchronize(device)
    start = clock()
    action()
    synchronize(device)
    return clock() - start


def take_turns(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: int = 3,
    seconds_each: float = math.inf,
    of_processor: bool = False,
) -> dict[str, list[float]]:
    """The times of actions that take turns, without those of the first `warm_up` turns.

    Args:
        seconds_each: an action that has used that much, and has been measured three times, takes no more turns.
        of_processor: as in `seconds_of`.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    used = dict.fromkeys(actions, 0.0)
    for turn in range(warm_up + rounds):
        for name, action in actions.items():
            if used[name] > seconds_each and len(times[name]) >= LEAST_ROUNDS:
                continue
            seconds = seconds_of(action, device, of_processor=of_processor)
            used[name] += seconds
            if turn >= warm_up or used[name] > seconds_each:  # what is as slow as that needs no warming up
                times[name].append(seconds)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """The least, the quartiles and the number of values.

    >>> spread([5.0, 1.0, 2.0, 4.0, 3.0])
    {'least': 1.0, 'lower_quartile': 2.0, 'median': 3.0, 'upper_quartile': 4.0, 'rounds': 5}
    """
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    quartiles = {"lower_quartile": lower, "median": median, "upper_quartile": upper}
    return {"least": min(values), **quartiles, "rounds": len(values)}


def compared(times: Mapping[str, list[float]], *references: str) -> dict[str, dict[str, Any]]:
    """The spread of each contestant's times, and the ratios of its median and its least time to each reference's.

    >>> compared({"a": [2.0, 2.0], "b": [1.0, 1.0]}, "b")["a"]["ratios"]
    {'b': 2.0}
    """
    rows: dict[str, dict[str, Any]] = {name: spread(values) for name, values in times.items()}
    for row in rows.values():
        row["ratios"] = {reference: row["median"] / rows[reference]["median"] for reference in references}
        row["least_ratios"] = {reference: row["least"] / rows[reference]["least"] for reference in references}
    return rows


def exponent(sizes: list[float], values: list[float]) -> float:
    """p of `value = c size^p`, by least squares of the logarithms.

    >>> round(exponent([1, 10, 100], [3, 300, 30000]), 6)
    2.0
    """
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


def in_new_process(module: str, *arguments: str) -> Any:
    """What `python -m module arguments` prints as JSON, or the last line of its complaint under `error`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout)


def peak_memory(action: Callable[[], object], device: torch.device) -> int:
    """Bytes by which memory in use rises at most while `action` runs, its result included.

    On CUDA that is what torch's allocator handed out; elsewhere the resident memory of this process, which should
    be a new one: memory that was freed before, and kept by the process, would hide some of what the action takes.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's, where there is one
    if give_back is not None:
        give_back(0)
    before = _resident(reset=True)
    action()
    return _resident() - before


def _resident(*, reset: bool = False) -> int:
    """The most resident memory that this process has had, in bytes; with `reset`, since now.

    `ru_maxrss` of a new process starts at the peak of the process that made it (Linux copies it at exec), so that
    Linux is asked directly.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
