"""The commands of docs/serving.md run one after another, with a small model.

Its example of a client is tried in `test_serving.py`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import run_dgrad
from PIL import Image

from dgrad.training.run_directory import Run

GUIDE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def _commands() -> list[list[str]]:
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("dgrad ")]


@pytest.mark.slow
def test_every_command_runs(train: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = train(latent="3x4", epochs=1)
    Path("images").mkdir()
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)):
        Image.fromarray(image).save(f"images/{number}.png")
    commands = _commands()
    assert {command[0] for command in commands} == {"export", "serve", "encode", "decode"}
    for command in commands:
        if command[0] == "serve":  # it would not end
            assert run_dgrad("serve", "--help") == 0
            assert all(part in capsys.readouterr().out for part in command if part.startswith("--"))
        else:
            assert run_dgrad(*[part.replace("RUN", str(run.path)) for part in command]) == 0, command
    assert len(list(Path("pictures").iterdir())) == 5
    assert Path("repository/encoder/config.pbtxt").is_file()
    with Image.open("grid.png") as picture:
        assert picture.size == (5 * 60 + 4, 64)
