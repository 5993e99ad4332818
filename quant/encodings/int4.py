"""4-bit integers: quanto's qint4 (scale and shift per group) and ComfyUI's convrot_w4a4 (rotated, a scale per row)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

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
)
from lowvram.quant.encodings.notes import rotation_of
from lowvram.quant.refs import Shape
from lowvram.quant.spec import numel
from lowvram.triton_kernels.hadamard import is_rotation, root, rotate, rotate_whole


@dataclass(frozen=True, slots=True)
class QuantoInt4(Encoding):
    """Groups of `group` weights of a row, q in 0..15: W = scale * q - shift, or scale * (q - shift) for a whole shift.

    Parts: "packed" uint8 [ceil(groups/2), group], where byte row r holds group r in its low nibbles and group
    r + ceil(groups/2) in its high ones; "scale" and "shift" [groups, 1].
    """

    group: int = 128
    scale_code: str = "BF16"
    """Dtype code of the scales."""
    shift_code: str = "BF16"
    """Dtype code of the shifts; "I8" for whole ones."""

    @property
    def name(self) -> str:
        return "int4" if self.group == 128 else f"int4_group{self.group}"

    def layout(self, shape: Shape) -> tuple[PartLayout, ...]:
        groups = numel(shape) // self.group
        return (
            part_layout("packed", "U8", (-(-groups // 2), self.group)),
            part_layout("scale", self.scale_code, (groups, 1)),
            part_layout("shift", self.shift_code, (groups, 1)),
        )

    def fits(self, shape: Shape) -> bool:
        return len(shape) == 2 and shape[1] % self.group == 0

    def _decode(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor) -> None:
        """The formula in float32, rounded once."""
        packed = parts["packed"]
        groups, half = numel(shape) // self.group, packed.shape[0]
        scale = parts["scale"].to(torch.float32).reshape(groups, 1)
        shift = parts["shift"].to(torch.float32).reshape(groups, 1)
        target = out.view(groups, self.group)
        for start, stop, high in ((0, half, False), (half, groups, True)):
            for rows in row_chunks(stop - start, self.group):
                here = slice(start + rows.start, start + rows.stop)
                target[here].copy_(self._decode_groups(packed[rows], high, scale[here], shift[here]))

    def _decode_groups(self, packed: Tensor, high: bool, scale: Tensor, shift: Tensor) -> Tensor:
        q = packed >> 4 if high else packed & 15
        if self.shift_code == "I8":
            return (q - shift).mul_(scale)
        return (q * scale).sub_(shift)

    def _encode(self, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
        """Each group from its least to its largest value; scale and shift are rounded to their dtype first."""
        if self.shift_code == "I8":
            raise ValueError(f"{self.name} with whole shifts is only read")
        if tensor.numel():
            finite_peak(tensor)
        source = tensor.reshape(-1, self.group)
        groups, codes = source.shape[0], torch.empty(source.shape, dtype=torch.uint8, device=tensor.device)
        scale = torch.empty(groups, 1, dtype=TORCH_DTYPES[self.scale_code], device=tensor.device)
        shift = torch.empty(groups, 1, dtype=TORCH_DTYPES[self.shift_code], device=tensor.device)
        for rows in row_chunks(groups, self.group):
            values = source[rows].to(torch.float32)
            low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
            scale[rows] = ((high - low) / 15).to(scale.dtype)
            shift[rows] = (-low).to(shift.dtype)
            unit = scale[rows].to(torch.float32)
            unit = torch.where(unit > 0, unit, torch.ones_like(unit))
            codes[rows] = ((values + shift[rows]) / unit).round_().clamp_(0, 15).to(torch.uint8)
        packed = codes[: -(-groups // 2)].clone()
        packed[: groups // 2] |= codes[len(packed) :] << 4
        return {"packed": packed, "scale": scale, "shift": shift}


@dataclass(frozen=True, slots=True)
class ConvrotInt4(Encoding):
    """Signed 4-bit integers of a weight [N, K] rotated in groups of columns: W = q * scale of the row, rotated back.

    Parts: "weight" int8 [N, K/2], the even column in the low nibble, and "scale" [N].
    """

    group: int = 256
    """Columns rotated together."""
    scale_code: str = "F32"
    """Dtype code of the scales."""

    @property
    def name(self) -> str:
        return "int4_convrot" if self.group == 256 else f"int4_convrot{self.group}"

    def layout(self, shape: Shape) -> tuple[PartLayout, ...]:
        weight = part_layout("weight", "I8", (shape[0], shape[1] // 2))
        return (weight, part_layout("scale", self.scale_code, (shape[0],)))

    def fits(self, shape: Shape) -> bool:
        return len(shape) == 2 and shape[1] % self.group == 0

    def _decode(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor) -> None:
        """float32, rounded once. The rotation is undone on the integers, so it adds no error."""
        weight = parts["weight"].reshape(shape[0], shape[1] // 2)
        scale = parts["scale"].to(torch.float32).reshape(shape[0], 1) / root(self.group)
        for rows in row_chunks(*shape):
            out[rows].copy_(rotate_whole(_signed(weight[rows]), self.group).mul_(scale[rows]))

    def _encode(self, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
        """Rounds to nearest even; scales are amax / 7 of the rotated rows."""
        if tensor.numel():
            finite_peak(tensor)
        weight = torch.empty(shape[0], shape[1] // 2, dtype=torch.int8, device=tensor.device)
        scale = torch.ones(shape[0], dtype=TORCH_DTYPES[self.scale_code], device=tensor.device)
        for rows in row_chunks(*shape) if tensor.numel() else ():
            values = rotate(tensor[rows].to(torch.float32), self.group) / root(self.group)
            part = (values.abs().amax(1) / 7).to(scale.dtype)
            scale[rows] = torch.where(part > 0, part, torch.ones_like(part))
            q = (values / scale[rows].to(torch.float32).unsqueeze(1)).round_().clamp_(-7, 7).to(torch.int8)
            weight[rows] = (q[:, ::2] & 15) | q[:, 1::2] << 4
        return {"weight": weight, "scale": scale}


def _signed(packed: Tensor) -> Tensor:
    """int8 [rows, m], a number from -8 to 7 in each nibble, the low one first -> int8 [rows, 2m]."""
    return torch.stack([((packed & 15) ^ 8) - 8, packed >> 4], 2).flatten(1)


def _recognise(stored: Mapping[str, StoredPart]) -> Recognised | None:
    packed, note = stored.get("packed"), stored.get("comfy_quant")
    if packed is not None:
        return _quanto(packed, stored)
    if note is None or note.note is None or note.note.get("format") != "convrot_w4a4":
        return None
    weight, scale, group = stored.get("weight"), stored.get("scale"), rotation_of(note, always=True)
    if weight is None or scale is None or group is None or not is_rotation(group):
        return None
    if weight.dtype != "I8" or len(weight.shape) != 2 or scale.dtype not in FLOAT_CODES:
        return None
    shape, encoding = (weight.shape[0], weight.shape[1] * 2), ConvrotInt4(group, scale.dtype)
    if scale.shape not in (shape[:1], (shape[0], 1)) or not encoding.fits(shape):
        return None
    return Recognised(encoding, shape, ("weight", "scale"))


def _quanto(packed: StoredPart, stored: Mapping[str, StoredPart]) -> Recognised | None:
    scale, shift = stored.get("scale"), stored.get("shift")
    if scale is None or shift is None or packed.dtype != "U8" or len(packed.shape) != 2:
        return None
    if (
        scale.dtype not in FLOAT_CODES
        or shift.dtype not in (*FLOAT_CODES, "I8")
        or scale.shape != shift.shape
    ):
        return None
    groups = numel(scale.shape)
    if (
        scale.shape not in ((groups,), (groups, 1))
        or packed.shape[0] != -(-groups // 2)
        or not packed.shape[1]
    ):
        return None
    # Groups are cut from rows, but nothing here says how many make a row.
    flat = (groups, packed.shape[1])
    return Recognised(
        QuantoInt4(packed.shape[1], scale.dtype, shift.dtype), flat, ("packed", "scale", "shift"), True
    )


FAMILY = Family(
    MappingProxyType({"int4": QuantoInt4(), "int4_convrot": ConvrotInt4()}),
    _recognise,
    MappingProxyType({"convrot_w4a4": True}),
)
