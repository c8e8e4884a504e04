"""One grammar in all commands: settings, their options, their help, and how several values are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from dgrad.config import TrainConfig, about, option, panel_of, read_toml
from dgrad.errors import InputError
from dgrad.experiments.grid import expand
from dgrad.experiments.variants import read_variants
from dgrad_cli.main import main
from dgrad_cli.options import read_overrides, read_run

ROOT = Path(__file__).parents[2]
PANELS = ["Data", "Model", "Estimator and objective", "Optimisation", "Evaluation", "Run", "Few labels"]


def _help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*command.split(), "--help"])
    return capsys.readouterr().out


# Help


def test_the_help_of_train_is_short_and_in_panels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _help(capsys, monkeypatch, "train")
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 100
    assert re.findall("╭─ (.+?) ─", text) == PANELS
    assert "Example: dgrad train --estimator" in text.rpartition("╯")[2]
    options = {option(item.name): item.name for item in fields(TrainConfig)}
    for panel, shown in zip(PANELS, re.split("╭─ .+╮", text)[1:], strict=True):
        found = [options[name] for name in re.findall(r"^│ (--[\w-]+)", shown, re.MULTILINE) if name in options]
        assert found == [name for name in options.values() if panel_of(name) == panel]


def test_the_help_of_a_setting_names_its_choices_and_fits_a_line() -> None:
    listed = 0
    for item in fields(TrainConfig):
        known = about(item)
        assert 0 < len(known.help) <= 90
        names = item.type in ("str", "str | None") and known.metavar == ""
        expected = known.check("no such name") if names and known.check is not None else ""
        if expected.startswith("one of "):
            listed += 1
            assert all(choice in known.help for choice in expected.removeprefix("one of ").split(", "))
    assert listed == 6


@pytest.mark.parametrize("command", ["train", "compare", "sweep", "reproduce"])
def test_commands_that_train_have_every_setting(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = set(re.findall(r"--[\w-]+", _help(capsys, monkeypatch, command)))
    assert {option(item.name) for item in fields(TrainConfig)} - shown <= {"--seed" if command == "compare" else ""}


@pytest.mark.parametrize(
    "command", ["train", "compare", "sweep", "reproduce", "diagnose", "plugins check", "estimators"]
)
def test_an_option_has_the_plural_as_a_second_name(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = set(re.findall(r"--[\w-]+", _help(capsys, monkeypatch, command)))
    assert {"--latent", "--latents"} <= shown
    if command not in ("plugins check", "estimators"):  # an argument names the estimator, or all are listed
        assert {"--estimator", "--estimators", "--set"} <= shown


# Hyper-parameters


@pytest.mark.parametrize("name", ["sweep-share", "sweep_share", "direct.sweep-share", "direct.sweep_share"])
def test_a_hyperparameter_is_the_same_however_and_wherever_it_is_written(name: str) -> None:
    expected = {"sweep_share": "0.5"}
    texts = [f"{name}=0.5"]
    assert read_run({"set": texts}, None).set == expected
    assert [variant.set for variant in read_variants("direct", texts)] == [expected]
    (planned,) = expand({"kl": "outside"}, Path(), read_overrides({"set": texts}))  # inside, epsilon is chosen too
    assert planned.config.set == expected
    file = Path("settings.toml")
    for line in (f'[set]\n"{name}" = 0.5\n', f"set.{name} = 0.5\n"):
        file.write_text(line)
        assert read_run({}, file).set == expected
        assert [each.config.set for each in expand({"kl": "outside", **read_toml(file)}, Path())] == [expected]


def test_options_go_before_the_file_and_another_estimator_keeps_what_is_its_own() -> None:
    file = Path("settings.toml")
    file.write_text('estimator = "direct"\n[set]\nepsilon = 0.5\ndirect.samples = 2\n')
    assert read_run({}, file).set == {"epsilon": "0.5", "samples": "2"}
    assert read_run({"set": ["samples=3"]}, file).set == {"epsilon": "0.5", "samples": "3"}
    assert read_run({"estimator": "rloo"}, file).set == {}
    file.write_text("[set]\nepsilon = 0.5\nrloo.samples = 4\n")
    assert read_run({"estimator": "rloo"}, file).set == {"samples": "4"}
    with pytest.raises(InputError, match="unknown estimator in --set 'rloo'; known: direct"):
        read_run({}, file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --estimators direct,rloo", "--estimator must be one name in dgrad train; got direct,rloo: dgrad comp"),
        ("train --latent 2x2,3x2", "--latent must be one name in dgrad train; got 2x2,3x2: dgrad sweep takes several"),
        ("train --set epsilon=1,2", "--set epsilon must be one value in dgrad train; got 1,2: dgrad compare and dgrad"),
        ("train --set rloo.samples=2", "unknown estimator in --set 'rloo'; known: direct. Name it among the"),
        ("train --set .epsilon=2", "--set expects NAME=VALUE or ESTIMATOR.NAME=VALUE"),
        ("compare --latents 2x2,3x2 --out out", "--latent must be one name in dgrad compare; got 2x2,3x2: dgrad sweep"),
        ("diagnose --latents 2x2,3x2", "--latent must be one name in dgrad diagnose; got 2x2,3x2: give the command"),
        ("plugins check rloo --set leg.samples=2", "unknown estimator in --set 'leg'; known: rloo"),
        ("plugins check rloo --latents 2x2,3x2", "got 2x2,3x2: give the command once for each"),
        ("estimators --latents 2x2,3x2", "got 2x2,3x2: give the command once for each"),
        ("sweep --estimator direct,rloo --set epsilon=1 --out out", "write ESTIMATOR.epsilon to give it to one"),
    ],
)
def test_one_line_says_what_takes_several(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments.split())
    output = capsys.readouterr()
    assert message in output.err
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert not list(Path().iterdir())


# A new setting

WITH_ONE_MORE_LINE = """
import contextlib, importlib.util, sys, types
from pathlib import Path

