"""Running an Animate job from the command line: what is finished of it stays, segment by segment and step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowvram.animation import Animation
from lowvram.api import Pipeline
from lowvram.cli.carry import Output, Rest, summary
from lowvram.cli.preview import open_preview, preview_decoder
from lowvram.cli.progress import Forecast, Progress
from lowvram.cli.tensors import damaged, load_tensors, save_tensors
from lowvram.conditions.contract import Condition
from lowvram.job import Job
from lowvram.planning.plan import Plan
from lowvram.report import Report
from lowvram.sampling.solvers import SolverState
from lowvram.stages.denoise import State
from lowvram.stages.segments import Stand
from lowvram.state import SEGMENT, JobFolder


def rest_of_driven(folder: JobFolder, pipe: Pipeline, job: Job, plan: Plan, out: Output) -> Rest:
    """The segments that are not finished; of the one under way, the steps that are not saved."""
    driving = job.driving
    assert driving is not None
    stand = load_stand(folder)
    total, decoder = driving.segments(job.frames), preview_decoder(out, pipe.model.spec, job)

    def make(progress: Progress) -> Report:
        preview = open_preview(out, pipe.model.spec, decoder, job, progress)
        animation = Animation(pipe, job, plan, progress, preview=preview)
        return animation.make(out.target, folder.path, stand, FolderKeeper(folder), overwrite=out.overwrite)

    about = [
        f"job {folder.name}: {summary(job, plan)}",
        f"{driving.frames} frames in {total} segments, {total - stand.segment} to go",
    ]
    return Rest(forecast(plan, stand, total), about, make)


_OF_PICTURE, _OF_VIDEOS = "clip", ("faces", "encode")
"""Stages that make a segment's condition: what the reference picture says is made once."""


def forecast(plan: Plan, stand: Stand, total: int) -> list[Forecast]:
    """Every stage of every segment that is left; the text once, and nothing that is made already."""
    stages = []
    for segment in range(stand.segment, total):
        first = segment == stand.segment
        made = stand.made is not None and first
        done = stand.state.step if first and stand.state is not None else 0
        for s in plan.stages:
            steps = s.steps
            before = done if s.name == "denoise" else 0
            if s.name == "text" and not first:
                continue
            if s.name == _OF_PICTURE and (made or not first):
                continue
            if s.name in _OF_VIDEOS and made:
                continue
            if s.name == "encode":
                steps -= not first  # the picture is encoded beside the first segment's videos
            stages.append(Forecast(s.name, steps, s.seconds, before))
    return stages


@dataclass(frozen=True, slots=True)
class FolderKeeper:
    """Keeps what a resumed job needs in the job's folder; every file names its segment."""

    folder: JobFolder

    def condition(self, segment: int, made: Condition) -> None:
        _keep(self.folder.condition_path, segment, made.to_tensors())

    def state(self, segment: int, state: State) -> None:
        solver = {f"solver.{name}": tensor for name, tensor in state.solver.to_tensors().items()}
        _keep(self.folder.state_path, segment, solver | {"x": state.x})

    def begin(self, segment: int, carried: Tensor) -> None:
        _keep(self.folder.carried_path, segment, {"carried": carried})


def load_stand(folder: JobFolder) -> Stand:
    """Where the job was: the last segment begun, and of its condition and state what is there."""
    begun = load_tensors(folder.carried_path)
    segment, carried = 0, None
    if begun is not None:
        segment, carried = _number(begun, folder.carried_path), begun.get("carried")
        if carried is None:
            raise damaged(folder.carried_path)
    made = _of(segment, folder.condition_path)
    tensors = _of(segment, folder.state_path)
    state = None
    if tensors is not None:
        x = tensors.pop("x", None)
        if x is None:
            raise damaged(folder.state_path)
        solver = {name.removeprefix("solver."): tensor for name, tensor in tensors.items()}
        state = State(x, SolverState.from_tensors(solver))
    return Stand(segment, carried, None if made is None else Condition.from_tensors(made), state)


def _keep(path: Path, segment: int, tensors: Mapping[str, Tensor]) -> None:
    save_tensors(path, {**tensors, SEGMENT: torch.tensor(segment)})


def _of(segment: int, path: Path) -> dict[str, Tensor] | None:
    """The tensors at `path`, if they are of this segment: those of the one before are of no use."""
    tensors = load_tensors(path)
    if tensors is None or _number(tensors, path) != segment:
        return None
    return tensors


def _number(tensors: dict[str, Tensor], path: Path) -> int:
    number = tensors.pop(SEGMENT, None)
    if number is None or number.numel() != 1:
        raise damaged(path)
    return int(number)
