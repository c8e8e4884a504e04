"""Every kind of model as ONNX: trained a little, exported, and compared with torch at several batch sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from dgrad.config import configure
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.training.trainer import Trainer
from dgrad.vae.model import DiscreteVAE
from dgrad_export import Codec, export_run

pytestmark = pytest.mark.slow

NAMES = ("Eyeglasses", "Smiling", "Wearing_Hat")
CONV = {"model": "conv", "hidden": "4,6,8,8", "gaussian": 5, "binarize": "none"}
LABELS = {"labels": 20, "labelled-batch": 10, "latent": "3x2"}
MODELS: dict[str, dict[str, Any]] = {
    "linear": {"latent": "6x4"},
    "mlp-deep-squared-error": {
        "model": "mlp", "hidden": "400,200,100,50", "likelihood": "squared-error", "binarize": "none", "latent": "6x4",
    },
    "mlp-colour-chosen-attributes": {
        "dataset": "faces.npz", "model": "mlp", "hidden": "16", "attributes": "Wearing_Hat,Eyeglasses", **LABELS,
        "latent": "2x2",
    },
    "mixture": {"model": "mixture", "latent": "2x3", "gaussian": 4, "hidden": "16,8"},
    "conv-colour": {"dataset": "faces.npz", **CONV, "latent": "4x3"},
    "conv-colour-squared-error": {"dataset": "faces.npz", **CONV, "latent": "4x3", "likelihood": "squared-error"},
    "conv-colour-attributes": {"dataset": "faces.npz", **CONV, **LABELS},
    "conv-grey": {**CONV, "hidden": "4,6,8", "latent": "20x2"},
}  # fmt: skip
SIZES = (1, 2, 5, 33)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    draws = np.random.RandomState(0)
    images = draws.randint(0, 256, (60, 64, 64, 3)).astype(np.uint8)
    np.savez(path / "faces.npz", images=images, attributes=draws.randint(0, 2, (60, 3)), attribute_names=NAMES)
    return path


@pytest.fixture(scope="module", params=MODELS)
def exported(home: Path, request: pytest.FixtureRequest) -> tuple[DiscreteVAE, Path, dict[str, Any]]:
    settings = dict(MODELS[request.param])
    if "dataset" in settings:
        settings["dataset"] = str(home / settings["dataset"])
    config = configure(
        {"estimator": "direct", "steps": 4, "batch-size": 20, "eval-samples": 1, "device": "cpu", **settings}
    )
    trainer = Trainer(config)
    run = Run.create(home / request.param, trainer.config)
    trainer.train(run)
    out = home / f"{request.param}-exported"
    export_run(run.path, out)
    return load_model(run)[0], out, json.loads((out / "manifest.json").read_text())


@torch.no_grad()
def test_computes_what_torch_computes_at_every_batch_size(exported: tuple[DiscreteVAE, Path, dict[str, Any]]) -> None:
    model, out, manifest = exported
    encoder, decoder = (onnxruntime.InferenceSession(out / f"{name}.onnx") for name in ("encoder", "decoder"))
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(max(SIZES), *model.image_shape, generator=generator)
    seen = images if manifest["preprocessing"]["rounds_at"] is None else (images >= 0.5).float()
    posterior = model.posterior(seen)
    uniform_logits = torch.zeros(max(SIZES), *model.layer.shape)
    codes = model.layer.sample(uniform_logits, generator=generator)[0]
    style = model.prior_gaussian(max(SIZES), generator=generator)
    expected = {"logits": posterior.logits, "code": posterior.logits.argmax(-1)}
    given = {"code": codes.argmax(-1).numpy()}
    if posterior.gaussian is not None and style is not None:
        expected |= {"mean": posterior.gaussian.mean, "log_variance": posterior.gaussian.log_variance}
        given["style"] = style.numpy()
    assert [output.name for output in encoder.get_outputs()] == list(expected)
    assert [tensor.name for tensor in decoder.get_inputs()] == list(given)
    pictures = model.decode(codes, style).numpy()
    for size in SIZES:
        results = encoder.run(list(expected), {"image": images[:size].numpy()})
        for (name, truth), got in zip(expected.items(), results, strict=True):
            np.testing.assert_allclose(got, truth[:size], rtol=1e-4, atol=1e-5, err_msg=f"{name} at {size}")
        (picture,) = decoder.run(["image"], {name: values[:size] for name, values in given.items()})
        np.testing.assert_allclose(picture, pictures[:size], atol=1e-5)
        assert picture.shape == (size, *model.image_shape)


def test_the_axes_of_examples_are_one_free_axis(exported: tuple[DiscreteVAE, Path, dict[str, Any]]) -> None:
    model, _, manifest = exported
    tensors = [
        tensor
        for entry in manifest["files"].values()
        for tensor in [*entry.get("inputs", []), *entry.get("outputs", [])]
    ]  # fmt: skip
    assert len(tensors) == (8 if model.gaussian else 5)
    assert {tensor["shape"][0] for tensor in tensors} == {"batch"}
    assert manifest["gaussian"] == model.gaussian and manifest["comparison"]["image"] <= 1e-5
    assert "test split" in manifest["comparison"]["images"]


def test_the_variables_of_a_code_are_named_where_they_are_attributes(
    exported: tuple[DiscreteVAE, Path, dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    _, out, manifest = exported
    expected = None
    if "attributes" in out.name:
        expected = ["Wearing_Hat", "Eyeglasses"] if "chosen" in out.name else list(NAMES)
    assert manifest["attributes"] == expected
    assert Codec(out).attributes == (None if expected is None else tuple(expected))
