"""The application: its commands. May import typer and rich; torch and the core only inside commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from dgrad.errors import InputError
from dgrad.training.processes import ProcessGroup
from dgrad_cli.commands import compare as comparing
from dgrad_cli.commands import encode as coding
from dgrad_cli.commands import evaluate as using
from dgrad_cli.commands import lists as inspecting
from dgrad_cli.commands import plugins
from dgrad_cli.commands import reproduce as reproducing
from dgrad_cli.commands import serve as serving
from dgrad_cli.commands import sweep as sweeping
from dgrad_cli.commands import train as training

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
    coding.encode,
    coding.decode,
    serving.serve,
    comparing.diagnose,
    comparing.compare,
    sweeping.sweep,
    reproducing.reproduce,
    inspecting.estimators,
    inspecting.latents,
    inspecting.datasets,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(plugins.app, name="plugins")


def _print_version(wanted: bool) -> None:
    if wanted:
        from dgrad import __version__

        typer.echo(f"dgrad {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    command, processes = context.invoked_subcommand, ProcessGroup.from_environment().size
    if command != "train" and processes > 1:
        raise InputError(
            f"dgrad {command} runs in one process, and torchrun started {processes}; run it without torchrun (only train shares its work)"
        )
