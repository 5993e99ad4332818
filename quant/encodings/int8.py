"""8-bit integers with a scale per tensor or per row, plain or rotated.

Layouts read (checkpoint families in brackets): weight int8 [N, K] with a scale [N, 1] (LightX2V int8; quanto
qint8) or [] (ComfyUI int8_tensorwise), W = q * scale; the same, rotated in groups of columns (ComfyUI convrot);
the same with zero points, W = (q - zero) * scale (torchao Int8Tensor); and SCB [N], W = q * SCB / 127 (bitsandbytes).
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
from lowvram.quant.encodings.notes import rotation_of
from lowvram.quant.refs import Shape
from lowvram.triton_kernels.gemm import QuantisedMatrix
from lowvram.triton_kernels.hadamard import is_rotation, root, rotate, rotate_whole
from lowvram.triton_kernels.quantise import GROUPS, Form

Scaling = Literal["tensor", "row", "absmax"]

BNB_FACTOR = 7.874015718698502e-3
"""1/127 in float32, as bitsandbytes has it."""


@dataclass(frozen=True, slots=True)
class Int8(Encoding):
    """Part "weight" in int8 and a part "scale"; with scaling "absmax" a part "scb" instead, 127 times as large.

    A tensor of more than two dimensions counts as a matrix of its rows: [N, everything else].
    """

    scaling: Scaling = "row"
    scale_code: str = "F32"
    """Dtype code of the scales."""
    group: int = 0
    """Columns rotated together, or 0 for a weight that is not rotated."""
    zeros: bool = False
    """Whether a part "zero_point" in int8, shaped like the scales, is what stands for 0."""

    @property
    def name(self) -> str:
        body = {"tensor": "int8_tensor", "row": "int8", "absmax": "int8_bnb"}[
            self.scaling
        ] + "_zero" * self.zeros
        if not self.group:
            return body
        return f"{body}_convrot" if self.group == 256 else f"{body}_convrot{self.group}"

    def layout(self, shape: Shape) -> tuple[PartLayout, ...]:
        beside = self._scale_shape(shape)
        zeros = (part_layout("zero_point", "I8", beside),) if self.zeros else ()
        return (
            part_layout("weight", "I8", shape),
            part_layout(self._scale_role, self.scale_code, beside),
            *zeros,
        )

    def fits(self, shape: Shape) -> bool:
        if self.group:
            return len(shape) == 2 and shape[1] % self.group == 0
        return self.scaling == "tensor" or len(shape) >= 2

    @property
    def by_rows(self) -> bool:
        return True

    @property
    def w8a8(self) -> Form | None:
        return "int8" if self.group in GROUPS and not self.zeros else None

    def w8a8_matrix(self, parts: Mapping[str, Tensor], shape: Shape) -> QuantisedMatrix:
        scale = parts[self._scale_role].to(torch.float32).reshape(-1)
        if self.scaling == "absmax":
            scale = scale * BNB_FACTOR
        return QuantisedMatrix(
            parts["weight"].reshape(shape), scale.expand(shape[0]).contiguous(), self.group
        )

    def _decode(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor) -> None:
        """q * scale in float32, rounded once. A rotation is undone on the integers, so it adds no error."""
        weight = parts["weight"].reshape(shape)
        matrix = rows_columns(shape)
        scale = parts[self._scale_role].to(torch.float32)
        scale = scale.reshape(()) if self.scaling == "tensor" else scale.reshape(shape[0], 1)
        if self.group:
            scale = scale / root(self.group)
        zero = parts["zero_point"].to(torch.float32).reshape(scale.shape) if self.zeros else None
        source, target = weight.reshape(matrix), out.view(matrix)
        for rows in row_chunks(*matrix):
            q, part = source[rows], scale if self.scaling == "tensor" else scale[rows]
            if zero is not None:
                q = q - (zero if self.scaling == "tensor" else zero[rows])
            target[rows].copy_(self._decode_rows(q, part))

    def _decode_rows(self, q: Tensor, scale: Tensor) -> Tensor:
        """float32, as large as q; scale is [] or [rows, 1]."""
        if self.group:
            return rotate_whole(q, self.group).mul_(scale)
        values = q * scale.expand(q.shape[0], 1)
        return values.mul_(BNB_FACTOR) if self.scaling == "absmax" else values

    def _encode(self, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
        """Rounds to nearest even; scales are amax / 127 (for "scb": amax) of the rotated weight."""
        source = tensor.reshape(rows_columns(shape))
        if tensor.numel():
            finite_peak(tensor)
        weight = torch.empty_like(source, dtype=torch.int8)
        scale = self._make_scale(source).to(TORCH_DTYPES[self.scale_code])
        # A scale that rounds to 0 belongs to weights that do too.
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        unit = scale.to(torch.float32) / (127 if self.scaling == "absmax" else 1)
        for rows in row_chunks(*source.shape):
            part = unit if self.scaling == "tensor" else unit[rows]
            weight[rows] = (self._values(source[rows]) / part).round_().clamp_(-128, 127).to(torch.int8)
        beside = self._scale_shape(shape)
        parts = {"weight": weight.view(shape), self._scale_role: scale.reshape(beside)}
        return parts | {"zero_point": torch.zeros(beside, dtype=torch.int8)} if self.zeros else parts

    def _values(self, source: Tensor) -> Tensor:
        """Rows as they are stored but for the scale: float32, rotated."""
        values = source.to(torch.float32)
        return rotate(values, self.group).div_(root(self.group)) if self.group else values

    def _make_scale(self, source: Tensor) -> Tensor:
        """float32 [rows, 1], or [] for one scale."""
        peak = torch.zeros(source.shape[0], 1, device=source.device)
        if source.shape[1]:
            for rows in row_chunks(*source.shape):
                peak[rows] = self._values(source[rows]).abs().amax(1, keepdim=True)
        if self.scaling == "tensor":
            peak = peak.amax() if peak.numel() else peak.sum()
        return peak if self.scaling == "absmax" else peak / 127

    @property
    def _scale_role(self) -> str:
        return "scb" if self.scaling == "absmax" else "scale"

    def _scale_shape(self, shape: Shape) -> Shape:
        return {"tensor": (), "row": (shape[0], 1) if shape else (), "absmax": shape[:1]}[self.scaling]


def _recognise(stored: Mapping[str, StoredPart]) -> Recognised | None:
    weight = stored.get("weight")
    if weight is None or weight.dtype != "I8":
        return None
    encoding = _encoding(weight.shape, stored)
    if encoding is None or not encoding.fits(weight.shape):
        return None
    return Recognised(encoding, weight.shape, tuple(part.role for part in encoding.layout(weight.shape)))


def _encoding(shape: Shape, stored: Mapping[str, StoredPart]) -> Int8 | None:
    scb, scale = stored.get("scb"), stored.get("scale")
    if scb is not None:
        good = scale is None and scb.dtype in FLOAT_CODES and scb.shape == shape[:1] and len(shape) == 2
        return Int8("absmax", scb.dtype) if good else None
    if scale is None or scale.dtype not in FLOAT_CODES or not shape:
        return None
    group = rotation_of(stored.get("comfy_quant"))
    if group is None or (group and not is_rotation(group)):
        return None
    zero = stored.get("zero_point")
    if zero is not None and (group or zero.dtype != "I8" or zero.shape != scale.shape):
        return None
    if scale.shape in ((), (1,), (1, 1)):
        return Int8("tensor", scale.dtype, group, zero is not None)
    if scale.shape in ((shape[0],), (shape[0], 1)):
        return Int8("row", scale.dtype, group, zero is not None)
    return None


FAMILY = Family(
    MappingProxyType({"int8": Int8(), "int8_tensor": Int8("tensor"), "int8_convrot": Int8(group=256)}),
    _recognise,
    MappingProxyType({"int8_tensorwise": True}),
)
