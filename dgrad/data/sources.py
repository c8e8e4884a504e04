"""From what the user typed to a data set.

It knows no data set by name: those come from the registry, as a mapping.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from dgrad.data.image_folder import load_folder
from dgrad.data.npz import load_npz
from dgrad.data.splits import Dataset
from dgrad.errors import InputError, unknown_name


def load_dataset(spec: str, data_root: Path | None, registered: Mapping[str, Callable[[Path], Dataset]]) -> Dataset:
    """The data set of that registered name, or else in that .npz file or folder of images by class.

    `data_root` is where the named ones keep their files; None means `default_data_root()`. A path that is also a
    registered name is given as `./name`. Raises InputError for an unknown name or path, and whatever the loader raises.
    """
    return dataset_loader(spec, registered)(default_data_root() if data_root is None else data_root)


def dataset_loader(spec: str, registered: Mapping[str, Callable[[Path], Dataset]]) -> Callable[[Path], Dataset]:
    """What loads that data set, given the folder of the named ones; nothing is read or downloaded yet.

    Raises InputError for an unknown name or path.
    """
    if spec in registered:
        return registered[spec]
    path = Path(spec).expanduser()
    if spec and path.exists():
        return lambda _: load_folder(path) if path.is_dir() else load_npz(path)
    if spec.endswith(".npz") or any(separator in spec for separator in (os.sep, os.altsep) if separator):
        raise InputError(f"there is no {spec}; expected a .npz file or a folder of images by class; check the path")
    raise unknown_name(
        "dataset", spec, registered, "The path of a .npz file or of a folder of images by class works too."
    )


def default_data_root() -> Path:
    """$DGRAD_DATA, or the folder `dgrad` in the user's cache."""
    if given := os.environ.get("DGRAD_DATA"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        cache = Path(local) if local else Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not cache.is_absolute():  # unset, or relative, which the XDG specification says to ignore
            cache = Path.home() / ".cache"
    return cache / "dgrad"
