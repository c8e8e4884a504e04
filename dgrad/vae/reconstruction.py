"""The reconstruction loss as an objective, with the fastest sweep that a decoder allows."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import Evaluation, FunctionObjective, Objective
from dgrad.kernels import cpu
from dgrad.kernels.code_sweeps import bernoulli_linear_sweep, difference_sweep, support_is_smaller, support_sweep
from dgrad.vae.likelihoods import Bernoulli, Likelihood, SquaredError
from dgrad.vae.networks import Decoder

COMPILED_LOSSES = {Bernoulli: cpu.bernoulli_loss, SquaredError: cpu.squared_error}
"""Losses of a decoder's outputs that need no gradient, in C++, for tensors that `cpu.serves`."""


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


class Reconstruction(Objective):
    """`-log p(image | code)`, with the fastest sweep that the decoder allows."""

    def __init__(
        self, model: GenerativeModel, pixels: Float[Tensor, "batch d"], gaussian: Float[Tensor, "batch g"] | None = None
    ) -> None:
        self.layer = model.layer
        self.decoder = model.decoder
        self.decoder_inputs = model.decoder_inputs
        self.concatenate_gaussian = model.concatenate_gaussian
        self.likelihood = model.likelihood
        self.numbers_per_code = model.numbers_per_code
        self.compiled = model.compiled_kernels
        self.sweep_dtype = model.sweep_dtype
        self.pixels = pixels
        self.gaussian = gaussian

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch"]:
        return self._loss_and_hidden(codes)[0]

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        return ReconstructionEvaluation(self, codes, *self._loss_and_hidden(codes))

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        return self._loss_and_hidden(codes.unsqueeze(1))[0]

    @property
    def linear_bernoulli(self) -> bool:
        """Whether one linear layer, which sees nothing but the code, gives the logits of Bernoulli pixels."""
        linear = isinstance(self.decoder, Decoder) and len(self.decoder.rest) == 0
        return linear and isinstance(self.likelihood, Bernoulli) and self.gaussian is None

    def code_weight(self) -> Float[Tensor, "*batch width coordinates"]:
        """The weight of the decoder's first layer for the code, of each example where its Gaussian variables matter."""
        assert isinstance(self.decoder, Decoder)
        weight = self.decoder.first.weight
        if self.gaussian is None:
            return weight
        if self.concatenate_gaussian:
            return weight[:, : -self.gaussian.shape[-1]]
        weight = weight.view(len(weight), -1, self.gaussian.shape[-1])  # [width, n*k, g]
        # sum_g W[:, (i, j, g)] c_g, in the order of memory that the sweep needs
        return torch.einsum("wxg,bg->bxw", weight, self.gaussian).mT

    def changed_loss(self, hidden: Tensor) -> Tensor:
        """The loss from the first layer's outputs on, without a gradient and in the precision of a sweep."""
        assert isinstance(self.decoder, Decoder)
        outputs = self._without_gradient(self.decoder.rest, hidden)
        compiled_loss = COMPILED_LOSSES.get(type(self.likelihood)) if self.compiled else None
        if compiled_loss is not None and cpu.serves(outputs, self.pixels):
            return compiled_loss(outputs, self.pixels)
        return self.likelihood.loss(outputs, self.pixels)

    def loss_of_changed(self, codes: Tensor) -> Tensor:
        """The loss of codes by any decoder, without a gradient and in the precision of a sweep."""
        outputs = self._without_gradient(self.decoder, self.decoder_inputs(codes, self.gaussian))
        return self.likelihood.loss(outputs, self.pixels)

    def losses_of_values(self, values: Int[Tensor, "codes n"]) -> Float[Tensor, "codes batch"]:
        """The loss of every image at codes given by the values of their rows, without a gradient."""
        k = self.layer.shape[-1]
        if not isinstance(self.decoder, Decoder):
            one_hot = values.unsqueeze(-1) == torch.arange(k, device=values.device)  # [R, n, k]
            return self.loss_of_changed(one_hot.to(self.pixels.dtype).unsqueeze(1))
        first = self.decoder.first
        columns = first.weight.T[values + k * torch.arange(values.shape[1], device=values.device)]  # [R, n, width]
        outputs = self._without_gradient(self.decoder.rest, (columns.sum(1) + first.bias).unsqueeze(1))
        return self.likelihood.loss(outputs, self.pixels)

    def _loss_and_hidden(self, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss, and the outputs of the first layer where the decoder is a `Decoder`."""
        inputs = self.decoder_inputs(codes, self.gaussian)
        if not isinstance(self.decoder, Decoder):
            return self.likelihood.loss(self.decoder(inputs), self.pixels), None
        hidden = self.decoder.first(inputs.flatten(2))
        return self.likelihood.loss(self.decoder.rest(hidden), self.pixels), hidden.detach()

    def _without_gradient(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """The outputs of the decoder, or of a part of it, as a sweep needs them."""
        if self.sweep_dtype == torch.float32:
            return network(inputs)
        with torch.autocast(inputs.device.type, self.sweep_dtype, cache_enabled=False):
            outputs: Tensor = network(inputs)
        return outputs.to(inputs.dtype)


class ReconstructionEvaluation(Evaluation):
    """The reconstruction loss of codes, swept from the outputs of the decoder's first layer where there are some."""

    objective: Reconstruction

    def __init__(self, objective: Reconstruction, codes: Tensor, loss: Tensor, hidden: Tensor | None) -> None:
        super().__init__(objective, codes, loss)
        self.hidden = hidden  # [S, B, width]

    @torch.no_grad()
    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        of = self.objective
        if of.linear_bernoulli:  # faster than any evaluation of codes
            assert self.hidden is not None
            weight = of.code_weight()
            return bernoulli_linear_sweep(self.codes, weight, self.hidden, of.pixels, self.loss, compiled=of.compiled)
        if of.gaussian is None and support_is_smaller(self.codes):
            return support_sweep(self.codes, of.losses_of_values, numbers_per_code=of.numbers_per_code)
        return super().sweep()

    def full_sweep_is_free(self, rows: int) -> bool:
        of = self.objective
        return of.linear_bernoulli or (of.gaussian is None and support_is_smaller(self.codes, rows))

    @torch.no_grad()
    def changed(self, rows: Int[Tensor, "samples batch m"]) -> Float[Tensor, "samples batch n k"]:
        of = self.objective
        if self.hidden is None:
            return Evaluation(FunctionObjective(of.loss_of_changed), self.codes, self.loss).changed(rows)
        arguments = (self.codes, rows, of.code_weight(), self.hidden, of.changed_loss, self.loss)
        return difference_sweep(*arguments, numbers_per_code=of.numbers_per_code)


class CompiledReconstruction(Reconstruction):
    """The same for a linear Bernoulli decoder on a CPU: hard codes go through a kernel that knows they are hard."""

    def __init__(self, model: GenerativeModel, pixels: Float[Tensor, "batch d"]) -> None:
        super().__init__(model, pixels)
        first: nn.Linear = model.decoder.first  # type: ignore[assignment]
        n, k = model.layer.shape
        self.kernel = cpu.BernoulliLinear(first.weight, first.bias, pixels, (n, k))

    @staticmethod
    def serves(model: GenerativeModel, pixels: Tensor) -> bool:
        """Whether there is such a kernel for this model and these images. It may be compiled now."""
        return (
            model.compiled_kernels
            and not model.gaussian
            and model.layer.one_hot_rows
            and isinstance(model.decoder, Decoder)
            and len(model.decoder.rest) == 0
            and isinstance(model.likelihood, Bernoulli)
            and cpu.serves(pixels, model.decoder.first.weight)
        )

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch"]:
        compiled = self._compiled(codes)
        return super().__call__(codes) if compiled is None else compiled.loss

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        compiled = self._compiled(codes)
        return super().evaluate(codes) if compiled is None else CompiledEvaluation(self, codes, compiled)

    def _compiled(self, codes: Tensor) -> cpu.LinearCodes | None:
        differentiated = codes.requires_grad and torch.is_grad_enabled()
        of_each_image = codes.shape[1] == len(self.pixels) and codes.dtype == torch.float32
        return self.kernel.at(codes) if of_each_image and not differentiated else None


class CompiledEvaluation(Evaluation):
    """The reconstruction loss of hard codes in the compiled kernel."""

    objective: CompiledReconstruction

    def __init__(self, objective: CompiledReconstruction, codes: Tensor, compiled: cpu.LinearCodes) -> None:
        super().__init__(objective, codes, compiled.loss)
        self.compiled = compiled

    @torch.no_grad()
    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        table = self.compiled.sweep()
        # None where the weights are too large
        return Reconstruction.evaluate(self.objective, self.codes).sweep() if table is None else table

    def full_sweep_is_free(self, rows: int) -> bool:
        return True
