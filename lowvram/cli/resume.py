"""lowvram resume: go on with a job that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli import options as o


def resume(
    name: Annotated[str, typer.Argument(metavar="JOB", help="The job's name, or `last`.")] = "last",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The mp4 to write; the job's own if left out."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    report: o.Report = None,
    preview: o.Preview = None,
    preview_decoder: o.PreviewDecoder = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Go on with an interrupted job. Finished steps are not repeated, and the frames are the same."""
    from lowvram.cli.carry import Output
    from lowvram.cli.preview import preview_decoder as opened
    from lowvram.cli.work import reopen, work
    from lowvram.errors import UsageError
    from lowvram.folders import jobs_folder
    from lowvram.state import find_job

    folder = find_job(name, jobs_folder())
    saved = folder.load()
    if folder.finished and saved.job.driving is not None:  # its segments are gone: it would begin anew
        raise UsageError(
            "this job is finished", where=folder.name, advice="start it again with `lowvram animate`"
        )
    out = Output(
        output or Path(saved.output),
        overwrite or (saved.overwrite and output is None),
        as_json,
        quiet,
        report,
        preview,
        preview_decoder,
    )
    with out.reserved():
        pipe = reopen(saved)
        plan = pipe.plan_job(saved.job, opened(out, pipe.model.spec, saved.job))
        work(folder, pipe, saved.job, plan, out)
