"""Frames -> latent, as they come: what every stage that conditions on pictures or video calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from lowvram.codings import encodings
from lowvram.errors import InternalError
from lowvram.model import Model
from lowvram.models import vae_clip
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.device import exhausted
from lowvram.planning.encode import EncodePlan
from lowvram.stages.run import Run, Traffic
from lowvram.stages.tiles import Shelf, in_tiles, settled
from lowvram.stages.weights import Dense
from lowvram.triton_kernels.ops import ops_for


def encode(run: Run, model: Model, frames: Iterable[Tensor], plan: EncodePlan, traffic: Traffic) -> Tensor:
    """The latent [z, F, h, w] of a clip, float32 on the host, normalised as the transformer expects it.

    frames   each [3, H, W] in -1..1 of any float dtype, on the host, in order: as many and as large as
             `plan.shape` says. Asked for when their turn comes: one latent's frames at a time, or as many latents'
             as pass a tile at once (`plan.tiling.visit`). If they can be iterated over again (a list, not an
             iterator), memory that runs out in spite of the plan is met with smaller tiles.
    plan     of `lowvram.planning.encode.plan_encode`. The caller's stage must hold its claims, as `Run.stage` does for the
             claims that the stage's plan names alike; "vae weights" and "ring 0" are taken here.
    traffic  of the caller's stage

    The posterior mean, as upstream. Equal to the whole clip at once: no tile and no chunk shows. InternalError if the
    frames are not those of the plan.
    """
    spec, device, dtype, (count, height, width) = model.spec.vae, run.device, plan.dtype, plan.shape
    _, rows, columns = spec.stride
    if count % vae_clip.FRAMES != 1 or height % rows or width % columns:
        raise _unexpected(
            f"{count} frames of {width}x{height}", f"1 + 4k frames of a multiple of {rows} pixels"
        )
    ways = encodings(model, plan.shape, dtype, device.footprint)
    latent = torch.empty(ways.latent)
    with run.loaded("vae", ways.weights, traffic) as params:
        w = Dense(params, dtype)

        norm = ops_for(run.plan.machine.arch, run.plan.machine.unfused).rms_silu

        def attempt(tiling: Tiling, first: int) -> Iterator[Tensor]:
            if tiling != plan.tiling and iter(frames) is frames:  # asked for already
                raise exhausted(device.ledger.what, "the autoencoder", ways.exactly(tiling).vram)
            memories = vae_clip.encoder(spec).memories(tiling, ways.plane, spec.shapes())
            visits = -(-latent.shape[1] // tiling.visit)
            with (
                Shelf(
                    device, memories, dtype, visits, kept=tiling.kept, ahead=tiling.ahead, norm=norm
                ) as shelf,
                settled(),
            ):
                clip = _checked(frames, plan.shape)
                latents = vae_clip.encode(
                    spec, w, clip, ways.plane, tiling, shelf, device.torch_device, dtype
                )
                for n, z in enumerate(islice(latents, first, None), first):
                    if n:
                        run.check_ram()
                    yield z.to("cpu")
                    del z

        def tell(given: int, smaller: Tiling, why: str) -> None:
            run.tell(f"encode: {why} after {given} latents; it went on in {smaller.words}")

        for n, z in enumerate(in_tiles(device, ways, plan.tiling, attempt, tell)):
            latent[:, n] = z[0, :, 0]
            del z  # or it would live through the making of the next
            run.step("encode")
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
