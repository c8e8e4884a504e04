"""An estimator in a Lightning module: schedules follow the trainer's steps."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dgrad


class VAE(lightning.LightningModule):
    """The estimator is a submodule: what it learns and averages is in the checkpoint."""

    def __init__(self, estimator: dgrad.GradientEstimator) -> None:
        super().__init__()
        self.layer, self.estimator = dgrad.latent("20x10"), estimator
        self.encoder, self.decoder = nn.Linear(64, 200), nn.Linear(200, 64)

    def forward(self, x: Tensor) -> Tensor:
        """The negative evidence lower bound of each image, in nats: `[B, 64]` to `[B]`."""
        logits = self.encoder(x).unflatten(-1, self.layer.shape)  # [B, 20, 10]
        reconstruction = dgrad.objective(decoder=self.decoder, loss=dgrad.bernoulli(x))
        objective = reconstruction + dgrad.KLObjective(self.layer, logits)
        return self.estimator(self.layer, logits, objective).loss

    def on_train_start(self) -> None:
        self.estimator.set_run_length(int(self.trainer.estimated_stepping_batches))

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        self.estimator.set_step(self.global_step)
        return self(batch).mean()

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        self.log("valid_bound", self(batch).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.005)


def train(model: VAE, epochs: int = 100, **options: object) -> tuple[float, float]:
    """The validation bound before and after."""
    images = torch.from_numpy(load_digits().data).float().div(16).round()
    training, validation = DataLoader(images[:1500], 100, shuffle=True), DataLoader(images[1500:], 297)
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, **options)
    before = trainer.validate(model, validation, verbose=False)[0]["valid_bound"]
    trainer.fit(model, training, validation)
    return before, trainer.callback_metrics["valid_bound"].item()


if __name__ == "__main__":
    lightning.seed_everything(0)
    bounds = train(VAE(dgrad.estimator("direct-rb", epsilon="geometric:1:0.02")), accelerator="cpu")
    print("validation bound before and after: {:.1f}, {:.1f}".format(*bounds))
