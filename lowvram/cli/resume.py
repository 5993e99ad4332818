"""lowvram resume: go on with a job that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli import options as o


def resume(
    name: Annotated[str, typer.Argument(help="The job's name, or `last`.")] = "last",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    report: o.Report = None,
    preview: o.Preview = None,
    preview_decoder: o.PreviewDecoder = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Go on with an interrupted job. Finished steps are not repeated, and the frames are the same."""
    from lowvram.api import Pipeline, Runtime
    from lowvram.cli.carry import Output
    from lowvram.cli.preview import preview_decoder as opened
    from lowvram.cli.work import work
    from lowvram.model import open_model
    from lowvram.state import find_job, jobs_root

    folder = find_job(name, jobs_root())
    saved = folder.load()
    out = Output(
        Path(saved.output),
        overwrite or saved.overwrite,
        as_json,
        quiet,
        report,
        preview,
        preview_decoder,
    )
    out.check()
    runtime = Runtime(saved.vram, saved.ram, saved.device)
    job = saved.job
    pipe = Pipeline(runtime, open_model(job.model, job.files), job.files)
    plan = pipe.plan_job(job, opened(out, pipe.model.spec))
    work(folder, pipe, job, plan, out)
