"""Feature selection: a classifier that sees four of thirty features. Which four is learned with it."""

from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import dgrad

dgrad.load_plugin(str(Path(__file__).parents[1] / "subset.py"))


class Selection(nn.Module):
    """One score for each feature. A code is a subset of four: `[B, 30]`, zeros and four ones."""

    def __init__(self, estimator: dgrad.GradientEstimator) -> None:
        super().__init__()
        self.layer, self.estimator = dgrad.latent("subset:4of30"), estimator
        self.scores = nn.Parameter(torch.zeros(30))
        self.classifier = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """The cross-entropy of each example, in nats: `[B, 30]` and `[B]` to `[B]`."""
        logits, rows = self.scores.expand(len(x), -1), torch.arange(len(x))

        def loss(subset: Tensor) -> Tensor:  # [S, B, 30] to [S, B]
            return -self.classifier(subset * x).log_softmax(-1)[:, rows, label]

        return self.estimator(self.layer, logits, loss).loss

    def accuracy(self, x: Tensor, label: Tensor) -> float:
        """With the most probable subset."""
        subset = self.layer.argmax(self.scores)
        return (self.classifier(subset * x).argmax(-1) == label).float().mean().item()


def train(steps: int = 1000, estimator: str = "rloo") -> tuple[float, float]:
    """The accuracy on examples that were held out, before and after."""
    torch.manual_seed(0)
    x, label = (torch.from_numpy(array) for array in load_breast_cancer(return_X_y=True))
    x, order = ((x - x.mean(0)) / x.std(0)).float(), torch.randperm(len(x))
    train, test = order[:400], order[400:]
    model = Selection(dgrad.estimator(estimator))
    optimizer, before = torch.optim.Adam(model.parameters(), lr=0.01), model.accuracy(x[test], label[test])
    for _ in range(steps):
        batch = train[torch.randint(len(train), (100,))]
        loss = model(x[batch], label[batch]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, model.accuracy(x[test], label[test])


if __name__ == "__main__":
    print("accuracy before and after: {:.3f}, {:.3f}".format(*train()))
