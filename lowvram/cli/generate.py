"""lowvram generate: a prompt becomes a video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli import options as o


@o.with_job_flags
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the video shows.")],
    flags: o.JobFlags,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The mp4 to write.")] = Path(
        "out.mp4"
    ),
    weights: o.Weights = None,
    report: o.Report = None,
    preview: o.Preview = None,
    preview_decoder: o.PreviewDecoder = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a video from a prompt, and from pictures. Which of them, the model says, and what every setting is that is
    left out."""
    settings = flags.settings()
    from lowvram.cli.carry import Output
    from lowvram.cli.work import start

    out = Output(output, overwrite, as_json, quiet, report, preview, preview_decoder)
    with out.reserved():
        start(flags, prompt, settings, out, weights=weights)
