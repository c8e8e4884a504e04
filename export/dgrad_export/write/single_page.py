"""The page with a run's networks in it: one file that needs no server."""

from __future__ import annotations

import base64
import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dgrad.core.restricted import Restricted
from dgrad.errors import InputError, RunError
from dgrad.files.atomic import check_place, write_text
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.vae.dropout import Dropout
from dgrad.vae.likelihoods import Bernoulli, DiscretizedLogistic, SquaredError
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.networks import Decoder, Encoder, MixtureEncoder
from dgrad_export.page.html import model_facts, page, sealed
from dgrad_export.write.comparison import COUNT
from dgrad_export.write.graphs import code_shape
from dgrad_export.write.run_facts import comparison_images, label_names, model_shapes, run_data, run_figures

GAINS = {Bernoulli: 1, SquaredError: 2, DiscretizedLogistic: None}
"""A pixel is `sigmoid(gain * output)`, as `(1 + tanh a) / 2 = sigmoid(2 a)`.

None stands for locations in [-1, 1], the first half of the outputs.
"""
LARGEST = 127
"""The integers that stand for weights go from minus this to this."""


@dataclass(frozen=True)
class SinglePage:
    """A page that is not written yet.

    Attributes:
        comparison: the difference from the run's own networks, on test images and random codes. The largest and the
            mean difference of a pixel, and the share of equal numbers in the images' codes.
        state: the part of the run that its weights are from.
    """

    path: Path
    html: str
    comparison: dict[str, Any]
    state: dict[str, Any]

    def save(self) -> None:
        """Write it, whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        try:
            write_text(self.path, self.html)
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror or error}; "
                "make room and make it writable, or choose another file"
            ) from error


def build_page(run_path: Path, out: Path, *, weights: str = "best", overwrite: bool = False) -> SinglePage:
    """Turn a run's model into a page that computes in the browser, with its weights rounded to 8 bits.

    Args:
        out: the `.html` file to write. `save` writes it.
        weights: `best` by the validation bound, or `last`.
        overwrite: replace a file at `out`.

    Raises:
        InputError: there is no such run, `out` is taken or no place for a page, or a layer is not linear.
        RunError: the weights are not finite.
    """
    _check_place(out, overwrite=overwrite)
    run = Run.open(run_path)
    model, state = load_model(run, weights)
    _check_model(model.eval(), run)
    rounded = copy.deepcopy(model)
    networks = _round(rounded, rounds=run.config.binarize == "threshold")
    build = run_data(run.config, model)
    images, source = comparison_images(run.config, model, build)
    seen = (images >= 0.5).to(images.dtype) if run.config.binarize == "threshold" else images
    comparison: dict[str, Any] = {"images": source, **_compare(model, rounded, seen)}
    if not math.isfinite(comparison["largest"]):
        raise RunError(f"the weights of {run_path} give pixels that are no numbers; train it again with a smaller --lr")
    manifest = {
        **model_shapes(model),
        "image_shape": list(model.image_shape),
        "preprocessing": {"rounds_at": networks["encoder"]["rounds_at"]},
        **label_names(run.config, build),
        "run": run_figures(run, weights),
    }
    note = (
        "This file computes by itself, with weights rounded to 8 bits. Compared with the model when it was written, "
        f"pixels differed by {comparison['largest']:.3f} at most and {comparison['mean']:.4f} on average (white is 1), "
        f"and {comparison['same_codes']:.1%} of the numbers of the codes were the same."
    )
    config = run.config  # a data set may be a path, which belongs to this machine
    settings = {"dataset": Path(config.dataset).name, "estimator": config.estimator, "labels": config.labels}
    facts = model_facts(manifest, settings)
    return SinglePage(out, sealed(page({**facts, "note": note}, networks)), comparison, state)


def _check_place(out: Path, *, overwrite: bool) -> None:
    if out.suffix.lower() != ".html":
        raise InputError(f"--page must end with .html; got {out}")
    check_place("--page", out, "file")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already; choose another file, or replace it with --overwrite")


def _check_model(model: DiscreteVAE, run: Run) -> None:
    known = (
        type(model.encoder) in (Encoder, MixtureEncoder)
        and type(model.decoder) is Decoder
        and not model.concatenate_gaussian
    )
    leaves = [module for module in model.modules() if not list(module.children())]
    if not known or not all(isinstance(leaf, nn.Linear | nn.ReLU | Dropout) for leaf in leaves if not _is_empty(leaf)):
        raise InputError(
            f"a page computes linear layers and ReLU alone; the {run.config.model} model of {run.path} has others: "
            "leave --page out and use dgrad serve"
        )
    if not model.layer.one_hot_rows or code_shape(model) != model.layer.shape[:-1]:
        raise InputError(
            f"a page shows independent variables; latent {model.layer} has others: leave --page out and use dgrad serve"
        )
    if isinstance(model.layer, Restricted):
        raise InputError(
            f"a page shows variables of one size; latent {model.layer} has several: leave --page out and use dgrad "
            "serve"
        )


def _is_empty(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) == 0


def _round(model: DiscreteVAE, *, rounds: bool) -> dict[str, Any]:
    """The networks as the page takes them. The model's own weights become the rounded ones."""
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(decoder, Decoder)
    if isinstance(encoder, MixtureEncoder):
        shared, logits, style = _layers(encoder.shared), _layers(encoder.discrete), _layers(encoder.continuous)
    else:
        assert isinstance(encoder, Encoder)
        shared, logits, style = [], _layers([encoder.body]), []
    return {
        "encoder": {"rounds_at": 0.5 if rounds else None, "shared": shared, "logits": logits, "style": style},
        "decoder": {
            # A row for each coordinate of the code: few are not zero.
            "first": _layer(decoder.first, relu=len(decoder.rest) > 0, transposed=True),
            "rest": _layers(list(decoder.rest)[1:]),
            "gain": GAINS[type(model.likelihood)],
        },
    }


