"""The floors of the house: who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dgrad

ROOT = Path(__file__).parents[1]
SOURCES = {"dgrad": ROOT / "dgrad"} | {
    f"dgrad_{name}": ROOT / name / f"dgrad_{name}" for name in ("plugins", "export", "cli")
}
FLOORS: tuple[tuple[str, ...], ...] = (
    ("dgrad.errors", "dgrad.files"),
    ("dgrad.core", "dgrad.kernels", "dgrad.devices"),
    ("dgrad.config", "dgrad.hyperparameters", "dgrad.data"),
    ("dgrad.vae",),
    ("dgrad.hookspecs", "dgrad.registry"),
    ("dgrad.training", "dgrad.testing"),
    ("dgrad.experiments",),
    ("dgrad.pictures",),
    ("dgrad_plugins",),
    ("dgrad_export.codec", "dgrad_export.page"),
    ("dgrad_export.check", "dgrad_export.serve"),
    ("dgrad_export.write",),
    ("dgrad_cli.display", "dgrad_cli.options", "dgrad_cli.scaffolding", "dgrad_cli.writing"),
    ("dgrad_cli.commands",),
    ("dgrad_cli.app",),
    ("dgrad_cli.main",),
    ("dgrad_cli.__main__", "dgrad_cli.worker"),
)
"""Each module stands on the floor of its longest prefix here.

An import leads down, or along a floor without a circle.
"""
DOORS = {"dgrad": "dgrad", "dgrad_export": "dgrad_export", "dgrad_cli": "dgrad_cli", "dgrad_plugins": "dgrad_plugins"}
"""Packages whose `__init__` loads names on first use. Whoever imports a door imports none of the rooms behind it."""
REACH = {
    "dgrad": {"dgrad"},
    "dgrad_plugins": {"dgrad", "dgrad_plugins"},
    "dgrad_export": {"dgrad", "dgrad_export"},
    "dgrad_cli": {"dgrad", "dgrad_export", "dgrad_cli"},
}
"""Which packages a package may import at all."""


def _name(package: str, file: Path) -> str:
    parts = file.relative_to(SOURCES[package]).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


MODULES = {_name(package, file): file for package, source in SOURCES.items() for file in sorted(source.rglob("*.py"))}


def imported_names(source: str) -> set[str]:
    """Every module, and every name of one, that the source imports anywhere, for types too.

    >>> sorted(imported_names("import a.b; from c import d"))
    ['a.b', 'c', 'c.d']
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """For each module, by its source, the others of ours that it imports.

    `from package import module` imports the module.
    """
    found = {}
    for module, source in modules.items():
        names = imported_names(source) & modules.keys()
        inner = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
        found[module] = names - inner - DOORS.keys() - {module}
    return found


def floor_of(module: str) -> int:
    """The number of the floor that a module stands on, from 0."""
    prefixes = [
        (len(prefix), number) for number, floor in enumerate(FLOORS) for prefix in floor if _is_in(module, prefix)
    ]
    return max(prefixes)[1]


def _is_in(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def upward(imports: Mapping[str, set[str]]) -> list[str]:
    """The imports that lead from a floor to a higher one."""
    return [
        f"{module} imports {other}, which stands higher"
        for module, others in imports.items()
        for other in sorted(others)
        if floor_of(other) > floor_of(module)
    ]


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or none.

    >>> circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    ['a', 'b', 'c', 'a']
    """
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


IMPORTS = imports_of({name: file.read_text(encoding="utf-8") for name, file in MODULES.items()})
WITH_FLOORS = {name: others for name, others in IMPORTS.items() if name not in DOORS}


def test_every_module_has_a_floor() -> None:
    assert len(WITH_FLOORS) > 100
    assert [name for name in WITH_FLOORS if not any(_is_in(name, prefix) for floor in FLOORS for prefix in floor)] == []


def test_every_floor_has_a_module() -> None:
    assert [prefix for floor in FLOORS for prefix in floor if not any(_is_in(name, prefix) for name in MODULES)] == []


def test_no_import_runs_up() -> None:
    assert upward(WITH_FLOORS) == []


def test_no_imports_close_a_circle() -> None:
    assert circle(IMPORTS) == []


def test_an_import_that_runs_up_and_a_circle_are_found() -> None:
    modules = {
        "dgrad.errors": "def f():\n    from dgrad.core import random",
        "dgrad.core.random": "import dgrad.errors",
    }
    imports = imports_of(modules)
    assert upward(imports) == ["dgrad.errors imports dgrad.core.random, which stands higher"]
    assert circle(imports)[0] == circle(imports)[-1]


@pytest.mark.parametrize("package", REACH)
def test_packages_import_only_what_they_may(package: str) -> None:
    modules = {name: file for name, file in MODULES.items() if name.partition(".")[0] == package}
    assert modules
    for name, file in modules.items():
        tops = {other.partition(".")[0] for other in imported_names(file.read_text(encoding="utf-8"))}
        assert {top for top in tops if top.startswith("dgrad")} <= REACH[package], name
        assert "click" not in tops, name  # typer vendors it


@pytest.mark.processes
@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        (
            "import dgrad; dgrad.latent('2x2'); dgrad.estimator('direct')",
            "torchvision onnx onnxruntime matplotlib sklearn typer",
        ),
        ("import dgrad", "torch numpy"),
        ("import dgrad_cli.app", "torch numpy onnx matplotlib"),
    ],
)
def test_an_import_loads_nothing_heavy(statement: str, forbidden: str) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {forbidden.split()!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment()
    )
    assert result.stdout.strip() == "[]"


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "plugins", "cli", "export"))}


def test_every_package_is_typed() -> None:
    for source in SOURCES.values():
        assert (source / "py.typed").is_file()


def test_public_names_are_all_there() -> None:
    for name in dgrad.__all__:
        assert getattr(dgrad, name) is not None
    assert set(dgrad.__all__) == {"__version__"} | {name for names in dgrad._HOMES.values() for name in names}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dgrad.nothing  # noqa: B018
