"""Files that commands write beside the core's. Imports nothing heavy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dgrad.errors import InputError


def as_text(value: Any) -> str:
    """JSON for a file."""
    return json.dumps(value, indent=2) + "\n"


def check_directory(out: Path) -> None:
    """Make sure, before any work is done, that files can be written into `out`.

    Raises:
        InputError: they cannot.
    """
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"--out {out}: {nearest} is a file; expected a directory: choose another --out")
    if not os.access(nearest, os.W_OK):
        raise InputError(
            f"--out {out}: {nearest} cannot be written to; choose another --out, or change its permissions"
        )
