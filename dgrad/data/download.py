"""Fetches the IDX files of torchvision's data sets."""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dgrad.data.idx import IDX_FILES, find_idx
from dgrad.errors import RunError

# Seconds that a connection may stay silent.
_TIMEOUT = 10.0

_log = logging.getLogger(__name__)


def download_idx(name: str, data_root: Path) -> Path:
    """The folder `<data_root>/<name>/raw` with the IDX files of a torchvision data set such as "FashionMNIST".

    If none of them is there yet they are downloaded, checksums verified. Raises RunError where that fails, and then
    leaves nothing behind. A folder with some of them is returned as it is: `load_idx` says which is missing.
    """
    folder = data_root / name / "raw"
    if find_idx(folder):
        return folder
    _log.info("downloading %s into %s", name, folder)
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        # A folder beside the final one, on the same disk: what is moved out of it is whole.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_root) as temporary:
            _download(name, temporary)
            _move(Path(temporary, name, "raw"), folder)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"{name} could not be downloaded into {folder} ({reason}); put {', '.join(IDX_FILES)} (plain or .gz) "
            f"there, give a --data-root that holds {name}/raw, or use --dataset digits, which needs no download"
        ) from error
    return folder


def _download(name: str, root: str) -> None:
    import torchvision

    with _silence(), _socket_timeout(_TIMEOUT):
        getattr(torchvision.datasets, name)(root, download=True)


def _move(source: Path, target: Path) -> None:
    for archive in source.glob("*.gz"):  # torchvision has unpacked them
        archive.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError:  # The folder exists: it holds other files, or another process was faster.
        target.mkdir(exist_ok=True)
        for file in source.iterdir():
            file.replace(target / file.name)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        yield


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision opens its connections without a timeout and takes none; its process-wide default has to do."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
