"""A variational auto-encoder of your own, trained in a plain loop."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dgrad


class VAE(nn.Module):
    """Any encoder and any decoder. The code has 20 variables of 10 values."""

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


def digits() -> tuple[Tensor, Tensor]:
    """Binary images of 8x8 pixels, to train on and to test on."""
    images = torch.from_numpy(load_digits().data).float().div(16).round()
    return images[:1500], images[1500:]


def train(steps: int = 2000, estimator: str = "direct-rb", **hyperparameters: object) -> tuple[float, float]:
    """The bound of the test images, before and after."""
    torch.manual_seed(0)
    images, test = digits()
    model = VAE(dgrad.estimator(estimator, **hyperparameters))
    model.estimator.set_run_length(steps)  # for a schedule such as epsilon="geometric:1:0.02"
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    with torch.no_grad():
        before = model(test).mean().item()
    for step in range(steps):
        model.estimator.set_step(step)
        loss = model(images[torch.randint(len(images), (100,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return before, model(test).mean().item()


if __name__ == "__main__":
    print("test bound before and after: {:.1f}, {:.1f}".format(*train(epsilon="geometric:1:0.02")))
