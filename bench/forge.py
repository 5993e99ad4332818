"""Checkpoints of random numbers at the true sizes: written as fast as the disk takes them, the same every time.

A tensor is made of rows of a small random matrix of the same width, encoded once and repeated from a row that its
name decides. So nothing of the size of a tensor is computed or held, and every stored value is one that the encoding
makes: the files open, stream, decode and multiply like real ones.

    python -m lowvram.bench.forge MODEL FOLDER [--weights fp8] [--part vae]... [--store text=q8_0]...
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from lowvram.errors import LowvramError, UsageError
from lowvram.offload.writing import write_large
from lowvram.quant.encodings.base import Encoding
from lowvram.quant.encodings.kquants import Blocks
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import encoding_by_name, planned_encoding
from lowvram.quant.files.writing import GGUF_ALIGNMENT, Entry, gguf_head, safetensors_head
from lowvram.quant.names import CLIP
from lowvram.quant.published import GGUF_FILE_TYPES, published
from lowvram.quant.refs import Shape
from lowvram.quant.spec import ModelSpec, numel
from lowvram.sampling.presets import model_preset

SAMPLE_ELEMENTS = 4 << 20
"""Numbers that are really drawn for one kind of tensor."""
TOKENIZER = "spiece.model"
FILES: Mapping[str, str] = {
    "high": "high_noise_model",
    "low": "low_noise_model",
    "single": "diffusion_pytorch_model",
    "vae": "vae",
    "text": "text_encoder",
    "clip": "clip_vision",
}
"""The file of each part in the folder of a forged model, without its suffix."""
OWN: Mapping[str, str] = {"vae": "bf16", "clip": "fp16"}
"""What parts are published in, whatever the transformers are."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """Encoded rows that stand for a tensor of any height."""

    rows: int
    parts: Mapping[str, bytes]


def shapes_of(spec: ModelSpec) -> dict[str, dict[str, Shape]]:
    """Names and shapes of every part of a model, transformers first; native, but for CLIP."""
    shapes = dict.fromkeys(spec.expert_names(), spec.dit.shapes())
    shapes |= {"vae": spec.vae.shapes(), "text": spec.text.shapes()}
    if spec.clip is None:
        return shapes
    # Fused in the authors' file and of a tower of their own in Hugging Face's, which everyone else takes.
    return shapes | {
        "clip": {
            f"vision_model.{CLIP.from_native(name)}": shape for name, shape in spec.clip.shapes().items()
        }
    }


def forge_model(
    spec: ModelSpec,
    folder: Path,
    weights: str,
    seed: int = 0,
    parts: Sequence[str] = (),
    others: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Path]:
    """Write a model of `spec` into `folder`; the files by part.

    weights  what `--weights` takes: the encoding of the transformers, and of the text encoder (there fp8 for GGUF, and
             int8 for int4, which wants biases); the VAE is in bf16, CLIP in fp16
    parts    those to write, of FILES; all that the model has if empty
    others   encodings of parts that are to be stored otherwise

    The tokenizer is the embedded model's: prompts become a few ids of the vocabulary. UsageError for a part that the
    model has not.
    """
    shapes = shapes_of(spec)
    unknown = [part for part in (*parts, *others) if part not in shapes]
    if unknown:
        raise UsageError(
            f"no part {unknown[0]!r}", expected=", ".join(shapes), advice="name parts that the model has"
        )
    stored = encodings_of(spec, weights, others)
    folder.mkdir(parents=True, exist_ok=True)
    files = {part: Path(path) for part, path in forged_files(spec, folder, weights, others).items()}
    made = {part: files[part] for part in parts or tuple(shapes)}
    for part, path in made.items():
        forge(shapes[part], path, stored[part], zlib.crc32(part.encode(), seed))
    shutil.copyfile(str(resources("lowvram") / "assets" / "nano" / TOKENIZER), files["tokenizer"])
    return made


def forged_files(
    spec: ModelSpec, folder: Path, weights: str, others: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Where `forge_model` puts the parts of a model: what `Runtime.load` takes."""
    names = {
        part: FILES[part] + (".gguf" if isinstance(encoding_by_name(stored), Blocks) else ".safetensors")
        for part, stored in encodings_of(spec, weights, others).items()
    }
    return {part: str(folder / name) for part, name in names.items()} | {"tokenizer": str(folder / TOKENIZER)}


def encodings_of(spec: ModelSpec, weights: str, others: Mapping[str, str]) -> dict[str, str]:
    """What each part of a model is stored in."""
    chosen = encoding_by_name(weights)
    text = "fp8" if isinstance(chosen, Blocks) else "int8" if chosen == encoding_by_name("int4") else weights
    stored = dict.fromkeys(shapes_of(spec), weights) | {"text": text}
    return {part: others.get(part, OWN.get(part, stored[part])) for part in stored}


