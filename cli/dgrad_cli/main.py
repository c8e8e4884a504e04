"""The application: its commands, and what becomes of errors. May import typer and rich; torch and the core only inside commands."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from dgrad_cli import inspecting, training, using

app = typer.Typer(
    name="dgrad",
    help="Train models with discrete latent variables, compare gradient estimators, export to ONNX.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
COMMANDS: tuple[Callable[..., None], ...] = (
    training.train,
    using.evaluate,
    using.sample,
    using.reconstruct,
    using.export,
    inspecting.estimators,
    inspecting.latents,
    inspecting.datasets,
    inspecting.plugins,
)
for command in COMMANDS:
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from dgrad import __version__

        typer.echo(f"dgrad {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit: 0, 1 for what failed on the way, 2 for what was asked wrongly, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("DGRAD_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(args=arguments, standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = explain(error)
        # Nothing may be lost of what was printed before, and a closed pipe is nobody's fault.
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        if message:
            print(f"error: {message}", file=sys.stderr)
    sys.exit(code or 0)


def explain(error: BaseException) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    from dgrad.errors import DgradError

    if isinstance(error, DgradError):
        return one_line(str(error)), error.exit_code
    if hasattr(error, "format_message"):  # typer's usage errors, whose classes are private to its vendored click
        return f"{one_line(error.format_message())} (see --help)", int(getattr(error, "exit_code", 2))
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "interrupted", 130
    if isinstance(error, BrokenPipeError):
        return "", 1
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return f"cannot use{where}: {error.strerror or error}; check the path, its permissions and the free space", 1
    return f"unexpected {type(error).__name__}: {one_line(str(error))}; run again with --debug to see where", 1


def one_line(text: str) -> str:
    """The text with all white space made single spaces."""
    return " ".join(text.split())
