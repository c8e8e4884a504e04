"""Training: resuming bit for bit, generators that do not feed each other, and failing without loss."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import StopAt

import dgrad
from dgrad.config import TrainConfig, configure
from dgrad.registry import Plugin, registry
from dgrad.training.checkpoint import load_checkpoint, save_checkpoint
from dgrad.training.listener import Listener, Progress
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.training.trainer import Interrupted, Trainer, resume
from dgrad.vae.evaluation import evaluation_generator

SETTINGS = {"latent": "3x4", "estimator": "rloo", "epochs": 3, "device": "cpu"}
VARIANTS = [
    {},
    {"estimator": "direct", "set": {"epsilon": "geometric:1:0.1"}, "lr": "cosine:0.01:0", "input-dropout": 0.1},
    {"estimator": "reinforce", "binarize": "dynamic", "weight-decay": 0.01},
    {"estimator": "direct-rb", "model": "mlp", "hidden": "20", "likelihood": "squared-error", "binarize": "none"},
    {"estimator": "gumbel-softmax", "kl": "inside", "binarize": "static", "steps": 20},
    {"estimator": "leg", "refine-steps": 2, "eval-refine-steps": 3},
]


def _stopping(config: TrainConfig, step: int) -> Trainer:
    """A trainer that is asked to stop after a step."""
    listener = StopAt(step)
    listener.trainer = Trainer(config, listener)
    return listener.trainer


def _figures(run: Run) -> tuple[list[dict[str, object]], dict[str, object]]:
    summary = run.summary()
    assert summary is not None
    timeless = {key: value for key, value in summary.items() if key != "seconds"}
    return [{key: value for key, value in line.items() if key != "seconds"} for line in run.metrics()], timeless


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: str(variant.get("estimator", "rloo")))
@pytest.mark.parametrize("stop_at", [7, pytest.param(13, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    tmp_path: Path, variant: dict[str, object], stop_at: int
) -> None:
    config = configure({**SETTINGS, **variant})
    whole = Run.create(tmp_path / "whole", config)
    Trainer(config).train(whole)

    broken = Run.create(tmp_path / "broken", config)
    with pytest.raises(Interrupted, match="continue with: dgrad train --resume"):
        _stopping(config, stop_at).train(broken)
    assert broken.summary() is None
    trainer, run = resume(tmp_path / "broken")
    assert trainer.step == stop_at
    trainer.train(run)

    assert _figures(broken) == _figures(whole)
    ours, theirs = load_checkpoint(broken.checkpoint_file)[0], load_checkpoint(whole.checkpoint_file)[0]
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.slow
@pytest.mark.processes
def test_kill_9_then_resume_equals_an_undisturbed_run(tmp_path: Path) -> None:
    """A process killed without warning, at whatever point, loses at most what came after its last checkpoint."""
    command = [
        sys.executable,
        "-m",
        "dgrad_cli",
        "train",
        "--latent",
        "3x4",
        "--estimator",
        "rloo",
        "--epochs",
        "60",
        "--device",
        "cpu",
    ]
    root = Path(__file__).parents[2]
    path = os.pathsep.join(str(root / part) for part in (".", "plugins", "cli", "export"))
    environment = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL
    )
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert Run.open(tmp_path / "killed").summary() is None, "killed before its end"
    trainer, killed = resume(tmp_path / "killed")
    trainer.train(killed)
    whole = Run.create(tmp_path / "whole", killed.config)
    Trainer(killed.config).train(whole)
    assert _figures(killed) == _figures(whole)
    ours, theirs = (load_checkpoint(run.checkpoint_file)[0] for run in (killed, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
def test_evaluating_more_often_changes_no_weight(tmp_path: Path) -> None:
    weights = []
    for every in (1, 3):
        config = configure({**SETTINGS, "estimator": "direct", "latent": "8x3", "eval-every": every})
        run = Run.create(tmp_path / str(every), config)
        Trainer(config).train(run)
        assert len(run.metrics()) == 3 // every
        weights.append(
            {
                name: tensor
                for name, tensor in load_checkpoint(run.checkpoint_file)[0].items()
                if name.startswith("model.")
            }
        )
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
def test_the_seed_decides_and_the_global_generator_does_not(tmp_path: Path) -> None:
    bounds = []
    for name, seed, disturbance in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        torch.manual_seed(disturbance)
        config = configure({**SETTINGS, "estimator": "direct", "seed": seed})
        run = Run.create(tmp_path / name, config)
        torch.rand(disturbance)
        bounds.append(Trainer(config).train(run)["test_bound"])
    assert bounds[0] == bounds[1] != bounds[2]


def test_every_purpose_has_noise_of_its_own() -> None:
    """Torch's generator on a CPU looks at the lower 32 bits of a seed alone."""
    trainer = Trainer(configure({"model": "mixture", "latent": "1x10", "labels": 50, "seed": 3, "device": "cpu"}))
    generators = [
        *trainer.batches.generators,
        trainer.training_step.noise,
        evaluation_generator(trainer.device, 3),
        torch.Generator().manual_seed(3),  # that of the weights
    ]
    assert len({tuple(torch.rand(4, generator=each).tolist()) for each in generators}) == len(generators) == 5


