"""A run directory: its files, and what they say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dgrad.config import TrainConfig, read_config
from dgrad.errors import InputError
from dgrad.files.atomic import atomic_directory, write_text

SEEDS_FILE = "seeds.json"
"""What a directory of runs with several seeds has in the place of a run's configuration (`dgrad.training.seeds`)."""
SECONDS_FOR_ANOTHER = 20.0
"""How long a run's next process waits for the one before it, which saves its state."""


class Run:
    """The directory of a training run.

    config.json             the resolved configuration, enough to repeat the run
    metrics.jsonl           a line for each evaluation
    summary.json            the figures of a finished run
    checkpoint.safetensors  the last state, the best weights by validation, and what it takes to go on
    *.png                   curves, samples, reconstructions, use of the code
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.checkpoint_file = path / "checkpoint.safetensors"

    @classmethod
    def create(
        cls,
        path: Path,
        config: TrainConfig,
        *,
        overwrite: bool = False,
        first_save: Callable[[Run], None] | None = None,
    ) -> Run:
        """A new run directory with its configuration in it, whole or not at all; a run that it replaces goes last.

        Args:
            first_save: writes the first checkpoint (`Trainer.save`), before anything appears at `path`.

        Raises:
            InputError: the directory exists and is not empty; with `overwrite`, one that holds no run.
        """
        cls.check_free(path, overwrite=overwrite)
        with atomic_directory(path) as staging:
            run = cls(staging)
            write_text(run.config_file, config.to_json())
            if first_save is not None:
                first_save(run)
        return cls(path)

    @staticmethod
    def check_free(path: Path, *, overwrite: bool = False) -> None:
        """Make sure that a run can be created at `path`, before any work is done.

        Raises:
            InputError: it cannot.
        """
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; expected a directory for the run: choose another --out")
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        if not nearest.is_dir():
            raise InputError(f"{path} cannot be made, because {nearest} is a file; choose another --out")
        if not path.exists() or not any(path.iterdir()):
            return
        if not overwrite:
            raise InputError(
                f"{path} exists already; choose another --out, continue it with --resume {path}, "
                "or replace it with --overwrite"
            )
        if not any((path / name).is_file() for name in ("config.json", SEEDS_FILE)):
            raise InputError(f"{path} holds files but no run, so --overwrite leaves it alone; choose another --out")

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run.

        Raises:
            InputError: there is none.
        """
        run = cls(path)
        if (path / SEEDS_FILE).is_file():
            one = min(path.glob("seed*/"), default=path / "seed0")
            raise InputError(f"{path} holds runs of several seeds; expected one of them, such as {one}")
        if not run.config_file.is_file():
            found = "no such directory" if not path.exists() else "it has no config.json"
            raise InputError(f"no run at {path}: {found}; expected a directory that dgrad train wrote")
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have the run to oneself while it is trained. A process that is about to end, its state saved, is waited for.

        Raises:
            InputError: another process trains the run.
        """
        with self.config_file.open("rb") as file:
            deadline = time.monotonic() + SECONDS_FOR_ANOTHER
            while not _lock(file):
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{self.path} is being trained by another process; wait until that has ended, or stop it"
                    )
                time.sleep(0.1)
            yield

    @property
    def config(self) -> TrainConfig:
        """The run's configuration."""
        return read_config(self.config_file)

    def metrics(self) -> list[dict[str, Any]]:
        """The evaluations so far, oldest first; a line that a killed process left unfinished is passed over."""
        if not self.metrics_file.is_file():
            return []
        lines = []
        for text in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = dict(json.loads(text))
                line["step"] + line["epoch"]
            except (ValueError, KeyError, TypeError):
                break
            lines.append(line)
        return lines

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Add an evaluation."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def drop_metrics_after(self, step: int) -> None:
        """Keep the evaluations up to a step; later ones will be made again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the figures, with which the run is finished."""
        write_text(self.summary_file, json.dumps(summary, indent=2) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """The figures of a finished run, or None."""
        if not self.summary_file.is_file():
            return None
        try:
            summary = dict(json.loads(self.summary_file.read_text(encoding="utf-8")))
            summary["best"]["test_bound"] + summary["final"]["test_bound"]
            return summary
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.summary_file} is damaged; delete it and run dgrad train --resume {self.path}"
            ) from None


def _lock(file: IO[bytes]) -> bool:
    """Lock an open file for this process, until it is closed; whether that went. Where there are no locks, all goes."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
