"""Fixtures that several test files share."""

from __future__ import annotations

import typechecking  # noqa: F401 (before anything imports dgrad)

# isort: split
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import CHROMEDRIVER, CHROMIUM

from dgrad.config import configure
from dgrad.registry import load_plugin, registry
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer

NEEDS = {
    "gpu": (torch.cuda.is_available(), "needs a CUDA device"),
    "browser": (
        CHROMIUM and CHROMEDRIVER,
        "needs chromium and chromedriver, of Debian's packages chromium and chromium-driver",
    ),
}

torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings, and tests may run side by side


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser takes seconds to start: its tests are slow too."""
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test whose marker names what this machine lacks is skipped, before any fixture of it is made."""
    for marker, (there, reason) in NEEDS.items():
        if item.get_closest_marker(marker) and not there:
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Tests neither see nor touch the user's data and plugins, and each starts in a directory of its own."""
    monkeypatch.setenv("DGRAD_DATA", str(tmp_path / "no-data"))
    monkeypatch.setenv("DGRAD_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = Path.cwd()
    os.chdir(tmp_path)
    yield
    os.chdir(before)


WAITING = """
import os, time
import dgrad

@dgrad.hookimpl
def dgrad_evaluation_end(run, metrics):
    if "TEST_WAIT" in os.environ:
        time.sleep(1)
"""


@pytest.fixture
def waiting() -> Iterator[str]:
    """A plugin whose runs wait a second after each evaluation, where `TEST_WAIT` is set."""
    path = Path("waiting.py")
    path.write_text(WAITING)
    yield str(path)
    registry().remove(load_plugin(str(path)).module)
    sys.modules.pop("waiting")


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Run]:
    """Train a small model on the bundled digits: `train(name, estimator="rloo", ...)` returns its run."""

    def run(name: str = "run", **settings: object) -> Run:
        trainer = Trainer(configure({"latent": "3x4", "estimator": "rloo", "epochs": 2, "device": "cpu", **settings}))
        result = Run.create(tmp_path / name, trainer.config)
        trainer.train(result)
        return result

    return run
