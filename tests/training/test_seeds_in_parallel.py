"""Several seeds at once: each is the run that it would be alone; their directory is interrupted, resumed and read."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import StopAt, run_with_output

from dgrad.config import configure
from dgrad.errors import InputError
from dgrad.training.checkpoint import load_checkpoint
from dgrad.training.cuda_graph import CudaGraphSteps
from dgrad.training.listener import Progress
from dgrad.training.run_directory import Run
from dgrad.training.seeds import Seeds, summarize
from dgrad.training.step import Lockstep
from dgrad.training.trainer import Interrupted, Trainer, resume
from dgrad_cli.display import Watcher

SETTINGS = {"latent": "3x4", "estimator": "rloo", "epochs": 2, "device": "cpu", "batch-size": 300, "seed": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "a scheduled epsilon": {"estimator": "direct-rb", "set": {"epsilon": "geometric:1:0.1"}, "input-dropout": 0.1},
    "a learned control variate": {"estimator": "relax", "latent": "2x3"},
    "static pixels": {"estimator": "gumbel-softmax", "binarize": "static"},
    "pixels drawn anew": {"estimator": "reinforce", "binarize": "dynamic"},
    "labels": {"latent": "1x10", "labels": 40, "labelled-batch": 20, "label-loss": "code", "augment": True},
    "a mixture": {"latent": "1x10", "model": "mixture", "gaussian": 4, "kl": "inside"},
}


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_interrupted_and_resumed_they_equal_undisturbed_ones(tmp_path: Path) -> None:
    config = configure({**SETTINGS, **VARIANTS["a scheduled epsilon"]})
    whole = Seeds.create(tmp_path / "whole", config, 3)
    whole.train()
    listener = StopAt(3)
    broken = listener.trainer = Seeds.create(tmp_path / "broken", config, 3, listener)
    with pytest.raises(Interrupted, match=r"stopped at step 3 of .*--resume \S+broken$"):
        broken.train()
    resumed = Seeds.resume(tmp_path / "broken")
    assert [trainer.step for trainer in resumed.trainers] == [3, 3, 3]
    resumed.train()
    for ours, theirs in zip(resumed.runs.values(), whole.runs.values(), strict=True):
        assert_same(ours, theirs)


@pytest.mark.slow
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
    total = resumed.trainers[0].facts.steps
    assert [trainer.step for trainer in resumed.trainers] == [0, 2, total]
    resumed.train()
    for ours, theirs in zip(resumed.runs.values(), whole.runs.values(), strict=True):
        assert_same(ours, theirs)


def test_those_behind_step_first() -> None:
    trainers = [Trainer(configure({**SETTINGS, "seed": seed})) for seed in (0, 1, 2)]
    trainers[2].train_step()
    steps = [trainer.training_step for trainer in trainers]
    lockstep = Lockstep(steps)
    assert lockstep.advance() == steps[:2]
    assert lockstep.advance() == steps
    lockstep.leave_out(steps[0])
    assert lockstep.advance() == steps[1:]
    assert [trainer.step for trainer in trainers] == [2, 3, 3]


class Recorded(CudaGraphSteps):
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


@pytest.mark.slow
def test_one_graph_has_the_steps_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With calls in the place of the graph: whole batches are replayed, the short one at the end of an epoch is not."""
    monkeypatch.setattr("dgrad.training.step.CudaGraphSteps", Recorded)
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    settings = {**SETTINGS, **VARIANTS["a scheduled epsilon"]}
    plain, recorded = (
        [Trainer(configure({**settings, "seed": seed})).training_step for seed in (0, 1, 2)] for _ in range(2)
    )
    for step in recorded:
        step.uses_cuda_graph = True
        for group in step.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    lockstep = Lockstep(recorded)
    assert len(plain[0].batches.order) % 300, "the last batch of an epoch should be short"
    alone = [Lockstep([step]) for step in plain]
    for _ in range(plain[0].total - 1):
        lockstep.advance()
        for each in alone:
            each.advance()
    lockstep.leave_out(recorded[0])
    lockstep.advance()
    alone[1].advance()
    assert Recorded.made == [3, 2]
    total = plain[0].total
    assert [step.number for step in recorded] == [total - 1, total, total]
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


def poison(trainer: Trainer) -> None:
    """Make the weights of a trainer infinite."""
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("inf"))


def test_a_seed_that_fails_is_named_and_left_behind(tmp_path: Path) -> None:
    seeds = Seeds.create(tmp_path / "seeds", configure(SETTINGS), 3)
    poison(seeds.trainers[0])
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


# The command

