"""A learned prior: its loss is a part of the objective, and minus the entropy stands beside the estimate."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dgrad


class Prior(nn.Module):
    """A mixture of 16 products of independent variables."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(16, n, k) / 10)
        self.weights = nn.Parameter(torch.zeros(16))

    def log_prob(self, z: Tensor) -> Tensor:
        """`log p(z)` in nats: `[S, B, n, k]` to `[S, B]`."""
        log_p = torch.einsum("sbnk,cnk->sbc", z, self.logits.log_softmax(-1))
        return (log_p + self.weights.log_softmax(-1)).logsumexp(-1)


class VAE(nn.Module):
    """An auto-encoder whose prior learns with it."""

    def __init__(self, estimator: dgrad.GradientEstimator) -> None:
        super().__init__()
        self.layer, self.estimator = dgrad.latent("8x8"), estimator
        self.encoder, self.decoder = nn.Linear(64, 64), nn.Linear(64, 64)
        self.prior = Prior(*self.layer.shape)

    def forward(self, x: Tensor) -> Tensor:
        """The negative evidence lower bound of each image, in nats: `[B, 64]` to `[B]`."""
        logits = self.encoder(x).unflatten(-1, self.layer.shape)  # [B, 8, 8]
        reconstruction = dgrad.objective(decoder=self.decoder, loss=dgrad.bernoulli(x))
        objective = reconstruction + dgrad.objective(lambda z: -self.prior.log_prob(z))
        return self.estimator(self.layer, logits, objective).loss - self.layer.entropy(logits)


def train(steps: int = 2000, estimator: str = "rloo") -> tuple[float, float]:
    """The bound of the training images, before and after."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data).float().div(16).round()
    model = VAE(dgrad.estimator(estimator))
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
