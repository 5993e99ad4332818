"""Weights made dense in a buffer: ops with kernels for CUDA. Their arithmetic in torch, which is the reference and the
CPU path, is the `decode` of the encodings (`quant/encodings`); which of the two runs is settled before a run.

Every op writes `out`, contiguous, in bfloat16, float16 or float32, and takes contiguous parts.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("lowvram::decode_scaled_", mutates_args=("out",))
def scaled_(
    out: Tensor, weight: Tensor, scale: Tensor, form: str, scales: str, tile: list[int], factor: float
) -> None:
    """out [rows, columns] = weight * scale (* factor), where weight is uint8 holding fp8, or int8.

    form: "e4m3", "e5m2" or "int8". scales: "none"; "row", where scale has an element a row or one in all; "tile",
    where it is a matrix with an element for every `tile` [rows, columns] of the weight.
    """
    from lowvram.triton_kernels import dequant_triton

    dequant_triton.scaled(out, weight, scale, form, scales, tile, factor)


@scaled_.register_fake
def _(
    out: Tensor, weight: Tensor, scale: Tensor, form: str, scales: str, tile: list[int], factor: float
) -> None:
    return None


@torch.library.custom_op("lowvram::decode_rotated_", mutates_args=("out",))
def rotated_(out: Tensor, weight: Tensor, scale: Tensor, group: int) -> None:
    """out [rows, columns] = weight, rotated back in groups of `group` columns, * scale.

    weight: int8, or two numbers of 4 bits a byte, [rows, columns/2], the even column low. scale has an element a row or
    one in all. group: one that `hadamard.factors` has.
    """
    from lowvram.triton_kernels import dequant_triton

    dequant_triton.rotated(out, weight, scale, group)


@rotated_.register_fake
def _(out: Tensor, weight: Tensor, scale: Tensor, group: int) -> None:
    return None


@torch.library.custom_op("lowvram::decode_blocks_", mutates_args=("out",))
def blocks_(out: Tensor, weight: Tensor, kind: str) -> None:
    """out [n, weights of a block] = the GGUF blocks weight, uint8 [n, bytes of a block]; kind: "Q8_0", "Q4_K", ..."""
    from lowvram.triton_kernels import ggml_triton

    ggml_triton.blocks(out, weight, kind)


@blocks_.register_fake
def _(out: Tensor, weight: Tensor, kind: str) -> None:
    return None


@torch.library.custom_op("lowvram::decode_mxfp8_", mutates_args=("out",))
def mxfp8_(out: Tensor, weight: Tensor, scale: Tensor) -> None:
    """out [rows, columns] = weight, uint8 holding e4m3, * 2^(scale - 127) of its group of 32; scale uint8, in tiles."""
    from lowvram.triton_kernels import dequant_triton

    dequant_triton.mxfp8(out, weight, scale)


@mxfp8_.register_fake
def _(out: Tensor, weight: Tensor, scale: Tensor) -> None:
    return None


@torch.library.custom_op("lowvram::decode_nvfp4_", mutates_args=("out",))
def nvfp4_(
    out: Tensor, weight: Tensor, scale: Tensor, whole: Tensor, factors: Tensor | None, high_first: bool
) -> None:
    """out [rows, columns] = weight, uint8 [rows, columns/2] holding e2m1, * (whole * scale of its group of 16), * factors.

    scale: uint8 holding e4m3, in tiles. whole: float32 []. factors: one a column. high_first: order of the nibbles.
    """
    from lowvram.triton_kernels import dequant_triton

    dequant_triton.nvfp4(out, weight, scale, whole, factors, high_first)


@nvfp4_.register_fake
def _(
    out: Tensor, weight: Tensor, scale: Tensor, whole: Tensor, factors: Tensor | None, high_first: bool
) -> None:
    return None


@torch.library.custom_op("lowvram::decode_levels_", mutates_args=("out",))
def levels_(
    out: Tensor,
    weight: Tensor,
    absmax: Tensor,
    table: Tensor,
    outer: Tensor,
    outer_table: Tensor,
    block: int,
    nested: int,
    offset: float,
) -> None:
    """out, flat = table[code] * absmax of its `block`; weight uint8, the first code of a byte high; table float32 [16].

    With `nested` absmax is outer_table[absmax] * outer of its `nested` blocks + offset; else the last tensors are unused.
    """
    from lowvram.triton_kernels import dequant_triton

    dequant_triton.levels(out, weight, absmax, table, outer, outer_table, block, nested, offset)


@levels_.register_fake
def _(
    out: Tensor,
    weight: Tensor,
    absmax: Tensor,
    table: Tensor,
    outer: Tensor,
    outer_table: Tensor,
    block: int,
    nested: int,
    offset: float,
) -> None:
    return None


@torch.library.custom_op("lowvram::decode_halves_", mutates_args=("out",))
def halves_(out: Tensor, packed: Tensor, scale: Tensor, shift: Tensor, group: int) -> None:
    """out, flat: all low nibbles of packed, uint8, then as many high ones as there is room for. q * scale - shift of its
    `group`, or (q - shift) * scale if shift is whole."""
    from lowvram.triton_kernels import dequant_triton

    dequant_triton.halves(out, packed, scale, shift, group)


@halves_.register_fake
def _(out: Tensor, packed: Tensor, scale: Tensor, shift: Tensor, group: int) -> None:
    return None
