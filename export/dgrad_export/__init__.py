"""Trained models as ONNX: writing them, checking them against torch, running them without it.

    export_run(Path("runs/digits"), Path("model"))     # needs torch and onnx
    codes = Codec("model").encode(images)              # needs numpy and onnxruntime alone
    check_export(Path("model"))                        # needs onnx too, not torch

May import dgrad. Names are loaded on first use: importing this package, or `Codec` from it, imports neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgrad_export.codec.codec import Codec
    from dgrad_export.page.single_page import build_page
    from dgrad_export.write.export import export_run
    from dgrad_export.write.reference import check_export

__all__ = ["Codec", "build_page", "check_export", "export_run"]

_HOME_OF = {
    "Codec": "codec.codec",
    "build_page": "page.single_page",
    "check_export": "write.reference",
    "export_run": "write.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dgrad_export' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dgrad_export.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
