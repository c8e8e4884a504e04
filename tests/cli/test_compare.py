"""`dgrad compare`: several estimators trained alike; interrupted, taken up again, and told apart from other runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import run_dgrad, run_with_output
from PIL import Image

from dgrad.training.run_directory import Run

SMALL = ["--latent", "3x4", "--epochs", "2", "--seeds", "2", "--device", "cpu", "--out", "out", "--quiet"]


@pytest.mark.slow
def test_two_estimators(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_with_output(
        capsys, "compare", "--estimators", "rloo,direct", "--set", "direct.epsilon=0.5", *SMALL
    )
    assert (code, err) == (0, "")
    assert "KL outside and lr cosine:0.01:0 for all" in out
    names = {path.name for path in Path("out").iterdir()}
    runs = {f"{name}-seed{seed}" for name in ("rloo", "direct") for seed in (0, 1)}
    assert names == runs | {"comparison.json", "comparison.png"}
    configs = {name: Run(Path("out", name)).config for name in runs}
    assert {config.kl for config in configs.values()} == {"outside"}, "the same for all, whatever suits each"
    assert configs["direct-seed1"].set == {"epsilon": "0.5"}
    assert configs["direct-seed1"].seed == 1
    with Image.open("out/comparison.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10

    comparison = json.loads(Path("out/comparison.json").read_text())
    assert [row["rank"] for row in comparison["rows"]] == [1, 2]
    assert comparison["rows"][0]["valid_bound"] <= comparison["rows"][1]["valid_bound"]
    assert (comparison["config"]["epochs"], comparison["config"]["latent"]) == (2, "3x4")
    rows = {row["label"]: row for row in comparison["rows"]}
    tests = [Run(Path(f"out/rloo-seed{seed}")).summary()["test_bound"] for seed in (0, 1)]  # type: ignore[index]
    assert rows["rloo"]["test_bound"] == pytest.approx(sum(tests) / 2)
    assert rows["rloo"]["test_bound_spread"] == pytest.approx(abs(tests[0] - tests[1]) / 2**0.5)
    assert (rows["rloo"]["evaluations"], rows["direct"]["evaluations"]) == (4, 10)
    assert len(rows["rloo"]["runs"][0]["metrics"]) == 2
    fastest = min(rows.values(), key=lambda row: row["seconds"])
    assert fastest["valid_bound_at_equal_time"] == pytest.approx(fastest["valid_bound"])
    for row in rows.values():
        point = row["curve"][-1]
        assert point["least"] <= point["valid_bound"] <= point["greatest"]

    code, out, _ = run_with_output(capsys, "evaluate", "out/rloo-seed0", "--json")
    assert json.loads(out)["bound"] == pytest.approx(tests[0], rel=1e-6)


@pytest.mark.slow
def test_finished_runs_are_kept_and_others_added(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with_output(capsys, "compare", "--estimators", "rloo", *SMALL)[0] == 0
    stamp = Path("out/rloo-seed0/summary.json").stat().st_mtime_ns
    first = json.loads(Path("out/comparison.json").read_text())
    Path("out/.direct-seed0.abc").mkdir()  # as a killed process leaves it
    code, out, _ = run_with_output(capsys, "compare", "--estimators", "rloo,direct", *SMALL, "--json")
    assert code == 0
    rows = {row["label"]: row for row in json.loads(out)["rows"]}
    assert rows.keys() == {"rloo", "direct"}
    assert rows["rloo"]["runs"] == first["rows"][0]["runs"]
    assert Path("out/rloo-seed0/summary.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_other_runs_in_the_way_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with_output(capsys, "compare", "--estimators", "rloo", *SMALL)[0] == 0
    arguments = ["compare", "--estimators", "direct,rloo", "--set", "rloo.samples=2", *SMALL, "--lr", 0.5]
    code, out, err = run_with_output(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "out/rloo-seed0 is a run with --set none where samples=2 is asked for" in err
    assert "--lr cosine:0.01:0 where 0.5 is asked for" in err
    assert not Path("out/direct-seed0").exists(), "nothing is trained before"
    Path("out/direct-seed1").mkdir()
    Path("out/direct-seed1/thesis.txt").write_text("years of work")
    code, _, err = run_with_output(capsys, "compare", "--estimators", "direct", *SMALL)
    assert code == 2
    assert "out/direct-seed1 holds files but no run" in err


@pytest.mark.slow
def test_what_fails_has_its_reason_in_its_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dgrad_plugins.estimators._reinforce import Reinforce

    right = Reinforce.estimate

    def broken(self: Any, layer: Any, logits: Any, *rest: Any, **keywords: Any) -> Any:
        return right(self, layer, logits * float("nan"), *rest, **keywords)

    monkeypatch.setattr(Reinforce, "estimate", broken)
    latent = ["--latent", "7x4"]  # 16384 codes
    code, out, err = run_with_output(
        capsys, "compare", "--estimators", "exact,reinforce,rloo", *SMALL, *latent, "--json"
    )
    assert code == 1
    assert err.splitlines()[-1].startswith("error: 4 of 6 runs failed: ")
    rows = {row["label"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["rloo", "exact", "reinforce"], "what failed stands last"
    assert rows["rloo"]["rank"] == 1
    assert "7x4 has 1.64e+04" in rows["exact"]["problem"]
    assert "the loss is not finite" in rows["reinforce"]["problem"]
    assert rows["reinforce"]["rank"] is None
    assert not Path("out/exact-seed0").exists()


def _start(*arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "TEST_WAIT": "1",
        "PYTHONPATH": os.pathsep.join(str(root / part) for part in (".", "plugins", "cli", "export")),
    }
    command = [sys.executable, "-m", "dgrad_cli", "compare", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for(path: Path, lines: int = 1) -> None:
    deadline = time.monotonic() + 120
    while not (path.is_file() and len(path.read_text().splitlines()) >= lines) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert path.is_file()


LONGER = ["--estimators", "leg,rloo", *SMALL, "--seeds", "1", "--epochs", "8"]
NAMES = ("leg-seed0", "rloo-seed0")


def _bounds(out: Path) -> list[list[float]]:
    return [[line["valid_bound"] for line in Run(out / name).metrics()] for name in NAMES]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """The bounds of both runs by epoch, where nothing stops the comparison."""
    out = tmp_path_factory.mktemp("comparison") / "undisturbed"
    assert run_dgrad("compare", *LONGER, "--out", out) == 0
    return _bounds(out)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_comparison_goes_on_to_the_same_figures(
    capsys: pytest.CaptureFixture[str], undisturbed: list[list[float]], waiting: str, number: signal.Signals
) -> None:
    process = _start(*LONGER, "--plugin", waiting)
    _wait_for(Path("out/rloo-seed0/metrics.jsonl"), 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err == "error: stopped, everything so far is kept; give the same command again to go on\n"
    assert Run(Path("out/leg-seed0")).summary() is not None
    assert Run(Path("out/rloo-seed0")).summary() is None
    assert not Path("out/comparison.json").exists()

    assert run_with_output(capsys, "compare", *LONGER, "--plugin", waiting)[0] == 0
    assert _bounds(Path("out")) == undisturbed
    assert [len(bounds) for bounds in undisturbed] == [8, 8]


REFUSED = [
    (["--estimators", "rloo,dirct"], "did you mean 'direct'"),
    (["--set", "direct.epsilon=-1"], "direct: epsilon must stay above 0"),
    (["--set", "epsilon=1"], "write ESTIMATOR.epsilon to give it to one estimator alone"),
    (["--set", "epsilon"], "--set expects NAME=VALUE or ESTIMATOR.NAME=VALUE"),
    (["--latents", "20x10,20x2"], "--latent must be one name in dgrad compare; got 20x10,20x2: dgrad sweep takes"),
    (["--estimators", "exact", "--latent", "20x10"], "none of the estimators works with latent 20x10"),
    (["--dataset", "mnits"], "did you mean 'mnist'"),
    (["--model", "lineer"], "did you mean 'linear'"),
    (["--kl", "beside"], "--kl must be one of outside, inside"),
    (["--device", "abacus"], "unknown device 'abacus'"),
    (["--steps", "5"], "exclude each other"),
    (["--seeds", "0"], "--seeds"),
    (["--out", "file"], "is a file; expected a directory"),
    (["--out", "file/deeper"], "is a file; expected a directory"),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_options_are_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    Path("file").write_text("x")
    code, out, err = run_with_output(capsys, "compare", *SMALL, *options)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert (out, err.count("\n")) == ("", 1)
    assert [path.name for path in Path().iterdir()] == ["file"], "nothing is left behind"


@pytest.mark.slow
def test_several_values_are_variants_of_one_estimator(capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--set", "gumbel-softmax.temperature=1,0.5"]
    code, out, _ = run_with_output(capsys, "compare", "--estimators", "gumbel-softmax", *values, *SMALL, "--seeds", 1)
    assert code == 0
    assert {path.name for path in Path("out").glob("*-seed0")} == {
        "gumbel-softmax-temperature=0.5-seed0",
        "gumbel-softmax-temperature=1-seed0",
    }
    assert "gumbel-softmax temperature=0.5" in out
