"""`dgrad sweep`: recipes, runs side by side, taking up after a kill, and Slurm's jobs tried without Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import run_dgrad, run_with_output, train_in_turn

from dgrad.config import TrainConfig
from dgrad.errors import InputError
from dgrad.experiments.experiment import Experiment
from dgrad.experiments.grid import expand
from dgrad.experiments.launchers import Job, run_here
from dgrad.experiments.results import collect
from dgrad.registry import load_plugin, registry
from dgrad.training.run_directory import Run
from dgrad_cli.commands.sweep import show_results

SMALL = ["--latent", "3x4", "--steps", "20", "--device", "cpu", "--out", "out"]
BROKEN = """
import dgrad
from dgrad_plugins.estimators._reinforce import Reinforce

class Broken(Reinforce):
    def estimate(self, layer, logits, *rest, **keywords):
        return super().estimate(layer, logits * float("nan"), *rest, **keywords)

@dgrad.hookimpl
def dgrad_register_estimators(register):
    register("broken", Broken)
"""


def _labels(recipe: dict[str, Any], **overrides: Any) -> list[str]:
    return [f"{each.label} {each.config.seed}" for each in expand(recipe, Path("out"), overrides)]


# Recipes


def test_every_combination_is_there_once_the_first_seed_first() -> None:
    recipe = {
        "estimator": ["rloo", "leg"],
        "latent": ["2x3", "4x2"],
        "seed": [0, 1],
        "lr": [0.01, "cosine:0.1:0"],
        "epochs": 3,
    }
    experiments = expand(recipe, Path("out"))
    assert len(experiments) == 16 == len({each.path for each in experiments})
    assert [each.config.seed for each in experiments] == [0] * 8 + [1] * 8
    assert experiments[0].path == Path("out/rloo-2x3-lr=0.01-seed0")
    assert experiments[0].config == TrainConfig(
        estimator="rloo", latent="2x3", lr="0.01", epochs=3, kl="outside", kl_weight="1"
    )
    assert {(each.config.estimator, each.config.latent, each.config.lr) for each in experiments[:8]} == {
        (estimator, latent, lr)
        for estimator in ("rloo", "leg")
        for latent in ("2x3", "4x2")
        for lr in ("0.01", "cosine:0.1:0")
    }


def test_hyperparameters_are_for_all_or_for_one_estimator() -> None:
    recipe = {"estimator": ["direct", "leg", "rloo"], "set": {"direct.epsilon": [0.1, 1], "rloo": {"samples": 4}}}
    assert {each.label: each.config.set for each in expand(recipe, Path("out"))} == {
        "direct 20x10 epsilon=0.1": {"epsilon": "0.1"},
        "direct 20x10 epsilon=1": {"epsilon": "1"},
        "leg 20x10": {},
        "rloo 20x10": {"samples": "4"},
    }
    both = {"estimator": ["direct", "direct-rb"], "set": {"epsilon": 0.5, "direct.epsilon": 2}}
    assert [each.config.set for each in expand(both, Path("out"))] == [{"epsilon": "2"}, {"epsilon": "0.5"}]


def test_tables_of_runs_are_on_top_of_the_common_settings_and_overrides_on_top_of_all() -> None:
    recipe = {
        "epochs": 100,
        "estimator": "direct-rb",
        "set": {"epsilon": 1},
        "runs": [
            {"name": "ours", "latent": ["20x10", "20x2"], "lr": 0.02},
            {"name": "plain", "latent": "20x10", "estimator": "leg", "set": {"epsilon": 0.5}, "steps": 7},
        ],
    }
    recipe["runs"][1]["set"] = {}  # type: ignore[index]
    del recipe["set"]
    assert _labels(recipe, seed=[3, 4]) == [
        "ours 20x10 3",
        "ours 20x2 3",
        "plain 3",
        "ours 20x10 4",
        "ours 20x2 4",
        "plain 4",
    ]
    first, _, plain = (each.config for each in expand(recipe, Path("out")))
    assert (first.epochs, first.lr, plain.epochs, plain.steps) == (100, "0.02", TrainConfig.epochs, 7)
    assert {(each.config.epochs, each.config.steps) for each in expand(recipe, Path("out"), {"epochs": 2})} == {
        (2, None)
    }
    assert {each.config.latent for each in expand(recipe, Path("out"), {"latent": "2x2"})} == {"2x2"}


def test_settings_that_are_lists_take_several_as_a_list_of_lists() -> None:
    assert [each.config.hidden for each in expand({"model": "mlp", "hidden": [400, 200]}, Path("out"))] == [(400, 200)]
    several = expand({"model": "mlp", "hidden": [[400, 200], [300]]}, Path("out"))
    assert {each.path.name: each.config.hidden for each in several} == {
        "direct-20x10-hidden=400-200-seed0": (400, 200),
        "direct-20x10-hidden=300-seed0": (300,),
    }


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"estimator": ["rloo", "dirct"]}, "did you mean 'direct'"),
        ({"latent": "20y10"}, "20y10"),
        ({"learning-rate": 0.1}, "unknown setting 'learning_rate'"),
        ({"lr": []}, "got an empty list"),
        ({"lr": ["0.1", "fast"]}, "lr=fast: --lr"),
        ({"epochs": 5, "steps": 5}, "exclude each other"),
        ({"set": {"epsilon": -1}}, "epsilon must stay above 0"),
        (
            {"estimator": ["direct", "rloo"], "set": {"epsilon": 1}},
            "write ESTIMATOR.epsilon to give it to one estimator alone",
        ),
        ({"set": {"rloo.samples": 2}}, "Name it among the estimators too"),
        ({"set": 5}, "set must be a table"),
        ({"runs": {"lr": 1}}, "runs must be a list of tables"),
        ({"runs": [{"lr": 0.1}, {"lr": 0.2}]}, "give each of these runs a name"),
        ({"runs": [{}, {}]}, "leave one of them out"),
        ({"plugins": [["a"], ["b"]]}, "plugins cannot be varied"),
        ({"runs": [{"name": "long" * 60}]}, "more than 200 bytes"),
    ],
    ids=str,
)
def test_recipes_that_cannot_be(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        expand(recipe, Path("out"))


def _finished(path: Path, config: TrainConfig, valid: float, test: float, accuracy: float | None = None) -> Experiment:
    """An experiment whose run looks finished."""
    from dgrad.pictures.of_a_run import RUN_PICTURES

    run = Run.create(path, config)
    found = {} if accuracy is None else {"valid_accuracy": accuracy}
    summary = {
        "test_bound": test,
        "unit": "nats",
        "seconds": 2.0,
        "best": {
            "valid_bound": valid,
            "valid_reconstruction": 20 - valid,
            "test_bound": test,
            "test_reconstruction": test - 3,
            **found,
        },
        "final": {"test_bound": test},
        **({} if accuracy is None else {"accuracy": accuracy - 0.1}),
    }
    run.summary_file.write_text(json.dumps(summary))
    for name in RUN_PICTURES:
        (path / name).touch()
    return Experiment(path.name.rpartition("-")[0], config, path, None)


def test_the_best_is_chosen_by_validation_among_equals_that_are_whole() -> None:
    def config(latent: str, lr: str, seed: int, labels: int = 0) -> TrainConfig:
        return TrainConfig(latent=latent, lr=lr, seed=seed, labels=labels, kl="outside")

    experiments = [
        _finished(Path("a-seed0"), config("2x3", "1", 0), valid=10, test=5),
        _finished(Path("a-seed1"), config("2x3", "1", 1), valid=12, test=5),
        _finished(Path("b-seed0"), config("2x3", "2", 0), valid=10.5, test=50),
        _finished(Path("b-seed1"), config("2x3", "2", 1), valid=10.5, test=52),
        _finished(Path("half-seed0"), config("2x3", "3", 0), valid=1, test=1),
        Experiment("half", config("2x3", "3", 1), Path("half-seed1"), None),
        _finished(Path("other-seed0"), config("9x2", "1", 0), valid=90, test=90),
        _finished(Path("labelled-seed0"), config("2x3", "1", 0, 5), valid=4, test=4, accuracy=0.5),
        _finished(Path("better-seed0"), config("2x3", "2", 0, 5), valid=9, test=9, accuracy=0.75),
    ]
    results = collect(experiments, {Path("half-seed1"): "it broke"})
    assert [one.label for one in results.combinations] == ["half", "b", "a", "other", "better", "labelled"]
    assert [one.label for one in results.combinations if one.best] == ["b", "other", "better"]
    half, b = results.combinations[:2]
    assert (half.finished, half.seeds, half.problem) == (1, 2, "it broke")
    assert b.figures["test_bound"]["mean"] == 51
    assert b.figures["test_reconstruction"]["mean"] == 48
    assert b.figures["test_bound"]["standard_deviation"] == pytest.approx(2**0.5)
    assert results.combinations[4].figures["accuracy"]["values"] == [pytest.approx(0.65)]
    assert [row["state"] for row in results.runs[4:6]] == ["finished", "failed"]


def test_the_best_is_what_choose_by_says(capsys: pytest.CaptureFixture[str]) -> None:
    experiments = [
        _finished(
            Path("low-bound-seed0"), TrainConfig(lr="1", kl="outside", choose_by="reconstruction"), valid=5, test=5
        ),
        _finished(
            Path("well-drawn-seed0"), TrainConfig(lr="2", kl="outside", choose_by="reconstruction"), valid=9, test=9
        ),
    ]
    results = collect(experiments, {})
    assert [(one.label, one.best) for one in results.combinations] == [("well-drawn", True), ("low-bound", False)]
    show_results(results, Path())
    assert "test reconstruction" in capsys.readouterr().out


# The command


@pytest.mark.slow
def test_runs_are_trained_once_and_others_are_added(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgrad_cli.commands.sweep.run_here", train_in_turn)
    code, out, err = run_with_output(capsys, "sweep", "--estimators", "exact,leg", "--lr", "0.01", *SMALL)
    assert code == 0, err
    names = {"exact-3x4-seed0", "leg-3x4-seed0", "results.json"}
    assert {path.name for path in Path("out").iterdir()} - {"logs"} == names
    assert "exact 3x4" in out
    assert "2 of 2, leg 3x4, seed 0: validation bound" in err
    results = json.loads(Path("out/results.json").read_text())
    summary = Run(Path("out/leg-3x4-seed0")).summary()
    assert summary is not None
    row = next(one for one in results["combinations"] if one["label"] == "leg 3x4")
    assert row["figures"]["test_bound"]["values"] == [summary["test_bound"]]
    assert (row["config"]["lr"], row["config"]["steps"]) == ("0.01", 20)
    stamps = {name: Path(f"out/{name}-3x4-seed0/summary.json").stat().st_mtime_ns for name in ("exact", "leg")}

    # More values give other names; what is there is known by its settings.
    again = ["sweep", "--estimators", "exact,leg", "--lr", "0.01,0.1", *SMALL]
    code, out, _ = run_with_output(capsys, *again, "--dry-run")
    assert code == 0
    assert "4 runs: 2 finished, 2 to do" in out
    assert {path.name for path in Path("out").iterdir()} - {"logs"} == names
    code, out, _ = run_with_output(capsys, *again, "--latent", "9x9", "--dry-run")
    assert "exact 9x9 lr=0.01, exact 9x9 lr=0.1: exact evaluates every code" in out
    code, out, err = run_with_output(capsys, *again, "--json", "--quiet")
    assert (code, err) == (0, "")
    states = {row["run"]: row["state"] for row in json.loads(out)["runs"]}
    assert states == dict.fromkeys(
        ["exact-3x4-seed0", "leg-3x4-seed0", "exact-3x4-lr=0.1-seed0", "leg-3x4-lr=0.1-seed0"], "finished"
    )
    assert stamps == {name: Path(f"out/{name}-3x4-seed0/summary.json").stat().st_mtime_ns for name in stamps}

    # The same names with other settings are no such runs.
    code, out, err = run_with_output(capsys, "sweep", "--estimators", "leg", *SMALL, "--steps", 5)
    assert (code, out) == (2, "")
    assert (
        "out/leg-3x4-seed0 is a run with --steps 20 where 5 is asked for, --lr 0.01 where cosine:0.01:0 is asked for"
        in err
    )


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_that_fails_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.py").write_text(BROKEN)
    Path("recipe.toml").write_text(
        'plugins = ["broken.py"]\nestimator = ["broken", "rloo"]\n[set]\n"rloo.samples" = 3\n'
    )
    code, out, err = run_with_output(capsys, "sweep", "--config", "recipe.toml", *SMALL)
    assert code == 1, err
    assert {path.name for path in Path("out/logs").iterdir()} == {"broken-3x4-seed0.log", "rloo-3x4-seed0.log"}
    assert "1 of 2 runs failed, the first of them broken-3x4-seed0: the loss is not finite" in err.splitlines()[-1]
    assert "failed: broken-3x4-seed0: the loss is not finite" in out
    summary = Run(Path("out/rloo-3x4-seed0")).summary()
    assert summary is not None
    assert Run(Path("out/rloo-3x4-seed0")).config.set == {"samples": "3"}
    rows = {row["run"]: row for row in json.loads(Path("out/results.json").read_text())["runs"]}
    assert rows["broken-3x4-seed0"]["state"] == "failed"
    registry().remove(load_plugin("broken.py").module)  # other tests go through all estimators
    sys.modules.pop("broken")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--estimators", "rloo,dirct"], "did you mean 'direct'"),
        (["--estimators", "rloo,"], "--estimator expects a value, or several separated by commas"),
        (["--set", "epsilon"], "--set expects NAME=VALUE"),
        (["--set", "epsilon=1", "--set", "epsilon=2"], "is given twice"),
        (["--seeds", "2", "--seed", "1"], "exclude each other"),
        (["--epochs", "2"], "exclude each other"),
        (["--estimators", "exact", "--latent", "20x10"], "none of the estimators works with latent 20x10"),
        (["--dataset", "mnits"], "did you mean 'mnist'"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--launcher", "ssh"], "--launcher must be local, slurm or submitit-local"),
        (["--slurm", "time=5"], "give --launcher slurm too"),
        (["--launcher", "slurm"], "--slurm time=60"),
        (["--launcher", "slurm", "--device", "cuda:0,cuda:1"], "expected one name"),
        (["--config", "none.toml"], "cannot read none.toml"),
        (["--out", "file"], "is a file; expected a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    Path("file").write_text("x")
    code, out, err = run_with_output(capsys, "sweep", *SMALL, *options)
    assert code == 2
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert [path.name for path in Path().iterdir()] == ["file"], "nothing is left behind"


# Killed and taken up again


def _start(*arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join(str(root / part) for part in (".", "plugins", "cli", "export"))
    command = [sys.executable, "-m", "dgrad_cli", "sweep", *arguments]
    environment = os.environ | {"PYTHONPATH": path, "TEST_WAIT": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def _lines(name: str) -> int:
    return len(Run(Path("out", name)).metrics())


def _free(name: str) -> bool:
    """Whether nobody trains the run."""
    import fcntl

    with Path("out", name, "config.json").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


TWO = (
    "--estimators",
    "leg,rloo",
    "--latent",
    "3x4",
    "--epochs",
    "8",
    "--device",
    "cpu",
    "--jobs",
    "2",
    "--out",
    "out",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The bounds of the first of these runs by epoch, where nothing stops it."""
    run = tmp_path_factory.mktemp("undisturbed") / "alone"
    assert run_dgrad("train", "--estimator", "leg", *TWO[2:8], "--out", run, "--quiet") == 0
    return [line["valid_bound"] for line in Run(run).metrics()]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_leaves_no_process_and_goes_on_to_the_same_figures(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: list[float],
    waiting: str,
    number: signal.Signals,
) -> None:
    names = ("leg-3x4-seed0", "rloo-3x4-seed0")
    process = _start(*TWO, "--plugin", waiting)
    _wait_for(lambda: all(_lines(name) >= 2 for name in names))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == "error: stopped, everything so far is kept; give the same command again to go on"
    _wait_for(lambda: all(_free(name) for name in names))
    assert all(Run(Path("out", name)).summary() is None for name in names)
    stopped = {name: _lines(name) for name in names}
    assert all(2 <= lines < 8 for lines in stopped.values())

    monkeypatch.setattr("dgrad_cli.commands.sweep.run_here", train_in_turn)
    code, _, err = run_with_output(capsys, "sweep", *TWO, "--plugin", waiting)
    assert code == 0, err
    assert "1 of 2, leg 3x4, seed 0 goes on" in err
    assert [line["valid_bound"] for line in Run(Path("out", names[0])).metrics()] == undisturbed
    assert len(undisturbed) == 8


