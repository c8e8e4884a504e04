"""A contextual bandit: act now, and learn from the reward of the arm that was pulled."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dgrad


class Bandit:
    """The context is an image of a digit. The arm with its number pays 1, the others nothing."""

    def __init__(self) -> None:
        self.images, self.classes = (torch.from_numpy(array) for array in load_digits(return_X_y=True))

    def contexts(self, count: int) -> Tensor:
        """Some images: `[B, 64]`."""
        self.shown = torch.randint(len(self.images), (count,))
        return self.images[self.shown].float() / 16

    def pull(self, arms: Tensor) -> Tensor:
        """The reward of each arm: integers `[B]` to `[B]`. It can be asked once."""
        return (arms == self.classes[self.shown]).float()


def train(rounds: int = 1000, estimator: str = "reinforce") -> tuple[float, float]:
    """The mean reward of the first and of the last ten rounds."""
    torch.manual_seed(0)
    bandit, layer, learner = Bandit(), dgrad.latent("1x10"), dgrad.estimator(estimator)
    policy = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.005)
    rewards = []
    for _ in range(rounds):
        logits = policy(bandit.contexts(32)).unsqueeze(1)  # [B, 1, 10]
        draw = learner.draw(layer, logits)  # draw.codes: [1, B, 1, 10]
        reward = bandit.pull(layer.indices(draw.codes)[0, :, 0])  # [B]
        loss = draw.estimate(-reward.unsqueeze(0)).loss.mean()  # [S, B] losses: lower is better
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(reward.mean().item())
    return sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10


if __name__ == "__main__":
    print("mean reward before and after: {:.2f}, {:.2f}".format(*train()))
