"""`dgrad encode` and `dgrad decode` without torch: files against the codec and onnxruntime, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from helpers import run_dgrad
from PIL import Image

from dgrad.config import configure
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer
from dgrad_export import Codec, export_run

pytestmark = pytest.mark.slow

NAMES = ("Eyeglasses", "Smiling")
MODELS: dict[str, dict[str, Any]] = {
    "grey": {"latent": "6x4"},
    "mixed": {"model": "mixture", "latent": "2x3", "gaussian": 4, "hidden": "16,8"},
    "colour": {
        "dataset": "faces.npz", "model": "mlp", "hidden": "16", "binarize": "none", "latent": "2x2", "labels": 20,
        "labelled-batch": 10,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A grey model, a mixed one, and one of colour images (12 wide, 10 high) whose code are attributes."""
    home = tmp_path_factory.mktemp("coding")
    draws = np.random.RandomState(0)
    images = draws.randint(0, 256, (60, 10, 12, 3)).astype(np.uint8)
    np.savez(home / "faces.npz", images=images, attributes=draws.randint(0, 2, (60, 2)), attribute_names=NAMES)
    for name, settings in MODELS.items():
        given = {**settings, "dataset": str(home / settings["dataset"])} if "dataset" in settings else settings
        trainer = Trainer(configure({"estimator": "direct", "steps": 20, "device": "cpu", "lr": "0.01", **given}))
        run = Run.create(home / f"run-{name}", trainer.config)
        trainer.train(run)
        export_run(run.path, home / name, layout="triton" if name == "colour" else "flat")
    return {name: home / name for name in MODELS}


def _grey(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)


def _save(folder: Path, images: np.ndarray, suffix: str = "png") -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number}.{suffix}" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _truth(model: Path, images: np.ndarray) -> list[np.ndarray]:
    """All outputs of the encoder, from onnxruntime alone."""
    session = onnxruntime.InferenceSession(model / "encoder.onnx")
    return list(session.run(None, {"image": images[:, None].astype(np.float32) / np.float32(255)}))


# Encoding


