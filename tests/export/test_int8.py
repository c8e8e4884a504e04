"""`dgrad export --int8 decoder`: its files, its images without regard to the batch, and the measurement of its cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dgrad.data import unit
from dgrad.errors import InputError, RunError
from dgrad.training.build import Build
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad_cli.main import main
from dgrad_export import Codec, export_run
from dgrad_export.write.int8 import integers, quantize

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {
    "linear": {"latent": "20x10"},
    "mlp": {"model": "mlp", "hidden": "50,100", "likelihood": "squared-error", "binarize": "none", "latent": "20x10"},
    "mixture": {"model": "mixture", "latent": "2x10", "gaussian": 4, "hidden": "40,20"},
    "conv": {"model": "conv", "latent": "20x2", "gaussian": 4, "hidden": "8,16", "binarize": "none"},
}
OPERATORS = {
    "linear": {"MatMulInteger": 1},
    "mlp": {"MatMulInteger": 3},
    "mixture": {"MatMulInteger": 1, "DequantizeLinear": 1},
    "conv": {"DequantizeLinear": 2},
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, Path, Path]]:
    """Of each model: the run, the export in floats, the export with an int8 decoder."""
    from dgrad.config import configure
    from dgrad.training.trainer import Trainer

    home, result = tmp_path_factory.mktemp("int8"), {}
    for name, settings in MODELS.items():
        trainer = Trainer(configure({"estimator": "direct", "epochs": 2, "device": "cpu", "lr": "0.01", **settings}))
        run = Run.create(home / name, trainer.config)
        trainer.train(run)
        export_run(run.path, home / f"{name}-float")
        export_run(run.path, home / f"{name}-int8", int8="decoder")
        result[name] = (run, home / f"{name}-float", home / f"{name}-int8")
    return result


def _feed(folder: Path, count: int) -> dict[str, np.ndarray]:
    codec = Codec(folder)
    feed = {"code": codec.sample_codes(count, seed=0)}
    if codec.gaussian:
        feed["style"] = codec.sample_style(count, seed=1)
    return feed


def _decoded(folder: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "decoder.onnx")
    return np.asarray(session.run(["image"], feed)[0])


def test_the_weights_have_8_bits_and_the_encoder_is_as_it_was(
    exports: dict[str, tuple[Run, Path, Path]], name: str
) -> None:
    _, before, after = exports[name]
    assert (before / "encoder.onnx").read_bytes() == (after / "encoder.onnx").read_bytes()
    proto = onnx.load(after / "decoder.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [value.name for value in proto.graph.output] == ["image"]
    assert {entry.domain for entry in proto.opset_import} == {""}, "any client has ONNX's own operators"
    kinds = [node.op_type for node in proto.graph.node]
    assert {kind: kinds.count(kind) for kind in OPERATORS[name]} == OPERATORS[name]
    floats = [tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(tensor.dims) for tensor in floats) <= 256
    sizes = [(folder / "decoder.onnx").stat().st_size for folder in (before, after)]
    assert sizes[1] < 0.45 * sizes[0]


def test_an_image_does_not_depend_on_its_batch(exports: dict[str, tuple[Run, Path, Path]], name: str) -> None:
    folder = exports[name][2]
    feed = _feed(folder, 40)
    whole = _decoded(folder, feed)
    for i in range(40):
        alone = _decoded(folder, {key: values[i : i + 1] for key, values in feed.items()})
        np.testing.assert_allclose(alone[0], whole[i], atol=1e-6)  # floats are added up in another order
    assert np.abs(whole - _decoded(exports[name][1], feed)).max() < 0.06


def test_a_linear_decoder_is_exact_but_for_its_weights(exports: dict[str, tuple[Run, Path, Path]]) -> None:
    run, _, folder = exports["linear"]
    model, _ = load_model(run)
    first = model.decoder.first
    whole, scale = integers(first.weight.detach().numpy(), 0)
    assert np.abs(whole).max() == 127 and whole.dtype == np.int8
    np.testing.assert_allclose(whole * scale[:, None], first.weight.detach(), atol=scale.max() / 2)
    feed = _feed(folder, 50)
    codes = np.eye(10)[feed["code"]].reshape(50, 200)
    outputs = codes @ (whole * scale[:, None].astype(np.float64)).T + first.bias.detach().numpy()
    np.testing.assert_allclose(_decoded(folder, feed).reshape(50, -1), 1 / (1 + np.exp(-outputs)), atol=1e-6)


def test_the_change_of_the_bound_is_that_of_the_files(exports: dict[str, tuple[Run, Path, Path]], name: str) -> None:
    """From the images of both files, in numpy. The codes are drawn anew, so the change has its standard error."""
    run, before, after = exports[name]
    cost = json.loads((after / "manifest.json").read_text())["int8"]
    assert json.loads((before / "manifest.json").read_text())["int8"] is None
    assert cost["size_after"] == (after / "decoder.onnx").stat().st_size
    assert abs(cost["size_before"] - (before / "decoder.onnx").stat().st_size) < 100
    assert cost["change"] == pytest.approx(cost["bound_after"] - cost["bound_before"])
    assert cost["unit"] == load_model(run)[0].likelihood.unit
    model, _ = load_model(run)
    test = Build(run.config).evaluation_data.test
    pixels = unit(test.images).flatten(1).double().numpy()
    changes = []
    with torch.no_grad():
        posterior = model.posterior(unit(test.images))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        feed = {"code": model.layer.sample(posterior.logits, generator=generator)[0].argmax(-1).numpy()}
        if (style := posterior.draw(generator=generator)) is not None:
            feed["style"] = style.numpy()
        losses = []
        for folder in (before, after):
            image = _decoded(folder, feed).reshape(pixels.shape).astype(np.float64)
            if cost["unit"] == "nats":
                image = image.clip(1e-7, 1 - 1e-7)
                losses.append(-(pixels * np.log(image) + (1 - pixels) * np.log(1 - image)).sum(1))
            else:
                losses.append(((pixels - image) ** 2).sum(1))
        changes.append((losses[1] - losses[0]).mean())
    assert cost["images"] == len(test)
    assert abs(np.mean(changes) - cost["change"]) < 5 * cost["standard_error"] + 1e-5
    summary = run.summary()
    assert summary is not None
    assert abs(cost["bound_before"] - summary["test_bound"]) < 0.05 * summary["test_bound"]


def test_the_command_says_what_it_costs_and_refuses_encoders(
    exports: dict[str, tuple[Run, Path, Path]], capsys: pytest.CaptureFixture[str], train: Callable[..., Run]
) -> None:
    def export(*options: object) -> int:
        with pytest.raises(SystemExit, match=r"^\d$") as exit_:
            main(["export", *map(str, options)])
        assert isinstance(exit_.value.code, int)
        return exit_.value.code

    run, _, folder = exports["linear"]
    assert export(run.path, "--out", "m", "--int8", "decoder") == 0
    cost = json.loads((folder / "manifest.json").read_text())["int8"]
    shown = capsys.readouterr().out
    assert f"{cost['size_before']:,} bytes became {cost['size_after']:,}" in shown
    assert f"{cost['change']:+.4f}; one code drawn for each of {cost['images']} images, the same for both" in shown
    assert Path("m/decoder.onnx").read_bytes() == (folder / "decoder.onnx").read_bytes()
    assert export(run.path, "--out", "n", "--int8", "encoder") == 2
    assert "an image's code would depend on the images beside it; expected --int8 decoder" in capsys.readouterr().err
    assert export(run.path, "--out", "n", "--int8", "both") == 2
    assert "--int8 must be decoder" in capsys.readouterr().err
    assert not Path("n").exists()


def test_without_test_images_the_bound_is_not_measured(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dgrad_export.write.export

    run = train(latent="20x10", epochs=1)
    monkeypatch.setattr(dgrad_export.write.export, "run_data", lambda config, model: None)
    cost = export_run(run.path, Path("m"), int8="decoder")["int8"]
    assert sorted(cost) == ["graph", "size_after", "size_before"]


def test_a_decoder_without_large_weights_is_said_so(train: Callable[..., Run]) -> None:
    x = onnx.helper.make_tensor_value_info("code", onnx.TensorProto.FLOAT, ["batch", 2])
    y = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["code"], ["image"])], "g", [x], [y])
    with pytest.raises(RunError, match="no layer in the decoder"):
        quantize(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(InputError, match="must be decoder"):
        export_run(Path("nothing"), Path("m"), int8="all")


def test_a_weight_that_is_used_twice_is_restored_once_before_its_uses() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 16])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 16])
    nodes = [
        onnx.helper.make_node("Transpose", ["weight"], ["turned"]),
        onnx.helper.make_node("MatMul", ["x", "turned"], ["between"]),
        onnx.helper.make_node("MatMul", ["between", "weight"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [onnx.numpy_helper.from_array(weight, "weight")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    quantized = onnx.load_from_string(quantize(model.SerializeToString()))
    assert [node.op_type for node in quantized.graph.node].count("DequantizeLinear") == 1
    given = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    (got,) = onnxruntime.InferenceSession(quantized.SerializeToString()).run(None, {"x": given})
    whole, scale = integers(weight, 1)
    np.testing.assert_allclose(got, given @ (whole * scale).T @ (whole * scale), rtol=1e-4, atol=1e-4)


def test_the_benchmarks_print_their_tables(
    exports: dict[str, tuple[Run, Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import decoder_input, int8

    decoder_input.main(["--rounds", "2"])  # it makes sure that both forms give the same images
    assert capsys.readouterr().out.count("us |") == 12
    int8.measure(exports["mlp"][1], 2)
    assert "| `--int8 decoder` |" in capsys.readouterr().out
