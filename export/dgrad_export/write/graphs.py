"""A trained model as two serialised ONNX graphs."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx
import torch
from onnx import ModelProto
from torch import Generator, Tensor, nn

import dgrad
from dgrad.errors import RunError
from dgrad.vae.model import DiscreteVAE

BATCH = "batch"

_LEAKS = re.compile(rb"""\.py["':,\s]|site-packages|dgrad_export/|File \\?["']""")
"""Traces of source code in the exporter's notes."""


class Encode(nn.Module):
    """Images `[B, C, H, W]` in [0, 1] to the tensors that `encoder_outputs` names.

    With `sampling` a second input, `uniform` `[B, *layer.shape]` in (0, 1), becomes the Gumbel noise of a draw of the
    code. The randomness comes from outside, so that a draw can be repeated.
    """

    def __init__(self, model: DiscreteVAE, *, rounds: bool, sampling: bool = False) -> None:
        super().__init__()
        self.model = model
        self.rounds = rounds
        self.sampling = sampling

    def forward(self, image: Tensor, uniform: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.rounds:
            image = (image >= 0.5).to(image.dtype)
        posterior = self.model.posterior(image)
        outputs = [posterior.logits, self._code(posterior.logits)]
        if uniform is not None:
            outputs.append(self._code(posterior.logits + gumbel(uniform)))
        if posterior.gaussian is not None:
            outputs += [posterior.gaussian.mean, posterior.gaussian.log_variance]
        return tuple(outputs)

    def _code(self, potentials: Tensor) -> Tensor:
        return self.model.layer.indices(self.model.layer.argmax(potentials))


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform noise in (0, 1)."""
    return -torch.log(-torch.log(uniform))


def encoder_inputs(model: DiscreteVAE, images: Tensor, *, sampling: bool, generator: Generator) -> dict[str, Tensor]:
    """The inputs of an encoder by name: these images, with sampling also the noise of a draw for each."""
    if not sampling:
        return {"image": images}
    uniform = torch.rand(len(images), *model.layer.shape, generator=generator)
    return {"image": images, "uniform": uniform.clamp(min=torch.finfo(torch.float32).tiny)}


def encoder_outputs(model: DiscreteVAE, *, sampling: bool) -> list[str]:
    """The outputs of an encoder: logits, code, with sampling a draw, in a mixed model mean and log-variance."""
    return ["logits", "code"] + ["sample"] * sampling + ["mean", "log_variance"] * (model.gaussian > 0)


class Decode(nn.Module):
    """The integer form of codes, in a mixed model with `style` `[B, g]` beside it, to images `[B, C, H, W]` in [0, 1].

    With `outputs` it also gives the decoder's outputs `[B, C*H*W]`, which the likelihood takes.
    """

    def __init__(self, model: DiscreteVAE, *, outputs: bool = False) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, code: Tensor, style: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        model, codes = self.model, self.model.layer.codes(code)
        if not self.outputs:
            return model.decode(codes, style)
        outputs = model.decoder(model.decoder_inputs(codes, style))
        return model.likelihood.mean(outputs).unflatten(-1, model.image_shape), outputs


def code_shape(model: DiscreteVAE) -> tuple[int, ...]:
    """The shape of one code's integer form."""
    layer = model.layer
    return tuple(layer.indices(layer.argmax(torch.zeros(1, *layer.shape))).shape[1:])


def encoder_graph(
    model: DiscreteVAE, *, rounds: bool, opset: int, metadata: Mapping[str, str], sampling: bool = False
) -> bytes:
    """`image`, with `sampling` also `uniform`, to the encoder's outputs. With `rounds` pixels are rounded at 0.5 first.

    Raises:
        RunError: the model cannot be exported.
    """
    images = torch.full((2, *model.image_shape), 0.25)
    examples = encoder_inputs(model, images, sampling=sampling, generator=Generator().manual_seed(0))
    module = Encode(model, rounds=rounds, sampling=sampling)
    return _graph(module, examples, encoder_outputs(model, sampling=sampling), opset, metadata)


def decoder_graph(model: DiscreteVAE, *, opset: int, metadata: Mapping[str, str], outputs: bool = False) -> bytes:
    """`code`, in a mixed model also `style`, to `image`. With `outputs` also to the input of the likelihood.

    Raises:
        RunError: the model cannot be exported.
    """
    layer = model.layer
    examples = {"code": layer.indices(layer.argmax(torch.zeros(2, *layer.shape)))}
    if model.gaussian:
        examples["style"] = torch.full((2, model.gaussian), 0.25)
    return _graph(Decode(model, outputs=outputs), examples, ["image"] + ["outputs"] * outputs, opset, metadata)


def images_only(decoder: bytes) -> bytes:
    """A decoder's graph without its output `outputs`."""
    proto = onnx.load_from_string(decoder)
    kept = [value for value in proto.graph.output if value.name == "image"]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def _graph(
    module: nn.Module, examples: Mapping[str, Tensor], outputs: list[str], opset: int, metadata: Mapping[str, str]
) -> bytes:
    batch = torch.export.Dim(BATCH)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                tuple(examples.values()),
                dynamo=True,
                external_data=False,
                input_names=list(examples),
                output_names=outputs,
                dynamic_shapes=tuple({0: batch} for _ in examples),
                opset_version=opset,
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
        _strip(proto)
        _check_opset(proto, opset)
        _check_batch(proto)
        _check_leaks(proto)
        proto.producer_name = "dgrad"
        proto.producer_version = dgrad.__version__
        for key, value in metadata.items():
            proto.metadata_props.add(key=f"dgrad.{key}", value=value)
        onnx.checker.check_model(proto, full_check=True)
        return proto.SerializeToString(deterministic=True)
    except RunError:
        raise
    except Exception as error:  # the exporter raises whatever the model's own code raises
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps it in advice on debugging the exporter
            cause = cause.__cause__
        detail = " ".join(str(cause).split())[:300]
        raise RunError(
            f"the {type(module).__name__.lower()}r cannot be exported: {type(cause).__name__}: {detail}; "
            "expected operations that ONNX has and a free batch size: change the model or its latent"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout or stderr, no logging, no warnings. Failures raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _strip(message: Any) -> None:
    """Clear every note of the exporter, at any depth. Some are stack traces with source paths."""
    for name in ("metadata_props", "doc_string"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            # A repeated field has a length, a message none.
            for part in value if hasattr(value, "__len__") else [value]:
                _strip(part)


def _check_opset(proto: ModelProto, opset: int) -> None:
    found = {entry.domain: entry.version for entry in proto.opset_import}
    # Where the exporter cannot convert, it warns and keeps its own opset.
    if found.get("") != opset:
        raise RunError(f"the exporter wrote opset {found.get('')}, not {opset}; ask for opset {found.get('')}")


def _check_batch(proto: ModelProto) -> None:
    """Make the first axis of all inputs and outputs the one free axis."""
    for value in (*proto.graph.input, *proto.graph.output):
        axes = value.type.tensor_type.shape.dim
        if not axes or not axes[0].dim_param:
            size = axes[0].dim_value if axes else "none"
            raise RunError(
                f"{value.name} has a fixed batch axis ({size}) in the exported graph; expected a free one: "
                "the model's code must not depend on the batch size"
            )
        # An equivalent expression. `compare` runs the graph at several sizes.
        axes[0].dim_param = BATCH


def _check_leaks(proto: ModelProto) -> None:
    skeleton = ModelProto()
    skeleton.CopyFrom(proto)
    for tensor in skeleton.graph.initializer:
        tensor.ClearField("raw_data")
    if found := _LEAKS.search(skeleton.SerializeToString()):
        text = found[0].decode(errors="replace")
        raise RunError(f"the exported graph still names its source code ({text!r}); please report this torch version")
