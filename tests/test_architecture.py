"""Who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dgrad

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "dgrad": {"dgrad"},
    "dgrad_plugins": {"dgrad", "dgrad_plugins"},
    "dgrad_export": {"dgrad", "dgrad_export"},
    "dgrad_cli": {"dgrad", "dgrad_export", "dgrad_cli"},
}
SOURCES = {"dgrad": ROOT / "dgrad"} | {
    f"dgrad_{name}": ROOT / name / f"dgrad_{name}" for name in ("plugins", "export", "cli")
}


def _imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_they_may(package: str) -> None:
    files = list(SOURCES[package].rglob("*.py"))
    assert files
    for file in files:
        ours = {name for name in _imported(ast.parse(file.read_text())) if name.startswith("dgrad")}
        assert ours <= ALLOWED[package], f"{file} imports {ours - ALLOWED[package]}"
        assert "click" not in _imported(ast.parse(file.read_text())), file


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
    import os

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