def forge(shapes: Mapping[str, Shape], path: Path, weights: str, seed: int = 0) -> int:
    """Write a file of random tensors of `shapes`, by native name, GGUF for its formats, else safetensors; its bytes.

    Memory: a few hundred megabytes, whatever the size of the file. StorageError if the disk does not take it.
    """
    encodings = {name: planned_encoding(name, shape, weights) for name, shape in shapes.items()}
    if isinstance(encoding_by_name(weights), Blocks):
        stored = [_block_piece(name, shape, encodings[name]) for name, shape in shapes.items()]
        keys: dict[str, str | int] = {
            "general.architecture": "wan",
            "general.file_type": GGUF_FILE_TYPES[weights],
        }
        head, align = gguf_head([s.entry for s in stored], keys), GGUF_ALIGNMENT
    else:
        stored = [piece for name, shape in shapes.items() for piece in _pieces(name, shape, encodings[name])]
        head, align = safetensors_head([s.entry for s in stored], {"format": "pt"}), 1
    write_large(path, _data(head.data, stored, shapes, encodings, align, seed))
    return head.nbytes


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor of the file: a part of a weight, or a note."""

    entry: Entry
    name: str
    """Native name of the weight."""
    role: str
    """Of the part; empty for a note."""
    note: bytes = b""


def _block_piece(name: str, shape: Shape, encoding: Encoding) -> _Piece:
    assert isinstance(encoding, Blocks | Plain)
    kind = encoding.kind if isinstance(encoding, Blocks) else encoding.code
    return _Piece(Entry(name, kind, shape), name, "weight")


def _pieces(name: str, shape: Shape, encoding: Encoding) -> Iterator[_Piece]:
    form = published(encoding, shape)
    layer = name.removesuffix(".weight") if len(form.names) > 1 or form.notes else ""
    for part in encoding.layout(shape):
        stored = layer + form.names[part.role] if layer else name
        yield _Piece(Entry(stored, part.dtype, part.shape), name, part.role)
    for suffix, note in form.notes.items():
        yield _Piece(Entry(layer + suffix, "U8", (len(note),)), name, "", note)
    for suffix in form.ones:
        yield _Piece(Entry(layer + suffix, "F32", ()), name, "", b"\x00\x00\x80\x3f")


def _data(
    head: bytes,
    stored: Sequence[_Piece],
    shapes: Mapping[str, Shape],
    encodings: Mapping[str, Encoding],
    align: int,
    seed: int,
) -> Iterator[bytes | memoryview]:
    """The bytes of the file, in order."""
    samples: dict[object, _Sample] = {}
    yield head
    for piece in stored:
        if not piece.role:
            yield piece.note
            continue
        shape, encoding = shapes[piece.name], encodings[piece.name]
        key = (encoding, shape[1:], _flavour(piece.name, shape), shape[0] if len(shape) < 2 else 0)
        if key not in samples:
            samples[key] = _sample(encoding, piece.name, shape, zlib.crc32(repr(key).encode(), seed))
        start = zlib.crc32(piece.name.encode(), seed)
        yield from _repeated(samples[key], piece.role, piece.entry.nbytes, start)
        yield bytes(-piece.entry.nbytes % align)


def _sample(encoding: Encoding, name: str, shape: Shape, seed: int) -> _Sample:
    """As many rows as are drawn of a tensor like `name`, encoded."""
    height = shape[0] if shape else 1
    rows = height if len(shape) < 2 else max(1, min(height, SAMPLE_ELEMENTS // max(1, numel(shape[1:]))))
    if rows >= 256:
        rows = rows // 256 * 256  # groups that cross rows end with the sample
    drawn = (rows, *shape[1:]) if shape else ()
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(drawn, generator=generator)
    encoded = encoding.encode(_scaled(values, name, shape))
    return _Sample(rows, {role: _bytes(part) for role, part in encoded.items()})


def _repeated(sample: _Sample, role: str, nbytes: int, seed: int) -> Iterator[memoryview]:
    """`nbytes` bytes of a part: its sample over and over, from a row that `seed` decides."""
    data = memoryview(sample.parts[role])
    if nbytes <= len(data):  # a small tensor, a table, or a scale of the whole
        yield data[:nbytes]
        return
    row = len(data) // sample.rows
    start = seed % sample.rows * row if row * sample.rows == len(data) else 0
    while nbytes:
        piece = data[start : start + nbytes]
        yield piece
        nbytes, start = nbytes - len(piece), 0


def _flavour(name: str, shape: Shape) -> str:
    module, _, leaf = name.rpartition(".")
    if "norm" in module.rpartition(".")[2] or leaf == "gamma":
        return "norm bias" if leaf == "bias" else "norm"
    if leaf == "modulation" or "embedding.weight" in name:
        return "embedding"
    return "bias" if len(shape) < 2 or leaf == "bias" else "matrix"


def _scaled(values: Tensor, name: str, shape: Shape) -> Tensor:
    """Numbers that keep a signal's size from layer to layer: norms near 1, matrices of 1 / sqrt(inputs)."""
    match _flavour(name, shape):
        case "norm":
            return 1 + 0.1 * values
        case "matrix":
            return values / math.sqrt(numel(shape[1:]))
        case "embedding":
            return 0.5 * values
        case _:
            return 0.1 * values


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = _parser().parse_args(arguments)
    spec = model_preset(options.model)
    try:
        others = dict(text.split("=") for text in options.store)
    except ValueError:
        raise UsageError(
            "a part without its encoding",
            where="--store",
            expected="PART=ENCODING, such as vae=fp32",
            advice="give both",
        ) from None
    for part in options.part or shapes_of(spec):
        began = time.perf_counter()
        path = forge_model(spec, options.folder, options.weights, 0, (part,), others)[part]
        took, nbytes = time.perf_counter() - began, path.stat().st_size
        print(f"{path}  {nbytes:,} bytes in {took:.1f} s, {nbytes / took / 1e9:.2f} GB/s", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lowvram.bench.forge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a named model, such as wan2.2-animate-14b")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", default="fp8", help="encoding of the transformers")
    parser.add_argument("--part", action="append", default=[], help="high, low, single, vae, text or clip")
    parser.add_argument(
        "--store", action="append", default=[], metavar="PART=ENCODING", help="of other parts"
    )
    return parser


if __name__ == "__main__":
    try:
        main()
    except LowvramError as error:
        raise SystemExit(str(error)) from None
