"""The cost of another decoder: the bound of test images with it, beside that with the first."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dgrad.data import Split, unit
from dgrad.vae.evaluation import evaluation_generator
from dgrad.vae.model import DiscreteVAE
from dgrad_export.codec.session import open_session, run_session

AT_ONCE = 256


@torch.no_grad()
def compare_bounds(model: DiscreteVAE, before: bytes, after: bytes, split: Split) -> dict[str, Any]:
    """The bound of a split with two decoders in onnxruntime, on the same codes: one drawn for each image.

    Args:
        model: the model whose encoder draws the codes, on the CPU, in evaluation mode.
        before, after: decoders' graphs that give `image` and `outputs`.
        split: the images, binarised as in the run.

    Returns:
        `bound_before`, `bound_after`, their difference `change` and its `standard_error`, in the likelihood's `unit`.
        The number of `images`, and `largest`, the largest difference of a pixel in [0, 1].
    """
    sessions = [open_session(graph) for graph in (before, after)]
    generator = evaluation_generator(torch.device("cpu"), 0)
    kl, largest = 0.0, 0.0
    losses: list[Tensor] = []  # [2, B] each
    for images in split.images.split(AT_ONCE):
        images = unit(images)
        posterior = model.posterior(images)
        codes = model.layer.sample(posterior.logits, generator=generator)[0]
        feed = {"code": model.layer.indices(codes).numpy()}
        if (style := posterior.draw(generator=generator)) is not None:
            feed["style"] = style.numpy()
        results = [run_session(session, ["image", "outputs"], feed) for session in sessions]
        pixels = images.flatten(1)
        losses.append(torch.stack([model.likelihood.loss(torch.from_numpy(outputs), pixels) for _, outputs in results]))
        kl += float(model.layer.kl(posterior.logits).double().sum())
        kl += 0.0 if posterior.gaussian is None else float(posterior.gaussian.kl().double().sum())
        largest = max(largest, float(abs(results[0][0] - results[1][0]).max()))
    first, second = torch.cat(losses, 1).double()
    count = len(split)
    change = second - first
    return {
        "bound_before": float(first.mean()) + kl / count,
        "bound_after": float(second.mean()) + kl / count,
        "change": float(change.mean()),
        "standard_error": float(change.std()) / math.sqrt(count) if count > 1 else None,
        "unit": model.likelihood.unit,
        "images": count,
        "largest": largest,
    }
