"""Running commands side by side, on this machine or by Slurm. What the commands do does not matter here. Free of torch.

A command's standard input is a pipe whose other end its starter holds for as long as it lives. A command that listens
to it (`dgrad_cli.worker`) hears when the starter is gone, however it went. Commands have sessions of their own, so that
Ctrl-C reaches them once, from the starter, as SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgrad.errors import InputError, RunError
from dgrad.files.atomic import write_text

if TYPE_CHECKING:
    import submitit

SECONDS_BETWEEN_LOOKS = 0.05
TIMEOUTS = 100
"""How often a Slurm job that has reached its time limit is queued again: each time takes its run further."""
DAYS_OF_A_LOCAL_JOB = 7

Ended = Callable[["Job", "str | None"], object]
"""Called with a job that has ended, and what went wrong."""


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        name: for people; no two are the same.
        command: its words; a launcher that gives out devices adds `--device NAME`.
        log: the file that takes what it prints, behind what is there already.
    """

    name: str
    command: tuple[str, ...]
    log: Path

    def start(self, *more: str, environment: Mapping[str, str] | None = None) -> Started:
        """Start it, with further words, in an environment (None for ours)."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            begin = log.tell()
            process = subprocess.Popen(
                [*self.command, *more],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return Started(self, process, begin)


@dataclass(frozen=True)
class Started:
    """A command that was started.

    Attributes:
        begin: where its words begin in the log.
    """

    job: Job
    process: subprocess.Popen[bytes]
    begin: int

    def problem(self) -> str | None:
        """Wait for its end; why it failed, in one line, or None."""
        code = self.process.wait()
        self.process.communicate()  # closes the pipe, which the command takes for our end while it runs
        if code == 0:
            return None
        if code < 0:
            cause = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
            return f"killed by signal {-code} ({signal.Signals(-code).name}{cause})"
        said = self.job.log.read_bytes()[self.begin :].decode(errors="replace").splitlines()
        last = next((line for line in reversed(said) if line.strip()), f"exit code {code}, and not a word")
        return " ".join(last.split()).removeprefix("error: ")


def run_here(
    jobs: Sequence[Job], *, devices: Sequence[str], at_once: int, begin: Callable[[Job], object], end: Ended
) -> int | None:
    """Run the jobs, some at once, each in a process of its own; one that fails stops no other.

    At SIGINT and SIGTERM no further job begins, and those that run are asked to end, by SIGTERM, which is waited for.

    Args:
        devices: given out in turn; with more jobs at once than devices, several share one.

    Returns:
        The signal that came, or None.
    """
    waiting, running = deque(jobs), dict[Started, str]()
    places = max(1, min(at_once, len(jobs)))
    free = deque(devices[place % len(devices)] for place in range(places))
    # Several processes with all threads each are slower than with their share of them.
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // places)), **os.environ}
    asked = 0
    with _signals() as received:
        try:
            while running or (waiting and not received):
                while free and waiting and not received:
                    job, device = waiting.popleft(), free.popleft()
                    begin(job)
                    running[job.start("--device", device, environment=environment)] = device
                if len(received) > asked:
                    asked = len(received)
                    _terminate(running)
                for started in [candidate for candidate in running if candidate.process.poll() is not None]:
                    free.append(running.pop(started))
                    problem = started.problem()
                    end(started.job, None if received else problem)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            _terminate(running)  # none, unless something went wrong here: a full disk, say
            for started in running:
                started.process.wait()
    return received[0] if received else None


def _terminate(running: Iterable[Started]) -> None:
    for started in running:
        started.process.terminate()


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask to stop, instead of dying of them."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# By Slurm


class Submitted:
    """A job as submitit runs it.

    When it must make room (its time is up, or others go first) its command ends, its state saved, and it is queued
    again.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> str | None:
        """Run the command; what went wrong."""
        started = self.job.start()
        self._process = started.process
        return started.problem()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit, in the middle of the call above, when the job must make room."""
        import submitit

        if self._process is not None:
            self._process.terminate()
            # Not Popen.wait, which the call above is in, with a lock.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Submitted(self.job))


def submitit_executor(folder: Path, cluster: str, options: Iterable[str], at_once: int | None) -> submitit.AutoExecutor:
    """What submits jobs.

    Args:
        folder: for submitit's files; all machines must see it.
        cluster: `slurm`; or `local`, which does on this machine as if.
        options: texts `NAME=VALUE`: sbatch's long options, as submitit takes them.
        at_once: how many may run at once; None leaves it to Slurm.

    Raises:
        InputError: submitit is not installed, there is no Slurm, or an option cannot be.
    """
    try:
        import submitit
    except ImportError:
        raise InputError(
            "--launcher slurm needs submitit, which is not installed: pip install 'dgrad[slurm]'"
        ) from None
    parameters: dict[str, Any] = {"name": "dgrad-sweep", "slurm_additional_parameters": {}}
    if at_once is not None:
        parameters["slurm_array_parallelism"] = at_once
    shared, of_slurm = submitit.AutoExecutor._typed_parameters(), submitit.SlurmExecutor._valid_parameters()
    for text in options:
        name, separator, value = (part.strip() for part in text.partition("="))
        if not (name and separator and value):
            raise InputError(f"--slurm expects NAME=VALUE, for example partition=gpu; got {text!r}")
        name, typed = name.replace("-", "_"), int(value) if value.isdigit() else value
        if name in shared:
            parameters[name] = typed
        elif name in of_slurm:
            parameters[f"slurm_{name}"] = typed
        else:  # what sbatch knows and submitit does not
            parameters["slurm_additional_parameters"][name] = typed
    if cluster == "slurm" and not parameters.keys() & {"slurm_time", "timeout_min"}:
        raise InputError("--launcher slurm needs the time limit of a job, in minutes: --slurm time=60, for example")
    parameters.setdefault("timeout_min", parameters.get("slurm_time", DAYS_OF_A_LOCAL_JOB * 24 * 60))
    try:
        executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=TIMEOUTS)
    except RuntimeError:
        raise InputError(
            "there is no Slurm here (no srun on the PATH); give the command where there is, or leave out --launcher"
        ) from None
    try:
        executor.update_parameters(**parameters)
    except (TypeError, ValueError, NameError, AssertionError) as error:
        raise InputError(f"--slurm {' '.join(options)}: {' '.join(str(error).split())}") from None
    return executor


def run_submitted(
    jobs: Sequence[Job], executor: submitit.AutoExecutor, *, begin: Callable[[Job], object], end: Ended
) -> int | None:
    """Submit the jobs as one array and wait for them. Jobs of an earlier call that still wait or run are not repeated.

    At SIGINT and SIGTERM all are cancelled.

    Returns:
        The signal that came, or None.

    Raises:
        RunError: Slurm does not take them.
    """
    record = Path(executor.folder) / "jobs.json"
    handles = _still_there(record, executor)
    new = [job for job in jobs if job.name not in handles]
    for job in new:
        begin(job)
    try:
        submitted = executor.submit_array([Submitted(job) for job in new]) if new else []
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise RunError(f"Slurm does not take the jobs: {' '.join(str(error).split())}") from None
    handles |= {job.name: handle for job, handle in zip(new, submitted, strict=True)}
    write_text(record, json.dumps({name: handle.job_id for name, handle in handles.items()}, indent=2) + "\n")
    waiting = list(jobs)
    with _signals() as received:
        while waiting and not received:
            for job in [candidate for candidate in waiting if handles[candidate.name].done()]:
                waiting.remove(job)
                end(job, _outcome(handles[job.name]))
            time.sleep(10 * SECONDS_BETWEEN_LOOKS)
    for job in waiting:
        handles[job.name].cancel()
    return received[0] if received else None


def _still_there(record: Path, executor: submitit.AutoExecutor) -> dict[str, submitit.Job[Any]]:
    """The jobs of an earlier call that wait or run."""
    if not record.is_file():
        return {}
    numbers = json.loads(record.read_text(encoding="utf-8"))
    handles = {name: executor._executor.job_class(executor.folder, number) for name, number in numbers.items()}
    return {name: handle for name, handle in handles.items() if not handle.done(force_check=True)}


def _outcome(handle: submitit.Job[Any]) -> str | None:
    error = handle.exception()
    if error is None:
        return None if handle.result() is None else str(handle.result())
    return f"Slurm job {handle.job_id} ended without a result (state {handle.state}); see {handle.paths.stderr}"
