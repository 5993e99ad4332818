"""How encoded weights are published: the names of their stored tensors, the notes beside them, who reads the file.

The inverse of `lowvram.quant.stored`: what is written here is recognised there, and by the programs named in
checkpoint-formats 3 (ComfyUI), 4 (GGUF), 5 (LightX2V) and 6 (quanto, bitsandbytes).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lowvram.quant.encodings.base import Encoding
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.int4 import ConvrotInt4, QuantoInt4
from lowvram.quant.encodings.int8 import Int8
from lowvram.quant.encodings.mxfp8 import Mxfp8
from lowvram.quant.encodings.nf4 import Bnb4
from lowvram.quant.encodings.nvfp4 import Nvfp4
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.refs import Shape


@dataclass(frozen=True, slots=True)
class Published:
    """How one weight of an encoding is stored."""

    names: Mapping[str, str]
    """Role of a part -> what follows the name of the layer, such as ".weight_scale"."""
    notes: Mapping[str, bytes]
    """Tensors of bytes that say more, by what follows the name of the layer."""
    ones: tuple[str, ...] = ()
    """Scalars that hold 1 because the reader wants them: scales of activations that are not quantised."""


def style_for(encoding: Encoding, kind: str, stored: str) -> str:
    """Whose key names a network of `kind`, named in the style `stored` so far, gets for the readers of `encoding`."""
    if kind == "vae" or (isinstance(encoding, Plain) and stored != "gguf"):
        return stored
    if kind == "text":
        return "hf"
    return "diffusers" if isinstance(encoding, Bnb4) else "native"


def published(encoding: Encoding, shape: Shape) -> Published:
    """How a weight of `shape` in `encoding` is stored beside its layer."""
    match encoding:
        case Fp8(scaling="tensor"):
            return Published({"weight": ".weight", "scale": ".scale_weight"}, {})
        case Fp8(scaling="row" | "block" | "tile"):
            return Published({"weight": ".weight", "scale": ".weight_scale"}, {})
        case Int8(scaling="absmax"):
            return Published({"weight": ".weight", "scb": ".SCB"}, {})
        case Int8():
            return _comfy({"format": "int8_tensorwise"} | _rotation(encoding.group))
        case ConvrotInt4():
            return _comfy({"format": "convrot_w4a4"} | _rotation(encoding.group))
        case Mxfp8():
            return _comfy({"format": "mxfp8"})
        case Nvfp4(tensorwide="scale"):
            comfy = _comfy({"format": "nvfp4"})
            return Published({**comfy.names, "scale_2": ".weight_scale_2"}, comfy.notes)
        case Nvfp4():
            names = {"weight": ".weight", "scale": ".weight_scale", "global_scale": ".weight_global_scale"}
            return Published(names, {})
        case QuantoInt4():
            roles = {"packed": "._data._data", "scale": "._scale", "shift": "._shift"}
            names = {role: f".weight{suffix}" for role, suffix in roles.items()}
            return Published(names, {}, (".input_scale", ".output_scale"))
        case Bnb4():
            return _bitsandbytes(encoding, shape)
        case _:
            return Published({"weight": ".weight"}, {})


def file_markers(encodings: Iterable[Encoding]) -> dict[str, str]:
    """Empty tensors that speak of the whole file: name -> dtype code."""
    kinds = {e.code for e in encodings if isinstance(e, Fp8) and e.scaling == "tensor"}
    return {"scaled_fp8": kinds.pop()} if len(kinds) == 1 else {}


def file_metadata(layers: Mapping[str, Encoding]) -> dict[str, str]:
    """Header metadata that readers look for; `layers` are the quantised ones by their names in the file."""
    if not any(isinstance(e, QuantoInt4) for e in layers.values()):
        return {"format": "pt"}
    table = {layer: {"weights": "qint4", "activations": "none"} for layer in layers}
    text = base64.b64encode(json.dumps(table).encode()).decode()
    return {"format": "pt", "quantization_format": "quanto", "quantization_map_base64": text}


GGUF_FILE_TYPES: Mapping[str, int] = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13,
    "q3_k": 11, "q4_k_s": 14, "q4_k": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k": 16, "q5_k_m": 17, "q6_k": 18,
    "iq4_nl": 25, "iq4_xs": 30,
}  # fmt: skip
"""`general.file_type` by the name of the mix (checkpoint-formats 4.3)."""


def _comfy(note: Mapping[str, object]) -> Published:
    text = json.dumps(note, separators=(",", ":")).encode()
    return Published({"weight": ".weight", "scale": ".weight_scale"}, {".comfy_quant": text})


def _rotation(group: int) -> dict[str, object]:
    return {"convrot": True, "convrot_groupsize": group} if group else {}


def _bitsandbytes(encoding: Bnb4, shape: Shape) -> Published:
    state: dict[str, object] = {
        "quant_type": encoding.kind,
        "blocksize": encoding.block,
        "dtype": "bfloat16",
        "shape": list(shape),
    }
    roles = ["absmax", "quant_map"]
    if encoding.nested:
        roles += ["nested_absmax", "nested_quant_map"]
        state |= {
            "nested_blocksize": encoding.nested,
            "nested_dtype": "float32",
            "nested_offset": encoding.offset,
        }
    names = {"weight": ".weight"} | {role: f".weight.{role}" for role in roles}
    key = f".weight.quant_state.bitsandbytes__{encoding.kind}"
    return Published(names, {key: json.dumps(state).encode()})
