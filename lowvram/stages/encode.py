"""Frames -> latent, as they come: what every stage that conditions on pictures or video calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from lowvram.errors import InternalError
from lowvram.model import Model, vae_group
from lowvram.models import vae_clip
from lowvram.models.vae import ENCODER
from lowvram.stages.run import Run, Traffic
from lowvram.stages.shelf import Shelf
from lowvram.stages.weights import Dense
from lowvram.tiling import EncodePlan


def encode(run: Run, model: Model, frames: Iterable[Tensor], plan: EncodePlan, traffic: Traffic) -> Tensor:
    """The latent [z, F, h, w] of a clip, float32 on the host, normalised as the transformer expects it.

    frames   each [3, H, W] in -1..1 of any float dtype, on the host, in order: as many and as large as
             `plan.shape` says. Asked for when their turn comes: one latent's frames at a time, or as many latents'
             as pass a tile at once (`plan.tiling.visit`).
    plan     of `lowvram.tiling.plan_encode`. The caller's stage must hold its claims, as `Run.stage` does for the
             claims that the stage's plan names alike; "vae weights" and "ring 0" are taken here.
    traffic  of the caller's stage

    The posterior mean, as upstream. Equal to the whole clip at once: no tile and no chunk shows. InternalError if the
    frames are not those of the plan.
    """
    spec, (count, height, width) = model.spec.vae, plan.shape
    _, rows, columns = spec.stride
    plane = height // rows, width // columns
    if count % vae_clip.FRAMES != 1 or height % rows or width % columns:
        raise _unexpected(
            f"{count} frames of {width}x{height}", f"1 + 4k frames of a multiple of {rows} pixels"
        )
    shape = model.spec.latent_shape(width, height, count)
    memories = vae_clip.encoder(spec).memories(plan.tiling, plane, spec.shapes())
    visits = -(-shape[1] // plan.tiling.visit)
    latent = torch.empty(shape)
    with ExitStack() as stack:
        params = stack.enter_context(run.loaded("vae", vae_group(model, ENCODER), traffic))
        shelf = Shelf(run.device, memories, plan.dtype, visits, kept=plan.tiling.kept)
        stack.callback(shelf.close)
        latents = vae_clip.encode(
            spec,
            Dense(params, plan.dtype),
            _checked(frames, plan.shape),
            plane,
            plan.tiling,
            shelf,
            run.device.torch_device,
            plan.dtype,
        )
        with torch.inference_mode():
            for n, made in enumerate(latents):
                latent[:, n] = made[0, :, 0]
                del made  # or it would live through the making of the next
                run.listener.step(run.device.ledger.used)
    return latent


def _checked(frames: Iterable[Tensor], shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """The frames, if they are what was planned."""
    count, size = 0, (3, *shape[1:])
    for frame in frames:
        if frame.shape != size or count == shape[0]:
            raise _unexpected(
                f"frame {count} of shape {list(frame.shape)}", f"{shape[0]} frames {list(size)}"
            )
        count += 1
        yield frame
    if count != shape[0]:
        raise _unexpected(f"{count} frames", f"{shape[0]}, as planned")


def _unexpected(found: str, expected: str) -> InternalError:
    return InternalError(found, where="encode", expected=expected, advice="report this")
