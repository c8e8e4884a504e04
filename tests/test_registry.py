"""Plugins: what they add, and how they fail without harm to others."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dgrad
from dgrad.registry import Plugin, Registry, load_plugin, registry

PLUGIN = """
import dgrad
from dgrad_plugins.estimators import ESTIMATORS

@dgrad.hookimpl
def dgrad_register_estimators(register):
    register("mine", ESTIMATORS["rloo"])
"""


@pytest.fixture
def plugin_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "toy_plugin_of_a_test.py"
    path.write_text(PLUGIN)
    yield path
    for plugin in list(registry().plugins):
        if plugin.name == path.stem:
            registry().remove(plugin.module)
    sys.modules.pop(path.stem, None)


def _entry_point(name: str, distribution: str, load: object) -> SimpleNamespace:
    return SimpleNamespace(name=name, load=load, dist=SimpleNamespace(name=distribution, version="1.2"))


def _fail() -> None:
    raise ImportError("no module named gpu_magic")


def test_the_built_in_plugin_goes_through_the_same_hooks() -> None:
    (builtin,) = registry().plugins
    assert (builtin.name, builtin.distribution) == ("builtin", "dgrad")
    assert "direct" in builtin.registers["estimators"]


def test_a_broken_entry_point_warns_with_its_distribution_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    good = SimpleNamespace(dgrad_register_latents=dgrad.hookimpl(lambda register: register("good", lambda text: None)))
    good.dgrad_register_latents.__name__ = "dgrad_register_latents"
    points = [_entry_point("bad", "broken-package", _fail), _entry_point("good", "good-package", lambda: good)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    fresh = Registry()
    with pytest.warns(
        UserWarning,
        match=r"plugin 'bad' of distribution 'broken-package' is left out: ImportError: no module named gpu_magic",
    ):
        fresh.load_entry_points()
    assert [plugin.name for plugin in fresh.plugins] == ["good"]
    assert list(fresh.factories("latents")) == ["good"]


def test_a_hook_with_a_wrong_argument_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def dgrad_register_estimators(registrar: object) -> None: ...

    bad = SimpleNamespace(dgrad_register_estimators=dgrad.hookimpl(dgrad_register_estimators))
    points = [_entry_point("odd", "odd-package", lambda: bad)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    fresh = Registry()
    with pytest.warns(UserWarning, match=r"'odd-package' is left out.*registrar"):
        fresh.load_entry_points()
    assert not fresh.plugins
    assert not fresh.manager.get_plugins()


def test_autoload_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [_entry_point("bad", "broken-package", _fail)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Registry().load_entry_points(builtins_only=True)


def test_two_claims_on_one_name_harm_only_that_name() -> None:
    fresh = Registry()
    for distribution in ("first-package", "second-package"):

        def dgrad_register_estimators(register: object, own: str = distribution) -> None:
            register("twice", object)  # type: ignore[operator]
            register(own, object)  # type: ignore[operator]

        module = SimpleNamespace(dgrad_register_estimators=dgrad.hookimpl(dgrad_register_estimators))
        fresh.add(Plugin("entry", distribution, "1", module))
    with pytest.raises(dgrad.InputError, match=r"'twice' is claimed by first-package .* and second-package"):
        fresh.factory("estimators", "twice")
    assert list(fresh.factories("estimators")) == ["first-package", "second-package"]


def test_a_file_can_be_loaded_and_used(plugin_file: Path) -> None:
    loaded = load_plugin(str(plugin_file))
    assert load_plugin(str(plugin_file)) is loaded, "twice is once"
    estimate = dgrad.estimator("mine", samples="3")(
        dgrad.latent("2x2"), torch.zeros(1, 2, 2), lambda codes: codes.sum((-2, -1))
    )
    assert estimate.codes.shape[0] == 3


@pytest.mark.parametrize(
    ("spec", "text", "message"),
    [
        ("missing.py", None, "no plugin file 'missing.py'"),
        ("no_such_module_anywhere", None, "cannot import plugin 'no_such_module_anywhere': ModuleNotFoundError"),
        ("broken_toy.py", "import nothing_like_it", "cannot import plugin 'broken_toy.py': ModuleNotFoundError"),
        ("syntax_toy.py", "def", "cannot import plugin 'syntax_toy.py': SyntaxError"),
        ("failing_toy.py", PLUGIN.replace('register("mine", ESTIMATORS["rloo"])', "1 / 0"), "ZeroDivisionError"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_refused(spec: str, text: str | None, message: str) -> None:
    if text is not None:
        Path(spec).write_text(text)
    with pytest.raises(dgrad.InputError, match=message):
        load_plugin(spec)
    sys.modules.pop(Path(spec).stem, None)
    assert len(registry().plugins) == 1


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: 3, "the factory of estimator 'broken' made a int; expected a GradientEstimator"),
        (lambda: 1 / 0, "the factory of estimator 'broken' failed: ZeroDivisionError"),
    ],
)
def test_a_factory_that_fails_is_named(factory: object, message: str) -> None:
    class Toy:
        @dgrad.hookimpl
        def dgrad_register_estimators(self, register):  # type: ignore[no-untyped-def]
            register("broken", factory)

    toy = Toy()
    registry().add(Plugin("toy", "toy", "", toy))
    try:
        with pytest.raises(dgrad.InputError, match=message):
            dgrad.estimator("broken")
    finally:
        registry().remove(toy)
