"""Multiplication at the shapes of a 14B model: the int8 kernel and what makes its rows, against `torch._int_mm`, fp8 and bf16 cuBLAS.

What int8 costs is the product and the rows that it takes. The decoding that it saves is not timed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.bench.blocks import seconds_of
from lowvram.triton_kernels import tiles
from lowvram.triton_kernels.gemm import QuantisedMatrix, int8_linear
from lowvram.triton_kernels.modes import PRODUCTS
from lowvram.triton_kernels.ops import FUSED, TORCH, W8A8Ops
from lowvram.triton_kernels.quantise import QuantisedRows
from lowvram.triton_kernels.tiles import GEMM_CANDIDATES, GemmTile

TOKENS = 111_600
"""1280x720, 121 frames."""
SHAPES = ((5120, 5120), (13_824, 5120), (5120, 13_824))
"""[out, in]: a projection of attention, and both Linears of the FFN."""
SMALL = ((256, 256),)
Row = dict[str, object]


def timings(kind: str, tokens: int = TOKENS, shapes: tuple[tuple[int, int], ...] = SHAPES) -> Iterator[Row]:
    """One object a kernel, tile and shape: milliseconds, and T operations a second of products; or what it was refused for.

    On a CPU only what torch does is timed.
    """
    for out, width in shapes:
        for name, tile, run, work in _runs(kind, tokens, out, width):
            row: Row = {"kernel": name, "tokens": tokens, "out": out, "in": width, "ok": True}
            row |= {"tile": list(astuple(tile))} if tile else {}
            try:
                seconds = seconds_of(run, kind)
            except Exception as problem:  # noqa: BLE001  a compiler, or a card that has not the memory
                yield row | {"refused": (str(problem) or type(problem).__name__).splitlines()[0]}
                continue
            row["ms"] = round(1e3 * seconds, 3)
            yield row | ({"tops": round(work / seconds / 1e12, 3)} if work else {})


Run = tuple[str, GemmTile | None, Callable[[], object], int]
"""Name, tile if several are tried, call, and operations of a product."""


def _runs(kind: str, tokens: int, out: int, width: int) -> Iterator[Run]:
    card, work = kind == "cuda", 2 * tokens * out * width
    dtype = torch.bfloat16 if card else torch.float32
    x = torch.randn(tokens, width, device=kind, dtype=dtype)
    bias, gate = x.new_zeros(out), torch.ones(1, out, device=kind)
    exact = "bf16 cuBLAS" if card else "float32"
    yield exact, None, partial(functional.linear, x, x.new_empty(out, width).normal_(), bias), work
    shift = torch.zeros(1, width, device=kind)
    for by, ops in (("torch", TORCH.int8), ("kernel", FUSED.int8))[: 1 + card]:
        yield f"quantise, {by}", None, partial(ops.quantise, x, 256), 0
        yield f"gelu and quantise, {by}", None, partial(ops.gelu, x, 256), 0
        if width <= 5120:
            yield f"modulate and quantise, {by}", None, partial(ops.modulate, x, shift, shift, 256), 0
    rows = (FUSED if card else TORCH).int8.quantise(x, 256)
    if not card or tiles.arch_of(bias.device) in PRODUCTS["fp8"].archs:
        yield from _fp8_runs(x, (FUSED if card else TORCH).fp8, out, bias, gate)
    del x
    values = torch.randint(-127, 128, (out, width), device=kind, dtype=torch.int8)
    matrix = QuantisedMatrix(values, torch.ones(out, device=kind), 256)
    yield "_int_mm alone", None, partial(torch._int_mm, rows.values, values.mT), work
    yield "_int_mm and epilogue", None, partial(int8_linear, rows, matrix, bias), work
    for tile in GEMM_CANDIDATES if card else ():
        for gated in (None, gate):
            name = "int8_linear" if gated is None else "int8_linear_gated_"
            yield name, tile, partial(_kernel, rows, matrix, bias, gated, tile), work


def _fp8_runs(x: Tensor, ops: W8A8Ops, out: int, bias: Tensor, gate: Tensor) -> Iterator[Run]:
    yield "quantise, fp8", None, partial(ops.quantise, x, 0), 0
    yield "gelu and quantise, fp8", None, partial(ops.gelu, x, 0), 0
    rows, work = ops.quantise(x, 0), 2 * x.numel() * out
    few = ops.quantise(torch.randn(out, x.shape[1], device=x.device).to(x.dtype), 0)
    matrix, into = QuantisedMatrix(few.values, few.scale, 0), x.new_zeros(x.shape[0], out)
    yield "fp8_linear", None, partial(ops.linear, rows, matrix, bias, None), work
    yield "fp8_linear_gated_", None, partial(ops.linear_gated_, into, rows, matrix, bias, gate, None), work


def _kernel(
    rows: QuantisedRows, matrix: QuantisedMatrix, bias: Tensor, gate: Tensor | None, tile: GemmTile
) -> None:
    from lowvram.triton_kernels import gemm_triton

    y = torch.empty(rows.values.shape[0], matrix.values.shape[0], dtype=rows.dtype, device=bias.device)
    gemm_triton.linear(y, rows.values, rows.scale, matrix.values, matrix.scale, bias, gate, None, None, tile)
