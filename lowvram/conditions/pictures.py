"""Image to video, and first and last frame: channels beside the noise say what is given (wan-models 8).

    I2V-A14B              36 channels: 16 of noise, 4 of mask, 16 of the given frames' latent; one or two pictures
    2.1 I2V-14B           the same, and CLIP tokens of the picture
    2.1 FLF2V-14B         the same, and CLIP tokens of both pictures

The given clip is the first picture, grey, and the last picture if there is one. Prompt and negative prompt, and both
experts, see the same channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.conditions.clip import clip_tokens, image_bytes, plan_clip
from lowvram.conditions.contract import Condition, held, resting
from lowvram.framing import Laid, lay
from lowvram.job import Job
from lowvram.media.picture import Picture, read_picture
from lowvram.media.resize import to_frame, to_tensor
from lowvram.model import Model
from lowvram.offload.budget import Budget
from lowvram.planning.encode import planned
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan
from lowvram.quant.spec import CLIP_TOKENS, ModelSpec, numel
from lowvram.stages.encode import encode
from lowvram.stages.run import Run


class PictureChannels:
    """What is given lies in channels of its own, with a mask."""

    def plan(self, facts: Facts, budget: Budget) -> list[StagePlan]:
        count, host = facts.spec.dit.image_tokens // CLIP_TOKENS, held(self, facts)
        looked = [plan_clip(facts, count, host | {"pictures": picture_ram(facts)})] if count else []
        return [*looked, plan_frames(facts, budget, facts.job.frames, host)]

    def makes(self, facts: Facts) -> Mapping[str, int]:
        spec = facts.spec.dit
        channels = {"channels": 4 * (spec.in_channels - facts.latent[0]) * numel(facts.latent[1:])}
        return channels | image_bytes(facts)

    def run(self, run: Run, model: Model, job: Job) -> Condition:
        image = None
        if model.spec.dit.image_tokens:
            image = clip_tokens(run, model, (to_tensor(read_picture(p)) for p in job.pictures))
        latent = encode_frames(run, model, job, job.frames)
        mask = given_mask(job.frames, last=job.last_image is not None)
        planes = mask[:, :, None, None].expand(-1, -1, *latent.shape[2:])
        return Condition(channels=torch.cat([planes, latent]), image=image)


def given_mask(frames: int, *, last: bool) -> Tensor:
    """[4, F] float32: 1 where a frame of the video is given, frame 0 four times, then four frames to a latent."""
    given = torch.zeros(frames)
    given[0] = 1
    given[-1] = max(float(given[-1]), float(last))
    return torch.cat([given[:1].expand(3), given]).view(-1, 4).T.contiguous()


# ---- what TI2V-5B does too


def plan_frames(facts: Facts, budget: Budget, frames: int, made: Mapping[str, int]) -> StagePlan:
    """The stage "encode": the VAE's encoder on the first `frames` frames of the given clip. made: see `held`."""
    device, host = resting(facts), facts.host({**facts.state, **made, "pictures": picture_ram(facts)})
    vram, ram = budget.vram - sum(device.values()), budget.ram - sum(host.values())
    plan = planned(facts, frames, vram, ram)
    return StagePlan(
        "encode",
        facts.spec.latent_shape(facts.job.width, facts.job.height, frames)[1],
        device | dict(plan.claims),
        host | dict(plan.ram_claims),
        plan.disk_read,
        plan.h2d,
        plan.seconds,
        {"encode": plan.choice},
        encode=plan,
    )


def encode_frames(run: Run, model: Model, job: Job, frames: int) -> Tensor:
    """The latent [z, F, h, w] float32 of the first `frames` frames of the given clip, on the host."""
    plan = run.plan.stage("encode").encode
    assert plan is not None
    with run.stage("encode") as (_, traffic):
        return encode(run, model, GivenClip(model.spec, job, frames), plan, traffic)


@dataclass(frozen=True, slots=True)
class GivenClip:
    """The first `frames` frames of what is given, iterated over as often as needed: memory may run out in an encode."""

    spec: ModelSpec
    job: Job
    frames: int

    def __iter__(self) -> Iterator[Tensor]:
        """Frames [3, H, W] float32 on the host: the first picture, grey, and the last picture if there is one."""
        spec, job = self.spec, self.job
        assert job.image is not None
        yield _frame(spec, job, job.image)
        grey = torch.zeros(3, job.height, job.width)
        for n in range(1, self.frames):
            yield grey if job.last_image is None or n < job.frames - 1 else _frame(spec, job, job.last_image)


def _frame(spec: ModelSpec, job: Job, picture: Picture) -> Tensor:
    return to_frame(read_picture(picture), _laid(spec, job, picture), job.width, job.height)


def _laid(spec: ModelSpec, job: Job, picture: Picture) -> Laid:
    return lay(spec, (picture.width, picture.height), (job.width, job.height))


def picture_ram(facts: Facts) -> int:
    """Bytes of host memory while a picture is decoded (twice 3 bytes a pixel), made float32 and laid onto the frame.

    A plan without pictures takes one of the frame's size.
    """
    job = facts.job
    frame = job.width * job.height
    needs = [30 * frame]
    for picture in job.pictures:
        laid = _laid(facts.spec, job, picture)
        needs.append(18 * picture.width * picture.height + 12 * laid.width * laid.height)
    return max(needs) + 12 * frame
