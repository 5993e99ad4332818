"""Latent -> frames, as they are made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowvram.job import Job
from lowvram.model import Group, Model
from lowvram.models import vae
from lowvram.stages.run import Run
from lowvram.stages.weights import Dense


def decode(run: Run, model: Model, job: Job, latent: Tensor) -> Iterator[NDArray[np.uint8]]:
    """Frames [1, H, W, 3] uint8 RGB in order, from a latent [C, F, H, W] float32 on the host.

    Values are clamped to -1..1 and truncated like upstream: floor(255 * (x + 1) / 2).
    """
    with run.stage("decode") as (stack, traffic):
        params = stack.enter_context(run.loaded("vae", Group(tuple(model.vae.values()), {}), traffic))
        z = latent.to(run.device.torch_device, run.plan.dtype)[None]
        frames = vae.decode(model.spec.vae, Dense(params, run.plan.dtype), z)
        while True:
            with torch.inference_mode():  # entered anew for every frame: it must not leak into who takes them
                frame = next(frames, None)
                if frame is None:
                    break
                pixels = to_pixels(frame)
            yield pixels
            run.listener.step(run.device.ledger.used)


def to_pixels(frame: Tensor) -> NDArray[np.uint8]:
    """[1, 3, T, H, W] about -1..1 -> [T, H, W, 3] uint8 on the host."""
    pixels = ((frame[0].float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
