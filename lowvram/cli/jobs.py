"""lowvram jobs: the jobs that are kept on this machine, how far they are, and how to be rid of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowvram.cli import options as o

if TYPE_CHECKING:
    from lowvram.standing import Standing

PROMPT = 40
"""Characters of a prompt that are shown."""


def jobs(context: typer.Context, as_json: o.Json = False) -> None:
    """List the jobs that are kept, oldest first. `resume` goes on with one that is not finished."""
    if context.invoked_subcommand is not None:
        return
    from lowvram.cli.console import emit, emit_json, say
    from lowvram.folders import jobs_folder
    from lowvram.standing import standing
    from lowvram.state import list_jobs

    found = [standing(folder) for folder in list_jobs(jobs_folder())]
    if as_json:
        for each in found:
            emit_json(record(each))
    elif found:
        emit(table(found))
        say("`lowvram resume JOB` goes on with one, `lowvram jobs rm JOB` removes it")
    else:
        say(f"no jobs are kept in {jobs_folder()}")


def rm(
    names: Annotated[list[str] | None, typer.Argument(metavar="JOB", help="Jobs by name.")] = None,
    older_than: Annotated[
        int | None,
        typer.Option("--older-than", metavar="DAYS", help="All that nobody has worked on for so many days."),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Remove jobs, finished or not. Their videos stay; one that is running is refused."""
    from lowvram.cli.console import emit, emit_json
    from lowvram.errors import UsageError
    from lowvram.folders import jobs_folder
    from lowvram.offload.budget import format_bytes
    from lowvram.standing import standing
    from lowvram.state import find_job, list_jobs

    if older_than is not None and older_than < 1:
        raise UsageError(
            f"{older_than} days", where="--older-than", expected="1 or more", advice="give whole days"
        )
    if bool(names) == (older_than is not None):
        raise UsageError(
            "names beside --older-than" if names else "no job is named",
            expected="the names of jobs, or --older-than DAYS",
            advice="`lowvram jobs` lists them",
        )
    root = jobs_folder()
    chosen = [standing(find_job(name, root)) for name in dict.fromkeys(names or ())]
    if older_than is not None:
        before = time.time() - 86400 * older_than
        kept = [standing(folder) for folder in list_jobs(root)]
        chosen = [each for each in kept if each.touched < before and each.state != "running"]
    for each in chosen:
        each.folder.remove()
        if as_json:
            emit_json({"schema": "lowvram.removed/1", "job": each.folder.name, "bytes": each.nbytes})
        else:
            emit(f"{each.folder.name}  {format_bytes(each.nbytes)}")


def record(one: Standing) -> dict[str, Any]:
    """A job as an object for programs."""
    saved = one.saved
    return {
        "schema": "lowvram.job/1",
        "job": one.folder.name,
        "state": one.state,
        "step": one.step,
        "steps": one.steps,
        "segment": one.segment,
        "segments": one.segments,
        "bytes": one.nbytes,
        "touched": int(one.touched),
        "model": saved and saved.job.model,
        "width": saved and saved.job.width,
        "height": saved and saved.job.height,
        "frames": saved and saved.job.frames,
        "prompt": saved and saved.job.prompt,
        "output": saved and saved.output,
    }


def table(found: Sequence[Standing]) -> str:
    """The jobs for people."""
    from lowvram.cli.console import one_line
    from lowvram.columns import aligned
    from lowvram.offload.budget import format_bytes

    rows = [("job", "state", "step", "last worked on", "on disk", "output", "prompt")]
    for each in found:
        saved = each.saved
        prompt = "" if saved is None else one_line(saved.job.prompt)
        rows.append(
            (
                each.folder.name,
                each.state,
                _step(each),
                datetime.fromtimestamp(each.touched).strftime("%Y-%m-%d %H:%M"),
                format_bytes(each.nbytes),
                "" if saved is None else one_line(saved.output),
                prompt if len(prompt) <= PROMPT else prompt[: PROMPT - 3] + "...",
            )
        )
    size = rows[0].index("on disk")
    return "\n".join(aligned(rows, left=[place for place in range(len(rows[0])) if place != size]))


def _step(one: Standing) -> str:
    if one.saved is None:
        return ""
    if one.segments == 1:
        return f"{one.step}/{one.steps}"
    if one.state == "finished" or one.segment == one.segments:
        return f"all {one.segments} segments"
    return f"{one.step}/{one.steps} of segment {one.segment + 1}/{one.segments}"
