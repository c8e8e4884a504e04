"""Which other libraries each part of `dgrad_export` may import: what runs a model does without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "export" / "dgrad_export"
LIBRARIES: dict[str, set[str]] = {
    "codec": {"numpy", "onnxruntime", "PIL"},
    "page": set(),
    "check": {"numpy", "onnxruntime", "onnx"},
    "serve": {"numpy", "onnxruntime", "starlette", "uvicorn"},
    "write": {"numpy", "onnxruntime", "onnx", "torch"},
}
TORCH_FREE_FLOORS = ("dgrad_export", "dgrad.errors", "dgrad.files", "dgrad.__version__")
"""What a part without torch may import of ours."""


def _imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module != "dgrad" else {f"dgrad.{alias.name}" for alias in node.names}
    return names


def test_every_part_has_its_row() -> None:
    assert {file.parent.name for file in ROOT.glob("*/__init__.py")} == LIBRARIES.keys()


@pytest.mark.parametrize("part", LIBRARIES)
def test_a_part_imports_its_libraries_alone(part: str) -> None:
    names = set().union(*(_imported(file) for file in (ROOT / part).glob("*.py")))
    others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert {name for name in others if not name.startswith("dgrad")} == LIBRARIES[part]
    if "torch" not in LIBRARIES[part]:
        assert [name for name in names if name.startswith("dgrad") and not name.startswith(TORCH_FREE_FLOORS)] == []
        modules = {name.split(".")[1] for name in names if name.startswith("dgrad_export.")}
        assert "write" not in modules


@pytest.mark.processes
def test_checking_loads_no_torch_and_serving_no_onnx() -> None:
    code = """
import sys
import dgrad_export.serve.server
assert not {"torch", "onnx"} & sys.modules.keys()
import dgrad_export
dgrad_export.check_export
assert "onnx" in sys.modules and "torch" not in sys.modules
"""
    path = [str(ROOT.parent), str(ROOT.parents[1])]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], check=True, timeout=60)
