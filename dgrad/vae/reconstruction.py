"""The loss of a decoder's outputs as an objective, with the fastest sweep that the decoder allows."""

from __future__ import annotations

import functools
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dgrad.core.curvature import EXAMPLES, Curvature, mean_of_squares, random_signs
from dgrad.core.estimator_tools import vjp
from dgrad.core.evaluations import Evaluation
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.modes import in_transform, without_gradient
from dgrad.core.objective_guards import refuse_batch_norm, warn_if_expensive
from dgrad.core.objectives import LOSSES, FunctionObjective, Objective, check_examples, with_losses_of_sites
from dgrad.core.random import RandomState
from dgrad.core.sites import Problem
from dgrad.errors import InputError
from dgrad.kernels import cpu
from dgrad.kernels.code_sweeps import bernoulli_linear_sweep, difference_sweep, support_is_smaller, support_sweep
from dgrad.vae.dropout import Dropout
from dgrad.vae.likelihoods import Bernoulli, DataLoss, Likelihood, SquaredError
from dgrad.vae.networks import Decoder

COMPILED_LOSSES = {Bernoulli: cpu.bernoulli_loss, SquaredError: cpu.squared_error}
"""Losses of a decoder's outputs, in C++, for tensors that `cpu.serves`."""
WIDE = 32
"""A single variable of that many values is swept by one product of matrices, data times columns of the decoder.

Steps of `direct-rb` on MNIST, one thread, milliseconds without and with it: 5.9 and 6.3 at 1x10, 10.4 and 4.6 at 1x40,
140 and 43 at 1x1024. The compiled kernel: 3.0 and 3.4, 4.8 and 4.2, 61 and 39."""

KEEP_SHAPES = (nn.Flatten, nn.Identity, Dropout, _DropoutNd)
"""Layers that a decoder may have before its first linear one, which still says what it takes."""

OutputLoss = Callable[[Tensor], Tensor]
"""A loss of a decoder's outputs: `[S, B, *outputs] -> [S, B]`, for any number of samples S."""


