"""The table of peaks: what plans say of named cases, so that a change that costs memory is seen when it is made.

    python -m lowvram.bench.peaks            record all cases in bench/peaks.json
    python -m lowvram.bench.peaks --check    compare with what is recorded; exit code 1 if a peak grew by over 1 %

Plans come from the product's own code on meta tensors at the true sizes, for the rtx4090 profile with 64 GB of RAM and
prompts of full length. No weights, no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.bench.cases import GB
from lowvram.errors import BudgetError
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.machine import machine_profile
from lowvram.media.picture import Picture
from lowvram.offload.budget import Budget
from lowvram.offload.io import read_small_text, write_atomic
from lowvram.planning.choose import choose
from lowvram.planning.facts import Facts, gather
from lowvram.sampling.presets import model_preset
from lowvram.triton_kernels import dispatch

TABLE = Path(__file__).parent / "peaks.json"
TOLERANCE = 0.01
"""Share by which a peak may grow before the table has to be recorded again, with a reason."""
BUDGETS = (16, 8, 6, 4)


@dataclass(frozen=True, slots=True)
class Case:
    """A model in an encoding, and the video that it makes."""

    model: str
    weights: str
    width: int
    height: int
    frames: int
    pictured: bool = False
    """Whether a picture is given where the model could do without."""
    attention: str = "sdpa"

    @property
    def name(self) -> str:
        words = f"{self.model} {self.weights} {self.width}x{self.height}x{self.frames}"
        if self.pictured:
            words += " from a picture"
        return words if self.attention == "sdpa" else f"{words} {self.attention}"


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("wan2.2-t2v-a14b", "fp8", 1280, 720, 121),
        Case("wan2.2-t2v-a14b", "fp8", 1280, 720, 121, attention="int8-fp16"),
        Case("wan2.2-t2v-a14b", "fp8", 1280, 720, 81),
        Case("wan2.2-t2v-a14b", "fp8", 832, 480, 81),
        Case("wan2.2-t2v-a14b", "q4_k_m", 1280, 720, 121),
        Case("wan2.2-i2v-a14b", "fp8", 1280, 720, 121),
        Case("wan2.2-ti2v-5b", "fp8", 1280, 704, 121),
        Case("wan2.2-ti2v-5b", "fp8", 1280, 704, 121, pictured=True),
        Case("wan2.2-animate-14b", "fp8", 1280, 720, 77),
        Case("wan2.1-i2v-14b", "fp8", 832, 480, 81),
        Case("wan2.1-t2v-1.3b", "fp8", 832, 480, 81),
    )
}

Peaks = dict[str, dict[str, int]]
"""By budget: bytes by stage, "ram", and of the least budget "vram"."""


def facts_of(name: str) -> Facts:
    """What a plan of the case knows before it is given a budget."""
    case = CASES[name]
    spec = model_preset(case.model)
    size: dict[str, Any] = {"width": case.width, "height": case.height, "frames": case.frames}
    if case.pictured:
        size["image"] = Picture(path="", sha256="", width=case.width, height=case.height)
    machine = machine_profile("rtx4090")
    attention = dispatch.choose(case.attention, machine.arch, frozenset(dispatch.PACKAGES))
    job = make_job(spec, model=case.model, files={}, attention=attention, **size)
    return gather(job, imagined_model(case.model, spec, case.weights), machine)


def peaks(name: str, budgets: tuple[int, ...] = BUDGETS, least: bool = True) -> Peaks:
    """Peaks of one case under each of `budgets`, in GB, and the least that it can do with."""
    facts, found = facts_of(name), Peaks()
    for budget in budgets:
        try:
            plan = choose(facts, Budget(budget * GB, 64 * GB))
        except BudgetError:
            found[f"{budget} GB"] = {}  # it does not fit
            continue
        found[f"{budget} GB"] = {s.name: s.vram for s in plan.stages} | {"ram": plan.ram}
    if least:
        try:
            choose(facts, Budget(1, 64 * GB))
        except BudgetError as error:
            found["least"] = {"vram": error.minimum_vram or 0}
    return found


def grown(recorded: Mapping[str, Peaks], measured: Mapping[str, Peaks]) -> Iterator[str]:
    """What of `measured` is more than recorded, or does not fit any more; a line each."""
    for name, budgets in measured.items():
        for budget, stages in recorded[name].items():
            if budget not in budgets:
                continue
            for stage, before in stages.items():
                now = budgets[budget].get(stage)
                if now is None or now > before * (1 + TOLERANCE):
                    yield f"{name}, {budget}, {stage}: {before:,} bytes recorded, {now} now"


def load() -> dict[str, Peaks]:
    """The recorded table."""
    table: dict[str, Any] = json.loads(read_small_text(TABLE, 1 << 20))
    return dict(table["cases"])


def record() -> dict[str, Peaks]:
    """Measure all cases and write them down."""
    found = {name: {b: stages for b, stages in peaks(name).items() if stages} for name in CASES}
    write_atomic(
        TABLE, json.dumps({"machine": "rtx4090", "ram": 64 * GB, "cases": found}, indent=1).encode() + b"\n"
    )
    return found


def main() -> int:
    """The command; 1 if a peak grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if not parser.parse_args().check:
        record()
        print(TABLE)
        return 0
    lines = list(grown(load(), {name: peaks(name) for name in CASES}))
    print("\n".join(lines) or "no peak grew")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
