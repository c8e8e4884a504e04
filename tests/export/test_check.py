"""`dgrad export --check`: a sound export passes in one line, and every damage is found and named in one line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import run_dgrad
from onnx import numpy_helper

from dgrad.config import configure
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer
from dgrad_export import check_export, export_run
from dgrad_export.check.reference import _check_codes

pytestmark = pytest.mark.slow

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"latent": "6x4"}, {}),
    "mixed-triton-sampling": (
        {"model": "mixture", "latent": "2x3", "gaussian": 4, "hidden": "16,8"}, {"layout": "triton", "sampling": True},
    ),
    "mlp-int8": ({"model": "mlp", "hidden": "50", "latent": "6x4"}, {"int8": "decoder"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("check")
    for name, (settings, options) in MODELS.items():
        trainer = Trainer(configure({"estimator": "direct", "steps": 10, "device": "cpu", "lr": "0.01", **settings}))
        run = Run.create(home / f"run-{name}", trainer.config)
        trainer.train(run)
        export_run(run.path, home / name, **options)
    return {name: home / name for name in MODELS}


@pytest.fixture
def copied(exports: dict[str, Path]) -> Path:
    """A folder to damage."""
    shutil.copytree(exports["linear"], "copied")
    return Path("copied")


def _check(*arguments: object) -> int:
    return run_dgrad("export", *arguments)


@pytest.mark.parametrize("name", MODELS)
def test_a_sound_export_passes(exports: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exports[name]
    assert _check("--check", folder) == 0
    files = len([path for path in folder.rglob("*") if path.is_file()])
    output = capsys.readouterr()
    assert output.out.startswith(f"{folder}: whole ({files} files); 4 examples give what they gave at export, within ")
    assert (output.out.count("\n"), output.err) == (1, "")
    assert _check("--check", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["files"] == files


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_has_every_input_and_output(exports: dict[str, Path], name: str) -> None:
    manifest = json.loads((exports[name] / "manifest.json").read_text())
    expected = {
        f"{graph}.{tensor['name']}": [4, *tensor["shape"][1:]]
        for graph, file in manifest["graphs"].items()
        for kind in ("inputs", "outputs")
        for tensor in manifest["files"][file][kind]
    }
    with np.load(exports[name] / "reference.npz") as reference:
        assert {key: list(array.shape) for key, array in reference.items()} == expected
        assert len(np.unique(reference["decoder.code"])) > 1
        assert reference["encoder.image"].std() > 0.2 and reference["decoder.image"].std() > 0


def _list_again(folder: Path, name: str, data: bytes) -> None:
    """Another file in the place of one, as if it had been written so."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _change_weight(folder: Path, graph: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    proto = onnx.load(folder / graph)
    (weight,) = [tensor for tensor in proto.graph.initializer if tensor.name.endswith("weight")]
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight)).astype(np.float32), weight.name))
    _list_again(folder, graph, proto.SerializeToString())


def _change_reference(folder: Path, **arrays: np.ndarray | None) -> None:
    with np.load(folder / "reference.npz") as archive:
        kept = {**archive, **{key.replace("_", "."): array for key, array in arrays.items()}}
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **{key: array for key, array in kept.items() if array is not None})
    _list_again(folder, "reference.npz", file.getvalue())


def _rename_output(folder: Path) -> None:
    proto = onnx.load(folder / "decoder.onnx")
    proto.graph.node[-1].output[0] = proto.graph.output[0].name = "picture"
    _list_again(folder, "decoder.onnx", proto.SerializeToString())


