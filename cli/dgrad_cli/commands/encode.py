"""`dgrad encode`, `dgrad decode`: images to codes and back with an exported model, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgrad.errors import InputError
from dgrad_cli.display import counting

AT_ONCE = 256

Model = Annotated[Path, typer.Option(help="A directory that dgrad export wrote.", metavar="DIR")]


def encode(
    images: Annotated[
        list[Path],
        typer.Argument(
            help="PNG and JPEG files, folders of them, .npy, .npz (images), IDX files.", metavar="IMAGES..."
        ),
    ],
    model: Model,
    out: Annotated[
        str, typer.Option(help="A file .npz or .jsonl; - for JSON lines on the standard output.", metavar="FILE")
    ] = "-",
) -> None:
    """Write the most probable code of each image."""
    from dgrad_export import Codec
    from dgrad_export.codec.code_files import check_name, writing
    from dgrad_export.codec.image_sources import Images

    check_name(out)
    codec = Codec(model, threads=0)
    found = Images(images, codec.image_shape)
    with (
        counting("encoding", len(found), shown=out != "-") as done,
        writing(out, codec, len(found), found.longest_name) as write,
    ):
        for batch in found.batches(AT_ONCE):
            try:
                values = codec.posterior(batch.images)
            except InputError as error:
                raise InputError(f"{batch.source}: {error}") from None
            del values["logits"]
            write(batch.origins, values)
            done(len(batch.origins))
    if out != "-":
        print(f"{out}: the codes of {len(found)} image{'' if len(found) == 1 else 's'}")


def decode(
    codes: Annotated[
        str,
        typer.Argument(
            help="A file .npz, .npy or .jsonl, as dgrad encode writes it; - for lines on the standard input.",
            metavar="CODES",
        ),
    ],
    model: Model,
    out: Annotated[
        Path,
        typer.Option(help="A new directory for one PNG each, or a name that ends with .png for a grid.", metavar="DIR"),
    ],
    columns: Annotated[int, typer.Option(help="Of the grid.", metavar="N", min=1)] = 12,
) -> None:
    """Write what each code decodes to; in a mixed model with the Gaussian variables beside it (style, or else mean)."""
    from dgrad_export import Codec
    from dgrad_export.codec.code_files import Codes
    from dgrad_export.codec.image_files import check_out, writing

    check_out(out)
    codec = Codec(model, threads=0)
    found = Codes(codes, codec)
    count = 0
    with counting("decoding", found.count, shown=True) as done, writing(out, columns) as write:
        for batch, style in found.batches(AT_ONCE):
            try:
                decoded = codec.decode(batch, style)
            except InputError as error:
                last = count + len(batch) - 1
                raise InputError(f"{codes}, codes {count} to {last}: {error}") from None
            write(decoded)
            count += len(batch)
            done(len(batch))
    print(f"{out}: {count} image{'' if count == 1 else 's'}")
