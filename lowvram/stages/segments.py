"""A driven video, segment by segment: each is conditioned, denoised and decoded before the next is begun.

Memory does not grow with their number: of a finished segment only its last frames stay, and what the next one would
have to compute again of the reference picture.

Inside a segment work and reads overlap: blocks are read and copied ahead of their use, a frame goes to the host while the
next is made, and is encoded and written by a thread of its own. Nothing of the next segment is begun before a segment is
decoded. Its conditions are work for the same device, which is busy; and its first reads, the only ones that no work hides,
are less than a hundredth of a segment (planned at 720p with a disk of 3 GB/s, of 4 steps as of 20).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowvram.conditions.animate import Animate, Sources
from lowvram.conditions.contract import Condition
from lowvram.job import Job
from lowvram.model import Model
from lowvram.stages.decode import decode_floats
from lowvram.stages.denoise import State
from lowvram.stages.run import Run
from lowvram.stages.steadfast import denoise_steadfastly, for_segment

Frame = NDArray[np.uint8]
"""[H, W, 3] RGB."""
Floats = NDArray[np.float32]
"""[n, H, W, 3] RGB in -1..1."""


@dataclass(frozen=True, slots=True)
class Stand:
    """How far a driven video is, between two steps: all that a resumed job needs besides the job itself."""

    segment: int = 0
    """The one under way."""
    carried: Tensor | None = None
    """[n, 3, H, W] float32 in -1..1: the last frames of the segment before."""
    made: Condition | None = None
    """Of the segment under way, if that is made."""
    state: State | None = None
    """Of its denoise, if that is begun."""


class Keeper(Protocol):
    """Saves what a resumed job needs, as soon as it exists."""

    def condition(self, segment: int, made: Condition) -> None:
        """What drives the segment."""

    def state(self, segment: int, state: State) -> None:
        """A step of the segment is done."""

    def begin(self, segment: int, carried: Tensor) -> None:
        """All segments before this one are written; it goes on from `carried`."""


class Forgetful:
    """A keeper that saves nothing: for jobs that are not resumed."""

    def condition(self, segment: int, made: Condition) -> None:
        return

    def state(self, segment: int, state: State) -> None:
        return

    def begin(self, segment: int, carried: Tensor) -> None:
        return


def segments(
    run: Run, model: Model, job: Job, texts: list[Tensor], stand: Stand, keeper: Keeper
) -> Iterator[tuple[int, Iterator[Frame]]]:
    """(number, frames) of every segment from `stand` on: the frames that are new in the result, as they are decoded.

    All frames of a segment must be taken, and be safe, before the next segment is asked for. texts: on the host.
    """
    driving = job.driving
    assert driving is not None
    before = Condition()
    noises = islice(_noises(job, model), stand.segment, None)
    with Sources(driving) as sources:
        for number in range(stand.segment, driving.segments(job.frames)):
            noise, part = next(noises), _part(job, number)
            now = for_segment(run, model, part, number)
            run.listener.note(f"segment {number + 1} of {driving.segments(job.frames)}")
            made = stand.made
            if made is None:
                made = Animate(sources, number, stand.carried, before).run(now, model, part)
                keeper.condition(number, made)
            on_device = [text.to(run.device.torch_device) for text in texts]
            latent = denoise_steadfastly(
                now,
                model,
                part,
                on_device,
                made,
                stand.state or State(noise),
                lambda state, number=number: keeper.state(number, state),  # type: ignore[misc]
            )
            del on_device
            last: deque[Floats] = deque(maxlen=driving.carried)
            # the first latent frame is the reference picture's: it was denoised beside the video and is no part of it
            yield number, _shown(now, model, part, latent[:, 1:], number, stand.carried, last)
            carried = torch.from_numpy(np.concatenate(list(last))).permute(0, 3, 1, 2).contiguous()
            keeper.begin(number + 1, carried)
            before, stand = Animate.of_picture(made), Stand(number + 1, carried)
            del made, latent  # or they would live while the next ones are made


def _noises(job: Job, model: Model) -> Iterator[Tensor]:
    """The noise of every segment: drawn by one generator, so each depends on how many came before it."""
    shape = model.spec.denoised_shape(job.width, job.height, job.frames)
    generator = torch.Generator().manual_seed(job.seed)
    while True:
        yield torch.randn(shape, generator=generator) * job.schedule.noise_scale


def _part(job: Job, number: int) -> Job:
    """The job of one segment: a solver that adds noise adds another in each."""
    return replace(job, seed=(job.seed + number * 0xD1B54A32D192ED03) % 2**63)


def _shown(
    run: Run,
    model: Model,
    job: Job,
    latent: Tensor,
    number: int,
    carried: Tensor | None,
    last: deque[Floats],
) -> Iterator[Frame]:
    """The new frames of a segment; `last` holds the last ones of the whole segment in the end."""
    driving = job.driving
    assert driving is not None
    shown = driving.shown(number, job.frames)
    again: list[Floats] = []
    gain, offset = np.ones(3, np.float32), np.zeros(3, np.float32)
    matched = driving.match_colours and carried is not None
    for n, frame in enumerate(decode_floats(run, model, job, latent)):
        if matched and n < driving.carried:
            again.append(frame)
            if n == driving.carried - 1 and carried is not None:
                gain, offset = colour_change(np.concatenate(again), carried.permute(0, 2, 3, 1).numpy())
        if matched and n >= driving.carried:
            frame = np.clip(frame * gain + offset, -1, 1)
        last.append(frame)
        if n in shown:
            yield to_bytes(frame[0])


def colour_change(frames: Floats, wanted: Floats) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(gain, offset) by channel that give `frames` the mean and the spread of `wanted`: both show the same moments.

    The carried frames come out of a segment once more, through one more pass of autoencoder and transformer: what
    that did to their colours it did to the whole segment (Reinhard et al. 2001, in RGB). At most a tenth is changed.
    """
    mean, spread = frames.mean((0, 1, 2)), frames.std((0, 1, 2))
    gain = np.clip((wanted.std((0, 1, 2)) + 1e-3) / (spread + 1e-3), 0.9, 1.1)
    offset = np.clip(wanted.mean((0, 1, 2)) - mean, -0.1, 0.1) + mean - gain * mean
    return gain.astype(np.float32), offset.astype(np.float32)


def to_bytes(frame: NDArray[np.float32]) -> Frame:
    """-1..1 -> uint8, truncated: what `lowvram.models.vae.to_uint8` does on a device."""
    pixels: Frame = ((frame + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    return pixels
