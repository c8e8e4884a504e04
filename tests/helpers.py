"""What several test files share: gradients of estimators, a running server, drawn faces."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Generator, Tensor

import dgrad
from dgrad.core.estimates import Estimate
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.objectives import CodeLoss
from dgrad.experiments.launchers import Ended, Job
from dgrad.testing import monte_carlo_gradient
from dgrad.training.listener import Listener, Progress
from dgrad.training.seeds import Seeds
from dgrad.training.trainer import Trainer
from dgrad_cli.main import main
from dgrad_plugins.latents import Categorical

# Gradients of estimators

QUADRATIC, BEYOND = "smooth", "cross-entropy"
"""Of the objectives of `small_objectives`: a quadratic one, and one that is not."""


class EveryCode(Categorical):
    """Its one sample holds each code of the support once, along the batch."""

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        return self.enumerate(like=logits).unsqueeze(0)


class EveryDraw(Categorical):
    """Its samples hold each tuple of codes of the support once, along the batch."""

    def sample(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        support = self.enumerate(like=logits)
        draws = torch.cartesian_prod(*[torch.arange(len(support))] * samples)  # [K^S, S]
        return support[draws].transpose(0, 1)  # [S, K^S, n, k]


class EveryNoise(Categorical):
    """Two values, whose noise takes evenly spaced quantiles along the batch."""

    def noise(self, logits: Tensor, samples: int = 1, *, generator: Generator | None = None) -> Tensor:
        levels = (torch.arange(len(logits), dtype=logits.dtype) + 0.5) / len(logits)
        # The difference of two Gumbel variables is logistic.
        return torch.stack([torch.zeros_like(levels), levels.logit()], dim=-1)[None, :, None]


class AsOne(Categorical):
    """The same codes without the knowledge that their rows are independent."""

    @property
    def one_hot_rows(self) -> bool:
        return False


def run_dgrad(*arguments: object) -> int:
    """Run a command of dgrad in this process; its exit code."""
    with pytest.raises(SystemExit, match=r"^\d+$") as exit_:
        main([str(argument) for argument in arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def run_with_output(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The same, with what the command alone wrote to the standard output and the standard error."""
    capsys.readouterr()
    code = run_dgrad(*arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def train_in_turn(
    jobs: Sequence[Job], *, devices: Sequence[str], at_once: int, begin: Callable[[Job], object], end: Ended
) -> None:
    """`dgrad.experiments.launchers.run_here` in this process, where processes of their own are not the point.

    Each of them would import torch, which takes longer than a small run.
    """
    for job in jobs:
        begin(job)
        words = job.command[job.command.index("dgrad_cli.worker") + 1 :]
        with redirect_stdout(io.StringIO()):
            code = run_dgrad(*words, "--device", devices[0])
        end(job, None if code == 0 else f"exit code {code}")


class StopAt(Listener):
    """Asks a trainer, or the seeds that train in parallel, to stop after a step. Set `trainer` first."""

    trainer: Trainer | Seeds

    def __init__(self, step: int = 15) -> None:
        self.step = step

    def stepped(self, progress: Progress) -> None:
        if progress.step == self.step:
            self.trainer.stop()


def estimate_and_gradient(
    estimator: GradientEstimator, layer: dgrad.LatentLayer, logits: Tensor, loss: CodeLoss, seed: int = 0
) -> tuple[Estimate, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    estimate = estimator(layer, leaf, loss, generator=Generator().manual_seed(seed))
    return estimate, torch.autograd.grad(estimate.loss.sum(), leaf)[0]


def gradient_of(
    estimator: GradientEstimator, layer: dgrad.LatentLayer, logits: Tensor, loss: CodeLoss, seed: int = 0
) -> Tensor:
    return estimate_and_gradient(estimator, layer, logits, loss, seed)[1]


def mean_over_draws(estimator: GradientEstimator, spec: str, logits: Tensor, loss: CodeLoss, samples: int) -> Tensor:
    """The exact mean gradient `[n, k]` of an estimator that draws this many independent codes, and nothing else."""
    n, k = map(int, spec.split("x"))
    layer = EveryDraw(n, k)
    draws = layer.sample(logits, samples)
    everywhere = logits.expand(draws.shape[1], -1, -1)
    weights = layer.log_prob(everywhere, draws).sum(0).exp()  # [K^S]
    gradients = gradient_of(estimator, layer, everywhere, loss)
    return torch.einsum("b,bnk->nk", weights, gradients)


def mean_of_direct(
    name: str, layer: dgrad.LatentLayer, logits: Tensor, loss: CodeLoss, **hyperparameters: object
) -> tuple[Tensor, Tensor]:
    """The mean gradient of 400,000 draws, and its standard error."""
    return monte_carlo_gradient(dgrad.estimator(name, **hyperparameters), layer, logits, loss, draws=400_000)


def variance_of(
    estimator: GradientEstimator, layer: dgrad.LatentLayer, logits: Tensor, loss: CodeLoss, draws: int = 10_000
) -> float:
    """The total variance of the gradient for one example."""
    _, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=draws)
    return float(error.square().sum() * draws)


def with_layer(name: str, layer: dgrad.LatentLayer, **hyperparameters: object) -> GradientEstimator:
    """An estimator whose learned parts, if it has any, are made for the layer with seed 0."""
    estimator = dgrad.estimator(name, **hyperparameters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        estimator.set_layer(layer)
    return estimator


def train_learned_parts(
    estimator: GradientEstimator, layer: dgrad.LatentLayer, logits: Tensor, loss: CodeLoss, steps: int, lr: float
) -> None:
    """Train the estimator's own parameters on one batch of logits."""
    optimizer = torch.optim.Adam(estimator.parameters(), lr=lr)
    generator = Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        estimator(layer, logits, loss, generator=generator).loss.mean().backward()
        optimizer.step()


def slope_at(loss: CodeLoss, codes: Tensor) -> Tensor:
    leaf = codes.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def softmax_jacobian(q: Tensor) -> Tensor:
    return torch.diag_embed(q) - q.unsqueeze(-1) * q.unsqueeze(-2)


def times(jacobian: Tensor, slope: Tensor) -> Tensor:
    return (jacobian @ slope.unsqueeze(-1)).squeeze(-1)


# Programs that are not Python's

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")

# A running server

COMMAND = """
import sys
from dgrad_cli.main import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "torchvision", "onnx", "onnxscript", "safetensors"}
    print("heavy:", *sorted({name.partition(".")[0] for name in sys.modules} & heavy), flush=True)
"""


@contextmanager
def serving(bundle: Path, *options: str, first: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server, which runs the code `first` before it begins, and its port."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", first + COMMAND, "serve", str(bundle), "--port", "0", *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)/v2", line)
        assert match, line + process.stdout.read()
        yield process, int(match[1])
    finally:
        process.kill()
        process.communicate()


# Faces drawn from simple shapes, in the files of CelebA

FACE_ATTRIBUTES = ("Blurry", "Eyeglasses", "Smiling", "Wearing_Hat", "Young")
"""In alphabetical order, as in CelebA. The pictures show nothing of the first and the last."""
SHOWN = FACE_ATTRIBUTES[1:4]
FREQUENCIES = (0.3, 0.35, 0.5, 0.4, 0.7)
WHERE = {"Eyeglasses": (20, 38, 14, 50), "Smiling": (38, 55, 19, 45), "Wearing_Hat": (0, 20, 6, 58)}
"""First and last row, first and last column of what an attribute changes in the 64 x 64 picture."""


def draw_face(draws: np.random.RandomState, glasses: bool, smile: bool, hat: bool) -> Image.Image:
    """A face, 178 x 218. Place, size and colours differ a little from one to the next."""
    picture = Image.new("RGB", (178, 218), _colour(draws, 150, 256))
    pen = ImageDraw.Draw(picture)
    x, y = (middle + int(draws.randint(-4, 5)) for middle in (89, 112))
    skin, half = 230 - int(draws.randint(0, 90)), int(draws.randint(44, 50))
    pen.ellipse((x - half, y - 60, x + half, y + 62), fill=(skin, skin - 50, skin - 80))
    for eye in (x - 20, x + 20):
        pen.ellipse((eye - 5, y - 15, eye + 5, y - 5), fill=(30, 20, 20))
        if glasses:
            pen.ellipse((eye - 17, y - 27, eye + 17, y + 7), fill=(0, 0, 0))
    if smile:
        pen.chord((x - 26, y + 2, x + 26, y + 50), 0, 180, fill=(150, 20, 30))
    else:
        pen.rectangle((x - 18, y + 38, x + 18, y + 43), fill=(150, 20, 30))
    if hat:
        pen.rectangle((x - 40, y - 76, x + 40, y - 40), fill=_colour(draws, 0, 80))
        pen.rectangle((x - 60, y - 46, x + 60, y - 38), fill=(20, 20, 60))
    return picture


def _colour(draws: np.random.RandomState, low: int, high: int) -> tuple[int, ...]:
    return tuple(draws.randint(low, high, 3).tolist())


def draw_celeba(root: Path, counts: tuple[int, int, int]) -> np.ndarray:
    """Write images and all lists into `root / "celeba"`, and return the attributes `[N, 5]`.

    The counts are those of images for training, validation and testing.
    """
    folder, count = root / "celeba", sum(counts)
    (folder / "img_align_celeba").mkdir(parents=True)
    draws = np.random.RandomState(0)
    values = (draws.rand(count, len(FACE_ATTRIBUTES)) < FREQUENCIES).astype(int)
    files = [f"{number:06d}.jpg" for number in range(1, count + 1)]
    for file, (_, glasses, smile, hat, _) in zip(files, values.tolist(), strict=True):
        draw_face(draws, glasses, smile, hat).save(folder / "img_align_celeba" / file, quality=90)

    def write(name: str, rows: Iterable[object], *header: str) -> None:
        lines = [f"{file} {row}" for file, row in zip(files, rows, strict=True)]
        (folder / name).write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")

    signs = [" ".join(f"{2 * value - 1:2d}" for value in row) for row in values]
    write("list_attr_celeba.txt", signs, str(count), " ".join(FACE_ATTRIBUTES) + " ")
    write("list_eval_partition.txt", np.repeat([0, 1, 2], counts))
    write("identity_CelebA.txt", range(count))
    write("list_bbox_celeba.txt", ["  0   0  178  218"] * count, str(count), "image_id x_1 y_1 width height")
    points = " ".join(
        f"{part}_{axis}" for part in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy"
    )
    write(
        "list_landmarks_align_celeba.txt", [" 69 107  109 107   89 130   70 150  108 150"] * count, str(count), points
    )
    return values
