"""`dgrad export`: a run as ONNX files or as a page. Torch and the export are imported inside the command alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dgrad.errors import InputError
from dgrad_cli.commands.evaluate import Weights, check_choice, note_unfinished
from dgrad_cli.display import print_json, warn_of_collapse
from dgrad_cli.options import Json


def export(
    run: Annotated[Path | None, typer.Argument(help="A run directory of dgrad train.", metavar="RUN")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The directory to write encoder.onnx, decoder.onnx and manifest.json into.", metavar="DIR"),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="An .html file to write: the model's page, which computes in the browser.", metavar="FILE.html"
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Instead: make sure that an export is whole and computes what it did when it was written.",
            metavar="DIR",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out and --page.")] = False,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="The encoder also draws a code, from uniform numbers that it is given.")
    ] = False,
    int8: Annotated[
        str | None,
        typer.Option(
            help="decoder: its weights as integers of 8 bits, a quarter of the size. The cost is measured.",
            metavar="decoder",
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="flat, or triton: a Triton model repository, encoder/1/model.onnx and encoder/config.pbtxt and so on.",
            metavar="NAME",
        ),
    ] = "flat",
    weights: Weights = "best",
    json: Json = False,
) -> None:
    """Write the encoder and the decoder as ONNX, or as a page.

    They are checked against torch on real images before they are put in place.
    """
    if check is not None:
        _check_export(check, run, out or page, json=json)
        return
    if run is None:
        raise InputError("dgrad export needs a RUN; expected dgrad export RUN --out DIR, or dgrad export --check DIR")
    if out is None and page is None:
        raise InputError("nothing to write; give --out DIR for the ONNX files, --page FILE.html for a page, or both")
    for option, given in {"--sampling": sampling, "--int8": int8, "--layout": layout != "flat"}.items():
        if out is None and given:
            raise InputError(
                f"{option} is about the ONNX files, which a page has not; give --out DIR too, or leave it out"
            )
    from dgrad.training.run_directory import Run
    from dgrad_export import build_page, export_run
    from dgrad_export.write.run_facts import run_figures

    check_choice("--weights", weights, ("best", "last"))
    built = None if page is None else build_page(run, page, weights=weights, overwrite=overwrite)
    manifest = None
    if out is not None:
        manifest = export_run(
            run, out, weights=weights, overwrite=overwrite, sampling=sampling, int8=int8, layout=layout
        )
    if built is not None:
        built.save()
    warn_of_collapse(run_figures(Run.open(run), weights).get("code"), Run.open(run).config)
    if json:
        result: dict[str, Any] = {} if manifest is None else {"out": str(out), **manifest}
        print_json(result if built is None else {**result, "page": {"path": str(page), **built.comparison}})
        return
    if manifest is not None:
        print(f"{out}: {', '.join(manifest['files'])}, manifest.json")
        print(f"checked against torch on {manifest['comparison']['images']}")
        if manifest["int8"]:
            print(_describe_int8(manifest["int8"]))
        note_unfinished(run, manifest["run"])
        print(f"use it with numpy and onnxruntime alone: dgrad_export.Codec({str(out)!r}).encode(images)")
    if built is not None:
        if manifest is None:
            note_unfinished(run, built.state)
        print(
            f"{page}: {len(built.html.encode()) / 1000:.0f} kB, open it in a browser; weights rounded to 8 bits: "
            f"pixels differ by {built.comparison['largest']:.3f} at most, {built.comparison['mean']:.4f} on average"
        )


def _check_export(directory: Path, run: Path | None, out: Path | None, *, json: bool) -> None:
    from dgrad_export import check_export

    if run is not None or out is not None:
        raise InputError(f"--check looks at {directory} and writes nothing; leave RUN and --out out")
    found = check_export(directory)
    if json:
        print_json({"out": str(directory), **found})
        return
    print(
        f"{directory}: whole ({found['files']} files); {found['examples']} examples give what they gave at export, "
        f"within {found['largest']:.1g}"
    )


def _describe_int8(cost: dict[str, Any]) -> str:
    sizes = f"int8 decoder: {cost['size_before']:,} bytes became {cost['size_after']:,}"
    if "change" not in cost:
        return f"{sizes}; the change of the bound was not measured: the run's data set could not be loaded"
    return (
        f"{sizes}; test bound {cost['bound_before']:.3f} became {cost['bound_after']:.3f} {cost['unit']} "
        f"({cost['change']:+.4f}; one code drawn for each of {cost['images']} images, the same for both)"
    )
