"""The programs of the guide against the obvious code by hand: `python -m benchmarks.own_model`. Prints a table.

Each program takes a training step beside the same model with a few lines of plain PyTorch in the place of the
estimator. The contestants take turns in one process, whose own processor time counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

import dgrad
from benchmarks.machine import describe
from benchmarks.measuring import compared, take_turns

FOLDER = Path(__file__).parents[1] / "examples" / "in_your_own_model"
BATCH = 100
CPU = torch.device("cpu")
Actions = dict[str, Callable[[], object]]
"""Of each contestant, what takes one turn."""


def program(name: str) -> ModuleType:
    """A program of the guide, imported anew."""
    spec = importlib.util.spec_from_file_location(f"own_model_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stepper(model: nn.Module, batch: tuple[Tensor, ...]) -> Callable[[], None]:
    """A training step on one batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(*batch).mean().backward()
        optimizer.step()

    return step


def kl(logits: Tensor) -> Tensor:
    """KL to the uniform distribution, by hand."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q + math.log(logits.shape[-1]))).sum((-2, -1))


def binary_loss(pixels: Tensor, x: Tensor) -> Tensor:
    """Minus the log-likelihood of binary images."""
    return F.binary_cross_entropy_with_logits(pixels, x, reduction="none").sum(-1)


def leave_one_out(log_prob: Tensor, loss: Tensor) -> Tensor:
    """A loss `[B]` whose gradient is REINFORCE's, less the mean of the other samples: `[S, B]` twice."""
    samples = len(loss)
    advantage = (loss - loss.mean(0)).detach() * samples / (samples - 1)
    return (loss + advantage * (log_prob - log_prob.detach())).mean(0)


# The programs


def images() -> Tensor:
    """Binary images of 8x8 pixels."""
    return program("vae").digits()[0][:BATCH]


def by_hand(parent: Any) -> Any:
    """A class of an auto-encoder of 20x10 with Gumbel-softmax by hand."""

    class ByHand(parent):
        def forward(self, x: Tensor) -> Tensor:
            logits = self.encoder(x).unflatten(-1, (20, 10))
            return binary_loss(self.decoder(F.gumbel_softmax(logits, tau=0.5).flatten(-2)), x) + kl(logits)

    return ByHand


def auto_encoders(parent: Any) -> dict[str, Any]:
    """The contestants with such an auto-encoder."""
    return {
        "by hand": by_hand(parent)(dgrad.estimator("gumbel-softmax")),
        "gumbel-softmax": parent(dgrad.estimator("gumbel-softmax")),
        "direct-rb": parent(dgrad.estimator("direct-rb", epsilon="geometric:1:0.02")),
    }


def vae() -> Actions:
    """Gumbel-softmax."""
    return {name: stepper(model, (images(),)) for name, model in auto_encoders(program("vae").VAE).items()}


def sequence() -> Actions:
    """Straight-through Gumbel-softmax, padding left out of loss and KL."""
    module = program("sequence")
    length = 20
    mask = torch.arange(length) < torch.randint(3, length + 1, (64, 1))
    letters = torch.randint(37, (64, length)).masked_fill(~mask, -1)

    class ByHand(module.Bottleneck):
        def forward(self, letters: Tensor) -> Tensor:
            mask = letters >= 0
            hidden = self.encoder(self.embedding(letters.clamp(min=0)) + self.places, src_key_padding_mask=~mask)
            logits = self.to_logits(hidden).unflatten(-1, (2, 4))
            z = F.gumbel_softmax(logits, tau=0.5, hard=True)
            outputs = self.decoder(self.from_codes(z.flatten(-2)) + self.places, src_key_padding_mask=~mask)
            outputs = self.to_letters(outputs).mT
            losses = F.cross_entropy(outputs, letters, ignore_index=-1, reduction="none")
            return losses.sum(-1) + (kl(logits.flatten(0, 1)).view_as(mask) * mask).sum(-1)

    model = module.Bottleneck(dgrad.estimator("st-gumbel-softmax"), length)
    models = {"by hand": ByHand(None, length), "st-gumbel-softmax": model}
    return {name: stepper(model, (letters,)) for name, model in models.items()}


