"""Bias, variance and cost of estimators at one model and a few images, against the exact gradient.

The gradient is that of each image's expected reconstruction loss for that image's logits, as in figure 1 of Lorberbom
et al. 2019. The KL has no part in it. Gaussian variables beside the code are drawn once for each image and held.

A mean over draws misses the truth by chance even where there is no bias. Squares tell how much is chance. Their means
are right whatever the distribution (direct's gradient is 0 in most draws and 1 / epsilon in the others). With `e` the
error of the mean of D draws and `s` their deviation, `E[e^2] = bias^2 + s^2 / D` for each coordinate.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.random import seed_for
from dgrad.core.schedules import Constant
from dgrad.core.wrapped_objectives import SweepCache
from dgrad.data import Split, unit
from dgrad.devices import choose_device, describe_device, synchronize
from dgrad.errors import DgradError, InputError
from dgrad.experiments.variants import Variant
from dgrad.training.build import Build
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.posterior import Posterior

REFERENCES = ("exact", "leg", "rloo")
"""Where the truth comes from: the first that the latent allows. All but `exact` are averaged over many draws."""
REFERENCE_FACTOR = 4
"""A reference that has to be averaged gets this many times the draws of an estimator."""
WARM_UP = 200
WARM_UP_LR = 0.01
BLOCKS = 10
"""The draws are kept in so many blocks; leaving out each in turn gives the standard error (jackknife)."""
NUMBERS_AT_ONCE = 2**25
"""The memory budget of one call: evaluations times pixels and coordinates (128 MiB in float32)."""
TIMED_CALLS, TIMED_SECONDS = 30, 1.0
ROUNDING = 1e-5
"""A bias of less than this share of the gradient is rounding."""


@dataclass(frozen=True)
class Row:
    """What was measured of one variant. Gradients are in the likelihood's unit (nats) for one unit of a logit.

    Attributes:
        label: the name, with the hyper-parameters that tell it from its siblings.
        set: the hyper-parameters that were given.
        swept: those of them that have other values in other rows.
        unbiased: what its traits say.
        problem: why nothing was measured; the figures are None then.
        supported: False where the problem is the latent's kind or size.
        bias: the mean over coordinates and images of |mean gradient - reference|, noise included.
        noise_floor: the part of `bias` that the draws' (and the reference's) deviation explains: all of it where there
            is no bias.
        bias_corrected: the rest, `sqrt(bias^2 - noise_floor^2)`, and 0 where the floor is the higher one.
        bias_at_most: `bias_corrected` with three standard errors of its square on top.
        bias_standard_error: of `bias`, by the jackknife.
        within_noise: whether the bias cannot be told from none, by the same three standard errors.
        deviation: the mean over coordinates and images of the standard deviation of one draw.
        cosine_of_mean: between the mean gradient and the reference, over the coordinates of all images as one vector.
        cosine_of_draw: the mean over draws of the same for one draw; 0 for a draw without any gradient.
        evaluations: of the decoder, for one image and one draw.
        seconds: the median time of one draw for all the images, with its gradient for the logits.
        warm_up: the calls before measuring, in which it learned what it learns.
    """

    estimator: str
    label: str
    set: dict[str, str]
    swept: tuple[str, ...]
    unbiased: bool
    problem: str | None = None
    supported: bool = True
    bias: float | None = None
    noise_floor: float | None = None
    bias_corrected: float | None = None
    bias_at_most: float | None = None
    bias_standard_error: float | None = None
    within_noise: bool | None = None
    deviation: float | None = None
    cosine_of_mean: float | None = None
    cosine_of_draw: float | None = None
    evaluations: int | None = None
    seconds: float | None = None
    warm_up: int = 0


@dataclass(frozen=True)
class Diagnosis:
    """The rows, and what they were measured against.

    Attributes:
        rows: one for each variant, in their order.
        reference: the estimator that the truth comes from.
        reference_draws: how many draws of it were averaged; 1 for `exact`, which has no noise.
        reference_standard_error: the mean over coordinates of the reference's own standard error; 0 for `exact`.
        gradient: the mean absolute value of a coordinate of the reference, to compare a bias with.
        draws: how many draws of each estimator for each image.
        seed: of the noise.
    """

    rows: list[Row]
    reference: str
    reference_draws: int
    reference_standard_error: float
    gradient: float
    images: int
    draws: int
    seed: int
    latent: str
    unit: str
    device: str

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)


def diagnose(
    model: DiscreteVAE,
    images: Tensor,
    variants: Sequence[Variant],
    *,
    draws: int = 1000,
    seed: int = 0,
    warm_up: int = WARM_UP,
    progress: Callable[[str], None] = lambda label: None,
) -> Diagnosis:
    """Measure each variant's gradient for the encoder's logits at these images, `[B, C, H, W]` in [0, 1].

    Estimators that learn or average (those with a state dict) are first called `warm_up` times, one draw of each image
    a call, with their parameters trained by Adam. Then their state is held.

    Args:
        progress: is told the label of what is measured next.

    Raises:
        InputError: no variant can work with the model's latent, a hyper-parameter is a schedule, or there are too few
            draws.
    """
    layer = model.layer
    if draws < 2:
        raise InputError(f"--draws must be a whole number of at least 2, to have a deviation; got {draws}")
    built = [_build(variant, layer, seed) for variant in variants]
    limitations = [estimator.traits.why_unsupported(layer) for estimator in built]
    if all(limitation is not None for limitation in limitations):
        reasons = "; ".join(dict.fromkeys(limitation for limitation in limitations if limitation is not None))
        raise InputError(f"none of the estimators works with latent {layer}: {reasons}")
    model.eval()
    with torch.no_grad():
        posterior = model.posterior(images)
    logits = posterior.logits  # [B, *code]
    measurement = _Measurement(model, images, posterior, seed)
    name = _reference_for(layer)
    progress(f"reference ({name})")
    reference_draws = 1 if name == "exact" else REFERENCE_FACTOR * draws
    moments = measurement.moments(registry.estimator(name).to(logits.device), reference_draws, None)
    truth = _Truth(moments.mean, moments.variance / reference_draws)
    rows = []
    for variant, estimator, limitation in zip(variants, built, limitations, strict=True):
        row = Row(variant.estimator, variant.label, dict(variant.set), variant.swept, estimator.traits.unbiased)
        if limitation is not None:
            rows.append(replace(row, problem=limitation, supported=False))
            continue
        progress(variant.label)
        try:
            figures = measurement.figures(estimator.to(logits.device), draws, truth, warm_up)
        except (DgradError, RuntimeError) as error:  # a decoder without a gradient for relaxed codes, too little memory
            figures = {"problem": " ".join(str(error).split())}
        rows.append(replace(row, **figures))
    return Diagnosis(
        rows=rows,
        reference=name,
        reference_draws=reference_draws,
        reference_standard_error=float(truth.variance.sqrt().mean()),
        gradient=float(truth.gradient.abs().mean()),
        images=len(images),
        draws=draws,
        seed=seed,
        latent=str(layer),
        unit=model.likelihood.unit,
        device=describe_device(logits.device),
    )


def choose_images(split: Split, count: int, seed: int) -> Tensor:
    """`[count, C, H, W]` images of a split in [0, 1], chosen by the seed; all of them where there are no more."""
    chosen = torch.randperm(len(split), generator=Generator().manual_seed(seed))[:count]
    return unit(split.images[chosen.to(split.images.device)])


def random_start(config: TrainConfig) -> tuple[DiscreteVAE, Split]:
    """The model with which a training would begin, on its device, and the validation images.

    Raises:
        InputError: something in the configuration cannot be.
        RunError: the data could not be had.
    """
    device, build = choose_device(config.device), Build(config)
    return build.model.to(device), build.evaluation_data.valid.to(device)


def _build(variant: Variant, layer: LatentLayer, seed: int) -> GradientEstimator:
    estimator = registry.estimator(variant.estimator, **variant.set)
    for name in variant.set:
        if not isinstance(estimator.schedules.get(name, Constant(0.0)), Constant):
            raise InputError(
                f"--set {variant.estimator}.{name}={variant.set[name]} moves over a run; a diagnosis is of one step: "
                f"list numbers, for example {variant.estimator}.{name}=0.1,1"
            )
    if estimator.traits.supports(layer):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            estimator.set_layer(layer)
    return estimator


def _reference_for(layer: LatentLayer) -> str:
    known = [name for name in REFERENCES if name in registry.estimators()]
    return next(name for name in known if registry.estimator(name).traits.supports(layer))


@dataclass(frozen=True)
class _Truth:
    """The reference gradient and the variance of its noise, `[B, c]` with c coordinates, in float64 on the CPU."""

    gradient: Tensor
    variance: Tensor


@dataclass(frozen=True)
class _Moments:
    """Of many draws' gradients, in float64 on the CPU: `[B, c]`, and `[J, B, c]` or `[J]` for each block of draws."""

    mean: Tensor
    variance: Tensor
    sizes: Tensor  # [J], draws
    errors: Tensor  # [J, B, c], sums of (gradient - reference)
    squares: Tensor  # [J], sums of its square over draws, images and coordinates
    cosine: float