def _layers(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The linear layers of networks, one after the other. Each says whether a ReLU follows."""
    leaves = [leaf for module in modules for leaf in module.modules() if isinstance(leaf, nn.Linear | nn.ReLU)]
    return [
        _layer(leaf, relu=isinstance(follower, nn.ReLU))
        for leaf, follower in pairwise([*leaves, None])
        if isinstance(leaf, nn.Linear)
    ]


@torch.no_grad()
def _layer(linear: nn.Linear, *, relu: bool, transposed: bool = False) -> dict[str, Any]:
    """A layer as JSON: int8 weights, a float32 scale for each row, the bias. The layer's own weight is rounded too."""
    weight = linear.weight.T if transposed else linear.weight
    scale = weight.abs().amax(1, keepdim=True) / LARGEST
    scale[scale == 0] = 1
    integers = (weight / scale).round()
    weight.copy_(integers * scale)
    return {
        "rows": weight.shape[0],
        "columns": weight.shape[1],
        "weight": _text(integers.to(torch.int8)),
        "scale": _text(scale),
        "bias": _text(linear.bias),
        "relu": relu,
    }


def _text(tensor: Tensor) -> str:
    """The numbers in memory, little-endian, in base 64."""
    array = tensor.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


@torch.no_grad()
def _compare(model: DiscreteVAE, rounded: DiscreteVAE, images: Tensor) -> dict[str, float]:
    layer, generator = model.layer, Generator().manual_seed(0)
    posterior, rounded_posterior = model.posterior(images), rounded.posterior(images)
    codes, rounded_codes = layer.argmax(posterior.logits), layer.argmax(rounded_posterior.logits)
    random_codes = layer.sample(torch.zeros(1, *layer.shape), COUNT, generator=generator).squeeze(1)
    style = model.prior_gaussian(COUNT, generator=generator)
    means = None if posterior.gaussian is None else posterior.gaussian.mean
    both = ((codes, means), (random_codes, style))
    difference = torch.cat([(rounded.decode(*inputs) - model.decode(*inputs)).abs() for inputs in both])
    same = layer.indices(codes) == layer.indices(rounded_codes)
    return {
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
        "same_codes": float(same.double().mean()),
    }
