"""Carrying on with a job until its output is there, whatever kind it is: locked, shown while it runs, told at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowvram.cli.console import Terminated, emit, emit_json, say
from lowvram.cli.progress import Forecast, Progress, progress_mode
from lowvram.errors import StorageError, UsageError
from lowvram.job import Job
from lowvram.media.target import check_place, check_target, reserved
from lowvram.offload.budget import format_bytes
from lowvram.offload.io import write_atomic
from lowvram.planning.plan import Plan
from lowvram.report import Report, Sample, table
from lowvram.state import JobFolder
from lowvram.timeline import draw


@dataclass(frozen=True, slots=True)
class Output:
    """Where a job's result goes, and what is said of it."""

    target: Path
    """The video."""
    overwrite: bool = False
    as_json: bool = False
    quiet: bool = False
    report: Path | None = None
    """Where to write where memory, bytes and time went: JSON, or a drawing if its name ends with .svg."""
    preview: int | None = None
    """Steps between two looks at what the video will be."""
    preview_decoder: Path | None = None
    """The small decoder that makes them."""

    def check(self) -> None:
        """Before anything else: an output that cannot be written ends the command at once."""
        check_target(self.target, self.overwrite)
        if self.report is not None:
            check_report(self.report)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """`check`, and keep other jobs from making the video until the block ends: BusyError if one does."""
        self.check()
        with reserved(self.target):
            yield

    def progress(self, forecast: list[Forecast], plan: Plan) -> Progress:
        """For work under `plan`."""
        return Progress(forecast, plan.budget.vram, time.monotonic, progress_mode(self.quiet, self.as_json))

    def tell(self, job: Job, plan: Plan, report: Report) -> None:
        """The file's path on stdout; on a terminal, where time and memory went."""
        if self.as_json:
            emit_json(
                {
                    "schema": "lowvram.result/1",
                    "output": str(self.target),
                    "seed": job.seed,
                    "report": report.to_json(),
                }
            )
        else:
            if not self.quiet:
                say(table(report))
            emit(str(self.target))
        if self.report is not None:  # last: the video is there, whatever becomes of this file
            write_report(report, plan, self.report)


@dataclass(frozen=True, slots=True)
class Rest:
    """What is left of a job."""

    forecast: list[Forecast]
    about: list[str]
    """Lines to begin with."""
    make: Callable[[Progress], Report]
    """Do it. What is finished meanwhile is in the job's folder."""


def carry_on(folder: JobFolder, job: Job, plan: Plan, out: Output, find: Callable[[], Rest]) -> None:
    """Do what `find` says is left. It is asked once the job is locked: until then another process may be at work."""
    with folder.locked():
        rest = find()
        with out.progress(rest.forecast, plan) as progress:
            try:
                for line in rest.about:
                    progress.note(line)
                report = rest.make(progress)
            except KeyboardInterrupt as stop:
                what = str(stop) or ("terminated" if isinstance(stop, Terminated) else "interrupted")
                raise type(stop)(f"{what}; go on with `lowvram resume {folder.name}`") from None
            except StorageError as lack:
                raise StorageError(
                    lack.found,
                    where=lack.where,
                    expected=lack.expected,
                    advice=f"{lack.advice}; `lowvram resume {folder.name}` goes on, with -o FILE to another place",
                ) from lack
        folder.finish()
    out.tell(job, plan, report)


def check_report(path: Path) -> None:
    """Known before hours of work, and no video is replaced by it: UsageError for a name that no report has, StorageError
    if no file can be made there."""
    if path.suffix.lower() not in (".json", ".svg"):
        raise UsageError(
            "a report is neither JSON nor a drawing by this name",
            where=f"--report {path}",
            advice="give a name that ends in .json or .svg",
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            "this is a folder" if path.is_dir() else "its folder does not exist",
            where=f"--report {path}",
            advice="give the name of a file in a folder that is there",
        )
    check_place(path)


def write_report(report: Report, plan: Plan, path: Path) -> None:
    """The report as JSON, or as a drawing of the memory over time if the name ends with .svg."""
    if path.suffix.lower() == ".svg":
        said = draw(report.samples or (Sample(0.0, "", 0, 0, 0),), plan.budget)
    else:
        said = json.dumps(report.to_json(), indent=2) + "\n"
    write_atomic(path, said.encode())


def summary(job: Job, plan: Plan) -> str:
    """One line about what is to come."""
    blocks = plan.blocks()
    places = ", ".join(f"{n} {where}" for where, n in blocks.items() if n)
    return f"{job.summary}; at most {format_bytes(plan.vram)} of {format_bytes(plan.budget.vram)} VRAM; blocks: {places}"