def attention() -> Actions:
    """REINFORCE, four samples less the mean of the others."""
    module = program("attention")
    batch = module.sets(BATCH)

    class ByHand(module.Attention):
        def forward(self, question: Tensor, cues: Tensor, images: Tensor, present: Tensor, label: Tensor) -> Tensor:
            scores = (self.key(cues) @ question.unsqueeze(-1)).squeeze(-1)
            choice = Categorical(logits=scores.masked_fill(~present, -math.inf), validate_args=False)
            chosen = choice.sample((4,))
            rows = torch.arange(len(images))
            loss = -self.classifier(images[rows, chosen]).log_softmax(-1)[:, rows, label]
            return leave_one_out(choice.log_prob(chosen), loss)

    models = {name: module.Attention(dgrad.estimator(name)) for name in ("rloo", "exact")}
    return {name: stepper(model, batch) for name, model in {"by hand": ByHand(None), **models}.items()}


def experts() -> Actions:
    """REINFORCE, four samples less the mean of the others."""
    module = program("experts")
    batch = module.examples(BATCH)

    class ByHand(module.Mixture):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            logits = self.router(x)
            choice = Categorical(logits=logits, validate_args=False)
            chosen = choice.sample((4,))
            loss = (self.dispatch(x, chosen.unsqueeze(-1)) - y).square()
            return leave_one_out(choice.log_prob(chosen), loss) + 0.01 * kl(logits.unsqueeze(1))

    models = {name: module.Mixture(dgrad.estimator(name)) for name in ("rloo", "exact")}
    return {name: stepper(model, batch) for name, model in {"by hand": ByHand(None), **models}.items()}


def selection() -> Actions:
    """The largest perturbed scores, a softmax's gradient straight through."""
    module = program("selection")
    batch = torch.randn(BATCH, 30), torch.randint(2, (BATCH,))

    class ByHand(module.Selection):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            logits = self.scores.expand(len(x), -1)
            perturbed = logits - torch.empty_like(logits).exponential_().log()
            hard = torch.zeros_like(logits).scatter_(-1, perturbed.topk(4).indices, 1.0)
            soft = 4 * logits.softmax(-1)
            subset = hard + soft - soft.detach()
            return F.cross_entropy(self.classifier(subset * x), label, reduction="none")

    models = {name: module.Selection(dgrad.estimator(name)) for name in ("straight-through", "rloo")}
    return {name: stepper(model, batch) for name, model in {"by hand": ByHand(None), **models}.items()}


def two_layers() -> Actions:
    """Gumbel-softmax, twice."""
    module, x = program("two_layers"), images()

    class ByHand(module.TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            first = self.to_first(x).unflatten(-1, (2, 10))
            z1 = F.gumbel_softmax(first, tau=0.5).flatten(-2)
            second = self.to_second(torch.cat([x, z1], -1)).unflatten(-1, (10, 4))
            z2 = F.gumbel_softmax(second, tau=0.5).flatten(-2)
            return binary_loss(self.from_first(z1) + self.from_second(z2), x) + kl(first) + kl(second)

    names = ("gumbel-softmax", "gumbel-softmax"), ("rloo", "reinmax"), ("rloo", "direct-rb")
    models = {"` and `".join(dict.fromkeys(pair)): module.TwoLayers(*map(dgrad.estimator, pair)) for pair in names}
    return {name: stepper(model, (x,)) for name, model in {"by hand": ByHand(None, None), **models}.items()}


def learned_prior() -> Actions:
    """Gumbel-softmax."""
    module, x = program("learned_prior"), images()

    class ByHand(module.VAE):
        def forward(self, x: Tensor) -> Tensor:
            logits = self.encoder(x).unflatten(-1, (8, 8))
            z = F.gumbel_softmax(logits, tau=0.5)
            log_q = logits.log_softmax(-1)
            loss = binary_loss(self.decoder(z.flatten(-2)), x) - self.prior.log_prob(z.unsqueeze(0)).squeeze(0)
            return loss + (log_q.exp() * log_q).sum((-2, -1))

    models = {name: module.VAE(dgrad.estimator(name)) for name in ("gumbel-softmax", "rloo", "leg")}
    return {name: stepper(model, (x,)) for name, model in {"by hand": ByHand(None), **models}.items()}


def bandit() -> Actions:
    """REINFORCE, less a moving average."""
    module = program("bandit")

    def by_hand() -> None:
        torch.manual_seed(0)
        bandit, average = module.Bandit(), 0.0
        policy = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.005)
        for _ in range(100):
            choice = Categorical(logits=policy(bandit.contexts(32)), validate_args=False)
            arms = choice.sample()
            reward = bandit.pull(arms)
            loss = -((reward - average) * choice.log_prob(arms)).mean()
            average += 0.01 * (reward.mean().item() - average)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return {"by hand": by_hand, "reinforce": lambda: module.train(100)}


