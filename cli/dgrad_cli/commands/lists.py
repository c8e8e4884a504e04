"""`dgrad estimators`, `latents`, `datasets`: what there is. Torch and the core only inside commands."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dgrad_cli.display import print_json, print_table
from dgrad_cli.options import DEFAULTS, Json, Plugins, check_single


def estimators(
    latent: Annotated[
        str, typer.Option("--latent", "--latents", help="The latent that evaluations are counted for.", metavar="NAME")
    ] = DEFAULTS.latent,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """List the gradient estimators."""
    import dgrad
    from dgrad.hyperparameters import defaults_of

    check_single("estimators", {"latent": latent}, ["latent"], "give the command once for each")
    load_plugins(plugin)
    layer = dgrad.latent(latent)
    rows: list[dict[str, Any]] = []
    for name, factory in dgrad.estimators().items():
        try:
            traits = dgrad.estimator(name).traits
        except dgrad.DgradError as error:  # one broken plugin costs its own row
            rows.append({"name": name, "error": str(error)})
            continue
        row = {"name": name, "unbiased": traits.unbiased, "differentiable_loss": traits.differentiable_objective}
        row |= {"one_pass": traits.one_pass, "pathwise": traits.pathwise}
        row["evaluations"] = traits.evaluations(layer) if traits.supports(layer) else None
        row["limitation"] = traits.why_unsupported(layer)
        rows.append({**row, "hyperparameters": defaults_of(factory), "reference": traits.reference})
    if json:
        print_json(rows)
        return
    for row in (row for row in rows if "error" in row):
        print(f"error: {row['error']}", file=sys.stderr)
    columns = ["name", "unbiased", "needs a differentiable loss", "one pass", "pathwise", f"evaluations at {latent}"]
    print_table(
        [*columns, "hyper-parameters", "reference"],
        (
            (
                row["name"],
                "yes" if row["unbiased"] else "no",
                "yes" if row["differentiable_loss"] else "no",
                "yes" if row["one_pass"] else "no",
                "yes" if row["pathwise"] else "no",
                "unsupported" if row["evaluations"] is None else row["evaluations"],
                " ".join(f"{name}={value}" for name, value in row["hyperparameters"].items()),
                row["reference"],
            )
            for row in rows
            if "error" not in row
        ),
    )


def latents(plugin: Plugins = None, json: Json = False) -> None:
    """List the kinds of latent code."""
    import dgrad

    _list(dgrad.latents, plugin, json)


def datasets(plugin: Plugins = None, json: Json = False) -> None:
    """List the data sets; a .npz file or a folder of images by class serves too."""
    import dgrad

    _list(dgrad.datasets, plugin, json)


def _list(names: Any, plugin: list[str] | None, json: bool) -> None:
    from dgrad.registry import describe

    load_plugins(plugin)
    described: dict[str, str] = describe(names())
    if json:
        print_json([{"name": name, "description": text} for name, text in described.items()])
        return
    print_table(["name", "what"], list(described.items()))


def load_plugins(plugin: list[str] | None) -> None:
    """Load what `--plugin` names."""
    import dgrad

    for spec in plugin or ():
        dgrad.load_plugin(spec)
