"""Several seeds at once: each is the run that it would be alone, and their directory can be interrupted, resumed and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dgrad.captured import CapturedSteps
from dgrad.config import configure
from dgrad.errors import InputError
from dgrad.files import load_checkpoint
from dgrad.listener import Listener
from dgrad.runs import Run
from dgrad.seeds import Lockstep, Seeds, summarize
from dgrad.training import Interrupted, Trainer, resume

SETTINGS = {"latent": "3x4", "estimator": "rloo", "epochs": 2, "device": "cpu", "batch-size": 300, "seed": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "a scheduled epsilon": {"estimator": "direct-rb", "set": {"epsilon": "geometric:1:0.1"}, "input-dropout": 0.1},
    "a learned control variate": {"estimator": "relax", "latent": "2x3"},
    "static pixels": {"estimator": "gumbel-softmax", "binarize": "static"},
    "pixels drawn anew": {"estimator": "reinforce", "binarize": "dynamic"},
    "labels": {"latent": "1x10", "labels": 40, "labelled-batch": 20, "label-loss": "code", "augment": True},
    "a mixture": {"latent": "1x10", "model": "mixture", "gaussian": 4, "kl": "inside"},
}


class StopAt(Listener):
    """Asks the seeds to stop after a step of the first one."""

    def __init__(self, step: int) -> None:
        self.at = step
        self.seeds: Seeds | None = None

    def stepped(self, trainer: Trainer) -> None:
        if trainer.step == self.at and self.seeds is not None:
            self.seeds.stop()


def timeless(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != "seconds"}


def assert_same(ours: Run, theirs: Run) -> None:
    """Bit for bit, but for the seconds."""
    assert [timeless(line) for line in ours.metrics()] == [timeless(line) for line in theirs.metrics()]
    assert timeless(ours.summary() or {}) == timeless(theirs.summary() or {})
    assert ours.config == theirs.config
    mine, other = load_checkpoint(ours.checkpoint_file)[0], load_checkpoint(theirs.checkpoint_file)[0]
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


def alone(path: Path, settings: dict[str, Any], seed: int) -> Run:
    trainer = Trainer(configure({**settings, "seed": seed}))
    run = Run.create(path, trainer.config)
    trainer.train(run)
    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_seed_is_the_run_that_it_is_alone(tmp_path: Path, variant: str) -> None:
    settings = {**SETTINGS, **VARIANTS[variant]}
    seeds = Seeds.create(tmp_path / "seeds", configure(settings), 2)
    summary = seeds.train()
    assert list(summary["seeds"]) == ["3", "4"]
    for seed in (3, 4):
        assert_same(Run.open(tmp_path / f"seeds/seed{seed}"), alone(tmp_path / str(seed), settings, seed))
    bounds = [summary["seeds"][seed]["test_bound"] for seed in "34"]
    assert bounds[0] != bounds[1]
    assert summary["test_bound"]["mean"] == pytest.approx(sum(bounds) / 2)
    assert summary["test_bound"]["standard_deviation"] == pytest.approx(abs(bounds[0] - bounds[1]) / 2**0.5)
    assert (summary["test_bound"]["least"], summary["test_bound"]["greatest"]) == (min(bounds), max(bounds))
    assert json.loads((tmp_path / "seeds/summary.json").read_text()) == summary


def test_interrupted_and_resumed_they_equal_undisturbed_ones(tmp_path: Path) -> None:
    config = configure({**SETTINGS, **VARIANTS["a scheduled epsilon"]})
    whole = Seeds.create(tmp_path / "whole", config, 3)
    whole.train()
    listener = StopAt(3)
    broken = listener.seeds = Seeds.create(tmp_path / "broken", config, 3, listener)
    with pytest.raises(Interrupted, match=r"stopped at step 3 of .*--resume \S+broken$"):
        broken.train()
    resumed = Seeds.resume(tmp_path / "broken")
    assert [trainer.step for trainer in resumed.trainers] == [3, 3, 3]
    resumed.train()
    for ours, theirs in zip(resumed.runs.values(), whole.runs.values(), strict=True):
        assert_same(ours, theirs)


def test_seeds_that_are_not_equally_far_are_brought_together(tmp_path: Path) -> None:
    """As after a kill, or after one of them was continued alone."""
    config = configure(SETTINGS)
    whole = Seeds.create(tmp_path / "whole", config, 3)
    whole.train()
    broken = Seeds.create(tmp_path / "broken", config, 3)
    for _ in range(2):
        broken.trainers[1].train_step()
    broken.trainers[1].save(broken.runs[broken.trainers[1]])
    trainer, run = resume(tmp_path / "broken/seed5")
    trainer.train(run)
    resumed = Seeds.resume(tmp_path / "broken")
    total = resumed.trainers[0].total_steps
    assert [trainer.step for trainer in resumed.trainers] == [0, 2, total]
    resumed.train()
    for ours, theirs in zip(resumed.runs.values(), whole.runs.values(), strict=True):
        assert_same(ours, theirs)


def test_those_behind_step_first() -> None:
    trainers = [Trainer(configure({**SETTINGS, "seed": seed})) for seed in (0, 1, 2)]
    trainers[2].train_step()
    lockstep = Lockstep(trainers)
    assert lockstep.step() == trainers[:2]
    assert lockstep.step() == trainers
    lockstep.leave_out(trainers[0])
    assert lockstep.step() == trainers[1:]
    assert [trainer.step for trainer in trainers] == [2, 3, 3]


class Recorded(CapturedSteps):
    """In the place of a graph: it calls the steps."""

    made: list[int]

    def __init__(self, steps: Any, state: Any, generators: Any) -> None:
        self.steps = steps
        self.made.append(len(steps))
        assert len({id(tensor) for tensor in state()}) % len(steps) == 0
        assert len({id(generator) for generator in generators}) == len(generators) >= 2 * len(steps)

    def replay(self) -> None:
        for step in self.steps:
            step()


def test_one_graph_has_the_steps_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With calls in the place of the graph: whole batches are replayed, the short one at the end of an epoch is not."""
    monkeypatch.setattr("dgrad.training.CapturedSteps", Recorded)
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    settings = {**SETTINGS, **VARIANTS["a scheduled epsilon"]}
    plain, recorded = ([Trainer(configure({**settings, "seed": seed})) for seed in (0, 1, 2)] for _ in range(2))
    for trainer in recorded:
        trainer.captures = True
        for group in trainer.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    lockstep = Lockstep(recorded)
    assert len(plain[0].batches.order) % 300, "the last batch of an epoch should be short"
    for _ in range(plain[0].total_steps - 1):
        lockstep.step()
        for trainer in plain:
            trainer.train_step()
    lockstep.leave_out(recorded[0])
    lockstep.step()
    plain[1].train_step()
    assert Recorded.made == [3, 2]
    assert [trainer.step for trainer in recorded] == [trainer.step for trainer in recorded[:1]] + [
        plain[1].step,
        plain[1].step,
    ]
    for ours, theirs in zip(recorded[:2], plain[:2], strict=True):
        # the rates of the ordinary one are float64, so that the last digits differ
        torch.testing.assert_close(ours.loss_sum, theirs.loss_sum, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("binarize", "shared"), [("threshold", True), ("none", True), ("dynamic", True), ("static", False)]
)
def test_the_images_are_in_memory_once(tmp_path: Path, binarize: str, shared: bool) -> None:
    settings = {**SETTINGS, "binarize": binarize}
    if binarize == "none":
        settings["likelihood"] = "squared-error"
    seeds = Seeds.create(tmp_path / "seeds", configure(settings), 3)
    places = {trainer.batches.split.images.data_ptr() for trainer in seeds.trainers}  # type: ignore[union-attr]
    assert len(places) == (1 if shared else 3)
    assert seeds.trainers[0].data.dataset is seeds.trainers[2].data.dataset


