"""A mixture of experts with sparse dispatch: each example runs through the one expert that was chosen for it."""

import torch
from torch import Tensor, nn

import dgrad


class Mixture(nn.Module):
    """A router chooses one of eight experts for each example."""

    def __init__(self, estimator: dgrad.GradientEstimator) -> None:
        super().__init__()
        self.layer, self.estimator = dgrad.latent("1x8"), estimator
        self.router = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 8))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1)) for _ in range(8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The squared error of each example: `[B, 2]` and `[B]` to `[B]`."""
        logits = self.router(x).unsqueeze(1)  # [B, 1, 8]
        objective = dgrad.objective(lambda chosen: (self.dispatch(x, chosen) - y).square(), indices=True)
        return self.estimator(self.layer, logits, objective).loss + 0.01 * self.layer.kl(logits)

    def dispatch(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The chosen experts' predictions: integers `[S, B, 1]` to `[S, B]`. An expert runs on its own examples."""
        inputs = x.expand(len(chosen), -1, -1).flatten(0, 1)  # [S*B, 2]
        result = x.new_zeros(len(inputs))
        for number, expert in enumerate(self.experts):
            (mine,) = torch.where(chosen.flatten() == number)
            result = result.index_put((mine,), expert(inputs[mine]).squeeze(-1))
        return result.view(chosen.shape[:2])


def examples(count: int) -> tuple[Tensor, Tensor]:
    """Points of the plane and a function that jumps between its four quarters."""
    x = torch.rand(count, 2) * 2 - 1
    quarter = (x > 0).long() @ torch.tensor([1, 2])
    slopes = torch.tensor([[2.0, -1.0], [-2.0, 1.0], [1.0, 2.0], [-1.0, -2.0]])[quarter]
    return x, (slopes * x).sum(-1) + quarter


def train(steps: int = 2000, estimator: str = "rloo") -> tuple[float, float]:
    """The loss before and after."""
    torch.manual_seed(0)
    model = Mixture(dgrad.estimator(estimator))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.005), []
    for _ in range(steps):
        loss = model(*examples(100)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10


if __name__ == "__main__":
    print("loss before and after: {:.2f}, {:.2f}".format(*train()))
