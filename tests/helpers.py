"""What several test files share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = """
import sys
from dgrad_cli.main import main
try:
    main(sys.argv[1:])
finally:
    found = {name.partition(".")[0] for name in sys.modules} & {"torch", "torchvision", "onnx", "onnxscript", "safetensors"}
    print("heavy:", *sorted(found), flush=True)
"""


@contextmanager
def serving(bundle: Path, *options: str, first: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server, which runs the code `first` before it begins, and its port."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", first + COMMAND, "serve", str(bundle), "--port", "0", *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)/v2", line)
        assert match, line + process.stdout.read()
        yield process, int(match[1])
    finally:
        process.kill()
        process.communicate()
