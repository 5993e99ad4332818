"""Latent -> frames, as they are made."""

from __future__ import annotations

from collections.abc import Iterator

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


def decode(run: Run, model: Model, job: Job, latent: Tensor) -> Iterator[Pixels]:
    """Frames [1, H, W, 3] uint8 RGB in order, from a latent [C, F, H, W] float32 on the host.

    Values are clamped to -1..1 and truncated like upstream: floor(255 * (x + 1) / 2).
    """
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
        unfinished: dict[int, tuple[Pixels, int]] = {}
        for done, (number, rows, columns, pixels) in enumerate(_as_bytes(pieces), 1):
            if done % tiles == 0:
                run.listener.step(run.device.ledger.used)
            if tiles == 1:
                yield pixels
                continue
            if number not in unfinished:
                unfinished[number] = np.empty((1, job.height, job.width, 3), np.uint8), tiles
            frame, missing = unfinished.pop(number)
            frame[:, slice(*rows), slice(*columns)] = pixels
            if missing == 1:
                yield frame
            else:
                unfinished[number] = frame, missing - 1


def _as_bytes(pieces: Iterator[Piece]) -> Iterator[tuple[int, Span, Span, Pixels]]:
    while True:
        with torch.inference_mode():  # entered anew for every piece: it must not leak into who takes them
            piece = next(pieces, None)
            if piece is None:
                return
            number, rows, columns, frame = piece
            pixels = to_pixels(frame)
            del piece, frame  # or they would live through the making of the next
        yield number, rows, columns, pixels


def to_pixels(frame: Tensor) -> Pixels:
    """[1, 3, T, H, W] about -1..1 -> [T, H, W, 3] uint8 on the host."""
    return vae.to_uint8(frame).cpu().numpy()
