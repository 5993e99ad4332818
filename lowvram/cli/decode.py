"""lowvram decode: a finished latent becomes a video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowvram.cli import options as o


def decode(
    job_name: Annotated[
        str, typer.Argument(metavar="JOB", help="A job whose denoise is finished, or `last`.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The mp4 to write.")] = Path("out.mp4"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Decode the finished latent of a job once more."""
    import time

    from lowvram.api import Pipeline, Runtime
    from lowvram.cli.console import Forecast, Progress, progress_mode
    from lowvram.cli.work import check_output, load_latent, tell
    from lowvram.errors import UsageError
    from lowvram.model import open_model
    from lowvram.state import find_latent, jobs_root

    check_output(output, overwrite)
    folder = find_latent(job_name, jobs_root())
    saved, latent = folder.load(), load_latent(folder)
    if latent is None:
        raise UsageError(
            "its denoise is not finished",
            where=folder.name,
            advice=f"go on with `lowvram resume {folder.name}`",
        )
    runtime = Runtime(saved.vram, saved.ram, saved.device)
    job = saved.job
    pipe = Pipeline(runtime, open_model(job.model, job.files), job.files)
    plan = pipe.plan_job(job)
    forecast = [Forecast(s.name, s.steps, s.seconds) for s in plan.stages if s.name == "decode"]
    with Progress(forecast, plan.budget.vram, time.monotonic, progress_mode(quiet, as_json)) as progress:
        report = pipe.video(job, latent, plan, progress).save(output, overwrite=overwrite)
    tell(output, job, report, as_json, quiet)
