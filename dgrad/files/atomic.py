"""Writing files whole or not at all. Nothing heavy is imported: commands without torch use it too."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dgrad.errors import InputError


def check_place(option: str, path: Path, noun: str) -> None:
    """Check, before any work, that a file, a `noun`, can be written where an option says.

    Raises:
        InputError: it cannot.
    """
    if path.is_dir():
        raise InputError(f"{option} {path} is a directory; name the {noun} to write in it")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no directory {path.parent}; make it first")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, name):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A new directory that replaces whatever is at `path` when the block ends well, and vanishes when it does not.

    Parents of `path` that are missing are made at the end only.
    """
    home = next(parent for parent in path.absolute().parents if parent.exists())
    staging = _hidden(home, path.name)
    staging.mkdir()
    try:
        yield staging
        path.parent.mkdir(parents=True, exist_ok=True)
        _put_in_place(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, path: Path) -> None:
    if not path.exists():
        staging.rename(path)
        return
    old = _hidden(path.parent, path.name)
    path.rename(old)
    try:
        staging.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _hidden(directory: Path, name: str) -> Path:
    return directory / f".{name}.{uuid.uuid4().hex[:12]}"


def umask() -> int:
    """The permissions that this process leaves out of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
