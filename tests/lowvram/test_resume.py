"""A job that was killed goes on where it was, and the video is the one it would have been."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from lowvram import Runtime
from lowvram.cli.preview import preview_path
from lowvram.cli.work import check_space
from lowvram.errors import StorageError
from lowvram.media.probe import probe
from lowvram.media.target import partial_path
from lowvram.media.video import read_frames
from lowvram.models.tae import TaeSpec
from lowvram.state import JobFolder, list_jobs

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
STEPS = 6
PATIENCE = 120.0
"""Seconds after which a child that should have acted is given up."""

CHILD = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
from lowvram.cli import main, work
from lowvram.stages.outbox import Outbox

def die():
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

kind, at = sys.argv[1], int(sys.argv[2])
if kind == "before-save":
    save = work.save_state
    work.save_state = lambda folder, state: die() if state.step == at else save(folder, state)
elif kind == "stall":
    save = work.save_state
    def stalling(folder, state):
        save(folder, state)
        if state.step == at:
            time.sleep(600)
    work.save_state = stalling
elif kind == "in-write":
    from lowvram.offload import io
    replace, seen = io.replace_file, []
    def dying(temporary, target):
        seen.extend([target] if target.parent.name != "texts" else [])  # those of the job
        die() if len(seen) == at else replace(temporary, target)
    io.replace_file = dying
elif kind == "decode":
    send, seen = Outbox.send, []
    def dying(outbox, frame):
        seen.append(frame)
        return die() if len(seen) == at else send(outbox, frame)
    Outbox.send = dying
main.run(sys.argv[3:])
"""


def arguments(model: Path, output: Path) -> list[str]:
    texts = [
        "generate",
        "a red circle moves left",
        "--model",
        model,
        "--seed",
        5,
        "--steps",
        STEPS,
        "-o",
        output,
    ]
    return [str(text) for text in texts] + ["--quiet", "--device", "cpu"]


def frames_of(path: Path) -> NDArray[np.uint8]:
    return np.stack(list(read_frames(path)))


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    """Frames of the job that nobody killed, made in a process of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    output = folder / "out.mp4"
    child(["none", 0], arguments(tiny_model, output), folder / "jobs", 0)
    return frames_of(output)


def start(death: Sequence[object], command: list[str], jobs: Path) -> subprocess.Popen[str]:
    """The command in a process that dies or stalls as `death` says: what of, and at which time."""
    environment = os.environ | {"LOWVRAM_STATE": str(jobs)}
    call = [sys.executable, "-c", CHILD, *map(str, death), *command]
    return subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def child(death: Sequence[object], command: list[str], jobs: Path, code: int) -> None:
    process = start(death, command, jobs)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err


def saved_step(folder: JobFolder) -> int:
    return int(load_file(folder.state_path)["solver.step"]) if folder.state_path.exists() else 0


def wait_for_step(process: subprocess.Popen[str], jobs: Path, step: int) -> JobFolder:
    """The folder of the job that `process` works on, once `step` steps are saved."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        found = list_jobs(jobs)
        if found and saved_step(found[0]) >= step:
            return found[0]
        time.sleep(0.01)
    raise AssertionError("the child saved nothing")


@pytest.mark.parametrize(
    "death", [("before-save", 1), ("before-save", 4), ("in-write", 4), ("decode", 1), ("decode", 6)]
)
def test_a_job_killed_anywhere_goes_on_to_the_same_frames(
    death: tuple[str, int],
    tiny_model: Path,
    tmp_path: Path,
    jobs: Path,
    cli: Callable[..., Any],
    undisturbed: NDArray[np.uint8],
) -> None:
    output = tmp_path / "out.mp4"
    child(death, arguments(tiny_model, output), jobs, -KILL)
    (folder,) = list_jobs(jobs)
    done = saved_step(folder)
    assert not output.exists() and not folder.finished
    assert done == {"before-save": death[1] - 1, "in-write": death[1] - 2, "decode": STEPS}[death[0]]
    assert folder.latent_path.exists() == (death[0] == "decode")
    resumed = cli("resume", "last", "--quiet", "--json")
    assert resumed.code == 0
    assert np.array_equal(frames_of(output), undisturbed)
    assert folder.finished and not partial_path(output).exists()
    assert not list(folder.path.glob(".*.tmp")) and not list(folder.path.glob("state*"))
    names = [stage["name"] for stage in resumed.objects[0]["report"]["stages"]]
    assert names == (["decode"] if death[0] == "decode" else ["text", "prepare", "denoise", "decode"])