def cartpole() -> Actions:
    """REINFORCE."""
    module = program("cartpole")
    envs, steps = module.gymnasium.make_vec("CartPole-v1", num_envs=16), 50

    class Timed:
        """Environments whose episodes all end after the same number of steps."""

        num_envs = 16

        def reset(self) -> Any:
            self.left = steps
            return envs.reset()

        def step(self, actions: Any) -> Any:
            self.left -= 1
            state, reward, ended, truncated, information = envs.step(actions)
            return state, reward, ended | True if self.left == 0 else ended & False, truncated & False, information

    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    learner, timed = dgrad.estimator("reinforce", baseline="none"), Timed()
    advantage = torch.randn(steps, 16)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)

    def learn(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def with_draw() -> None:
        states, draw, _ = module.play(timed, policy, learner)
        learn(draw.estimate(-advantage.view(1, -1), logits=policy(states).unsqueeze(1)).loss.mean())

    def by_hand() -> None:
        state, _ = timed.reset()
        states, taken = [], []
        with torch.no_grad():
            while timed.left:
                states.append(torch.from_numpy(state))
                taken.append(Categorical(logits=policy(states[-1]), validate_args=False).sample())
                state, *_ = timed.step(taken[-1].numpy())
        choice = Categorical(logits=policy(torch.cat(states)), validate_args=False)
        learn(-(advantage.view(-1) * choice.log_prob(torch.cat(taken))).mean())

    return {"by hand": by_hand, "reinforce": with_draw}


def with_lightning() -> Actions:
    """Gumbel-softmax in the same module."""
    module = program("with_lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    models = auto_encoders(module.VAE)
    return {name: partial(module.train, model, 2, accelerator="cpu", **quiet) for name, model in models.items()}


def with_accelerate() -> Actions:
    """Gumbel-softmax in the same loop, one process."""
    module = program("with_accelerate")
    return {name: partial(module.train, model, 2) for name, model in auto_encoders(module.VAE).items()}


PROGRAMS: dict[str, Callable[[], Actions]] = {
    builder.__name__: builder
    for builder in (
        vae,
        sequence,
        attention,
        experts,
        selection,
        two_layers,
        learned_prior,
        bandit,
        cartpole,
        with_lightning,
        with_accelerate,
    )
}
"""Of each program, what builds its contestants. Its docstring names the code by hand."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=3.0, help="what each contestant may use")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    machine = describe(CPU)
    print(f"{machine['date']}, {machine['processor']}, one thread, torch {machine['torch']}\n")
    print("| program | by hand | time with an estimator, the time by hand being 1 |\n|---|---|---|")
    for name in given.programs:
        torch.manual_seed(0)
        build = PROGRAMS[name]
        times = take_turns(build(), 10_000, CPU, seconds_each=given.seconds, of_processor=True)
        rows = compared(times, "by hand")
        ratios = (f"`{it}` {row['ratios']['by hand']:.2f}" for it, row in rows.items() if it != "by hand")
        print(f"| `{name}` | {(build.__doc__ or '').rstrip('.')} | {', '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
