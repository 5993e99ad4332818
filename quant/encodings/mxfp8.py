"""MXFP8: e4m3 numbers with a power of two for 32 of a row (OCP Microscaling Formats 1.0).

Layouts read: ComfyUI's mxfp8 layers, and LightX2V's, which call all bytes uint8. W = q * 2^(e - 127), where e = 0 stands
for 0. The exponents lie in the order of tensor cores, as those of NVFP4 do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

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
from lowvram.quant.encodings.fp8 import wide_chunks, widened
from lowvram.quant.encodings.tiles import from_tiles, tiled_shape, to_tiles
from lowvram.quant.refs import Shape
from lowvram.quant.spec import numel

_GROUP = 32
_E4M3, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
_LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Mxfp8(Encoding):
    """A weight [N, K], both multiples of 32. Parts: "weight" [N, K] and "scale" [N up to 128s, K/32 up to 4s]."""

    weight_code: str = "F8_E4M3"
    """Dtype code of the numbers; with "U8" the bytes are e4m3 all the same."""
    scale_code: str = "F8_E8M0"
    """Dtype code of the exponents; with "U8" the bytes are e8m0 all the same."""

    @property
    def name(self) -> str:
        return "mxfp8"

    def layout(self, shape: Shape) -> tuple[PartLayout, ...]:
        rows, columns = shape
        return (
            part_layout("weight", self.weight_code, shape),
            part_layout("scale", self.scale_code, tiled_shape(rows, columns // _GROUP)),
        )

    def fits(self, shape: Shape) -> bool:
        """Weights are padded to 32s, and a padded file no longer says what they were."""
        return len(shape) == 2 and not shape[0] % _GROUP and not shape[1] % _GROUP

    def _decode(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor) -> None:
        """The product in float32, where it is exact, rounded once."""
        rows, columns = shape
        weight = parts["weight"].view(torch.uint8).reshape(shape).view(_E4M3)
        exponents = from_tiles(parts["scale"].view(torch.uint8), rows, columns // _GROUP)
        scales = torch.where(exponents == 0, 0.0, exponents.view(_E8M0).to(torch.float32)).unsqueeze(2)
        for chunk in wide_chunks(weight, rows, columns):
            values = widened(weight[chunk]).view(-1, columns // _GROUP, _GROUP)
            out[chunk].copy_(values.mul_(scales[chunk]).view(-1, columns))
            del values

    def _encode(self, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
        """The smallest power of two with which a group fits e4m3; then nearest, ties to even."""
        rows, columns = shape
        if tensor.numel():
            finite_peak(tensor)
        weight = torch.empty(shape, dtype=_E4M3, device=tensor.device)
        scales = torch.zeros(rows, columns // _GROUP, dtype=torch.uint8, device=tensor.device)
        for chunk in row_chunks(rows, columns) if tensor.numel() else ():
            groups = tensor[chunk].to(torch.float32).view(-1, columns // _GROUP, _GROUP)
            peak = groups.abs().amax(2, keepdim=True) / _LARGEST
            mantissa, exponent = torch.frexp(peak)
            # 2^n >= peak: frexp gives peak = mantissa * 2^exponent with mantissa in [0.5, 1).
            exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_(-126, 127)
            weight[chunk] = (
                torch.ldexp(groups, -exponent).clamp_(-_LARGEST, _LARGEST).view(-1, columns).to(_E4M3)
            )
            stored = torch.where(peak > 0, exponent + 127, torch.zeros_like(exponent))
            scales[chunk] = stored.squeeze(2).to(torch.uint8)
        tiles = to_tiles(scales)
        return {
            "weight": weight if self.weight_code != "U8" else weight.view(torch.uint8),
            "scale": tiles if self.scale_code == "U8" else tiles.view(_E8M0),
        }


def _recognise(stored: Mapping[str, StoredPart]) -> Recognised | None:
    weight, scale = stored.get("weight"), stored.get("scale")
    if weight is None or scale is None or weight.dtype not in ("F8_E4M3", "U8"):
        return None
    if scale.dtype not in ("F8_E8M0", "U8"):
        return None
    encoding = Mxfp8(weight.dtype, scale.dtype)
    if not encoding.fits(weight.shape) or not numel(weight.shape):
        return None
    if scale.shape != encoding.layout(weight.shape)[1].shape:
        return None
    return Recognised(encoding, weight.shape, ("weight", "scale"))


FAMILY = Family(MappingProxyType({"mxfp8": Mxfp8()}), _recognise, MappingProxyType({"mxfp8": False}))
