"""Which encodings a card decodes with kernels, and how: each is tried there against its own `decode` before a run.

The kernels give the same bits, so where a weight lies, and what decodes it, changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from lowvram.quant.encodings.base import TORCH_DTYPES, Encoding, rows_columns
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.int4 import ConvrotInt4, QuantoInt4
from lowvram.quant.encodings.int8 import BNB_FACTOR, Int8
from lowvram.quant.encodings.kquants import BLOCK_SIZES, Blocks
from lowvram.quant.encodings.mxfp8 import Mxfp8
from lowvram.quant.encodings.nf4 import Bnb4
from lowvram.quant.encodings.nvfp4 import Nvfp4
from lowvram.quant.refs import Shape
from lowvram.quant.spec import numel
from lowvram.triton_kernels import dequant
from lowvram.triton_kernels.dispatch import kernels_obstacle, told
from lowvram.triton_kernels.hadamard import factors

Parts = Mapping[str, Tensor]
_ROWS = 160
"""Rows of a weight that are tried: more than one tile of 128, and not a whole number of them."""


def _fp8(encoding: Fp8, parts: Parts, out: Tensor) -> None:
    weight, form = parts["weight"].view(torch.uint8), "e4m3" if encoding.code == "F8_E4M3" else "e5m2"
    flat = encoding.scaling in ("none", "tensor") or out.dim() < 2
    shape = (1, -1) if flat else rows_columns(tuple(out.shape))
    weight, target = weight.reshape(shape), out.view(shape)
    if encoding.scaling == "none":
        dequant.scaled_(target, weight, weight, form, "none", [1, 1], 1.0)
        return
    scale = parts["scale"]
    if encoding.scaling in ("tensor", "row"):
        dequant.scaled_(target, weight, scale.reshape(-1), form, "row", [1, 1], 1.0)
        return
    tile = [1 if encoding.scaling == "block" else encoding.block, encoding.block]
    bands = -(-weight.shape[0] // tile[0])
    dequant.scaled_(target, weight, scale.reshape(bands, -1), form, "tile", tile, 1.0)


def _int8(encoding: Int8, parts: Parts, out: Tensor) -> None:
    if encoding.group:
        dequant.rotated_(out, parts["weight"], parts["scale"].reshape(-1), encoding.group)
        return
    factor, scale = (BNB_FACTOR, parts["scb"]) if encoding.scaling == "absmax" else (1.0, parts["scale"])
    shape = (1, -1) if encoding.scaling == "tensor" else rows_columns(tuple(out.shape))
    weight = parts["weight"].reshape(shape)
    dequant.scaled_(out.view(shape), weight, scale.reshape(-1), "int8", "row", [1, 1], factor)


def _convrot4(encoding: ConvrotInt4, parts: Parts, out: Tensor) -> None:
    dequant.rotated_(out, parts["weight"], parts["scale"].reshape(-1), encoding.group)


def _blocks(encoding: Blocks, parts: Parts, out: Tensor) -> None:
    elements, nbytes = BLOCK_SIZES[encoding.kind]
    dequant.blocks_(out.view(-1, elements), parts["weight"].reshape(-1, nbytes), encoding.kind)


def _mxfp8(encoding: Mxfp8, parts: Parts, out: Tensor) -> None:
    dequant.mxfp8_(out, *(parts[role].view(torch.uint8) for role in ("weight", "scale")))


def _nvfp4(encoding: Nvfp4, parts: Parts, out: Tensor) -> None:
    dequant.nvfp4_(
        out, parts["weight"], parts["scale"].view(torch.uint8), encoding.tensor_scale(parts),
        parts.get("pre_quant_scale"), encoding.tensorwide == "scale",
    )  # fmt: skip


def _bnb4(encoding: Bnb4, parts: Parts, out: Tensor) -> None:
    table = parts["quant_map"]
    outer = (parts["nested_absmax"], parts["nested_quant_map"]) if encoding.nested else (table, table)
    dequant.levels_(
        out.view(-1), parts["weight"], parts["absmax"], table, *outer,
        encoding.block, encoding.nested, encoding.offset,
    )  # fmt: skip


def _quanto(encoding: QuantoInt4, parts: Parts, out: Tensor) -> None:
    dequant.halves_(out.view(-1), parts["packed"], parts["scale"], parts["shift"], encoding.group)


_DECODERS: Mapping[type[Encoding], Callable[..., None]] = MappingProxyType(
    {
        Fp8: _fp8,
        Int8: _int8,
        QuantoInt4: _quanto,
        ConvrotInt4: _convrot4,
        Bnb4: _bnb4,
        Nvfp4: _nvfp4,
        Mxfp8: _mxfp8,
        Blocks: _blocks,
    }
)


def has_kernel(encoding: Encoding) -> bool:
    """Whether there is a kernel for an encoding, on whatever card."""
    if isinstance(encoding, Int8) and encoding.zeros:
        return False
    if isinstance(encoding, Int8 | ConvrotInt4) and encoding.group and not factors(encoding.group):
        return False
    return type(encoding) in _DECODERS


def decode(encoding: Encoding, parts: Parts, out: Tensor) -> Tensor:
    """`encoding.decode(parts, out.shape, out.dtype, out)` by its kernel. KeyError if it has none."""
    if out.numel():
        _DECODERS[type(encoding)](encoding, parts, out)
    return out


def try_encoding(
    encoding: Encoding, shape: Shape, device: torch.device, dtypes: Sequence[torch.dtype]
) -> str:
    """What is wrong with the kernel of an encoding on a device, "" if nothing: random bytes of every value, infinite
    ones too, as a weight of some rows of `shape`, have to become the numbers of torch, bit for bit."""
    some = (min(shape[0], _ROWS), *shape[1:])
    some = some if encoding.fits(some) else shape
    try:
        parts = random_parts(encoding, some, device)
        for dtype in dtypes:
            want = encoding.decode(parts, some, dtype)
            got = decode(encoding, parts, torch.full_like(want, 7))
            if not same_bits(got, want):
                return f"other numbers than torch in {str(dtype).removeprefix('torch.')}"
    except Exception as problem:  # noqa: BLE001  whatever a compiler throws
        return told(problem)
    return ""


def random_parts(encoding: Encoding, shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Parts as a hostile file may hold them: whole numbers and 8-bit floats of any bits, scales of any size."""
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for part in encoding.layout(shape):
        dtype = TORCH_DTYPES[part.dtype]
        if dtype.itemsize == 1:
            bits = torch.randint(0, 256, (numel(part.shape),), generator=generator, dtype=torch.uint8)
            parts[part.role] = bits.view(dtype).view(part.shape).to(device)
        else:
            parts[part.role] = torch.randn(part.shape, generator=generator).to(device, dtype)
    return parts


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, the sign of zero included; any NaN is as good as another."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def choose(
    encodings: Mapping[Encoding, Shape], device: torch.device, arch: str, dtypes: Sequence[torch.dtype]
) -> tuple[frozenset[Encoding], tuple[str, ...]]:
    """Of `encodings`, with the shape of one weight of each: those that kernels decode, and a note for each that torch
    decodes although this is a card. On a CPU there are neither."""
    if not arch:
        return frozenset(), ()
    fused, notes = set(), []
    for encoding, shape in encodings.items():
        wrong = kernels_obstacle(arch) if has_kernel(encoding) else "there is no kernel for it"
        wrong = wrong or try_encoding(encoding, shape, device, dtypes)
        if wrong:
            notes.append(f"{encoding.name} is decoded by torch: {wrong}")
        else:
            fused.add(encoding)
    return frozenset(fused), tuple(notes)
