"""lowvram bench: figures of this machine, from models of random numbers at the true sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowvram.cli import options as o
from lowvram.errors import UsageError

if TYPE_CHECKING:
    from lowvram.bench.results import Results


def bench(
    dry: Annotated[
        bool,
        typer.Option(
            "--dry", help="Every case on the embedded model: shows that it runs, in a minute or two."
        ),
    ] = False,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Results file; one that exists is continued."),
    ] = Path("bench.json"),
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", metavar="FOLDER", help="Where random checkpoints are written and kept: about 40 GB."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="FORMAT", help="Their encoding; fp8 if left out.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats", min=1, metavar="N", help="Rounds of each case; the median counts. 3 if left out."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="TEXT",
            help="Only cases with TEXT in their name, such as job, 832x480x81, 'disk cold' or '16 GB'; several: all of them.",
        ),
    ] = None,
    device: o.Device = None,
    quiet: o.Quiet = False,
) -> None:
    """Measure named cases under hard budgets. Each has a process of its own; results go into one JSON file."""
    if not dry and folder is None:
        raise UsageError(
            "no folder for the random checkpoints",
            where="--folder",
            expected="a folder with about 40 GB of room, or --dry",
            advice="give --folder DIR on the disk that your models lie on, or --dry",
        )
    for flag, given in (("--folder", folder), ("--weights", weights), ("--repeats", repeats)):
        if dry and given is not None:
            raise UsageError(
                f"{flag} {given} beside --dry",
                expected="one or the other: --dry runs every case once, on the embedded model as it is",
                advice=f"leave {flag} out, or --dry",
            )
    from lowvram.bench import suite
    from lowvram.caps import check_device
    from lowvram.cli.console import emit, say

    check_device(device)
    results = _open(output, device)
    tell = (lambda text: None) if quiet else say
    failed = suite.run(
        results,
        output,
        dry=dry,
        folder=folder,
        weights=weights or "fp8",
        repeats=1 if dry else repeats or 3,
        device=device,
        tell=tell,
        only=only or (),
    )
    if not quiet:
        say(suite.table(results.measurements))
    emit(str(output))
    if failed:
        raise typer.Exit(70)


def _open(path: Path, device: str | None) -> Results:
    from datetime import UTC, datetime

    from lowvram.bench import results
    from lowvram.survey import identify

    made = results.new_results(identify(device), datetime.now(UTC).strftime("%Y-%m-%d"))
    if path.exists():
        found = results.load(path)
        begun, here = found.environment, made.environment
        if (begun.device, begun.arch) != (here.device, here.arch):
            raise UsageError(
                f"figures of another device ({begun.device})",
                where=str(path),
                expected=f"those of this one ({here.device}): a file holds the figures of one device",
                advice="name another file with -o",
            )
        return found
    results.save(path, made)
    return made