def test_pictures_and_folders_become_lines_in_order(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images = _grey(5)
    paths = _save(Path("some"), images[:3])
    (Path("some") / "notes.txt").write_text("no image")
    last = _save(Path("more"), images[3:])
    assert run_dgrad("encode", "some", *last, "--model", models["grey"]) == 0
    lines = _lines(capsys.readouterr().out)
    _, code = _truth(models["grey"], images)
    assert lines == [
        {"image": str(path), "code": row} for path, row in zip([*paths, *last], code.tolist(), strict=True)
    ]


def test_a_mixed_model_gives_what_it_decodes_from(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    images = _grey(4)
    np.save("images.npy", images)
    assert run_dgrad("encode", "images.npy", "--model", models["mixed"]) == 0
    lines = _lines(capsys.readouterr().out)
    _, code, mean, log_variance = _truth(models["mixed"], images)
    assert [(line["image"], line["index"]) for line in lines] == [("images.npy", index) for index in range(4)]
    for name, truth in (("code", code), ("mean", mean), ("log_variance", log_variance)):
        np.testing.assert_allclose(np.array([line[name] for line in lines], truth.dtype), truth, rtol=1e-6, atol=1e-7)
    assert run_dgrad("encode", "images.npy", "--model", models["mixed"], "--out", "codes.npz") == 0
    assert run_dgrad("decode", "codes.npz", "--model", models["mixed"], "--out", "decoded") == 0
    expected = Codec(models["mixed"]).decode(code, mean)
    for number in range(4):
        with Image.open(f"decoded/{number:06d}.png") as picture:
            assert np.abs(np.array(picture) - 255 * expected[number, 0]).max() < 0.51
    np.savez("alone.npz", code=code)
    np.savez("other.npz", code=code, labels=code)
    np.savez("both.npz", code=code, mean=mean + 1, style=mean)
    without = Codec(models["mixed"]).decode(code)
    for name, truth in (("alone", without), ("other", without), ("both", expected)):
        assert run_dgrad("decode", f"{name}.npz", "--model", models["mixed"], "--out", name) == 0
        with Image.open(f"{name}/000003.png") as picture:
            assert np.abs(np.array(picture) - 255 * truth[3, 0]).max() < 0.51
    assert np.abs(without - expected).max() > 1 / 255, "the style is heard"


def test_attributes_are_named_and_can_be_switched(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (3, 10, 12, 3), dtype=np.uint8)
    paths = _save(Path("faces"), images)
    assert run_dgrad("encode", "faces", "--model", models["colour"], "--out", "codes.jsonl") == 0
    assert capsys.readouterr().out == "codes.jsonl: the codes of 3 images\n"
    lines = _lines(Path("codes.jsonl").read_text())
    codec = Codec(models["colour"])
    codes = codec.encode(images.transpose(0, 3, 1, 2))
    assert [line["attributes"] for line in lines] == [dict(zip(NAMES, code, strict=True)) for code in codes.tolist()]
    assert [line["image"] for line in lines] == list(map(str, paths))
    switched = [{"attributes": {"Smiling": 1, "Eyeglasses": 0}}, {"code": [1, 0]}]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, switched))))
    assert run_dgrad("decode", "-", "--model", models["colour"], "--out", "two") == 0
    for number, code in enumerate(([0, 1], [1, 0])):
        with Image.open(f"two/{number:06d}.png") as picture:
            expected = 255 * codec.decode(code)[0].transpose(1, 2, 0)
            assert picture.mode == "RGB" and np.abs(np.array(picture) - expected).max() < 0.51
    for line, message in (
        ({"code": [0, 0], "attributes": {"Smiling": 1, "Eyeglasses": 0}}, "say different things"),
        ({"attributes": {"Smiling": 1}}, "expected 0 or 1 for each of Eyeglasses, Smiling"),
        ({"attributes": {"Smiling": 2, "Eyeglasses": 0}}, "expected 0 or 1 for each of"),
    ):
        Path("bad.jsonl").write_text(json.dumps(line))
        assert run_dgrad("decode", "bad.jsonl", "--model", models["colour"], "--out", "no") == 2
        assert f"line 1 of bad.jsonl: {'' if 'code' in line else 'attributes are'}" in (
            error := capsys.readouterr().err
        )
        assert message in error and not Path("no").exists()


