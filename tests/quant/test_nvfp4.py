"""NVFP4 in both layouts, against the formula of checkpoint-formats 3.3 and 5, written out plainly in float64."""

from __future__ import annotations

import pytest
import torch

from lowvram.quant.encodings.base import StoredPart
from lowvram.quant.encodings.nvfp4 import Nvfp4
from lowvram.quant.encodings.registry import recognise

CODES = {torch.uint8: "U8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


def decoded(parts, note=None) -> torch.Tensor:
    stored = {role: StoredPart(CODES[part.dtype], tuple(part.shape)) for role, part in parts.items()}
    found = recognise(stored if note is None else stored | {"comfy_quant": StoredPart("U8", (99,), note)})
    assert found is not None and found.shape == (144, 192)
    return found.encoding.decode({role: parts[role] for role in found.roles}, found.shape, torch.float32)


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def tiled(scales: torch.Tensor) -> torch.Tensor:
    """[rows, columns] bytes in the order of tensor cores, address by address (checkpoint-formats 3.3)."""
    rows, columns = scales.shape
    tiles = -(-columns // 4)
    flat = torch.zeros(-(-rows // 128) * 128 * tiles * 4, dtype=torch.uint8)
    for m in range(rows):
        for k in range(columns):
            at = (m // 128) * tiles * 512 + (k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4
            flat[at] = scales[m, k]
    return flat.view(-1, tiles * 4)


@pytest.fixture(scope="module")
def fp4():
    """Codes [144, 192], the e4m3 bytes of their scales [144, 12] and what both make, in float64."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (144, 192), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (144, 12), generator=generator, dtype=torch.uint8)
    levels = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
    values = levels[codes.long()].view(144, 12, 16) * scales.view(torch.float8_e4m3fn).double().unsqueeze(2)
    return codes, scales, values.view(144, 192)


@pytest.mark.parametrize("typed", [True, False])
def test_comfy_nvfp4_has_the_even_column_high_and_a_scale(fp4, typed):
    codes, scales, values = fp4
    stored = tiled(scales)
    assert stored.shape == (256, 12)
    parts = {
        "weight": codes[:, ::2] << 4 | codes[:, 1::2],
        "scale": stored.view(torch.float8_e4m3fn) if typed else stored,
        "scale_2": torch.tensor(0.37e-3),
    }
    found = decoded(parts, {"format": "nvfp4"})
    expected = values * parts["scale_2"].double()
    # The owner's order, scale by scale, rounds twice.
    assert ((found - expected).abs() <= 2.0**-23 * expected.abs()).all()


def test_lightx2v_nvfp4_has_the_even_column_low_and_an_inverse_scale(fp4):
    codes, scales, values = fp4
    parts = {"weight": codes[:, 1::2] << 4 | codes[:, ::2], "scale": tiled(scales).view(torch.float8_e4m3fn)}
    expected = values / 3000
    for more in (
        {"global_scale": torch.tensor([3000.0]), "input_absmax": torch.tensor(1.0)},
        {"alpha": torch.tensor(1 / 6000), "input_global_scale": torch.tensor(2.0)},
    ):
        found = decoded(parts | more)
        assert ((found - expected).abs() <= 2.0**-22 * expected.abs()).all()


def test_scales_of_the_input_columns_are_folded_into_the_weight(fp4):
    codes, scales, values = fp4
    columns = torch.rand(192, generator=torch.Generator().manual_seed(6))
    parts = {
        "weight": codes[:, ::2] << 4 | codes[:, 1::2],
        "scale": tiled(scales),
        "scale_2": torch.tensor(1.0),
    }
    found = decoded(parts | {"pre_quant_scale": columns})
    assert torch.allclose(found.double(), values * columns.double(), rtol=1e-6)


def test_nvfp4_is_encoded_to_the_nearest_number_ties_to_even():
    ticks = torch.tensor(
        [0.2, 0.25, 0.3, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 6.0, -0.25, -0.75, -5.0, -6.0, 0.0]
    )
    whole = torch.zeros(16, 64)
    whole[0, :16] = ticks
    whole[:, -1] = 6 * 448.0  # a scale of 1 for the tensor, and hence for the group of the ticks
    found = Nvfp4().decode(Nvfp4().encode(whole), (16, 64), torch.float32)[0, :16]
    expected = [0, 0, 0.5, 1, 1, 2, 2, 4, 4, 6, 6, 0, -1, -4, -6, 0]
    assert found.tolist() == expected


NVFP4 = {"weight": StoredPart("U8", (48, 256)), "scale": StoredPart("F8_E4M3", (128, 32))}


@pytest.mark.parametrize(
    "more",
    [
        {}, {"alpha": StoredPart("F32", ())}, {"scale_2": StoredPart("F32", (2,))}, {"scale_2": StoredPart("F16", ())},
        {"scale_2": StoredPart("F32", ()), "global_scale": StoredPart("F32", ())},
        {"scale_2": StoredPart("F32", ()), "scale": StoredPart("F8_E4M3", (48, 32))},
        {"scale_2": StoredPart("F32", ()), "scale": StoredPart("F32", (128, 32))},
        {"scale_2": StoredPart("F32", ()), "weight": StoredPart("U8", (48, 257))},
        {"scale_2": StoredPart("F32", ()), "weight": StoredPart("U8", (47, 256))},
        {"scale_2": StoredPart("F32", ()), "pre_quant_scale": StoredPart("F32", (511,))},
    ],
)  # fmt: skip
def test_nvfp4_with_parts_that_do_not_belong_is_not_recognised(more):
    assert recognise(NVFP4 | {"scale_2": StoredPart("F32", ())}).encoding == Nvfp4()
    assert recognise(NVFP4 | more) is None
