"""8-bit floats: cast as they are, or with scales per tensor, per row or per block of columns.

Layouts read (checkpoint families in brackets): fp8 alone ("*_fp8_e4m3fn", "*_fp8_e5m2"); a scalar scale
(ComfyUI fp8_scaled and float8 layers, Kijai _scaled_KJ); a scale per row, [N] or [N, 1] (LightX2V, quanto, torchao,
musubi-tuner); a scale per block of a row, [N, K/block, 1] (musubi-tuner, Kijai, block 64); a scale per tile of 128 x 128,
[N/128, K/128] rounded up (LightX2V b128). W = fp8 * scale in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.quant.encodings.base import (
    FLOAT_CODES,
    TORCH_DTYPES,
    Encoding,
    Family,
    PartLayout,
    Recognised,
    StoredPart,
    finite_peak,
    part_layout,
    row_chunks,
    rows_columns,
)
from lowvram.quant.refs import Shape
from lowvram.quant.spec import numel
from lowvram.triton_kernels.gemm import QuantisedMatrix
from lowvram.triton_kernels.quantise import Form

Scaling = Literal["none", "tensor", "row", "block", "tile"]

_CODES = ("F8_E4M3", "F8_E5M2")
_NUMBERS: Mapping[torch.dtype, Tensor] = MappingProxyType(
    {
        TORCH_DTYPES[code]: torch.arange(256, dtype=torch.uint8, device="cpu")
        .view(TORCH_DTYPES[code])
        .to(torch.float32)
        for code in _CODES
    }
)
"""What every code stands for."""
_TILE = 128
"""Rows and columns of the tiles met in files."""


def widened(weight: Tensor) -> Tensor:
    """fp8 as float32, exactly and in memory of its own. A CPU casts one by one: it looks them up three times as fast."""
    if not weight.is_cpu:
        return weight.to(torch.float32)
    codes = weight.view(torch.uint8).flatten().to(torch.int32)
    return _NUMBERS[weight.dtype].index_select(0, codes).view(weight.shape)


def wide_chunks(weight: Tensor, rows: int, columns: int) -> Iterator[slice]:
    """Rows to be `widened` at a time. Indices take as much memory as numbers: in chunks half as large a CPU needs what the
    cast does, which is what is planned."""
    return row_chunks(rows, columns, 2 if weight.is_cpu else 1)


@dataclass(frozen=True, slots=True)
class Fp8(Encoding):
    """Part "weight" in fp8, and unless `scaling` is "none" a part "scale".

    A tensor of more than two dimensions counts as a matrix of its rows: [N, everything else].
    """

    code: str = "F8_E4M3"
    """"F8_E4M3" (largest value 448) or "F8_E5M2" (57344)."""
    scaling: Scaling = "tensor"
    block: int = 0
    """Columns per scale with scaling "block", rows and columns with "tile", else 0."""
    scale_code: str = "F32"
    """Dtype code of the scales."""

    @property
    def name(self) -> str:
        kind = "e4m3" if self.code == "F8_E4M3" else "e5m2"
        if self.scaling == "none":
            return f"fp8_{kind}"
        body = {"tensor": "scaled", "row": "row", "block": f"block{self.block}", "tile": f"tile{self.block}"}[
            self.scaling
        ]
        return f"fp8_{body}" if kind == "e4m3" else f"fp8_{kind}_{body}"

    def layout(self, shape: Shape) -> tuple[PartLayout, ...]:
        weight = part_layout("weight", self.code, shape)
        if self.scaling == "none":
            return (weight,)
        return (weight, part_layout("scale", self.scale_code, self._scale_shape(shape)))

    def fits(self, shape: Shape) -> bool:
        if self.scaling == "block":
            return len(shape) >= 2 and numel(shape[1:]) % self.block == 0
        if self.scaling == "tile":
            return len(shape) == 2
        return self.scaling != "row" or len(shape) >= 2

    @property
    def by_rows(self) -> bool:
        return self.scaling != "tile"

    @property
    def w8a8(self) -> Form | None:
        return "fp8" if self.code == "F8_E4M3" and self.scaling in ("none", "tensor", "row") else None

    def w8a8_matrix(self, parts: Mapping[str, Tensor], shape: Shape) -> QuantisedMatrix:
        weight = parts["weight"].reshape(shape)
        if self.scaling == "none":
            return QuantisedMatrix(weight, torch.ones(shape[0], device=weight.device), 0)
        scale = parts["scale"].to(torch.float32).reshape(-1)
        return QuantisedMatrix(weight, scale.expand(shape[0]).contiguous(), 0)

    def _decode(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor) -> None:
        """Without scales one exact cast; with scales the product in float32, rounded once."""
        weight = parts["weight"].reshape(shape)
        scale = None
        if self.scaling != "none":
            scale = parts["scale"].to(torch.float32).reshape(self._scale_shape(shape))
        elif not weight.is_cpu:
            out.copy_(weight)
            return
        source, target = weight.reshape(self._matrix(shape)), out.view(self._matrix(shape))
        for rows in wide_chunks(weight, *rows_columns(shape)):
            if scale is None:
                target[rows].copy_(widened(source[rows]))
            else:
                target[rows].copy_(widened(source[rows]).mul_(self._scale_of(scale, rows, shape)))

    def _encode(self, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
        """Rounds to nearest even. Scales are amax / largest value; without scales values saturate."""
        source = tensor.reshape(self._matrix(shape))
        weight = torch.empty_like(source, dtype=TORCH_DTYPES[self.code])
        largest = torch.finfo(weight.dtype).max
        scale = self._make_scale(source, largest)
        for rows in row_chunks(*rows_columns(shape)):
            values = source[rows].to(torch.float32)
            if scale is not None:
                values = values / self._scale_of(scale, rows, shape).to(torch.float32)
            weight[rows] = values.clamp_(-largest, largest).to(weight.dtype)
        parts = {"weight": weight.view(shape)}
        return parts if scale is None else parts | {"scale": scale}

    def _make_scale(self, source: Tensor, largest: float) -> Tensor | None:
        if source.numel() == 0:
            peak = torch.zeros(self._scale_shape(tuple(source.shape)), device=source.device)
        elif self.scaling in ("none", "tensor"):
            peak = finite_peak(source)
        elif self.scaling == "tile":
            (rows, columns), size = source.shape, self.block
            padded = functional.pad(source, (0, -columns % size, 0, -rows % size))
            peak = finite_peak(
                padded.unflatten(0, (-1, size)).unflatten(2, (-1, size)).movedim(1, 2).flatten(2), -1
            )
            peak = peak.squeeze(-1)
        else:
            peak = finite_peak(source, -1)
        if self.scaling == "none":
            return None
        scale = (peak / largest).to(TORCH_DTYPES[self.scale_code])
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def _scale_shape(self, shape: Shape) -> Shape:
        if self.scaling == "row":
            return (shape[0], 1)
        if self.scaling == "block":
            return (shape[0], numel(shape[1:]) // self.block, 1)
        if self.scaling == "tile":
            return (-(-shape[0] // self.block), -(-shape[1] // self.block))
        return ()

    def _scale_of(self, scale: Tensor, rows: slice, shape: Shape) -> Tensor:
        """What some rows of the matrix are multiplied with."""
        if self.scaling == "tensor":
            return scale
        if self.scaling != "tile":
            return scale[rows]
        bands = torch.arange(rows.start, rows.stop, device=scale.device) // self.block
        return scale[bands].repeat_interleave(self.block, 1)[:, : shape[1]]

    def _matrix(self, shape: Shape) -> Shape:
        """The tensor as a matrix of rows; blocks of columns get a dimension of their own."""
        rows, columns = rows_columns(shape)
        return (rows, columns // self.block, self.block) if self.scaling == "block" else (rows, columns)


def _recognise(stored: Mapping[str, StoredPart]) -> Recognised | None:
    weight, scale = stored.get("weight"), stored.get("scale")
    if weight is None or weight.dtype not in _CODES:
        return None
    if scale is None:
        return Recognised(Fp8(weight.dtype, "none"), weight.shape, ("weight",))
    shape = weight.shape
    if scale.dtype not in FLOAT_CODES or not shape:
        return None
    roles = ("weight", "scale")
    if scale.shape in ((), (1,), (1, 1)):
        return Recognised(Fp8(weight.dtype, "tensor", 0, scale.dtype), shape, roles)
    if len(shape) < 2:
        return None
    if scale.shape in ((shape[0],), (shape[0], 1)):
        return Recognised(Fp8(weight.dtype, "row", 0, scale.dtype), shape, roles)
    columns = numel(shape[1:])
    if len(scale.shape) == 3 and scale.shape[0] == shape[0] and scale.shape[2] == 1:
        blocks = scale.shape[1]
        if blocks and columns % blocks == 0 and columns:
            return Recognised(Fp8(weight.dtype, "block", columns // blocks, scale.dtype), shape, roles)
    tiles = Fp8(weight.dtype, "tile", _TILE, scale.dtype)
    if tiles.fits(shape) and scale.shape == tiles.layout(shape)[1].shape:
        return Recognised(tiles, shape, roles)
    return None


FAMILY = Family(
    MappingProxyType(
        {
            "fp8": Fp8(),
            "fp8_scaled": Fp8(),
            "fp8_e4m3": Fp8("F8_E4M3", "none"),
            "fp8_e5m2": Fp8("F8_E5M2", "none"),
            "fp8_row": Fp8("F8_E4M3", "row"),
            "fp8_tile128": Fp8("F8_E4M3", "tile", _TILE),
        }
    ),
    _recognise,
    MappingProxyType({"float8_e4m3fn": False, "float8_e5m2": False}),
)
