"""4-bit levels of bitsandbytes: NF4 and FP4, in flat blocks with one scale each, which may be quantised themselves.

W = quant_map[code] * absmax of the block; with nested scales absmax = nested_quant_map[code] * nested_absmax of a
block of scales + offset. The tables are parts of the file and travel with the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.quant.encodings.base import (
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
from lowvram.quant.refs import Shape
from lowvram.quant.spec import numel

_LEVELS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "nf4": (
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ),
        "fp4": tuple(s * v for s in (1, -1) for v in (0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12)),
    }
)  # fmt: skip
"""By code. NF4: quantiles of the normal distribution (Dettmers et al. 2023, appendix E). FP4: e2m1 over its largest
value, with a smaller subnormal. Only for encoding: files carry their own table."""

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Bnb4(Encoding):
    """Codes of the flattened tensor, blocks of `block`.

    Parts: "weight" uint8 [ceil(n/2), 1], the even element in the high nibble; "absmax" [blocks], "quant_map" [16];
    with `nested` also "nested_absmax" [ceil(blocks / nested)] and "nested_quant_map" [256], "absmax" being uint8.
    """

    kind: Literal["nf4", "fp4"] = "nf4"
    block: int = 64
    nested: int = 0
    """Scales per block of scales, or 0 for scales in float32."""
    offset: float = 0.0
    """Added to nested scales."""

    @property
    def name(self) -> str:
        body = self.kind if self.block == 64 else f"{self.kind}_block{self.block}"
        return f"{body}_nested" if self.nested else body

    def layout(self, shape: Shape) -> tuple[PartLayout, ...]:
        blocks = -(-numel(shape) // self.block)
        parts = (
            part_layout("weight", "U8", (-(-numel(shape) // 2), 1)),
            part_layout("absmax", "U8" if self.nested else "F32", (blocks,)),
            part_layout("quant_map", "F32", (16,)),
        )
        if not self.nested:
            return parts
        scales = part_layout("nested_absmax", "F32", (-(-blocks // self.nested),))
        return (*parts, scales, part_layout("nested_quant_map", "F32", (256,)))

    def fits(self, shape: Shape) -> bool:
        """bitsandbytes has blocks that end in the middle; the layers of Wan never do."""
        return len(shape) >= 2 and numel(shape) % self.block == 0

    def _decode(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor) -> None:
        """The formula in float32, in the order of bitsandbytes, rounded once."""
        packed = parts["weight"].reshape(-1, self.block // 2)
        table = pair_table(parts["quant_map"].to(torch.float32), high_first=True)
        scale = self._scales(parts).unsqueeze(1)
        target = out.view(-1, self.block)
        for rows in row_chunks(target.shape[0], self.block):
            target[rows].copy_(look_up(table, packed[rows]).mul_(scale[rows]))

    def _encode(self, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
        """Nearest levels. Nested scales are rounded to 256 even steps around `offset`, a table of our own."""
        device = tensor.device
        source = tensor.reshape(-1, self.block)
        absmax = finite_peak(source, 1).squeeze(1) if tensor.numel() else torch.empty(0, device=device)
        levels = torch.tensor(_LEVELS[self.kind], dtype=torch.float32, device=device)
        parts = {"absmax": absmax, "quant_map": levels}
        if self.nested:
            parts = self._nest(absmax) | {"quant_map": levels}
        scale = self._scales(parts).unsqueeze(1)
        ordered, codes_of = levels.sort(stable=True)
        middles = (ordered[:-1] + ordered[1:]) / 2
        packed = torch.empty(source.shape[0], self.block // 2, dtype=torch.uint8, device=device)
        for rows in row_chunks(*source.shape):
            scaled = source[rows].to(torch.float32) * (1 / scale[rows].clamp(min=1e-38))
            codes = codes_of[torch.bucketize(scaled, middles)].to(torch.uint8)
            packed[rows] = pack_pairs(codes, high_first=True)
        return {"weight": packed.view(-1, 1), **parts}

    def _scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """float32 [blocks]."""
        absmax = parts["absmax"]
        if not self.nested:
            return absmax.to(torch.float32)
        scale = parts["nested_absmax"].repeat_interleave(self.nested)[: absmax.numel()]
        codes = parts["nested_quant_map"].index_select(0, absmax.to(torch.int32))
        return (codes * scale).add_(self.offset)

    def _nest(self, absmax: Tensor) -> dict[str, Tensor]:
        steps = torch.linspace(-1, 1, 256, device=absmax.device)
        blocks = functional.pad(absmax - self.offset, (0, -absmax.numel() % self.nested)).view(
            -1, self.nested
        )
        scale = blocks.abs().amax(1) if blocks.numel() else blocks.sum(1)
        codes = torch.bucketize(blocks / scale.clamp(min=1e-38).unsqueeze(1), (steps[:-1] + steps[1:]) / 2)
        flat = codes.to(torch.uint8).flatten()[: absmax.numel()]
        return {"absmax": flat, "nested_absmax": scale, "nested_quant_map": steps}


def _recognise(stored: Mapping[str, StoredPart]) -> Recognised | None:
    state = stored.get("quant_state")
    if state is None or state.note is None:
        return None
    note = state.note
    kind, shape, block = note.get("quant_type"), _shape(note.get("shape")), note.get("blocksize")
    if kind not in ("nf4", "fp4") or shape is None or type(block) is not int or block not in _BLOCK_SIZES:
        return None
    encoding = Bnb4("nf4" if kind == "nf4" else "fp4", block)
    if "nested_absmax" in stored:
        nested, offset = note.get("nested_blocksize"), note.get("nested_offset")
        if type(nested) is not int or nested not in _BLOCK_SIZES or not isinstance(offset, int | float):
            return None
        if not abs(offset) < 1e30:
            return None
        encoding = Bnb4(encoding.kind, block, nested, float(offset))
    if not encoding.fits(shape):
        return None
    layout = encoding.layout(shape)
    for part in layout:
        there = stored.get(part.role)
        if there is None or there.dtype != part.dtype or numel(there.shape) != numel(part.shape):
            return None
    return Recognised(encoding, shape, tuple(part.role for part in layout))


def _shape(value: object) -> Shape | None:
    if not isinstance(value, list) or not 2 <= len(value) <= 5:
        return None
    return tuple(value) if all(type(n) is int and 0 < n < 1 << 31 for n in value) else None


FAMILY = Family(MappingProxyType({"nf4": Bnb4(), "fp4": Bnb4("fp4")}), _recognise)
