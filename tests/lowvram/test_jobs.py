"""`lowvram jobs`: what is kept can be seen, and removed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.job import make_job
from lowvram.sampling.presets import model_preset
from lowvram.state import JobFolder, Saved, list_jobs, new_job

DAY = 86400.0


def kept(root: Path, name: str, days: float = 0.0) -> JobFolder:
    """A job that nobody has worked on for so long, with a latent of 500 bytes."""
    job = make_job(model_preset("nano"), model="nano", files={}, prompt="a red circle " * 9, steps=4)
    saved = Saved(job=job, output="/videos/a\n.mp4", vram=10**9, ram=10**9, device="cpu")
    folder = new_job(saved, root, name)
    folder.latent_path.write_bytes(bytes(500))
    for each in folder.path.iterdir():
        os.utime(each, (time.time() - days * DAY,) * 2)
    return folder


def test_every_job_is_listed_with_what_it_is(jobs: Path, cli: Callable[..., Any]) -> None:
    assert (cli("jobs").out, cli("jobs", "--json").objects) == ("", [])
    kept(jobs, "20260101-000000").finish()
    second, broken = kept(jobs, "20260102-000000"), kept(jobs, "20260103-000000")
    (broken.path / "job.json").write_text("{")
    told = cli("jobs", "--json").objects
    assert [(j["job"], j["state"]) for j in told] == [
        ("20260101-000000", "finished"),
        ("20260102-000000", "stopped"),
        ("20260103-000000", "damaged"),
    ]
    assert told[1]["bytes"] == 500 + (second.path / "job.json").stat().st_size
    assert (told[1]["step"], told[1]["steps"]) == (4, 4)  # its latent is there
    said = cli("jobs").out.splitlines()
    assert len(said) == 4 and "/videos/a .mp4" in said[2] and len(said[2]) < 150


def test_named_jobs_are_removed_and_no_others(jobs: Path, cli: Callable[..., Any]) -> None:
    for n in range(1, 4):
        kept(jobs, f"2026010{n}-000000")
    (jobs / "20260103-000000" / "job.json").write_text("{")
    assert cli("jobs", "rm", "20260101-000000", "none").code == 2 and len(list_jobs(jobs)) == 3
    said = cli("jobs", "rm", "20260101-000000", "20260103-000000", "--json")
    assert said.code == 0 and [j["job"] for j in said.objects] == ["20260101-000000", "20260103-000000"]
    assert [p.name for p in jobs.iterdir()] == ["20260102-000000"]


def test_old_jobs_are_removed_but_none_that_runs(jobs: Path, cli: Callable[..., Any]) -> None:
    kept(jobs, "20260101-000000", 31)
    running = kept(jobs, "20260102-000000", 31)
    kept(jobs, "20260103-000000", 29)
    with running.locked():
        os.utime(running.path / "lock", (0, 0))
        said = cli("jobs", "rm", "--older-than", 30)
    assert said.code == 0 and said.out.split()[0] == "20260101-000000"
    assert sorted(p.name for p in jobs.iterdir()) == ["20260102-000000", "20260103-000000"]


@pytest.mark.parametrize("arguments", [(), ("a", "--older-than", 3), ("--older-than", 0)])
def test_what_is_to_be_removed_has_to_be_said(
    arguments: tuple[object, ...], jobs: Path, cli: Callable[..., Any]
) -> None:
    kept(jobs, "20260101-000000", 99)
    assert cli("jobs", "rm", *arguments).code == 2 and len(list_jobs(jobs)) == 1
