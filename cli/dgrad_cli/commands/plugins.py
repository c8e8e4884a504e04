"""`dgrad plugins`, `plugins check`, `plugins new`: what is loaded, whether it is right, and how to begin one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgrad.errors import InputError
from dgrad_cli.commands.lists import load_plugins
from dgrad_cli.display import print_json, print_table
from dgrad_cli.options import Command, Json, Plugins, check_single, single_set, takes_settings

if TYPE_CHECKING:
    from dgrad.testing import CheckResult

app = typer.Typer(
    help="List the plugins; check one, or begin a new one.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def plugins(context: typer.Context, plugin: Plugins = None, json: Json = False) -> None:
    """List the plugins, where each comes from and what it registers; those left out with the reason."""
    load_plugins(plugin)
    if context.invoked_subcommand is not None:
        if json:
            raise InputError(f"--json goes behind the command: dgrad plugins {context.invoked_subcommand} ... --json")
        return
    from dgrad.registry import KINDS, LeftOut, Plugin, registry

    def row(entry: Plugin | LeftOut, **more: Any) -> dict[str, Any]:
        return {"name": entry.name, "distribution": entry.distribution, "version": entry.version, **more}

    rows = [
        row(entry, registers=entry.registers, claimed_twice=registry().claimed_twice(entry), left_out=None)
        for entry in registry().plugins
    ]
    nothing: dict[str, Any] = {"registers": {kind: [] for kind in KINDS}, "claimed_twice": []}
    rows += [row(entry, **nothing, left_out=entry.reason) for entry in registry().left_out]
    if json:
        print_json(rows)
        return
    print_table(
        ["name", "distribution", "version", "registers"],
        ((row["name"], row["distribution"], row["version"], _registers(row)) for row in rows),
    )
    for line in registry().claimed_twice():
        print(f"claimed twice: {line}")


def _registers(row: dict[str, Any]) -> str:
    if row["left_out"] is not None:
        return f"left out: {row['left_out']}"
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in row["registers"].items() if names)


@app.command(cls=Command)
@takes_settings("set", "latent", "plugins", shown={"latent": "several that it supports"})
def check(
    name: Annotated[
        str, typer.Argument(help="An estimator's registered name, or a latent such as 20x10.", metavar="NAME")
    ],
    *,
    json: Json = False,
    **given: Any,
) -> None:
    """Run the conformance checks on an estimator or a latent; exits with 1 where one fails."""
    check_single("plugins check", given, ["latent"], "give the command once for each")
    load_plugins(given.get("plugins"))
    kind, results = _check_results(name, given)
    failed = [result for result in results if not result.ok]
    if json:
        checks = [
            {
                "check": result.name,
                "result": result.status,
                "detail": result.detail,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ]
        print_json({kind: name, "passed": not failed, "checks": checks})
    else:
        print_table(["check", "result", "detail"], ((result.name, result.status, result.detail) for result in results))
        counts = {status: sum(result.status == status for result in results) for status in ("passed", "skipped")}
        print(
            f"{name}: {counts['passed']} passed, {counts['skipped']} skipped, {len(failed)} failed "
            f"in {sum(result.seconds for result in results):.1f} s"
        )
    if failed:
        raise typer.Exit(1)


def _check_results(name: str, given: dict[str, Any]) -> tuple[str, list[CheckResult]]:
    """What kind of thing the name is, and what came of each of its checks."""
    import dgrad
    from dgrad.testing import run_checks, run_latent_checks

    is_latent = name.partition(":")[0] in dgrad.latents() or name[:1].isdigit()
    if is_latent and name not in dgrad.estimators():
        if extra := [f"--{option}" for option in ("set", "latent") if option in given]:
            raise InputError(f"{name} is a latent; got {extra[0]}, which belongs to an estimator: leave it out")
        return "latent", run_latent_checks(dgrad.latent(name))
    estimator = dgrad.estimator(
        name, **single_set("plugins check", name, given.get("set", ()), "give the command once for each")
    )
    return "estimator", run_checks(estimator, dgrad.latent(given["latent"]) if "latent" in given else None)


@app.command(cls=Command)
def new(
    name: Annotated[
        str, typer.Argument(help="The name to register an estimator under, such as my-estimator.", metavar="NAME")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The package's directory; new or empty. (default: dgrad-NAME)", metavar="DIR")
    ] = None,
) -> None:
    """Write a small package with one estimator, its tests and its documentation, ready to install."""
    from dgrad_cli.scaffolding import new_plugin

    out = out or Path(f"dgrad-{name}")
    files = new_plugin(name, out)
    print(f"wrote  {out}: {', '.join(map(str, files))}")
    print(f"next   cd {shlex.quote(str(out))} && pip install -e '.[dev]' && pytest")
    print(f"       dgrad plugins check {name}")
    print(f"       dgrad train --estimator {name} --latent 8x4")
