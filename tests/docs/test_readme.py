"""What the README shows is run: its Python, its plugin, its commands, its table."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run_dgrad

import dgrad
from dgrad.hyperparameters import defaults_of
from dgrad.registry import load_plugin, registry

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _block_with(language: str, text: str) -> str:
    (block,) = [block for block in _blocks(language) if text in block]
    return block


def _commands() -> list[list[str]]:
    lines = "\n".join(_blocks("sh")).replace("\\\n", " ").splitlines()
    return [
        shlex.split(command)[1:]
        for line in lines
        for command in line.split("&&")
        if command.strip().startswith("dgrad ")
    ]


def test_the_library_in_ten_lines_runs_and_gives_gradients() -> None:
    names: dict[str, Any] = {}
    block = _block_with("python", "dgrad.latent(")
    assert len(block.strip().splitlines()) <= 12
    exec(block, names)
    for network in ("encoder", "decoder"):
        assert names[network].weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_plugin_trains() -> None:
    Path("mine.py").write_text(_block_with("python", "class Mine"))
    check, train = sorted(command for command in _commands() if "mine.py" in command)
    try:
        assert run_dgrad(*check) == 0
        assert run_dgrad(*train, "--epochs", "1", "--quiet", "--set", "baseline=linear:200:90") == 0
        assert dgrad.estimator("mine").traits.unbiased
    finally:
        registry().remove(load_plugin("mine.py").module)
        sys.modules.pop("mine")


@pytest.mark.slow
def test_the_export_is_used_as_shown(train: Callable[..., Any]) -> None:
    import numpy as np

    run = train(latent="20x2")
    assert run_dgrad("export", str(run.path), "--out", "model") == 0
    names = {"images": np.zeros((3, 1, 8, 8), np.float32)}
    exec(_block_with("python", "Codec("), names)
    assert names["codes"].shape == (3, 20)
    assert names["samples"].shape == (16, 1, 8, 8)


def test_every_option_of_every_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    commands = _commands()
    assert len(commands) >= 5
    for command in commands:
        words = command[: 2 if command[0] == "plugins" else 1]
        assert run_dgrad(*words, "--help") == 0
        shown = capsys.readouterr().out
        for option in (part for part in command if part.startswith("--")):
            assert option in shown, f"{option} of {command}"


def test_every_estimator_is_named() -> None:
    (table,) = re.findall(r"\| what they are \| names \|\n.*?\n\n", README, re.DOTALL)
    assert sorted(re.findall(r"`([a-z0-9-]+)`", table)) == sorted(dgrad.estimators())


def test_the_catalogue_has_every_estimator_with_its_traits_and_hyperparameters() -> None:
    catalogue = (Path(__file__).parents[2] / "docs" / "estimators.md").read_text(encoding="utf-8")
    row = r"^\| `([a-z0-9-]+)` \| (yes|no) \| (yes|no) \| (draw|codes|)? ?\| .* \| .* \| (?:`([^`|]*)`)? ?\| [^|]* \|$"
    yes = {True: "yes", False: "no"}
    expected = []
    for name, factory in dgrad.estimators().items():
        traits = dgrad.estimator(name).traits
        hyperparameters = " ".join(f"{key}={value}" for key, value in defaults_of(factory).items())
        way = "draw" if traits.one_pass else "codes" if traits.pathwise else ""
        expected.append((name, yes[traits.unbiased], yes[traits.differentiable_objective], way, hyperparameters))
    assert sorted(re.findall(row, catalogue, re.MULTILINE)) == sorted(expected)


def test_its_pictures_and_links_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(__file__).parents[2] / target).exists(), target
