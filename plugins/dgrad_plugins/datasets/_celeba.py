"""CelebA, 64 x 64, from its authors' files as torchvision's `CelebA` expects them."""

from __future__ import annotations

import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgrad.data.splits import Dataset, Split
from dgrad.errors import InputError

SIDE = 64
CROP = 148
"""The square about the middle of the 178 x 218 images that is kept."""
FILES = (
    "img_align_celeba",
    "list_attr_celeba.txt",
    "list_eval_partition.txt",
    "identity_CelebA.txt",
    "list_bbox_celeba.txt",
    "list_landmarks_align_celeba.txt",
)
"""All that torchvision reads; only the first three matter here."""
_SPLITS = ("train", "valid", "test")


def celeba(data_root: Path) -> Dataset:
    """Faces with 40 attributes, 64x64, colour: 162,770 train, 19,867 valid, 19,962 test; \
you put its files into DATA-ROOT/celeba"""
    return load_celeba(data_root)


def load_celeba(data_root: Path) -> Dataset:
    """CelebA with its binary attributes as labels: colour images, `SIDE` pixels wide and high.

    The partition is that of CelebA's authors. The files stand in `data_root / "celeba"`, the images in its folder
    `img_align_celeba`. The first call cuts the middle out of every image and makes it smaller. It writes the result
    beside the files (folder `dgrad-64`, 12 KB an image), to be mapped into memory, not read. A subset of CelebA's
    images serves too, if all the lists have the same ones.

    Raises:
        InputError: a file is missing or not what it should be, or the folder cannot be written.
    """
    source = data_root / "celeba"
    missing = [name for name in FILES if not (source / name).exists()]
    if missing:
        raise InputError(
            f"{source} has no {', no '.join(missing)}; expected {', '.join(FILES)} of CelebA (aligned and cropped "
            "images): put them there, or give their folder's parent as --data-root"
        )
    cache = source / f"dgrad-{SIDE}"
    made_from = {name: (source / name).stat().st_size for name in ("list_attr_celeba.txt", "list_eval_partition.txt")}
    if _index(cache).get("made_from") != made_from:
        try:
            with tempfile.TemporaryDirectory(dir=source, prefix=".dgrad-") as temporary:
                _prepare(data_root, Path(temporary) / "new", made_from)
                if _index(cache).get("made_from") != made_from:  # or another process was faster
                    shutil.rmtree(cache, ignore_errors=True)
                    (Path(temporary) / "new").replace(cache)
        except OSError as error:
            raise InputError(
                f"{source} cannot keep a small copy of the images ({error}); expected a folder to write into, with "
                "room: free it, or copy it elsewhere"
            ) from error
    train, valid, test = (_mapped(cache, split) for split in _SPLITS)
    return Dataset("celeba", train, valid, test, attributes=tuple(_index(cache)["attributes"]))


def _index(cache: Path) -> dict[str, Any]:
    file = cache / "index.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _mapped(cache: Path, split: str) -> Split:
    images = np.load(cache / f"{split}_images.npy", mmap_mode="c")  # nothing is ever written to it
    attributes = np.load(cache / f"{split}_attributes.npy")
    return Split(torch.from_numpy(images), torch.from_numpy(attributes).long())


def _prepare(data_root: Path, folder: Path, made_from: dict[str, int]) -> None:
    """Write small images `[N, 3, SIDE, SIDE]` and attributes `[N, n]` of each split, uint8, and an index."""
    folder.mkdir()
    for split in _SPLITS:
        faces = _faces(data_root, split)
        attributes = faces.attr.to(torch.uint8).numpy()
        np.save(folder / f"{split}_attributes.npy", attributes)
        images = np.lib.format.open_memmap(
            folder / f"{split}_images.npy", mode="w+", dtype=np.uint8, shape=(len(faces), 3, SIDE, SIDE)
        )
        with ThreadPoolExecutor() as pool:
            for place, pixels in enumerate(pool.map(lambda index, faces=faces: _read(faces, index), range(len(faces)))):
                images[place] = pixels
        images.flush()
    names = faces.attr_names[: attributes.shape[1]]  # the line of names may end with a space
    (folder / "index.json").write_text(json.dumps({"attributes": names, "made_from": made_from}), encoding="utf-8")


def _faces(data_root: Path, split: str) -> Any:
    """torchvision's data set of that split, whatever the files' checksums are, so that a part of CelebA will do."""
    from torchvision.datasets import CelebA
    from torchvision.transforms import CenterCrop, Compose, Resize

    unchecked = type("CelebA", (CelebA,), {"file_list": [(file, None, name) for file, _, name in CelebA.file_list]})
    try:
        faces = unchecked(data_root, split=split, transform=Compose([CenterCrop(CROP), Resize((SIDE, SIDE))]))
    except (ValueError, IndexError, RuntimeError, TypeError) as error:
        raise InputError(
            f"the lists in {data_root / 'celeba'} cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); expected those of CelebA, with the same images in all: get them again"
        ) from error
    if len(faces) == 0:
        raise InputError(
            f"{data_root / 'celeba' / 'list_eval_partition.txt'} has no image of the split {split}; expected 0 "
            "(train), 1 (valid) and 2 (test) in it"
        )
    return faces


def _read(faces: Any, index: int) -> np.ndarray:  # [3, SIDE, SIDE], uint8
    try:
        image, _ = faces[index]
    except Exception as error:  # what a decoder raises on a broken file is anybody's guess
        raise InputError(
            f"{faces.filename[index]} of img_align_celeba cannot be read ({type(error).__name__}: {error}); expected "
            "an image: unpack the archive again"
        ) from error
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
