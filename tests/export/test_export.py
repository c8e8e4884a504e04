"""The ONNX export: what is written, that it computes what torch computes, and the codec that runs it without torch."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import dgrad_export.write.comparison
import dgrad_export.write.export
from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.errors import InputError, RunError
from dgrad.training.build import build_model
from dgrad.training.checkpoint import save_checkpoint
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.training.trainer import Trainer
from dgrad.vae.model import DiscreteVAE
from dgrad_export import Codec, export_run
from dgrad_export.codec.codec import CHUNK
from dgrad_export.codec.manifest import DECODER, ENCODER, FILES, MANIFEST
from dgrad_export.write.comparison import compare
from dgrad_export.write.graphs import Encode, code_shape, encoder_graph
from dgrad_export.write.run_facts import comparison_images, run_data

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "linear-bernoulli-6x4-threshold": {},
    "mlp-squared-error-1x8-none": {
        "model": "mlp",
        "hidden": (16,),
        "likelihood": "squared-error",
        "latent": "1x8",
        "binarize": "none",
    },
}
LINEAR, MLP = CASES


def train(path: Path, **settings: Any) -> Run:
    settings = {"latent": "6x4", "estimator": "rloo", "steps": 10, "lr": "0.01", "device": "cpu", **settings}
    trainer = Trainer(TrainConfig(**settings))
    run = Run.create(path, trainer.config)
    trainer.train(run)
    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, Run]:
    return {name: train(home / "runs" / name, **settings) for name, settings in CASES.items()}


@pytest.fixture(scope="module")
def exports(home: Path, runs: dict[str, Run]) -> dict[str, Path]:
    for name, run in runs.items():
        export_run(run.path, home / "deep" / "exports" / name)
    return {name: home / "deep" / "exports" / name for name in runs}


@pytest.fixture
def quick(exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The linear run's graphs are there already: exporting it again only checks and writes."""
    use_graphs_of(exports[LINEAR], monkeypatch)
    return exports[LINEAR]


def use_graphs_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file in (("encoder_graph", ENCODER), ("decoder_graph", DECODER)):
        data = (folder / file).read_bytes()
        monkeypatch.setattr(dgrad_export.write.export, name, lambda *args, data=data, **kwargs: data)


@pytest.fixture(scope="module")
def codec(exports: dict[str, Path]) -> Codec:
    return Codec(exports[LINEAR])


