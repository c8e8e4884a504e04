"""The discrete variational auto-encoder: an encoder, a discrete code, a decoder."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import Objective
from dgrad.vae.dropout import Dropout
from dgrad.vae.likelihoods import Likelihood
from dgrad.vae.networks import Decoder
from dgrad.vae.posterior import Gaussian, Posterior
from dgrad.vae.reconstruction import Reconstruction


class DiscreteVAE(nn.Module):
    """An encoder, a discrete code and a decoder; in a mixed model Gaussian variables beside the code.

    A model of your own is an instance with other networks: any `encoder` from images `[B, C, H, W]` to logits
    `[B, *layer.shape]`, any `decoder` from codes `[..., *layer.decoded_shape]` to outputs `[..., C*H*W]`.

    With `gaussian` variables the encoder gives a pair: the logits, and `[B, 2 gaussian]` means and log-variances. The
    decoder takes `[..., *layer.decoded_shape, gaussian]`: the variables where the code is one, zero elsewhere
    (Lorberbom et al. 2019, section 5.1). With `concatenate_gaussian` it takes `[..., n*k + gaussian]`, the flattened
    code and the variables side by side.

    Attributes:
        concatenate_gaussian: whether they stand beside the flattened code, in one vector.
        compiled_kernels: whether compiled kernels may be used. The first use may take seconds to compile them.
        sweep_dtype: the precision in which sweeps multiply matrices, torch.float32 or torch.bfloat16. Those of a linear
            decoder multiply none.
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
        concatenate_gaussian: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.image_shape = tuple(image_shape)
        self.likelihood = likelihood
        self.encoder = encoder
        self.decoder = decoder
        self.gaussian = gaussian
        self.concatenate_gaussian = concatenate_gaussian
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
            gaussian: in a model with Gaussian variables, a draw of them for each image. The objective is for these.
        """
        return Reconstruction(self, images.flatten(1), gaussian)

    def decode(
        self, codes: Float[Tensor, "*codes"], gaussian: Float[Tensor, "*lead g"] | None = None
    ) -> Float[Tensor, "*lead c h w"]:
        """The expected images, in [0, 1], of codes and, in a model that has them, Gaussian variables."""
        mean = self.likelihood.mean(self.decoder(self.decoder_inputs(codes, gaussian)))
        return mean.unflatten(-1, self.image_shape)

    def decoder_inputs(
        self, codes: Float[Tensor, "*codes"], gaussian: Float[Tensor, "*lead g"] | None
    ) -> Float[Tensor, "*inputs"]:
        """The codes, or with Gaussian variables both in one tensor.

        It has each coordinate of the code times all variables, `[..., *code, g]`, or both side by side.
        """
        codes, axes = self.layer.decoded(codes), len(self.layer.decoded_shape)
        if gaussian is None:
            return codes
        if self.concatenate_gaussian:
            flat = codes.flatten(-axes)
            lead = torch.broadcast_shapes(flat.shape[:-1], gaussian.shape[:-1])
            return torch.cat([flat.expand(*lead, -1), gaussian.expand(*lead, -1)], -1)
        beside_code = (..., *[None] * axes, slice(None))
        return codes.unsqueeze(-1) * gaussian[beside_code]

    def prior_gaussian(self, count: int, *, generator: Generator) -> Float[Tensor, "count g"] | None:
        """Draws of the Gaussian variables from their prior, N(0, I), or None where there are none.

        They are on the generator's device.
        """
        if not self.gaussian:
            return None
        return torch.randn(count, self.gaussian, generator=generator, device=generator.device)

    def set_generator(self, generator: Generator) -> None:
        """Let the networks draw their training noise (`dgrad.vae.dropout.Dropout`) from this generator."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generator = generator
