"""The safetensors parser against honest files, the official library, and hostile bytes."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from work import fair_share, lines_run

from lowvram.errors import FileError
from lowvram.quant.files.safetensors import MAX_TENSORS, read_header

TWO = {"b.weight": ("BF16", (2, 3)), "a.bias": ("F32", (2,)), "empty": ("F16", (0, 4)), "s": ("F32", ())}


def framed(text: str | bytes, data: int = 0) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


@pytest.fixture
def refusal(bytes_reader):
    """The error that reading the bytes gives, as text."""

    def read(data: bytes, size: int | None = None) -> str:
        with pytest.raises(FileError) as caught:
            read_header(bytes_reader(data, "bad.safetensors", size))
        assert caught.value.where == "bad.safetensors"
        assert caught.value.advice and str(caught.value).count("\n") <= 2
        return str(caught.value)

    return read


def test_every_tensor_of_an_honest_file_is_listed_where_it_lies(bytes_reader, pack):
    data = pack(TWO, {"format": "pt"})
    header = read_header(bytes_reader(data))
    assert {t.name: (t.dtype, t.shape) for t in header.tensors} == TWO
    assert header.metadata == {"format": "pt"}
    assert sum(t.nbytes for t in header.tensors) == 12 + 8 + 0 + 4
    assert max(t.offset + t.nbytes for t in header.tensors) == len(data) == header.size


def test_the_official_library_and_the_parser_agree(tmp_path, bytes_reader):
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    dtypes += [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64]
    tensors = {f"x.{n}": torch.arange(6 + n).to(dtype) for n, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "five": torch.ones(1, 2, 1, 2, 2)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"note": 'quotes " and ümlaut'})
    data = path.read_bytes()
    header = read_header(bytes_reader(data))
    with safe_open(path, "pt") as official:
        assert {t.name for t in header.tensors} == set(official.keys())
        assert header.metadata == official.metadata()
        for tensor in header.tensors:
            expected = official.get_tensor(tensor.name)
            assert tensor.shape == tuple(expected.shape)
            assert official.get_slice(tensor.name).get_dtype() == tensor.dtype
            flat = (
                expected.reshape(-1).view(torch.uint8)
                if expected.numel()
                else torch.zeros(0, dtype=torch.uint8)
            )
            assert data[tensor.offset : tensor.offset + tensor.nbytes] == flat.numpy().tobytes()


@pytest.mark.parametrize("text", ["{}", "{ }  ", '{"__metadata__":{}}'])
def test_a_file_without_tensors_is_a_header_without_tensors(bytes_reader, text):
    assert read_header(bytes_reader(framed(text))).tensors == ()


def test_a_file_cut_at_any_byte_is_refused(pack, refusal):
    data = pack(TWO, {"format": "pt"})
    for end in range(len(data)):
        message = refusal(data[:end])
        assert ("empty" if end == 0 else "truncated") in message
        assert "download" in message


def test_a_cut_in_the_data_says_how_much_is_missing(pack, refusal):
    data = pack(TWO)
    assert f"the header describes {len(data):,} bytes, the file has {len(data) - 5:,}" in refusal(data[:-5])


def test_bytes_after_the_last_tensor_are_refused(pack, refusal):
    assert "3 bytes follow the last tensor" in refusal(pack(TWO) + b"abc")


@pytest.mark.parametrize("length", [0, 1, 2**27, 2**31, 2**32 + 2, 2**63, 2**64 - 1])
def test_an_impossible_header_length_is_refused_before_it_is_read(refusal, length):
    assert "header of" in refusal(length.to_bytes(8, "little") + b"{}" + bytes(64))


def test_a_header_may_only_be_long_in_a_long_file(bytes_reader, refusal):
    text = '{"__metadata__":{"x":"' + "y" * (17 << 20) + '"}}'
    assert "header of" in refusal(framed(text))
    assert "follow the last tensor" in refusal(framed(text), size=1 << 30)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1,2]      ", "byte 8"),
        ('{"a":' + entry() + "} x", "more text"),
        ('{"a":' + entry() + ",}", "character"),
        ('{"a":' + entry(), "the end"),
        ('{"a":' + entry() + ',"a":' + entry() + "}", "two tensors are called 'a'"),
        ('{"a":' + entry() + ',"\\u0061":' + entry() + "}", "two tensors are called 'a'"),
        ('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "twice"),
        ('{"a":{"dtype":"F32","shape":[2]}}', "entry"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1}}', "entry"),
        ('{"a":null}', "entry"),
        ('{"a":[[[[[[]]]]]]}', "entry"),
        ('{"a":' + "[" * 100_000 + "}", "too deep"),
        ('{"a":{"dtype":' + "[" * 900 + "]" * 900 + "}}", "too"),
        ('{"a":' + entry(dtype="F33") + "}", "dtype 'F33'"),
        ('{"a":' + entry(dtype=32) + "}", "dtype"),
        ('{"a":' + entry(shape=[2.0]) + "}", "shape"),
        ('{"a":' + entry(shape=[True, 2]) + "}", "shape"),
        ('{"a":' + entry(shape=[-2]) + "}", "shape"),
        ('{"a":' + entry(shape=["2"]) + "}", "shape"),
        ('{"a":' + entry(shape=2) + "}", "shape"),
        ('{"a":' + entry(shape=[1] * 9 + [2]) + "}", "shape"),
        ('{"a":' + entry(shape=[2**63]) + "}", "shape"),
        ('{"a":' + entry(shape=[2**32, 2**32, 2]) + "}", "stored in 8 bytes"),
        ('{"a":' + entry(shape=[2**61 + 2]) + "}", "stored in 8 bytes"),
        ('{"a":' + entry(shape=[float("nan")]) + "}", "NaN"),
        ('{"a":' + entry(shape=[3]) + "}", "stored in 8 bytes"),
        ('{"a":' + entry(dtype="F4", shape=[3], offsets=[0, 1]) + "}", "whole number of bytes"),
        ('{"a":' + entry(offsets=[8, 0]) + "}", "data_offsets"),
        ('{"a":' + entry(offsets=[0, 8, 8]) + "}", "data_offsets"),
        ('{"a":' + entry(offsets=[-8, 0]) + "}", "data_offsets"),
        ('{"a":' + entry(offsets=[0, 2**70]) + "}", "data_offsets"),
        ('{"a":' + entry(offsets=[False, 8]) + "}", "data_offsets"),
        ('{"a":' + entry(offsets=[4, 12]) + "}", "leaves a hole"),
        ('{"a":' + entry() + ',"b":' + entry(offsets=[4, 12]) + "}", "overlaps"),
        ('{"a":' + entry() + ',"b":' + entry() + "}", "overlaps"),
        ('{"a":' + entry() + ',"b":' + entry(offsets=[12, 20]) + "}", "leaves a hole"),
        ('{"' + "n" * 600 + '":' + entry() + "}", "tensor name of 600"),
        ('{"\\ud800":' + entry() + "}", "not Unicode"),
        ('{"a\nb":' + entry() + "}", "not JSON"),
        ('{"__metadata__":{"a":1}}', "character"),
        ('{"__metadata__":{"a":"1","a":"2"}}', "twice"),
        ('{"__metadata__":{},"__metadata__":{}}', "twice"),
        ('{"__metadata__":[]}', "character"),
        ("{" + " " * 300_000 + "}", "character"),
    ],
)
def test_a_malformed_header_is_refused_with_its_reason(refusal, text, reason):
    assert reason in refusal(framed(text, data=8))


def test_a_header_that_is_not_utf8_is_refused(refusal):
    assert "UTF-8" in refusal(framed(b'{"\xff":1}'))


def test_terminal_escapes_in_names_do_not_reach_the_message(refusal):
    assert "\x1b" not in refusal(framed('{"\\u001b[31m":' + entry(offsets=[4, 12]) + "}"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty (0 bytes)"),
        (b"\n<!DOCTYPE html><html><body>Access denied</body>", "an HTML page: the download was a web page"),
        (b"<html><head>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git LFS pointer"),
        (b"PK\x03\x04\x14\x00\x00\x00archive/data.pkl", "zip archive"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01", "pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), "GGUF"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(16), "gzip"),
        (b'{"error":"Invalid username or password."}', "JSON text"),
        (bytes(4096), "never finished"),
        (b"abc", "truncated"),
    ],
)
def test_wrong_content_is_named(refusal, data, reason):
    assert reason in refusal(data)


def test_a_header_starting_like_an_archive_is_still_read(bytes_reader):
    """A length whose low bytes are the gzip magic is a length all the same."""
    text = "{}" + " " * (0x8B1F - 2)
    assert read_header(bytes_reader(framed(text))).tensors == ()


HOSTILE = [
    b'{"a":' + b"[" * (15 << 20),
    b'{"a":[' + b"[]," * (5 << 20) + b"]}",
    b'{"a":{' + b'"x":1,' * (2 << 20) + b"}}",
    b"{" + b" " * (15 << 20) + b"}",
    b'{"a":{"dtype":"F32","shape":[' + b"9" * (15 << 20) + b"]}}",
    b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(200_000)) + b"}}",
    b'{"__metadata__":{"a":"' + b"\\n" * (7 << 20) + b'"},}',
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_header_is_refused_in_little_work_and_memory(refusal, text):
    data = framed(text)
    assert lines_run(lambda: refusal(data))[1] < fair_share(data)
    tracemalloc.start()
    refusal(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(data) + (4 << 20)


def test_more_tensors_than_any_model_has_are_refused(refusal):
    text = ",".join(f'"{n}":' + entry("U8", [0], [0, 0]) for n in range(MAX_TENSORS + 1))
    assert "too many tensors" in refusal(framed("{" + text + "}"))


def test_a_file_that_shrinks_while_it_is_read_is_refused(pack, refusal):
    data = pack(TWO)
    assert "became shorter" in refusal(data[:40], size=len(data))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(dtype=JSON_VALUES, shape=JSON_VALUES, offsets=JSON_VALUES, metadata=JSON_VALUES)
def test_any_json_in_any_place_gives_a_header_or_a_file_error(bytes_reader, dtype, shape, offsets, metadata):
    text = json.dumps(
        {"__metadata__": metadata, "a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    )
    try:
        read_header(bytes_reader(framed(text, data=8)))
    except FileError as error:
        assert error.found and error.advice
