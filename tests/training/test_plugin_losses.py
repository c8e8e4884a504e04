"""Losses of a batch and labels for images that a plugin of one's own gives: a semi-supervised recipe is a plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dgrad
from dgrad.config import TrainConfig, configure
from dgrad.registry import Plugin, registry
from dgrad.training.checkpoint import load_checkpoint
from dgrad.training.run_directory import Run
from dgrad.training.seeds import Seeds
from dgrad.training.trainer import Trainer, resume
from dgrad.vae.posterior import EncodedBatch

SETTINGS = {"latent": "3x4", "estimator": "leg", "epochs": 2, "device": "cpu", "batch-size": 300}
FEW = {**SETTINGS, "latent": "1x10", "labels": 30}


class Learned(nn.Module):
    """A loss with a parameter, a buffer and noise; it keeps what it was last called with."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, encoded: EncodedBatch) -> Tensor:
        self.last = encoded
        self.steps += 1
        noisy = encoded.seen + torch.empty_like(encoded.seen).normal_(generator=encoded.generator)
        self.value = (self.scale - encoded.encode(noisy).logits.square().mean()).square()
        return self.value


class Toy:
    """A plugin whose two hooks give what a test says."""

    def __init__(self) -> None:
        self.losses: Callable[[], object] = lambda: {"toy": Learned()}
        self.label: Callable[[Tensor, Tensor], object] = lambda index, labels: None

    @dgrad.hookimpl
    def dgrad_batch_losses(self, config: TrainConfig) -> object:
        return self.losses()

    @dgrad.hookimpl
    def dgrad_label_images(self, index: Tensor, labels: Tensor) -> object:
        return self.label(index, labels)


@pytest.fixture
def toy() -> Iterator[Toy]:
    plugin = Toy()
    registry().add(Plugin("toy", "toy", "", plugin))
    yield plugin
    registry().remove(plugin)


def _figures(run: Run) -> list[dict[str, object]]:
    return [{**line, "seconds": 0} for line in run.metrics()]


def test_a_loss_is_added_and_its_parameters_are_trained(toy: Toy) -> None:
    toy.losses = lambda: None
    plain = Trainer(configure(SETTINGS))
    toy.losses = lambda: {"toy": Learned()}
    trainer = Trainer(configure(SETTINGS))
    learned = trainer.loss.batch_losses["toy"]
    batch = next(trainer.batches)
    torch.testing.assert_close(trainer.loss(batch), plain.loss(batch) + learned.value, rtol=1e-6, atol=0)
    assert learned.value > 0 and learned.last.known is None and learned.last.codes is None
    before = learned.scale.detach().clone()
    trainer.train_step()
    assert learned.scale != before and learned.steps == 2


def test_a_loss_sees_the_images_as_the_encoder_and_which_labels_are_known(toy: Toy) -> None:
    trainer = Trainer(configure({**FEW, "input-dropout": 0.5}))
    batch = next(trainer.batches)
    trainer.loss(batch)
    seen = trainer.loss.batch_losses["toy"].last
    assert seen.batch is batch and not torch.equal(seen.seen, batch.images)
    torch.testing.assert_close(seen.encode(seen.seen).logits, seen.posterior.logits)
    assert seen.known.flatten().tolist() == (batch.labels >= 0).tolist()
    shown = batch.labels >= 0
    assert shown.any() and torch.equal(seen.codes[shown, 0].argmax(-1), batch.labels[shown])
    assert (seen.codes[~shown] == 0).all()


def test_a_resumed_run_with_a_learned_loss_equals_an_undisturbed_one(toy: Toy, tmp_path: Path) -> None:
    config = configure(FEW)
    whole, broken = (Run.create(tmp_path / name, config) for name in ("whole", "broken"))
    Trainer(config).train(whole)
    trainer = Trainer(config)
    for _ in range(3):
        trainer.train_step()
    trainer.save(broken)
    trainer, run = resume(broken.path)
    trainer.train(run)
    ours, theirs = (load_checkpoint(one.checkpoint_file)[0] for one in (broken, whole))
    assert ours.keys() >= {"toy.scale", "toy.steps", "supervision.mean"}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert _figures(broken)[-1]["valid_bound"] == _figures(whole)[-1]["valid_bound"]


def test_seeds_in_parallel_have_losses_of_their_own(toy: Toy, tmp_path: Path) -> None:
    Seeds.create(tmp_path / "seeds", configure(FEW), 2).train()
    alone = Run.create(tmp_path / "alone", configure({**FEW, "seed": 1}))
    Trainer(alone.config).train(alone)
    assert _figures(Run(tmp_path / "seeds" / "seed1")) == _figures(alone)


def test_initial_weights_are_the_seeds_and_torchs_generator_stays(toy: Toy) -> None:
    state = torch.random.get_rng_state()
    trainers = [Trainer(configure({**SETTINGS, "seed": seed})) for seed in (0, 0, 1)]
    scales = [trainer.loss.batch_losses["toy"].scale.item() for trainer in trainers]
    assert scales[0] == scales[1] != scales[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_step_is_recorded_where_every_loss_says_so(toy: Toy) -> None:
    assert not Trainer(configure(FEW)).loss.recordable
    toy.losses = lambda: {"toy": dgrad.recordable(type("Recordable", (Learned,), {}))()}
    assert Trainer(configure({**FEW, "adversarial-weight": 1})).loss.recordable


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda: Learned(), "dgrad_batch_losses gives Learned; expected torch modules by name, or None"),
        (lambda: {"toy": torch.relu}, "dgrad_batch_losses gives dict; expected torch modules by name, or None"),
        (
            lambda: {"model": Learned()},
            "names a loss 'model'; expected an identifier other than model, best, estimator",
        ),
        (lambda: {"a.b": Learned()}, r"names a loss 'a\.b'; expected an identifier"),
        (lambda: {"supervision": Learned()}, "names a loss 'supervision'; expected an identifier other than"),
    ],
    ids=["bare", "function", "reserved", "dot", "taken"],
)
def test_other_losses_are_refused(toy: Toy, losses: Callable[[], object], message: str) -> None:
    toy.losses = losses
    with pytest.raises(dgrad.InputError, match=message):
        Trainer(configure(FEW))


def test_a_plugin_gives_labels_to_more_images(toy: Toy) -> None:
    toy.label = lambda index, labels: (torch.arange(200), torch.arange(200) % 10)
    trainer = Trainer(configure({**FEW, "propagate-labels": 0.9}))
    assert trainer.labelled_images == 200, "a plugin's own comes before the built-in one"
    batch = next(trainer.batches)
    shown = batch.labels >= 0
    assert int(shown.sum()) == trainer.config.labelled_batch
    assert torch.equal(batch.labels[shown], batch.index[shown] % 10)


@pytest.mark.parametrize(
    "label",
    [
        lambda index, labels: (index[:0], labels[:0]),
        lambda index, labels: (index, labels[1:]),
        lambda index, labels: (index, labels[:, None]),
        lambda index, labels: (index + 1297, labels),
        lambda index, labels: (index, labels + 10),
    ],
    ids=["none", "fewer", "axes", "outside", "value"],
)
def test_other_labels_are_refused(toy: Toy, label: Callable[[Tensor, Tensor], object]) -> None:
    toy.label = label
    message = r"dgrad_label_images gives places .* expected \[M\] places from 0 to 1296 and \[M\] labels from -1 to 9"
    with pytest.raises(dgrad.InputError, match=message):
        Trainer(configure(FEW))
