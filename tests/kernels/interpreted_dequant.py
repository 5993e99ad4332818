"""What the kernels decode is what torch decodes, bit for bit, whatever bytes a file holds."""

from __future__ import annotations

import pytest
import torch

from lowvram.quant import fused
from lowvram.quant.encodings.base import Encoding
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.int4 import ConvrotInt4, QuantoInt4
from lowvram.quant.encodings.int8 import Int8
from lowvram.quant.encodings.kquants import BLOCK_SIZES, Blocks
from lowvram.quant.encodings.mxfp8 import Mxfp8
from lowvram.quant.encodings.nf4 import Bnb4
from lowvram.quant.encodings.nvfp4 import Nvfp4

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