def test_every_kind_of_file_gives_the_same_codes(models: dict[str, Path]) -> None:
    images = _grey(300)  # more than a batch
    folder = Path("folder")
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    np.save("whole.npy", images)
    np.savez("images.npz", images=images[:, None], labels=np.zeros(300))
    np.savez_compressed("alone.npz", (images / 255).astype(np.float32))
    np.save("last.npy", images[..., None])
    header = struct.pack(">HBBIII", 0, 8, 3, *images.shape)
    Path("images-idx3-ubyte").write_bytes(header + images.tobytes())
    Path("images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    _, code = _truth(models["grey"], images)
    names = [
        "folder", "whole.npy", "images.npz", "alone.npz", "last.npy", "images-idx3-ubyte", "images-idx3-ubyte.gz",
    ]  # fmt: skip
    for name in names:
        assert run_dgrad("encode", name, "--model", models["grey"], "--out", "codes.npz") == 0
        with np.load("codes.npz") as found:
            np.testing.assert_array_equal(found["code"], code, err_msg=name)
            assert found["code"].dtype == np.int64
            if name == "folder":
                assert found["image"].tolist() == [f"folder/{number:03d}.png" for number in range(300)]
            else:
                assert set(found["image"]) == {name} and found["index"].tolist() == list(range(300))
    first = Path("codes.npz").read_bytes()
    assert run_dgrad("encode", names[-1], "--model", models["grey"], "--out", "codes.npz") == 0
    assert Path("codes.npz").read_bytes() == first
    assert sorted(path.name for path in Path().glob(".*")) == []


def test_grey_and_colour_meet_halfway(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Grey stored in colour is grey, and grey passes as colour. Colours are not made grey in silence."""
    image = _grey(1)[0]
    Image.fromarray(np.repeat(image[..., None], 3, 2)).save("stored.png")
    Image.fromarray(image).save("grey.png")
    assert run_dgrad("encode", "stored.png", "grey.png", "--model", models["grey"]) == 0
    lines = _lines(capsys.readouterr().out)
    assert lines[0]["code"] == lines[1]["code"]
    Image.new("RGB", (8, 8), (200, 0, 0)).save("red.png")
    assert run_dgrad("encode", "red.png", "--model", models["grey"]) == 2
    assert "red.png has colours; this model takes grey images" in capsys.readouterr().err
    Image.new("L", (12, 10), 7).save("dark.png")
    assert run_dgrad("encode", "dark.png", "--model", models["colour"]) == 0


def test_a_bad_file_is_named_and_leaves_what_was_there(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _save(Path("folder"), _grey(3))
    assert run_dgrad("encode", "folder", "--model", models["grey"], "--out", "codes.jsonl") == 0
    before = Path("codes.jsonl").read_bytes()
    Path("folder/1.png").write_bytes(Path("folder/1.png").read_bytes()[:40])
    for out in ("codes.jsonl", "codes.npz"):
        capsys.readouterr()
        assert run_dgrad("encode", "folder", "--model", models["grey"], "--out", out) == 2
        assert "folder/1.png cannot be read as an image" in capsys.readouterr().err
    assert Path("codes.jsonl").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir() if path.is_file()) == ["codes.jsonl"]


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


BAD_IMAGES: dict[str, tuple[str, bytes | None, str]] = {
    "nothing": ("none.png", None, "there is no file or folder none.png"),
    "kind": ("image.webm", b"", "image.webm is of no known kind"),
    "size": ("small.npy", _npy(np.zeros((2, 7, 8), np.uint8)), "has the shape [2, 7, 8]; expected [N, 1, 8, 8]"),
    "dtype": ("whole.npy", _npy(np.zeros((2, 8, 8), int)), "whole.npy is int64; expected uint8"),
    "objects": ("objects.npy", _npy(np.array([None, 1])), "objects.npy cannot be read (the array holds objects)"),
    "range": ("large.npy", _npy(np.full((2, 8, 8), 7.0)), "large.npy: pixels go from 7 to 7; expected 0 to 1"),
    "ones": ("ones.npy", _npy(np.ones((2, 8, 8), np.uint8)), "uint8 with a maximum of 1"),
    "order": ("order.npy", _npy(np.asfortranarray(_grey(2))), "in Fortran's order"),
    "cut": ("cut.npy", _npy(_grey(9))[:-1], "cut.npy cannot be read (it ends within rows 0 to 8 of 9)"),
    "empty": ("empty.npy", _npy(np.zeros((0, 8, 8), np.uint8)), "empty.npy is empty"),
    "scalar": ("scalar.npy", _npy(np.array(1)), "is a single number"),
    "no npz": ("no.npz", b"PK", "no.npz cannot be read"),
    "no npy": ("no.npy", b"nothing", "no.npy cannot be read"),
    "no idx": ("no-ubyte", b"nothing", "no-ubyte cannot be read (it is no IDX file"),
    "no gzip": ("no-ubyte.gz", b"nothing", "no-ubyte.gz cannot be read"),
    "folder": ("folder", None, "folder has no images"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_cannot_be_encoded(name: str, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    file, data, message = BAD_IMAGES[name]
    if data is not None:
        Path(file).write_bytes(data)
    elif name == "folder":
        Path(file).mkdir()
    assert run_dgrad("encode", file, "--model", models["grey"], "--out", "codes.npz") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("codes.npz").exists() and not list(Path().glob(".*"))


def test_an_archive_without_images_lists_what_it_has(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("data.npz", train_images=_grey(2), test_images=_grey(2))
    assert run_dgrad("encode", "data.npz", "--model", models["grey"]) == 2
    assert "data.npz has train_images, test_images; expected an array called images" in capsys.readouterr().err
    np.savez("damaged.npz", images=_grey(50))
    data = bytearray(Path("damaged.npz").read_bytes())
    data[1000] ^= 1
    Path("damaged.npz").write_bytes(data)
    assert run_dgrad("encode", "damaged.npz", "--model", models["grey"], "--out", "codes.jsonl") == 2
    assert "damaged.npz: images cannot be read (Bad CRC-32" in capsys.readouterr().err
    assert not Path("codes.jsonl").exists()


@pytest.mark.parametrize(
    ("out", "message"), [("x.txt", "must end with"), (".npz/x.npz", "no directory"), ("d.npz", "is a directory")]
)
def test_where_codes_cannot_be_written(
    out: str, message: str, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("d.npz").mkdir()
    assert run_dgrad("encode", "nothing.png", "--model", models["grey"], "--out", out) == 2
    assert message in capsys.readouterr().err


# Decoding


def test_a_grid_has_every_image_at_its_place(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    codec = Codec(models["grey"])
    codes = codec.sample_codes(7, seed=0)
    np.save("codes.npy", codes)
    assert run_dgrad("decode", "codes.npy", "--model", models["grey"], "--out", "grid.png", "--columns", 3) == 0
    assert capsys.readouterr().out == "grid.png: 7 images\n"
    with Image.open("grid.png") as picture:
        grid = np.array(picture)
    assert grid.shape == (3 * 60 + 4, 3 * 60 + 4)
    assert (grid[:4] == 255).all() and (grid[124:, 64:] == 255).all()
    for place, image in enumerate(255 * codec.decode(codes)[:, 0]):
        top, left = 4 + place // 3 * 60, 4 + place % 3 * 60
        cell = grid[top : top + 56, left : left + 56].reshape(8, 7, 8, 7)
        assert np.abs(cell[:, 3, :, 3] - image).max() < 2, "the middle of an enlarged pixel is that pixel"


def test_codes_from_a_model_and_back_again(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Lines and arrays decode alike, over more than a batch; the pictures encode again."""
    codec = Codec(models["grey"])
    codes = codec.sample_codes(300, seed=0)
    np.savez("codes.npz", code=codes.astype(np.uint8))
    Path("codes.jsonl").write_text("\n".join(json.dumps({"code": code}) for code in codes.tolist()) + "\n\n")
    for name in ("codes.npz", "codes.jsonl"):
        assert run_dgrad("decode", name, "--model", models["grey"], "--out", Path(name).suffix[1:]) == 0
    files = sorted(path.name for path in Path("npz").iterdir())
    assert files == [f"{number:06d}.png" for number in range(300)]
    assert all((Path("npz") / name).read_bytes() == (Path("jsonl") / name).read_bytes() for name in files)
    with Image.open("npz/000299.png") as picture:
        assert np.abs(np.array(picture) - 255 * codec.decode(codes[299])[0, 0]).max() < 0.51
    assert run_dgrad("encode", "npz", "--model", models["grey"], "--out", "again.npz") == 0


BAD_CODES: dict[str, tuple[str, bytes, str]] = {
    "json": ("c.jsonl", b'{"code": [0, 0, 0, 0, 0, 1]}\n{"code"', "line 2 of c.jsonl is no JSON"),
    "no code": ("c.jsonl", b"{}", "line 1 of c.jsonl has no code"),
    "list": ("c.jsonl", b"[1]", "line 1 of c.jsonl has no code"),
    "short": ("c.jsonl", b'{"code": [1]}', "line 1 of c.jsonl: code is [1]; expected numbers [6]"),
    "ragged": ("c.jsonl", b'{"code": [1, [2], 3, 4, 5, 6]}', "expected numbers [6]"),
    "fraction": ("c.jsonl", b'{"code": [0.5, 0, 0, 0, 0, 0]}', "c.jsonl, codes 0 to 0: codes are of float64"),
    "large": ("c.npy", _npy(np.full((2, 6), 4)), "c.npy, codes 0 to 1: codes go from 4 to 4; expected 0 to 3"),
    "shape": ("c.npy", _npy(np.zeros((2, 5), int)), "c.npy has the shape [2, 5]; expected [2, 6], a code in each row"),
    "kind": ("c.txt", b"", "c.txt is of no known kind"),
}  # fmt: skip


@pytest.mark.parametrize("out", ["out", "out.png"])
@pytest.mark.parametrize("name", BAD_CODES)
def test_what_cannot_be_decoded(
    name: str, out: str, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file, data, message = BAD_CODES[name]
    Path(file).write_bytes(data)
    assert run_dgrad("decode", file, "--model", models["grey"], "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == [file]


def test_where_pictures_cannot_be_written(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("codes.npy", np.zeros((9, 6), int))
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("folder.png").mkdir()
    for out, message in (
        ("full", "full is not empty"),
        ("codes.npy", "codes.npy is a file"),
        ("folder.png", "is a directory"),
        ("none/x.png", "there is no directory none"),
    ):
        assert run_dgrad("decode", "codes.npy", "--model", models["grey"], "--out", out) == 2
        assert message in capsys.readouterr().err
    assert run_dgrad("decode", "none.npz", "--model", models["grey"], "--out", "x") == 2
    assert "there is no file none.npz" in capsys.readouterr().err
    np.save("empty.npy", np.zeros((0, 6), int))
    assert run_dgrad("decode", "empty.npy", "--model", models["grey"], "--out", "x.png") == 2
    assert "there are no codes" in capsys.readouterr().err
    monkeypatch.setattr("dgrad_export.codec.image_files.LARGEST_GRID", 5 * 60 * 60)
    assert run_dgrad("decode", "codes.npy", "--model", models["grey"], "--out", "x.png") == 2
    assert "a grid of more than 5 such images is larger than" in capsys.readouterr().err
    assert run_dgrad("decode", "codes.npy", "--model", models["grey"], "--out", "x") == 0


def test_a_terminal_gets_a_bar(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("images.npy", _grey(300))
    for forced, shown in (("1", True), ("", False)):
        monkeypatch.setenv("FORCE_COLOR", forced)
        assert run_dgrad("encode", "images.npy", "--model", models["grey"], "--out", "c.npz") == 0
        assert run_dgrad("decode", "c.npz", "--model", models["grey"], "--out", f"pictures{shown}") == 0
        error = capsys.readouterr().err
        assert ("encoding" in error and "300/300" in error and "decoding" in error) == shown


def test_no_more_than_a_batch_is_held(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("images.npy", _grey(1000))
    sizes: list[int] = []
    for name in ("posterior", "decode"):
        method: Callable[..., Any] = getattr(Codec, name)
        monkeypatch.setattr(
            Codec, name, lambda self, values, *rest, m=method: sizes.append(len(values)) or m(self, values, *rest)
        )
    assert run_dgrad("encode", "images.npy", "--model", models["grey"], "--out", "c.npz") == 0
    assert run_dgrad("decode", "c.npz", "--model", models["grey"], "--out", "pictures") == 0
    assert sizes == [256, 256, 256, 232] * 2


# The real command; at its end it says which libraries it never needed.
COMMAND = """
import sys
from dgrad_cli.main import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "torchvision", "onnx", "onnxscript", "safetensors", "sklearn"}
    found = {name.partition(".")[0] for name in sys.modules} & heavy
    print("heavy:", *sorted(found), file=sys.stderr)
"""


@pytest.mark.processes
def test_neither_command_needs_torch(models: dict[str, Path]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    _save(Path("folder"), _grey(3), "jpg")
    for arguments in (
        ["encode", "folder", "--model", models["mixed"], "--out", "codes.jsonl"],
        ["decode", "codes.jsonl", "--model", models["mixed"], "--out", "grid.png"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *map(str, arguments)], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "heavy:\n"), done.stderr