SMALL = ["train", "--latent", "3x4", "--estimator", "rloo", "--epochs", "2", "--batch-size", "300", "--device", "cpu"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        return run_with_output(capsys, *arguments)

    return call


@pytest.mark.slow
def test_the_command_trains_reports_and_leaves_ordinary_runs(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = command(*SMALL, "--seeds-in-parallel", 2, "--seed", 5, "--out", "seeds")
    assert code == 0, err
    summary = json.loads(Path("seeds/summary.json").read_text())
    bound = summary["test_bound"]
    assert f"{bound['mean']:.2f} ± {bound['standard_deviation']:.2f} nats" in out
    for seed in ("5", "6"):
        assert f"{summary['seeds'][seed]['test_bound']:.2f}" in out
        assert command("evaluate", f"seeds/seed{seed}")[0] == 0
        assert command("sample", f"seeds/seed{seed}", "--out", f"{seed}.png")[0] == 0
        assert command("train", "--resume", f"seeds/seed{seed}")[0] == 0
    again = command("train", "--resume", "seeds", "--json")
    assert again[0] == 0
    assert json.loads(again[1]) == {"run": "seeds", **summary}

    code, _, err = command(*SMALL, "--seeds-in-parallel", 2, "--out", "seeds")
    assert (code, "exists already" in err) == (2, True)
    assert command(*SMALL, "--seeds-in-parallel", 1, "--out", "seeds", "--overwrite", "--quiet")[0] == 0
    assert sorted(path.name for path in Path("seeds").iterdir()) == ["seed0", "seeds.json", "summary.json"]


@pytest.mark.slow
def test_pictures_that_are_missing_are_made(command: Callable[..., tuple[int, str, str]]) -> None:
    assert command(*SMALL, "--seeds-in-parallel", 2, "--out", "seeds")[0] == 0
    before = json.loads(Path("seeds/summary.json").read_text())
    Path("seeds/seed1/curves.png").unlink()
    assert command("train", "--resume", "seeds")[0] == 0
    assert Path("seeds/seed1/curves.png").is_file()
    after = json.loads(Path("seeds/summary.json").read_text())
    assert after["test_bound"] == before["test_bound"]


@pytest.mark.slow
def test_ctrl_c_saves_all_and_says_how_to_go_on(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Watcher, progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Watcher, "stepped", interrupt)
        code, _, err = command(*SMALL, "--seeds-in-parallel", 2, "--out", "seeds")
    assert code == 130
    assert "dgrad train --resume seeds" in err
    assert [load_checkpoint(Path(f"seeds/seed{seed}/checkpoint.safetensors"))[1]["step"] for seed in (0, 1)] == [3, 3]
    code, out, _ = command("train", "--resume", "seeds")
    assert (code, "mean and standard deviation of 2 seeds" in out) == (0, True)


def test_a_seed_that_fails_is_named_on_the_command_line(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Trainer.begin

    def begin_poisoned(trainer: Trainer, run: Run, home: Path) -> None:
        begin(trainer, run, home)
        if trainer.config.seed == 0:
            poison(trainer)

    monkeypatch.setattr(Trainer, "begin", begin_poisoned)
    code, out, err = command(*SMALL, "--seeds-in-parallel", 2, "--out", "seeds")
    assert code == 1
    assert "1 of 2 seeds failed: seed 0: the loss is not finite" in err
    assert "seeds/seed1" in out


def test_torchrun_and_settings_of_a_resumed_run_are_refused(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*SMALL, "--seeds-in-parallel", 1, "--out", "seeds")[0] == 0
    code, _, err = command("train", "--resume", "seeds", "--seeds-in-parallel", 2)
    assert (code, "leave out --seeds-in-parallel" in err) == (2, True)
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    for arguments in ([*SMALL, "--seeds-in-parallel", 2, "--out", "other"], ["train", "--resume", "seeds"]):
        code, _, err = command(*arguments)
        assert (code, "leave torchrun out" in err) == (2, True)
    assert not Path("other").exists()


def test_the_bar_moves_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of our own: 1,000 steps in a second move it ten times, and the last step always does."""
    clock = [0.0]
    monkeypatch.setattr("dgrad_cli.display.time.monotonic", lambda: clock[0])
    watcher = Watcher(quiet=False, to_stderr=True)
    facts = Trainer(configure({**SETTINGS, "steps": 1001})).facts
    moved: list[int] = []

    class Bar:
        task_ids = (0,)

        def update(self, task: int, completed: int, rate: str) -> None:
            moved.append(completed)

    watcher.bar = Bar()  # type: ignore[assignment]
    for step in range(1, 1001):
        clock[0] += 0.001
        watcher.stepped(Progress(facts, step, clock[0]))
    assert 9 <= len(moved) <= 11
    watcher.stepped(Progress(facts, 1001, clock[0]))
    assert moved[-1] == 1001
