"""Training by two real processes under torchrun, connected by gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dgrad
from dgrad.config import configure
from dgrad.data.batches import part_of
from dgrad.errors import InputError
from dgrad.registry import registry
from dgrad.training.checkpoint import load_checkpoint
from dgrad.training.processes import ProcessGroup
from dgrad.training.trainer import Trainer
from tests.training import distributed_processes as processes

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

HERE = Path(processes.__file__)
RUN = ["--latent", "2x3", "--batch-size", "50", "--seed", "3", "--device", "cpu", "--compile", "off", "--quiet"]


@pytest.fixture(autouse=True)
def _plugin_leaves_with_the_test() -> Iterator[None]:
    """What a test here loads in this process takes no part in the training of other files' tests."""
    yield
    for plugin in list(registry().plugins):
        if getattr(plugin.module, "__file__", None) == str(HERE):
            registry().remove(plugin.module)


def torchrun(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes of `distributed_processes.py`."""
    paths = os.pathsep.join([str(HERE.parents[2]), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE), *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes has after training."""
    folder = tmp_path_factory.mktemp("trained")
    done = torchrun("train", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_train_as_one_does_on_the_whole_batch(trained: list[dict[str, Any]]) -> None:
    """Without noise, to rounding errors: a last batch that cannot be halved, pixels drawn anew."""
    alone = Trainer(configure(processes.DETERMINISTIC))
    assert len(alone.batches.order) % alone.batches.batch_size % 2 == 1
    for _ in range(processes.STEPS):
        alone.train_step()
    for one in trained:
        together = one["deterministic"]
        torch.testing.assert_close(together["loss"], alone.training_step.loss_sum / processes.STEPS, rtol=1e-5, atol=0)
        for name, tensor in processes.weights(alone).items():
            torch.testing.assert_close(together["weights"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.processes
def test_each_process_has_noise_of_its_own_and_the_first_that_of_one_alone(trained: list[dict[str, Any]]) -> None:
    alone = Trainer(configure(processes.DETERMINISTIC))
    noise = [one["deterministic"]["noise"] for one in trained]
    assert torch.equal(noise[0], torch.rand(8, generator=alone.training_step.noise))
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.slow
@pytest.mark.processes
def test_with_every_estimator_all_processes_have_the_same_weights(trained: list[dict[str, Any]]) -> None:
    estimators = [one["estimators"] for one in trained]
    assert set(estimators[0]) >= set(dgrad.estimators()) - {"averaging-exact"}
    for name, weights in estimators[0].items():
        for key, tensor in weights.items():
            assert torch.equal(tensor, estimators[1][name][key]), f"{name}: {key}"
            assert tensor.isfinite().all()


@pytest.mark.slow
@pytest.mark.processes
def test_a_stopped_run_goes_on_bit_for_bit_with_one_writer(tmp_path: Path) -> None:
    plain, stopped = tmp_path / "plain", tmp_path / "stopped"
    train = ["train", *RUN, "--steps", "40", "--estimator", "relax", "--plugin", str(HERE)]
    first = torchrun("cli", *train, "--out", str(plain))
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stdout.count("test bound") == 1
    assert len((plain / "hooks.txt").read_text().splitlines()) == 1
    assert json.loads((plain / "summary.json").read_text())["processes"] == 2

    second = torchrun("cli", *train, "--out", str(stopped), TEST_STOP="1")
    assert second.returncode != 0
    assert (
        second.stderr.count(
            "stopped at step 20 of 40, state saved; continue with: torchrun --nproc-per-node=2 -m dgrad_cli train"
        )
        == 1
    )
    assert not (stopped / "summary.json").exists()
    third = torchrun("cli", "train", "--resume", str(stopped), "--quiet")
    assert third.returncode == 0, third.stderr[-3000:]
    one, other = (load_checkpoint(path / "checkpoint.safetensors")[0] for path in (plain, stopped))
    assert one.keys() == other.keys()
    assert "rank1.noise" in one
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name

    with pytest.raises(
        InputError, match=r"is a run of 2 process\(es\).*torchrun --nproc-per-node=2 -m dgrad_cli train --resume"
    ):
        from dgrad.training.trainer import resume

        resume(plain)


@pytest.mark.slow
@pytest.mark.processes
def test_what_is_wrong_is_said_once_and_ends_all(tmp_path: Path) -> None:
    done = torchrun("cli", "train", *RUN, "--estimator", "nonsense", "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("error: unknown estimator 'nonsense'") == 1
    assert not (tmp_path / "run").exists()


# The pieces, in one process


def test_parts_cover_a_batch_once() -> None:
    for count in range(1, 9):
        for ranks in range(1, 6):
            parts = [part_of(count, rank, ranks) for rank in range(ranks)]
            shown = [i for part, share in parts if share > 0 for i in range(count)[part]]
            assert shown == list(range(count))
            assert sum(share for _, share in parts) == pytest.approx(1)
            for part, share in parts:
                size = len(range(count)[part])
                assert size >= 1
                assert share == pytest.approx(size / count) or share == 0


def test_a_process_group_is_read_from_the_environment_of_torchrun() -> None:
    environment = {
        "TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"
    }  # fmt: skip
    group = ProcessGroup.from_environment(environment)
    assert group == ProcessGroup(rank=5, size=8, local_rank=1, local_size=4)
    assert group.command == "torchrun --nnodes=2 --nproc-per-node=4 -m dgrad_cli"
    del environment["TORCHELASTIC_RUN_ID"]
    assert ProcessGroup.from_environment(environment) == ProcessGroup()


def test_labels_and_single_devices_are_refused() -> None:
    group = ProcessGroup(rank=0, size=2, local_size=2)
    if torch.backends.mps.is_available():
        with pytest.raises(InputError, match="one device for 2 processes"):
            group.device("mps")
    with pytest.raises(InputError, match="--labels 40 trains in one process; got 2"):
        Trainer(configure({"latent": "1x10", "labels": "40", "device": "cpu"}), None, group)
