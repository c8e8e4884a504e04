"""Runs that an older dgrad made go on, are evaluated and exported with the figures that it gave.

`old_runs/plain-half` and `labels-half` were interrupted in their third epoch; `plain` and `labels` are the same runs at
their end. `evaluate.json` is what `dgrad evaluate plain --json --device cpu --importance-samples 50` printed, and
`model/` the manifest and the reference of `dgrad export plain`. Figures may differ by the rounding of another machine's
floats, which 25 steps of training make larger: a relative 1e-3 for runs that went on, 1e-5 for an evaluation.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgrad.training.run_directory import Run
from dgrad.training.trainer import resume
from dgrad_cli.main import main
from dgrad_export import Codec, export_run

OLD = Path(__file__).parent / "old_runs"


def _figures(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics and summary, without times and what names the machine."""
    opened = Run(run)
    summary = opened.summary()
    assert summary is not None
    metrics = [{name: value for name, value in line.items() if name != "seconds"} for line in opened.metrics()]
    return metrics, {name: value for name, value in summary.items() if name not in ("seconds", "device", "versions")}


def _close(value: Any, relative: float) -> Any:
    """What equals the value, its numbers up to a relative tolerance."""
    if isinstance(value, dict):
        return {name: _close(inner, relative) for name, inner in value.items()}
    if isinstance(value, list):
        return [_close(inner, relative) for inner in value]
    return pytest.approx(value, rel=relative) if isinstance(value, float) else value


@pytest.mark.parametrize("name", ["plain", "labels"])
def test_an_interrupted_run_goes_on_to_the_same_figures(tmp_path: Path, name: str) -> None:
    shutil.copytree(OLD / f"{name}-half", tmp_path / name)
    trainer, run = resume(tmp_path / name)
    assert trainer.step == 29
    trainer.train(run)
    metrics, summary = _figures(tmp_path / name)
    old_metrics, old_summary = _figures(OLD / name)
    assert [list(line) for line in metrics] == [list(line) for line in old_metrics]
    assert metrics == _close(old_metrics, 1e-3)
    assert _known(summary, old_summary) == _close(old_summary, 1e-3)


def _known(found: Any, old: Any) -> Any:
    """The figures that were there already."""
    return {name: _known(found[name], old[name]) for name in old} if isinstance(old, dict) else found


def test_a_finished_run_has_the_same_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", str(OLD / "plain"), "--json", "--device", "cpu", "--importance-samples", "50"])
    found, old = json.loads(capsys.readouterr().out), json.loads((OLD / "evaluate.json").read_text())
    assert {**_known(found, old), "run": old["run"]} == _close(old, 1e-5)


def test_a_finished_run_has_the_same_export(tmp_path: Path) -> None:
    manifest = export_run(OLD / "plain", tmp_path / "model")
    old = json.loads((OLD / "model/manifest.json").read_text())
    for name in ("latent", "image_shape", "preprocessing", "graphs", "classes"):
        assert manifest[name] == old[name]
    assert manifest["run"] == _close(old["run"], 1e-5)

    ours, theirs = (np.load(folder / "reference.npz") for folder in (tmp_path / "model", OLD / "model"))
    assert ours.files == theirs.files
    for name in theirs.files:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)

    codec = Codec(tmp_path / "model")
    codes = codec.encode(np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 1, 8, 8))
    assert codes.tolist() == [[3, 2, 1, 3], [2, 1, 3, 2]]
    row = [0.268301, 0.237688, 0.270693, 0.744334, 0.664052, 0.312362, 0.117770, 0.195058]
    assert codec.decode(codes)[0, 0, 0].tolist() == pytest.approx(row, abs=1e-5)
