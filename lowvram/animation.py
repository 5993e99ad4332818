"""Wan-Animate as a library: a folder of driving videos becomes a video of any length.

pipe = Runtime(vram="16GB", ram="24GB").load("wan2.2-animate-14b")
pipe.animate("preprocessed", mode="replace").save("out.mp4")
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import __version__
from lowvram.drift import Colours, Gauge, drift_note
from lowvram.driving import Driving
from lowvram.errors import FileError
from lowvram.job import Job, describe
from lowvram.media.join import join
from lowvram.media.sound import check_sound
from lowvram.media.target import check_target, reserved
from lowvram.media.video import VideoWriter, check_size, read_frames, write_behind
from lowvram.model_files import with_loras
from lowvram.offload.io import user_path
from lowvram.planning.plan import Plan
from lowvram.preview import Preview
from lowvram.quant.spec import ModelSpec
from lowvram.report import Report, merged
from lowvram.stages import text
from lowvram.stages.run import Listener, Silent
from lowvram.stages.segments import Forgetful, Keeper, Stand, segments

if TYPE_CHECKING:
    from lowvram.api import Pipeline


@dataclass(frozen=True, slots=True)
class Animation:
    """A job on driving videos, planned and ready to run: `save` makes the video, of any length, and writes it."""

    pipeline: Pipeline
    job: Job
    plan: Plan
    listener: Listener = field(default_factory=Silent)
    clock: Callable[[], float] = time.monotonic
    preview: Preview | None = None
    """What is shown of every segment while it is made."""

    def __repr__(self) -> str:
        return f"Animation({self.job.summary})"

    def save(self, path: str | Path, *, overwrite: bool = False) -> Report:
        """Make the video and write it to an mp4, verified before it takes its name; what happened, stage by stage.

        Finished segments wait in a folder beside it, which is removed in the end.
        """
        target = user_path(path)
        check_target(target, overwrite)
        with (
            reserved(target),
            tempfile.TemporaryDirectory(
                prefix=f".{target.stem}.", dir=target.parent, ignore_cleanup_errors=True
            ) as folder,
        ):
            return self.make(target, Path(folder), Stand(), Forgetful(), overwrite=overwrite)

    def make(
        self, target: Path, parts: Path, stand: Stand, keeper: Keeper, *, overwrite: bool = False
    ) -> Report:
        """`save` for a caller that has reserved `target`, from `stand` on: finished segments are kept in the folder `parts`,
        those before `stand` are there."""
        job, driving = self.job, self.job.driving
        assert driving is not None
        check_target(target, overwrite)
        check_size(job.width, job.height)
        if driving.sound is not None:
            check_sound(Path(driving.sound))
        reports = self._segments(parts, stand, keeper)
        counts = [len(driving.shown(n, job.frames)) for n in range(driving.segments(job.frames))]
        join(
            [(part_path(parts, n), count) for n, count in enumerate(counts)],
            target,
            (job.width, job.height),
            Fraction(job.fps).limit_denominator(1001),
            {"comment": json.dumps(describe(job, __version__), ensure_ascii=False)},
            sound=None if driving.sound is None else Path(driving.sound),
            overwrite=overwrite,
        )
        return merged(reports)

    def _segments(self, parts: Path, stand: Stand, keeper: Keeper) -> Report:
        """Make the segments that are missing in `parts`."""
        pipe, job, driving = self.pipeline, self.job, self.job.driving
        assert driving is not None
        if stand.segment == driving.segments(job.frames):
            return Report(())
        model, colours = with_loras(pipe.model, job.loras), _seen(parts, stand.segment)
        with pipe.runtime.device() as device:
            run = pipe.runtime.begin(device, model, self.plan, self.listener, self.clock, self.preview)
            texts = [each.cpu() for each in text.features(run, model, job, pipe.runtime.texts)]
            for number, frames in segments(run, model, job, texts, stand, keeper):
                gauge = Gauge()
                with VideoWriter(
                    part_path(parts, number), job.width, job.height, job.fps, overwrite=True
                ) as writer:
                    write_behind(writer, (frame[None] for frame in gauge.watch(frames)))
                colours += [c for c in (gauge.colours(number),) if c is not None]
        pipe.runtime.end()
        drifted = drift_note(colours, matched=driving.match_colours)
        problem = "" if self.preview is None else self.preview.problem
        notes = (*run.notes, *(note for note in (problem, drifted) if note))
        return Report(tuple(run.reports), notes, tuple(run.samples), tuple(colours))


def _seen(parts: Path, begun: int) -> list[Colours]:
    """The colours of the first segment, if an earlier run has made it."""
    if begun == 0:
        return []
    gauge = Gauge()
    for _ in gauge.watch(read_frames(part_path(parts, 0))):
        pass
    first = gauge.colours(0)
    return [] if first is None else [first]


def part_path(folder: Path, segment: int) -> Path:
    """Where a finished segment is kept."""
    return folder / f"segment-{segment:05}.mp4"


def driven_settings(spec: ModelSpec, driving: Driving, settings: dict[str, Any]) -> dict[str, Any]:
    """What `make_job` is given for these videos: their size and rate. FileError for a size the model cannot make."""
    unit, pose = 2 * spec.vae.stride[1], driving.pose
    if pose.width % unit or pose.height % unit:
        raise FileError(
            f"frames of {pose.width}x{pose.height}",
            where=pose.path,
            expected=f"multiples of {unit} on both sides",
            advice="run the preprocessing with another --resolution_area",
        )
    rate = driving.rate
    fps = int(rate) if rate.denominator == 1 else float(rate)
    return {"fps": fps} | settings | {"driving": driving, "width": pose.width, "height": pose.height}