@pytest.mark.slow
def test_training_learns(train: Callable[..., Run]) -> None:
    lines = train(estimator="direct-rb", latent="8x4", epochs=20, lr="0.01").metrics()
    assert lines[-1]["valid_bound"] < 0.75 * lines[0]["valid_bound"]
    assert lines[-1]["valid_kl"] > 1, "the code is used"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = configure({**SETTINGS, "lr": "exponential:1e-3:0:1", "epochs": 50})
    run = Run.create(tmp_path / "run", config)

    class Poison(Listener):
        def stepped(self, progress: Progress) -> None:
            if progress.step == 30:
                with torch.no_grad():
                    next(trainer.model.parameters()).fill_(math.nan)

    trainer = Trainer(config, Poison())
    with pytest.raises(
        dgrad.RunError, match=r"the loss is not finite .* at step 39; .* keeps its last good checkpoint"
    ):
        trainer.train(run)
    tensors, state = load_checkpoint(run.checkpoint_file)
    assert state["step"] <= 26
    assert all(tensor.isfinite().all() for name, tensor in tensors.items() if tensor.is_floating_point())
    assert [line["step"] for line in run.metrics()] == [13, 26]


def test_best_weights_are_a_copy_and_not_the_last(tmp_path: Path) -> None:
    """The learning rate explodes after the second epoch: the best weights must be from before."""
    config = configure({**SETTINGS, "lr": "linear:0.001:3", "epochs": 6})
    run = Run.create(tmp_path / "run", config)
    summary = Trainer(config).train(run)
    assert summary["best"]["step"] < summary["final"]["step"]
    assert summary["best"]["test_bound"] == summary["test_bound"] < summary["final"]["test_bound"]
    best, last = load_model(run, "best")[0], load_model(run, "last")[0]
    assert not torch.equal(best.decoder.first.weight, last.decoder.first.weight)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 0.5])