def _forget_reference(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["reference.npz"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _nudge(weight: np.ndarray) -> np.ndarray:
    return weight + 0.01 * (np.arange(weight.size).reshape(weight.shape) == 7)


DAMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), 2, "no exported model at copied"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), 2, "it has no manifest.json"),
    "no encoder": (lambda folder: (folder / "encoder.onnx").unlink(), 2, "encoder.onnx is missing"),
    "flipped bit": (lambda folder: _flip(folder / "decoder.onnx"), 2, "decoder.onnx is damaged (its sha256 is"),
    "flipped reference": (lambda folder: _flip(folder / "reference.npz"), 2, "reference.npz is damaged (its sha256"),
    "older": (_forget_reference, 2, "has no reference.npz: an older dgrad wrote it"),
    "no graph": (lambda folder: _list_again(folder, "decoder.onnx", b"no graph"), 2, "decoder.onnx is no valid ONNX"),
    "no archive": (lambda folder: _list_again(folder, "reference.npz", b"x"), 2, "reference.npz is damaged"),
    "other output": (_rename_output, 2, "has the outputs picture ['batch', 1, 8, 8] float32; manifest.json says image"),
    "short reference": (lambda folder: _change_reference(folder, encoder_code=None), 2, "encoder.code is missing"),
    "encoder weight": (
        lambda folder: _change_weight(folder, "encoder.onnx", _nudge), 1, "logits of the encoder differs",
    ),
    "decoder weight": (
        lambda folder: _change_weight(folder, "decoder.onnx", lambda w: 1.01 * w), 1, "image of the decoder differs",
    ),
    "nan": (
        lambda folder: _change_weight(folder, "decoder.onnx", lambda w: w * np.nan), 1,
        "image of the decoder differs by nan",
    ),
    "other code": (
        lambda folder: _change_reference(folder, encoder_code=np.full((4, 6), 9)), 1, "code of the encoder differs",
    ),
    "other shape": (
        lambda folder: _change_reference(folder, decoder_image=np.zeros((4, 1, 8, 7), np.float32)), 1,
        "it was [4, 1, 8, 7]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_differs_is_named(copied: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, code, message = DAMAGES[name]
    damage(copied)
    assert _check("--check", copied) == code
    output = capsys.readouterr()
    assert message in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)


def test_a_batch_must_not_matter(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A graph without the batch's mean gives the stored outputs for all four, and others for one alone."""
    proto = onnx.load(copied / "decoder.onnx")
    last = proto.graph.node[-1]
    last.output[0] = "alone"
    axis = numpy_helper.from_array(np.array([0]), "first_axis")
    proto.graph.initializer.append(axis)
    proto.graph.node.extend(
        [
            onnx.helper.make_node("ReduceMean", ["alone", "first_axis"], ["mean"], keepdims=1),
            onnx.helper.make_node("Sub", ["alone", "mean"], ["image"]),
        ]
    )
    _list_again(copied, "decoder.onnx", proto.SerializeToString())
    with np.load(copied / "reference.npz") as reference:
        image = reference["decoder.image"]
    _change_reference(copied, decoder_image=image - image.mean(0))
    assert _check("--check", copied) == 1
    assert "image of the decoder differs" in capsys.readouterr().err


def test_only_ties_excuse_another_code() -> None:
    potentials = np.zeros((2, 3, 4))
    potentials[..., 0] = 1
    truth = np.zeros((2, 3), np.int64)
    got = truth.copy()
    got[1, 2] = 3
    potentials[1, 2, 3] = 1 - 1e-5
    _check_codes("code", truth, got, potentials)
    for value in (1 - 1e-3, 0.5):
        potentials[1, 2, 3] = value
        with pytest.raises(RuntimeError, match="in 1 of 6 numbers, and not for a tie"):
            _check_codes("code", truth, got, potentials)
    got[1, 2] = 4
    with pytest.raises(RuntimeError, match="not for a tie"):
        _check_codes("code", truth, got, potentials)


def test_it_is_a_command_of_its_own(exports: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "dgrad export needs a RUN; expected dgrad export RUN --out DIR, or dgrad export --check DIR"),
        (["run"], "nothing to write; give --out DIR"),
        (["run", "--check", exports["linear"]], "leave RUN and --out out"),
        (["--out", "x", "--check", exports["linear"]], "leave RUN and --out out"),
    ):
        assert _check(*arguments) == 2
        assert message in capsys.readouterr().err


# The real command; at its end it says which libraries it never needed.
COMMAND = """
import sys
from dgrad_cli.main import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "torchvision", "onnxscript", "safetensors", "sklearn"}
    found = {name.partition(".")[0] for name in sys.modules} & heavy
    print("heavy:", *sorted(found), file=sys.stderr)
"""


@pytest.mark.processes
def test_it_needs_no_torch(exports: dict[str, Path]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", COMMAND, "export", "--check", str(exports["linear"])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "heavy:\n"), done.stderr
    assert check_export(exports["linear"])["largest"] <= 1e-5
