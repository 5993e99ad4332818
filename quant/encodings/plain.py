"""Weights stored as they are: float32, bfloat16, float16 (and float64, which is only read)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lowvram.quant.encodings.base import (
    TORCH_DTYPES,
    Encoding,
    Family,
    PartLayout,
    Recognised,
    StoredPart,
    finite_peak,
    part_layout,
)
from lowvram.quant.refs import Shape

_NAMES: Mapping[str, str] = MappingProxyType({"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"})


@dataclass(frozen=True, slots=True)
class Plain(Encoding):
    """One part "weight" of the tensor's own shape in the floating dtype `code`."""

    code: str

    @property
    def name(self) -> str:
        return _NAMES[self.code]

    def layout(self, shape: Shape) -> tuple[PartLayout, ...]:
        return (part_layout("weight", self.code, shape),)

    @property
    def by_rows(self) -> bool:
        return True

    def decode(
        self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            return parts["weight"].reshape(shape).to(dtype)
        return Encoding.decode(self, parts, shape, dtype, out)

    def _decode(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor) -> None:
        out.copy_(parts["weight"].reshape(shape))

    def _encode(self, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
        """One rounding to nearest even; a finite value beyond float16 is refused like an infinite one."""
        weight = tensor.to(TORCH_DTYPES[self.code])
        if weight.numel():
            finite_peak(weight)
        return {"weight": weight}


def _recognise(stored: Mapping[str, StoredPart]) -> Recognised | None:
    weight = stored.get("weight")
    if weight is None or weight.dtype not in _NAMES or "scale" in stored:
        return None
    return Recognised(Plain(weight.dtype), weight.shape, ("weight",))


FAMILY = Family(
    MappingProxyType({"bf16": Plain("BF16"), "fp16": Plain("F16"), "fp32": Plain("F32")}), _recognise
)
