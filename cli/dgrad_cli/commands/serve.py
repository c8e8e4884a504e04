"""`dgrad serve`: an exported model behind HTTP, in a process without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgrad.errors import InputError


def serve(
    directory: Annotated[Path, typer.Argument(help="A directory that dgrad export wrote.", metavar="DIR")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for a free one.", min=0, max=65535)] = 8000,
    body_limit: Annotated[int, typer.Option(help="MiB that the body of a request may have.", min=1, max=2048)] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that a client may take to send a body.", min=0.1)] = 30.0,
) -> None:
    """Serve an exported model over HTTP by the Open Inference Protocol v2, until SIGTERM or Ctrl-C."""
    try:
        from dgrad_export.serve.app import MEBIBYTE
        from dgrad_export.serve.server import serve as run_server
    except ModuleNotFoundError as error:
        raise InputError(
            f"dgrad serve needs {error.name}, which is not installed; pip install 'dgrad[serve]'"
        ) from None

    def say_where(address: str) -> None:
        print(
            f"serving {directory} at {address}/v2 (models encoder and decoder), its page at {address}/; Ctrl-C ends it",
            flush=True,
        )

    run_server(directory, host=host, port=port, body_limit=body_limit * MEBIBYTE, seconds=timeout, listening=say_where)
