"""Running a job from the command line: saved from the first step on, shown while it runs, checked at the end."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lowvram.api import Pipeline, Runtime
from lowvram.cli.console import Forecast, Progress, emit, emit_json, progress_mode, say
from lowvram.cli.models import announce, tell_files, tell_preset
from lowvram.cli.options import JobFlags
from lowvram.cli.preview import open_preview
from lowvram.conditions.contract import Condition
from lowvram.errors import FileError
from lowvram.job import Job, check_complete
from lowvram.media.video import check_target
from lowvram.offload.budget import format_bytes
from lowvram.offload.io import FileReader, write_atomic
from lowvram.planning.plan import Plan
from lowvram.preview import colours_of
from lowvram.report import Report, table
from lowvram.sampling.solvers import SolverState
from lowvram.stages.denoise import State
from lowvram.state import JobFolder, Saved, jobs_root, new_job
from lowvram.timeline import draw


def check_output(target: Path, overwrite: bool) -> None:
    """Before anything else: an output that cannot be written ends the command at once."""
    check_target(target, overwrite)


def start(
    flags: JobFlags,
    prompt: str,
    settings: dict[str, Any],
    target: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    weights: str | None = None,
    report_to: Path | None = None,
    preview: int | None = None,
) -> None:
    """Find the model, plan, make the job's folder, and work on it."""
    pipe = open_pipeline(flags, quiet or as_json, weights)
    job = pipe.job(prompt, **settings)
    check_complete(pipe.model.spec, job)
    if preview is not None:
        colours_of(pipe.model.spec.vae)
    tell_preset(pipe, flags, job, quiet or as_json)
    plan = pipe.plan_job(job)
    folder = new_folder(pipe.runtime, job, target, overwrite)
    work(folder, pipe, job, plan, target, overwrite, as_json, quiet, report_to, preview)


def open_pipeline(flags: JobFlags, silent: bool, weights: str | None = None) -> Pipeline:
    """The model of these flags."""
    pipe = Runtime(flags.vram, flags.ram, flags.device, cache=not flags.no_cache).load(
        flags.model,
        models_dirs=flags.models_dir or (),
        weights=weights,
        preset=flags.preset,
        force=flags.force,
        progress=announce(silent),
        **flags.files(),
    )
    tell_files(pipe, silent)
    return pipe


def new_folder(runtime: Runtime, job: Job, target: Path, overwrite: bool) -> JobFolder:
    """A folder for a job that begins now."""
    saved = Saved(
        job=job,
        output=str(target.resolve()),
        vram=runtime.budget.vram,
        ram=runtime.budget.ram,
        device=runtime.machine.kind,
        overwrite=overwrite,
    )
    return new_job(saved, jobs_root(), datetime.now(UTC).strftime("%Y%m%d-%H%M%S"))


def work(
    folder: JobFolder,
    pipe: Pipeline,
    job: Job,
    plan: Plan,
    target: Path,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    report_to: Path | None = None,
    preview: int | None = None,
) -> None:
    """Do what is left of a job: steps that are saved are not repeated. report_to: see `write_report`. preview: steps
    between two looks at what the video will be."""
    with folder.locked():
        latent, state = load_latent(folder), load_state(folder)
        done = state.step if state else 0
        forecast = [
            Forecast(s.name, s.steps - done if s.name == "denoise" else s.steps, s.seconds)
            for s in plan.stages
        ]
        with Progress(forecast, plan.budget.vram, time.monotonic, progress_mode(quiet, as_json)) as progress:
            try:
                if latent is None:
                    progress.note(f"job {folder.name}: {summary(job, plan)}")
                    video = pipe.run(
                        job,
                        state=state,
                        save=lambda s: save_state(folder, s),
                        made=load_condition(folder),
                        keep=lambda c: save_condition(folder, c),
                        listener=progress,
                        plan=plan,
                        preview=None
                        if preview is None
                        else open_preview(preview, pipe.model.spec, job, target, progress),
                    )
                    save_latent(folder, video.latent)
                else:
                    video = pipe.video(job, latent, plan, progress)
                report = video.save(target, overwrite=overwrite)
            except KeyboardInterrupt:
                progress.note(f"saved: go on with `lowvram resume {folder.name}`")
                raise
        folder.finish()
    if report_to is not None:
        write_report(report, plan, report_to)
    tell(target, job, report, as_json, quiet)


