"""Writing a new plugin package from the templates beside this file. May import dgrad.errors; the registry only where it is asked."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
from pathlib import Path
from string import Template

from dgrad.errors import InputError

TEMPLATES = Path(__file__).parent / "templates" / "plugin"
"""Each file ends in `.template`, so that no tool takes it for what it will become; MODULE in a path is the module's name."""
LONGEST_NAME = 30
"""Longer names would break the lines of the templates."""


def new_plugin(name: str, out: Path) -> list[Path]:
    """Write the package of an estimator called `name` into `out`, whole or not at all; return its files, relative to `out`.

    Raises:
        InputError: the name cannot be used, or `out` is not free.
    """
    module = check_name(name)
    _check_free(out)
    words = {
        "name": name,
        "distribution": f"dgrad-{name}",
        "module": module,
        "estimator": "".join(word.capitalize() for word in name.removesuffix("-estimator").split("-")) + "Estimator",
        "version": _version(),
    }
    texts = {
        Path(str(path.relative_to(TEMPLATES)).replace("MODULE", module)).with_suffix(""): Template(
            path.read_text(encoding="utf-8")
        ).substitute(words)
        for path in sorted(TEMPLATES.rglob("*.template"))
    }
    out = out.resolve()  # `.` has no name
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        package = staging / "package"
        for path, text in texts.items():
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            (package / path).write_text(text, encoding="utf-8")
        _put(package, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return list(texts)


def check_name(name: str) -> str:
    """The name of the module for an estimator called `name`.

    Raises:
        InputError: the name is not in kebab case, too long, or taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > LONGEST_NAME:
        raise InputError(
            f"cannot name an estimator {name!r}; expected small letters, digits and single hyphens, a letter first, at most "
            f"{LONGEST_NAME}: for example my-estimator"
        )
    from dgrad.registry import registry

    if registry().claimed("estimators", name):
        raise InputError(f"an estimator named {name!r} is registered already; expected a new name: choose another")
    module = f"dgrad_{name.replace('-', '_')}"
    if importlib.util.find_spec(module) is not None:
        raise InputError(f"a module named {module!r} is installed already; expected a new name: choose another")
    return module


def _check_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; expected a new or empty directory: choose another --out")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; expected a new or empty directory: choose another --out")
    nearest = next(parent for parent in out.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise InputError(f"{out} cannot be made, because {nearest} is a file; choose another --out")


def _put(package: Path, out: Path) -> None:
    """Move the package to `out`; into it where it exists, since it may be the directory that the user stands in."""
    if not out.exists():
        package.replace(out)
        return
    moved: list[Path] = []
    try:
        for path in sorted(package.iterdir()):
            moved.append(path.replace(out / path.name))
    except OSError:
        for path in reversed(moved):
            path.replace(package / path.name)
        raise


def _version() -> str:
    """The oldest dgrad that the package asks for."""
    from dgrad import __version__

    return ".".join(__version__.split(".")[:2])