class DecoderObjective(Objective):
    """The loss of a decoder's outputs, as a function of the code that the decoder gets.

    The decoder sees one batch axis, `[S*B, *code]`, as any torch module does. Where its first layer is an `nn.Linear`
    for the whole code, perhaps after an `nn.Flatten`, it gets `[S*B, n*k]`. Then a changed code costs the difference of
    two columns of that layer, and the layers behind it. For one linear layer and `dgrad.bernoulli` the sweep is nearly
    free.

    Args:
        decoder: any module whose outputs are a function of the code alone.
        loss: `dgrad.bernoulli(x)`, `dgrad.squared_error(x)`, or any function of the outputs, `[S, B, *outputs] -> [S,
            B]`.
        compiled: whether compiled kernels may be used. Their first use on a machine takes a second or two. With None
            they are where there is a compiler.
        couples_examples: see `Objective`.
        bytes_per_call: what the outputs of the decoder's layers may take in one call of a sweep; None for what suits
            the device.

    Raises:
        InputError: the decoder is no module, or the loss no function.

    Attributes:
        sweep_dtype: the precision in which sweeps multiply matrices.
        numbers_per_code: about how many numbers the decoder computes for one code; known when it has run once.
    """

    loss_axes = 2
    """How many axes the losses have: samples and batch, and sites where each has a loss of its own."""

    def __init__(
        self,
        decoder: nn.Module,
        loss: OutputLoss,
        *,
        compiled: bool | None = None,
        couples_examples: bool = False,
        bytes_per_call: int | None = None,
    ) -> None:
        if not isinstance(decoder, nn.Module):
            raise InputError(
                f"the decoder is a {type(decoder).__name__}; expected a torch.nn.Module: for a function write "
                "dgrad.objective(lambda codes: loss(function(codes)))"
            )
        if not callable(loss):
            raise InputError(
                f"the loss is a {type(loss).__name__}; expected a function of the decoder's outputs, such as "
                "dgrad.bernoulli(x)"
            )
        self.decoder = decoder
        self.output_loss = loss
        self.compiled = compiled
        self.couples_examples = couples_examples
        self.sweep_bytes = bytes_per_call
        self.sweep_dtype = torch.float32
        self.numbers_per_code = 0
        self.front = _linear_front(_layers(decoder, through_wrappers=True), KEEP_SHAPES)
        self.first, self.rest = _first_and_rest(decoder)
        self.embedding = _embedding_front(_layers(decoder))
        own = [module.generator for module in decoder.modules() if isinstance(module, Dropout) and module.training]
        self.generators: list[Generator] = [generator for generator in own if generator is not None]

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch *sites"]:
        kernel = self._kernel(codes)
        return self._loss_and_hidden(codes)[0] if kernel is None else kernel.loss

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        kernel = self._kernel(codes)
        if kernel is not None:
            return DecoderEvaluation(self, codes, kernel.loss, kernel=kernel)
        state = RandomState(codes.device, self.generators)
        loss, hidden = self._loss_and_hidden(codes)
        return DecoderEvaluation(self, codes, loss, state if state.has_moved() else None, hidden=hidden)

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        state = RandomState(codes.device, self.generators)
        losses = self.shared(codes, batch)
        if not state.has_moved():
            return losses
        each = codes.unsqueeze(1).expand(-1, batch, *codes.shape[1:])  # every example has its own random numbers
        return torch.cat([state.again(self._loss_and_hidden, code)[0] for code in each.split(1)])

    def shared(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        refuse_batch_norm(self.decoder)
        return self._loss_and_hidden(codes.unsqueeze(1), batch)[0]

    def of_call(self, problem: Problem) -> Objective:
        if isinstance(self.output_loss, DataLoss):
            check_examples(len(self.output_loss.data), len(problem.given))
        if problem.credit == "example":
            return self
        if isinstance(self.output_loss, DataLoss):
            raise InputError(
                f"dgrad.{self.output_loss.likelihood.name.replace('-', '_')} has one loss for each example, and credit="
                f"{problem.credit!r} needs one for each site; expected a loss= of yours, [samples, batch, sites, "
                "*outputs] -> [samples, batch, sites]"
            )
        return with_losses_of_sites(self)

    @property
    def cost_advice(self) -> tuple[object, list[str]]:
        return type(self.decoder), ["fewer variables"]

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        if not isinstance(self.output_loss, DataLoss):
            return super().curvature(codes, generator=generator)
        refuse_batch_norm(self.decoder)  # its statistics would count these codes twice
        codes, others = codes.detach().tensor_split([EXAMPLES], 1)

        def outputs(codes: Tensor) -> Tensor:
            return _in_one_batch(self._decode, self.inputs(torch.cat([codes, others], 1))[:, : codes.shape[1]])

        values, carry = vjp(outputs, codes)
        # P = J' sqrt(C) v: with random signs v, P P' has the mean J' C J
        root = self.output_loss.likelihood.root_curvature(values)
        return mean_of_squares(carry(root * random_signs(root, generator))[0])

    def inputs(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples #batch *inputs"]:
        """What the decoder gets for these codes."""
        return codes

    def code_weight(self) -> Float[Tensor, "*batch width coordinates"]:
        """The weight of the decoder's first layer for the code, perhaps one for each example."""
        assert self.first is not None
        return self.first.weight

    @property
    def sees_code_alone(self) -> bool:
        """Whether nothing but the code enters the decoder."""
        return True

    def begins_linear(self, inputs: Tensor) -> bool:
        """Whether the first layer is linear in all of these inputs."""
        return self.first is not None and self.first.in_features == math.prod(inputs.shape[2:])

    def takes_rows(self, codes: Float[Tensor, "samples batch sites n k"]) -> bool:
        return self.sees_code_alone and self.begins_linear(codes)

    @property
    def linear_bernoulli(self) -> bool:
        """Whether the decoder is one linear layer, which sees nothing but the code, and its loss `dgrad.bernoulli`."""
        linear = self.first is not None and len(self.rest) == 0 and self.sees_code_alone
        return linear and isinstance(self.output_loss, DataLoss) and isinstance(self.output_loss.likelihood, Bernoulli)

    def changed_loss(self, hidden: Float[Tensor, "samples batch width"]) -> Float[Tensor, "samples batch"]:
        """The loss from the first layer's outputs on, without a gradient and in the precision of a sweep."""
        return self._checked_loss(self._without_gradient(self.rest, hidden))

    def loss_of_changed(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch"]:
        """The loss of codes by any decoder, without a gradient and in the precision of a sweep."""
        return self._checked_loss(self._without_gradient(self._decode, self.inputs(codes)))

    def losses_of_values(self, values: Int[Tensor, "codes n"], like: Tensor) -> Float[Tensor, "codes batch"]:
        """The loss of every example at codes given by the values of their rows, without a gradient.

        Args:
            like: the codes that are swept, `[S, B, n, k]`.
        """
        _, batch, n, k = like.shape
        if self.first is None or self.first.in_features != n * k:
            one_hot = values.unsqueeze(-1) == torch.arange(k, device=values.device)  # [R, n, k]
            outputs = self._without_gradient(self._decode, self.inputs(one_hot.to(like.dtype).unsqueeze(1)))
        else:
            columns = self.first.weight.T[values + k * torch.arange(n, device=values.device)].sum(1)  # [R, width]
            hidden = columns if self.first.bias is None else columns + self.first.bias
            outputs = self._without_gradient(self.rest, hidden.unsqueeze(1))
        return self._checked_loss(outputs, batch)

    def _kernel(self, codes: Tensor) -> cpu.LinearCodes | None:
        """Hard codes in the compiled kernel of a linear decoder, or None for other codes, decoders and machines."""
        if not self.linear_bernoulli or codes.ndim != 4 or not self.begins_linear(codes):
            return None
        assert self.first is not None and isinstance(self.output_loss, DataLoss)
        differentiated = codes.requires_grad and torch.is_grad_enabled()
        data, weight, bias = self.output_loss.data, self.first.weight, self.first.bias
        if differentiated or data.requires_grad or codes.shape[1] != len(data) or len(weight) != data.shape[1]:
            return None
        if not self._compiles(codes, data, weight):
            return None
        n, k = codes.shape[2:]
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return cpu.BernoulliLinear(weight, bias, data, (n, k)).at(codes)

    def _compiles(self, *tensors: Tensor) -> bool:
        if torch.compiler.is_compiling() or in_transform() or self.compiled is False:
            return False
        return (self.compiled or _there_is_a_compiler()) and cpu.serves(*tensors)

    def _loss_and_hidden(self, codes: Tensor, batch: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The loss, and the outputs of the first layer where the decoder begins with a linear one."""
        inputs = self.inputs(codes)
        self._check_inputs(inputs)
        if not self.begins_linear(inputs):
            return self._checked_loss(_in_one_batch(self._decode, inputs), batch), None
        assert self.first is not None
        hidden = _in_one_batch(self.first, inputs.flatten(2))
        return self._checked_loss(_in_one_batch(self.rest, hidden), batch), hidden.detach()

    def _check_inputs(self, inputs: Tensor) -> None:
        """Make sure that a decoder that begins with a linear layer takes inputs `[S, B, *inputs]`."""
        if self.front is None:
            return
        numbers, width = math.prod(inputs.shape[2:]), self.front.in_features
        if width not in (numbers, math.prod(inputs.shape[self.loss_axes :]), inputs.shape[-1]):
            raise InputError(
                f"the decoder begins with a linear layer of {width} inputs, and a code {list(inputs.shape[2:])} has "
                f"{numbers} numbers; expected nn.Linear({numbers}, ...)"
            )
        ours, theirs = inputs.dtype, self.front.weight.dtype
        if ours != theirs and not torch.is_autocast_enabled(inputs.device.type):
            raise InputError(
                f"codes of {ours}, which is the dtype of the logits, for a decoder of {theirs}; expected the same of "
                f"both: logits.to({theirs}), or torch.autocast"
            )

    def _checked_loss(self, outputs: Tensor, batch: int | None = None) -> Tensor:
        if not self.numbers_per_code:
            widths = sum(module.out_features for module in self.decoder.modules() if isinstance(module, nn.Linear))
            self.numbers_per_code = max(widths, math.prod(outputs.shape[2:]))
        if isinstance(self.output_loss, DataLoss):
            check_examples(len(self.output_loss.data), len(self.output_loss.data) if batch is None else batch)
            return self._data_loss(self.output_loss, outputs)
        outputs = outputs if batch is None else outputs.expand(-1, batch, *outputs.shape[2:])
        loss, shape = self.output_loss(outputs), outputs.shape[: self.loss_axes]
        if loss.shape != shape:
            each, axes, remedy = LOSSES[self.loss_axes]
            raise InputError(
                f"the loss returned shape {list(loss.shape)} for outputs of shape {list(outputs.shape)}; expected one "
                f"number for each {each}, [{axes}] = {list(shape)}: {remedy}"
            )
        return loss

    def _data_loss(self, loss: DataLoss, outputs: Tensor) -> Tensor:
        """A known loss, by a compiled kernel where there is one."""
        compiled = COMPILED_LOSSES.get(type(loss.likelihood))
        flat = outputs.flatten(2)
        fits = flat.shape[1:] == loss.data.shape and not loss.data.requires_grad
        if compiled is not None and fits and self._compiles(flat, loss.data):
            return compiled(flat, loss.data)
        return loss(outputs)

    def _decode(self, inputs: Tensor) -> Tensor:
        """The whole decoder's outputs for inputs `[S*B, *code]`."""
        if self.front is not None:
            for axis in range(1, self.loss_axes):  # all of the inputs of an example, or those of each of its sites
                if self.front.in_features == math.prod(inputs.shape[axis:]):
                    return self.decoder(inputs.flatten(axis))
        if self.embedding is not None:
            return self._decode_embedded(inputs, self.embedding)
        try:
            return self.decoder(inputs)
        except RuntimeError as error:
            if "indices" in str(error):
                raise InputError(
                    "the decoder looks up indices, and a decoder gets codes, one-hot rows; expected one that begins "
                    "with a plain nn.Embedding, or dgrad.objective(lambda indices: loss(decoder(indices)), "
                    "indices=True)"
                ) from error
            if "shape" not in str(error) and "size" not in str(error):
                raise
            raise InputError(
                f"the decoder failed on codes of shape {list(inputs.shape)} ({str(error).splitlines()[0]}); expected "
                "a decoder of such codes: where it takes them flat, nn.Sequential(nn.Flatten(), decoder)"
            ) from error

    def _decode_embedded(self, inputs: Tensor, embedding: nn.Embedding) -> Tensor:
        """The outputs of a decoder that begins with an embedding: that of a one-hot row is its product with it."""
        if inputs.ndim < 3 or inputs.shape[-1] != embedding.num_embeddings:
            k = inputs.shape[-1]
            raise InputError(
                f"the decoder begins with an embedding of {embedding.num_embeddings} values, and a code has the shape "
                f"{list(inputs.shape[1:])}; expected rows of that many values, or nn.Embedding({k}, ...)"
            )
        outputs = inputs @ embedding.weight
        for layer in list(_layers(self.decoder))[1:]:
            outputs = layer(outputs)
        return outputs

    def _without_gradient(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """The outputs of the decoder, or of a part of it, as a sweep needs them."""
        if self.sweep_dtype == torch.float32:
            return _in_one_batch(network, inputs)
        with torch.autocast(inputs.device.type, self.sweep_dtype, cache_enabled=False):
            outputs = _in_one_batch(network, inputs)
        return outputs.to(inputs.dtype)


class DecoderEvaluation(Evaluation):
    """The loss of codes by a decoder, swept from the outputs of its first layer where that is linear."""

    objective: DecoderObjective

    def __init__(
        self,
        objective: DecoderObjective,
        codes: Tensor,
        loss: Tensor,
        noise: RandomState | None = None,
        *,
        hidden: Tensor | None = None,
        kernel: cpu.LinearCodes | None = None,
    ) -> None:
        super().__init__(objective, codes, loss, noise)
        self.hidden = hidden  # [S, B, width]
        self.kernel = kernel

    @property
    def linear_bernoulli(self) -> bool:
        """Whether the sweep is that of one linear layer with Bernoulli outputs, which `torch.func` cannot transform."""
        return not in_transform() and self.objective.linear_bernoulli and self.objective.begins_linear(self.codes)

    @property
    def support_serves(self) -> bool:
        """Whether the decoder may be evaluated once for all examples."""
        return self.noise is None and self.allowed is None and self.objective.sees_code_alone

    @without_gradient
    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        of, codes = self.objective, self.codes
        if self.support_serves and codes.shape[-2] == 1 and codes.shape[-1] >= WIDE:
            return self._support_sweep()
        table = None if self.kernel is None else self.kernel.sweep()
        if table is not None:
            return table
        if self.linear_bernoulli:  # faster than any evaluation of codes
            assert isinstance(of.output_loss, DataLoss)
            hidden, compiled = self.first_outputs(), codes.is_cuda and of.compiled is not False
            assert hidden is not None
            return bernoulli_linear_sweep(
                codes, of.code_weight(), hidden, of.output_loss.data, self.loss.detach(), compiled=compiled
            )
        if self.support_serves and support_is_smaller(codes):
            return self._support_sweep()
        return super().sweep()

    def _support_sweep(self) -> Float[Tensor, "samples batch n k"]:
        of = self.objective
        refuse_batch_norm(of.decoder)
        losses_of = functools.partial(of.losses_of_values, like=self.codes)
        # a compiled kernel does not count them
        numbers = of.numbers_per_code or (1 if of.front is None else of.front.out_features)
        return support_sweep(self.codes, losses_of, numbers_per_code=numbers)

    def full_sweep_is_free(self, rows: int) -> bool:
        return self.linear_bernoulli or (self.support_serves and support_is_smaller(self.codes, rows))

    @without_gradient
    def changed(self, rows: Int[Tensor, "samples batch m"]) -> Float[Tensor, "samples batch n k"]:
        of, codes, noise = self.objective, self.codes, self.noise
        refuse_batch_norm(of.decoder)
        hidden = self.first_outputs()
        if hidden is None:
            function = FunctionObjective(of.loss_of_changed, bytes_per_call=of.sweep_bytes)
            function.least_bytes = codes.element_size() * of.numbers_per_code
            plain = Evaluation(function, codes, self.loss, noise)
            plain.allowed = self.allowed
            return plain.changed(rows)
        warn_if_expensive(rows.shape[-1] * (codes.shape[-1] - 1), *of.cost_advice)
        rest_loss = of.changed_loss if noise is None else self._changed_loss_with_same_noise
        return difference_sweep(
            codes,
            *self.changes(rows),
            of.code_weight(),
            hidden,
            rest_loss,
            self.loss.detach(),
            numbers_per_code=of.numbers_per_code,
            bytes_per_call=of.sweep_bytes,
        )

    def _changed_loss_with_same_noise(self, hidden: Tensor) -> Tensor:
        """The loss from the outputs of the first layer on, `[C*S, B, width]`."""
        assert self.hidden is not None
        changed = hidden.unflatten(0, (-1, len(self.hidden)))
        return self.with_same_noise(self.objective.changed_loss, changed, self.hidden).flatten(0, 1)

    def first_outputs(self) -> Float[Tensor, "samples batch width"] | None:
        """The outputs of the first layer, or None where the decoder does not begin with a linear one."""
        if self.hidden is None and self.kernel is not None:
            assert self.objective.first is not None
            self.hidden = self.objective.first(self.codes.flatten(2)).detach()
        return self.hidden


@runtime_checkable
class GenerativeModel(Protocol):
    """What a reconstruction loss asks of a model: `dgrad.vae.model.DiscreteVAE` has it."""

    layer: LatentLayer
    decoder: nn.Module
    likelihood: Likelihood
    gaussian: int
    concatenate_gaussian: bool
    compiled_kernels: bool
    sweep_dtype: torch.dtype

    @property
    def numbers_per_code(self) -> int: ...

    def decoder_inputs(self, codes: Tensor, gaussian: Tensor | None) -> Tensor: ...


class Reconstruction(DecoderObjective):
    """`-log p(image | code)` of a model, perhaps with Gaussian variables beside the code."""

    def __init__(
        self, model: GenerativeModel, pixels: Float[Tensor, "batch d"], gaussian: Float[Tensor, "batch g"] | None = None
    ) -> None:
        super().__init__(model.decoder, DataLoss(model.likelihood, pixels), compiled=model.compiled_kernels)
        self.decoder_inputs = model.decoder_inputs
        self.concatenate_gaussian = model.concatenate_gaussian
        self.numbers_per_code = model.numbers_per_code
        self.sweep_dtype = model.sweep_dtype
        self.gaussian = gaussian

    def inputs(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch *inputs"]:
        return self.decoder_inputs(codes, self.gaussian)

    @property
    def sees_code_alone(self) -> bool:
        return self.gaussian is None

    def code_weight(self) -> Float[Tensor, "*batch width coordinates"]:
        weight = super().code_weight()
        if self.gaussian is None:
            return weight
        if self.concatenate_gaussian:
            return weight[:, : -self.gaussian.shape[-1]]
        weight = weight.view(len(weight), -1, self.gaussian.shape[-1])  # [width, n*k, g]
        # sum_g W[:, (i, j, g)] c_g, in the order of memory that the sweep needs
        return torch.einsum("wxg,bg->bxw", weight, self.gaussian).mT


def _first_and_rest(decoder: nn.Module) -> tuple[nn.Linear | None, nn.Sequential]:
    """A decoder's first layer, where it is a linear one, and what comes behind it."""
    if isinstance(decoder, Decoder):
        return decoder.first, decoder.rest
    layers = list(_layers(decoder))
    front = _linear_front(layers)
    if front is None or _does_more(front):
        return None, nn.Sequential()
    return front, nn.Sequential(*layers[layers.index(front) + 1 :])


def _embedding_front(layers: Iterable[nn.Module]) -> nn.Embedding | None:
    """The first of these layers, where it is an `nn.Embedding` that does nothing but look up."""
    first = next(iter(layers), None)
    if type(first) is not nn.Embedding or _does_more(first):
        return None
    does_more = first.max_norm is not None or first.padding_idx is not None or first.scale_grad_by_freq or first.sparse
    return None if does_more else first


def _linear_front(layers: Iterable[nn.Module], behind: tuple[type[nn.Module], ...] = (nn.Flatten,)) -> nn.Linear | None:
    """The first of these layers behind an `nn.Flatten`, or such, where it is an `nn.Linear`."""
    first = next((layer for layer in layers if not isinstance(layer, behind)), None)
    return first if isinstance(first, nn.Linear) and type(first).forward is nn.Linear.forward else None


def _does_more(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says: it has hooks, or a forward of its own."""
    # Accelerate puts autocast around forward, which computes the same.
    replaced = "forward" in vars(module) and not hasattr(module, "_original_forward")
    return bool(replaced or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _layers(network: nn.Module, *, through_wrappers: bool = False) -> Iterator[nn.Module]:
    """The modules that a network calls one after the other.

    Args:
        through_wrappers: whether to look into what has hooks, is compiled or trained in parallel, and must be called as
            a whole.
    """
    if through_wrappers:
        for name in ("_orig_mod", "module"):  # of torch.compile, of DataParallel and its relatives
            inner = getattr(network, name, None)
            network = inner if isinstance(inner, nn.Module) else network
    if type(network) is not nn.Sequential or (_does_more(network) and not through_wrappers):
        yield network
        return
    for module in network:
        yield from _layers(module, through_wrappers=through_wrappers)


def _in_one_batch(
    network: Callable[[Tensor], Tensor], inputs: Float[Tensor, "samples batch *inputs"]
) -> Float[Tensor, "samples batch *outputs"]:
    """A network's outputs, where it gets samples and examples in one axis."""
    outputs: Any = network(inputs.flatten(0, 1))
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"the decoder returned a {type(outputs).__name__}; expected a tensor of outputs [batch, ...]: a module "
            "around it picks the part that the loss needs"
        )
    return outputs.unflatten(0, inputs.shape[:2])


@functools.cache
def _there_is_a_compiler() -> bool:
    return any(shutil.which(name) for name in (*shlex.split(os.environ.get("CXX", ""))[:1], "c++", "g++"))
