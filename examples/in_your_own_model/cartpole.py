"""CartPole: the loss of an action, the rest of its episode, is known long after the action was drawn."""

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import dgrad

LAYER = dgrad.latent("1x2")


@torch.no_grad()
def play(
    envs: gymnasium.vector.VectorEnv, policy: nn.Module, learner: dgrad.GradientEstimator
) -> tuple[Tensor, dgrad.Draw, Tensor]:
    """An episode of each environment: states `[T*B, 4]`, the draw, and which episodes still went on, `[T, B]`."""
    state, _ = envs.reset()
    states, draws, alive, running = [], [], [], np.ones(envs.num_envs, dtype=bool)
    while running.any():
        states.append(torch.from_numpy(state))
        draws.append(learner.draw(LAYER, policy(states[-1]).unsqueeze(1)))  # logits [B, 1, 2]
        alive.append(torch.from_numpy(running))
        actions = LAYER.indices(draws[-1].codes)[0, :, 0]  # [B]
        state, _, ended, truncated, _ = envs.step(actions.numpy())
        running = running & ~(ended | truncated)
    return torch.cat(states), dgrad.Draw.cat(draws), torch.stack(alive)


def train(rounds: int = 60, estimator: str = "reinforce") -> tuple[float, float]:
    """The mean length of the first and of the last episodes. An environment ends them after 500 steps."""
    torch.manual_seed(0)
    envs = gymnasium.make_vec("CartPole-v1", num_envs=16)
    envs.reset(seed=0)
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    learner = dgrad.estimator(estimator, baseline="none")
    optimizer, lengths = torch.optim.Adam(policy.parameters(), lr=0.01), []
    for _ in range(rounds):
        states, draw, alive = play(envs, policy, learner)
        to_go = alive.float().flip(0).cumsum(0).flip(0)  # the rest of each episode, [T, B]
        advantage = (to_go - to_go[alive].mean()) / to_go[alive].std()
        estimate = draw.estimate(-advantage.view(1, -1), logits=policy(states).unsqueeze(1))
        loss = estimate.loss[alive.flatten()].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lengths.append(alive.sum(0).float().mean().item())
    return lengths[0], sum(lengths[-5:]) / 5


if __name__ == "__main__":
    print("mean length of an episode before and after: {:.0f}, {:.0f}".format(*train()))
