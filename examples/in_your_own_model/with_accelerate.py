"""Several processes with Accelerate: `torchrun --nproc-per-node 2 with_accelerate.py 100`."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dgrad


class VAE(nn.Module):
    """The estimator works inside of `forward`, where gradients of the processes are averaged."""

    def __init__(self, estimator: dgrad.GradientEstimator) -> None:
        super().__init__()
        self.layer, self.estimator = dgrad.latent("20x10"), estimator
        self.encoder, self.decoder = nn.Linear(64, 200), nn.Linear(200, 64)

    def forward(self, x: Tensor) -> Tensor:
        """The negative evidence lower bound of each image, in nats: `[B, 64]` to `[B]`."""
        logits = self.encoder(x).unflatten(-1, self.layer.shape)  # [B, 20, 10]
        reconstruction = dgrad.objective(decoder=self.decoder, loss=dgrad.bernoulli(x))
        return self.estimator(self.layer, logits, reconstruction).loss + self.layer.kl(logits)


def train(model: VAE, epochs: int = 100) -> tuple[float, float]:
    """The bound of the test images, before and after, over all processes."""
    accelerator = Accelerator(cpu=True)
    images = torch.from_numpy(load_digits().data).float().div(16).round()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    batches, tests = DataLoader(images[:1500], 50, shuffle=True), DataLoader(images[1500:], 100)
    model, optimizer, batches, tests = accelerator.prepare(model, optimizer, batches, tests)

    def bound() -> float:
        with torch.no_grad():
            return torch.cat([accelerator.gather_for_metrics(model(batch)) for batch in tests]).mean().item()

    before = bound()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            accelerator.backward(model(batch).mean())
            optimizer.step()
    return before, bound()


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    set_seed(0, device_specific=True)  # each process draws codes of its own. The weights are those of the first.
    bounds = train(VAE(dgrad.estimator("direct-rb")), *map(int, sys.argv[1:]))
    accelerator.print(
        f"{accelerator.num_processes} processes,", "test bound before and after: {:.1f}, {:.1f}".format(*bounds)
    )
