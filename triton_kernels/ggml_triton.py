"""The kernel that decodes GGUF blocks: one function a type, from a block's bytes to float32 in the order of `ggml_unpack`.

A program holds BLOCKS blocks as [BLOCKS, groups, weights of a group]. The functions get pointers p [BLOCKS, 1, 1] to the
first byte of each block, g [1, groups, 1] and i [1, 1, weights of a group]: what belongs to a block or a group is then
loaded once for it, not once a weight. As in `dequant_triton`, no launch may fuse a product with a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import triton
import triton.language as tl
from torch import Tensor

GROUPS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "Q8_0": (1, 32), "Q4_0": (2, 16), "Q4_1": (2, 16), "Q5_0": (2, 16), "Q5_1": (2, 16), "IQ4_NL": (2, 16),
        "Q2_K": (16, 16), "Q3_K": (16, 16), "Q4_K": (8, 32), "Q5_K": (8, 32), "Q6_K": (16, 16), "IQ4_XS": (8, 32),
    }
)  # fmt: skip
"""Groups of a block, and weights of a group, as the functions below cut them."""
WEIGHTS = 2048
"""Weights a program."""
WARPS = 4


@triton.jit
def byte(p):
    return tl.load(p).to(tl.int32)


@triton.jit
def signed(p):
    return tl.load(p).to(tl.int8, bitcast=True).to(tl.int32)


@triton.jit
def half(p):
    """An fp16 number; blocks of 34 bytes do not let it lie at a multiple of anything."""
    bits = byte(p) | (byte(p + 1) << 8)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def nibble(p, g, i):
    """16 bytes: all low nibbles, then all high ones."""
    return (byte(p + i) >> (4 * g)) & 15


@triton.jit
def fifth(p, g, i):
    """32 bits in 4 bytes, each worth 16."""
    return ((byte(p + 2 * g + i // 8) >> (i % 8)) & 1) << 4


@triton.jit
def level(code):
    """What codes 0 to 15 of IQ4 stand for: `ggml_unpack.IQ4_LEVELS`, a byte each, the first one lowest."""
    packed = tl.where(code < 8, -654466911485192063, 8167635493787864321)
    return (packed >> ((code & 7) * 8).to(tl.int64)).to(tl.int8).to(tl.float32)


@triton.jit
def q4_0(p, g, i):
    return half(p) * (nibble(p + 2, g, i) - 8).to(tl.float32)


@triton.jit
def q4_1(p, g, i):
    return half(p) * nibble(p + 4, g, i).to(tl.float32) + half(p + 2)


@triton.jit
def q5_0(p, g, i):
    q = nibble(p + 6, g, i) | fifth(p + 2, g, i)
    return half(p) * (q - 16).to(tl.float32)


@triton.jit
def q5_1(p, g, i):
    q = nibble(p + 8, g, i) | fifth(p + 4, g, i)
    return half(p) * q.to(tl.float32) + half(p + 2)


@triton.jit
def q8_0(p, g, i):
    return half(p) * signed(p + 2 + i + g).to(tl.float32)


@triton.jit
def iq4_nl(p, g, i):
    return level(nibble(p + 2, g, i)) * half(p)


@triton.jit
def pair(p, g, i):
    """Q2_K and Q3_K: 2 bits of each weight in 64 bytes, 128 weights in 32 of them."""
    return (byte(p + g // 8 * 32 + g % 2 * 16 + i) >> (g % 8 // 2 * 2)) & 3


@triton.jit
def q2_k(p, g, i):
    scales = byte(p + g)
    scale = half(p + 80) * (scales & 15).to(tl.float32)
    low = half(p + 82) * (scales >> 4).to(tl.float32)
    return scale * pair(p + 16, g, i).to(tl.float32) - low


@triton.jit
def q3_k(p, g, i):
    low = (byte(p + 96 + g % 8) >> (g // 8 * 4)) & 15
    high = (byte(p + 104 + g % 4) >> (g // 4 * 2)) & 3
    scale = half(p + 108) * ((low | (high << 4)) - 32).to(tl.float32)
    third = (byte(p + g % 2 * 16 + i) >> (g // 2)) & 1
    return scale * ((pair(p + 32, g, i) | (third << 2)) - 4).to(tl.float32)


@triton.jit
def scale_of(p, g):
    """Q4_K and Q5_K: of 8 scales and 8 minima of 6 bits in 12 bytes, the scales, times d."""
    first, rest = byte(p + 4 + g % 4), byte(p + 12 + g % 4)
    return half(p) * tl.where(g < 4, first & 63, (rest & 15) | (first >> 6 << 4)).to(tl.float32)


@triton.jit
def minimum_of(p, g):
    """As `scale_of`, the minima, times dmin."""
    second, rest = byte(p + 8 + g % 4), byte(p + 12 + g % 4)
    return half(p + 2) * tl.where(g < 4, second & 63, (rest >> 4) | (second >> 6 << 4)).to(tl.float32)


@triton.jit
def q4_k(p, g, i):
    q = (byte(p + 16 + g // 2 * 32 + i) >> (g % 2 * 4)) & 15
    return scale_of(p, g) * q.to(tl.float32) - minimum_of(p, g)


@triton.jit
def q5_k(p, g, i):
    q = (byte(p + 48 + g // 2 * 32 + i) >> (g % 2 * 4)) & 15
    q = q | (((byte(p + 16 + i) >> g) & 1) << 4)
    return scale_of(p, g) * q.to(tl.float32) - minimum_of(p, g)


@triton.jit
def q6_k(p, g, i):
    low = (byte(p + g // 8 * 64 + g % 4 * 16 + i) >> (g % 8 // 4 * 4)) & 15
    high = (byte(p + 128 + g // 8 * 32 + g % 2 * 16 + i) >> (g % 8 // 2 * 2)) & 3
    scale = half(p + 208) * signed(p + 192 + g).to(tl.float32)
    return scale * ((low | (high << 4)) - 32).to(tl.float32)


@triton.jit
def iq4_xs(p, g, i):
    low = (byte(p + 4 + g // 2) >> (g % 2 * 4)) & 15
    high = (byte(p + 2 + g // 4) >> (g % 4 * 2)) & 3
    scale = half(p) * ((low | (high << 4)) - 32).to(tl.float32)
    code = (byte(p + 8 + g * 16 + i % 16) >> (i // 16 * 4)) & 15
    return level(code) * scale


UNPACK = MappingProxyType(
    {
        "Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "IQ4_NL": iq4_nl,
        "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_XS": iq4_xs,
    }
)  # fmt: skip


@triton.jit
def blocks_kernel(
    weight, out, count, UNPACK: tl.constexpr, NBYTES: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None, None]
    g, i = tl.arange(0, GROUPS)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    # Past the end the last block is read again: its numbers are not stored.
    value = UNPACK(weight + tl.minimum(b, count - 1).to(tl.int64) * NBYTES, g, i)
    to = b.to(tl.int64) * (GROUPS * WIDTH) + g * WIDTH + i
    tl.store(out + to, value.to(out.dtype.element_ty), mask=b < count)


def blocks(out: Tensor, weight: Tensor, kind: str) -> None:
    """Launch with tensors as `dequant.blocks_` describes them."""
    (count, nbytes), (groups, width) = weight.shape, GROUPS[kind]
    at_once = WEIGHTS // (groups * width)
    blocks_kernel[(triton.cdiv(count, at_once),)](
        weight, out, count, UNPACK=UNPACK[kind], NBYTES=nbytes, GROUPS=groups, WIDTH=width, BLOCKS=at_once,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
