"""GGUF headers: files written by gguf-py, and every way in which a file can be wrong."""

from __future__ import annotations

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from work import fair_share, lines_run

from lowvram.errors import FileError
from lowvram.quant.encodings.kquants import BLOCK_SIZES
from lowvram.quant.files.gguf import MAX_STRINGS, read_gguf_header
from lowvram.quant.files.shards import open_checkpoint_files

F32, F16, Q8_0, Q4_K = 0, 1, 8, 12
UINT32, INT32, STRING, ARRAY, UINT64 = 4, 5, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name, shape, kind=F32, offset=0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def packed(tensors=(), keys=(), data=0, version=3, counts=None, alignment=32) -> bytes:
    """A file from the bytes of its entries, written by hand so that it can be wrong."""
    count, key_count = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, count, key_count) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + bytes(data)


TWO = packed(
    [tensor("a", (4, 64), Q8_0), tensor("b", (3,), F32, 288)],
    [key("general.architecture", STRING, text("wan")), key("n", UINT32, struct.pack("<I", 7))],
    288 + 32,
)


@pytest.fixture
def refusal(bytes_reader):
    def read(data, size=None) -> str:
        with pytest.raises(FileError) as caught:
            read_gguf_header(bytes_reader(data, "m.gguf", size))
        assert caught.value.where == "m.gguf" and caught.value.advice
        assert len(str(caught.value)) < 900
        return str(caught.value)

    return read


@pytest.fixture
def written(tmp_path):
    """(tensors, alignment): a file of gguf-py, of name -> (array, type or None) and some keys of every type."""

    def write(tensors, alignment=None):
        path = tmp_path / "w.gguf"
        writer = gguf.GGUFWriter(path, "wan")
        if alignment:
            writer.add_custom_alignment(alignment)
        writer.add_quantization_version(2)
        writer.add_bool("flag", True)
        writer.add_float32("ratio", 0.5)
        writer.add_int64("big", -(2**40))
        writer.add_string("long", "x" * 10_000)
        writer.add_array("tokens", [f"token {n}" * (n % 7) for n in range(3000)])
        writer.add_array("scores", [0.5] * 3000)
        for name, (array, kind) in tensors.items():
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_a_file_of_gguf_py_reads_as_gguf_py_reads_it(written, open_file, alignment):
    rng = np.random.default_rng(0)
    tensors = {
        "patch": (rng.standard_normal((6, 4, 1, 2, 2)).astype(np.float32), None),
        "half": (rng.standard_normal((3, 5)).astype(np.float16), None),
        "bytes": (rng.integers(-9, 9, (7,)).astype(np.int8), None),
        "one": (np.ones(1, dtype=np.float32), None),
        "brain": (rng.integers(0, 255, (4, 10), dtype=np.uint8), Type.BF16),
    }
    for kind, (_, nbytes) in BLOCK_SIZES.items():
        tensors[kind] = (rng.integers(0, 255, (3, 2 * nbytes), dtype=np.uint8), Type[kind])
    path = written(tensors, alignment)
    (header,) = open_checkpoint_files(path, open_file)
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    raw = path.read_bytes()
    assert [t.name for t in header.tensors] == list(tensors)
    for found in header.tensors:
        other = theirs[found.name]
        assert found.dtype == {
            "patch": "F32",
            "half": "F16",
            "bytes": "I8",
            "one": "F32",
            "brain": "BF16",
        }.get(found.name, found.name)
        assert found.shape == tuple(int(n) for n in reversed(other.shape))
        assert (found.offset, found.nbytes) == (other.data_offset, other.n_bytes)
        assert raw[found.offset : found.offset + found.nbytes] == tensors[found.name][0].tobytes()
    kept = {k: header.metadata[k] for k in ("general.architecture", "flag", "ratio", "big")}
    assert kept == {"general.architecture": "wan", "flag": "True", "ratio": "0.5", "big": str(-(2**40))}
    assert "long" not in header.metadata and "tokens" not in header.metadata


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(bytes_reader, version):
    data = TWO[:4] + struct.pack("<I", version) + TWO[8:]
    header = read_gguf_header(bytes_reader(data))
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in header.tensors] == [
        ("a", "Q8_0", (4, 64), 272), ("b", "F32", (3,), 12),
    ]  # fmt: skip
    assert header.metadata == {"general.architecture": "wan", "n": "7"}


