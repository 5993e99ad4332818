"""lowvram demo: a video from the embedded model, in seconds, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli import options as o
from lowvram.errors import UsageError

PROMPT = "a red circle moves left on a teal background"
"""What is made if nothing is asked for."""


def demo(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="a COLOUR SHAPE moves DIRECTION on a BACKGROUND background"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The mp4 to write.")] = Path(
        "demo.mp4"
    ),
    seed: o.Seed = 1,
    vram: o.Vram = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: o.Quiet = False,
    drive: Annotated[
        Path | None,
        typer.Option(
            "--drive",
            metavar="FOLDER",
            help="Write sample driving videos into this folder, and animate them instead.",
        ),
    ] = None,
) -> None:
    """Make a small video with a model that ships inside. It follows the prompt, or with --drive a driving video."""
    from lowvram.cli.carry import Output
    from lowvram.cli.work import start

    if drive is not None and prompt is not None:
        raise UsageError(
            f'"{prompt}" beside --drive',
            expected="one or the other: with --drive the videos say what is shown",
            advice="leave the prompt out, or --drive",
        )
    out = Output(output, overwrite, quiet=quiet)
    with out.reserved():
        if drive is None:
            flags = o.JobFlags(seed=seed, vram=vram)
            start(flags, prompt or PROMPT, flags.settings(), out)
            return
        from lowvram.driving import copy_sample, open_folder
        from lowvram.offload.io import user_path

        folder = user_path(drive)
        copy_sample(folder)
        flags = o.JobFlags(seed=seed, vram=vram, model="nano-animate")
        start(flags, "", flags.settings(), out, driving=open_folder(folder, "animate"))
