"""The kernel of `vae_norm`: a few pixels a program, all of their channels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowvram.triton_kernels.vae_norm import LEAST

ELEMENTS = 2048
"""Of one program."""
WARPS = 4


@triton.jit
def rms_silu_kernel(
    x, gamma, out, root, pixels, width, channels, x_channel, x_row, x_column, out_row, out_column,
    LEAST: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK is the least power of two that holds the channels; root is the square root of their number."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    row, column = (pixel // width).to(tl.int64), (pixel % width).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
    given = row * x_row + column * x_column
    y = tl.load(x + given[:, None] + (c.to(tl.int64) * x_channel)[None, :], mask=inside, other=0).to(
        tl.float32
    )
    norm = tl.maximum(tl.sqrt_rn(tl.sum(y * y, 1)), LEAST)
    by = tl.load(gamma + c, mask=c < channels, other=0).to(tl.float32)
    y = y * (root / norm)[:, None] * by[None, :]
    y = y * tl.sigmoid(y)
    place = row * out_row + column * out_column
    tl.store(out + place[:, None] + c[None, :], y.to(out.dtype.element_ty), mask=inside)


def rms_silu(out: Tensor, x: Tensor, gamma: Tensor) -> None:
    """Launch with tensors as `vae_norm.rms_silu_` describes them."""
    channels, height, width = x.shape
    block = triton.next_power_of_2(channels)
    pixels = max(1, ELEMENTS // block)
    rms_silu_kernel[(triton.cdiv(height * width, pixels),)](
        x, gamma, out, channels**0.5, height * width, width, channels, *x.stride(), *out.stride()[1:],
        LEAST=LEAST, PIXELS=pixels, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
