"""The headers of a checkpoint of 14 billion parameters: opened in little work and 100 MB, however large the file is."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from work import lines_run

from lowvram.offload.io import FileReader
from lowvram.quant.encodings.registry import planned_encoding
from lowvram.quant.files.writing import Entry, gguf_head, safetensors_head
from lowvram.quant.identify import identify_path
from lowvram.quant.names import DIT
from lowvram.quant.published import published
from lowvram.sampling.presets import load_models

SHAPES = load_models()["wan2.2-t2v-a14b"].dit.shapes()
LINES, BYTES = 1_000_000, 100e6


def sparse(path: Path, head: bytes, nbytes: int, notes: dict[int, bytes]) -> Path:
    """A file of its full size that takes no room on the disk."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(nbytes)
        for offset, note in notes.items():
            file.seek(offset)
            file.write(note)
    return path


def fp8(path: Path) -> Path:
    entries = [Entry("scaled_fp8", "F8_E4M3", (0,))]
    for name, shape in SHAPES.items():
        code = "F16" if planned_encoding(name, shape, "fp8").name == "bf16" else "F8_E4M3"
        entries.append(Entry(name, code, shape))
        if code == "F8_E4M3":
            entries += [
                Entry(f"{name.removesuffix('.weight')}.{s}", "F32", ())
                for s in ("scale_weight", "scale_input")
            ]
    head = safetensors_head(entries, {})
    return sparse(path / "wan.safetensors", head.data, head.nbytes, {})


def comfy_int8(path: Path) -> Path:
    entries, notes = [], {}
    for name, shape in SHAPES.items():
        encoding = planned_encoding(name, shape, "int8_convrot")
        if encoding.name == "bf16":
            entries.append(Entry(name, "F16", shape))
            continue
        form, layer = published(encoding, shape), name.removesuffix(".weight")
        for part in encoding.layout(shape):
            entries.append(Entry(layer + form.names[part.role], part.dtype, part.shape))
        for suffix, note in form.notes.items():
            entries.append(Entry(layer + suffix, "U8", (len(note),)))
            notes[layer + suffix] = note
    head = safetensors_head(entries, {})
    return sparse(
        path / "wan.safetensors", head.data, head.nbytes, {head.offsets[n]: note for n, note in notes.items()}
    )


def gguf(path: Path) -> Path:
    entries = []
    for name, shape in SHAPES.items():
        encoding = planned_encoding(name, shape, "q4_k_m")
        entries.append(
            Entry(name, {"fp32": "F32", "bf16": "BF16"}.get(encoding.name, encoding.name.upper()), shape)
        )
    head = gguf_head(entries, {"general.architecture": "wan"})
    return sparse(path / "wan.gguf", head.data, head.nbytes, {})


def shards(path: Path) -> Path:
    """Six shards in float32 with diffusers' names, as published."""
    weight_map = {}
    for n in range(6):
        file = f"diffusion_pytorch_model-0000{n + 1}-of-00006.safetensors"
        names = {str(DIT.from_native(name)): shape for name, shape in list(SHAPES.items())[n::6]}
        weight_map |= dict.fromkeys(names, file)
        head = safetensors_head([Entry(name, "F32", shape) for name, shape in names.items()], {})
        sparse(path / file, head.data, head.nbytes, {})
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    return path


@pytest.mark.parametrize("make", [fp8, comfy_int8, gguf, shards])
def test_headers_of_a_14b_checkpoint_open_in_little_work_and_memory(make, tmp_path: Path) -> None:
    path = make(tmp_path)
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert size > 8e9
    identify_path(path, FileReader)  # once for what is only made once: compiled patterns
    found, lines = lines_run(lambda: identify_path(path, FileReader))
    assert len(found.refs) == 1095 and found.spec is not None
    assert lines < LINES
    tracemalloc.start()
    identify_path(path, FileReader)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < BYTES
    if hasattr(os.stat_result, "st_blocks"):
        assert sum(f.stat().st_blocks * 512 for f in tmp_path.iterdir()) < 50e6
