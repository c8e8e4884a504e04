"""The command as a user types it: what it prints, what it leaves on disk, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_with_output
from PIL import Image

import dgrad
from dgrad.config import TrainConfig, configure, option
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.training.trainer import Trainer

SMALL = ["train", "--latent", "3x4", "--estimator", "rloo", "--epochs", "1", "--device", "cpu"]


class Dgrad:
    """Runs the command in this process: `dgrad("train", ...)` returns (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        return run_with_output(self.capsys, *arguments)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Dgrad:
    return Dgrad(capsys)


@pytest.mark.slow
def test_train_then_everything_else(command: Dgrad, tmp_path: Path) -> None:
    code, out, _ = command(*SMALL, "--epochs", 2)
    assert code == 0, out
    run = Path("runs/digits-3x4-rloo")
    assert {path.name for path in run.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "checkpoint.safetensors",
        "curves.png", "samples.png", "reconstructions.png", "code.png",
    }  # fmt: skip
    assert "epoch 2: bound" in out
    assert "objective   KL outside" in out
    assert f"dgrad evaluate {run}" in out
    assert f"dgrad export {run}" in out
    for path in run.glob("*.png"):
        with Image.open(path) as picture:
            assert len(set(picture.convert("L").tobytes())) > 10, f"{path} shows something"

    code, out, _ = command("evaluate", run, "--importance-samples", 50, "--json")
    figures = json.loads(out)
    summary = json.loads((run / "summary.json").read_text())
    assert code == 0
    assert figures["bound"] == pytest.approx(summary["test_bound"], rel=1e-6)
    assert figures["bound"] - 3 < figures["importance_weighted_bound"] < figures["bound"]
    assert command("evaluate", run, "--split", "valid")[1].startswith("valid bound")

    for name in ("sample", "reconstruct"):
        code, out, _ = command(name, run, "--out", f"{name}.png", "--rows", 2, "--columns", 3)
        assert (code, out.strip()) == (0, f"{name}.png")
        with Image.open(f"{name}.png") as picture:
            assert picture.width == 3 * 56 + 4 * 4

    code, _, err = command(*SMALL, "--out", run)
    assert code == 2
    assert "exists already" in err
    assert "--resume" in err
    assert command(*SMALL, "--quiet")[0] == 0
    assert Path("runs/digits-3x4-rloo-2").is_dir(), "without --out a free name is found"
    assert command(*SMALL, "--out", run, "--overwrite", "--quiet")[0] == 0
    assert json.loads((run / "config.json").read_text())["epochs"] == 1
    code, out, _ = command("train", "--resume", run)
    assert code == 0
    assert out.startswith("test bound"), "a finished run is shown, not run again"


@pytest.mark.slow
def test_json_is_all_that_stands_on_the_standard_output(command: Dgrad) -> None:
    code, out, err = command(*SMALL, "--json")
    assert code == 0
    assert json.loads(out)["run"] == "runs/digits-3x4-rloo"
    assert "epoch 1" in err


@pytest.mark.slow
def test_quiet_prints_only_the_result(command: Dgrad) -> None:
    _, out, err = command(*SMALL, "--quiet")
    assert out.startswith("test bound")
    assert re.fullmatch("(warning: the code has collapsed.*\n)?", err)  # after one epoch it may be


@pytest.mark.slow
def test_a_config_file_with_options_on_top(command: Dgrad) -> None:
    Path("a.toml").write_text(
        'estimator = "direct"\nlatent = "2x3"\nepochs = 1\nlr = 0.01\n[set]\nepsilon = 0.5\nsamples = 2\n'
    )
    assert (
        command("train", "--config", "a.toml", "--set", "samples=3", "--latent", "2x2", "--out", "run", "--quiet")[0]
        == 0
    )
    config = Run(Path("run")).config
    assert (config.latent, config.lr, config.set) == ("2x2", "0.01", {"epsilon": "0.5", "samples": "3"})
    assert command("train", "--config", "a.toml", "--estimator", "rloo", "--out", "other", "--quiet")[0] == 0
    assert Run(Path("other")).config.set == {}, "another estimator's hyper-parameters are dropped"


@pytest.mark.slow
def test_the_config_of_a_run_repeats_it(command: Dgrad) -> None:
    assert command(*SMALL, "--out", "a", "--quiet")[0] == 0
    config = json.loads(Path("a/config.json").read_text())
    assert config["kl"] == "outside", "what was chosen is written down"
    options = [
        part for name in ("estimator", "latent", "epochs", "lr", "seed", "kl") for part in (f"--{name}", config[name])
    ]
    assert command("train", *options, "--out", "b", "--quiet")[0] == 0
    first, second = (json.loads(Path(name, "summary.json").read_text()) for name in "ab")
    assert first["test_bound"] == second["test_bound"]


@pytest.mark.parametrize("name", ["estimators", "latents", "datasets", "plugins"])
def test_tables_and_json(command: Dgrad, name: str) -> None:
    code, out, _ = command(name)
    assert code == 0
    rows = json.loads(command(name, "--json")[1])
    assert all(row["name"] in out for row in rows)
    expected = {
        "estimators": dgrad.estimators(),
        "latents": dgrad.latents(),
        "datasets": dgrad.datasets(),
        "plugins": ["builtin"],
    }
    assert {row["name"] for row in rows} == set(expected[name])


def test_the_list_of_estimators_says_which_draw_and_which_give_codes(command: Dgrad) -> None:
    rows = {row["name"]: (row["one_pass"], row["pathwise"]) for row in json.loads(command("estimators", "--json")[1])}
    assert [rows[name] for name in ("rloo", "imle", "leg")] == [(True, False), (False, True), (False, False)]
    heading, rloo = (
        next(line for line in command("estimators")[1].splitlines() if word in line) for word in ("name", "rloo")
    )
    assert heading.index("one pass") == rloo.index("yes", rloo.index("no"))


def test_version_and_help(command: Dgrad) -> None:
    assert command("--version")[1].strip() == f"dgrad {dgrad.__version__}"
    code, out, _ = command("train", "--help")
    assert code == 0
    for field in TrainConfig.__dataclass_fields__:
        assert option(field) in out


def test_a_plugin_file_trains(command: Dgrad) -> None:
    Path("toy_for_the_cli.py").write_text(
        "import dgrad\nfrom dgrad_plugins.estimators import ESTIMATORS\n"
        "@dgrad.hookimpl\ndef dgrad_register_estimators(register):\n    register('mine', ESTIMATORS['rloo'])\n"
    )
    assert command(*SMALL, "--estimator", "mine", "--plugin", "toy_for_the_cli.py", "--quiet")[0] == 0
    assert command("evaluate", "runs/digits-3x4-mine")[0] == 0
    assert "toy_for_the_cli" in command("plugins", "--plugin", "toy_for_the_cli.py")[1]
    from dgrad.registry import load_plugin, registry

    registry().remove(load_plugin("toy_for_the_cli.py").module)
    sys.modules.pop("toy_for_the_cli")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_exits(number: signal.Signals, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(root / part) for part in (".", "plugins", "cli", "export"))
    }
    arguments = [sys.executable, "-m", "dgrad_cli", *SMALL, "--epochs", "100000", "--out", "run"]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path("run/metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].endswith("continue with: dgrad train --resume run")
    assert load_model(Run.open(Path("run")))[1]["step"] > 0


# Bad input: one line, no traceback, exit code 2 (1 for what failed on the way), and no run directory


def _digits_npz(**arrays: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    np.savez("toy.npz", **{"images": rng.integers(0, 255, (60, 6, 6), dtype=np.uint8), **arrays})


REFUSED = [
    (["--estimator", "dirct"], 2, "unknown estimator 'dirct'; did you mean 'direct'?"),
    (["--latent", "20by10"], 2, "cannot read '20by10'"),
    (["--latent", "0x10"], 2, "at least 1 variable"),
    (["--latent", "subset:3"], 2, "unknown latent 'subset'"),
    (["--dataset", "mnits"], 2, "did you mean 'mnist'"),
    (["--dataset", "nothing.npz"], 2, "nothing.npz"),
    (["--model", "lineer"], 2, "did you mean 'linear'"),
    (["--hidden", "40"], 2, "the linear model has no hidden layers"),
    (["--likelihood", "bernouli"], 2, "did you mean 'bernoulli'"),
    (["--set", "epsilon=1"], 2, "unknown hyper-parameter of rloo 'epsilon'"),
    (["--set", "samples"], 2, "--set expects NAME=VALUE"),
    (["--estimator", "direct", "--set", "epsilon=0"], 2, "epsilon must stay above 0"),
    (["--estimator", "gumbel-softmax", "--set", "temperature=-1"], 2, "temperature must stay above 0"),
    (["--lr", "nan"], 2, "--lr: cannot read 'nan'"),
    (["--epochs", "0"], 2, "--epochs must be"),
    (["--epochs", "many"], 2, "--epochs must be a whole number; got 'many'"),
    (["--steps", "5"], 2, "exclude each other"),
    (["--estimator", "exact", "--latent", "20x10"], 2, "20x10 has 1e+20; expected at most 4096"),
    (["--estimator", "direct-joint", "--latent", "20x10"], 2, "20x10 has 1e+20; expected at most 4096"),
    (["--binarize", "maybe"], 2, "--binarize must be one of"),
    (["--device", "cuda:99"], 2, "device 'cuda:99' is not there"),
    (["--device", "abacus"], 2, "unknown device 'abacus'"),
    (["--plugin", "nowhere.py"], 2, "no plugin file 'nowhere.py'"),
    (["--config", "nowhere.toml"], 2, "cannot read nowhere.toml"),
    (["--resume", "nowhere"], 2, "--resume continues a run as it was configured"),
    (["--nonsense"], 2, "No such option: --nonsense"),
    (["--seed", "-1"], 2, "--seed must be"),
    (["--batch-size", "0"], 2, "--batch-size must be"),
    (["--batch-size", "9" * 25], 2, "--batch-size must be a number below"),
    (["--latent", "99999x99999"], 2, "at most 16,777,216 are possible"),
    (["--estimator", "direct", "--set", "epsilon=1e-50"], 2, "epsilon must stay above 0; got 1e-50"),
    (["--dataset", ""], 2, "--dataset must be a name"),
    (["--plugin", "json"], 2, "plugin 'json' has no hooks"),
]


@pytest.mark.parametrize(
    ("options", "expected", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_options_are_refused_before_anything_is_written(
    command: Dgrad, options: list[str], expected: int, message: str
) -> None:
    code, out, err = command(*SMALL, *options)
    assert code == expected
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, "one line"
    assert out == ""
    assert list(Path().iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("name", ["evaluate", "sample", "reconstruct", "export"])
def test_a_missing_run_is_refused(command: Dgrad, name: str) -> None:
    code, _, err = command(name, "nowhere", *(["--out", "out"] if name == "export" else []))
    assert code == 2
    assert "no run at nowhere" in err
    assert list(Path().iterdir()) == []
    assert command("train", "--resume", "nowhere")[0] == 2


def test_damaged_runs_are_refused(command: Dgrad, train: Callable[..., Run]) -> None:
    run = train()
    checkpoint = run.checkpoint_file.read_bytes()
    run.checkpoint_file.write_bytes(checkpoint[: len(checkpoint) // 2])
    for arguments in (
        ["evaluate", run.path],
        ["sample", run.path, "--out", "a.png"],
        ["export", run.path, "--out", "model"],
    ):
        code, _, err = command(*arguments)
        assert code == 2
        assert "is damaged" in err
    run.checkpoint_file.unlink()
    assert "cannot read checkpoint" in command("evaluate", run.path)[2]
    run.config_file.write_text("{")
    assert "config.json is not JSON" in command("evaluate", run.path)[2]
    run.summary_file.write_text("{")
    assert "summary.json is damaged" in command("train", "--resume", run.path)[2]
    assert not Path("model").exists()
    assert not Path("a.png").exists()


def test_images_of_another_size_are_refused(command: Dgrad, train: Callable[..., Run]) -> None:
    run = train()
    _digits_npz()
    for name in ("evaluate", "reconstruct"):
        code, _, err = command(name, run.path, "--dataset", "toy.npz")
        assert code == 2
        assert "toy.npz has images of shape [1, 6, 6]" in err
        assert "takes [1, 8, 8]" in err


@pytest.mark.slow
def test_export_refuses_a_data_set_that_changed_its_size(command: Dgrad) -> None:
    _digits_npz()
    assert command(*SMALL, "--dataset", "toy.npz", "--out", "run", "--quiet")[0] == 0
    _digits_npz(images=np.zeros((60, 9, 9), np.uint8))
    code, _, err = command("export", "run", "--out", "model")
    assert (code, err.count("\n")) == (2, 1)
    assert "now has images of shape [1, 9, 9]" in err
    assert not Path("model").exists()


def test_a_truncated_data_file_is_refused(command: Dgrad) -> None:
    _digits_npz()
    data = Path("toy.npz").read_bytes()
    Path("toy.npz").write_bytes(data[: len(data) // 2])
    code, _, err = command(*SMALL, "--dataset", "toy.npz")
    assert (code, err.count("\n")) == (2, 1)
    assert "toy.npz" in err
    assert [path.name for path in Path().iterdir()] == ["toy.npz"]


def test_an_npz_trains_and_resumes_from_elsewhere(
    command: Dgrad, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _digits_npz()
    assert command(*SMALL, "--dataset", "toy.npz", "--quiet")[0] == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command("evaluate", "../runs/toy-3x4-rloo")[0] == 0


def test_a_refused_overwrite_leaves_the_old_run(command: Dgrad, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(*SMALL, "--out", "run", "--quiet")[0] == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}

    def full(path: Path, *rest: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("dgrad.training.checkpoint.save_checkpoint", full)
    assert command(*SMALL, "--out", "run", "--overwrite")[0] == 1
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
    assert command(*SMALL, "--out", "new")[0] == 1
    assert [path.name for path in Path().iterdir()] == ["run"], "and a new one does not appear half-made"


@pytest.mark.slow
def test_resuming_a_finished_run_draws_pictures_that_are_missing(command: Dgrad) -> None:
    assert command(*SMALL, "--out", "run", "--quiet")[0] == 0
    picture = Path("run/samples.png").read_bytes()
    summary = json.loads(Path("run/summary.json").read_text())
    Path("run/samples.png").unlink()
    assert command("train", "--resume", "run", "--quiet")[0] == 0
    assert Path("run/samples.png").read_bytes() == picture
    assert json.loads(Path("run/summary.json").read_text())["test_bound"] == summary["test_bound"]


def test_weights_from_before_the_first_evaluation_are_not_used(command: Dgrad, tmp_path: Path) -> None:
    trainer = Trainer(configure({"latent": "3x4", "estimator": "rloo", "device": "cpu"}))
    Run.create(Path("run"), trainer.config, first_save=trainer.save)
    for arguments in (["evaluate", "run"], ["sample", "run", "--out", "a.png"], ["export", "run", "--out", "model"]):
        code, _, err = command(*arguments)
        assert code == 2
        assert "run has no trained weights yet; continue it with dgrad train --resume run" in err
    assert [path.name for path in Path().iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_ctrl_c_while_starting_up_is_one_line(seconds: float) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(root / part) for part in (".", "plugins", "cli", "export"))
    }
    code = "from dgrad_cli.main import main; print('up', flush=True); main()"
    arguments = [sys.executable, "-c", code, *SMALL, "--epochs", "100000", "--out", "run"]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_files_in_the_way_survive(command: Dgrad) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("years of work")
    code, _, err = command(*SMALL, "--out", "thesis", "--overwrite")
    assert code == 2
    assert "holds files but no run" in err
    assert Path("thesis/chapter.txt").read_text() == "years of work"
    Path("file").write_text("x")
    assert "is a file" in command(*SMALL, "--out", "file")[2]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(command: Dgrad, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgrad.training import checkpoint

    write, calls = checkpoint.save_checkpoint, []

    def full(path: Path, *rest: object) -> None:
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device", str(path))
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    code, _, err = command(*SMALL, "--out", "run")
    assert code == 1
    assert err == (
        "error: cannot use run/checkpoint.safetensors: No space left on device; "
        "check the path, its permissions and the free space\n"
    )
    monkeypatch.undo()
    assert command("train", "--resume", "run", "--quiet")[0] == 0


def test_an_unexpected_error_is_one_line_and_debug_shows_more(command: Dgrad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgrad.devices.choose_device", lambda name: 1 / 0)
    code, _, err = command(*SMALL)
    assert (code, err.count("\n")) == (1, 1)
    assert "unexpected ZeroDivisionError" in err
    assert "Traceback" in command(*SMALL, "--debug")[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_cuda_is_said_clearly(command: Dgrad) -> None:
    code, _, err = command(*SMALL, "--device", "cuda")
    assert code == 2
    assert "torch sees 0 CUDA devices; use --device auto or --device cpu" in err


@pytest.mark.slow
def test_a_run_with_a_refined_q_says_what_the_encoders_is(command: Dgrad) -> None:
    code, out, _ = command(*SMALL, "--refine-steps", 2)
    assert code == 0, out
    best = json.loads(Path("runs/digits-3x4-rloo/summary.json").read_text())["best"]
    assert f"encoder     {best['test_encoder_bound']:.2f} nats with its own q" in out
    assert "with its own q" not in command(*SMALL, "--out", "plain")[1]


@pytest.mark.slow
def test_evaluate_says_what_the_encoder_loses(train: Callable[..., Run], command: Dgrad) -> None:
    run = train(latent="6x3", estimator="direct-rb", epochs=10, **{"eval-refine-steps": 5})
    code, out, _ = command("evaluate", run.path)
    assert code == 0
    assert "with its own q; above, q was refined in 5 steps" in out
    code, out, _ = command("evaluate", run.path, "--refine-steps", 20, "--importance-samples", 50, "--json")
    figures = json.loads(out)
    assert figures["refine_steps"] == 20
    assert figures["importance_weighted_bound"] < figures["bound"] < figures["encoder_bound"]
    code, out, _ = command("evaluate", run.path, "--refine-steps", 0, "--json")
    assert json.loads(out)["bound"] == figures["encoder_bound"]
    assert "encoder_bound" not in json.loads(out)


def test_what_cannot_be_refined_is_said_in_one_line(command: Dgrad) -> None:
    for arguments, words in (
        (["--latent", "pairs:3", "--estimator", "rloo"], "stack of independent variables"),
        (
            ["--latent", "1x10", "--labels", "50", "--model", "mixture"],
            "--refine-steps must be 0, or given without --labels",
        ),
    ):
        code, _, err = command("train", *arguments, "--refine-steps", 2, "--quiet")
        assert code != 0
        assert words in err
        assert err.count("\n") == 1
    code, _, err = command("train", "--refine-steps", "-1")
    assert code != 0
    assert "--refine-steps must be a whole number of at least 0" in err
    code, _, err = command("train", "--eval-refine-steps", "-1")
    assert code != 0
    assert "--eval-refine-steps must be a whole number of at least 0" in err