def test_a_kill_from_outside_loses_nothing_and_meanwhile_the_job_is_busy(
    tiny_model: Path, tmp_path: Path, jobs: Path, cli: Callable[..., Any], undisturbed: NDArray[np.uint8]
) -> None:
    process = start(("stall", 2), arguments(tiny_model, tmp_path / "out.mp4"), jobs)
    try:
        folder = wait_for_step(process, jobs, 2)
        busy = cli("resume", "last", "--quiet")
        assert busy.code == 9 and f"process {process.pid} " in busy.err
        assert len(busy.err.splitlines()) <= 3 and process.poll() is None
        second = cli(*arguments(tiny_model, tmp_path / "out.mp4"))
        assert second.code == 9 and f"process {process.pid} is making this file" in second.err
        assert list_jobs(jobs) == [folder] and process.poll() is None
        (listed,) = cli("jobs", "--json").objects
        assert (listed["state"], listed["step"], listed["steps"]) == ("running", 2, STEPS)
        kept = sorted(folder.path.iterdir())
        assert cli("jobs", "rm", folder.name).code == 9 and sorted(folder.path.iterdir()) == kept
    finally:
        process.send_signal(KILL)
        process.communicate()
    assert saved_step(folder) == 2 and "stopped" in cli("jobs").out
    assert cli("resume", "last", "--quiet").code == 0
    assert np.array_equal(frames_of(tmp_path / "out.mp4"), undisturbed)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send these signals to a child")
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_job_says_how_to_go_on(
    number: str, code: int, tiny_model: Path, tmp_path: Path, jobs: Path
) -> None:
    """Also a quiet one: it is no progress, but the end."""
    command = arguments(tiny_model, tmp_path / "out.mp4")
    process = start(("stall", 2), command, jobs)
    folder = wait_for_step(process, jobs, 2)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (code, "")
    assert f"; go on with `lowvram resume {folder.name}`" in err and err.count("\n") == 1
    assert saved_step(folder) == 2


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    """A job with three steps behind it."""
    folder = tmp_path_factory.mktemp("stopped")
    child(("before-save", 4), arguments(tiny_model, folder / "out.mp4"), folder / "jobs", -KILL)
    (job,) = list_jobs(folder / "jobs")
    assert saved_step(job) == 3
    return job


@pytest.fixture
def unfinished(stopped: JobFolder, tmp_path: Path, jobs: Path) -> JobFolder:
    """A copy of it for one test, which writes to `tmp_path`."""
    copy = JobFolder(jobs / stopped.name)
    shutil.copytree(stopped.path, copy.path)
    copy.save(replace(stopped.load(), output=str(tmp_path / "out.mp4")))
    return copy


