"""What the kernels decode is what torch decodes, bit for bit, whatever bytes a file holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from lowvram.quant import fused
from lowvram.quant.encodings.base import Encoding
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.int4 import ConvrotInt4, QuantoInt4
from lowvram.quant.encodings.int8 import Int8
from lowvram.quant.encodings.kquants import BLOCK_SIZES, Blocks
from lowvram.quant.encodings.mxfp8 import Mxfp8
from lowvram.quant.encodings.nf4 import Bnb4
from lowvram.quant.encodings.nvfp4 import Nvfp4
from lowvram.triton_kernels import dequant_triton, ggml_triton

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES: list[tuple[Encoding, tuple[int, ...]]] = [
    (Fp8("F8_E4M3", "none"), (7, 300)),
    (Fp8("F8_E5M2", "none"), (3, 5, 37)),
    (Fp8("F8_E4M3", "tensor", 0, "BF16"), (9,)),
    (Fp8("F8_E4M3", "tensor"), (3, 1400)),
    (Fp8("F8_E4M3", "row"), (5, 3, 41)),
    (Fp8("F8_E5M2", "row", 0, "F16"), (4, 1030)),
    (Fp8("F8_E4M3", "block", 96), (3, 1152)),
    (Fp8("F8_E4M3", "tile", 128), (130, 300)),
    (Int8("row"), (5, 1041)),
    (Int8("tensor", "F16"), (6, 200)),
    (Int8("absmax"), (5, 77)),
    (Int8("row", group=256), (5, 2304)),
    (Int8("tensor", "BF16", 64), (3, 192)),
    (Int8("row", "F32", 16), (4, 1040)),
    (ConvrotInt4(), (5, 2304)),
    (ConvrotInt4(64, "F16"), (3, 192)),
    (ConvrotInt4(16), (4, 1040)),
    (QuantoInt4(128), (3, 384)),
    (QuantoInt4(64, "F32", "I8"), (20, 192)),
    (Bnb4("nf4", 64), (5, 384)),
    (Bnb4("fp4", 128, 0), (3, 3, 128)),
    (Bnb4("nf4", 64, 256, 0.37), (19, 1024)),
    (Nvfp4(), (144, 16)),
    (Nvfp4("inverse", "U8"), (2, 1104)),
    (Nvfp4("alpha", column_code="BF16"), (33, 48)),
    (Mxfp8(), (32, 1056)),
    (Mxfp8("U8", "U8"), (32, 32)),
    *((Blocks(kind), (3, 256 * 13)) for kind in BLOCK_SIZES),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("encoding", "shape"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_every_encoding_becomes_the_numbers_of_torch(
    encoding: Encoding, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert fused.has_kernel(encoding) and encoding.fits(shape)
    assert fused.try_encoding(encoding, shape, CPU, (dtype,)) == ""


HUGE = 2**31 + 2048
"""More weights than 32 bits count."""


def ending(n: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of which only the last, which are all the same, are ever in memory."""
    x = torch.zeros(n, dtype=dtype)
    x[-4096:] = value
    return x


def _scaled(out: Tensor) -> None:
    weight = ending(HUGE, 0x38, torch.uint8).view(1, -1)
    dequant_triton.scaled(out.view(1, -1), weight, torch.tensor([3.0]), "e4m3", "row", [1, 1], 1.0)


def _levels(out: Tensor) -> None:
    codes = torch.arange(16.0)
    absmax = ending(HUGE // 64, 3)
    dequant_triton.levels(out, ending(HUGE // 2, 0x11, torch.uint8), absmax, codes, codes, codes, 64, 0, 0.0)


def _halves(out: Tensor) -> None:
    scale, shift = ending(HUGE // 128, 3), ending(HUGE // 128, 0)
    dequant_triton.halves(out, ending(HUGE // 2, 0x11, torch.uint8), scale, shift, 128)


def _blocks(out: Tensor) -> None:
    weight = torch.zeros(HUGE // 32, 34, dtype=torch.uint8)
    weight[-128:] = torch.tensor([0, 0x42, *[1] * 32], dtype=torch.uint8)  # a scale of 3
    ggml_triton.blocks(out.view(-1, 32), weight, "Q8_0")


@pytest.mark.parametrize("launch", [_scaled, _levels, _halves, _blocks])
def test_the_end_of_a_weight_that_32_bits_cannot_index(
    launch: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program alone, on tensors of which only their end is in memory."""
    run = GridExecutor.__call__

    def last(self: GridExecutor, *given: object, **named: object) -> None:
        index = torch.tensor([self.grid[0] - 1], dtype=torch.int32).numpy()
        monkeypatch.setattr(
            InterpreterBuilder, "create_get_program_id", lambda self, axis: TensorHandle(index, tl.int32)
        )
        self.grid = (1,)
        run(self, *given, **named)

    monkeypatch.setattr(GridExecutor, "__call__", last)
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, given, named: (given, named))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda self, *given: None)
    out = torch.empty(HUGE, dtype=torch.bfloat16)
    out[-1024:] = 7
    launch(out)
    assert (out[-1024:] == 3).all()


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("scale", [0.0, -3e38, 1e-42, float("inf"), float("nan"), 0.3])
def test_all_256_bytes_with_any_scale(code: str, scale: float) -> None:
    encoding = Fp8(code, "tensor")
    weight = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    weight = weight.view(torch.float8_e5m2) if code == "F8_E5M2" else weight
    parts = {"weight": weight, "scale": torch.tensor([scale])}
    for dtype in DTYPES:
        want = encoding.decode(parts, (16, 16), dtype)
        got = fused.decode(encoding, parts, torch.zeros(16, 16, dtype=dtype))
        assert fused.same_bits(got, want)
