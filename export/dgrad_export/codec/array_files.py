"""Arrays in files, some rows at a time, without pickle: .npy, one array of a .npz, IDX files."""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dgrad.errors import InputError

SUFFIXES = (".npy", ".npz", "ubyte", "ubyte.gz")
"""The ends of names of files with arrays. The last two are those of MNIST and its kin."""
DAMAGES = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, struct.error)


class ArrayFile:
    """An array whose rows are read one after another, never all at once.

    Args:
        keys: names that the array of a .npz may have. The first that exists counts. A single array may have any name.

    Raises:
        InputError: the file cannot be read, or has no such array.
    """

    def __init__(self, path: Path, *keys: str) -> None:
        self.path = path
        self.member = _member(path, keys) if path.suffix == ".npz" else None
        with self._opened() as (_, shape, dtype):
            self.shape, self.dtype = shape, dtype
        if not shape:
            raise InputError(f"{self} is a single number; expected an array with a row for each example")

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}: {self.member}"

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, size: int) -> Iterator[npt.NDArray[Any]]:
        """Arrays `[size, ...]`, the last one shorter where need be.

        Raises:
            InputError: the file is cut short or damaged.
        """
        with self._opened() as (file, shape, dtype):
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                wanted = count * dtype.itemsize * math.prod(shape[1:])
                data = file.read(wanted)
                if len(data) < wanted:
                    raise EOFError(f"it ends within rows {start} to {start + count - 1} of {len(self)}")
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
        """The file behind its header, the array's shape and its data type."""
        try:
            with _open(self.path, self.member) as file:
                yield (file, *(_idx_header(file) if _is_idx(self.path) else _npy_header(file)))
        except InputError:
            raise
        except DAMAGES as error:
            detail = " ".join(str(error).split())
            raise InputError(
                f"{self} cannot be read ({detail}); "
                "expected a whole file with an array of numbers, as np.save or np.savez writes it"
            ) from None


def _member(path: Path, keys: tuple[str, ...]) -> str:
    names = names_in(path)
    found = [key for key in keys if key in names] or (names if len(names) == 1 else [])
    if not found:
        raise InputError(
            f"{path} has {', '.join(names) or 'nothing'}; expected an array called {' or '.join(keys)}: "
            f"save it with np.savez(path, {keys[0]}=...)"
        )
    return found[0]


def names_in(path: Path) -> list[str]:
    """The names of the arrays in a .npz.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except DAMAGES as error:
        raise InputError(f"{path} cannot be read ({error}); expected a .npz file, as np.savez writes it") from None


@contextmanager
def _open(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    if member is not None:
        with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as file:
            yield file
    elif path.suffix == ".gz":
        with gzip.open(path) as packed:
            yield packed  # type: ignore[misc]  # it reads as any file does
    else:
        with path.open("rb") as file:
            yield file


def _is_idx(path: Path) -> bool:
    return path.name.endswith(("ubyte", "ubyte.gz"))


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"the format version of the array is {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("the array holds objects")
    if columns_first and len(shape) > 1:
        raise ValueError("the array is in Fortran's order; save np.ascontiguousarray(array)")
    return shape, dtype


def _idx_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
    if zeros or kind != 8:
        raise ValueError("it is no IDX file of unsigned bytes")
    return struct.unpack(f">{dimensions}I", file.read(4 * dimensions)), np.dtype(np.uint8)