def test_the_last_tensor_may_lack_its_padding(bytes_reader):
    assert read_gguf_header(bytes_reader(TWO[:-20])).tensors[1].nbytes == 12


def test_a_file_without_tensors_is_a_header_without_tensors(bytes_reader):
    assert read_gguf_header(bytes_reader(packed())).tensors == ()
    assert read_gguf_header(bytes_reader(packed(alignment=1))).tensors == ()


def test_the_original_shape_wins_over_the_stored_one(bytes_reader):
    shape = key("comfy.gguf.orig_shape.a", ARRAY, struct.pack("<IQ4i", INT32, 4, 4, 2, 3, 1))
    header = read_gguf_header(bytes_reader(packed([tensor("a", (8, 3))], [shape], 96)))
    assert header.tensors[0].shape == (4, 2, 3, 1)


@pytest.mark.parametrize("dims", [(4, 2, 4), (-4, 2, -3), (24, 0)])
def test_an_original_shape_of_another_size_is_refused(refusal, dims):
    shape = key("comfy.gguf.orig_shape.a", ARRAY, struct.pack(f"<IQ{len(dims)}i", INT32, len(dims), *dims))
    assert "original shape" in refusal(packed([tensor("a", (8, 3))], [shape], 96))


def test_an_original_shape_cannot_cut_a_block(refusal):
    shape = key("comfy.gguf.orig_shape.a", ARRAY, struct.pack("<IQ2i", INT32, 2, 16, 16))
    assert "whole blocks" in refusal(packed([tensor("a", (8, 32), Q8_0)], [shape], 288))


def test_a_file_cut_at_any_byte_is_refused(refusal):
    for end in range(len(TWO) - 20):
        message = refusal(TWO[:end])
        assert any(word in message for word in ("empty", "truncated", "not a GGUF", "never finished")), end
        assert "download" in message


def test_a_file_that_shrinks_while_it_is_read_is_refused(refusal):
    assert "became shorter" in refusal(TWO[:90], size=len(TWO))


HUGE = [2**31, 2**32 + 2, 2**63, 2**64 - 1]


@pytest.mark.parametrize("number", HUGE)
def test_impossible_counts_and_lengths_are_refused_before_they_are_believed(refusal, number):
    number8 = struct.pack("<Q", number)
    for data in (
        packed(counts=(number, 0), data=64),
        packed(counts=(0, number), data=64),
        packed(keys=[number8 + b"key"], data=64),
        packed(keys=[text("k") + struct.pack("<I", STRING) + number8], data=64),
        packed(keys=[key("k", ARRAY, struct.pack("<I", UINT64) + number8)], data=64),
        packed(keys=[key("k", ARRAY, struct.pack("<I", STRING) + number8)], data=64),
        packed(keys=[key("k", ARRAY, struct.pack("<IQ", STRING, 1) + number8)], data=64),
        packed([number8 + b"name"], data=64),
        packed([tensor("a", (number,))], data=64),
        packed([tensor("a", (number, number))], data=64),
        packed([tensor("a", (2,), F32, number)], data=64),
    ):
        refusal(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (packed(version=1), "version 1"),
        (packed(version=4), "version 4"),
        (packed(version=3 << 24), "big-endian"),
        (packed([tensor("a", (2,)), tensor("a", (2,), F32, 32)], data=64), "two tensors"),
        (packed([tensor("", (2,))], data=32), "a name"),
        (packed([tensor("n" * 129, (2,))], data=32), "tensor name of 129"),
        (packed([tensor(b"\xff", (2,))], data=32), "UTF-8"),
        (packed([tensor("a", (1,) * 6)], data=32), "6 dimensions"),
        (packed([tensor("a", (2,), 4)], data=32), "type 4"),
        (packed([tensor("a", (256,), 16)], data=96), "IQ2_XXS"),
        (packed([tensor("a", (2,), 2**31)], data=32), "not supported"),
        (packed([tensor("a", (2, 48), Q8_0)], data=128), "multiple of 32"),
        (packed([tensor("a", (), Q8_0)], data=64), "multiple of 32"),
        (packed([tensor("a", (2, 128), Q4_K)], data=160), "multiple of 256"),
        (packed([tensor("a", (2,), F32, 32)], data=64), "offset 0"),
        (packed([tensor("a", (2,)), tensor("b", (2,), F32, 0)], data=64), "offset 32"),
        (packed([tensor("a", (2,)), tensor("b", (2,), F32, 64)], data=128), "offset 32"),
        (packed([tensor("a", (2,)), tensor("b", (2,), F32, 8)], data=64), "offset 32"),
        (packed([tensor("a", (2,))], data=64), "32 bytes follow"),
        (packed([tensor("a", (64,))], data=250), "truncated"),
        (packed(keys=[key("", UINT32, bytes(4))]), "without a name"),
        (packed(keys=[key("k", UINT32, bytes(4))] * 2), "twice"),
        (packed(keys=[key("k" * 300, UINT32, bytes(4))]), "a key of 300"),
        (packed(keys=[key(b"\xff", UINT32, bytes(4))]), "UTF-8"),
        (packed(keys=[key("k", 13, bytes(4))]), "type 13"),
        (packed(keys=[key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(64))]), "an array in"),
        (packed(keys=[key("k", ARRAY, struct.pack("<IQ", 99, 1) + bytes(64))]), "type 99"),
        (packed(keys=[key("general.alignment", UINT64, struct.pack("<Q", 32))]), "of type 10"),
        (packed(keys=[key("general.alignment", UINT32, struct.pack("<I", 48))]), "power of two"),
        (packed(keys=[key("general.alignment", UINT32, struct.pack("<I", 0))]), "power of two"),
        (packed(keys=[key("general.alignment", UINT32, struct.pack("<I", 1 << 31))]), "power of two"),
        (packed([tensor("\x1b[31m", (2,), F32, 32)], data=64), "\\x1b"),
        (b"", "empty"),
        (b"GGUX" + bytes(100), "starts with 'GGUX'"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (bytes(4096), "never finished"),
    ],
)
def test_a_malformed_file_is_refused_with_its_reason(refusal, data, reason):
    assert reason in refusal(data)