folder = importlib.util.find_spec("dgrad").submodule_search_locations[0]
place = '    panel = "Optimisation"\\n'
source = Path(folder, "config.py").read_text()
assert source.count(place) == 1
line = '    momentum: float = setting(0.9, "How much of a step the next one keeps.", SHARE)\\n'
module = sys.modules["dgrad.config"] = types.ModuleType("dgrad.config")
exec(compile(source.replace(place, place + line), "config.py", "exec"), vars(module))

from dgrad_cli.main import main

for arguments in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        main(arguments.split())
"""


@pytest.mark.slow
def test_a_new_setting_is_one_line() -> None:
    """A line in `dgrad/config.py` is an option, help, a TOML key, an entry of config.json, a check, and an axis."""
    Path("settings.toml").write_text('momentum = 0.25\nlatent = "2x2"\n')
    commands = (
        "train --help",
        "train --config settings.toml --steps 1 --device cpu --quiet --out from-file",
        "train --momentum 0.75 --latent 2x2 --steps 1 --device cpu --quiet --out from-option",
        "sweep --momentum 0.1,0.2 --out out --dry-run",
        "train --momentum 2",
    )
    path = os.pathsep.join(str(ROOT / part) for part in (".", "plugins", "cli", "export"))
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "100"}
    result = subprocess.run(
        [sys.executable, "-c", WITH_ONE_MORE_LINE, *commands], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (help_,) = (line for line in result.stdout.splitlines() if "--momentum" in line)
    assert "NUMBER" in help_
    assert "How much of a step the next one keeps. (default: 0.9)" in help_
    assert [json.loads(Path(f"from-{place}/config.json").read_text())["momentum"] for place in ("file", "option")] == [
        0.25,
        0.75,
    ]
    assert "direct-20x10-momentum=0.1-seed0" in result.stdout
    assert result.stderr.splitlines()[-1] == "error: --momentum must be a share of at least 0 and below 1; got 2.0"


# Documentation


def test_every_setting_is_explained_with_its_default() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    order = []
    for panel, body in re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", text, re.MULTILINE):
        rows = re.findall(r"^\| `([\w-]+)` \| (?:`([^`]+)`)? ?\| .+ \|$", body, re.MULTILINE)
        found |= dict(rows)
        order += [panel] * bool(rows)
        for name, _ in rows:
            assert panel_of({"plugin": "plugins"}.get(name, name).replace("-", "_")) == panel
    assert order == PANELS
    assert list(found) == [option(item.name)[2:] for item in fields(TrainConfig)]
    for item in fields(TrainConfig):
        default = getattr(TrainConfig(), item.name)
        written = found[option(item.name)[2:]]
        shown = (
            f"{default:g}"
            if isinstance(default, float)
            else str(default).lower()
            if default in (True, False)
            else default
        )
        assert written == ("" if default in (None, (), {}) else str(shown)), item.name
