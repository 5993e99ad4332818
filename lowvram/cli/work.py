"""Running a job from the command line: saved from the first step on, so that what is finished is not done again."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from lowvram.api import Pipeline, Runtime
from lowvram.cli.carry import Output, Rest, carry_on, summary
from lowvram.cli.driven import rest_of_driven
from lowvram.cli.models import announce, tell_files, tell_preset
from lowvram.cli.options import JobFlags
from lowvram.cli.preview import open_preview, preview_decoder
from lowvram.cli.progress import Forecast, Progress
from lowvram.cli.tensors import damaged, load_tensors, save_tensors
from lowvram.conditions.contract import Condition
from lowvram.driving import Driving
from lowvram.errors import StorageError
from lowvram.folders import jobs_folder
from lowvram.job import Job, check_complete
from lowvram.model_files import open_model
from lowvram.offload.budget import format_bytes
from lowvram.offload.io import free_bytes
from lowvram.planning.plan import Plan
from lowvram.report import Report
from lowvram.sampling.solvers import SolverState
from lowvram.stages.denoise import State
from lowvram.state import JobFolder, Saved, new_job


def start(
    flags: JobFlags,
    prompt: str,
    settings: dict[str, Any],
    out: Output,
    *,
    weights: str | None = None,
    driving: Driving | None = None,
) -> None:
    """Find the model, plan, make the job's folder, and work on it."""
    silent = out.quiet or out.as_json
    pipe = open_pipeline(flags, silent, weights)
    if driving is not None:
        job = pipe.driven_job(driving, prompt, **settings)
    else:
        job = pipe.job(prompt, **settings)
        check_complete(pipe.model.spec, job)
    tell_preset(pipe, flags, job, silent)
    plan = pipe.plan_job(job, preview_decoder(out, pipe.model.spec, job))  # known before a folder is made
    check_space(jobs_folder(), plan)
    work(new_folder(pipe.runtime, job, out), pipe, job, plan, out)


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


def check_space(root: Path, plan: Plan, free: Callable[[Path], int] = free_bytes) -> None:
    """StorageError if the job's state would fill the disk: known before the first step, not at it."""
    needed, left = sum(plan.saved.values()), free(root)
    if left < needed:
        raise StorageError(
            f"{format_bytes(left)} are free, the state of this job takes {format_bytes(needed)}",
            where=str(root),
            expected="room for it: that is what `lowvram resume` goes on from",
            advice="free space there, or set LOWVRAM_STATE to a folder on another disk",
        )


def new_folder(runtime: Runtime, job: Job, out: Output) -> JobFolder:
    """A folder for a job that begins now."""
    saved = Saved(
        job=job,
        output=str(out.target.resolve()),
        vram=runtime.budget.vram,
        ram=runtime.budget.ram,
        device=runtime.machine.kind,
        overwrite=out.overwrite,
        cache=runtime.texts is not None,
    )
    return new_job(saved, jobs_folder(), datetime.now(UTC).strftime("%Y%m%d-%H%M%S"))


def reopen(saved: Saved) -> Pipeline:
    """The model of a job that was begun earlier, on the device and in the budget that it was begun with."""
    runtime = Runtime(saved.vram, saved.ram, saved.device, cache=saved.cache)
    return Pipeline(runtime, open_model(saved.job.model, saved.job.files), saved.job.files)


def work(folder: JobFolder, pipe: Pipeline, job: Job, plan: Plan, out: Output) -> None:
    """Do what is left of a job: what is saved of it is not repeated."""
    rest = rest_of if job.driving is None else rest_of_driven
    carry_on(folder, job, plan, out, lambda: rest(folder, pipe, job, plan, out))


def rest_of(folder: JobFolder, pipe: Pipeline, job: Job, plan: Plan, out: Output) -> Rest:
    """The steps that are not saved, and the video."""
    latent, state = load_latent(folder), load_state(folder)
    decoder = preview_decoder(out, pipe.model.spec, job)
    done = state.step if state else 0
    forecast = [Forecast(s.name, s.steps, s.seconds, done if s.name == "denoise" else 0) for s in plan.stages]

    def make(progress: Progress) -> Report:
        if latent is not None:
            return pipe.video(job, latent, plan, progress).make(out.target, overwrite=out.overwrite)
        video = pipe.run(
            job,
            state=state,
            save=lambda s: save_state(folder, s),
            made=load_condition(folder),
            keep=lambda c: save_condition(folder, c),
            listener=progress,
            plan=plan,
            preview=open_preview(out, pipe.model.spec, decoder, job, progress),
        )
        save_latent(folder, video.latent)
        return video.make(out.target, overwrite=out.overwrite)

    return Rest(forecast, [] if latent is not None else [f"job {folder.name}: {summary(job, plan)}"], make)


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
