"""NVFP4: e2m1 numbers with an e4m3 scale for 16 of a row and one float32 scale for the tensor.

Two layouts are met. ComfyUI: the even column in the high nibble, tensor scale "weight_scale_2" (amax / 2688).
LightX2V: the even column in the low nibble, and the inverse of the scale in "weight_global_scale" - or, in what it
ships, split into "alpha" * "input_global_scale". In both the e4m3 scales lie in the order tensor cores want: tiles of
128 rows x 4 scales, each stored as 32 x (4 x 4), with rows and columns padded to whole tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from lowvram.quant.encodings.base import (
    FLOAT_CODES,
    Encoding,
    Family,
    PartLayout,
    Recognised,
    StoredPart,
    finite_peak,
    part_layout,
    row_chunks,
)
from lowvram.quant.encodings.pairs import look_up, pack_pairs, pair_table
from lowvram.quant.encodings.tiles import from_tiles, tiled_shape, to_tiles
from lowvram.quant.refs import Shape
from lowvram.quant.spec import numel

_GROUP = 16
_LARGEST, _LARGEST_SCALE = 6.0, 448.0
_E4M3 = torch.float8_e4m3fn

Tensorwide = Literal["scale", "inverse", "alpha"]

_ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"scale": ("scale_2",), "inverse": ("global_scale",), "alpha": ("alpha", "input_global_scale")}
)


@dataclass(frozen=True, slots=True)
class Nvfp4(Encoding):
    """A weight [N, K]. Parts: "weight" uint8 [N, K/2]; "scale" [N up to 128s, K/16 up to 4s]; the tensor scale, in
    float32: "scale_2", or "global_scale" (its inverse), or "alpha" and "input_global_scale" (its factors); if
    `column_code` is set, "pre_quant_scale" [K], which multiplies the input and hence the columns.
    """

    tensorwide: Tensorwide = "scale"
    """How the scale of the tensor is stored; "scale" is ComfyUI's layout, the others are LightX2V's."""
    scale_code: str = "F8_E4M3"
    """Dtype code of the group scales; with "U8" the bytes are e4m3 all the same."""
    column_code: str = ""
    """Dtype code of the column scales, or "" if there are none."""

    @property
    def name(self) -> str:
        return (
            "nvfp4"
            if self.tensorwide == "scale"
            else f"nvfp4_lightx2v{'_alpha' * (self.tensorwide == 'alpha')}"
        )

    def layout(self, shape: Shape) -> tuple[PartLayout, ...]:
        rows, columns = shape
        parts = [
            part_layout("weight", "U8", (rows, columns // 2)),
            part_layout("scale", self.scale_code, tiled_shape(rows, columns // _GROUP)),
            *(part_layout(role, "F32", ()) for role in _ROLES[self.tensorwide]),
        ]
        if self.column_code:
            parts.append(part_layout("pre_quant_scale", self.column_code, (columns,)))
        return tuple(parts)

    def fits(self, shape: Shape) -> bool:
        """ComfyUI pads rows to 16s, and a padded file no longer says how many there were."""
        padded = self.tensorwide == "scale" and len(shape) == 2 and shape[0] % 16
        return len(shape) == 2 and shape[1] % _GROUP == 0 and not padded

    def _decode(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor) -> None:
        """e2m1 * (e4m3 * scale of the tensor) in float32, rounded once."""
        rows, columns = shape
        packed = parts["weight"].reshape(rows, columns // 2)
        table = pair_table(_levels(packed.device), high_first=self.tensorwide == "scale")
        scales = from_tiles(parts["scale"].view(torch.uint8), rows, columns // _GROUP)
        tensor_scale = self.tensor_scale(parts)
        factors = parts["pre_quant_scale"].to(torch.float32).view(1, columns) if self.column_code else None
        for chunk in row_chunks(rows, columns):
            scale = tensor_scale * scales[chunk].view(_E4M3).to(torch.float32)
            out[chunk].copy_(_decode_rows(packed[chunk], table, scale, factors))

    def _encode(self, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
        """Group scales amax / 6, rounded to e4m3; then nearest e2m1, ties to even, as comfy-kitchen does."""
        if self.column_code:
            raise ValueError(f"{self.name} with column scales is only read")
        rows, columns = shape
        peak = finite_peak(tensor) if tensor.numel() else torch.zeros((), device=tensor.device)
        whole = peak / (_LARGEST * _LARGEST_SCALE)
        whole = torch.where(whole > 0, whole, torch.ones_like(whole))
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=tensor.device)
        scales = torch.zeros(rows, columns // _GROUP, dtype=torch.uint8, device=tensor.device)
        for chunk in row_chunks(rows, columns) if tensor.numel() else ():
            groups = tensor[chunk].to(torch.float32).view(-1, columns // _GROUP, _GROUP)
            fp8 = (groups.abs().amax(2) / _LARGEST / whole).clamp_(max=_LARGEST_SCALE).to(_E4M3)
            unit = (whole * fp8.to(torch.float32)).unsqueeze(2)
            codes = _codes(groups / torch.where(unit > 0, unit, torch.full_like(unit, torch.inf)))
            packed[chunk] = pack_pairs(codes.view(-1, columns), high_first=self.tensorwide == "scale")
            scales[chunk] = fp8.view(torch.uint8)
        tiles = to_tiles(scales)
        parts = {"weight": packed, "scale": tiles if self.scale_code == "U8" else tiles.view(_E4M3)}
        if self.tensorwide == "scale":
            return parts | {"scale_2": whole}
        if self.tensorwide == "inverse":
            return parts | {"global_scale": 1 / whole}
        return parts | {"alpha": whole, "input_global_scale": torch.ones_like(whole)}

    def tensor_scale(self, parts: Mapping[str, Tensor]) -> Tensor:
        """float32 []"""
        first, *more = (parts[role].to(torch.float32).reshape(()) for role in _ROLES[self.tensorwide])
        if self.tensorwide == "inverse":
            return first.reciprocal()
        return first * more[0] if more else first


def _decode_rows(packed: Tensor, table: Tensor, scale: Tensor, factors: Tensor | None) -> Tensor:
    """float32 [rows, columns] from bytes [rows, columns/2], with group scales [rows, groups] and column factors."""
    values = look_up(table, packed)
    values.view(*scale.shape, _GROUP).mul_(scale.unsqueeze(2))
    return values if factors is None else values.mul_(factors)


def _levels(device: torch.device) -> Tensor:
    """What the 16 codes of e2m1 stand for: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same negative."""
    codes = torch.arange(16, dtype=torch.int32, device=device)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    quarters = torch.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent)
    return torch.where(codes >= 8, -quarters, quarters).to(torch.float32) / 4


def _codes(values: Tensor) -> Tensor:
    """float32 -> uint8 codes of the nearest e2m1 numbers, ties to the even code, larger values to 6."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=values.device)
    # A tie goes up where the code above is the even one: there the border lies just below it.
    below = torch.nextafter(middles[1::2], torch.zeros_like(middles[1::2]))
    middles[1::2] = below
    return torch.bucketize(values.abs(), middles).to(torch.uint8) | (values < 0).to(torch.uint8) << 3


