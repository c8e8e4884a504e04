"""Checks types and shapes of the calls of dgrad under pytest. Import it before dgrad.

It does what jaxtyping's import hook does, with two differences that save much of the suite's time:

- A call is checked once. The hook binds its arguments, checks them, and checks them again with the result.
- A function inside a function is left alone. Each call of the outer one would instrument it again.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, FunctionType, ModuleType
from typing import Any, get_args, get_type_hints

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, config, jaxtyped

PACKAGES = ("dgrad", "dgrad_plugins")

beartyped = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is as good as a float (PEP 484)."""


def checked(function: Any) -> Any:
    """The function, or the dataclass, with its types checked."""
    if isinstance(function, type):
        if is_dataclass(function):
            function.__init__ = _checked(function.__init__)  # type: ignore[misc]
        return function
    if isinstance(function, (classmethod, staticmethod)):
        return type(function)(_checked(function.__func__))
    if isinstance(function, property):
        return property(*(method and _checked(method) for method in (function.fget, function.fset, function.fdel)))
    return _checked(function)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(function, FunctionType):
        return function
    hints = {name: _resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    function.__annotations__ = hints
    with_types = beartyped(function)
    shapes = any(map(_has_shape, hints.values()))

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        __tracebackhide__ = True
        if config.jaxtyping_disable:
            return function(*args, **keywords)
        if not shapes:
            return with_types(*args, **keywords)
        with jaxtyped("context"):  # an axis has one length within a call
            return with_types(*args, **keywords)

    return call


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """What an annotation means, and Any where it names what only a type checker imports."""

    def holder(value: Any) -> None: ...

    holder.__annotations__ = {"value": hint}
    try:
        return get_type_hints(holder, names, include_extras=True)["value"]
    except Exception:
        return Any


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))


class _Instrument(ast.NodeTransformer):
    """Decorates functions and classes, but none inside of a function."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(_decorator(node))  # other decorators hide annotations
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, _decorator(node))  # what @dataclass has made
        return node


def _decorator(node: ast.stmt) -> ast.expr:
    expression = ast.parse("__import__('typechecking').checked", mode="eval").body
    return ast.copy_location(expression, node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # past the cache, which holds the code as it is
        path = self.get_filename(fullname)
        tree = _Instrument().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


early = [name for name in PACKAGES if name in sys.modules]
if early:
    raise RuntimeError(f"imported before its calls could be checked: {', '.join(early)}; import typechecking first")
sys.meta_path.insert(0, _Finder)
