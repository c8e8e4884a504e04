"""Reads the IDX files of MNIST and its kin, plain or gzipped.

An IDX file is: two zero bytes, a byte for the dtype (8: unsigned bytes), a byte for the number of dimensions, each
dimension as a big-endian uint32, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from dgrad.data.splits import Dataset, Split
from dgrad.errors import InputError

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

_REMEDY = "delete it and fetch it again (the named data sets are downloaded when all four files are gone)"


def find_idx(folder: Path) -> dict[str, Path]:
    """Those of `IDX_FILES` that are in the folder, each with its path; a plain file goes before a `.gz`."""
    candidates = {name: (folder / name, folder / f"{name}.gz") for name in IDX_FILES}
    return {name: path for name, paths in candidates.items() for path in reversed(paths) if path.is_file()}


def load_idx(name: str, folder: Path, classes: tuple[str, ...]) -> Dataset:
    """The data set in the four `IDX_FILES` of a folder, images uint8 `[N, 1, H, W]`.

    The last 10,000 images of the training file are for validation (the last sixth, if it has fewer than 20,000).
    Raises InputError for a file that is missing or is not what it should be.
    """
    files = find_idx(folder)
    if missing := [file for file in IDX_FILES if file not in files]:
        raise InputError(
            f"{folder} has no {' and no '.join(missing)}; expected {', '.join(IDX_FILES)}, each plain or .gz; put what "
            "is missing there (the named data sets are downloaded when all four files are gone)"
        )
    train_images, train_labels, test_images, test_labels = (files[file] for file in IDX_FILES)
    full, test = _read_split(train_images, train_labels, classes), _read_split(test_images, test_labels, classes)
    if full.images.shape[1:] != test.images.shape[1:]:
        raise InputError(
            f"{test_images} has images of {_size(test)}; expected {_size(full)} as in {train_images.name}; fetch "
            "all four files again"
        )
    if len(full) < 2:
        raise InputError(
            f"{train_images} has {len(full)} image; expected at least 2, to train and to validate; {_REMEDY}"
        )
    held_out = 10_000 if len(full) >= 20_000 else max(1, len(full) // 6)
    assert full.labels is not None
    train = Split(full.images[:-held_out], full.labels[:-held_out])
    return Dataset(name, train, Split(full.images[-held_out:], full.labels[-held_out:]), test, classes)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file with so many dimensions. Raises InputError if the file is anything else."""
    raw = _read(path)
    magic = bytes([0, 0, 8, dimensions])
    if raw[:4] != magic:
        raise InputError(
            f"{path} begins with bytes '{raw[:4].hex(' ')}'; expected '{magic.hex(' ')}' (IDX, unsigned bytes, "
            f"dimensions: {dimensions}); {_REMEDY}"
        )
    header = 4 + 4 * dimensions
    if len(raw) < header:
        raise InputError(f"{path} has {len(raw)} bytes; expected a header of {header}: it is cut short; {_REMEDY}")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise InputError(
            f"{path} has {len(raw)} bytes; expected {expected} for the dimensions {list(shape)} in its header: it is "
            f"{'cut short' if len(raw) < expected else 'too long'}; {_REMEDY}"
        )
    if 0 in shape:
        raise InputError(f"{path} has dimensions {list(shape)}: it is empty; expected at least one value; {_REMEDY}")
    # A copy, because torch wants memory that it may write to.
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _read(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is corrupt ({error}); expected a whole gzip file; {_REMEDY}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); expected a readable file; {_REMEDY}") from error


def _read_split(image_path: Path, label_path: Path, classes: tuple[str, ...]) -> Split:
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if len(images) != len(labels):
        raise InputError(
            f"{image_path} has {len(images)} images and {label_path.name} {len(labels)} labels; expected as many of "
            "each; delete both and fetch them again"
        )
    if labels.max() >= len(classes):
        raise InputError(f"{label_path} has the label {labels.max()}; expected 0 to {len(classes) - 1}; {_REMEDY}")
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def _size(split: Split) -> str:
    return "x".join(map(str, split.images.shape[2:]))
