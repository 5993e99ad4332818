"""A prompt that was encoded before needs no text encoder, and gives the same bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvram import Runtime
from lowvram import text_cache as module
from lowvram.api import Pipeline, Video
from lowvram.cli import work
from lowvram.errors import StorageError
from lowvram.text_cache import TextCache, text_key

PROMPT = "a red circle moves left"
SETTINGS: dict[str, Any] = {"steps": 1, "frames": 1, "seed": 3}


@pytest.fixture
def pipe(tiny_model: Path) -> Pipeline:
    return Runtime("64MB", "2GB", "cpu").load(str(tiny_model))


def run(pipe: Pipeline, **settings: Any) -> Video:
    return pipe(PROMPT, **SETTINGS | settings)


def text_bytes(video: Video) -> int:
    return sum(stage.disk_bytes for stage in video.reports if stage.name == "text")


def entries(pipe: Pipeline) -> list[Path]:
    assert pipe.runtime.texts is not None
    folder = pipe.runtime.texts.folder
    return sorted(folder.iterdir()) if folder.exists() else []


def test_the_second_time_nothing_is_read_and_the_latent_is_the_same(pipe: Pipeline) -> None:
    before = pipe.plan(PROMPT, **SETTINGS)
    first = run(pipe)
    assert text_bytes(first) > 0 and "text" not in before.choices and len(entries(pipe)) == 2
    plan = pipe.plan(PROMPT, **SETTINGS)
    stage = plan.stage("text")
    assert (stage.disk_read, stage.h2d, stage.seconds, stage.steps) == (0, 0, 0, 1)
    assert "cached" in plan.choices["text"] and stage.claims == before.stage("text").claims
    second = run(pipe)
    assert text_bytes(second) == 0 and torch.equal(first.latent, second.latent)
    assert any("text: cached" in note for note in second.notes)


def test_a_job_without_guidance_finds_the_prompt_of_one_with_it(pipe: Pipeline) -> None:
    run(pipe)
    assert text_bytes(run(pipe, guidance=(1.0, 1.0))) == 0
    assert text_bytes(run(pipe, negative="blue")) > 0
    assert len(entries(pipe)) == 3


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut short": lambda data: data[:-1],
    "too long": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "of another prompt": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_encoded_anew(pipe: Pipeline, damage: str) -> None:
    first = run(pipe)
    plan = pipe.plan_job(first.job)
    for path in entries(pipe):
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    again = pipe.run(first.job, plan=plan)  # planned while it was whole
    assert text_bytes(again) > 0 and torch.equal(first.latent, again.latent)
    assert text_bytes(run(pipe)) == 0


def test_what_is_no_file_is_passed_over(pipe: Pipeline) -> None:
    first = run(pipe)
    for path in entries(pipe):
        path.unlink()
        path.mkdir()
    assert torch.equal(run(pipe).latent, first.latent)


def test_a_changed_encoder_is_another_one(pipe: Pipeline, tmp_path: Path) -> None:
    machine = pipe.runtime.machine
    key = text_key(pipe.model, [5, 1], torch.float32, machine)
    assert key == text_key(pipe.model, [5, 1], torch.float32, machine)
    assert key != text_key(pipe.model, [6, 1], torch.float32, machine)
    assert key != text_key(pipe.model, [5, 1], torch.bfloat16, machine)
    (file,) = {part.file for ref in pipe.model.text.values() for part in ref.parts}
    status = os.stat(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    try:
        assert key != text_key(pipe.model, [5, 1], torch.float32, machine)
    finally:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_cache_is_bounded_and_what_was_used_last_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 3 * (32 + 80))
    cache = TextCache(tmp_path / "texts")
    for n in range(5):
        cache.store(f"key{n}", torch.full((2, 10), float(n)))
        os.utime(cache.folder / f"key{n}", ns=(n, n))
        assert cache.load("key0", (2, 10), torch.float32) is not None
    assert sorted(path.name for path in cache.folder.iterdir()) == ["key0", "key3", "key4"]
    kept = cache.load("key4", (2, 10), torch.float32)
    assert kept is not None and np.all(kept.numpy() == 4)
    assert cache.load("key4", (2, 11), torch.float32) is None


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = TextCache(tmp_path / "file" / "texts")
    cache.store("key", torch.zeros(2, 2))
    assert cache.load("key", (2, 2), torch.float32) is None


def test_without_a_cache_nothing_is_kept(tiny_model: Path, jobs: Path) -> None:
    plain = Runtime("64MB", "2GB", "cpu", cache=False).load(str(tiny_model))
    assert plain.runtime.texts is None
    first, second = run(plain), run(plain)
    assert text_bytes(first) == text_bytes(second) > 0
    assert not (jobs.parent / "cache" / "texts").exists()


def test_a_job_that_asked_for_no_cache_keeps_nothing_when_it_goes_on(
    jobs: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise StorageError("made to fail", advice="")

    with monkeypatch.context() as patch:
        patch.setattr(work, "save_state", full)
        flags = ("--no-cache", "--steps", "1", "--frames", "1", "-o", tmp_path / "a.mp4")
        assert cli("generate", "a red circle", *flags).code == 6
    assert cli("resume", "last").code == 0
    assert not (jobs.parent / "cache" / "texts").exists()


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TextCache(tmp_path)
    cache.store("key", torch.ones(2, 2))

    def refused(*given: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    assert cache.load("key", (2, 2), torch.float32) is not None
