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


@torch.library.custom_op("lowvram::decode_blocks_", mutates_args=("out",))
def blocks_(out: Tensor, weight: Tensor, kind: str) -> None:
    """out [n, weights of a block] = the GGUF blocks weight, uint8 [n, bytes of a block]; kind: "Q8_0", "Q4_K", ..."""
    from lowvram.triton_kernels import ggml_triton

    ggml_triton.blocks(out, weight, kind)


@blocks_.register_fake
def _(out: Tensor, weight: Tensor, kind: str) -> None:
    return None
