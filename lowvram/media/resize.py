"""Decoded pictures -> what a network is shown."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lowvram.framing import Laid
from lowvram.media.picture import Pixels


def to_tensor(pixels: Pixels) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] float32 in -1..1."""
    return torch.tensor(pixels).permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_frame(pixels: Pixels, laid: Laid, width: int, height: int) -> Tensor:
    """[H, W, 3] uint8 -> [3, height, width] float32, about -1..1 (bicubic overshoots), laid as `laid` says."""
    rows, columns = slice(laid.top, laid.top + height), slice(laid.left, laid.left + width)
    if laid.filtered:
        from PIL import Image

        resized = Image.fromarray(pixels).resize((laid.width, laid.height), Image.Resampling.LANCZOS)
        return to_tensor(np.asarray(resized)[rows, columns])
    size = (laid.height, laid.width)
    whole = functional.interpolate(to_tensor(pixels)[None], size=size, mode="bicubic", align_corners=False)
    return whole[0, :, rows, columns].contiguous()


def letterbox(pixels: Pixels, width: int, height: int) -> Tensor:
    """[H, W, 3] uint8 -> [3, height, width] float32 in -1..1: whole, bilinear, black beside it.

    As upstream's `padding_resize`, which rounds to whole values.
    """
    h, w = pixels.shape[:2]
    tall = h / w > height / width
    size = (height, max(1, int(height / h * w))) if tall else (max(1, int(width / w * h)), width)
    values = torch.tensor(pixels).permute(2, 0, 1).float()
    inside = functional.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0].round_()
    frame = torch.zeros(3, height, width)
    top, left = (0, (width - size[1]) // 2) if tall else ((height - size[0]) // 2, 0)
    frame[:, top : top + size[0], left : left + size[1]] = inside
    return frame.div_(127.5).sub_(1)