@pytest.fixture
def copied(exports: dict[str, Path], tmp_path: Path) -> Path:
    """A folder to damage."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((exports[LINEAR] / name).read_bytes())
    return folder


def error_of(call: Callable[[], object], kind: type[Exception] = InputError) -> str:
    """The message of the error that the call ends in: one line."""
    with pytest.raises(kind, match=r"\A[^\n]+\Z") as caught:
        call()
    assert caught.type is kind
    return str(caught.value)


def manifest_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))


def grey(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 1, 8, 8), dtype=np.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written


@pytest.mark.parametrize("name", CASES)
def test_every_batch_axis_is_free_and_named(exports: dict[str, Path], runs: dict[str, Run], name: str) -> None:
    model, _ = load_model(runs[name])
    expected = {
        ENCODER: {"image": (1, 8, 8), "logits": model.layer.shape, "code": code_shape(model)},
        DECODER: {"code": code_shape(model), "image": (1, 8, 8)},
    }
    for file, shapes in expected.items():
        proto = onnx.load(exports[name] / file)
        onnx.checker.check_model(proto, full_check=True)
        assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [20]
        values = [*proto.graph.input, *proto.graph.output]
        assert [value.name for value in values] == list(shapes)
        for value in values:
            batch, *rest = value.type.tensor_type.shape.dim
            assert batch.dim_param == "batch"
            assert tuple(axis.dim_value for axis in rest) == shapes[value.name]


@pytest.mark.parametrize("name", CASES)
def test_computes_what_torch_computes(exports: dict[str, Path], runs: dict[str, Run], name: str) -> None:
    model, _ = load_model(runs[name])
    encoder, decoder = (onnxruntime.InferenceSession(exports[name] / file) for file in (ENCODER, DECODER))
    for size in (1, 3, 64):
        images = grey(size, seed=size)
        seen = images >= 0.5 if "threshold" in name else images
        logits, code = encoder.run(["logits", "code"], {"image": images})
        with torch.no_grad():
            expected = model.encoder(torch.as_tensor(seen, dtype=torch.float32))
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(code, expected.argmax(-1))
            (decoded,) = decoder.run(["image"], {"code": code})
            np.testing.assert_allclose(decoded, model.decode(model.layer.codes(expected.argmax(-1))), atol=1e-5)
        assert decoded.shape == (size, 1, 8, 8) and decoded.min() >= 0 and decoded.max() <= 1


def test_rounding_is_in_the_encoder_and_leaves_binary_images_alone(exports: dict[str, Path]) -> None:
    images = np.array([0.0, 0.49999997, 0.5, 1.0], np.float32)[np.random.default_rng(0).integers(4, size=(9, 1, 8, 8))]
    rounded = (images >= 0.5).astype(np.float32)
    codec = Codec(exports[LINEAR])
    np.testing.assert_array_equal(codec.logits(images), codec.logits(rounded))
    np.testing.assert_array_equal(codec.logits(np.full((1, 8, 8), 127, np.uint8)), codec.logits(np.zeros((1, 8, 8))))
    np.testing.assert_array_equal(codec.logits(np.full((1, 8, 8), 128, np.uint8)), codec.logits(np.ones((1, 8, 8))))
    assert manifest_of(exports[LINEAR])["preprocessing"]["rounds_at"] == 0.5
    other = Codec(exports[MLP])
    assert not np.allclose(other.logits(images), other.logits(rounded), atol=1e-3)
    assert manifest_of(exports[MLP])["preprocessing"]["rounds_at"] is None


@pytest.mark.parametrize("name", CASES)
def test_manifest(exports: dict[str, Path], runs: dict[str, Run], name: str) -> None:
    manifest, summary = manifest_of(exports[name]), runs[name].summary()
    assert summary is not None
    assert sorted(path.name for path in exports[name].iterdir()) == sorted(FILES)
    for file, entry in manifest["files"].items():
        data = (exports[name] / file).read_bytes()
        assert entry["size"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    n, k = map(int, CASES[name].get("latent", "6x4").split("x"))
    assert manifest["latent"] == {"spec": f"{n}x{k}", "shape": [n, k], "code_shape": [n], "values": k}
    assert manifest["image_shape"] == [1, 8, 8]
    assert manifest["classes"] == list("0123456789") and manifest["attributes"] is None
    assert manifest["preprocessing"]["binarize"] == runs[name].config.binarize
    image = {"name": "image", "shape": ["batch", 1, 8, 8], "dtype": "float32"}
    code = {"name": "code", "shape": ["batch", n], "dtype": "int64"}
    logits = {"name": "logits", "shape": ["batch", n, k], "dtype": "float32"}
    assert manifest["files"][ENCODER]["inputs"] == [image]
    assert manifest["files"][ENCODER]["outputs"] == [logits, code]
    assert manifest["files"][DECODER]["inputs"] == [code]
    assert manifest["files"][DECODER]["outputs"] == [image]
    assert manifest["run"]["weights"] == "best"
    assert manifest["run"]["epoch"] == summary["best"]["epoch"]
    assert manifest["run"]["test_bound"] == summary["test_bound"]
    assert manifest["comparison"]["image"] <= 1e-5
    assert "test split" in manifest["comparison"]["images"]


def test_last_weights(runs: dict[str, Run], quick: Path, tmp_path: Path) -> None:
    summary = runs[LINEAR].summary()
    assert summary is not None and summary["best"]["step"] == summary["final"]["step"]  # so the graphs are the same
    manifest = export_run(runs[LINEAR].path, tmp_path / "out", weights="last")
    assert manifest["run"] == {
        "weights": "last",
        "epoch": summary["final"]["epoch"],
        "step": summary["final"]["step"],
        "test_bound": summary["final"]["test_bound"],
        "unit": "nats",
        "code": summary["final"]["code"],
    }


def test_graphs_hold_the_configuration_and_no_path(exports: dict[str, Path], runs: dict[str, Run]) -> None:
    for name, folder in exports.items():
        for file in (ENCODER, DECODER):
            proto = onnx.load(folder / file)
            assert proto.producer_name == "dgrad"
            metadata = {entry.key: entry.value for entry in proto.metadata_props}
            assert all(key.startswith("dgrad.") for key in metadata)
            config = json.loads(metadata["dgrad.config"])
            assert config["latent"] == runs[name].config.latent
            assert "data_root" not in config and "plugins" not in config
            assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
            for tensor in proto.graph.initializer:  # the weights' bytes may spell anything
                tensor.ClearField("raw_data")
            data = proto.SerializeToString()
            for text in (b".py", b"site-packages", b"dgrad_export", str(Path.home()).encode(), str(folder).encode()):
                assert text not in data


PLUGIN = '''
from dataclasses import dataclass
import torch
import dgrad
from dgrad_plugins.latents import Categorical

@dataclass(frozen=True)
class Packed(Categorical):
    """A latent whose integer form is one number for the whole code."""
    one_hot_rows = False

    def __str__(self):
        return f"packed:{self.variables}x{self.values}"

    def indices(self, codes):
        return (codes.argmax(-1) * self.values ** torch.arange(self.variables)).sum(-1)

    def codes(self, indices, dtype=torch.float32):
        digits = indices.unsqueeze(-1) // self.values ** torch.arange(self.variables) % self.values
        return super().codes(digits, dtype)

@dgrad.hookimpl
def dgrad_register_latents(register):
    register("packed", Packed.parse)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "packed_latent_of_this_test.py"
    path.write_text(PLUGIN)
    yield path
    for loaded in list(registry.registry().plugins):
        if loaded.name == path.stem:
            registry.registry().remove(loaded.module)
    sys.modules.pop(path.stem, None)


@pytest.mark.slow
def test_latent_of_another_integer_form_and_data_that_moved_away(
    tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "my data.npz"
    np.savez(data, images=np.random.default_rng(0).integers(0, 256, (60, 5, 4, 3), dtype=np.uint8))
    # No estimator here trains this latent: an untrained model's checkpoint serves as well.
    config = TrainConfig(latent="packed:2x3", plugins=(str(plugin),), dataset=str(data), data_root=str(tmp_path))
    registry.load_plugin(str(plugin))
    run = Run.create(tmp_path / "run", config)
    model = build_model(config, (3, 5, 4))
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state = {"image_shape": [3, 5, 4], "epoch": 1.0, "step": 9, "best": None}
    state |= {"seconds": 1.0, "losses_summed": 9, "config": json.loads(run.config.to_json())}
    save_checkpoint(run.checkpoint_file, tensors, state)
    capfd.readouterr()
    manifest = export_run(run.path, tmp_path / "out", weights="last")
    assert capfd.readouterr() == ("", "")
    assert manifest["latent"] == {"spec": "packed:2x3", "shape": [2, 3], "code_shape": [], "values": None}
    assert manifest["run"] == {"weights": "last", "epoch": 1.0, "step": 9}
    assert "6 of them different" in manifest["comparison"]["images"]

    data.unlink()
    use_graphs_of(tmp_path / "out", monkeypatch)
    manifest = export_run(run.path, tmp_path / "out", weights="last", overwrite=True)
    assert "random images" in manifest["comparison"]["images"]
    assert manifest["classes"] is None
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "out" / ENCODER).metadata_props}
    assert json.loads(metadata["dgrad.config"])["dataset"] == "my data.npz"
    for written in contents(tmp_path / "out").values():
        assert str(tmp_path).encode() not in written and plugin.stem.encode() not in written

    codec = Codec(tmp_path / "out")
    images = np.random.default_rng(1).random((4, 3, 5, 4))
    codes = codec.encode(images)
    assert codes.shape == (4,) and codec.values is None
    assert codec.decode(codes).shape == (4, 3, 5, 4)
    assert codec.decode(codes[0]).shape == (1, 3, 5, 4)
    np.testing.assert_array_equal(codec.encode(images[2]), codes[2:3])
    assert "[3, 5, 4]" in error_of(lambda: codec.encode(images[:, 0]))
    assert "not independent" in error_of(lambda: codec.sample(1))


@pytest.mark.parametrize("binarize", ["threshold", "static", "dynamic", "none"])
@pytest.mark.parametrize("dataset", ["digits", "gone.npz"])
def test_compared_images_are_such_as_the_encoder_gets(binarize: str, dataset: str) -> None:
    config = TrainConfig(latent="6x4", binarize=binarize, dataset=dataset)
    model = build_model(config, (1, 8, 8))
    images, source = comparison_images(config, model, run_data(config, model))
    assert images.shape == (256, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert (len(images.unique()) == 2) == (binarize in ("static", "dynamic"))
    assert ("random" in source) == (dataset == "gone.npz")


# Mixed models, and draws


@pytest.fixture(scope="module")
def mixed(home: Path) -> tuple[DiscreteVAE, Path]:
    run = train(home / "runs" / "mixed", model="mixture", latent="2x3", gaussian=4, hidden=(16, 8))
    export_run(run.path, home / "mixed", sampling=True)
    return load_model(run)[0], home / "mixed"


@pytest.mark.slow
def test_mixed_model_computes_what_torch_computes(mixed: tuple[DiscreteVAE, Path]) -> None:
    model, folder = mixed
    manifest = manifest_of(folder)
    assert (manifest["gaussian"], manifest["sampling"]) == (4, True)
    assert [output["name"] for output in manifest["files"][ENCODER]["outputs"]] == [
        "logits", "code", "sample", "mean", "log_variance",
    ]  # fmt: skip
    encoder, decoder = (onnxruntime.InferenceSession(folder / file) for file in (ENCODER, DECODER))
    images, uniform = grey(7), np.random.default_rng(1).uniform(0.01, 0.99, (7, 2, 3)).astype(np.float32)
    logits, code, sample, mean, log_variance = encoder.run(None, {"image": images, "uniform": uniform})
    with torch.no_grad():
        posterior = model.posterior(torch.from_numpy(images >= 0.5).float())
        assert posterior.gaussian is not None
        np.testing.assert_allclose(logits, posterior.logits, atol=1e-5)
        np.testing.assert_array_equal(code, posterior.logits.argmax(-1))
        np.testing.assert_array_equal(sample, (logits - np.log(-np.log(uniform))).argmax(-1))
        np.testing.assert_allclose(mean, posterior.gaussian.mean, atol=1e-5)
        np.testing.assert_allclose(log_variance, posterior.gaussian.log_variance, atol=1e-5)
        (decoded,) = decoder.run(None, {"code": code, "style": mean})
        expected = model.decode(model.layer.codes(torch.from_numpy(code)), torch.from_numpy(mean))
        np.testing.assert_allclose(decoded, expected, atol=1e-5)

    codec = Codec(folder)
    np.testing.assert_array_equal(codec.encode(images), code)
    np.testing.assert_allclose(codec.style(images), mean, atol=1e-6)
    np.testing.assert_allclose(codec.decode(code, codec.style(images)), decoded, atol=1e-6)
    np.testing.assert_array_equal(codec.decode(code), codec.decode(code, np.zeros((7, 4))))
    assert not np.allclose(codec.sample(5, seed=1), codec.sample(5, seed=2))
    np.testing.assert_array_equal(codec.sample(5, seed=1), codec.sample(5, seed=1))
    assert "expected numbers [7, 4]" in error_of(lambda: codec.decode(code, mean[:3]))
    assert "not finite" in error_of(lambda: codec.decode(code, np.full((7, 4), np.inf)))


@pytest.mark.slow
def test_draws_follow_the_logits_and_can_be_had_again(mixed: tuple[DiscreteVAE, Path]) -> None:
    codec = Codec(mixed[1])
    image = np.repeat(grey(1), 4000, axis=0)
    codes = codec.draw(image, seed=0)
    np.testing.assert_array_equal(codes, codec.draw(image, seed=0))
    assert (codes != codec.draw(image, seed=1)).any()
    logits = codec.logits(image[:1])[0].astype(np.float64)
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    shares = np.stack([(codes == value).mean(0) for value in range(3)], axis=-1)
    # 6 shares within 5 standard errors: a false alarm in less than one of 100,000 seeds, and the seed is fixed.
    assert (np.abs(shares - q) < 5 * np.sqrt(q * (1 - q) / 4000)).all()


@pytest.mark.slow
def test_variables_of_unequal_sizes_keep_to_their_values(home: Path) -> None:
    run = train(home / "runs" / "unequal", latent="2+3+5")
    export_run(run.path, home / "unequal", sampling=True)
    codec, sizes = Codec(home / "unequal"), np.array([2, 3, 5])
    images = np.random.default_rng(0).random((400, 1, 8, 8), np.float32).round()
    for codes in (codec.encode(images), codec.draw(images, seed=0), codec.sample_codes(400, seed=0)):
        assert codes.shape == (400, 3)
        assert (codes.max(0) < sizes).all()
    assert (codec.sample_codes(400, seed=0).max(0) == sizes - 1).all()
    with pytest.raises(InputError, match=r"a value that its variable lacks; expected values below \[2, 3, 5\]"):
        codec.decode(np.array([[2, 0, 0]]))


def test_what_a_model_without_style_and_draws_says(codec: Codec) -> None:
    assert "without --sampling" in error_of(lambda: codec.draw(grey(1)))
    assert "no Gaussian variables" in error_of(lambda: codec.style(grey(1)))
    assert "no Gaussian variables" in error_of(lambda: codec.decode([0] * 6, [[1.0]]))


# What cannot be exported


def test_bad_requests_come_before_any_work(runs: dict[str, Run], tmp_path: Path) -> None:
    run, out = runs[LINEAR].path, tmp_path / "out"
    assert "no run at" in error_of(lambda: export_run(tmp_path / "nothing", out))
    assert "expected 20 to" in error_of(lambda: export_run(run, out, opset=17))
    assert "expected 20 to" in error_of(lambda: export_run(run, out, opset=999))
    assert "did you mean 'best'" in error_of(lambda: export_run(run, out, weights="bets"))
    (tmp_path / "file").write_text("")
    assert "is a file" in error_of(lambda: export_run(run, tmp_path / "file", overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_overwrite_replaces_an_export_and_nothing_else(runs: dict[str, Run], quick: Path, tmp_path: Path) -> None:
    run, out = runs[LINEAR].path, tmp_path / "out"
    out.mkdir()
    export_run(run, out)  # an empty directory is free
    first = contents(out)
    assert first == contents(quick)
    assert "exists already" in error_of(lambda: export_run(run, out))
    (out / ENCODER).write_bytes(b"")
    export_run(run, out, overwrite=True)
    assert contents(out) == first

    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in error_of(lambda: export_run(run, out, overwrite=True))
    (out / MANIFEST).unlink()
    assert "no export" in error_of(lambda: export_run(run, out, overwrite=True))
    assert (out / "notes.txt").read_text() == "mine"
    assert "no export" in error_of(lambda: export_run(run, run, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_comparison_leaves_nothing_behind(
    runs: dict[str, Run], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = runs[LINEAR].path, tmp_path / "new" / "out"
    monkeypatch.setattr(dgrad_export.write.comparison, "IMAGE_TOLERANCE", -1.0)
    assert "differs from torch by" in error_of(lambda: export_run(run, out), RunError)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()

    old = tmp_path / "old"
    old.mkdir()
    for name, data in contents(quick).items():
        (old / name).write_bytes(data)
    monkeypatch.setattr(dgrad_export.write.comparison, "IMAGE_TOLERANCE", -1.0)
    use_graphs_of(quick, monkeypatch)
    error_of(lambda: export_run(run, old, overwrite=True), RunError)
    assert contents(old) == contents(quick)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_old_export_survives_a_failed_write(
    runs: dict[str, Run], quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_run(runs[LINEAR].path, out)
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if target == out.resolve() and (self / MANIFEST).read_bytes() != (quick / MANIFEST).read_bytes():
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    message = error_of(lambda: export_run(runs[LINEAR].path, out, weights="last", overwrite=True), RunError)
    assert "No space left on device" in message
    assert contents(out) == contents(quick)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def compare_with(model: DiscreteVAE, encoder: bytes, decoder: bytes) -> dict[str, Any]:
    return compare(model, encoder, decoder, torch.from_numpy(grey(256)), rounds=True)


def test_comparison_finds_wrong_graphs(runs: dict[str, Run], exports: dict[str, Path]) -> None:
    model, _ = load_model(runs[LINEAR])
    encoder, decoder = ((exports[LINEAR] / file).read_bytes() for file in (ENCODER, DECODER))
    assert compare_with(model, encoder, decoder)["image"] <= 1e-5

    other = copy.deepcopy(model)
    other.encoder.body[0].bias.data[3] += 0.01
    assert "logits differs from torch by 0.01" in error_of(lambda: compare_with(other, encoder, decoder), RunError)
    other = copy.deepcopy(model)
    other.decoder.first.bias.data[5] += 0.01
    assert "image differs from torch by" in error_of(lambda: compare_with(other, encoder, decoder), RunError)
    other.decoder.first.bias.data[5] = float("nan")
    assert "image differs from torch by nan" in error_of(lambda: compare_with(other, encoder, decoder), RunError)
    assert "does not load" in error_of(lambda: compare_with(model, b"no graph", decoder), RunError)

    fixed = onnx.load_from_string(decoder)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    message = error_of(lambda: compare_with(model, encoder, fixed.SerializeToString()), RunError)
    assert "does not run, at batch size 1" in message

    last = onnx.load_from_string(encoder)  # the argmax of the logits' negatives
    (first,) = [node for node in last.graph.node if node.op_type == "ArgMax" and node.input[0] == "logits"]
    last.graph.node.insert(
        list(last.graph.node).index(first), onnx.helper.make_node("Neg", ["logits"], ["negative"], name="negate")
    )
    first.input[0] = "negative"
    assert "code differs" in error_of(lambda: compare_with(model, last.SerializeToString(), decoder), RunError)


def test_only_ties_excuse_another_code(runs: dict[str, Run]) -> None:
    model, _ = load_model(runs[LINEAR])
    logits = torch.zeros(3, 6, 4)
    logits[..., 0] = 1
    logits[1, 2, 3] = 1 - 1e-6
    code = torch.zeros(3, 6, dtype=torch.int64)
    got = code.clone()
    got[1, 2] = 3
    tied = dgrad_export.write.comparison._tied_codes
    assert tied(model, logits, code, code, 3) == set()
    assert tied(model, logits, code, got, 3) == {1}
    logits[1, 2, 3] = 1 - 1e-3
    assert "more than a tie" in error_of(lambda: tied(model, logits, code, got, 3), RunError)
    got[1, 2] = 4
    assert "none of 6x4" in error_of(lambda: tied(model, logits, code, got, 3), RunError)


class FixedBatch(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(2, 6, 4, -1).sum(-1)


@pytest.mark.slow
def test_model_that_cannot_be_exported_is_said_so() -> None:
    model = build_model(TrainConfig(latent="6x4"), (1, 6, 4))
    model.encoder = FixedBatch()
    message = error_of(lambda: encoder_graph(model, rounds=True, opset=20, metadata={}), RunError)
    assert "logits has a fixed batch axis (2)" in message
    model.encoder = nn.Linear(3, 3)
    message = error_of(lambda: encoder_graph(model, rounds=False, opset=20, metadata={}), RunError)
    assert "the encoder cannot be exported: RuntimeError: " in message


# The codec


def test_codec_agrees_with_torch_in_every_accepted_shape(codec: Codec, runs: dict[str, Run]) -> None:
    model, _ = load_model(runs[LINEAR])
    assert (codec.image_shape, codec.code_shape, codec.logits_shape, codec.values) == ((1, 8, 8), (6,), (6, 4), 4)
    assert repr(codec) == "Codec(6x4, images [1, 8, 8])"
    whole = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        _, expected = Encode(model, rounds=True)(torch.from_numpy(whole).float() / 255)
    for images in (
        whole,
        whole[:, 0],
        whole / 255,
        (whole / 255).astype(np.float32),
        whole[::-1][::-1],
        whole.tolist(),
    ):
        given = np.asarray(images)
        codes = codec.encode(images if given.dtype != np.int64 else given.astype(np.uint8))
        assert codes.dtype == np.int64
        np.testing.assert_array_equal(codes, expected)
    for image in (whole[3, 0], whole[3]):
        np.testing.assert_array_equal(codec.encode(image), expected[3:4])
    images = codec.decode(expected.numpy().astype(np.uint8))
    assert images.dtype == np.float32
    with torch.no_grad():
        np.testing.assert_allclose(images, model.decode(model.layer.codes(expected)), atol=1e-5)
    np.testing.assert_array_equal(codec.decode(expected[2].numpy()), images[2:3])


def test_codec_takes_empty_and_large_batches(codec: Codec) -> None:
    for empty in (np.empty((0, 1, 8, 8), np.uint8), np.empty((0, 8, 8))):
        assert codec.encode(empty).shape == (0, 6)
        assert codec.logits(empty).shape == (0, 6, 4)
    assert codec.decode(np.empty((0, 6), np.int64)).shape == (0, 1, 8, 8)
    assert codec.sample(0).shape == (0, 1, 8, 8)
    images = grey(2 * CHUNK + 1)
    codes = codec.encode(images)
    np.testing.assert_array_equal(codes[CHUNK - 1 : CHUNK + 2], codec.encode(images[CHUNK - 1 : CHUNK + 2]))
    assert codec.decode(codes).shape == images.shape


def test_codec_samples_by_seed(codec: Codec) -> None:
    codes = codec.sample_codes(2000, seed=1)
    assert codes.shape == (2000, 6) and codes.dtype == np.int64
    np.testing.assert_array_equal(codes, codec.sample_codes(2000, seed=1))
    assert (codes != codec.sample_codes(2000, seed=2)).any()
    shares = np.stack([(codes == value).mean(0) for value in range(4)])
    assert np.abs(shares - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)
    np.testing.assert_array_equal(codec.sample(3, seed=1), codec.decode(codec.sample_codes(3, seed=1)))
    generator = np.random.default_rng(1)
    np.testing.assert_array_equal(codec.sample_codes(2000, generator), codes)
    assert (codec.sample_codes(2000, generator) != codes).any()


BAD_INPUTS: dict[str, tuple[Callable[[Codec], object], str]] = {
    "size": (lambda codec: codec.encode(np.zeros((2, 1, 7, 8))), "expected [N, 1, 8, 8] or [N, 8, 8] or [8, 8]"),
    "channels": (lambda codec: codec.encode(np.zeros((2, 3, 8, 8))), "images of shape [2, 3, 8, 8]"),
    "flat": (lambda codec: codec.encode(np.zeros((2, 64))), "images of shape [2, 64]"),
    "scalar": (lambda codec: codec.encode(0.5), "images of shape []"),
    "ragged": (lambda codec: codec.encode([[0.0], [0.0, 1.0]]), "no array"),
    "text": (lambda codec: codec.encode("image.png"), "expected uint8"),
    "int64": (lambda codec: codec.encode(np.zeros((8, 8), np.int64)), "images are of int64"),
    "nan": (lambda codec: codec.logits(np.full((8, 8), np.nan)), "hold nan"),
    "inf": (lambda codec: codec.encode(np.full((8, 8), np.inf)), "inf to inf"),
    "255": (lambda codec: codec.encode(np.full((8, 8), 255.0)), "go from 255 to 255; expected 0 to 1"),
    "negative": (lambda codec: codec.encode(np.full((8, 8), -0.5)), "go from -0.5 to -0.5"),
    "negative code": (lambda codec: codec.decode([[0, 0, 0, 0, 0, -1]]), "from -1 to 0; expected 0 to 3"),
    "large code": (lambda codec: codec.decode([0, 0, 0, 0, 0, 4]), "from 0 to 4; expected 0 to 3"),
    "huge code": (lambda codec: codec.decode(np.full((1, 6), 2**64 - 1, np.uint64)), "expected 0 to 3"),
    "float code": (lambda codec: codec.decode(np.zeros((1, 6))), "codes are of float64"),
    "bool code": (lambda codec: codec.decode(np.zeros((1, 6), bool)), "codes are of bool"),
    "code shape": (lambda codec: codec.decode([[0, 0]]), "expected [N, 6] or [6]"),
    "count": (lambda codec: codec.sample(-1), "count must be"),
    "fraction": (lambda codec: codec.sample(1.5), "count must be"),  # type: ignore[arg-type]
    "seed": (lambda codec: codec.sample(1, seed=-1), "seed must be"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_codec_says_what_is_wrong_with_its_input(codec: Codec, name: str) -> None:
    call, expected = BAD_INPUTS[name]
    assert expected in error_of(lambda: call(codec))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = manifest_of(folder)
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "has no manifest.json"),
    "cut manifest": (lambda folder: (folder / MANIFEST).write_text('{"format":'), "not JSON"),
    "binary manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "not JSON"),
    "other manifest": (lambda folder: (folder / MANIFEST).write_text('{"format": "web"}'), "no manifest of dgrad-onnx"),
    "newer manifest": (lambda folder: rewrite(folder, lambda m: m.update(format_version=2)), "format version 2"),
    "no latent": (lambda folder: rewrite(folder, lambda m: m.pop("latent")), "latent is missing"),
    "odd latent": (lambda folder: rewrite(folder, lambda m: m.update(latent=3)), "is damaged"),
    "odd shape": (lambda folder: rewrite(folder, lambda m: m.update(image_shape=[1, 8])), "image_shape"),
    "odd attributes": (lambda folder: rewrite(folder, lambda m: m.update(attributes=["a", "b"])), "attributes"),
    "no encoder": (lambda folder: (folder / ENCODER).unlink(), "encoder.onnx is missing"),
    "cut decoder": (lambda folder: (folder / DECODER).write_bytes(b"123"), "3 bytes"),
    "wrong encoder": (lambda folder: flip(folder / ENCODER), "its sha256 is"),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", DAMAGES)
def test_codec_says_what_is_wrong_with_its_folder(copied: Path, name: str) -> None:
    damage, expected = DAMAGES[name]
    damage(copied)
    assert expected in error_of(lambda: Codec(copied))


def test_codec_of_no_folder_and_of_no_graph(copied: Path, tmp_path: Path) -> None:
    assert "there is no such directory" in error_of(lambda: Codec(tmp_path / "nothing"))
    assert "threads must be at least 0" in error_of(lambda: Codec(copied, threads=-1))
    (copied / ENCODER).write_bytes(b"no graph")
    entry = {"size": 8, "sha256": hashlib.sha256(b"no graph").hexdigest()}
    rewrite(copied, lambda manifest: manifest["files"][ENCODER].update(entry))
    assert "onnxruntime cannot load" in error_of(lambda: Codec(copied))


ROUND_TRIP = """
import sys
import numpy as np
import dgrad_export
from dgrad_export import Codec
assert "numpy" not in dgrad_export.__dict__
assert dir(dgrad_export) == ["Codec", "build_page", "check_export", "export_run"]
codec = Codec(sys.argv[1])
codes = codec.encode(np.zeros((3, 8, 8), np.uint8))
assert codec.decode(codes).shape == (3, 1, 8, 8) and codec.sample(2, seed=0).shape == (2, 1, 8, 8)
heavy = {"torch", "onnx", "onnxscript", "safetensors", "sklearn"}
print(*sorted({name.partition(".")[0] for name in sys.modules} & heavy))
"""


@pytest.mark.processes
def test_codec_needs_neither_torch_nor_onnx(exports: dict[str, Path]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", ROUND_TRIP, str(exports[LINEAR])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_package_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dgrad_export.__all__ == ["Codec", "build_page", "check_export", "export_run"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dgrad_export.nothing  # noqa: B018
