"""Latent -> frames, as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowvram.job import Job
from lowvram.model import Model
from lowvram.models import vae, vae_clip
from lowvram.models.vae_clip import Piece
from lowvram.models.vae_tiles import Span, Tiling
from lowvram.planning.decode import decoder_group
from lowvram.stages.run import Run
from lowvram.stages.shelf import Shelf
from lowvram.stages.weights import Dense

Pixels = NDArray[np.uint8]


def to_pixels(frame: Tensor) -> Pixels:
    """[1, 3, T, H, W] about -1..1 -> [T, H, W, 3] uint8 on the host, truncated like upstream: 255 * (x + 1) / 2."""
    return vae.to_uint8(frame).cpu().numpy()


def to_floats(frame: Tensor) -> NDArray[np.float32]:
    """[1, 3, T, H, W] about -1..1 -> [T, H, W, 3] float32 on the host, clamped to -1..1."""
    return frame[0].float().clamp(-1, 1).permute(1, 2, 3, 0).contiguous().cpu().numpy()


def decode(run: Run, model: Model, job: Job, latent: Tensor) -> Iterator[Pixels]:
    """Frames [1, H, W, 3] uint8 RGB in order, from a latent [C, F, H, W] float32 on the host."""
    return _decode(run, model, job, latent, lambda frame: to_pixels(frame))


def decode_floats(run: Run, model: Model, job: Job, latent: Tensor) -> Iterator[NDArray[np.float32]]:
    """`decode`, but frames are float32 in -1..1: for a stage that goes on computing with them."""
    return _decode(run, model, job, latent, to_floats)


def _decode(
    run: Run, model: Model, job: Job, latent: Tensor, convert: Callable[[Tensor], NDArray[Any]]
) -> Iterator[NDArray[Any]]:
    spec, dtype = model.spec.vae, run.plan.dtype
    tiling = run.plan.stage("decode").tiling or Tiling()
    plane, tiles = (latent.shape[2], latent.shape[3]), tiling.rows * tiling.columns
    with run.stage("decode") as (stack, traffic):
        params = stack.enter_context(run.loaded("vae", decoder_group(model), traffic))
        memories = vae_clip.decoder(spec).memories(tiling, plane, spec.shapes())
        visits = -(-latent.shape[1] // tiling.visit)
        shelf = Shelf(run.device, memories, dtype, visits, kept=tiling.kept)
        stack.callback(shelf.close)
        pieces = vae_clip.decode(
            spec, Dense(params, dtype), latent[None], tiling, shelf, run.device.torch_device, dtype
        )
        unfinished: dict[int, tuple[NDArray[Any], int]] = {}
        for done, (number, rows, columns, pixels) in enumerate(_converted(pieces, convert), 1):
            if done % tiles == 0:
                run.listener.step(run.device.ledger.used)
            if tiles == 1:
                yield pixels
                continue
            if number not in unfinished:
                unfinished[number] = np.empty((1, job.height, job.width, 3), pixels.dtype), tiles
            frame, missing = unfinished.pop(number)
            frame[:, slice(*rows), slice(*columns)] = pixels
            if missing == 1:
                yield frame
            else:
                unfinished[number] = frame, missing - 1


def _converted(
    pieces: Iterator[Piece], convert: Callable[[Tensor], NDArray[Any]]
) -> Iterator[tuple[int, Span, Span, NDArray[Any]]]:
    while True:
        with torch.inference_mode():  # entered anew for every piece: it must not leak into who takes them
            piece = next(pieces, None)
            if piece is None:
                return
            number, rows, columns, frame = piece
            pixels = convert(frame)
            del piece, frame  # or they would live through the making of the next
        yield number, rows, columns, pixels
