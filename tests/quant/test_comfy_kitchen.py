"""Weights that comfy-kitchen, which owns ComfyUI's formats, stores and reads: the same numbers here, both ways."""

from __future__ import annotations

import pytest
import torch

from lowvram.quant.encodings.base import StoredPart
from lowvram.quant.encodings.int4 import ConvrotInt4
from lowvram.quant.encodings.int8 import Int8
from lowvram.quant.encodings.mxfp8 import Mxfp8
from lowvram.quant.encodings.nvfp4 import Nvfp4
from lowvram.quant.encodings.registry import recognise

owner = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
owner4 = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")

SHAPE = (160, 512)
CODES = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
         torch.float8_e8m0fnu: "F8_E8M0"}  # fmt: skip


def weights() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05


def decoded(parts, note) -> torch.Tensor:
    stored = {role: StoredPart(CODES[part.dtype], tuple(part.shape)) for role, part in parts.items()}
    found = recognise(stored | {"comfy_quant": StoredPart("U8", (99,), note)})
    assert found is not None and found.shape == SHAPE
    return found.encoding.decode({role: parts[role] for role in found.roles}, SHAPE, torch.float32)


def ulps(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in units in the last place of float32."""
    return float(((a - b).abs() / (torch.finfo(torch.float32).eps * b.abs().clamp(min=1e-20))).max())


def test_mxfp8_is_exact_both_ways():
    data, scales = owner.quantize_mxfp8(weights())
    theirs = owner.dequantize_mxfp8(data, scales, torch.float32)
    assert torch.equal(decoded({"weight": data, "scale": scales}, {"format": "mxfp8"}), theirs)
    ours = Mxfp8().encode(weights())
    assert torch.equal(ours["weight"].view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(ours["scale"].view(torch.uint8), scales.view(torch.uint8))


def test_nvfp4_is_exact_both_ways():
    scale = weights().abs().amax() / (448 * 6)
    data, blocks = owner.quantize_nvfp4(weights(), scale)
    theirs = owner.dequantize_nvfp4(data, scale, blocks, torch.float32)
    parts = {"weight": data, "scale": blocks, "scale_2": scale}
    # Both multiply float32 by float32 twice, the scales first.
    assert ulps(decoded(parts, {"format": "nvfp4"}), theirs) <= 1
    ours = Nvfp4().encode(weights())
    assert torch.equal(ours["scale"].view(torch.uint8), blocks.view(torch.uint8))
    assert (ours["weight"] == data).float().mean() > 0.999  # a weight on a border may fall to either side


@pytest.mark.parametrize("group", [0, 64, 256])
def test_int8_is_exact_but_for_the_order_in_which_a_rotation_adds(group):
    note = {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": group} if group else {})
    if group:
        data, scale = owner.quantize_int8_convrot_weight(weights(), group)
        theirs = owner.dequantize_int8_convrot_weight(data, scale, group)
    else:
        data, scale = owner.quantize_int8_rowwise(weights())
        theirs = owner.dequantize_int8_simple(data, scale)
    ours = decoded({"weight": data, "scale": scale}, note)
    assert torch.equal(ours, theirs) if not group else torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    made = Int8(group=group).encode(weights())
    assert torch.allclose(made["scale"], scale, rtol=1e-6)
    assert (made["weight"] == data).float().mean() > 0.999


def test_convrot_w4a4_unpacks_and_packs_as_there():
    h = owner4._build_hadamard(256)
    data, scales = owner4.quantize_signed_int4_rowwise(owner4._rotate_weight(weights(), h, 256))
    codes = torch.stack([((data & 15) ^ 8) - 8, data >> 4], 2).flatten(1)
    theirs = owner4._rotate_weight(codes.float() * scales.unsqueeze(1), h, 256)
    ours = decoded({"weight": data, "scale": scales}, {"format": "convrot_w4a4"})
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    made = ConvrotInt4().encode(weights())
    assert torch.allclose(made["scale"], scales, rtol=1e-6) and (made["weight"] == data).float().mean() > 0.99
