"""Files of torch.save: their tensors are found where they lie, and nothing in them is ever run."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from work import fair_share, lines_run

from lowvram.errors import FileError
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.files.torch_saved import read_torch_header

NAME = "w.pth"


def saved(made, **options) -> bytes:
    file = io.BytesIO()
    torch.save(made, file, **options)
    return file.getvalue()


def header_of(data: bytes, bytes_reader):
    return read_torch_header(bytes_reader(data, NAME))


def tensors(data: bytes, bytes_reader) -> dict[str, torch.Tensor]:
    """What the header says, cut out of the file."""
    made = {}
    for t in header_of(data, bytes_reader).tensors:
        raw = np.frombuffer(data[t.offset : t.offset + t.nbytes], np.uint8).copy()
        empty = torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype])
        made[t.name] = torch.from_numpy(raw).view(empty.dtype).view(t.shape) if t.nbytes else empty
    return made


def state() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "token_embedding.weight": torch.randn(7, 5, generator=g).bfloat16(),
        "blocks.0.attn.q.weight": torch.randn(4, 4, generator=g),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.randn(3, 1, 2, generator=g).half(),
        "whole": torch.arange(9, dtype=torch.int64),
        "small": torch.arange(9, dtype=torch.int8),
        "fp8": torch.randn(8, generator=g).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 4),
    }


SHARED = torch.arange(24, dtype=torch.float32)
WHOLE = {
    "a dict": state(),
    "an ordered dict": OrderedDict(state()),
    "under state_dict, beside other things": {
        "epoch": 3,
        "lr": 1e-4,
        "state_dict": state(),
        "names": ["a", {"b": 1}],
    },
    "under module": {"module": OrderedDict(state())},
    "under a lone key": {"anything": state()},
    "parameters": {"w": torch.nn.Parameter(torch.randn(3, 3)), "rank": 128},
    "a module's": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict(),
    "shared storage": {"whole": SHARED.view(4, 6), "rows": SHARED.view(4, 6)[1:3], "tail": SHARED[20:]},
}


OLD = {"_use_new_zipfile_serialization": False}
"""As torch before 1.6 wrote it."""


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize(
    "form", [{"pickle_protocol": p} for p in (2, 4, 5)] + [OLD], ids=["2", "4", "5", "old"]
)
def test_the_tensors_are_those_that_torch_loads(kind, form, bytes_reader):
    made = WHOLE[kind]
    inner = next((made[k] for k in ("state_dict", "module", "anything") if k in made), made)
    found = tensors(saved(made, **form), bytes_reader)
    expected = {k: v.detach() for k, v in inner.items() if isinstance(v, torch.Tensor)}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert as_bytes(found[name]) == as_bytes(tensor)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def refusal(data: bytes, bytes_reader) -> str:
    def read() -> FileError:
        with pytest.raises(FileError) as caught:
            header_of(data, bytes_reader)
        return caught.value

    error, lines = lines_run(read)
    assert lines < fair_share(data)
    assert error.where == NAME and error.advice and error.exit_code == 3
    assert len(str(error).splitlines()) <= 3
    return str(error)


class Runs:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/never",)


class Evaluates:
    def __reduce__(self):
        return eval, ("1/0",)


class Builds:
    def __reduce__(self):
        return torch.load, ("x",)


@pytest.mark.parametrize(("what", "named"), [(Runs, "system"), (Evaluates, "eval"), (Builds, "load")])
@pytest.mark.parametrize("form", [{}, OLD], ids=["zip", "old"])
def test_a_pickle_that_would_run_something_is_refused_by_name(what, named, form, bytes_reader):
    assert named in refusal(saved({"w": torch.zeros(2), "x": what()}, **form), bytes_reader)


@pytest.mark.parametrize("form", [{}, OLD], ids=["zip", "old"])
def test_a_tensor_that_is_no_run_of_bytes_is_refused(form, bytes_reader):
    assert "strides" in refusal(saved({"w": torch.zeros(3, 4).T}, **form), bytes_reader)
    assert "beyond" in refusal(saved({"w": torch.zeros(1).expand(4)}, **form), bytes_reader)


def rewritten(data: bytes, change, compression=zipfile.ZIP_STORED) -> bytes:
    """The archive with other contents: change(name, content) -> content, or None to leave the member out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return out.getvalue()


def replaced(name: str, content: bytes):
    return lambda n, c: content if n.endswith(name) else c


