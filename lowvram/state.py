"""What survives a kill: jobs on disk, one folder each, written after every step.

job.json               the Job, and where its video goes
state.safetensors      latent and solver state after the last finished step, replaced atomically
condition.safetensors  what was made of the job's pictures
carried.safetensors    a driven video: the number of the segment under way, and the frames it begins with
segment-00000.mp4 ...  a driven video: its finished segments
latent.safetensors     the finished latent: from then on the job can always be decoded
lock                   held by the process that works on the job
done                   the output was written and verified
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lowvram.errors import BusyError, FileError, StorageError, UsageError
from lowvram.job import Job
from lowvram.offload.io import read_small_text, storage_errors, write_atomic
from lowvram.offload.locks import holding, is_held

MAX_JOB_BYTES = 1 << 20
KEPT = 20
"""Finished jobs that are kept."""
SEGMENT = "segment"
"""Name of the number that says which segment the tensors beside it belong to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """Everything `resume` needs beside the tensors."""

    job: Job
    output: str
    """Absolute path of the video."""
    vram: int
    ram: int
    device: str
    """"cuda" or "cpu": another device would not give the same bits."""
    overwrite: bool = False
    cache: bool = True
    """Whether the features of its prompt may be kept and taken from disk."""


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The folder of one job."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def state_path(self) -> Path:
        return self.path / "state.safetensors"

    @property
    def condition_path(self) -> Path:
        return self.path / "condition.safetensors"

    @property
    def latent_path(self) -> Path:
        return self.path / "latent.safetensors"

    @property
    def carried_path(self) -> Path:
        return self.path / "carried.safetensors"

    @property
    def finished(self) -> bool:
        return (self.path / "done").exists()

    @property
    def running(self) -> bool:
        """Whether a process works on it."""
        return is_held(self.path / "lock")

    def save(self, saved: Saved) -> None:
        write_atomic(self.path / "job.json", _encoded(saved))

    def load(self) -> Saved:
        path = self.path / "job.json"
        try:
            return msgspec.json.decode(read_small_text(path, MAX_JOB_BYTES).encode(), type=Saved, strict=True)
        except msgspec.DecodeError as problem:
            raise FileError(
                f"not a saved job: {problem}",
                where=str(path),
                advice="start the job again with `lowvram generate`",
            ) from None

    def finish(self) -> None:
        """The output exists: the state of single steps, and what a kill left of writing one, is no longer needed."""
        write_atomic(self.path / "done", b"")
        beside = (*self.path.glob(".*.tmp"), *self.path.glob("segment-*.mp4"))
        for path in (self.state_path, self.condition_path, self.carried_path, *beside):
            with suppress(
                OSError
            ):  # held open by a viewer or a scanner (Windows): the folder goes with old jobs
                path.unlink(missing_ok=True)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the job for this process; BusyError if another one holds it."""
        advice = "wait for it, or stop it first"
        return holding(self.path / "lock", "working on this job", where=self.name, advice=advice)

    def remove(self) -> None:
        """The job, finished or not, is gone at once and for good. BusyError while a process works on it."""
        with self.locked(), storage_errors(self.path):
            (self.path / "job.json").unlink(missing_ok=True)
            shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # Windows keeps a folder whose lock is held; others have removed it
            self.path.rmdir()


def new_job(saved: Saved, root: Path, stamp: str) -> JobFolder:
    """A new folder under `root` named after `stamp`, a time that sorts as text; old finished jobs are removed."""
    _encoded(saved)  # what cannot be saved leaves no folder behind
    try:
        root.mkdir(parents=True, exist_ok=True)
        job = JobFolder(_new_folder(root, stamp))
    except OSError as problem:
        raise StorageError(
            f"no folder can be made here ({problem.strerror})",
            where=str(root),
            expected="a folder in which the states of jobs are kept",
            advice="free space there, or set LOWVRAM_STATE to a folder that you may write to",
        ) from problem
    job.save(saved)
    for old in [j for j in list_jobs(root) if j.finished][:-KEPT]:
        with suppress(BusyError, StorageError):
            old.remove()
    return job


def _encoded(saved: Saved) -> bytes:
    try:
        return msgspec.json.encode(saved)
    except UnicodeEncodeError as problem:
        around = problem.object[max(0, problem.start - 40) : problem.end + 40]
        raise UsageError(
            f'the job cannot be saved: "{around}" holds bytes that are not UTF-8',
            expected="a prompt and names of files in UTF-8",
            advice="write it anew, or rename the file or folder",
        ) from None


def _new_folder(root: Path, stamp: str) -> Path:
    n = 0
    while True:
        folder = root / (stamp if n == 0 else f"{stamp}-{n}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            n += 1


def list_jobs(root: Path) -> list[JobFolder]:
    """All jobs under `root`, oldest first."""
    if not root.is_dir():
        return []
    return [JobFolder(p) for p in sorted(root.iterdir()) if (p / "job.json").exists()]


def find_job(name: str, root: Path) -> JobFolder:
    """The job called `name`, or the newest unfinished one for "last". UsageError if there is none."""
    jobs = list_jobs(root)
    if name == "last":
        open_jobs = [job for job in jobs if not job.finished]
        if open_jobs:
            return open_jobs[-1]
        raise UsageError("no unfinished job", where=str(root), advice="start one with `lowvram generate`")
    for job in jobs:
        if job.name == name:
            return job
    known = ", ".join(job.name for job in jobs[-5:])
    if not known:
        raise UsageError(
            f'no job is called "{name}", there are none yet',
            where=str(root),
            advice="start one with `lowvram generate`",
        )
    raise UsageError(
        f'no job is called "{name}"', where=str(root), expected=f"one of {known}", advice="or name it `last`"
    )


def find_latent(name: str, root: Path) -> JobFolder:
    """The job called `name`, or the newest one with a finished latent for "last". UsageError if there is none."""
    if name != "last":
        return find_job(name, root)
    found = [job for job in list_jobs(root) if job.latent_path.exists()]
    if not found:
        raise UsageError("no finished latent", where=str(root), advice="make one with `lowvram generate`")
    return found[-1]
