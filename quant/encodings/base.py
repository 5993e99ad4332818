"""What every encoding offers, and how a family of encodings is found in a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from lowvram.errors import NonFiniteError
from lowvram.quant.refs import Shape, stored_bytes
from lowvram.quant.spec import numel
from lowvram.triton_kernels.gemm import QuantisedMatrix
from lowvram.triton_kernels.quantise import Form

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
        "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    }
)  # fmt: skip
"""torch dtype of each dtype code that parts are given to `decode` in."""

FLOAT_CODES = ("F32", "BF16", "F16")
"""Dtype codes that scales come in."""

CHUNK_ELEMENTS = 1 << 22
"""Elements converted at once through float32: bounds the temporary memory of decode and encode to 16 MiB."""


@dataclass(frozen=True, slots=True)
class PartLayout:
    """One part of an encoded tensor: what must be stored for it."""

    role: str
    dtype: str
    """safetensors dtype code."""
    shape: Shape
    nbytes: int


def part_layout(role: str, dtype: str, shape: Shape) -> PartLayout:
    return PartLayout(role, dtype, shape, stored_bytes(dtype, shape))


class Encoding(ABC):
    """How bytes become numbers. Subclasses are frozen dataclasses: hashable, compared by value."""

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `encoding_by_name` and `--weights` know: "bf16", "fp8_scaled", ..."""

    @abstractmethod
    def layout(self, shape: Shape) -> tuple[PartLayout, ...]:
        """The parts that store a tensor of the logical `shape`."""

    def decode(
        self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """The numbers, as a dense tensor of `shape` and `dtype`.

        `parts` holds the typed tensor of each role; sizes of 1 may differ from `layout`. With `out` (of that
        shape and dtype) the result is written there and nothing of the size of the tensor is allocated;
        without, the result may share memory with a part that already is it.
        """
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=next(iter(parts.values())).device)
        check_shape(tuple(out.shape), shape, "out")
        self._decode(parts, shape, out)
        return out

    @abstractmethod
    def _decode(self, parts: Mapping[str, Tensor], shape: Shape, out: Tensor) -> None:
        """Write the numbers into `out`, which has `shape`."""

    def encode(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of `tensor`, as `layout` lists them. NonFiniteError on NaN or infinity, ValueError for a tensor
        that does not fit."""
        shape = tuple(tensor.shape)
        if not self.fits(shape):
            raise ValueError(f"{self.name} cannot hold a tensor of shape {list(shape)}")
        return self._encode(tensor, shape)

    @abstractmethod
    def _encode(self, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
        """The parts of a tensor that fits."""

    def nbytes(self, shape: Shape) -> int:
        """Stored bytes of a tensor of the logical `shape`."""
        return sum(part.nbytes for part in self.layout(shape))

    def fits(self, shape: Shape) -> bool:
        """Whether a tensor of `shape` can be stored in this encoding."""
        return True

    @property
    def by_rows(self) -> bool:
        """Whether every part of a matrix either has a row for each of its rows or serves them all: any rows of the
        parts then decode to the same rows of the matrix."""
        return False

    @property
    def w8a8(self) -> Form | None:
        """What activations a matrix is multiplied by as it is stored, "int8" or "fp8": `w8a8_matrix` then gives it."""
        return None

    def w8a8_matrix(self, parts: Mapping[str, Tensor], shape: Shape) -> QuantisedMatrix:
        """A matrix [out, in] for multiplication by activations of 8 bits. Nothing of its size is made."""
        raise NotImplementedError(f"{self.name} is not made of rows of 8 bits")


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Dtype code and shape of one stored tensor that belongs to a weight."""

    dtype: str
    """safetensors dtype code, or the name of a GGUF block type."""
    shape: Shape
    note: Mapping[str, object] | None = None
    """What the tensor says, if it is a small JSON text ("comfy_quant", "quant_state")."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a family made of the stored tensors of one weight."""

    encoding: Encoding
    shape: Shape
    """Logical shape."""
    roles: tuple[str, ...]
    """The stored roles that `decode` needs; others (activation scales) may be left on disk."""
    flat: bool = False
    """Whether `shape` is [rows, columns] of a grouping only: the file does not say the shape, its bias does."""


@dataclass(frozen=True, slots=True)
class Family:
    """A file of this folder, for the registry."""

    names: Mapping[str, Encoding]
    """Encodings that can be asked for by name, aliases included."""
    recognise: Callable[[Mapping[str, StoredPart]], Recognised | None]
    """Stored tensors of one weight by role -> what they are; None if they are not of this family."""
    formats: Mapping[str, bool] = field(default_factory=dict)
    """Names this family has in ComfyUI's per-layer notes, and whether a layer of that format may be rotated."""


def rows_columns(shape: Shape) -> tuple[int, int]:
    """Sizes of a tensor taken as a matrix of its rows: [N, everything else]; of a scalar 1 and 1."""
    return (shape[0], numel(shape[1:])) if shape else (1, 1)


def check_shape(found: Shape, expected: Shape, what: str) -> None:
    """ValueError if a tensor handed to decode has the wrong shape: a bug of the caller, not of a file."""
    if found != expected:
        raise ValueError(f"{what} has shape {list(found)}, expected {list(expected)}")


def finite_peak(tensor: Tensor, dim: int | None = None) -> Tensor:
    """float32 largest magnitude, of the whole tensor or along `dim` (kept); NonFiniteError if not finite."""
    peak = tensor.abs().amax() if dim is None else tensor.abs().amax(dim, keepdim=True)
    if not bool(torch.isfinite(peak).all()):
        raise NonFiniteError(
            "a weight holds NaN or infinity",
            expected="finite weights",
            advice="take an undamaged copy of the file; if the values are only too large for fp16, use bf16",
        )
    return peak.to(torch.float32)


def row_chunks(rows: int, columns: int, of: int = 1) -> Iterator[slice]:
    """Slices over `rows` rows of `columns` elements, of at most CHUNK_ELEMENTS elements (but at least a row); with `of`
    of no more than that part of CHUNK_ELEMENTS, and of all elements."""
    step = max(1, min(CHUNK_ELEMENTS, rows * columns) // of // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