def test_a_damaged_state_is_a_file_error_and_makes_no_video(
    unfinished: JobFolder, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    whole = unfinished.state_path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    swapped = load_file(unfinished.state_path)
    swapped["x"], swapped["solver.sample"] = swapped["solver.sample"], swapped["x"]
    other = tmp_path / "other.safetensors"
    save_file(swapped, other)
    for damage in (b"", whole[: len(whole) // 2], bytes(flipped), other.read_bytes()):
        unfinished.state_path.write_bytes(damage)
        said = cli("resume", "last")
        assert said.code == 3 and str(unfinished.state_path) in said.err
        assert len([line for line in said.err.splitlines() if line]) <= 3
    assert not (tmp_path / "out.mp4").exists()
    unfinished.state_path.write_bytes(whole)
    assert cli("resume", "last", "--quiet").code == 0


def test_an_unfinished_job_cannot_be_decoded(
    unfinished: JobFolder, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    said = cli("decode", unfinished.name, "-o", tmp_path / "early.mp4")
    assert said.code == 2 and f"lowvram resume {unfinished.name}" in said.err
    assert not (tmp_path / "early.mp4").exists()


def test_resume_shows_what_it_goes_on_with(
    unfinished: JobFolder, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    small, target = tmp_path / "taew2_1.safetensors", tmp_path / "out.mp4"
    save_file({name: torch.zeros(shape).half() for name, shape in TaeSpec(16, 1).shapes().items()}, small)
    said = cli("resume", unfinished.name, "--preview", STEPS - 1, "--preview-decoder", small)
    assert said.code == 0 and said.err.count("after step") == 1 and "no more previews" not in said.err
    assert f"denoise {STEPS}/{STEPS} " in said.err  # of the whole job, not of what was left
    assert f"after step {STEPS - 1} of {STEPS}: {preview_path(target)}" in said.err.replace("\n", "")
    assert preview_path(target).exists() and target.exists()


def test_resume_works_from_another_folder(
    unfinished: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert cli("resume", unfinished.name, "--quiet").code == 0
    assert (tmp_path / "out.mp4").exists() and not list(elsewhere.iterdir())


def test_a_video_that_finds_no_room_is_written_elsewhere_without_a_step_done_twice(
    unfinished: JobFolder,
    undisturbed: NDArray[np.uint8],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Callable[..., Any],
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("lowvram.media.video.remux", full)
        said = cli("resume", unfinished.name)
    assert said.code == 6 and os.strerror(errno.ENOSPC) in said.err
    assert f"`lowvram resume {unfinished.name}` goes on, with -o FILE" in " ".join(said.err.split())
    said = cli("resume", "last", "-o", tmp_path / "elsewhere.mp4")
    assert said.code == 0 and "denoise" not in said.err
    assert np.array_equal(frames_of(tmp_path / "elsewhere.mp4"), undisturbed)
    assert not (tmp_path / "out.mp4").exists()


def test_resume_never_replaces_a_file_that_appeared_meanwhile(
    unfinished: JobFolder, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "out.mp4").write_bytes(b"mine")
    assert cli("resume", "last", "--quiet").code == 2
    assert (tmp_path / "out.mp4").read_bytes() == b"mine"
    assert cli("resume", "last", "--quiet", "--overwrite").code == 0


def test_a_finished_latent_is_decoded_again_to_the_same_frames(
    tiny_model: Path, tmp_path: Path, cli: Callable[..., Any], undisturbed: NDArray[np.uint8]
) -> None:
    output, again = tmp_path / "out.mp4", tmp_path / "again.mp4"
    assert cli(*arguments(tiny_model, output)).code == 0
    decoded = cli("decode", "last", "-o", again, "--quiet", "--json")
    assert decoded.code == 0 and decoded.objects[0]["output"] == str(again)
    assert np.array_equal(frames_of(output), undisturbed) and output.read_bytes() == again.read_bytes()
    assert probe(again).metadata["comment"] == probe(output).metadata["comment"]


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "renoise"])
def test_a_state_that_would_fill_the_disk_is_refused_before_the_first_step(
    solver: str, tiny_model: Path, tmp_path: Path
) -> None:
    pipe = Runtime(vram="1GB", ram="4GB", device="cpu").load(str(tiny_model))
    plan = pipe.plan("a red circle", solver=solver, steps=4)
    latent = 4 * 16 * 3 * 8 * 8
    assert plan.saved["latent"] == latent and plan.saved["state"] % (2 * latent) == 0
    planned = sum(plan.saved.values())
    check_space(tmp_path, plan, lambda root: planned)
    with pytest.raises(StorageError, match="LOWVRAM_STATE") as refused:
        check_space(tmp_path, plan, lambda root: planned - 1)
    assert refused.value.exit_code == 6 and str(refused.value).count("\n") == 2
