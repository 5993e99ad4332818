"""Layouts of weights that lowvram reads and `lowvram quantize` does not write.

Each is written by the library that owns it where that runs on a CPU, else by the formula of its published files; what
may not lose precision stays as it is, as `quantize` keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from torch import Tensor

from lowvram.quant.encodings.base import Encoding
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.int8 import Int8
from lowvram.quant.encodings.nvfp4 import Nvfp4
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import keeps_precision
from lowvram.quant.published import published

State = dict[str, Tensor]
"""Tensors by name."""


@dataclass(frozen=True, slots=True)
class Layout:
    encoding: str
    """Name of what its matrices are recognised as."""
    writer: str
    """Who writes it here."""
    write: Callable[[State, Path], None]
    """Writes a transformer in its native names to a file."""
    suffix: str = ".safetensors"


def _by_matrix(parts_of: Callable[[str, Tensor], State]) -> Callable[[State, Path], None]:
    """A safetensors file in which `parts_of(layer, weight)` stands for the weight of every layer that is quantised."""

    def write(state: State, path: Path) -> None:
        kept = {n: t for n, t in state.items() if keeps_precision(n, tuple(t.shape))}
        stored = dict(kept)
        for name in sorted(state.keys() - kept.keys()):
            stored |= parts_of(name.removesuffix(".weight"), state[name].to(torch.float32))
        save_file({n: t.contiguous() for n, t in stored.items()}, path)

    return write


def _bitsandbytes_4bit(kind: str) -> Callable[[str, Tensor], State]:
    """With the scales quantised too: "double quantisation"."""

    def parts(layer: str, weight: Tensor) -> State:
        packed, state = bnb.quantize_4bit(
            weight.bfloat16(), blocksize=64, quant_type=kind, compress_statistics=True
        )
        beside = {f"{layer}.weight.{k}": t.clone() for k, t in state.as_dict(packed=True).items()}
        return {f"{layer}.weight": packed} | beside

    return parts


def _bitsandbytes_int8(layer: str, weight: Tensor) -> State:
    codes, scb, _ = bnb.int8_vectorwise_quant(weight.half())
    return {f"{layer}.weight": codes, f"{layer}.SCB": scb}


def _torchao_int8(layer: str, weight: Tensor) -> State:
    """q in -128..127 from the least to the largest of a row: weight = (q - zero) * scale."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-128 - low / scale).round()
    codes = (weight / scale + zero).round().clamp(-128, 127)
    return {
        f"{layer}._weight_qdata": codes.to(torch.int8),
        f"{layer}._weight_scale": scale,
        f"{layer}._weight_zero_point": zero.to(torch.int8),
    }


def _lightx2v_alpha(layer: str, weight: Tensor) -> State:
    parts = Nvfp4("alpha").encode(weight)
    names = {"weight": "weight", "scale": "weight_scale"}
    return {f"{layer}.{names.get(role, role)}": part for role, part in parts.items()}


def _formula(encoding: Encoding) -> Callable[[str, Tensor], State]:
    """The formula of the encoding, in the names of its published files."""

    def parts(layer: str, weight: Tensor) -> State:
        form = published(encoding, tuple(weight.shape))
        stored = {f"{layer}{form.names[role]}": part for role, part in encoding.encode(weight).items()}
        notes = {
            f"{layer}{n}": torch.frombuffer(bytearray(t), dtype=torch.uint8) for n, t in form.notes.items()
        }
        return stored | notes

    return parts


def _gguf(kind: GGMLQuantizationType) -> Callable[[State, Path], None]:
    """A GGUF file with matrices of one plain type; the rest in float32, as published files have it."""

    def write(state: State, path: Path) -> None:
        writer = gguf.GGUFWriter(path, "wan")
        for name, tensor in state.items():
            keeps = keeps_precision(name, tuple(tensor.shape))
            form = GGMLQuantizationType.F32 if keeps else kind
            writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), form), raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


def _ours(*encodings: Encoding) -> dict[str, Layout]:
    return {e.name: Layout(e.name, "its formula", _by_matrix(_formula(e))) for e in encodings}


LAYOUTS: Mapping[str, Layout] = {
    "nf4_nested": Layout("nf4_nested", "bitsandbytes", _by_matrix(_bitsandbytes_4bit("nf4"))),
    "fp4_nested": Layout("fp4_nested", "bitsandbytes", _by_matrix(_bitsandbytes_4bit("fp4"))),
    "int8_bnb": Layout("int8_bnb", "bitsandbytes", _by_matrix(_bitsandbytes_int8)),
    "int8_zero": Layout("int8_zero", "its formula", _by_matrix(_torchao_int8)),
    "gguf_f16": Layout("fp16", "gguf", _gguf(GGMLQuantizationType.F16), ".gguf"),
    "gguf_bf16": Layout("bf16", "gguf", _gguf(GGMLQuantizationType.BF16), ".gguf"),
    "gguf_f32": Layout("fp32", "gguf", _gguf(GGMLQuantizationType.F32), ".gguf"),
    "nvfp4_lightx2v_alpha": Layout("nvfp4_lightx2v_alpha", "its formula", _by_matrix(_lightx2v_alpha)),
    "fp64": Layout("fp64", "safetensors", _by_matrix(_formula(Plain("F64")))),
    **_ours(Fp8("F8_E5M2"), Fp8("F8_E4M3", "block", 128), Int8("tensor", group=256)),
}
"""By the name of the row in the table."""
