"""lowvram decode: a finished latent, of a job or in a file, becomes a video."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowvram.cli import options as o

if TYPE_CHECKING:
    from lowvram.api import Runtime


def decode(
    job_name: Annotated[
        str,
        typer.Argument(
            metavar="JOB|FILE",
            help="A job whose denoise is finished, `last`, or a latent file that ends in .safetensors.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The mp4 to write.")] = Path(
        "out.mp4"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|FOLDER",
            help="Whose VAE decodes a latent file; nano's if --vae is not given either.",
        ),
    ] = None,
    vae: Annotated[
        str | None, typer.Option("--vae", metavar="FILE", help="The VAE that decodes a latent file.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", metavar="N", help="Frames a second of a latent file's video.")
    ] = None,
    report: o.Report = None,
    vram: o.Vram = None,
    ram: o.Ram = None,
    device: o.Device = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Decode the finished latent of a job once more, or a latent file."""
    from lowvram.api import Runtime
    from lowvram.cli.carry import Output
    from lowvram.cli.progress import Forecast
    from lowvram.cli.work import load_latent, reopen
    from lowvram.errors import UsageError
    from lowvram.folders import jobs_folder
    from lowvram.state import find_latent

    out = Output(output, overwrite, as_json, quiet, report)
    out.check()
    if job_name.endswith(".safetensors"):
        if report is not None:
            raise UsageError("--report beside a latent file", expected="a job", advice="leave --report out")
        _decode_file(
            Path(job_name), output, overwrite, model, vae, fps, Runtime(vram, ram, device), as_json, quiet
        )
        return
    given = {"--model": model, "--vae": vae, "--fps": fps, "--vram": vram, "--ram": ram}
    if wrong := [flag for flag, value in (given | {"--device": device}).items() if value]:
        raise UsageError(
            f"{wrong[0]} beside a job",
            where=job_name,
            expected="only a latent file takes it; a job brings its own",
            advice=f"leave {wrong[0]} out",
        )
    folder = find_latent(job_name, jobs_folder())
    saved, latent = folder.load(), load_latent(folder)
    job = saved.job
    if latent is None:
        driven = job.driving is not None
        again = "start it again with `lowvram animate`"
        raise UsageError(
            "a driven video keeps no latent" if driven else "its denoise is not finished",
            where=folder.name,
            advice=again if folder.finished else f"go on with `lowvram resume {folder.name}`",
        )
    pipe = reopen(saved)
    plan = pipe.plan_job(job)
    forecast = [Forecast(s.name, s.steps, s.seconds) for s in plan.stages if s.name == "decode"]
    with out.progress(forecast, plan) as progress:
        done = pipe.video(job, latent, plan, progress).save(output, overwrite=overwrite)
    out.tell(job, plan, done)


def _decode_file(
    file: Path,
    output: Path,
    overwrite: bool,
    model: str | None,
    vae: str | None,
    fps: float | None,
    runtime: Runtime,
    as_json: bool,
    quiet: bool,
) -> None:
    import time

    from lowvram.autoencoder import Autoencoder, find_vae, load_latent_file
    from lowvram.cli.console import emit, emit_json
    from lowvram.cli.progress import Forecast, Progress, progress_mode

    latent, rate = load_latent_file(file)
    found = find_vae(runtime, model, vae)
    plan = Autoencoder(runtime, found).plan_decode(latent)
    forecast = [Forecast(s.name, s.steps, s.seconds) for s in plan.stages]
    with Progress(forecast, plan.budget.vram, time.monotonic, progress_mode(quiet, as_json)) as progress:
        vae_alone = Autoencoder(runtime, found, progress)
        vae_alone.save(latent, plan, output, fps or rate or found.spec.fps, overwrite=overwrite)
    if as_json:
        emit_json({"schema": "lowvram.result/1", "output": str(output)})
    else:
        emit(str(output))
