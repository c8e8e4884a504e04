"""The reconstruction loss as an objective, with the fastest sweep that a decoder allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dgrad.core.objectives import FunctionObjective, Objective
from dgrad.kernels import cpu
from dgrad.kernels.code_sweeps import bernoulli_linear_sweep, difference_sweep, support_is_smaller, support_sweep
from dgrad.vae.likelihoods import Bernoulli, SquaredError
from dgrad.vae.networks import Decoder

if TYPE_CHECKING:
    from dgrad.vae.model import DiscreteVAE

COMPILED_LOSSES = {Bernoulli: cpu.bernoulli_loss, SquaredError: cpu.squared_error}
"""Losses of a decoder's outputs that need no gradient, in C++, for tensors that `cpu.serves`."""


class Reconstruction(Objective):
    """`-log p(image | code)`, with the fastest sweep that the decoder allows."""

    def __init__(
        self,
        model: DiscreteVAE,
        pixels: Float[Tensor, "batch d"],
        gaussian: Float[Tensor, "batch g"] | None = None,
    ) -> None:
        self.layer = model.layer
        self.decoder = model.decoder
        self.decoder_inputs = model.decoder_inputs
        self.beside = model.beside
        self.likelihood = model.likelihood
        self.numbers_per_code = model.numbers_per_code
        self.compiled = model.compiled_kernels
        self.sweep_dtype = model.sweep_dtype
        self.pixels = pixels
        self.gaussian = gaussian
        self._hidden: tuple[Tensor, Tensor] | None = None

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch"]:
        return self._evaluate(codes)

    def _evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch"]:
        inputs = self.decoder_inputs(codes, self.gaussian)
        if not isinstance(self.decoder, Decoder):
            return self.likelihood.loss(self.decoder(inputs), self.pixels)
        hidden = self.decoder.first(inputs.flatten(2))
        self._hidden = (codes, hidden.detach())  # an estimator sweeps the codes that it has just evaluated
        return self._rest_loss(hidden)

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        return self._evaluate(codes.unsqueeze(1))

    @torch.no_grad()
    def sweep(
        self, codes: Float[Tensor, "samples batch n k"], loss: Float[Tensor, "samples batch"] | None = None
    ) -> Float[Tensor, "samples batch n k"]:
        if self._linear_bernoulli():  # faster than any evaluation of codes
            loss, weight, hidden = self._first_layer(codes, loss)
            return bernoulli_linear_sweep(codes, weight, hidden, self.pixels, loss, compiled=self.compiled)
        if self.gaussian is None and support_is_smaller(codes):
            return support_sweep(codes, self._losses_of_values, numbers_per_code=self.numbers_per_code)
        return self._sweep_changes(codes, None, loss)

    @torch.no_grad()
    def sweep_rows(self, codes: Tensor, rows: Tensor, loss: Tensor | None = None) -> Tensor:
        if self.sweeps_all_rows_at_once(codes, rows.shape[-1]):
            return super().sweep_rows(codes, rows, loss)
        return self._sweep_changes(codes, rows, loss)

    def sweeps_all_rows_at_once(self, codes: Float[Tensor, "samples batch n k"], rows: int) -> bool:
        return self._linear_bernoulli() or (self.gaussian is None and support_is_smaller(codes, rows))

    def _linear_bernoulli(self) -> bool:
        """Whether the decoder is one linear layer that sees nothing but the code, and the pixels are Bernoulli variables."""
        linear = isinstance(self.decoder, Decoder) and len(self.decoder.rest) == 0
        return linear and isinstance(self.likelihood, Bernoulli) and self.gaussian is None

    def _sweep_changes(self, codes: Tensor, rows: Tensor | None, loss: Tensor | None) -> Tensor:
        """The sweep of these rows, or of all, by evaluating every changed code."""
        if not isinstance(self.decoder, Decoder):
            changed = FunctionObjective(self._loss_of_changed)
            loss = self(codes) if loss is None else loss
            return changed.sweep(codes, loss) if rows is None else changed.sweep_rows(codes, rows, loss)
        loss, weight, hidden = self._first_layer(codes, loss)
        if self.gaussian is not None:
            weight = weight[:, : -self.gaussian.shape[-1]] if self.beside else self._weight_of_each(self.gaussian)
        return difference_sweep(
            codes, weight, hidden, self._changed_loss, loss, rows=rows, numbers_per_code=self.numbers_per_code
        )

    def _first_layer(self, codes: Tensor, loss: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the codes, and of the decoder's first layer its weight and its outputs for them."""
        assert isinstance(self.decoder, Decoder)
        if loss is None or self._hidden is None or self._hidden[0] is not codes:
            loss = self._evaluate(codes)
        assert self._hidden is not None
        return loss, self.decoder.first.weight, self._hidden[1]

    def _losses_of_values(self, values: Int[Tensor, "codes n"]) -> Float[Tensor, "codes batch"]:
        """The loss of every image at codes given by the values of their rows."""
        k = self.layer.shape[-1]
        if not isinstance(self.decoder, Decoder):
            one_hot = values.unsqueeze(-1) == torch.arange(k, device=values.device)  # [R, n, k]
            return self._loss_of_changed(one_hot.to(self.pixels.dtype).unsqueeze(1))
        first = self.decoder.first
        columns = first.weight.T[values + k * torch.arange(values.shape[1], device=values.device)]  # [R, n, width]
        outputs = self._without_gradient(self.decoder.rest, (columns.sum(1) + first.bias).unsqueeze(1))
        return self.likelihood.loss(outputs, self.pixels)

    def _weight_of_each(self, gaussian: Float[Tensor, "batch g"]) -> Float[Tensor, "batch width coordinates"]:
        """The first layer's weight for the code, with each example's Gaussian variables held: `sum_g W[:, (i, j, g)] c_g`."""
        assert isinstance(self.decoder, Decoder)
        weight = self.decoder.first.weight
        weight = weight.view(len(weight), -1, gaussian.shape[-1])  # [width, n*k, g]
        return torch.einsum("wxg,bg->bxw", weight, gaussian).mT  # in the order of memory that the sweep needs

    def _rest_loss(self, hidden: Tensor) -> Tensor:
        """The loss as a function of the outputs of the decoder's first layer."""
        assert isinstance(self.decoder, Decoder)
        return self.likelihood.loss(self.decoder.rest(hidden), self.pixels)

    def _changed_loss(self, hidden: Tensor) -> Tensor:
        """The same where no gradient is asked for."""
        assert isinstance(self.decoder, Decoder)
        outputs = self._without_gradient(self.decoder.rest, hidden)
        compiled_loss = COMPILED_LOSSES.get(type(self.likelihood)) if self.compiled else None
        if compiled_loss is not None and cpu.serves(outputs, self.pixels):
            return compiled_loss(outputs, self.pixels)
        return self.likelihood.loss(outputs, self.pixels)

    def _loss_of_changed(self, codes: Tensor) -> Tensor:
        """The loss of changed codes by any decoder, where no gradient is asked for."""
        outputs = self._without_gradient(self.decoder, self.decoder_inputs(codes, self.gaussian))
        return self.likelihood.loss(outputs, self.pixels)

    def _without_gradient(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """The outputs of the decoder, or of a part of it, as a sweep needs them."""
        if self.sweep_dtype == torch.float32:
            return network(inputs)
        with torch.autocast(inputs.device.type, self.sweep_dtype, cache_enabled=False):
            outputs: Tensor = network(inputs)
        return outputs.to(inputs.dtype)


class CompiledReconstruction(Reconstruction):
    """The same for a linear Bernoulli decoder on a CPU, where hard codes go through a compiled kernel that knows they are hard."""

    def __init__(self, model: DiscreteVAE, pixels: Float[Tensor, "batch d"]) -> None:
        super().__init__(model, pixels)
        first: nn.Linear = model.decoder.first  # type: ignore[assignment]
        n, k = model.layer.shape
        self.kernel = cpu.BernoulliLinear(first.weight, first.bias, pixels, (n, k))

    @staticmethod
    def serves(model: DiscreteVAE, pixels: Tensor) -> bool:
        """Whether there is such a kernel for this model and these images; it may be compiled now."""
        return (
            model.compiled_kernels
            and not model.gaussian
            and model.layer.independent_rows
            and isinstance(model.decoder, Decoder)
            and len(model.decoder.rest) == 0
            and isinstance(model.likelihood, Bernoulli)
            and cpu.serves(pixels, model.decoder.first.weight)
        )

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch"]:
        differentiated = codes.requires_grad and torch.is_grad_enabled()
        of_each_image = codes.shape[1] == len(self.pixels) and codes.dtype == torch.float32
        loss = self.kernel.loss(codes) if of_each_image and not differentiated else None
        return self._evaluate(codes) if loss is None else loss

    @torch.no_grad()
    def sweep(
        self, codes: Float[Tensor, "samples batch n k"], loss: Float[Tensor, "samples batch"] | None = None
    ) -> Float[Tensor, "samples batch n k"]:
        table = None if loss is None else self.kernel.sweep(codes, loss)
        return super().sweep(codes, loss) if table is None else table
