"""Checkpoints in one file, in shards with an index, and in folders."""

from __future__ import annotations

import json

import pytest

from lowvram.errors import FileError
from lowvram.quant.files.shards import is_plain_file_name, open_checkpoint_files, read_index

FIRST, SECOND = {"a": ("F32", (2,))}, {"b": ("BF16", (3,)), "c": ("F32", ())}
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def shards(tmp_path, pack):
    """A folder with two shards and their index."""
    (tmp_path / "m-00001-of-00002.safetensors").write_bytes(pack(FIRST, {"format": "pt"}))
    (tmp_path / "m-00002-of-00002.safetensors").write_bytes(pack(SECOND))
    names = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    names["c"] = names["b"]
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 18}, "weight_map": names}))
    return tmp_path


def rewrite(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def refusal(open_file):
    def read(path) -> str:
        with pytest.raises(FileError) as caught:
            open_checkpoint_files(path, open_file)
        assert caught.value.advice
        return str(caught.value)

    return read


def names_of(headers):
    return [[tensor.name for tensor in header.tensors] for header in headers]


def test_a_folder_its_index_and_its_numbered_shards_mean_the_same(shards, open_file):
    expected = [["a"], ["b", "c"]]
    assert names_of(open_checkpoint_files(shards, open_file)) == expected
    assert names_of(open_checkpoint_files(shards / INDEX, open_file)) == expected
    (shards / INDEX).unlink()
    headers = open_checkpoint_files(shards, open_file)
    assert names_of(headers) == expected
    assert [header.path.name[:7] for header in headers] == ["m-00001", "m-00002"]


def test_a_single_file_is_one_header(tmp_path, pack, open_file):
    (tmp_path / "x.safetensors").write_bytes(pack(FIRST))
    assert names_of(open_checkpoint_files(tmp_path / "x.safetensors", open_file)) == [["a"]]
    assert names_of(open_checkpoint_files(tmp_path, open_file)) == [["a"]]


def test_one_shard_alone_points_to_its_folder(shards, refusal):
    message = refusal(shards / "m-00002-of-00002.safetensors")
    assert "shard 2 of 2" in message and str(shards) in message


def test_a_missing_shard_is_named(shards, refusal):
    (shards / "m-00001-of-00002.safetensors").unlink()
    assert "m-00001-of-00002.safetensors" in refusal(shards)
    (shards / INDEX).unlink()
    assert "shard 1 of 2" in refusal(shards)


def test_a_tensor_must_be_in_the_shard_the_index_names(shards, refusal):
    rewrite(shards, lambda names: names.update(a=names["b"]))
    assert "1 tensors are not in the file" in refusal(shards) and "'a'" in refusal(shards)


def test_a_tensor_in_two_shards_is_refused(shards, pack, refusal):
    (shards / "m-00002-of-00002.safetensors").write_bytes(pack(SECOND | FIRST))
    assert "'a' is in" in refusal(shards)


def test_shards_that_hold_too_much_together_are_refused_before_all_are_read(
    tmp_path, pack, open_file, monkeypatch
):
    monkeypatch.setattr("lowvram.quant.files.shards.MAX_TENSORS", 5)
    for n in range(9):
        (tmp_path / f"{n}.safetensors").write_bytes(pack({f"{n}a": ("F32", ()), f"{n}b": ("F32", ())}))
    opened = []
    with pytest.raises(FileError, match="more than 5 tensors"):
        open_checkpoint_files(tmp_path, lambda path: opened.append(path) or open_file(path))
    assert len(opened) == 3


def test_unrelated_checkpoints_in_a_folder_are_not_mixed(tmp_path, pack, refusal):
    for name in ("high", "low"):
        (tmp_path / f"{name}.safetensors").write_bytes(pack(FIRST))
    assert "give the file to use" in refusal(tmp_path)


def test_two_indices_in_a_folder_must_be_chosen_from(shards, refusal):
    (shards / "diffusion_pytorch_model.fp16.safetensors.index.json").write_bytes(
        (shards / INDEX).read_bytes()
    )
    assert "2 index files" in refusal(shards)


@pytest.mark.parametrize("name", ["nothing", "nothing.safetensors", INDEX])
def test_a_path_that_is_not_there_is_refused(tmp_path, refusal, name):
    assert "no such file" in refusal(tmp_path / name)


def test_a_path_that_the_system_does_not_take_is_refused(tmp_path, refusal):
    assert "too long" in refusal(tmp_path / ("x" * 300))


def test_an_empty_folder_is_refused(tmp_path, refusal):
    assert "no .safetensors file" in refusal(tmp_path)


BAD_NAMES = [
    "../m.safetensors", "..", "a/../../m.safetensors", "/etc/m.safetensors", "C:\\m.safetensors", "C:m.safetensors",
    "..\\m.safetensors", "sub/m.safetensors", "\\\\host\\m.safetensors", "m.safetensors:stream", "nul.safetensors",
    "COM1.safetensors", ".m.safetensors", "m.safetensors ", "m.safetensors.", "m\x00.safetensors", "m\n.safetensors",
    "", "m*.safetensors", "x" * 300 + ".safetensors", "é" * 200 + ".safetensors", "m\u202e.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", [*BAD_NAMES, "m.bin", "config.json", "m.pth"])
def test_an_index_cannot_point_outside_its_folder_or_to_another_kind_of_file(shards, refusal, name):
    rewrite(shards, lambda names: names.update(a=name))
    assert "weight_map points to" in refusal(shards)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_only_plain_names_are_plain(name):
    assert not is_plain_file_name(name)


def test_ordinary_names_are_plain():
    for name in (
        "m.safetensors",
        "model-00001-of-00006.safetensors",
        "wan 2.2 [fp8]_scaled.sft",
        "ünï.safetensors",
    ):
        assert is_plain_file_name(name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("<!DOCTYPE html><html>", "HTML"),
        ("version https://git-lfs.github.com/spec/v1", "LFS"),
        ("[]", "not an index"),
        ("{}", "no weight_map"),
        ('{"weight_map":{}}', "no weight_map"),
        ('{"weight_map":["a"]}', "character"),
        ('{"weight_map":{"a":1}}', "character"),
        ('{"weight_map":{"a":"x.safetensors","a":"x.safetensors"}}', "twice"),
        ('{"weight_map":{"a":"x.safetensors"},"weight_map":{"a":"x.safetensors"}}', "twice"),
        ('{"metadata":' + "[" * 200_000 + "}", "too deep"),
        ('{"weight_map":{"a":"x.safetensors"}} x', "more text"),
        ('{"weight_map":{' + ",".join(f'"{n}":"{n}.safetensors"' for n in range(2000)) + "}}", "2,000 files"),
        ('{"weight_map":{"a":"\\ud800.safetensors"}}', "Unicode"),
    ],
)
def test_a_malformed_index_is_refused_with_its_reason(bytes_reader, text, reason):
    with pytest.raises(FileError) as caught:
        read_index(bytes_reader(text.encode(), INDEX))
    assert reason in str(caught.value) and caught.value.where == INDEX


def test_an_endless_index_is_refused_unread(bytes_reader):
    with pytest.raises(FileError, match="at most"):
        read_index(bytes_reader(b"{", INDEX, size=1 << 40))