class _Measurement:
    def __init__(self, model: DiscreteVAE, images: Tensor, posterior: Posterior, seed: int) -> None:
        self.model = model
        self.images = images
        self.logits = posterior.logits
        self.seed = seed
        self.tables: dict[Hashable, Tensor] = {}
        self.gaussian = posterior.draw(generator=self._generator("Gaussian variables"))  # [B, c] or None

    def figures(self, estimator: GradientEstimator, draws: int, truth: _Truth, warm_up: int) -> dict[str, Any]:
        learns = bool(estimator.state_dict())
        if learns:
            self._warm_up(estimator, warm_up)
        moments = self.moments(estimator, draws, truth.gradient)
        if not bool(moments.mean.isfinite().all() and moments.variance.isfinite().all()):
            return {"problem": "its gradient is not finite at these images"}
        error = moments.mean - truth.gradient
        bias, square = float(error.abs().mean()), float(error.square().mean())
        # E[e^2] = bias^2 + s^2 / D + the variance of the reference
        explained = float((moments.variance / draws + truth.variance).mean())
        noise_floor = bias * math.sqrt(min(1.0, explained / square)) if square > 0 else 0.0
        bias_error, square_error = _jackknife(moments)
        # Of the reference's own squared noise, as if the coordinates of an image moved together.
        reference_error = math.sqrt(2 * float(truth.variance.sum(1).square().sum())) / truth.variance.numel()
        doubt = 3 * math.hypot(square_error, reference_error)
        rounding = (ROUNDING * float(truth.gradient.abs().mean())) ** 2
        return {
            "bias": bias,
            "noise_floor": noise_floor,
            "bias_corrected": math.sqrt(max(0.0, bias**2 - noise_floor**2)),
            "bias_at_most": bias * math.sqrt(max(0.0, square - explained + doubt) / square) if square > 0 else 0.0,
            "bias_standard_error": bias_error,
            "within_noise": square - explained <= doubt + rounding,
            "deviation": float(moments.variance.sqrt().mean()),
            "cosine_of_mean": _cosine(moments.mean, truth.gradient),
            "cosine_of_draw": moments.cosine,
            "evaluations": estimator.traits.evaluations(self.model.layer),
            "seconds": self._seconds(estimator),
            "warm_up": warm_up if learns else 0,
        }

    def moments(self, estimator: GradientEstimator, draws: int, reference: Tensor | None) -> _Moments:
        """Mean and variance over draws, and the mean cosine of a draw with the reference; None for the reference."""
        generator = self._generator("draws" if reference is not None else "reference")
        tables = None if reference is None else self.tables
        origin = self.logits.new_zeros(self.logits.flatten(1).shape) if reference is None else reference.to(self.logits)
        total_squares = torch.zeros(origin.shape, dtype=torch.float64)
        sizes = [len(block) for block in torch.arange(draws).chunk(BLOCKS)]
        errors, squares, cosine = [], [], 0.0
        for size in sizes:
            block_errors, block_squares = torch.zeros_like(total_squares), torch.zeros_like(total_squares)
            left = size
            while left:
                gradients = self._gradients(estimator, left, generator, tables)  # [D, B, c]
                left -= len(gradients)
                # Moments around the reference: they keep their digits where the deviation is small.
                difference = gradients - origin
                block_errors += difference.sum(0).cpu().double()
                block_squares += difference.square().sum(0).cpu().double()
                products = (gradients * origin).sum((1, 2)) / (gradients.flatten(1).norm(dim=1) * origin.norm())  # [D]
                cosine += float(products.nan_to_num(0.0, 0.0, 0.0).sum())
            errors.append(block_errors)
            squares.append(float(block_squares.sum()))
            total_squares += block_squares
        error = torch.stack(errors).sum(0) / draws
        # One draw has no deviation: the reference is exact then.
        variance = (total_squares - draws * error.square()).clamp_min(0) / (draws - 1) if draws > 1 else error * 0
        return _Moments(
            mean=origin.cpu().double() + error,
            variance=variance,
            sizes=torch.tensor(sizes, dtype=torch.float64),
            errors=torch.stack(errors),
            squares=torch.tensor(squares, dtype=torch.float64),
            cosine=cosine / draws,
        )

    def _gradients(
        self,
        estimator: GradientEstimator,
        draws: int,
        generator: Generator,
        tables: dict[Hashable, Tensor] | None = None,
    ) -> Tensor:
        """The gradients of at most `draws` draws for the logits of every image, `[D, B, c]`, within the memory budget.

        Args:
            tables: where sweeps are kept, for estimators that draw the same codes; None for none.
        """
        count = len(self.images)
        images_at_once, draws_at_once = count, 1
        if estimator.traits.independent_examples:
            cost = estimator.traits.evaluations(self.model.layer) * (self.images[0].numel() + self.logits[0].numel())
            rows = max(1, NUMBERS_AT_ONCE // cost)
            images_at_once, draws_at_once = min(count, rows), max(1, min(draws, rows // count))
        parts = []
        state = {name: tensor.clone() for name, tensor in estimator.state_dict().items()}
        for part in torch.arange(count).split(images_at_once):
            chosen = slice(int(part[0]), int(part[-1]) + 1)
            logits = self.logits[chosen]
            repeated = logits.repeat(draws_at_once, *[1] * (logits.ndim - 1)).requires_grad_()  # [D*b, *code]
            pixels = self.images[chosen].repeat(draws_at_once, 1, 1, 1)
            gaussian = None if self.gaussian is None else self.gaussian[chosen].repeat(draws_at_once, 1)
            objective = self.model.reconstruction(pixels, gaussian)
            if tables is not None:
                objective = SweepCache(objective, tables, (chosen.start, chosen.stop))
            estimate = estimator(self.model.layer, repeated, objective, generator=generator)
            (gradient,) = torch.autograd.grad(estimate.loss.sum(), repeated)
            parts.append(gradient.reshape(draws_at_once, len(logits), -1))
            if state:
                estimator.load_state_dict(state)  # a moving average goes back to where the warm-up left it
        return torch.cat(parts, 1)

    def _warm_up(self, estimator: GradientEstimator, calls: int) -> None:
        generator = self._generator("warm-up")
        parameters = [parameter for parameter in estimator.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=WARM_UP_LR) if parameters else None
        for _ in range(calls):
            logits = self.logits.clone().requires_grad_()
            objective = self.model.reconstruction(self.images, self.gaussian)
            loss = estimator(self.model.layer, logits, objective, generator=generator).loss.mean()
            if optimizer is not None:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()

    def _seconds(self, estimator: GradientEstimator) -> float:
        """The median time of one draw of the gradient for all the images."""
        device, generator = self.logits.device, self._generator("draws")
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < 3 or (len(times) < TIMED_CALLS and time.perf_counter() - started < TIMED_SECONDS):
            synchronize(device)
            before = time.perf_counter()
            self._gradients(estimator, 1, generator)
            synchronize(device)
            times.append(time.perf_counter() - before)
        return statistics.median(times)

    def _generator(self, purpose: str) -> Generator:
        """Noise of its own for each purpose; the same for every estimator."""
        return Generator(self.logits.device).manual_seed(seed_for(purpose, self.seed))


def _cosine(one: Tensor, other: Tensor) -> float:
    size = float(one.norm() * other.norm())
    return float((one * other).sum()) / size if size > 0 else 0.0


def _jackknife(moments: _Moments) -> tuple[float, float]:
    """The standard errors of the mean absolute error and of the squared bias, by leaving out each block in turn."""
    blocks, draws = len(moments.sizes), moments.sizes.sum() - moments.sizes  # [J], those that are left
    errors = (moments.errors.sum(0) - moments.errors) / draws[:, None, None]  # [J, B, c]
    absolute, square = errors.abs().mean((1, 2)), errors.square().mean((1, 2))  # [J]
    mean_square = (moments.squares.sum() - moments.squares) / draws / errors[0].numel()  # [J]
    # bias^2 = e^2 - s^2 / D, with s^2 = (mean of squares - e^2) D / (D - 1)
    bias_square = square - (mean_square - square) / (draws - 1).clamp_min(1)
    absolute_error, square_error = (
        math.sqrt((blocks - 1) * float(values.var(correction=0))) for values in (absolute, bias_square)
    )
    return absolute_error, square_error
