"""Wan-Animate: a character driven by the poses and faces of a video, segment by segment (wan-models 5).

The transformer sees 36 channels: 16 of noise, 4 of mask, 16 of what is given. The first latent frame is the reference
picture's and is given whole. Behind it are the frames of the segment: in "animate" only those carried over from the
segment before, in "replace" the scene without the person, with a mask of where it was. A resumed job has the condition of
the segment under way, but reads the videos again for those after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from lowvram.conditions.clip import clip_tokens, image_bytes, plan_clip
from lowvram.conditions.contract import Condition, held, resting
from lowvram.conditions.faces import encode_faces, kv_shape, plan_faces
from lowvram.driving import Driving
from lowvram.job import Job
from lowvram.media.clip import Clip, ClipReader
from lowvram.media.picture import read_picture
from lowvram.media.resize import letterbox, to_tensor
from lowvram.model import Model
from lowvram.offload.budget import Budget
from lowvram.planning.encode import planned
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan
from lowvram.quant.spec import numel
from lowvram.sampling.guidance import needs_uncond
from lowvram.stages.encode import encode
from lowvram.stages.run import Run


class Sources:
    """The driving videos of a job, open for reading; a context manager."""

    def __init__(self, driving: Driving) -> None:
        self.driving = driving
        self._stack, self._readers = ExitStack(), dict[str, ClipReader]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def frames(self, clip: Clip, numbers: list[int]) -> Iterator[Tensor]:
        """Frames [3, H, W] float32 in -1..1 of these numbers."""
        for pixels in self._reader(clip).read(numbers):
            yield to_tensor(pixels)

    def mask(self, clip: Clip, numbers: list[int], stride: int) -> Tensor:
        """[n, h, w] float32: 1 where the person is, a pixel for each latent, the nearest."""
        pixels = self._reader(clip).read(numbers)[:, ::stride, ::stride, 0]
        return torch.tensor(pixels).float().div_(255)

    def _reader(self, clip: Clip) -> ClipReader:
        if clip.path not in self._readers:
            self._readers[clip.path] = self._stack.enter_context(ClipReader(clip, self.driving.carried))
        return self._readers[clip.path]


@dataclass(frozen=True, slots=True)
class Anew:
    """Frames that can be iterated over again, each time read anew: an encode that runs out of memory begins again."""

    read: Callable[[], Iterator[Tensor]]

    def __iter__(self) -> Iterator[Tensor]:
        return self.read()


@dataclass(frozen=True, slots=True)
class Animate:
    """One segment of a driven video. The first, if nothing is said of those before."""

    sources: Sources | None = None
    """None for a plan, which reads nothing."""
    segment: int = 0
    carried: Tensor | None = None
    """[n, 3, H, W] float32 in -1..1: the last frames of the segment before."""
    before: Condition = field(default_factory=Condition)
    """Of the segment before: what it says of the reference picture holds for this one too. See `of_picture`."""

    def plan(self, facts: Facts, budget: Budget) -> list[StagePlan]:
        made = held(self, facts)
        return [
            plan_clip(facts, 1, made | {"pictures": picture_ram(facts)}),
            plan_faces(facts, made),
            _plan_encode(facts, budget, made),
        ]

    def makes(self, facts: Facts) -> Mapping[str, int]:
        z, frames, *plane = facts.latent
        beside = facts.spec.dit.in_channels - z
        return {
            "channels": 4 * beside * numel((frames, *plane)),
            "pose": 4 * z * numel((frames - 1, *plane)),
            "faces": numel(kv_shape(facts.spec.dit, facts.passes, frames)) * facts.dtype.itemsize,
        } | image_bytes(facts)

    def run(self, run: Run, model: Model, job: Job) -> Condition:
        assert self.sources is not None
        driving, sources = self.sources.driving, self.sources
        numbers = driving.numbers(self.segment, job.frames)
        passes = 1 + any(needs_uncond(g) for g in job.schedule.guidance)
        image = self.before.image
        if image is None:
            image = clip_tokens(run, model, [_reference(job, driving)])
        faces = encode_faces(run, model, sources.frames(driving.face, numbers), job.frames, passes)
        plan = run.plan.stage("encode").encode
        assert plan is not None
        with run.stage("encode") as (_, traffic):
            if self.before.channels is None:
                still = replace(plan, shape=(1, *plan.shape[1:]))
                shown = encode(run, model, [_reference(job, driving)], still, traffic)
                shown = torch.cat([torch.ones(4, *shown.shape[1:]), shown])
            else:
                shown = self.before.channels
            pose = encode(run, model, Anew(lambda: sources.frames(driving.pose, numbers)), plan, traffic)
            given = encode(run, model, Anew(lambda: self._given(job, numbers)), plan, traffic)
        mask = packed_mask(self._mask(job, numbers, model.spec.vae.stride[1]))
        channels = torch.cat([shown, torch.cat([mask, given])], dim=1)
        return Condition(channels=channels, image=image, pose=pose, faces=faces)

    @staticmethod
    def of_picture(made: Condition) -> Condition:
        """What of a segment's condition the next one takes over, in memory of its own."""
        assert made.channels is not None
        return Condition(channels=made.channels[:, :1].clone(), image=made.image)

    def _given(self, job: Job, numbers: list[int]) -> Iterator[Tensor]:
        """The frames of the segment as far as they are known; grey where they are not."""
        assert self.sources is not None
        carried = () if self.carried is None else tuple(self.carried)
        background = self.sources.driving.background
        yield from carried
        if background is not None:
            yield from self.sources.frames(background, numbers[len(carried) :])
        else:
            grey = torch.zeros(3, job.height, job.width)
            yield from (grey for _ in numbers[len(carried) :])

    def _mask(self, job: Job, numbers: list[int], stride: int) -> Tensor:
        """[n, h, w]: 1 where a frame is given, 0 where it is to be made."""
        assert self.sources is not None
        given = torch.zeros(len(numbers), job.height // stride, job.width // stride)
        if self.sources.driving.mask is not None:
            given = 1 - self.sources.mask(self.sources.driving.mask, numbers, stride)
        if self.carried is not None:
            given[: len(self.carried)] = 1
        return given


def packed_mask(given: Tensor) -> Tensor:
    """[1 + 4k, h, w], a mask for every frame -> [4, 1 + k, h, w]: frame 0 four times, then four frames to a latent."""
    frames = torch.cat([given[:1].expand(3, -1, -1), given])
    return frames.view(-1, 4, *given.shape[1:]).transpose(0, 1).contiguous()


def _reference(job: Job, driving: Driving) -> Tensor:
    """The character's picture [3, H, W] in -1..1 as the network is shown it: whole, on black."""
    return letterbox(read_picture(driving.picture), job.width, job.height)


def picture_ram(facts: Facts) -> int:
    """Bytes of host memory while the reference picture is decoded, made float32 and laid onto the frame."""
    frame = facts.job.width * facts.job.height
    driving = facts.job.driving
    pixels = frame if driving is None else driving.picture.width * driving.picture.height
    return 18 * pixels + 24 * frame


def _plan_encode(facts: Facts, budget: Budget, made: Mapping[str, int]) -> StagePlan:
    """The stage "encode": the reference picture, the poses and what is given, one after the other. made: see `held`."""
    job = facts.job
    frames = job.frames * 3 * job.width * job.height
    device = resting(facts)
    host = facts.host({**facts.state, **made, "pictures": picture_ram(facts), "driving frames": frames})
    vram, ram = budget.vram - sum(device.values()), budget.ram - sum(host.values())
    plan = planned(facts, job.frames, vram, ram)
    latents = facts.spec.latent_shape(job.width, job.height, job.frames)[1]
    return StagePlan(
        "encode",
        1 + 2 * latents,
        device | dict(plan.claims),
        host | dict(plan.ram_claims),
        3 * plan.disk_read,
        2 * plan.h2d + plan.disk_read,
        2 * plan.seconds,
        {"encode": plan.choice},
        encode=plan,
    )
