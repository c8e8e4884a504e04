"""Hard attention over a set of variable length: the classifier sees the one image that was chosen."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dgrad

DIGITS, CLASSES = (torch.from_numpy(array) for array in load_digits(return_X_y=True))


class Attention(nn.Module):
    """Each image has a cue. The question resembles one of the cues, and asks for the class of its image."""

    def __init__(self, estimator: dgrad.GradientEstimator) -> None:
        super().__init__()
        self.layer, self.estimator = dgrad.latent("1x12"), estimator
        self.key, self.classifier = nn.Linear(8, 8), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, question: Tensor, cues: Tensor, images: Tensor, present: Tensor, label: Tensor) -> Tensor:
        """The cross-entropy of each set, in nats: `[B]`. `present [B, T]` says which images are there."""
        logits = (self.key(cues) @ question.unsqueeze(-1)).mT  # [B, 1, T]
        rows = torch.arange(len(images))

        def loss(chosen: Tensor) -> Tensor:  # integers [S, B, 1] to [S, B]
            image = images[rows, chosen.squeeze(-1)]  # [S, B, 64]
            return -self.classifier(image).log_softmax(-1)[:, rows, label]

        objective = dgrad.objective(loss, indices=True)
        return self.estimator(self.layer, logits, objective, allowed=present.unsqueeze(1)).loss


def sets(count: int) -> tuple[Tensor, ...]:
    """Sets of one to twelve digits. The question asks for the first one. Nothing else tells its place."""
    drawn = torch.randint(len(DIGITS), (count, 12))
    cues = torch.randn(count, 12, 8)
    question = cues[:, 0].roll(1, -1) + 0.1 * torch.randn(count, 8)
    present = torch.arange(12) < torch.randint(1, 13, (count, 1))
    return question, cues, DIGITS[drawn].float() / 16, present, CLASSES[drawn[:, 0]]


def train(steps: int = 1000, estimator: str = "rloo") -> tuple[float, float]:
    """The cross-entropy before and after, in nats: a guess has 2.3."""
    torch.manual_seed(0)
    model = Attention(dgrad.estimator(estimator))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.005), []
    for _ in range(steps):
        loss = model(*sets(100)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10


if __name__ == "__main__":
    print("cross-entropy before and after: {:.2f}, {:.2f}".format(*train()))
