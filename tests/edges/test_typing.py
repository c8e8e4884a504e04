"""mypy and pyright see the types of dgrad's calls, and refuse arguments in the wrong place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """\
import torch
import dgrad
layer = dgrad.latent("20x10")
estimator = dgrad.estimator("direct", epsilon=0.5)
estimate = estimator(layer, torch.zeros(2, 20, 10), lambda codes: codes.sum((-2, -1)))
reveal_type(layer)
reveal_type(estimator)
reveal_type(estimate)
reveal_type(estimate.loss)
dgrad.latent(20, 10)
estimator("20x10", torch.zeros(2, 20, 10), lambda codes: codes.sum((-2, -1)))
"""
TYPES = ["LatentLayer", "GradientEstimator", "Estimate", "Tensor"]
WRONG = {10, 11}
CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")],
    "pyright": [sys.executable, "-m", "pyright", "--pythonpath", sys.executable],
}


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("checker", CHECKERS)
def test_calls_are_typed(checker: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    # pyright reads no MYPYPATH, but finds what lies beside the program.
    for package in ("dgrad", "plugins/dgrad_plugins"):
        (tmp_path / Path(package).name).symlink_to(ROOT / package)
    output = subprocess.run(
        [*CHECKERS[checker], str(program)], cwd=tmp_path, capture_output=True, text=True, check=False
    ).stdout
    revealed = re.findall(r'(?:Revealed type is|Type of "[\w.]+" is) "(?:[\w.]+\.)?(\w+)"', output)
    errors = {int(number) for number in re.findall(r"program\.py:(\d+)(?::\d+)?(?:: | - )error", output)}
    assert revealed == TYPES, output
    assert errors == WRONG, output