class Poison(Listener):
    """Makes the weights of what it listens to infinite."""

    def stepped(self, trainer: Trainer) -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(float("inf"))


def test_a_seed_that_fails_is_named_and_left_behind(tmp_path: Path) -> None:
    seeds = Seeds.create(tmp_path / "seeds", configure(SETTINGS), 3, Poison())
    summary = seeds.train()
    assert list(summary["problems"]) == ["3"]
    assert "the loss is not finite" in summary["problems"]["3"]
    assert list(summary["seeds"]) == ["4", "5"]
    assert_same(Run.open(tmp_path / "seeds/seed4"), alone(tmp_path / "alone", SETTINGS, 4))
    assert Run.open(tmp_path / "seeds/seed3").summary() is None


def test_a_mistake_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1; got 0"):
        Seeds.create(tmp_path / "seeds", configure(SETTINGS), 0)
    with pytest.raises(InputError, match=r"seed.*2\*\*62"):
        Seeds.create(tmp_path / "seeds", configure({**SETTINGS, "seed": 2**62 - 1}), 2)
    with pytest.raises(InputError, match="binary"):
        Seeds.create(tmp_path / "seeds", configure({**SETTINGS, "estimator": "arm"}), 2)
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "seeds"
    Seeds.create(path, configure(SETTINGS), 2)
    with pytest.raises(InputError, match=r"holds runs of several seeds; expected one of them, such as \S+seed3"):
        Run.open(path)
    other = configure({**SETTINGS, "seed": 4, "latent": "2x2"})
    (path / "seed4/config.json").write_text(other.to_json())
    with pytest.raises(InputError, match=r"differs from .*seed3 in more than its seed"):
        Seeds.resume(path)
    (path / "seeds.json").write_text("{}")
    with pytest.raises(InputError, match="does not list seeds"):
        Seeds.resume(path)


def test_without_a_finished_run_there_is_no_mean(tmp_path: Path) -> None:
    Seeds.create(tmp_path / "seeds", configure(SETTINGS), 2)
    assert summarize(tmp_path / "seeds") == {"test_bound": None, "seeds": {}, "problems": {}}
