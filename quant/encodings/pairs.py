"""Bytes that hold two 4-bit codes, looked up in one table of 256 pairs: half the look-ups of code by code."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_table(levels: Tensor, *, high_first: bool) -> Tensor:
    """What 16 codes stand for [16] -> what each byte stands for [256, 2], the first weight first."""
    high, low = levels.repeat_interleave(16), levels.repeat(16)
    return torch.stack([high, low] if high_first else [low, high], 1)


def look_up(table: Tensor, packed: Tensor) -> Tensor:
    """uint8 [..., m] -> [..., 2m] in the dtype of `table` [256, 2], which is float32.

    A pair is looked up as one number of 64 bits: torch gathers numbers many times faster than rows of two.
    """
    pairs = table.contiguous().view(torch.int64).flatten()
    found = pairs.index_select(0, packed.flatten().to(torch.int32)).view(table.dtype)
    return found.view(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_pairs(codes: Tensor, *, high_first: bool) -> Tensor:
    """uint8 codes [..., 2m] -> bytes [..., m]."""
    first, second = codes[..., ::2], codes[..., 1::2]
    return first << 4 | second if high_first else second << 4 | first
