"""Mutants of small model files through the parsers that meet strangers' files.

    python bench/fuzz.py [safetensors gguf vocabulary index lora pickle archive stream] [--count 1000000] [--seed 0]

A mutant must be read, or refused with FileError; anything else, a parse that takes a tenth of a second, or more memory than the
limit of the process (Linux) ends the run with the mutant in a file. Counts and times are printed as they grow. The same
seed makes the same mutants, so a run can be cut into chunks with different seeds.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from lowvram.errors import FileError
from lowvram.quant.files.gguf import read_gguf_header
from lowvram.quant.files.header import Header
from lowvram.quant.files.notes import with_notes
from lowvram.quant.files.pickled import read_pickle
from lowvram.quant.files.safetensors import read_header
from lowvram.quant.files.shards import read_index
from lowvram.quant.files.strict_json import Malformed
from lowvram.quant.files.torch_saved import read_torch_header
from lowvram.quant.files.writing import Entry, gguf_head
from lowvram.quant.lora import match_lora
from lowvram.quant.spec import DitSpec
from lowvram.quant.stored import group_by_weight
from lowvram.quant.vocabulary import find_vocabulary, sentencepiece_model, sentencepieces

CHUNK = 20_000
SLOW = 0.1
"""Seconds of the processor that no parse may take."""
MEMORY = 6 << 30
"""Address space of the process: torch alone maps several gigabytes."""
SPEC = DitSpec(dim=256, ffn=512, layers=1, in_channels=16, out_channels=16, text_dim=256, freq_dim=64)
EXTREMES = [
    *(
        struct.pack("<Q", n)
        for n in (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 96)
    ),
    *(struct.pack("<I", n) for n in (0, 1, 2**31 - 1, 2**31, 2**32 - 1)),
    *(str(n).encode() for n in (-1, 0, 2**31, 2**63, 2**64, 10**30, 1e308)),
    *(
        b'"F4"',
        b'"F8_E8M0"',
        b"null",
        b"true",
        b"[]",
        b"{}",
        b"[[[[[[[[",
        b'{"a":',
        b"NaN",
        b"\\ud800",
        b"\xff\xfe",
        b"\x00",
    ),
    *(
        b"../../etc/passwd",
        b"C:\\x",
        b"con.safetensors",
        b".weight",
        b".lora_A.weight",
        b".alpha",
        b".comfy_quant",
    ),
    *(
        b"c" + b"os\nsystem\n",
        b"(",
        b"t",
        b"R",
        b"b",
        b"\x93",
        b"Q",
        b"r\xff\xff\xff\xff",
        b"PK\x01\x02",
        b"PK\x05\x06",
    ),
]


class Bytes:
    """An opened file that lies in memory."""

    def __init__(self, data: bytes) -> None:
        self.data, self.path, self.size = data, Path("mutant"), len(data)

    def read_at(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise AssertionError(f"asked for {nbytes} bytes at {offset} of {self.size}")
        return self.data[offset : offset + nbytes]


def _state() -> dict[str, torch.Tensor]:
    return {
        "blocks.0.ffn.0.weight": torch.zeros(4, 8, dtype=torch.int8),
        "blocks.0.ffn.0.weight_scale": torch.ones(4, 1),
        "blocks.0.ffn.0.comfy_quant": torch.frombuffer(
            bytearray(b'{"format":"int8_tensorwise"}'), dtype=torch.uint8
        ),
        "head.modulation": torch.zeros(1, 2, 8, dtype=torch.bfloat16),
    }


def _gguf() -> bytes:
    entries = [
        Entry("a.weight", "Q4_K", (2, 256)),
        Entry("b.weight", "F32", (2, 2, 1, 2, 2)),
        Entry("c", "BF16", (3,)),
    ]
    head = gguf_head(entries, {"general.architecture": "wan", "general.file_type": 14})
    return head.data + bytes(head.nbytes - len(head.data))


def _vocabulary() -> bytes:
    """A GGUF with the keys of a tokenizer and nothing else."""
    words = [b"<pad>", b"</s>", b"<unk>", b"\xe2\x96\x81a", b"b"]

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    def array(name: bytes, kind: int, values: bytes) -> bytes:
        return text(b"tokenizer.ggml." + name) + struct.pack("<IIQ", 9, kind, len(words)) + values

    keys = [
        text(b"tokenizer.ggml.model") + struct.pack("<I", 8) + text(b"t5"),
        array(b"tokens", 8, b"".join(map(text, words))),
        array(b"scores", 6, struct.pack("<5f", 0, 0, 0, -1.5, -2)),
        array(b"token_type", 5, struct.pack("<5i", 3, 3, 2, 1, 1)),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + b"".join(keys)
    return head + bytes(-len(head) % 32)


def _read_vocabulary(data: bytes) -> None:
    """As far as a prompt: what sentencepiece does not take is refused too."""
    reader = Bytes(data)
    vocabulary = find_vocabulary([read_gguf_header(reader)])
    if vocabulary is None:
        return
    processor = sentencepieces(sentencepiece_model(vocabulary, reader))
    if processor is None:
        raise FileError("not a sentencepiece model", advice="")
    processor.encode("a b \u00e9")


def _lora() -> bytes:
    made = {}
    for module in ("blocks.0.ffn.0", "blocks.0.self_attn.q"):
        out, inner = SPEC.shapes()[f"{module}.weight"]
        made[f"diffusion_model.{module}.lora_down.weight"] = torch.zeros(2, inner)
        made[f"diffusion_model.{module}.lora_up.weight"] = torch.zeros(out, 2)
        made[f"diffusion_model.{module}.alpha"] = torch.tensor(2.0)
        made[f"diffusion_model.{module}.diff_b"] = torch.zeros(out)
    kron = {"lokr_w1": (4, 4), "lokr_w2_a": (64, 2), "lokr_w2_b": (2, 64), "alpha": ()}
    made |= {f"lycoris_blocks_0_attn2_to_q.{role}": torch.ones(size) for role, size in kron.items()}
    for n in (1, 2):
        made[f"lora_unet_blocks_0_ffn_2.hada_w{n}_a"] = torch.zeros(256, 2)
        made[f"lora_unet_blocks_0_ffn_2.hada_w{n}_b"] = torch.zeros(2, 512)
    told = {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"ffn.0": 1, "self_attn.q": 4}}
    return save(made, {"lora_adapter_metadata": json.dumps(told)})


def _saved(archive: bool = True) -> bytes:
    file = io.BytesIO()
    made = {"state_dict": {"w": torch.zeros(2, 3), "b": torch.zeros(3).bfloat16()}, "epoch": 1}
    torch.save(made, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def _pickle() -> bytes:
    import zipfile

    return zipfile.ZipFile(io.BytesIO(_saved())).read("archive/data.pkl")


def _inside(header: Header) -> Header:
    """What a header promises of its tensors: all of each lies in the file."""
    assert all(t.offset >= 0 and t.nbytes >= 0 and t.offset + t.nbytes <= header.size for t in header.tensors)
    return header


def _read_safetensors(data: bytes) -> None:
    reader = Bytes(data)
    group_by_weight([with_notes(reader, _inside(read_header(reader)))])


def _read_lora(data: bytes) -> None:
    match_lora([read_header(Bytes(data))], SPEC, partial=True)


def _read_pickle(data: bytes) -> None:
    try:
        read_pickle(data)
    except Malformed as error:
        raise FileError(error.found, advice="") from None


INDEX = json.dumps(
    {
        "metadata": {"total_size": 8},
        "weight_map": {f"t{n}": f"m-0000{n}-of-00003.safetensors" for n in (1, 2, 3)},
    }
).encode()
TARGETS: dict[str, tuple[Callable[[], bytes], Callable[[bytes], object]]] = {
    "safetensors": (lambda: save(_state(), {"format": "pt"}), _read_safetensors),
    "gguf": (_gguf, lambda data: _inside(read_gguf_header(Bytes(data)))),
    "vocabulary": (_vocabulary, _read_vocabulary),
    "index": (lambda: INDEX, lambda data: read_index(Bytes(data))),
    "lora": (_lora, _read_lora),
    "pickle": (_pickle, _read_pickle),
    "archive": (_saved, lambda data: _inside(read_torch_header(Bytes(data)))),
    "stream": (lambda: _saved(archive=False), lambda data: _inside(read_torch_header(Bytes(data)))),
}


def mutant(seed: bytes, draw: random.Random, head: int) -> bytes:
    """`seed` with one to six changes, most of them in its first `head` bytes."""
    data = bytearray(seed)
    for _ in range(draw.randint(1, 6)):
        size = min(len(data), head) if draw.random() < 0.9 else len(data)
        if not size:
            break
        at = draw.randrange(size)
        match draw.randrange(7):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at] = draw.randrange(256)
            case 2:
                piece = draw.choice(EXTREMES)
                data[at : at + len(piece)] = piece
            case 3:
                data[at:at] = draw.choice(EXTREMES)
            case 4:
                del data[at : at + draw.randint(1, 16)]
            case 5:
                start = draw.randrange(size)
                data[at:at] = data[start : start + draw.randint(1, 64)]
            case _:
                if draw.random() < 0.2:
                    del data[at:]
    return bytes(data)


def seconds(work: Callable[[], None], clock: Callable[[], float] = time.process_time) -> float:
    """Of the processor that `work` takes; done again if it is too long, since a pause of Python's collector is not its."""
    least = float("inf")
    for _ in range(3):
        before = clock()
        work()
        least = min(least, clock() - before)
        if least <= SLOW:
            break
    return least


