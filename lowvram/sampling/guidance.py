"""Classifier-free guidance: how the pass with the prompt and the pass without become one velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.errors import InternalError


def needs_uncond(scale: float) -> bool:
    """Whether a step needs the second pass. False at exactly 1, where the result is the first pass alone."""
    return scale != 1.0


def combine(cond: Tensor, uncond: Tensor | None, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond) in float32 (Ho and Salimans 2022, as in Wan2.2 `wan/text2video.py`).

    cond, uncond  velocities of one shape, any floating dtype; `uncond` may be None where `needs_uncond` is False
    Returns a float32 tensor of that shape. At scale 1 it is `cond` itself, so no rounding of the sum gets in.

    Raises InternalError when the second pass is missing or of another shape.
    """
    if not needs_uncond(scale):
        return cond.to(torch.float32)
    if uncond is None or uncond.shape != cond.shape:
        found = "none" if uncond is None else f"shape {tuple(uncond.shape)}"
        raise InternalError(
            f"guidance {scale:g} was asked for, the pass without the prompt is {found}",
            where="denoise",
            expected=f"shape {tuple(cond.shape)}",
            advice="please report this",
        )
    base = uncond.to(torch.float32)
    return base + scale * (cond.to(torch.float32) - base)
