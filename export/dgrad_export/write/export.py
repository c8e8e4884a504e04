"""Writing a run's model as ONNX, checked, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

import dgrad
from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.errors import InputError, RunError, unknown_name
from dgrad.files.atomic import atomic_directory
from dgrad.training.build import Build
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.vae.model import DiscreteVAE
from dgrad_export.check.reference import make_reference
from dgrad_export.check.verification import signature
from dgrad_export.codec.manifest import (
    EVERY_FILE,
    FORMAT,
    FORMAT_VERSION,
    LAYOUTS,
    MANIFEST,
    REFERENCE,
    TRITON_CONFIGS,
    is_export,
)
from dgrad_export.write.bound_cost import compare_bounds
from dgrad_export.write.comparison import COUNT, compare
from dgrad_export.write.graphs import decoder_graph, encoder_graph, images_only
from dgrad_export.write.int8 import quantize
from dgrad_export.write.run_facts import (
    SUMMARY_PART,
    comparison_images,
    label_names,
    model_shapes,
    run_data,
    run_figures,
)
from dgrad_export.write.triton import config_text

LEAST_OPSET = 20
PREPROCESSING = {
    "threshold": "pixels of at least 0.5 become 1 and the others 0 inside encoder.onnx: send grey images in [0, 1]",
    "static": "none: the model was trained on pixels of 0 and 1, "
    "drawn once for each image with the pixel as probability",
    "dynamic": "none: the model was trained on pixels of 0 and 1, "
    "drawn anew for each step with the pixel as probability",
    "none": "none: the model was trained on grey images in [0, 1]",
}


def export_run(
    run_path: Path,
    out: Path,
    *,
    weights: str = "best",
    overwrite: bool = False,
    opset: int = LEAST_OPSET,
    sampling: bool = False,
    int8: str | None = None,
    layout: str = "flat",
) -> dict[str, Any]:
    """Write a run's model as a folder of ONNX graphs with a manifest.

    - The encoder takes `image` `[batch, C, H, W]`, float32 in [0, 1]. It gives `logits` `[batch, *layer.shape]`,
      float32, and the most probable `code` in the layer's integer form, int64, `[batch, n]` for categorical variables.
    - The decoder takes `code` and gives `image`.
    - In a mixed model the encoder also gives `mean` and `log_variance` `[batch, g]` of the Gaussian variables. The
      decoder takes values of them as `style`.

    onnxruntime runs both before anything appears at `out`, and their results are compared with torch's. The inputs are
    the run's test images where they can be loaded.

    Args:
        out: the folder to write. Its parents are made.
        weights: `best` by the validation bound, or `last`.
        overwrite: replace an earlier export at `out`.
        opset: the ONNX operator set, 20 or newer.
        sampling: the encoder also takes `uniform` `[batch, n, k]` in (0, 1) and gives `sample`, a draw of the code.
            With independent uniform numbers the draw is exact up to float32.
        int8: `decoder` for a decoder with weights of 8 bits. `manifest["int8"]` has its cost in the bound of the run's
            test images.
        layout: `flat`, or `triton` for a Triton model repository: `encoder/1/model.onnx`, `encoder/config.pbtxt`, the
            same for the decoder, and the manifest.

    Returns:
        The manifest. `manifest["comparison"]` has the largest differences from torch.

    Raises:
        InputError: there is no such run, `out` is taken, or an option is wrong.
        RunError: the model cannot be exported, differs from torch, or cannot be written. `out` is as it was before.
    """
    _check_options(weights, opset, int8, layout)
    target = out.resolve()
    _check_free(target, out, overwrite=overwrite)
    run = Run.open(run_path)
    model, state = load_model(run, weights)
    if sampling and not model.layer.one_hot_rows:
        raise InputError(
            f"--sampling draws codes of independent variables; latent {model.layer} has others: "
            "export it without --sampling"
        )
    config = run.config
    metadata = _metadata(config, model)
    rounds = config.binarize == "threshold"
    encoder = encoder_graph(model, rounds=rounds, opset=opset, metadata=metadata, sampling=sampling)
    decoder = decoder_graph(model, opset=opset, metadata=metadata, outputs=int8 is not None)
    build = run_data(config, model)
    images, source = comparison_images(config, model, build)
    differences = compare(model, encoder, decoder, images, rounds=rounds, sampling=sampling)
    cost = None
    if int8:
        decoder, cost = _quantized(model, decoder, build)
    files = LAYOUTS[layout]
    graphs = {files["encoder"]: encoder, files["decoder"]: decoder}
    entries = {file: _entry(graph) for file, graph in graphs.items()}
    shapes = model_shapes(model)
    others = {REFERENCE: make_reference(encoder, decoder, shapes["latent"]["values"])}
    if layout == "triton":
        for name, file in TRITON_CONFIGS.items():
            others[file] = config_text(name, entries[files[name]], COUNT).encode()
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {
            "dgrad": dgrad.__version__,
            "torch": str(torch.__version__),
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "opset": opset,
        **shapes,
        "sampling": sampling,
        "image_shape": list(model.image_shape),
        "preprocessing": {
            "binarize": config.binarize,
            "rounds_at": 0.5 if rounds else None,
            "says": PREPROCESSING[config.binarize],
        },
        **label_names(config, build),
        "int8": cost,
        "graphs": files,
        "files": {**entries, **{name: _size_and_hash(data) for name, data in others.items()}},
        "run": {**state, **run_figures(run, state["weights"])},
        "comparison": {"images": source, "random_codes": COUNT, **differences},
    }
    try:
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        _write(target, {**graphs, **others, MANIFEST: text.encode()})
    except OSError as error:
        raise RunError(
            f"cannot write {out}: {error.strerror or error}; "
            "make room and make it writable, or choose another directory"
        ) from error
    return manifest


def _check_options(weights: str, opset: int, int8: str | None, layout: str) -> None:
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    if int8 == "encoder":
        raise InputError(
            "--int8 encoder is not offered: some images would get another code, and with a scale of the activations "
            "that is found as it runs, an image's code would depend on the images beside it; expected --int8 decoder"
        )
    if int8 not in (None, "decoder"):
        raise InputError(f"--int8 must be decoder, the one graph that can be quantised; got {int8!r}")
    if weights not in SUMMARY_PART:
        raise unknown_name("weights", weights, SUMMARY_PART)
    newest = onnx.defs.onnx_opset_version()
    if not LEAST_OPSET <= opset <= newest:
        raise InputError(f"opset {opset} is not supported; expected {LEAST_OPSET} to {newest} (this onnx's newest)")


def _check_free(target: Path, given: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"{given} is a file; expected a directory for the export: choose another")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{given} exists already; choose another directory, or replace it with --overwrite")
    if not is_export(target):
        raise InputError(f"{given} holds files but no export, so --overwrite leaves it alone; choose another directory")
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    if others := sorted(found - EVERY_FILE):
        raise InputError(
            f"{given} holds files besides the export ({', '.join(others[:3])}), so --overwrite leaves it alone; "
            "move them, or choose another directory"
        )


def _metadata(config: TrainConfig, model: DiscreteVAE) -> dict[str, str]:
    """The origin of the graphs, without anything of the machine that made them."""
    settings = asdict(config)
    # Paths of data and plugins belong to the machine.
    del settings["data_root"], settings["plugins"]
    if config.dataset not in registry.datasets():
        settings["dataset"] = Path(config.dataset).name
    return {
        "format_version": str(FORMAT_VERSION),
        "version": dgrad.__version__,
        "latent": str(model.layer),
        "preprocessing": PREPROCESSING[config.binarize],
        "config": json.dumps(settings, sort_keys=True),
    }


def _quantized(model: DiscreteVAE, decoder: bytes, build: Build | None) -> tuple[bytes, dict[str, Any]]:
    """The decoder with weights of 8 bits, and its cost: bytes, and the change of the bound of test images, if any."""
    smaller = quantize(decoder)
    cost: dict[str, Any] = {
        "graph": "decoder",
        "size_before": len(images_only(decoder)),
        "size_after": len(images_only(smaller)),
    }
    if build is not None:
        cost |= compare_bounds(model, decoder, smaller, build.evaluation_data.test)
    return images_only(smaller), cost


def _size_and_hash(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _entry(data: bytes) -> dict[str, Any]:
    graph = onnx.load_from_string(data).graph
    return {
        **_size_and_hash(data),
        "inputs": [signature(value) for value in graph.input],
        "outputs": [signature(value) for value in graph.output],
    }


def _write(target: Path, files: dict[str, bytes]) -> None:
    """All files at once."""
    with atomic_directory(target) as staging:
        for name, data in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(data)
