"""The acceptance run on a GPU: one command, the most valuable part first.

    python -m lowvram.bench.gpu                          everything; bench/results/GPU-DATE.json grows while it runs
    python -m lowvram.bench.gpu --minutes 9.5            what fits in a slot; the same command goes on later
    python -m lowvram.bench.gpu --only smoke --only vae  some parts, again if they are done already
    python -m lowvram.bench.gpu --dry                    all parts on a CPU, with the embedded model

Run it in the root of a clone. It needs Python 3.11 or newer and a torch with CUDA; nothing has to be installed if the
packages of pyproject.toml are there. For a machine without a network, collect what a bare Python 3.12 with torch lacks
(about 41 MB; diffusers and sageattention are only compared with):

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d wheels \\
        av msgspec platformdirs rich diffusers importlib_metadata zipp sageattention==1.0.6

and there, without a network:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 -m lowvram.bench.gpu --folder /tmp --minutes 9.5

Real sizes need about 36 GB of disk in --folder for random checkpoints, which are removed at the end.
Every part is a process of its own with a time limit of its own, and is written down as soon as it is done.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from lowvram.bench.child import run_module
from lowvram.bench.parts import PARTS, Setup, Verdict
from lowvram.bench.results import Ceilings, Part, Results, load, new_results, save
from lowvram.bench.suite import table
from lowvram.machine import load_rates, rates_path
from lowvram.survey import identify

RESERVE = 15.0
"""Seconds kept at the end of a slot to write and to print."""


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if no part failed."""
    options = _parser().parse_args(arguments)
    place = identify("cpu" if options.dry else None)
    if place.kind == "cpu" and not options.dry:
        print("no CUDA device here: --dry runs every part on the CPU", file=sys.stderr)
        return 2
    results, path = _open(options.output, options.dry)
    folder = Path(tempfile.mkdtemp(prefix="lowvram-bench-", dir=options.folder))
    try:
        _run(results, path, Setup(options.dry, str(folder)), options.only, 60 * options.minutes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(results.measurements))
    print("\n".join(_line(part) for part in results.parts))
    print(path)
    return int(any(part.outcome == "failed" for part in results.parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lowvram.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU, with the embedded model")
    parser.add_argument("--minutes", type=float, default=120, help="when to stop starting parts")
    parser.add_argument(
        "--only", action="append", choices=tuple(PARTS), default=[], help="run these parts, even again"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench/results"), help="folder of the results file"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where random checkpoints are written")
    return parser


def _open(folder: Path, dry: bool) -> tuple[Results, Path]:
    """The results file of this device and day, new or to be continued."""
    place = identify("cpu" if dry else None)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    device = re.sub(r"[^a-z0-9]+", "-", place.label.removeprefix("NVIDIA ").lower()).strip("-")
    path = folder / f"{'dry' if dry else device}-{date}.json"
    folder.mkdir(parents=True, exist_ok=True)
    return (load(path) if path.exists() else new_results(place, date)), path


def _run(results: Results, path: Path, setup: Setup, only: list[str], seconds: float) -> None:
    end = time.monotonic() + seconds - RESERVE
    done = {part.name for part in results.parts if part.outcome != "timed out"}
    for name in only or [name for name in PARTS if name not in done]:
        left = end - time.monotonic()
        if left < 10:
            print(f"{name}: no time left in this slot", flush=True)
            continue
        part = _one(name, setup, min(PARTS[name][0], left), results)
        results.parts = [p for p in results.parts if p.name != name] + [part]
        rates = load_rates(rates_path(setup.kind))
        if rates is not None:
            results.ceilings = Ceilings(rates.matmul, rates.attention, rates.link, rates.disk)
        save(path, results)
        print(_line(part), flush=True)


def _one(name: str, setup: Setup, limit: float, results: Results) -> Part:
    arguments = [name, msgspec.json.encode(setup).decode()]
    outcome = run_module("lowvram.bench.parts", arguments, limit)
    if outcome.timed_out:
        return Part(name, "timed out", outcome.seconds, {}, outcome.why)
    if not outcome.result:
        return Part(name, "failed", outcome.seconds, {}, outcome.why)
    verdict = msgspec.json.decode(outcome.result, type=Verdict)
    known = {(m.case, m.placement, m.vram_budget) for m in verdict.measurements}
    results.measurements = [
        m for m in results.measurements if (m.case, m.placement, m.vram_budget) not in known
    ] + verdict.measurements
    return Part(name, verdict.outcome, outcome.seconds, verdict.facts, verdict.why)


def _line(part: Part) -> str:
    why = f": {part.why}" if part.why else ""
    return f"{part.name.ljust(14)} {part.outcome.ljust(18)} {part.seconds:6.1f} s{why}"


if __name__ == "__main__":
    sys.exit(main())