@pytest.mark.slow
def test_a_run_is_trained_by_one_process_at_a_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dgrad.training.run_directory

    monkeypatch.setattr(dgrad.training.run_directory, "SECONDS_FOR_ANOTHER", 0.2)
    run = Run.create(Path("run"), TrainConfig(latent="3x4", steps=5))
    with run.locked():
        code, _, err = run_with_output(capsys, "train", "--resume", "run", "--quiet")
        assert (code, err.count("\n")) == (2, 1)
        assert "run is being trained by another process" in err
    assert run_with_output(capsys, "train", "--resume", "run", "--quiet")[0] == 0


# Launchers


def _job(name: str, code: str) -> Job:
    return Job(name, (sys.executable, "-c", code), Path("logs", f"{name}.log").absolute())


@pytest.mark.processes
def test_devices_are_given_in_turn_and_threads_shared() -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['OMP_NUM_THREADS'])"
    ended: list[tuple[str, str | None]] = []
    before = os.environ.pop("OMP_NUM_THREADS", None)
    try:
        received = run_here(
            [_job(name, code) for name in "abc"],
            devices=["cuda:0", "cuda:1"],
            at_once=3,
            begin=lambda job: None,
            end=lambda job, problem: ended.append((job.name, problem)),
        )
    finally:
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    assert received is None
    assert sorted(ended) == [("a", None), ("b", None), ("c", None)]
    said = [Path(f"logs/{name}.log").read_text() for name in "abc"]
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert said == [f"['--device', '{device}'] {threads}\n" for device in ("cuda:0", "cuda:1", "cuda:0")]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import sys; print('much'); sys.exit('error: no  room')", "no room"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9 (SIGKILL, as the system does when memory runs out)"),
        ("import sys; sys.exit(3)", "exit code 3, and not a word"),
        ("pass", None),
    ],
)
def test_what_went_wrong_is_told_in_one_line(code: str, problem: str | None) -> None:
    ended: list[str | None] = []
    run_here(
        [_job("a", code)], devices=["cpu"], at_once=1, begin=lambda job: None, end=lambda _, why: ended.append(why)
    )
    assert ended == [problem]


@pytest.mark.slow
@pytest.mark.processes
def test_jobs_by_submitit(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    options = [
        "sweep",
        "--estimators",
        "leg",
        "--seeds",
        2,
        *SMALL,
        "--launcher",
        "submitit-local",
        "--slurm",
        "mem_gb=2",
    ]
    code, _, err = run_with_output(capsys, *options)
    assert code == 0, err
    for seed in (0, 1):
        summary = Run(Path(f"out/leg-3x4-seed{seed}")).summary()
        assert summary is not None
        assert summary["device"].startswith("cpu")
    assert set(json.loads(Path("out/slurm/jobs.json").read_text())) == {"leg-3x4-seed0", "leg-3x4-seed1"}
    code, _, err = run_with_output(capsys, *options)
    assert (code, err) == (0, "2 of 2 runs in out are finished already\n")
