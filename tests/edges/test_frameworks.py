"""Every estimator in Lightning's `fit` and `validate`, and in Accelerate, at once: the last columns of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from helpers import with_layer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dgrad
from dgrad_plugins.estimators import ESTIMATORS

LAYER = dgrad.latent("3x2")
IMAGES = torch.rand(32, 8, generator=torch.Generator().manual_seed(0))

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the frameworks


class Losses(nn.Module):
    """An encoder, a decoder and every estimator; `forward` returns each one's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 6), nn.Linear(6, 8)
        self.estimators = nn.ModuleDict({name: with_layer(name, LAYER) for name in ESTIMATORS})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.encoder(images).view(-1, *LAYER.shape)

        def loss(codes: Tensor) -> Tensor:
            return 10 * (self.decoder(codes.flatten(2)) - images).square().sum(-1)

        return {name: estimator(LAYER, logits, loss).loss.mean() for name, estimator in self.estimators.items()}

    def averages(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.named_buffers()}


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.random.manual_seed(0)


def test_lightning_fits_and_validates(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    losses = Losses()

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.losses = losses
            self.before: dict[str, Tensor] = {}
            self.modes: set[bool] = set()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return torch.stack(list(self.losses(batch[0]).values())).sum()

        def on_validation_epoch_start(self) -> None:
            self.before = losses.averages()

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.modes.add(torch.is_inference_mode_enabled())
            assert all(loss.isfinite() for loss in self.losses(batch[0]).values())

        def on_validation_epoch_end(self) -> None:
            torch.testing.assert_close(losses.averages(), self.before, rtol=0, atol=0)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    module = Module()
    batches = DataLoader(TensorDataset(IMAGES), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = losses.averages()
    trainer.fit(module, batches, batches)
    trainer.validate(module, batches, verbose=False)
    assert module.modes == {False, True}  # `fit` validates under no_grad
    _has_learned(losses, start)


def test_accelerate_trains_in_bfloat16() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    losses = Losses()
    start = losses.averages()
    model, optimizer, batches = accelerator.prepare(
        losses, torch.optim.Adam(losses.parameters(), 1e-2), DataLoader(TensorDataset(IMAGES), batch_size=8)
    )
    for (images,) in batches:
        optimizer.zero_grad()
        accelerator.backward(sum(model(images).values()))
        optimizer.step()
    _has_learned(losses, start)


def _has_learned(losses: Losses, start: dict[str, Tensor]) -> None:
    """Each estimator still gives the encoder a finite gradient, and every average has moved."""
    for name, loss in losses(IMAGES).items():
        (gradient,) = torch.autograd.grad(loss, losses.encoder.weight, retain_graph=True)
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    moved = {name for name, value in losses.averages().items() if not torch.equal(value, start[name])}
    assert {name.split(".")[1] for name in moved} == {"aimle", "double-cv", "reinforce", "relax", "rodeo"}