def test_more_strings_than_any_vocabulary_are_refused_at_once(refusal):
    count = MAX_STRINGS + 1
    data = packed(keys=[key("k", ARRAY, struct.pack("<IQ", STRING, count) + bytes(8 * count))])
    said, lines = lines_run(lambda: refusal(data))
    assert "strings in arrays" in said and lines < fair_share(data)


def vocabulary(words: int) -> bytes:
    tokens = b"".join(text("w" * (n % 20)) for n in range(words))
    keys = [key("k", ARRAY, struct.pack("<IQ", STRING, words) + tokens)]
    keys.append(key("long", ARRAY, struct.pack("<IQ", STRING, 2) + text("y" * (3 << 20)) + text("z")))
    return packed([tensor("a", (2,))], keys, 32)


def test_a_vocabulary_is_passed_over_in_little_work(bytes_reader):
    data = vocabulary(256_384)
    header, lines = lines_run(lambda: read_gguf_header(bytes_reader(data)))
    assert [t.name for t in header.tensors] == ["a"] and lines < fair_share(data)


def test_a_vocabulary_is_passed_over_in_little_memory(bytes_reader):
    data = vocabulary(20_000)
    tracemalloc.start()
    read_gguf_header(bytes_reader(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20


def test_a_header_longer_than_any_is_refused(refusal):
    head = packed(keys=[key("k", ARRAY, struct.pack("<IQ", 0, 80 << 20))], data=2 << 20)
    assert "header of more than" in refusal(head, size=1 << 30)


def test_the_content_decides_over_the_name(tmp_path, pack, open_file):
    (tmp_path / "a.safetensors").write_bytes(TWO)
    (header,) = open_checkpoint_files(tmp_path / "a.safetensors", open_file)
    assert [t.name for t in header.tensors] == ["a", "b"]
    (tmp_path / "b.gguf").write_bytes(pack({"a": ("F32", (2,))}))
    with pytest.raises(FileError, match="not a GGUF file"):
        open_checkpoint_files(tmp_path / "b.gguf", open_file)


def test_a_folder_may_hold_one_gguf_file_or_its_numbered_parts(tmp_path, open_file):
    for n, name in ((1, "a"), (2, "b")):
        (tmp_path / f"m-0000{n}-of-00002.gguf").write_bytes(packed([tensor(name, (2,))], data=32))
    headers = open_checkpoint_files(tmp_path, open_file)
    assert [t.name for h in headers for t in h.tensors] == ["a", "b"]
    with pytest.raises(FileError, match="shard 1 of 2"):
        open_checkpoint_files(tmp_path / "m-00001-of-00002.gguf", open_file)
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(FileError, match="shard 1 of 2"):
        open_checkpoint_files(tmp_path, open_file)