GOOD = saved(state())
GOOD_OLD = saved(state(), **OLD)
BAD = {
    "compressed": (rewritten(GOOD, lambda n, c: c * 1, zipfile.ZIP_DEFLATED), "compressed"),
    "no pickle": (rewritten(GOOD, lambda n, c: None if n.endswith("data.pkl") else c), "data.pkl"),
    "no numbers": (rewritten(GOOD, lambda n, c: None if n.endswith("data/1") else c), "are not there"),
    "few numbers": (rewritten(GOOD, lambda n, c: c[:-1] if n.endswith("data/1") else c), "are not there"),
    "big-endian": (rewritten(GOOD, replaced("byteorder", b"big")), "big-endian"),
    "a long pickle": (rewritten(GOOD, replaced("data.pkl", b"\x80\x02" + bytes(9 << 20))), "bytes"),
    "a pickle of marks": (rewritten(GOOD, replaced("data.pkl", b"(" * 500_000)), "instructions"),
    "an empty pickle": (rewritten(GOOD, replaced("data.pkl", b"")), "ends"),
    "a number": (rewritten(GOOD, replaced("data.pkl", pickle.dumps(7, 2))), "no dict"),
    "a far reference": (
        rewritten(GOOD, replaced("data.pkl", b"}r\xff\xff\xff\x7fj\xff\xff\xff\x7e.")),
        "reference",
    ),
    "not an archive": (b"hello world, this is a text", "hell"),
    "html": (b"<!DOCTYPE html><html></html>", "HTML"),
    "a pickle alone": (pickle.dumps({"a": 1}, 2), "a pickle"),
    "old and longer": (GOOD_OLD + b"\0", "1 bytes after"),
    "old with another count": (GOOD_OLD.replace(struct.pack("<Q", 35), struct.pack("<Q", 34)), "34 numbers"),
    "old and big-endian": (
        GOOD_OLD.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        "big-endian",
    ),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "starts with"),
    "empty": (b"", "empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_file_of_tensors_is_refused_with_the_reason(kind, bytes_reader):
    data, says = BAD[kind]
    assert says in refusal(data, bytes_reader)


@pytest.mark.parametrize("encrypted", [0, 1])
def test_members_that_overlap_or_are_encrypted_are_refused(encrypted, bytes_reader):
    data = bytearray(GOOD)
    start = struct.unpack_from("<I", data, data.rfind(b"PK\x05\x06") + 16)[0]
    first, second = start, data.find(b"PK\x01\x02", start + 4)
    if encrypted:
        struct.pack_into("<H", data, first + 8, 1)
        assert "encrypted" in refusal(bytes(data), bytes_reader)
    else:
        data[second + 42 : second + 46] = data[first + 42 : first + 46]
        refusal(bytes(data), bytes_reader)


@pytest.mark.parametrize("good", [GOOD, GOOD_OLD], ids=["zip", "old"])
def test_a_file_cut_anywhere_is_refused(good, bytes_reader):
    for length in [*range(0, len(good), 97), len(good) - 1]:
        refusal(good[:length], bytes_reader)


def test_numbers_at_their_limits_are_survived(bytes_reader):
    """Every 2, 4 or 8 bytes of the directory and of the pickle set to an extreme: an error, or a header inside the file."""
    start = struct.unpack_from("<I", GOOD, GOOD.rfind(b"PK\x05\x06") + 16)[0]
    pkl = GOOD.find(b"\x80\x02")
    places = [(GOOD, at) for at in (*range(start, len(GOOD), 5), *range(pkl, pkl + 1200, 7))]
    for good, at in places + [(GOOD_OLD, at) for at in range(0, len(GOOD_OLD), 5)]:
        for extreme in (b"\xff" * 2, b"\xff" * 4, b"\xff" * 8, b"\x00" * 4, b"\xff\xff\xff\x7f"):
            data = good[:at] + extreme + good[at + len(extreme) :]
            try:
                header = header_of(data[: len(good)], bytes_reader)
            except FileError:
                continue
            assert all(t.offset >= 0 and t.offset + t.nbytes <= len(good) for t in header.tensors)


def test_more_than_four_gigabytes_need_the_wide_directory(bytes_reader):
    """zipfile writes 64-bit fields when told to: the same tensors are found."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            with new.open(zipfile.ZipInfo(name), "w", force_zip64=True) as file:
                file.write(old.read(name))
    data = bytearray(out.getvalue())
    # A wide directory at the end, as torch writes for large files: sizes behind a locator, the short ones all ones.
    at = data.rfind(b"PK\x05\x06")
    count, nbytes, start = struct.unpack_from("<HII", data, at + 10)
    wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, nbytes, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at, 1)
    short = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    found = tensors(bytes(data[:at]) + wide + locator + short, bytes_reader)
    assert torch.equal(found["whole"], torch.arange(9))
