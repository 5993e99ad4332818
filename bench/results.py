"""The results file: what was measured, on what, with what. One JSON object that grows while a benchmark runs."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import msgspec
import psutil  # type: ignore[import-untyped]

from lowvram import __version__
from lowvram.errors import FileError
from lowvram.offload.io import read_small_text, write_atomic
from lowvram.report import Sample
from lowvram.survey import Place

MAX_BYTES = 16 << 20
LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "transformers",
    "accelerate",
    "sageattention",
    "comfy-kitchen",
)

Fact = bool | int | float | str | None


class Environment(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The machine, described without naming it. Bytes."""

    device: str
    kind: Literal["cpu", "cuda"]
    arch: str
    driver: str
    system: str
    cores: int
    ram: int
    vram: int
    libraries: dict[str, str]


class Ceilings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What this machine reached while nothing else ran: FLOP/s and bytes/s."""

    matmul: float
    attention: float
    link: float
    disk: float


class Stage(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One stage of a job. Seconds and bytes."""

    name: str
    seconds: float
    vram_predicted: int
    vram_measured: int | None
    disk_read: int
    h2d: int
    stalls: dict[str, float]


class Measurement(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One case under one budget."""

    case: str
    model: str
    weights: str
    width: int
    height: int
    frames: int
    placement: str
    """"resident", "ram", "disk cold" or "disk warm": where the blocks that are not resident come from."""
    vram_budget: int
    ram_budget: int
    ballast: bool
    """Whether the rest of the card was taken away, so that the cap held in fact."""
    blocks: dict[str, int]
    seconds: float
    """Median of `runs`."""
    runs: list[float]
    steps: list[float]
    """Seconds of each denoise step of the last run."""
    handover: float | None
    """Seconds that the first step of the second expert took more than its others."""
    vram_predicted: int
    vram_allocated: int | None
    """Peak that the allocator saw, context included; on a CPU, of tensors counted one by one, less noise and finished
    latent, which wait in host memory."""
    vram_driver: int | None
    """Peak that the driver saw, less what was taken before."""
    ram_predicted: int
    rss: int
    pinned: int
    stages: list[Stage]
    samples: list[Sample] = []
    """Memory when stages and steps of the last run began and ended."""
    flops: float
    fraction: float | None
    """Ideal over measured seconds: 1 is the ceiling of this machine."""
    checksum: str
    """Of the latent's or the frames' bytes: equal for equal results."""


class Projection(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A case on a card that is not here: arithmetic, never a measurement."""

    case: str
    model: str
    machine: str
    vram_budget: int
    seconds: float
    vram: int
    ram: int
    kind: Literal["projection"] = "projection"


class Part(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One part of an acceptance run."""

    name: str
    outcome: Literal["passed", "failed", "timed out", "not possible here"]
    seconds: float
    facts: dict[str, Fact]
    why: str = ""


class Peer(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One program doing the peers' work once (bench/README.md says which)."""

    name: str
    version: str
    mode: str
    size: str
    """Of the work, in `bench/peers/sizes.py`."""
    seconds: float | None
    """Of one forward: processor time on a CPU, elapsed time on a GPU; median of the rounds."""
    overhead: float | None
    """Median of `overheads`."""
    overheads: list[float] = []
    """Of each round: seconds over those of the same network with everything resident, in the same round."""
    rss: int | None
    vram: int | None = None
    """Peak that torch's allocator saw."""
    driver: int | None = None
    """Peak that the driver saw."""
    disk_read: int | None
    """Bytes asked of files in one forward."""
    exact: bool | None
    """Whether its output equals, bit for bit, that of the same network with everything resident."""
    difference: float | None = None
    """Relative difference to diffusers with everything resident: the work is the same."""
    note: str = ""


class Results(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The file."""

    schema: Literal["lowvram.bench/1"] = "lowvram.bench/1"
    version: str
    date: str
    environment: Environment
    ceilings: Ceilings | None = None
    measurements: list[Measurement] = []
    projections: list[Projection] = []
    parts: list[Part] = []
    peers: list[Peer] = []


def environment(place: Place) -> Environment:
    """This machine and its libraries."""
    vram = 0
    if place.kind == "cuda":
        import torch

        vram = int(torch.cuda.get_device_properties(0).total_memory)
    return Environment(
        device=place.label if place.kind == "cuda" else f"{os.cpu_count()} cores {platform.machine()}",
        kind="cuda" if place.kind == "cuda" else "cpu",
        arch=place.arch,
        driver=place.driver,
        system=platform.system(),
        cores=os.cpu_count() or 1,
        ram=int(psutil.virtual_memory().total),
        vram=vram,
        libraries={"python": platform.python_version()} | _versions(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def new_results(place: Place, date: str) -> Results:
    """An empty file."""
    return Results(version=__version__, date=date, environment=environment(place))


def save(path: Path, results: Results) -> None:
    """Replace the file: whatever stops a benchmark, the file on disk is whole. StorageError if it cannot be written."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")


def load(path: Path) -> Results:
    """The results in `path`. FileError if it is not such a file."""
    try:
        return msgspec.json.decode(read_small_text(path, MAX_BYTES), type=Results)
    except msgspec.MsgspecError as problem:
        raise FileError(
            f"not a results file: {problem}",
            where=str(path),
            expected="what `lowvram bench` writes",
            advice="give the file of a benchmark, or another name for a new one",
        ) from problem