def test_the_kl_inside_and_outside_have_the_same_mean_gradient(kl_weight: float) -> None:
    """`leg` is exact with one variable, so that inside and outside must agree but for rounding."""
    gradients = []
    for place in ("inside", "outside"):
        trainer = Trainer(
            configure({**SETTINGS, "estimator": "leg", "latent": "1x6", "kl": place, "kl-weight": kl_weight})
        )
        trainer.train_step()
        gradients.append(trainer.model.encoder.body[0].weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_weight_decay_is_decoupled_and_spares_biases() -> None:
    trainer = Trainer(configure({**SETTINGS, "weight-decay": 0.3}))
    decays = {
        id(parameter): group["weight_decay"]
        for group in trainer.training_step.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in trainer.model.named_parameters():
        assert decays[id(parameter)] == (0.0 if name.endswith("bias") else 0.3), name


@pytest.mark.slow
def test_hooks_see_a_run_and_code_losses_join_the_objective(tmp_path: Path) -> None:
    seen: list[str] = []

    class Toy:
        @dgrad.hookimpl
        def dgrad_train_start(self, run: Path) -> None:
            seen.append("start")

        @dgrad.hookimpl
        def dgrad_evaluation_end(self, metrics: dict[str, object]) -> None:
            seen.append(f"evaluation {metrics['step']}")

        @dgrad.hookimpl
        def dgrad_train_end(self, summary: dict[str, object]) -> None:
            seen.append("end")

        @dgrad.hookimpl
        def dgrad_code_losses(self, batch: object, config: object) -> object:
            return lambda codes: 100 * codes[..., 0].sum(-1)  # the first value is dear

    toy = Toy()
    registry().add(Plugin("toy", "toy", "", toy))
    try:
        config = configure({**SETTINGS, "lr": "0.05", "epochs": 20, "estimator": "leg"})
        trainer = Trainer(config)
        trainer.train(Run.create(tmp_path / "run", config))
    finally:
        registry().remove(toy)
    assert seen[0] == "start"
    assert seen[-1] == "end"
    assert seen[1:-1] == [f"evaluation {13 * epoch}" for epoch in range(1, 21)]
    codes = trainer.model.layer.argmax(trainer.model.encoder(trainer.data.test.images.float() / 255))
    assert codes[..., 0].mean() < 0.02, "and so it is hardly used"


def test_a_run_directory_is_complete(train: Callable[..., Run]) -> None:
    run = train()
    assert {path.name for path in run.path.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoint.safetensors",
    }
    summary = json.loads(run.summary_file.read_text())
    assert summary["best"]["test_bound"] == summary["test_bound"]
    assert summary["steps"] == 26
    assert configure(json.loads(run.config_file.read_text())) == run.config


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty", "other"])
def test_a_damaged_checkpoint_is_refused(train: Callable[..., Run], damage: str, tmp_path: Path) -> None:
    run = train()
    data = run.checkpoint_file.read_bytes()
    if damage == "other":
        other = train("other", latent="2x2")
        data = other.checkpoint_file.read_bytes()
    run.checkpoint_file.write_bytes(
        {"truncate": data[:-100], "garbage": b"x" * 1000, "empty": b"", "other": data}[damage]
    )
    with pytest.raises(dgrad.InputError, match=r"checkpoint .*(is damaged|does not fit the model)"):
        load_model(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("image_shape"), "its state lacks image_shape"),
        (lambda state: state.update(step="seven"), "is damaged"),
        (lambda state: state.update(image_shape=3), "is damaged"),
        (lambda state: state["config"].update(lr="1"), r"config\.json was changed since the run began \(lr\)"),
    ],
)
def test_a_checkpoint_whose_state_is_wrong_is_refused(
    train: Callable[..., Run], change: Callable[..., object], message: str
) -> None:
    run = train()
    tensors, state = load_checkpoint(run.checkpoint_file)
    change(state)
    save_checkpoint(run.checkpoint_file, tensors, state)
    with pytest.raises(dgrad.InputError, match=message):
        load_model(run, "last")
        resume(run.path)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["noise", "optimizer.", "batches.position", "loss_sum"])
def test_a_checkpoint_that_lacks_a_part_is_not_resumed(train: Callable[..., Run], missing: str) -> None:
    run = train()
    tensors, state = load_checkpoint(run.checkpoint_file)
    save_checkpoint(
        run.checkpoint_file, {name: value for name, value in tensors.items() if not name.startswith(missing)}, state
    )
    with pytest.raises(dgrad.InputError, match="is damaged"):
        resume(run.path)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "estimator", ["direct", "direct-rb", "leg", "gumbel-softmax", "st-gumbel-softmax", "reinforce", "rloo"]
)
def test_no_step_waits_for_the_device(estimator: str) -> None:
    settings = {
        "estimator": estimator,
        "device": "cuda",
        "binarize": "dynamic",
        "input-dropout": 0.1,
        "lr": "cosine:0.01:0",
    }
    trainer = Trainer(configure({**SETTINGS, **settings}))
    trainer.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):  # over the end of an epoch
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(trainer.training_step.loss_sum)
