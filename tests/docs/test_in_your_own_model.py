"""What docs/guides/in-your-own-model.md shows is what is there, and every program of it learns something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dgrad
from benchmarks import own_model
from dgrad.registry import registry

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "in-your-own-model.md"
GUIDE = PAGE.read_text(encoding="utf-8")
FOLDER = ROOT / "examples" / "in_your_own_model"
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
PROGRAMS = sorted(TEXTS)


@pytest.fixture(autouse=True)
def _without_plugins(_no_user_settings: None) -> Iterator[None]:
    """The plugin that a program loads is forgotten."""
    yield
    for plugin in registry().plugins[1:]:
        registry().remove(plugin.module)
        sys.modules.pop(plugin.name, None)


# The page


def test_every_program_is_in_the_guide_by_its_core_lines() -> None:
    shown = set()
    for section in re.split(r"^## (?=\d)", GUIDE, flags=re.M)[1:]:
        blocks = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.S)
        texts = {name: text for name, text in TEXTS.items() if f"/{name}.py)" in section}
        assert blocks
        for block in blocks:
            lines = re.sub(r"\n{3,}", "\n\n", block)  # the formatter adds empty lines behind functions
            indented = [textwrap.indent(lines, " " * columns) for columns in (0, 4, 8)]
            found = {name for name, text in texts.items() if any(it in text for it in indented)}
            assert found, block
            shown |= found
    assert sorted(shown) == PROGRAMS


def test_every_program_is_short() -> None:
    lengths = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    assert len(lengths) == 11
    assert {name: length for name, length in lengths.items() if length >= 60} == {}


def test_every_program_is_in_the_table() -> None:
    assert sorted(set(re.findall(r"^\| `(\w+)` \|", GUIDE, re.M))) == PROGRAMS == sorted(own_model.PROGRAMS)


def test_every_estimator_that_it_names_exists() -> None:
    for line in re.findall(r"^\*\*Estimators\*\*: .*?\n\n", GUIDE, re.M | re.S):
        names = set(re.findall(r"`([a-z0-9-]+)`", line))
        assert names
        assert names <= set(dgrad.estimators()), names


def test_the_lines_about_objectives_run() -> None:
    check, hard, denormals = re.findall(
        r"```python\n(.*?)```", re.sub(r"^## \d.*?(?=^## Time)", "", GUIDE, flags=re.M | re.S), re.S
    )
    layer, logits = dgrad.latent("2x3"), torch.zeros(32, 2, 3, requires_grad=True)
    objective = dgrad.objective(lambda codes: codes[..., 0].sum(-1))
    estimate = dgrad.estimator("gumbel-softmax")(layer, logits, objective)
    names: dict[str, Any] = {"loss": objective, "layer": layer, "objective": objective, "estimate": estimate}
    exec(check, names)
    exec(hard, names)
    assert torch.equal(names["loss"], estimate.codes[0, ..., 0].sum(-1))
    assert denormals == "torch.set_flush_denormal(True)\n"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", GUIDE):
        assert target.startswith("http") or (PAGE.parent / target).exists(), target


# The programs


@pytest.mark.parametrize(
    ("name", "setting", "at_most"),
    [
        ("vae", {"steps": 40}, 0.8),
        ("sequence", {"steps": 30}, 0.9),
        ("attention", {"steps": 100}, 0.8),
        ("experts", {"steps": 60}, 0.7),
        ("two_layers", {"steps": 30}, 0.8),
        ("learned_prior", {"steps": 40}, 0.8),
    ],
)
def test_a_program_lowers_its_loss(name: str, setting: dict[str, Any], at_most: float) -> None:
    before, after = own_model.program(name).train(**setting)
    assert after < at_most * before


@pytest.mark.parametrize(
    ("name", "setting", "at_least"),
    [("selection", {"steps": 40}, 0.85), ("bandit", {"rounds": 100}, 0.3), ("cartpole", {"rounds": 8}, 25)],
)
def test_a_program_raises_its_reward(name: str, setting: dict[str, Any], at_least: float) -> None:
    before, after = own_model.program(name).train(**setting)
    assert before < at_least < after


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning: loaders without workers, and the like
def test_lightning_lowers_the_loss() -> None:
    module = own_model.program("with_lightning")
    torch.manual_seed(0)
    model = module.VAE(dgrad.estimator("direct-rb", epsilon="geometric:1:0.02"))
    before, after = module.train(model, 5, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    assert after < 0.8 * before
    assert float(model.estimator.epsilon) < 0.03  # the schedule came to its end


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_of_accelerate_lower_the_loss() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(FOLDER / "with_accelerate.py"), "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = re.findall(r"2 processes, .*before and after: ([\d.]+), ([\d.]+)", done.stdout)
    before, after = map(float, line)
    assert after < 0.8 * before