def run(name: str, count: int, seed: int) -> None:
    make, parse = TARGETS[name]
    start, draw = make(), random.Random(f"{name} {seed}")
    head = min(len(start), 8 + int.from_bytes(start[:8], "little")) if start[8:9] == b"{" else len(start)
    began, read, slowest = time.monotonic(), 0, 0.0
    for done in range(1, count + 1):
        data = mutant(start, draw, head)
        refused = False

        def read_or_refuse(data: bytes = data) -> None:
            nonlocal refused
            try:
                parse(data)
            except FileError:
                refused = True

        try:
            took = seconds(read_or_refuse)
        except BaseException:
            Path(f"{name}.mutant").write_bytes(data)
            print(f"{name}: mutant {done:,} of seed {seed} is in {name}.mutant", file=sys.stderr)
            raise
        read += not refused
        slowest = max(slowest, took)
        if took > SLOW:
            Path(f"{name}.mutant").write_bytes(data)
            raise SystemExit(
                f"{name}: mutant {done:,} of seed {seed} took {took:.2f} s; it is in {name}.mutant"
            )
        if done % CHUNK == 0 or done == count:
            elapsed = time.monotonic() - began
            print(
                f"{name:12} {done:>9,} mutants, {read:,} read, {done - read:,} refused, slowest "
                f"{slowest * 1e3:.0f} ms, {elapsed:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("formats", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--count", type=int, default=1_000_000, help="mutants of each format")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for name in args.formats:
        run(name, args.count, args.seed)


if __name__ == "__main__":
    main()
