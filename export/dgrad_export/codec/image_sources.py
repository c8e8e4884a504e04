"""Images from files, folders and arrays, a batch at a time, in the form that a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dgrad.errors import InputError
from dgrad.files.images import read_image
from dgrad_export.codec.array_files import SUFFIXES, ArrayFile

PICTURES = (".png", ".jpg", ".jpeg")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Origin:
    """The file that an image is from, with its index where the file has several."""

    file: str
    index: int | None = None


@dataclass(frozen=True)
class Batch:
    """Images `[B, C, H, W]`, uint8 or floats, with the origin of each. `source` names them in messages."""

    source: str
    origins: list[Origin]
    images: npt.NDArray[Any]


class Images:
    """The images of all paths, in order. Those of a folder, at any depth, are in the order of their names.

    Raises:
        InputError: a path has no images that a model of this shape can take. Pictures are read later.
    """

    def __init__(self, paths: Iterable[Path], shape: Shape) -> None:
        self.shape = shape
        self.sources: list[list[Path] | ArrayFile] = []
        for path in paths:
            if path.name.endswith(SUFFIXES) and path.is_file():
                self._add_array(ArrayFile(path, "images"))
            else:
                self._add_pictures(_pictures(path))

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @property
    def longest_name(self) -> int:
        """How many characters the longest name of a file has."""
        files = [[source.path] if isinstance(source, ArrayFile) else source for source in self.sources]
        return max((len(str(file)) for listed in files for file in listed), default=0)

    def batches(self, size: int) -> Iterator[Batch]:
        """All images, `size` of them at a time or fewer.

        Raises:
            InputError: a picture cannot be read or has another size, or an array is damaged.
        """
        for source in self.sources:
            if isinstance(source, ArrayFile):
                start = 0
                for rows in source.rows(size):
                    if rows.dtype == np.uint8 and rows.max(initial=0) == 1:
                        raise InputError(
                            f"{source} is uint8 with a maximum of 1; expected 255 for white: multiply it by 255"
                        )
                    origins = [Origin(str(source.path), start + row) for row in range(len(rows))]
                    yield Batch(str(source), origins, self._channels_first(rows))
                    start += len(rows)
            else:
                for start in range(0, len(source), size):
                    files = source[start : start + size]
                    images = np.stack([self._read(file) for file in files])
                    yield Batch(f"{files[0]} and what follows", [Origin(str(file)) for file in files], images)

    def _add_pictures(self, files: list[Path]) -> None:
        if self.sources and isinstance(self.sources[-1], list):
            self.sources[-1].extend(files)
        else:
            self.sources.append(files)

    def _add_array(self, array: ArrayFile) -> None:
        channels, height, width = self.shape
        if array.shape[1:] not in self._row_shapes():
            last = "" if channels == 1 else f", {channels}"
            shapes = f"[N, {channels}, {height}, {width}] or [N, {height}, {width}{last}]"
            raise InputError(f"{array} has the shape {list(array.shape)}; expected {shapes}: reshape or resize them")
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise InputError(f"{array} is {array.dtype}; expected uint8 (0 to 255) or floats (0 to 1): convert it")
        if not len(array):
            raise InputError(f"{array} is empty; expected at least one image")
        self.sources.append(array)

    def _row_shapes(self) -> list[tuple[int, ...]]:
        channels, height, width = self.shape
        return [self.shape, (height, width, channels)] + [(height, width)] * (channels == 1)

    def _channels_first(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if rows.shape[1:] == self.shape:
            return rows
        return rows[:, None] if rows.ndim == 3 else rows.transpose(0, 3, 1, 2)

    def _read(self, file: Path) -> npt.NDArray[np.uint8]:
        """One picture, `[C, H, W]`."""
        pixels = read_image(file)
        channels, height, width = self.shape
        if pixels.shape[:2] != (height, width):
            found = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise InputError(f"{file} is {found} (width x height); expected {width}x{height}: resize it")
        if channels == 1 and pixels.ndim == 3:
            if (pixels != pixels[..., :1]).any():
                raise InputError(f"{file} has colours; this model takes grey images: convert it")
            pixels = pixels[..., 0]
        if channels == 3 and pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _pictures(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
        if not found:
            raise InputError(f"{path} has no images; expected files ending with {', '.join(PICTURES)} in it")
        return found
    if not path.is_file():
        raise InputError(f"there is no file or folder {path}; check the path")
    if path.suffix.lower() not in PICTURES:
        raise InputError(
            f"{path} is of no known kind; expected {', '.join(PICTURES)}, .npy, .npz, an IDX file (-ubyte, -ubyte.gz), "
            "or a folder of pictures"
        )
    return [path]
