"""GGUF blocks -> numbers: one function per type, from uint8 [n, bytes of a block] to float32 [n, elements].

The layouts are those of checkpoint-formats 4.3. Arithmetic is in float32 in the order of gguf-py, to which the
results are equal bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the 16 codes of IQ4_NL and IQ4_XS stand for."""


def half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of every block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def fields(packed: Tensor, bits: int) -> Tensor:
    """Bytes [..., m] -> their fields of `bits` bits, lowest first: uint8 [..., 8/bits, m]."""
    shifted = [packed >> shift if shift else packed for shift in range(0, 8, bits)]
    return torch.stack(shifted, -2).bitwise_and_((1 << bits) - 1)


def times(scale: Tensor, q: Tensor) -> Tensor:
    """scale * q for whole numbers q of 8 bits, float32. A CPU is slow at widening numbers while it spreads others over
    them, so there they are widened first; a GPU does both in one pass over memory."""
    return scale * q if q.is_cuda else q.to(torch.float32).mul_(scale)


def _nibbles(blocks: Tensor, at: int) -> Tensor:
    """16 bytes from `at` -> [n, 32]: all low nibbles, then all high ones."""
    return fields(blocks[:, at : at + 16], 4).flatten(1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """A uint32 of 32 bits at `at` -> [n, 32], each bit worth 16: by what each byte spreads to, eight at once."""
    codes = torch.arange(256, dtype=torch.uint8, device=blocks.device).unsqueeze(1)
    spread = (codes >> torch.arange(8, dtype=torch.uint8, device=blocks.device)).bitwise_and_(1) << 4
    found = (
        spread.view(torch.int64).flatten().index_select(0, blocks[:, at : at + 4].flatten().to(torch.int32))
    )
    return found.view(torch.uint8).view(-1, 32)


def q4_0(blocks: Tensor) -> Tensor:
    return times(half(blocks, 0), _nibbles(blocks, 2).view(torch.int8).sub_(8))


def q4_1(blocks: Tensor) -> Tensor:
    return times(half(blocks, 0), _nibbles(blocks, 4)).add_(half(blocks, 2))


def q5_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks, 6).bitwise_or_(_fifth_bits(blocks, 2))
    return times(half(blocks, 0), q.view(torch.int8).sub_(16))


def q5_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks, 8).bitwise_or_(_fifth_bits(blocks, 4))
    return times(half(blocks, 0), q).add_(half(blocks, 2))


def q8_0(blocks: Tensor) -> Tensor:
    return times(half(blocks, 0), blocks[:, 2:].view(torch.int8))


def q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    q = fields(blocks[:, 16:80].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16)
    scale, low = half(blocks, 80) * (scales & 15), half(blocks, 82) * (scales >> 4)
    return times(scale.unsqueeze(2), q).sub_(low.unsqueeze(2)).flatten(1)


def q3_k(blocks: Tensor) -> Tensor:
    low, high = fields(blocks[:, 96:104], 4), fields(blocks[:, 104:108], 2)
    scale = half(blocks, 108) * ((low.flatten(1) | high.flatten(1) << 4).view(torch.int8) - 32)
    q = fields(blocks[:, 32:96].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16)
    # The mask bit stands for +4, counted from -4.
    q.bitwise_or_(fields(blocks[:, :32], 1).reshape(-1, 16, 16) << 2)
    return times(scale.unsqueeze(2), q.view(torch.int8).sub_(4)).flatten(1)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes from byte 4, times d and dmin: float32 [n, 8, 1]."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, (rest & 15) | (first >> 6 << 4)], 1)
    minima = torch.cat([second & 63, (rest >> 4) | (second >> 6 << 4)], 1)
    return (half(blocks, 0) * scales).unsqueeze(2), (half(blocks, 2) * minima).unsqueeze(2)


def q4_k(blocks: Tensor) -> Tensor:
    scale, low = _scales_and_minima(blocks)
    q = fields(blocks[:, 16:].unflatten(1, (4, 32)), 4).reshape(-1, 8, 32)
    return times(scale, q).sub_(low).flatten(1)


def q5_k(blocks: Tensor) -> Tensor:
    scale, low = _scales_and_minima(blocks)
    q = fields(blocks[:, 48:].unflatten(1, (4, 32)), 4).reshape(-1, 8, 32)
    q.bitwise_or_(fields(blocks[:, 16:48], 1) << 4)
    return times(scale, q).sub_(low).flatten(1)


def q6_k(blocks: Tensor) -> Tensor:
    scale = half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    q = fields(blocks[:, :128].unflatten(1, (2, 64)), 4).reshape(-1, 16, 16)
    q.bitwise_or_(fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16) << 4)
    return times(scale.unsqueeze(2), q.view(torch.int8).sub_(32)).flatten(1)


def _levels(codes: Tensor) -> Tensor:
    """Codes 0 to 15 of any shape -> IQ4_LEVELS, float32."""
    table = torch.tensor(IQ4_LEVELS, dtype=torch.float32).to(codes.device, non_blocking=True)
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def iq4_nl(blocks: Tensor) -> Tensor:
    return _levels(_nibbles(blocks, 2)).mul_(half(blocks, 0))


def iq4_xs(blocks: Tensor) -> Tensor:
    low = fields(blocks[:, 4:8], 4).transpose(1, 2).flatten(1)
    high = fields(blocks[:, 2:4], 2).transpose(1, 2).flatten(1)
    scale = half(blocks, 0) * ((low | high << 4).view(torch.int8) - 32)
    q = _levels(fields(blocks[:, 8:].unflatten(1, (8, 16)), 4).flatten(2))
    return q.mul_(scale.unsqueeze(2)).flatten(1)
