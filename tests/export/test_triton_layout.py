"""`dgrad export --layout triton`: a model repository that Triton's own protobuf reads, and dgrad too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from helpers import run_dgrad
from tritonclient.grpc import model_config_pb2

from dgrad.errors import InputError
from dgrad.training.run_directory import Run
from dgrad_export import Codec, export_run
from dgrad_export.serve.served_model import open_models
from dgrad_export.write.triton import config_text

pytestmark = pytest.mark.slow

REPOSITORY = {
    "encoder/1/model.onnx", "encoder/config.pbtxt", "decoder/1/model.onnx", "decoder/config.pbtxt", "manifest.json",
}  # fmt: skip
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}


def _export(*options: object) -> int:
    return run_dgrad("export", *options)


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _config(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_configuration_says_what_the_graphs_take_and_give(
    train: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(model="mixture", latent="2x3", gaussian=4, hidden=(16, 8))
    assert _export(run.path, "--out", "m", "--layout", "triton", "--sampling") == 0
    assert "m: encoder/1/model.onnx, decoder/1/model.onnx" in capsys.readouterr().out
    assert _files(Path("m")) >= REPOSITORY
    for name in ("encoder", "decoder"):
        config = _config(Path(f"m/{name}/config.pbtxt").read_text())
        assert (config.name, config.platform, config.backend) == (name, "onnxruntime_onnx", "onnxruntime")
        assert config.max_batch_size == 256 and config.HasField("dynamic_batching")
        session = onnxruntime.InferenceSession(f"m/{name}/1/model.onnx")
        for tensors, listed in ((session.get_inputs(), config.input), (session.get_outputs(), config.output)):
            expected = [(tensor.name, TYPES[tensor.type], tensor.shape[1:]) for tensor in tensors]
            found = [
                (tensor.name, model_config_pb2.DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in listed
            ]
            assert found == expected
    assert [tensor.name for tensor in _config(Path("m/decoder/config.pbtxt").read_text()).input] == ["code", "style"]


def test_dgrad_opens_both_layouts_alike(train: Callable[..., Run]) -> None:
    run = train(latent="6x4")
    export_run(run.path, Path("flat"))
    export_run(run.path, Path("triton"), layout="triton")
    for name in ("encoder", "decoder"):
        assert Path(f"triton/{name}/1/model.onnx").read_bytes() == Path(f"flat/{name}.onnx").read_bytes()
    flat, triton = Codec("flat"), Codec("triton")
    images = np.random.default_rng(0).random((5, 8, 8), dtype=np.float32)
    np.testing.assert_array_equal(triton.encode(images), flat.encode(images))
    np.testing.assert_array_equal(triton.sample(5, seed=0), flat.sample(5, seed=0))
    models = open_models(Path("triton"))
    (code,) = models["encoder"].run({"image": images[:, None]}, ["code"])
    np.testing.assert_array_equal(code, flat.encode(images))
    # One may take the other's place, and nothing of it stays; anything else in the directory is left alone.
    export_run(run.path, Path("triton"), overwrite=True)
    assert _files(Path("triton")) == _files(Path("flat"))
    Path("triton/encoder").mkdir()
    Path("triton/encoder/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"files besides the export \(encoder/notes.txt\)"):
        export_run(run.path, Path("triton"), overwrite=True)


def test_what_is_wrong_is_said(train: Callable[..., Run]) -> None:
    run = train(latent="6x4", epochs=1)
    with pytest.raises(InputError, match="unknown layout 'tritn'; did you mean 'triton'"):
        export_run(run.path, Path("m"), layout="tritn")
    export_run(run.path, Path("m"), layout="triton")
    manifest = json.loads(Path("m/manifest.json").read_text())
    Path("m/decoder/1/model.onnx").write_bytes(b"123")
    with pytest.raises(InputError, match=r"model.onnx is damaged \(3 bytes"):
        Codec("m")
    for graphs in ({"encoder": "/etc/passwd", "decoder": "../x"}, [], {"encoder": "encoder.onnx"}):
        Path("m/manifest.json").write_text(json.dumps({**manifest, "graphs": graphs}))
        with pytest.raises(InputError, match="graphs is not what it should be"):
            Codec("m")


def test_a_code_of_one_number_is_reshaped() -> None:
    entry = {"inputs": [{"name": "code", "shape": ["batch"], "dtype": "int64"}]}
    entry["outputs"] = [{"name": "image", "shape": ["batch", 3, 5, 4], "dtype": "float32"}]
    config = _config(config_text("decoder", entry, 256))
    assert list(config.input[0].dims) == [1]
    assert config.input[0].HasField("reshape") and list(config.input[0].reshape.shape) == []
    assert list(config.output[0].dims) == [3, 5, 4] and not config.output[0].HasField("reshape")
