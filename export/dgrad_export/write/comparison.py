"""Whether exported graphs compute what torch computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from dgrad.errors import RunError
from dgrad.vae.model import DiscreteVAE
from dgrad_export.check.reference import IMAGE_TOLERANCE, LOGIT_TOLERANCE
from dgrad_export.codec.session import open_session
from dgrad_export.write.graphs import Decode, Encode, encoder_inputs, encoder_outputs, gumbel

BATCH_SIZES = (1, 2, 7, 256)
COUNT = max(BATCH_SIZES)

TIE_TOLERANCE = 1e-5
"""The largest difference of the scores `<logits, z>` of two codes in a tie, times the largest logit if above 1."""


@torch.no_grad()
def compare(
    model: DiscreteVAE,
    encoder: bytes,
    decoder: bytes,
    images: Tensor,
    *,
    rounds: bool,
    sampling: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Run both graphs in onnxruntime and in torch, at several batch sizes.

    The encoder gets these images. The decoder gets their codes, and random ones.

    Args:
        model: the model of the graphs, in evaluation mode, on the CPU.
        images: `[256, C, H, W]` float32 in [0, 1].
        rounds: whether the encoder rounds pixels at 0.5 first.
        sampling: whether the encoder also draws codes.
        seed: the seed of the random codes, style and noise.

    Returns:
        The largest absolute differences of `logits` and `image`, in a mixed model also of `mean` and `log_variance`,
        and `tied_codes`, the number of codes that differed in a tie.

    Raises:
        RunError: a graph does not run, or differs by more than rounding explains.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = encoder_inputs(model, images, sampling=sampling, generator=generator)
    names = encoder_outputs(model, sampling=sampling)
    encode = Encode(model, rounds=rounds, sampling=sampling).eval()
    encoded = dict(zip(names, encode(*inputs.values()), strict=True))
    differences, tied = _compare_encoder(model, _Graph("encoder", encoder), inputs, encoded)
    differences["image"] = _compare_decoder(model, _Graph("decoder", decoder), encoded["code"], generator)
    return {**differences, "tied_codes": tied, "batch_sizes": list(BATCH_SIZES)}


def _compare_encoder(
    model: DiscreteVAE, run: _Graph, inputs: dict[str, Tensor], expected: dict[str, Tensor]
) -> tuple[dict[str, float], int]:
    """The largest difference of each output of real numbers, and the number of images with another code in a tie."""
    potentials = {"code": expected["logits"]}
    if "uniform" in inputs:
        potentials["sample"] = expected["logits"] + gumbel(inputs["uniform"])
    differences = {name: 0.0 for name in expected if name not in potentials}
    tied: set[int] = set()
    for size in BATCH_SIZES:
        results = run(list(expected), {name: values[:size] for name, values in inputs.items()})
        got = dict(zip(expected, results, strict=True))
        for name in differences:
            allowed = LOGIT_TOLERANCE * expected[name][:size].abs().clamp(min=1)
            difference = _difference(name, got[name], expected[name][:size], allowed, size)
            differences[name] = max(differences[name], difference)
        for name, scores in potentials.items():
            tied |= _tied_codes(model, scores[:size], expected[name][:size], got[name], size)
    return differences, len(tied)


def _compare_decoder(model: DiscreteVAE, run: _Graph, code: Tensor, generator: Generator) -> float:
    """The largest difference of an image, for these codes and for random ones."""
    layer = model.layer
    random_codes = layer.indices(layer.sample(torch.zeros(COUNT, *layer.shape), generator=generator)[0])
    style = model.prior_gaussian(COUNT, generator=generator)
    decode = Decode(model).eval()
    allowed = torch.tensor(IMAGE_TOLERANCE)
    largest = 0.0
    for codes in (code, random_codes):
        inputs = {"code": codes} if style is None else {"code": codes, "style": style}
        expected = decode(*inputs.values())
        for size in BATCH_SIZES:
            (got,) = run(["image"], {name: values[:size] for name, values in inputs.items()})
            largest = max(largest, _difference("image", got, expected[:size], allowed, size))
    return largest


class _Graph:
    """A graph in onnxruntime that takes and gives tensors."""

    def __init__(self, name: str, model: bytes) -> None:
        self.name = name
        try:
            self.session = open_session(model)
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise self._failure("load", error) from error

    def __call__(self, outputs: list[str], inputs: dict[str, Tensor]) -> list[Tensor]:
        try:
            results = self.session.run(outputs, {name: values.numpy() for name, values in inputs.items()})
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            size = len(next(iter(inputs.values())))
            raise self._failure(f"run, at batch size {size},", error) from error
        return [torch.from_numpy(np.asarray(result)) for result in results]

    def _failure(self, action: str, error: Exception) -> RunError:
        detail = " ".join(str(error).split())[:300]
        return RunError(
            f"onnxruntime does not {action} the exported {self.name}: {detail}; nothing was written: try another opset"
        )


def _difference(name: str, got: Tensor, expected: Tensor, allowed: Tensor, size: int) -> float:
    """The largest absolute difference.

    Raises:
        RunError: another shape or dtype, or a difference larger than `allowed`.
    """
    _check_kind(name, got, expected, size)
    # Equal infinities do not differ. A nan on either side makes a nan, which no tolerance allows.
    difference = torch.where(got == expected, 0.0, (got.double() - expected.double()).abs())
    largest = float(difference.max())
    if not bool((difference <= allowed).all()):
        raise RunError(
            f"exported {name} differs from torch by {largest:.3g} at batch size {size}; "
            f"{float(allowed.min()):g} is allowed: nothing was written; try another opset"
        )
    return largest


def _check_kind(name: str, got: Tensor, expected: Tensor, size: int) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise RunError(
            f"exported {name} is {list(got.shape)} of {got.dtype} at batch size {size}; "
            f"torch gives {list(expected.shape)} of {expected.dtype}: nothing was written; "
            "the model's code must not depend on the batch size"
        )


def _tied_codes(model: DiscreteVAE, logits: Tensor, code: Tensor, got: Tensor, size: int) -> set[int]:
    """The images with another code than in torch, where the two codes are equally good.

    Raises:
        RunError: a code differs that is no tie.
    """
    _check_kind("code", got, code, size)
    different = (got != code).reshape(size, -1).any(1).nonzero()[:, 0]
    if not len(different):
        return set()
    logits = logits[different].double()
    axes = tuple(range(1, logits.ndim))
    try:
        codes = [model.layer.codes(integers[different], torch.float64) for integers in (code, got)]
        # log q(z) = <logits, z> - log Z: Z is the same for both codes.
        gap = (logits * (codes[0] - codes[1])).sum(axes).abs()
    except (RuntimeError, ValueError, IndexError) as error:  # numbers that are no code
        detail = " ".join(str(error).split())
        raise RunError(f"exported code is none of {model.layer} ({detail}); nothing was written") from error
    allowed = TIE_TOLERANCE * logits.abs().amax(axes).clamp(min=1)
    if not bool((gap <= allowed).all()):
        raise RunError(
            f"exported code differs from torch in {len(different)} of {size} images, by up to {float(gap.max()):.3g} "
            f"in log q(z), more than a tie's {TIE_TOLERANCE:g}; nothing was written: try another opset"
        )
    return set(different.tolist())
