"""The application: its commands. Torch and the core are imported inside commands alone."""

from __future__ import annotations

from typing import Annotated

import typer

from dgrad.errors import InputError
from dgrad.training.processes import ProcessGroup
from dgrad_cli.commands import plugins
from dgrad_cli.commands.compare import compare
from dgrad_cli.commands.diagnose import diagnose
from dgrad_cli.commands.encode import decode, encode
from dgrad_cli.commands.evaluate import evaluate, reconstruct, sample
from dgrad_cli.commands.export import export
from dgrad_cli.commands.lists import datasets, estimators, latents
from dgrad_cli.commands.reproduce import reproduce
from dgrad_cli.commands.serve import serve
from dgrad_cli.commands.sweep import sweep
from dgrad_cli.commands.train import train
from dgrad_cli.options import Command, RunCommand

app = typer.Typer(
    name="dgrad",
    help="Train models with discrete latent variables, compare gradient estimators, export to ONNX.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
EXAMPLE = "Example: dgrad train --estimator direct-rb --latent 8x4 --set epsilon=geometric:1:0.02 --epochs 20"
app.command(cls=RunCommand, epilog=EXAMPLE)(train)
for command in (
    *(evaluate, sample, reconstruct, export, encode, decode, serve),
    *(diagnose, compare, sweep, reproduce),
    *(estimators, latents, datasets),
):
    app.command(cls=Command)(command)
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
            f"dgrad {command} runs in one process, and torchrun started {processes}; run it without torchrun "
            "(only train shares its work)"
        )
