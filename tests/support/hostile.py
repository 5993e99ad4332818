"""Files that are not what they say: what a stranger, a broken download or a fuzzer would put in the way of a parser."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

EXTREMES = (2**31, 2**63, 2**64 - 1)


def safetensors(text: str | bytes, data: int = 64, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data)


def entry(dtype: object = "F32", shape: object = (16,), offsets: object = (0, 64)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


WHOLE = safetensors(json.dumps({
    "a.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
    "b.weight": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]},
}))  # fmt: skip


def of_safetensors() -> Iterator[tuple[str, bytes]]:
    header = len(WHOLE) - 64
    for end in sorted(
        {*range(0, header, 11), 7, 8, 9, header - 1, header, header + 31, header + 32, len(WHOLE) - 1}
    ):
        yield f"cut at {end}", WHOLE[:end]
    for n in EXTREMES:
        yield f"header of {n}", safetensors("{}", length=n)
        yield f"shape {n}", safetensors('{"a":' + entry(shape=[n]) + "}")
        yield f"shape {n} x {n}", safetensors('{"a":' + entry(shape=[n, n]) + "}")
        yield f"ends at {n}", safetensors('{"a":' + entry(offsets=[0, n]) + "}")
        yield f"begins at {n}", safetensors('{"a":' + entry(offsets=[n, n + 64]) + "}")
    for name, text in {
        "overlap": '{"a":' + entry() + ',"b":' + entry() + "}",
        "hole": '{"a":' + entry(shape=[8], offsets=[32, 64]) + "}",
        "backwards": '{"a":' + entry(offsets=[64, 0]) + "}",
        "unknown dtype": '{"a":' + entry("F33") + "}",
        "wrong dtype": '{"a":' + entry("F64") + "}",
        "dtype is a number": '{"a":' + entry(7) + "}",
        "same name twice": '{"a":' + entry() + ',"\\u0061":' + entry() + "}",
        "nested": '{"a":' + "[" * 50_000 + "}",
        "half a surrogate": '{"\\ud800":' + entry() + "}",
        "an escape for the terminal": '{"\\u001b[2J":' + entry(shape=[3]) + "}",
        "a list": "[]",
        "no end": '{"a":' + entry(),
        "a long text": '{"__metadata__":{"x":"' + "y" * (2 << 20),
        "nothing known": '{"a":' + entry() + "}",
    }.items():
        yield name, safetensors(text)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def gguf(
    keys: list[bytes], tensors: list[bytes], data: int = 64, counts: tuple[int, int] | None = None
) -> bytes:
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def tensor(name: bytes, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def of_gguf() -> Iterator[tuple[str, bytes]]:
    string, array, uint64 = 8, 9, 10
    key = text(b"k") + struct.pack("<I", string)
    whole = gguf([key + text(b"value")], [tensor(b"a", (16,))])
    # behind the magic, the version and the counts, and inside every field of a key and of a tensor
    for end in sorted({*range(0, len(whole) - 64, 5), 4, 8, 16, 24, len(whole) - 64, len(whole) - 1}):
        yield f"cut at {end}", whole[:end]
    yield "offset 2^64 - 96", gguf([], [tensor(b"a", (16,), 0, 2**64 - 96)])
    listed = text(b"k") + struct.pack("<I", array)
    for n in EXTREMES:
        yield f"{n} tensors", gguf([], [], counts=(n, 0))
        yield f"{n} keys", gguf([], [], counts=(0, n))
        yield f"key of {n}", gguf([text(b"key", n)], [])
        yield f"text of {n}", gguf([key + text(b"", n)], [])
        yield f"array of {n}", gguf([listed + struct.pack("<IQ", uint64, n)], [])
        yield f"{n} texts", gguf([listed + struct.pack("<IQ", string, n)], [])
        yield f"name of {n}", gguf([], [text(b"name", n)])
        yield f"size {n}", gguf([], [tensor(b"a", (n,))])
        yield f"size {n} x {n}", gguf([], [tensor(b"a", (n, n))])
        yield f"offset {n}", gguf([], [tensor(b"a", (16,), 0, n)])
        yield f"type {n & 0xFFFFFFFF}", gguf([], [tensor(b"a", (16,), n & 0xFFFFFFFF)])
        yield f"{n & 0xFFFFFFFF} dimensions", gguf([], [text(b"a") + struct.pack("<I", n & 0xFFFFFFFF)])
    yield "array of arrays", gguf([listed + struct.pack("<IQ", array, 1) + struct.pack("<IQ", array, 1)], [])
    yield "same name twice", gguf([], [tensor(b"a", (8,)), tensor(b"a", (8,), 0, 32)])
    yield "overlap", gguf([], [tensor(b"a", (16,)), tensor(b"b", (8,), 0, 32)])
    yield "half a block", gguf([], [tensor(b"a", (8,), 2)])
    alignment = text(b"general.alignment") + struct.pack("<II", 4, 3)
    yield "alignment 3", gguf([alignment], [tensor(b"a", (16,))])
    yield "nothing known", whole


class Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("exit 1",)


def saved(made: object) -> bytes:
    file = io.BytesIO()
    torch.save(made, file)
    return file.getvalue()


def of_pth() -> Iterator[tuple[str, bytes]]:
    whole = saved({"w": torch.zeros(4, 4), "b": torch.zeros(4).bfloat16()})
    for end in [*range(0, len(whole), 61), len(whole) - 1]:
        yield f"cut at {end}", whole[:end]
    yield "runs something", saved({"w": torch.zeros(2), "x": Runs()})
    yield "strides", saved({"w": torch.zeros(1).expand(4)})
    yield "nothing known", whole
    pickled = zipfile.ZipFile(io.BytesIO(whole)).read("archive/data.pkl")
    for name, data in {
        "marks": b"(" * 300_000,
        "memory": b"}r\xff\xff\xff\x7fj\xff\xff\xff\x7e.",
        "a long text": b"\x80\x04\x8d" + (2**63).to_bytes(8, "little"),
        "a long number": b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little"),
        "no tensor": pickle.dumps([[[1]]], 2),
        "cut": pickled[: len(pickled) // 2],
    }.items():
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as new:
            new.writestr("archive/data.pkl", data)
        yield f"pickle: {name}", out.getvalue()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("archive/data.pkl", bytes(4 << 20))
    yield "compressed", bomb.getvalue()
    end = bytearray(whole)
    end[end.rfind(b"PK\x05\x06") + 8 :] = b"\xff" * (len(end) - end.rfind(b"PK\x05\x06") - 8)
    yield "directory of 2^32", bytes(end)


def of_others() -> Iterator[tuple[str, bytes]]:
    yield "html", b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    yield "zip", b"PK\x03\x04" + bytes(60)
    yield "pickle", pickle.dumps({"a": [1, 2, 3]}, 2)
    yield "json", b'{"error": "Repository not found"}'
    yield "gzip", b"\x1f\x8b\x08\x00" + bytes(60)
    yield "zeros", bytes(4096)
    yield "noise", bytes(range(256)) * 8
    yield "nothing", b""


FORMATS: dict[str, tuple[str, Callable[[], Iterator[tuple[str, bytes]]]]] = {
    "safetensors": (".safetensors", of_safetensors),
    "gguf": (".gguf", of_gguf),
    "pth": (".pth", of_pth),
    "another thing as .safetensors": (".safetensors", of_others),
    "another thing as .gguf": (".gguf", of_others),
    "another thing as .pth": (".pth", of_others),
}


def places(folder: Path) -> Iterator[tuple[str, Path]]:
    """What a path may lead to that is no file of numbers."""
    if sys.platform != "win32":
        os.mkfifo(folder / "pipe.safetensors")
        yield "a pipe", folder / "pipe.safetensors"
        yield "a device", Path("/dev/zero")
        (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
        yield "a link to itself", folder / "loop.safetensors"
        (folder / "gone.gguf").symlink_to(folder / "nowhere")
        yield "a link to nothing", folder / "gone.gguf"
    (folder / "folder.safetensors").mkdir()
    yield "an empty folder", folder / "folder.safetensors"
    yield "nothing", folder / "missing.safetensors"
    (folder / "outside.safetensors").write_bytes(WHOLE)
    for n, name in enumerate(
        ("../outside.safetensors", str(folder / "outside.safetensors"), "..\\outside.safetensors", "nul.safetensors",
         "m.safetensors:stream", "", "x" * 300 + ".safetensors", "config.json", "sub/../m.safetensors")
    ):  # fmt: skip
        shards = folder / f"shards {n}"
        shards.mkdir()
        (shards / "m.safetensors").write_bytes(WHOLE)
        index = {"weight_map": {"a.weight": name, "b.weight": "m.safetensors"}}
        (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        yield f"shard {name[:30]}", shards
    for n, index in enumerate(("", "[]", "{}", '{"weight_map":{"a":1}}', '{"metadata":' + "[" * 50_000)):
        shards = folder / f"index {n}"
        shards.mkdir()
        (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
        yield f"index {index[:20]}", shards
