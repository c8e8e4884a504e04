"""Reads a data set from a .npz file. Never unpickles: a file from a stranger can be wrong but cannot run code."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from dgrad.data.partitioning import partition
from dgrad.data.splits import Dataset, Split
from dgrad.errors import InputError

_FEWEST = 10
_SPLITS = ("train", "valid", "test")
_KEYS = {
    f"{split}{kind}" for split in ("", *(f"{name}_" for name in _SPLITS)) for kind in ("images", "labels", "attributes")
}
_KEYS.add("attribute_names")
_ROUNDING = 1e-6
Names = tuple[str, ...] | None


def load_npz(path: Path) -> Dataset:
    """The data set in a .npz file, pixels uint8 or float32 as they are in it.

    The file holds `images` and, if there are any, `labels` `[N]`, integers from 0: it is cut into 80 % train, 10 %
    valid, 10 % test, always the same way. Or it brings its splits: `train_images`, `valid_images`, `test_images`, and
    `train_labels`, `valid_labels`, `test_labels` or none of these. Instead of `labels` there may be `attributes`
    `[N, n]`, each 0 or 1, split or not, and their `attribute_names` `[n]`, text; without these they are called 0,
    1, ...

    Images are `[N, H, W]`, `[N, H, W, C]` with C = 1 or 3, or `[N, C, H, W]`, uint8 or floats in [0, 1]. Where four
    dimensions can be read both ways (both the second and the last are 1 or 3) the channels are taken to come first.

    Raises InputError for a file that is anything else.
    """
    arrays, found = _read(path)
    keys = [f"{split}_images" for split in _SPLITS]
    if "images" in arrays:
        if any(key in arrays for key in keys):
            raise InputError(f"{path} has both images and ready-made splits; expected one of the two; remove the other")
        whole = _split(path, arrays, "")
        if len(whole) < _FEWEST:
            raise InputError(f"{path} has {len(whole)} images; expected at least {_FEWEST}, to be split; add images")
        classes, attributes = _names(path, arrays, [whole])
        return partition(path.name, whole.images, whole.labels, classes, attributes=attributes)
    if missing := [key for key in keys if key not in arrays]:
        raise InputError(
            f"{path} has no {'images' if len(missing) == 3 else ' and no '.join(missing)} (it has: "
            f"{', '.join(found) or 'nothing'}); expected images, or {', '.join(keys)}; save it "
            "with np.savez(path, images=...)"
        )
    train, valid, test = (_split(path, arrays, f"{split}_") for split in _SPLITS)
    return Dataset(path.name, train, valid, test, *_names(path, arrays, [train, valid, test]))


def _read(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays under the keys that matter, and all the keys there are."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; expected a .npz file; check the path")
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path} is not a .npz file, or is cut short; expected a zip archive as np.savez writes it; save it again"
        )
    arrays: dict[str, np.ndarray] = {}
    what = "its list of arrays"
    try:
        with np.load(path, allow_pickle=False) as archive:
            for what in sorted(_KEYS.intersection(archive.files)):
                arrays[what] = np.asarray(archive[what])
            return arrays, archive.files
    except (ValueError, EOFError, OSError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: {what} cannot be read ({' '.join(str(error).split())}); expected an array of numbers, not of "
            "objects; save it again with np.savez and a numeric dtype"
        ) from error


def _split(path: Path, arrays: Mapping[str, np.ndarray], prefix: str) -> Split:
    images = _images(f"{path}: {prefix}images", arrays[f"{prefix}images"])
    labels, attributes = arrays.get(f"{prefix}labels"), arrays.get(f"{prefix}attributes")
    if labels is not None and attributes is not None:
        raise InputError(
            f"{path} has both {prefix}labels and {prefix}attributes; expected one of the two; remove the other"
        )
    if labels is not None:
        labels = _labels(f"{path}: {prefix}labels", labels, len(images))
    if attributes is not None:
        labels = _attributes(f"{path}: {prefix}attributes", attributes, len(images))
    return Split(torch.from_numpy(images), None if labels is None else torch.from_numpy(labels))


def _images(what: str, images: np.ndarray) -> np.ndarray:  # [N, C, H, W]
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise InputError(f"{what} are {images.dtype}; expected uint8 (0..255) or floats in [0, 1]; convert them")
    images = _channels_first(what, images)
    if images.dtype == np.uint8:
        if images.max() == 1:
            raise InputError(f"{what} are uint8 with a maximum of 1; expected 255 for white; multiply them by 255")
        return np.ascontiguousarray(images)
    if not np.isfinite(images).all():
        raise InputError(f"{what} hold NaN or infinite values; expected floats in [0, 1]; replace them")
    low, high = images.min(), images.max()
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise InputError(
            f"{what} hold values from {low:g} to {high:g}; expected floats in [0, 1]; rescale them, or save uint8"
        )
    return np.ascontiguousarray(images.clip(0, 1), dtype=np.float32)


def _channels_first(what: str, images: np.ndarray) -> np.ndarray:
    shape = images.shape
    last = len(shape) == 4 and shape[1] not in (1, 3) and shape[3] in (1, 3)
    neither = len(shape) == 4 and not last and shape[1] not in (1, 3)
    if len(shape) not in (3, 4) or 0 in shape or neither:
        raise InputError(
            f"{what} have the shape {list(shape)}; expected [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3; "
            "reshape them, or drop the transparency"
        )
    if len(shape) == 3:
        return images[:, None]
    return images.transpose(0, 3, 1, 2) if last else images


def _labels(what: str, labels: np.ndarray, count: int) -> np.ndarray:  # [N]
    if labels.dtype.kind not in "iu":
        raise InputError(f"{what} are {labels.dtype}; expected integers; number the classes from 0")
    if labels.shape != (count,):
        raise InputError(
            f"{what} have the shape {list(labels.shape)}; expected [{count}], one for each image; make them match"
        )
    if labels.min() < 0:
        raise InputError(f"{what} hold {labels.min()}; expected 0 or more; number the classes from 0")
    return labels.astype(np.int64)


def _attributes(what: str, values: np.ndarray, count: int) -> np.ndarray:  # [N, n]
    if values.ndim != 2 or len(values) != count or values.shape[1] == 0:
        raise InputError(
            f"{what} have the shape {list(values.shape)}; expected [{count}, n], n values for each image; make them "
            "match"
        )
    if values.dtype.kind not in "iub" or not np.isin(values, (0, 1)).all():
        raise InputError(f"{what} are {values.dtype} with other values than 0 and 1; expected 0 (off) or 1 (on)")
    return values.astype(np.int64)


def _names(path: Path, arrays: Mapping[str, np.ndarray], splits: list[Split]) -> tuple[Names, Names]:
    """The names of the classes, or else of the attributes."""
    attributes = _attribute_names(path, arrays, splits)
    return None if attributes else _classes(path, splits), attributes


def _attribute_names(path: Path, arrays: Mapping[str, np.ndarray], splits: list[Split]) -> Names:
    counts = {0 if split.labels is None or split.labels.ndim == 1 else split.labels.shape[1] for split in splits}
    if counts == {0}:
        return None
    if len(counts) > 1:
        raise InputError(f"{path} has attributes for some of its splits, or unlike ones; expected the same for all")
    count = counts.pop()
    names = arrays.get("attribute_names", np.arange(count)).astype(str)
    if names.shape != (count,) or len(set(names.tolist())) < count or any(not name or "," in name for name in names):
        raise InputError(
            f"{path}: attribute_names are {', '.join(map(repr, names.flatten().tolist()))}; expected {count} "
            "different names without commas, one for each column of attributes"
        )
    return tuple(names.tolist())


def _classes(path: Path, splits: list[Split]) -> Names:
    labels = [split.labels for split in splits if split.labels is not None]
    if not labels:
        return None
    if len(labels) < len(splits):
        raise InputError(
            f"{path} has labels for {len(labels)} of its {len(splits)} splits; expected all or none; add or remove them"
        )
    largest, count = int(torch.cat(labels).max()), sum(map(len, splits))
    if largest >= count:
        raise InputError(
            f"{path} has the label {largest} among {count} images; expected less; number the classes from 0"
        )
    return tuple(map(str, range(largest + 1)))