def _recognise(stored: Mapping[str, StoredPart]) -> Recognised | None:
    weight, scale = stored.get("weight"), stored.get("scale")
    if weight is None or scale is None or weight.dtype != "U8" or scale.dtype not in ("F8_E4M3", "U8"):
        return None
    how = _tensorwide(stored)
    if len(weight.shape) != 2 or how is None:
        return None
    columns = stored.get("pre_quant_scale")
    shape = (weight.shape[0], weight.shape[1] * 2)
    if columns is not None and (columns.dtype not in FLOAT_CODES or numel(columns.shape) != shape[1]):
        return None
    encoding = Nvfp4(how, scale.dtype, columns.dtype if columns is not None else "")
    if not encoding.fits(shape):
        return None
    layout = encoding.layout(shape)
    for part in layout:
        there = stored[part.role]
        if there.dtype != part.dtype or numel(there.shape) != numel(part.shape):
            return None
    return Recognised(encoding, shape, tuple(part.role for part in layout))


def _tensorwide(stored: Mapping[str, StoredPart]) -> Tensorwide | None:
    """Which layout the names beside the weight belong to; None if to neither or to both."""
    if "scale_2" in stored:
        return None if {"global_scale", "alpha"} & stored.keys() else "scale"
    if "global_scale" in stored:
        return "inverse"
    return "alpha" if {"alpha", "input_global_scale"} <= stored.keys() else None


FAMILY = Family(
    MappingProxyType({"nvfp4": Nvfp4(), "nvfp4_lightx2v": Nvfp4("inverse")}),
    _recognise,
    MappingProxyType({"nvfp4": False}),
)
