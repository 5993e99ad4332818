"""What a job is to make is checked before it starts, and made by one job at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram import Runtime
from lowvram.errors import BusyError, StorageError, UsageError
from lowvram.media.target import check_target, finishing_path, partial_path, reserved
from lowvram.offload import locks
from lowvram.state import list_jobs


def test_targets_are_checked_before_work(tmp_path: Path) -> None:
    taken = tmp_path / "a.mp4"
    taken.write_bytes(b"x")
    check_target(taken, overwrite=True)
    check_target(tmp_path / "b.MP4", overwrite=False)
    (tmp_path / "folder.mp4").mkdir()
    for path, overwrite in (
        (taken, False),
        (tmp_path / "a.mkv", True),
        (tmp_path / "none" / "a.mp4", True),
        (tmp_path / "folder.mp4", True),
        (partial_path(taken), True),
        (finishing_path(taken), True),
    ):
        with pytest.raises(UsageError):
            check_target(path, overwrite)
    with pytest.raises(StorageError):
        check_target(tmp_path / f"{'n' * 245}.mp4", overwrite=False)
    assert taken.read_bytes() == b"x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "folder.mp4"]


def test_a_folder_that_takes_no_files_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        check_target(tmp_path / "a.mp4", overwrite=False)


def test_a_reserved_name_is_refused_to_others_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    for _ in range(2):
        with reserved(target), reserved(tmp_path / "b.mp4"):
            with (
                pytest.raises(BusyError, match=f"process {os.getpid()} is making this file"),
                reserved(target),
            ):
                pass
            with pytest.raises(BusyError), reserved(target):  # the refused one has not ended it
                pass
        assert not list(tmp_path.iterdir())


def test_a_reservation_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from lowvram.media.target import reserved\n"
        "with reserved(Path(sys.argv[1])): os._exit(7)"
    )
    call = [sys.executable, "-c", code, str(tmp_path / "a.mp4")]
    assert subprocess.run(call, check=False).returncode == 7
    with reserved(tmp_path / "a.mp4"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file")
def test_a_lock_file_that_its_holder_removed_meanwhile_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opened it before has no lock by it: the next one would lock another file of that name."""
    target, try_lock = tmp_path / "a.mp4", locks.try_lock
    late = iter([True])

    def after_the_end_of_another(file: Any) -> bool:
        if next(late, False):
            next(tmp_path.iterdir()).unlink()
        return try_lock(file)

    monkeypatch.setattr(locks, "try_lock", after_the_end_of_another)
    with reserved(target), pytest.raises(BusyError), reserved(target):
        pass


COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "a red circle", "--model", "nano"),
    "demo": ("demo",),
    "driven demo": ("demo", "--drive", "{folder}/drive"),
    "animate": ("animate", "{folder}"),
    "encode": ("encode", "{folder}/clip.mp4"),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_second_job_of_one_name_ends_before_it_computes_anything(
    verb: str, tmp_path: Path, jobs: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was looked for")

    target = tmp_path / ("a.safetensors" if verb == "encode" else "a.mp4")
    partial_path(target).write_bytes(b"frames of the first")
    monkeypatch.setattr(Runtime, "load", loaded)
    with reserved(target):
        before = sorted(tmp_path.iterdir())
        command = [part.format(folder=tmp_path) for part in COMMANDS[verb]]
        said = cli(*command, "-o", target, "--overwrite")
        assert said.code == 9 and str(target) in said.err and len(said.err.splitlines()) <= 3
        assert sorted(tmp_path.iterdir()) == before
    assert partial_path(target).read_bytes() == b"frames of the first"
    assert list_jobs(jobs) == []
