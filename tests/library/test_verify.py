"""A verdict on a file is about all of its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.library.cache import Cache, stamp_of
from lowvram.library.known import known_files
from lowvram.library.verify import verify

TABLE = {"a.weight": ("F16", (64, 64)), "b.weight": ("F16", (64, 64))}


def test_a_whole_file_is_hashed_and_the_hash_is_remembered(
    tmp_path: Path, sparse: Callable[..., Path]
) -> None:
    path = sparse(tmp_path / "mine.safetensors", TABLE)
    cache, told = Cache(), []
    (verdict,) = verify(path, cache, lambda file, done, size: told.append((done, size)))
    assert verdict.ok and verdict.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert told[-1] == (path.stat().st_size,) * 2
    assert cache.sha256(path, stamp_of(path)) == verdict.sha256
    path.write_bytes(path.read_bytes() + b" ")
    assert cache.sha256(path, stamp_of(path)) == ""


def test_a_truncated_file_and_one_of_another_name_are_wrong(
    tmp_path: Path, sparse: Callable[..., Path]
) -> None:
    whole = sparse(tmp_path / "short.safetensors", TABLE)
    whole.write_bytes(whole.read_bytes()[:-10])
    (verdict,) = verify(whole, Cache())
    assert not verdict.ok and verdict.sha256 == ""
    (verdict,) = verify(sparse(tmp_path / "wan_2.1_vae.safetensors", TABLE), Cache())
    assert not verdict.ok and "published under this name" in verdict.finding
    (verdict,) = verify(tmp_path / "gone.safetensors", Cache())
    assert not verdict.ok


def test_a_file_of_the_hub_cache_is_held_to_its_name(machine: Any) -> None:
    path = machine.snapshot("me/mine", "m.safetensors", "f" * 64, TABLE)
    (verdict,) = verify(path, Cache())
    assert not verdict.ok and "f" * 64 in verdict.finding
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    blob = path.resolve().rename(path.resolve().with_name(right))
    path.unlink()
    path.symlink_to(blob)
    (verdict,) = verify(path, Cache())
    assert verdict.ok and verdict.sha256 == right


def test_published_hashes_are_whole_and_none_comes_twice() -> None:
    known = known_files()
    assert all(len(k.sha256) == 64 and int(k.sha256, 16) and k.sha256 == k.sha256.lower() for k in known)
    assert len({k.sha256 for k in known}) == len({k.name for k in known}) == len(known) > 20


@pytest.mark.parametrize("expert", ["high", "low"])
def test_published_experts_are_named(expert: str) -> None:
    from lowvram.library.naming import expert_of

    named = [k.name for k in known_files() if expert in k.name.lower()]
    assert len(named) >= 5 and all(expert_of(Path("/") / name) == expert for name in named)


def test_what_is_verified_by_a_relative_path_is_known_by_its_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.pth").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    cache = Cache()
    (verdict,) = verify(Path("a.pth"), cache)
    assert cache.sha256(tmp_path / "a.pth", stamp_of(tmp_path / "a.pth")) == verdict.sha256 != ""