def write_report(report: Report, plan: Plan, path: Path) -> None:
    """The report as JSON, or as a drawing of the memory over time if the name ends with .svg."""
    drawn = path.suffix.lower() == ".svg" and report.samples
    said = draw(report.samples, plan.budget) if drawn else json.dumps(report.to_json(), indent=2) + "\n"
    write_atomic(path, said.encode())


def summary(job: Job, plan: Plan) -> str:
    """One line about what is to come."""
    blocks = plan.blocks()
    places = ", ".join(f"{n} {where}" for where, n in blocks.items() if n)
    return (
        f"{job.model} {job.width}x{job.height}, {job.frames} frames, {len(job.schedule)} steps; "
        f"at most {format_bytes(plan.vram)} of {format_bytes(plan.budget.vram)} VRAM; blocks: {places}"
    )


def tell(target: Path, job: Job, report: Report, as_json: bool, quiet: bool) -> None:
    """The result: the file's path on stdout; on a terminal, where time and memory went."""
    if as_json:
        emit_json(
            {
                "schema": "lowvram.result/1",
                "output": str(target),
                "seed": job.seed,
                "report": report.to_json(),
            }
        )
        return
    if not quiet:
        say(table(report))
    emit(str(target))


def save_state(folder: JobFolder, state: State) -> None:
    """Replace the saved state by `state`, atomically."""
    solver = {f"solver.{name}": tensor for name, tensor in state.solver.to_tensors().items()}
    save_tensors(folder.state_path, solver | {"x": state.x})


def load_state(folder: JobFolder) -> State | None:
    """The state after the last finished step; None before the first."""
    tensors = load_tensors(folder.state_path)
    if tensors is None:
        return None
    x = tensors.pop("x", None)
    if x is None:
        raise damaged(folder.state_path)
    return State(x, SolverState.from_tensors({k.removeprefix("solver."): v for k, v in tensors.items()}))


def save_condition(folder: JobFolder, condition: Condition) -> None:
    """From now on the job needs its pictures no more."""
    if tensors := condition.to_tensors():
        save_tensors(folder.condition_path, tensors)


def load_condition(folder: JobFolder) -> Condition | None:
    """What was made of the job's pictures; None while nothing was."""
    tensors = load_tensors(folder.condition_path)
    return None if tensors is None else Condition.from_tensors(tensors)


def save_latent(folder: JobFolder, latent: Tensor) -> None:
    """From now on the job can always be decoded."""
    save_tensors(folder.latent_path, {"latent": latent})


def load_latent(folder: JobFolder) -> Tensor | None:
    """The finished latent; None while there is none."""
    tensors = load_tensors(folder.latent_path)
    if tensors is None:
        return None
    if "latent" not in tensors:
        raise damaged(folder.latent_path)
    return tensors["latent"]


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace the file by these, atomically."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(whole | {"checksum": torch.tensor(_checksum(whole))}))


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """What `save_tensors` wrote; None if nothing is there. FileError if it is damaged."""
    if not path.exists():
        return None
    with FileReader(path) as reader:
        data = reader.read_at(0, reader.size)
    try:
        tensors = load(data)
    except Exception as problem:
        raise damaged(path) from problem
    checksum = tensors.pop("checksum", None)
    if checksum is None or checksum.numel() != 1 or checksum.item() != _checksum(tensors):
        raise damaged(path)
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of all tensors in the order of their names: a flipped bit would become a wrong video."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(
            tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes(), zlib.crc32(name.encode(), crc)
        )
    return crc


def damaged(path: Path) -> FileError:
    """The error for a file of this job that does not hold what was saved."""
    return FileError(
        "not a saved state, or a damaged one",
        where=str(path),
        advice="start the job again with `lowvram generate`",
    )
