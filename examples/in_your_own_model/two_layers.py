"""Two discrete layers: the distribution of the second code depends on the first code."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dgrad


class TwoLayers(nn.Module):
    """An auto-encoder with `q(z1 | x) q(z2 | x, z1)`. The decoder sees both codes."""

    def __init__(self, first: dgrad.GradientEstimator, second: dgrad.GradientEstimator) -> None:
        super().__init__()
        self.coarse, self.fine = dgrad.latent("2x10"), dgrad.latent("10x4")
        self.first, self.second = first, second
        self.to_first, self.to_second = nn.Linear(64, 20), nn.Linear(64 + 20, 40)
        self.from_first, self.from_second = nn.Linear(20, 64), nn.Linear(40, 64)

    def forward(self, x: Tensor) -> Tensor:
        """The negative evidence lower bound of each image, in nats: `[B, 64]` to `[B]`."""
        logits = self.to_first(x).unflatten(-1, self.coarse.shape)  # [B, 2, 10]
        loss = self.first(self.coarse, logits, lambda z1: self.given_first(x, z1)).loss
        return loss + self.coarse.kl(logits)

    def given_first(self, x: Tensor, z1: Tensor) -> Tensor:
        """The loss of each first code: `[S, B, 2, 10]` to `[S, B]`. The second estimator works inside of it."""
        lead, z1 = z1.shape[:2], z1.flatten(0, 1).flatten(1)  # [S*B, 20]
        x = x.expand(*lead, -1).flatten(0, 1)  # [S*B, 64]
        logits = self.to_second(torch.cat([x, z1], -1)).unflatten(-1, self.fine.shape)  # [S*B, 10, 4]
        pixels, likelihood = self.from_first(z1), dgrad.bernoulli(x)
        objective = dgrad.objective(decoder=self.from_second, loss=lambda more: likelihood(pixels + more))
        loss = self.second(self.fine, logits, objective).loss + self.fine.kl(logits)
        return loss.unflatten(0, lead)


def train(steps: int = 2000, first: str = "rloo", second: str = "reinmax") -> tuple[float, float]:
    """The bound of the training images, before and after."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data).float().div(16).round()
    model = TwoLayers(dgrad.estimator(first), dgrad.estimator(second))
    optimizer, bounds = torch.optim.Adam(model.parameters(), lr=0.005), []
    for _ in range(steps):
        loss = model(images[torch.randint(len(images), (100,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bounds.append(loss.item())
    return bounds[0], sum(bounds[-10:]) / 10


if __name__ == "__main__":
    print("bound before and after: {:.1f}, {:.1f}".format(*train()))
