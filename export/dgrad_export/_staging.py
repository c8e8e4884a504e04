"""A directory of files that appears whole or not at all. May import nothing heavy."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, which takes its place when the block ends well, and vanishes when it does not."""
    home = target.parent
    while not home.exists():
        home = home.parent
    staging = _hidden(home, target.name)
    staging.mkdir()
    try:
        yield staging
        _put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        staging.rename(target)
        return
    old = _hidden(target.parent, target.name)
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _hidden(directory: Path, name: str) -> Path:
    return directory / f".{name}.{uuid.uuid4().hex[:12]}"
