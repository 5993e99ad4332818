"""Latent -> frames, as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowvram.codings import decodings
from lowvram.job import Job
from lowvram.model import Model
from lowvram.models import vae, vae_clip
from lowvram.models.vae_clip import FRAMES, Piece
from lowvram.models.vae_tiles import Span, Tiling
from lowvram.stages.outbox import Outbox, Sent
from lowvram.stages.run import Run
from lowvram.stages.tiles import Shelf, in_tiles, settled
from lowvram.stages.weights import Dense
from lowvram.triton_kernels.ops import ops_for

Pixels = NDArray[np.uint8]


def to_floats(frame: Tensor) -> Tensor:
    """[1, 3, T, H, W] about -1..1 -> [T, H, W, 3] float32, clamped to -1..1."""
    return frame[0].float().clamp(-1, 1).permute(1, 2, 3, 0).contiguous()


def decode(run: Run, model: Model, job: Job, latent: Tensor) -> Iterator[Pixels]:
    """Frames [1, H, W, 3] uint8 RGB in order, from a latent [C, F, H, W] float32 on the host.

    Memory that runs out in spite of the plan is met with smaller tiles, from the same frame on.
    """
    return _decode(run, model, job, latent, vae.to_uint8, 1)


def decode_floats(run: Run, model: Model, job: Job, latent: Tensor) -> Iterator[NDArray[np.float32]]:
    """`decode`, but frames are float32 in -1..1: for a stage that goes on computing with them."""
    return _decode(run, model, job, latent, to_floats, 4)


def _decode(
    run: Run, model: Model, job: Job, latent: Tensor, convert: Callable[[Tensor], Tensor], itemsize: int
) -> Iterator[NDArray[Any]]:
    spec, dtype, device = model.spec.vae, run.plan.dtype, run.device
    shape = (FRAMES * (latent.shape[1] - 1) + 1, job.height, job.width)
    ways = decodings(model, shape, dtype, device.footprint, itemsize)
    with run.stage("decode") as (stack, traffic):
        w = Dense(stack.enter_context(run.loaded("vae", ways.weights, traffic)), dtype)

        norm = ops_for(run.plan.machine.arch, run.plan.machine.unfused).rms_silu
        # not a matter of tiles: smaller ones would not help if there were no room for it
        outbox = stack.enter_context(Outbox(device, 3 * job.height * job.width * itemsize))

        def attempt(tiling: Tiling, first: int) -> Iterator[NDArray[Any]]:
            memories = vae_clip.decoder(spec).memories(tiling, ways.plane, spec.shapes())
            visits = -(-latent.shape[1] // tiling.visit)
            with Shelf(
                device, memories, dtype, visits, kept=tiling.kept, ahead=tiling.ahead, norm=norm
            ) as shelf:
                pieces = vae_clip.decode(spec, w, latent[None], tiling, shelf, device.torch_device, dtype)
                frames = _frames(_converted(pieces, convert, outbox, first), shape, tiling.count)
                for number, frame in enumerate(frames, first):
                    if number:
                        run.check_ram()
                    yield frame
                    del frame  # or it would live through the making of the next

        def tell(given: int, smaller: Tiling, why: str) -> None:
            run.tell(f"decode: {why} after {given} frames; it went on in {smaller.words}")

        for frame in in_tiles(device, ways, run.plan.stage("decode").tiling or Tiling(), attempt, tell):
            run.step("decode")
            yield frame


def _frames(
    pieces: Iterator[tuple[int, Span, Span, NDArray[Any]]], shape: tuple[int, int, int], tiles: int
) -> Iterator[NDArray[Any]]:
    """Whole frames of `shape` (frames, rows, columns), each of so many pieces."""
    unfinished: dict[int, tuple[NDArray[Any], int]] = {}
    for number, rows, columns, pixels in pieces:
        if tiles == 1:
            yield pixels
            continue
        if number not in unfinished:
            unfinished[number] = np.empty((1, *shape[1:], 3), pixels.dtype), tiles
        frame, missing = unfinished.pop(number)
        frame[:, slice(*rows), slice(*columns)] = pixels
        if missing == 1:
            yield frame
        else:
            unfinished[number] = frame, missing - 1


def _converted(
    pieces: Iterator[Piece], convert: Callable[[Tensor], Tensor], outbox: Outbox, first: int = 0
) -> Iterator[tuple[int, Span, Span, NDArray[Any]]]:
    """Number, rows, columns and pixels on the host of the pieces of frame `first` and those after it.

    Each is copied while the next is made.
    """
    under_way: list[tuple[int, Span, Span, Sent]] = []
    while True:
        with settled():  # entered anew for every piece: it must not leak into who takes them
            piece = next(pieces, None)
            if piece is not None:
                number, rows, columns, frame = piece
                if number >= first:
                    under_way.append((number, rows, columns, outbox.send(convert(frame))))
                del frame  # or it would live through the making of the next
        if under_way and (len(under_way) > 1 or piece is None):
            number, rows, columns, sent = under_way.pop(0)
            pixels = sent.arrived()
            del sent
            yield number, rows, columns, pixels
        if piece is None:
            return
        del piece
