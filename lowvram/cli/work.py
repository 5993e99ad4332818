"""Running a job from the command line: saved from the first step on, shown while it runs, checked at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lowvram.api import Pipeline, Runtime
from lowvram.cli.console import Forecast, Progress, emit, emit_json, progress_mode, say
from lowvram.errors import FileError
from lowvram.job import Job
from lowvram.media.video import check_target
from lowvram.offload.budget import format_bytes
from lowvram.offload.io import FileReader, write_atomic
from lowvram.planner import Plan
from lowvram.report import Report, table
from lowvram.sampling.solvers import SolverState
from lowvram.stages.denoise import State
from lowvram.state import JobFolder, Saved, jobs_root, new_job


def check_output(target: Path, overwrite: bool) -> None:
    """Before anything else: an output that cannot be written ends the command at once."""
    check_target(target, overwrite)


def start(
    model: str,
    files: Mapping[str, str | None],
    prompt: str,
    settings: dict[str, Any],
    target: Path,
    vram: str | None,
    ram: str | None,
    device: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Plan, make the job's folder, and work on it."""
    runtime = Runtime(vram, ram, device)
    pipe = runtime.load(model, **files)
    job = pipe.job(prompt, **settings)
    plan = pipe.plan_job(job)
    saved = Saved(
        job=job,
        output=str(target.resolve()),
        vram=runtime.budget.vram,
        ram=runtime.budget.ram,
        device=runtime.machine.kind,
        overwrite=overwrite,
    )
    folder = new_job(saved, jobs_root(), datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S"))
    work(folder, pipe, job, plan, target, overwrite, as_json, quiet)


def work(
    folder: JobFolder, pipe: Pipeline, job: Job, plan: Plan, target: Path, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Do what is left of a job: steps that are saved are not repeated."""
    with folder.locked():
        latent, state = load_latent(folder), load_state(folder)
        done = state.step if state else 0
        forecast = [
            Forecast(s.name, s.steps - done if s.name == "denoise" else s.steps, s.seconds) for s in plan.stages
        ]
        with Progress(forecast, plan.budget.vram, time.monotonic, progress_mode(quiet, as_json)) as progress:
            try:
                if latent is None:
                    progress.note(f"job {folder.name}: {summary(job, plan)}")
                    latent = pipe.run(
                        job, state=state, save=lambda s: save_state(folder, s), listener=progress, plan=plan
                    ).latent
                    _save(folder.latent_path, {"latent": latent})
                report = pipe.video(job, latent, plan, progress).save(target, overwrite=overwrite)
            except KeyboardInterrupt:
                progress.note(f"saved: go on with `lowvram resume {folder.name}`")
                raise
        folder.finish()
    tell(target, job, report, as_json, quiet)


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
        emit_json({"schema": "lowvram.result/1", "output": str(target), "seed": job.seed, "report": report.to_json()})
        return
    if not quiet:
        say(table(report))
    emit(str(target))


def save_state(folder: JobFolder, state: State) -> None:
    """Replace the saved state by `state`, atomically."""
    tensors = {f"solver.{k}": v.contiguous() for k, v in state.solver.to_tensors().items()}
    write_atomic(folder.state_path, save(tensors | {"x": state.x.contiguous()}))


def load_state(folder: JobFolder) -> State | None:
    """The state after the last finished step; None before the first."""
    tensors = _load(folder.state_path)
    if tensors is None:
        return None
    solver = {k.removeprefix("solver."): v for k, v in tensors.items() if k != "x"}
    if "x" not in tensors:
        raise _damaged(folder.state_path)
    return State(tensors["x"], SolverState.from_tensors(solver))


def load_latent(folder: JobFolder) -> Tensor | None:
    """The finished latent; None while there is none."""
    tensors = _load(folder.latent_path)
    if tensors is None:
        return None
    if "latent" not in tensors:
        raise _damaged(folder.latent_path)
    return tensors["latent"]


def _load(path: Path) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    with FileReader(path) as reader:
        data = reader.read_at(0, reader.size)
    try:
        found = load(data)
    except Exception as problem:
        raise _damaged(path) from problem
    return {k: v.to(torch.int64) if k == "solver.step" else v for k, v in found.items()}


def _damaged(path: Path) -> FileError:
    return FileError("not a saved state", where=str(path), advice="start the job again with `lowvram generate`")
