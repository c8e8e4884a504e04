"""Trained models as ONNX: writing them, checking them against torch, running them without it.

    export_run(Path("runs/digits"), Path("model"))     # needs torch and onnx
    codes = Codec("model").encode(images)              # needs numpy and onnxruntime alone
    check_export(Path("model"))                        # needs onnx too, not torch

Names are loaded on first use. So importing this package, or `Codec` from it, imports neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgrad_export.check.verification import check_export
    from dgrad_export.codec.codec import Codec
    from dgrad_export.write.export import export_run
    from dgrad_export.write.single_page import build_page

__all__ = ["Codec", "build_page", "check_export", "export_run"]

_HOME_OF = {
    "Codec": "codec.codec",
    "build_page": "write.single_page",
    "check_export": "check.verification",
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
