"""GGUF block formats: Q4_0 to Q8_0, the K-quants and IQ4, and the mixes of them that carry names like Q4_K_M.

A row of a matrix is a run of blocks; a block holds 32 or 256 weights with their scales in a fixed number of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lowvram.quant.encodings import ggml_pack, ggml_unpack
from lowvram.quant.encodings.base import (
    Encoding,
    Family,
    PartLayout,
    Recognised,
    StoredPart,
    check_shape,
    finite_peak,
    part_layout,
    row_chunks,
)
from lowvram.quant.refs import Shape
from lowvram.quant.spec import numel


@dataclass(frozen=True, slots=True)
class _Format:
    elements: int
    """Weights in a block."""
    nbytes: int
    """Bytes of a block."""
    unpack: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor], Tensor]


_FORMATS: Mapping[str, _Format] = MappingProxyType(
    {
        "Q8_0": _Format(32, 34, ggml_unpack.q8_0, ggml_pack.q8_0),
        "Q4_0": _Format(32, 18, ggml_unpack.q4_0, ggml_pack.q4_0),
        "Q4_1": _Format(32, 20, ggml_unpack.q4_1, ggml_pack.q4_1),
        "Q5_0": _Format(32, 22, ggml_unpack.q5_0, ggml_pack.q5_0),
        "Q5_1": _Format(32, 24, ggml_unpack.q5_1, ggml_pack.q5_1),
        "Q2_K": _Format(256, 84, ggml_unpack.q2_k, ggml_pack.q2_k),
        "Q3_K": _Format(256, 110, ggml_unpack.q3_k, ggml_pack.q3_k),
        "Q4_K": _Format(256, 144, ggml_unpack.q4_k, ggml_pack.q4_k),
        "Q5_K": _Format(256, 176, ggml_unpack.q5_k, ggml_pack.q5_k),
        "Q6_K": _Format(256, 210, ggml_unpack.q6_k, ggml_pack.q6_k),
        "IQ4_NL": _Format(32, 18, ggml_unpack.iq4_nl, ggml_pack.iq4_nl),
        "IQ4_XS": _Format(256, 136, ggml_unpack.iq4_xs, ggml_pack.iq4_xs),
    }
)

BLOCK_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {kind: (f.elements, f.nbytes) for kind, f in _FORMATS.items()}
)
"""Weights and bytes of a block, by GGUF type name. The names serve as dtype codes of GGUF headers too."""


@dataclass(frozen=True, slots=True)
class Blocks(Encoding):
    """One part "weight", uint8 [rows, bytes of a row]: the last dimension of the tensor is cut into blocks."""

    kind: str
    """GGUF type name: "Q8_0", "Q4_K", ..."""

    @property
    def name(self) -> str:
        return self.kind.lower()

    def layout(self, shape: Shape) -> tuple[PartLayout, ...]:
        elements, nbytes = BLOCK_SIZES[self.kind]
        return (part_layout("weight", "U8", (numel(shape[:-1]), shape[-1] // elements * nbytes)),)

    def fits(self, shape: Shape) -> bool:
        return bool(shape) and shape[-1] % BLOCK_SIZES[self.kind][0] == 0

    @property
    def by_rows(self) -> bool:
        return True

    def _decode(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor) -> None:
        """gguf-py's numbers in float32, rounded once."""
        form = _FORMATS[self.kind]
        blocks = parts["weight"].reshape(-1, form.nbytes)
        target = out.view(-1, form.elements)
        check_shape((blocks.shape[0],), (target.shape[0],), f"blocks of {self.kind}")
        for rows in row_chunks(blocks.shape[0], form.elements):
            target[rows].copy_(form.unpack(blocks[rows]))

    def _encode(self, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
        """Errors as the base class; also NonFiniteError if a scale is too large for fp16."""
        form = _FORMATS[self.kind]
        if tensor.numel():
            finite_peak(tensor)
        source = tensor.reshape(-1, form.elements)
        blocks = torch.empty(source.shape[0], form.nbytes, dtype=torch.uint8, device=tensor.device)
        for rows in row_chunks(source.shape[0], form.elements):
            blocks[rows] = form.pack(source[rows].to(torch.float32))
        return {"weight": blocks.view(self.layout(shape)[0].shape)}


@dataclass(frozen=True, slots=True)
class Mix:
    """A named recipe: most matrices in one type, the values and the last matrix of each FFN in better ones."""

    base: str
    value: str = ""
    """Type of self_attn.v and cross_attn.v, if not the base."""
    down: str = ""
    """Type of ffn.2, if not the base."""
    first_value: str = ""
    """Type of the values in the first `first` blocks, if not as in the others."""
    first: int = 0

    def pick(self, native: str) -> Blocks:
        """The type of the matrix with this native name."""
        kind = ""
        if native.endswith(".ffn.2.weight"):
            kind = self.down
        elif native.endswith("_attn.v.weight"):
            block = native.removeprefix("blocks.").partition(".")[0]
            early = block.isdecimal() and int(block) < self.first
            kind = self.first_value if early else self.value
        return Blocks(kind or self.base)


MIXES: Mapping[str, Mix] = MappingProxyType(
    {
        "q2_k": Mix("Q2_K", value="Q3_K"),
        "q3_k_s": Mix("Q3_K"),
        "q3_k_m": Mix("Q3_K", value="Q4_K", down="Q4_K", first_value="Q5_K", first=1),
        "q3_k_l": Mix("Q3_K", value="Q5_K", down="Q5_K"),
        "q4_k_s": Mix("Q4_K", down="Q5_K", first_value="Q5_K", first=2),
        "q4_k_m": Mix("Q4_K", value="Q6_K", down="Q6_K"),
        "q5_k_s": Mix("Q5_K"),
        "q5_k_m": Mix("Q5_K", value="Q6_K", down="Q6_K"),
        "q4_0": Mix("Q4_0", down="Q4_1"),
        "q5_0": Mix("Q5_0", down="Q5_1"),
    }
)
"""What the quantiser behind the published Wan GGUF files does (checkpoint-formats 4.1); any other name is one type
throughout. A block has two value matrices, so "the first two" are those of the first block."""


def _recognise(stored: Mapping[str, StoredPart]) -> Recognised | None:
    weight = stored.get("weight")
    if weight is None or weight.dtype not in _FORMATS or not Blocks(weight.dtype).fits(weight.shape):
        return None
    return Recognised(Blocks(weight.dtype), weight.shape, ("weight",))


FAMILY = Family(
    MappingProxyType(
        {kind.lower(): Blocks(kind) for kind in _FORMATS}
        | {name: Blocks(mix.base) for name, mix in MIXES.items()}
    ),
    _recognise,
)
