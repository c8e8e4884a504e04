"""Faces drawn from simple shapes, in the files of CelebA, for the tests of what needs pictures with attributes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

NAMES = ("Blurry", "Eyeglasses", "Smiling", "Wearing_Hat", "Young")
"""As in CelebA they are in order of the alphabet; nothing in a picture tells of the first and the last."""
SHOWN = NAMES[1:4]
FREQUENCIES = (0.3, 0.35, 0.5, 0.4, 0.7)
WHERE = {"Eyeglasses": (20, 38, 14, 50), "Smiling": (38, 55, 19, 45), "Wearing_Hat": (0, 20, 6, 58)}
"""First and last row, first and last column of what an attribute changes in the 64 x 64 picture."""


def draw_face(draws: np.random.RandomState, glasses: bool, smile: bool, hat: bool) -> Image.Image:
    """A face, 178 x 218; place, size and colours differ a little from one to the next."""
    picture = Image.new("RGB", (178, 218), _colour(draws, 150, 256))
    pen = ImageDraw.Draw(picture)
    x, y = (middle + int(draws.randint(-4, 5)) for middle in (89, 112))
    skin, half = 230 - int(draws.randint(0, 90)), int(draws.randint(44, 50))
    pen.ellipse((x - half, y - 60, x + half, y + 62), fill=(skin, skin - 50, skin - 80))
    for eye in (x - 20, x + 20):
        pen.ellipse((eye - 5, y - 15, eye + 5, y - 5), fill=(30, 20, 20))
        if glasses:
            pen.ellipse((eye - 17, y - 27, eye + 17, y + 7), fill=(0, 0, 0))
    if smile:
        pen.chord((x - 26, y + 2, x + 26, y + 50), 0, 180, fill=(150, 20, 30))
    else:
        pen.rectangle((x - 18, y + 38, x + 18, y + 43), fill=(150, 20, 30))
    if hat:
        pen.rectangle((x - 40, y - 76, x + 40, y - 40), fill=_colour(draws, 0, 80))
        pen.rectangle((x - 60, y - 46, x + 60, y - 38), fill=(20, 20, 60))
    return picture


def _colour(draws: np.random.RandomState, low: int, high: int) -> tuple[int, ...]:
    return tuple(draws.randint(low, high, 3).tolist())


def draw_celeba(root: Path, counts: tuple[int, int, int]) -> np.ndarray:
    """Write that many images for training, validation and testing, and all lists, into `root / "celeba"`; the attributes `[N, 5]`."""
    folder, count = root / "celeba", sum(counts)
    (folder / "img_align_celeba").mkdir(parents=True)
    draws = np.random.RandomState(0)
    values = (draws.rand(count, len(NAMES)) < FREQUENCIES).astype(int)
    files = [f"{number:06d}.jpg" for number in range(1, count + 1)]
    for file, (_, glasses, smile, hat, _) in zip(files, values.tolist(), strict=True):
        draw_face(draws, glasses, smile, hat).save(folder / "img_align_celeba" / file, quality=90)

    def write(name: str, rows: Iterable[object], *header: str) -> None:
        lines = [f"{file} {row}" for file, row in zip(files, rows, strict=True)]
        (folder / name).write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")

    signs = [" ".join(f"{2 * value - 1:2d}" for value in row) for row in values]
    write("list_attr_celeba.txt", signs, str(count), " ".join(NAMES) + " ")
    write("list_eval_partition.txt", np.repeat([0, 1, 2], counts))
    write("identity_CelebA.txt", range(count))
    write("list_bbox_celeba.txt", ["  0   0  178  218"] * count, str(count), "image_id x_1 y_1 width height")
    points = " ".join(
        f"{part}_{axis}" for part in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy"
    )
    write(
        "list_landmarks_align_celeba.txt", [" 69 107  109 107   89 130   70 150  108 150"] * count, str(count), points
    )
    return values
