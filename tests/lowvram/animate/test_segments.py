"""A driven video is made of segments: as long as what drives it, planned once, in the colours of the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from videos import frames_of

from lowvram import drift
from lowvram.animation import Animation
from lowvram.api import Pipeline
from lowvram.cli.driven import FolderKeeper, forecast
from lowvram.conditions.contract import Condition
from lowvram.driving import open_folder
from lowvram.media.probe import probe
from lowvram.planning.plan import Plan
from lowvram.sampling.solvers import SolverState
from lowvram.stages.denoise import State
from lowvram.stages.segments import Forgetful, Stand, colour_change
from lowvram.state import JobFolder


class Heard:
    """What is told of the progress: (stage, steps) in order, and notes."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.notes: list[str] = []

    def begin(self, stage: str, done: int = 0) -> None:
        self.stages.append((stage, 0))

    def step(self, vram: int | None = None) -> None:
        name, steps = self.stages[-1]
        self.stages[-1] = (name, steps + 1)

    def end(self) -> None:
        return

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_a_video_of_three_segments_is_as_long_as_its_driving_video(
    pipe: Pipeline,
    plan: Plan,
    drive: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drift, "NOTABLE", 0.0)
    output = tmp_path / "out.mp4"
    job = pipe.driven_job(open_folder(drive(20), mode), **settings)
    heard = Heard()
    report = Animation(pipe, job, plan, heard).save(output)
    found = probe(output)
    assert (found.width, found.height, found.frames, found.fps) == (32, 32, 20, 30)
    names = [stage.name for stage in report.stages]
    assert names == ["text", "clip", "faces", "encode", "prepare", "denoise", "decode"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4"]
    cached = {"text"}  # its steps are those of a prompt that is encoded
    assert [s for s in heard.stages if s[0] not in cached] == [
        (f.name, f.steps) for f in forecast(plan, Stand(), 3) if f.name not in cached
    ]
    assert [n for n in heard.notes if n.startswith("segment")] == [f"segment {n} of 3" for n in (1, 2, 3)]
    # the last segments show frames 9 to 16 and 17 to 19; the codec clips what noise is out of range
    assert [c.segment for c in report.colours] == [0, 1, 2]
    for colours, part in zip(report.colours, np.split(frames_of(output), [9, 17]), strict=True):
        assert colours.mean == pytest.approx(part.mean((0, 1, 2)), abs=3)
    assert report.notes[-1].startswith("colours: segment ")


def test_what_is_made_already_is_not_forecast_again(plan: Plan) -> None:
    state = State(torch.zeros(1), SolverState(step=1))
    left = forecast(plan, Stand(1, None, Condition(), state), 3)
    assert [f.name for f in left] == [
        *("text", "prepare", "denoise", "decode"),
        *("faces", "encode", "prepare", "denoise", "decode"),
    ]
    assert [(f.steps - f.done) for f in left if f.name == "denoise"] == [
        plan.stage("denoise").steps - 1,
        plan.stage("denoise").steps,
    ]
    begun = forecast(plan, Stand(1), 3)
    assert [f.name for f in begun].count("clip") == 1 and begun[0].name == "text"


def test_the_plan_is_that_of_a_segment_for_any_length(
    pipe: Pipeline, plan: Plan, drive: Callable[..., Path], settings: dict[str, Any]
) -> None:
    longer = pipe.animate(drive(49), **settings).plan
    assert [(s.claims, s.ram_claims) for s in longer.stages] == [
        (s.claims, s.ram_claims) for s in plan.stages
    ]


class Weighing(Forgetful):
    """Keeps a job in its folder, and weighs that each time: bytes, without finished segments."""

    def __init__(self, folder: JobFolder) -> None:
        self.keeper, self.path = FolderKeeper(folder), folder.path
        self.weights: list[dict[int, int]] = []

    def weigh(self, segment: int) -> None:
        left = [p.stat().st_size for p in self.path.iterdir() if not p.name.startswith("segment-")]
        self.weights.append({segment: sum(left)})

    def condition(self, segment: int, made: Condition) -> None:
        self.keeper.condition(segment, made)
        self.weigh(segment)

    def state(self, segment: int, state: State) -> None:
        self.keeper.state(segment, state)
        self.weigh(segment)

    def begin(self, segment: int, carried: torch.Tensor) -> None:
        self.keeper.begin(segment, carried)
        self.weigh(segment)


@pytest.mark.parametrize(("solver", "carried"), [("unipc", 1), ("euler", 5)])
def test_what_lies_on_disk_is_planned_and_does_not_grow_with_the_segments(
    solver: str,
    carried: int,
    pipe: Pipeline,
    drive: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    animation = pipe.animate(drive(20), carried=carried, **settings | {"solver": solver, "steps": 3})
    longer = pipe.animate(drive(49), carried=carried, **settings | {"solver": solver, "steps": 3})
    assert animation.plan.saved == longer.plan.saved
    weighing = Weighing(JobFolder(tmp_path))
    animation.make(tmp_path / "out.mp4", tmp_path, Stand(), weighing)
    weights = {n: max(w[n] for w in weighing.weights if n in w) for n in (1, 2)}
    assert weights[1] == weights[2]
    planned = sum(animation.plan.saved.values())
    assert max(weights.values()) <= planned <= 2.1 * max(weights.values())
    # the segments are the video once more: how much of it is told by its content
    parts = sum(p.stat().st_size for p in tmp_path.glob("segment-*"))
    assert parts <= 1.5 * (tmp_path / "out.mp4").stat().st_size


def test_matched_colours_undo_a_drift_that_the_carried_frames_show() -> None:
    generator = np.random.default_rng(0)
    wanted = generator.uniform(-0.5, 0.5, (5, 16, 16, 3)).astype(np.float32)
    drifted = (wanted * np.float32([0.95, 1.04, 1.0]) + np.float32([0.05, -0.03, 0.0])).astype(np.float32)
    gain, offset = colour_change(drifted, wanted)
    assert np.abs(drifted * gain + offset - wanted).max() < 2e-3
    assert np.abs(drifted - wanted).max() > 0.05
    # what cannot be drift is not undone: a black frame is not made bright
    gain, offset = colour_change(np.full_like(wanted, -1), wanted)
    assert np.abs(-gain + offset + 1).max() <= 0.11
