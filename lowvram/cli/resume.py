"""lowvram resume: go on with a job that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli import options as o


def resume(
    name: Annotated[str, typer.Argument(help="The job's name, or `last`.")] = "last",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Go on with an interrupted job: finished steps are not repeated, and the frames are the same."""
    from lowvram.api import Pipeline, Runtime
    from lowvram.cli.driven import work_driven
    from lowvram.cli.work import check_output, work
    from lowvram.model import open_model
    from lowvram.state import find_job, jobs_root

    folder = find_job(name, jobs_root())
    saved = folder.load()
    target, replace = Path(saved.output), overwrite or saved.overwrite
    check_output(target, replace)
    runtime = Runtime(saved.vram, saved.ram, saved.device)
    job = saved.job
    pipe = Pipeline(runtime, open_model(job.model, job.files), job.files)
    carry_on = work if job.driving is None else work_driven
    carry_on(folder, pipe, job, pipe.plan_job(job), target, replace, as_json, quiet)
