"""The discrete variational auto-encoder and the networks it is made of. May import torch, latents, likelihoods, posteriors and objectives."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from dgrad.errors import InputError
from dgrad.kernels import cpu
from dgrad.latent_layer import LatentLayer
from dgrad.likelihoods import Bernoulli, Likelihood, SquaredError
from dgrad.noise import Dropout
from dgrad.objectives import FunctionObjective, Objective
from dgrad.posterior import Gaussian, Posterior
from dgrad.sweeps import bernoulli_linear_sweep, difference_sweep, support_is_smaller, support_sweep

COMPILED_LOSSES = {Bernoulli: cpu.bernoulli_loss, SquaredError: cpu.squared_error}
"""Losses of a decoder's outputs that need no gradient, in C++, for tensors that `cpu.serves`."""


class Encoder(nn.Module):
    """A network from images to the logits of a latent layer."""

    def __init__(self, layer: LatentLayer, image_shape: tuple[int, int, int], body: nn.Module) -> None:
        super().__init__()
        self.code_shape = layer.shape
        self.image_shape = tuple(image_shape)
        self.body = body

    def forward(self, images: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch *code"]:
        """The logits of each image.

        Raises:
            InputError: the images have another size than the encoder was built for.
        """
        check_image_shape(images, self.image_shape)
        return self.body(images.flatten(1)).view(-1, *self.code_shape)


def check_image_shape(images: Tensor, expected: tuple[int, ...]) -> None:
    """Make sure that the images have the size that a model was built for.

    Raises:
        InputError: they have another.
    """
    if images.shape[1:] != expected:
        raise InputError(
            f"images of shape {list(images.shape[1:])}; this model takes {list(expected)} (channels, height, width)"
        )


class Decoder(nn.Module):
    """A network from codes to outputs, whose first layer is linear in the code.

    That lets the sweep change a coordinate after the first layer, as the difference of two columns of its weight, instead of
    before it. With Gaussian variables the inputs are `[..., *code, c]`: each coordinate of the code times all of the variables. Where
    these stand `beside` the code, the inputs are `[..., n*k + c]`.

    Attributes:
        numbers_per_code: how many outputs all layers have for one code.
    """

    def __init__(self, layer: LatentLayer, widths: list[int], gaussian: int = 0, *, beside: bool = False) -> None:
        super().__init__()
        coordinates = math.prod(layer.decoded_shape)
        self.numbers_per_code = sum(widths)
        self.input_axes = 1 if beside else len(layer.decoded_shape) + (gaussian > 0)
        self.first = nn.Linear(coordinates + gaussian if beside else coordinates * max(gaussian, 1), widths[0])
        self.rest = nn.Sequential(*[module for wide in pairwise(widths) for module in (nn.ReLU(), nn.Linear(*wide))])

    def forward(self, codes: Float[Tensor, "*codes"]) -> Float[Tensor, "*outputs"]:
        return self.rest(self.first(codes.flatten(-self.input_axes)))


class DiscreteVAE(nn.Module):
    """An encoder, a discrete code and a decoder; in a mixed model Gaussian variables beside the code.

    A model of one's own is an instance with other networks: any `encoder` from images `[B, C, H, W]` to logits
    `[B, *layer.shape]`, any `decoder` from codes `[..., *layer.decoded_shape]` to outputs `[..., C*H*W]`. With `gaussian` variables c, the
    encoder gives a pair, the logits and `[B, 2 gaussian]` means and log-variances, and the decoder takes `[..., *layer.decoded_shape, gaussian]`,
    zero but where the code is one; there it holds the variables (Lorberbom et al. 2019, section 5.1). With `beside` the decoder takes
    `[..., n*k + gaussian]`, the flattened code and the variables side by side.

    Attributes:
        gaussian: how many Gaussian variables there are.
        beside: how they and the code enter the decoder.
        compiled_kernels: whether compiled kernels may be used where there are some; the first use may take seconds to compile them.
        sweep_dtype: the precision in which sweeps multiply matrices, torch.float32 or torch.bfloat16; those of a linear decoder multiply none.
    """

    def __init__(
        self,
        layer: LatentLayer,
        image_shape: tuple[int, int, int],
        likelihood: Likelihood,
        encoder: nn.Module,
        decoder: nn.Module,
        gaussian: int = 0,
        *,
        beside: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.image_shape = tuple(image_shape)
        self.likelihood = likelihood
        self.encoder = encoder
        self.decoder = decoder
        self.gaussian = gaussian
        self.beside = beside
        self.compiled_kernels = False
        self.sweep_dtype = torch.float32

    @property
    def numbers_per_code(self) -> int:
        """About how many numbers the decoder computes for one code: what an evaluation costs."""
        return self.decoder.numbers_per_code if isinstance(self.decoder, Decoder) else math.prod(self.image_shape)

    def posterior(self, images: Float[Tensor, "batch c h w"]) -> Posterior:
        """`q(z, c | image)` of these images."""
        if not self.gaussian:
            return Posterior(self.encoder(images))
        logits, parameters = self.encoder(images)
        mean, log_variance = parameters.chunk(2, dim=-1)
        return Posterior(logits, Gaussian(mean, log_variance))

    def reconstruction(
        self, images: Float[Tensor, "batch c h w"], gaussian: Float[Tensor, "batch g"] | None = None
    ) -> Objective:
        """`-log p(image | code)` of these images, as an objective of their codes.

        Args:
            gaussian: a draw of the Gaussian variables for each image, in a model that has some; the objective is for these.
        """
        pixels = images.flatten(1)
        if CompiledReconstruction.serves(self, pixels):
            return CompiledReconstruction(self, pixels)
        return Reconstruction(self, pixels, gaussian)

    def decode(
        self, codes: Float[Tensor, "*codes"], gaussian: Float[Tensor, "*lead g"] | None = None
    ) -> Float[Tensor, "*lead c h w"]:
        """The expected images, in [0, 1], of codes and, in a model that has them, Gaussian variables."""
        mean = self.likelihood.mean(self.decoder(self.decoder_inputs(codes, gaussian)))
        return mean.unflatten(-1, self.image_shape)

    def decoder_inputs(
        self, codes: Float[Tensor, "*codes"], gaussian: Float[Tensor, "*lead g"] | None
    ) -> Float[Tensor, "*inputs"]:
        """The codes; with Gaussian variables, each coordinate of the code times all of them, `[..., *code, g]`, or both side by side."""
        codes, axes = self.layer.decoded(codes), len(self.layer.decoded_shape)
        if gaussian is None:
            return codes
        if self.beside:
            flat = codes.flatten(-axes)
            lead = torch.broadcast_shapes(flat.shape[:-1], gaussian.shape[:-1])
            return torch.cat([flat.expand(*lead, -1), gaussian.expand(*lead, -1)], -1)
        beside_code = (..., *[None] * axes, slice(None))
        return codes.unsqueeze(-1) * gaussian[beside_code]

    def prior_gaussian(self, count: int, *, generator: Generator) -> Float[Tensor, "count g"] | None:
        """Draws of the Gaussian variables from their prior, N(0, I), on the generator's device; None where there are none."""
        if not self.gaussian:
            return None
        return torch.randn(count, self.gaussian, generator=generator, device=generator.device)

    def set_generator(self, generator: Generator) -> None:
        """Let the networks draw their training noise (`dgrad.noise.Dropout`) from this generator."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generator = generator


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


def linear_vae(
    layer: LatentLayer, image_shape: tuple[int, int, int], likelihood: Likelihood, hidden: tuple[int, ...] = ()
) -> DiscreteVAE:
    """One linear layer each way (the paper's section 6.1).

    Raises:
        InputError: hidden layers were asked for.
    """
    if hidden:
        raise InputError(
            f"the linear model has no hidden layers; got {','.join(map(str, hidden))}: use --model mlp, or leave --hidden out"
        )
    return _dense_vae(layer, image_shape, likelihood, ())


def mlp_vae(
    layer: LatentLayer, image_shape: tuple[int, int, int], likelihood: Likelihood, hidden: tuple[int, ...] = (300,)
) -> DiscreteVAE:
    """Hidden layers with ReLU, `hidden` wide from the image to the code, mirrored in the decoder."""
    return _dense_vae(layer, image_shape, likelihood, hidden or (300,))


def _dense_vae(
    layer: LatentLayer, image_shape: tuple[int, int, int], likelihood: Likelihood, hidden: tuple[int, ...]
) -> DiscreteVAE:
    pixels, coordinates = math.prod(image_shape), math.prod(layer.shape)
    first, *wider = [pixels, *hidden, coordinates]
    body: list[nn.Module] = [nn.Linear(first, wider[0])]
    for wide in pairwise(wider):
        body += [nn.ReLU(), nn.Linear(*wide)]
    encoder = Encoder(layer, image_shape, nn.Sequential(*body))
    return DiscreteVAE(layer, image_shape, likelihood, encoder, Decoder(layer, [*reversed(hidden), pixels]))
