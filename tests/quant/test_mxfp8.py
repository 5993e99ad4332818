"""MXFP8 in both layouts, fp8 with a scale a tile, and the names of torchao, against the formulas in plain float64."""

from __future__ import annotations

import pytest
import torch

from lowvram.errors import FileError
from lowvram.quant.encodings.base import StoredPart
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.mxfp8 import Mxfp8
from lowvram.quant.encodings.registry import recognise
from lowvram.quant.identify import identify
from lowvram.quant.names import split_side

SHAPE = (160, 192)


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(("weight", "scale"), [("F8_E4M3", "F8_E8M0"), ("U8", "U8"), ("F8_E4M3", "U8")])
def test_mxfp8_is_the_number_times_a_power_of_two(weight, scale):
    codes = torch.randint(0, 0x7F, SHAPE, generator=generator(), dtype=torch.uint8)
    exponents = torch.randint(100, 150, (160, 6), generator=generator(), dtype=torch.uint8)
    exponents[0, 0] = 0
    tiled = torch.zeros(256 * 8, dtype=torch.uint8)
    for m in range(160):
        for k in range(6):
            tiled[(m // 128) * 2 * 512 + (k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4] = (
                exponents[m, k]
            )
    powers = torch.where(exponents == 0, 0.0, 2.0 ** (exponents.double() - 127)).repeat_interleave(32, 1)
    expected = codes.view(torch.float8_e4m3fn).double() * powers
    found = recognise({"weight": StoredPart(weight, SHAPE), "scale": StoredPart(scale, (256, 8))})
    assert found.encoding == Mxfp8(weight, scale) and found.shape == SHAPE
    parts = {"weight": codes if weight == "U8" else codes.view(torch.float8_e4m3fn)}
    parts["scale"] = tiled.view(256, 8) if scale == "U8" else tiled.view(256, 8).view(torch.float8_e8m0fnu)
    assert torch.equal(found.encoding.decode(parts, SHAPE, torch.float32).double(), expected)


def test_mxfp8_loses_what_e4m3_loses():
    tensor = torch.randn(SHAPE, generator=generator()) * 0.05
    tensor[3] = 0
    back = Mxfp8().decode(Mxfp8().encode(tensor), SHAPE, torch.float32)
    assert ((back - tensor).norm() / tensor.norm()) < 0.03 and not back[3].any()


@pytest.mark.parametrize("change", [{"scale": StoredPart("F8_E8M0", (256, 4))}, {"scale": StoredPart("F32", (256, 8))},
                                    {"weight": StoredPart("F8_E4M3", (150, 192))}, {"shift": StoredPart("F32", ())}])  # fmt: skip
def test_mxfp8_with_parts_that_do_not_belong_is_not_recognised(change):
    good = {"weight": StoredPart("F8_E4M3", SHAPE), "scale": StoredPart("F8_E8M0", (256, 8))}
    assert recognise(good) is not None and recognise(good | change) is None


@pytest.mark.parametrize("shape", [(256, 384), (200, 300)])
def test_fp8_with_a_scale_a_tile(shape):
    encoding = Fp8("F8_E4M3", "tile", 128)
    tiles = (-(-shape[0] // 128), -(-shape[1] // 128))
    found = recognise({"weight": StoredPart("F8_E4M3", shape), "scale": StoredPart("F32", tiles)})
    assert found.encoding == encoding
    codes = torch.randint(0, 0x7F, shape, generator=generator(), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand(tiles, generator=generator())
    whole = torch.tensor(
        [[float(scale[r // 128, c // 128]) for c in range(shape[1])] for r in range(shape[0])]
    )
    expected = (codes.double() * whole.double()).float()
    assert torch.equal(encoding.decode({"weight": codes, "scale": scale}, shape, torch.float32), expected)
    tensor = torch.randn(shape, generator=generator()) * torch.logspace(-3, 0, shape[0]).unsqueeze(1)
    parts = encoding.encode(tensor)
    assert torch.allclose(parts["scale"][0, 0], tensor[:128, :128].abs().max() / 448)
    assert ((encoding.decode(parts, shape, torch.float32) - tensor).norm() / tensor.norm()) < 0.03


@pytest.mark.parametrize(
    ("weight", "scale"),
    [("ffn.0._weight_qdata", "ffn.0._weight_scale"), ("ffn.0.weight:qdata", "ffn.0.weight:scale")],
)
def test_the_names_of_torchao(weight, scale):
    assert split_side(weight) == ("ffn.0.weight", "weight") and split_side(scale) == ("ffn.0.weight", "scale")
    for dtype, shape in (("I8", (160, 1)), ("F8_E4M3", (160, 1)), ("F8_E4M3", (1, 1))):
        assert recognise({"weight": StoredPart(dtype, SHAPE), "scale": StoredPart("F32", shape)}) is not None


@pytest.mark.parametrize(("last", "kind"), [("wscales", "SVDQuant"), ("qzeros", "AWQ")])
def test_weights_packed_for_other_kernels_are_refused_by_name(last, kind, header_of):
    entries = {f"blocks.0.ffn.0.{last}": ("F16", (4, 4)), "blocks.0.ffn.0.qweight": ("I8", (4, 4))}
    with pytest.raises(FileError, match=kind) as caught:
        identify([header_of(entries)])
    assert "quantize" in caught.value.advice
