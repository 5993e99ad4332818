"""What a machine can do, as far as a forecast needs it: measured here once, or read from a table for cards elsewhere."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowvram.errors import FileError, StorageError
from lowvram.folders import cache_folder
from lowvram.offload.io import read_small_text, write_atomic
from lowvram.sampling.presets import unknown_name

ASSUMED_DISK = 2e9
"""Bytes/s of a disk nobody has measured."""
_MAX_SAVED = 1 << 16
_SCHEMA = "lowvram.machine/1"


@dataclass(frozen=True, slots=True)
class Machine:
    """Sizes in bytes, rates per second."""

    name: str
    label: str
    kind: str
    """"cuda" or "cpu"."""
    vram: int
    """What a job may use: free now on this machine, or the card's size less its display."""
    ram: int
    """What a job may use of the host's memory."""
    matmul: float
    """FLOP/s that large multiplications reach in the compute dtype."""
    attention: float
    """FLOP/s that attention over long sequences reaches in the compute dtype."""
    link: float
    """Host to device, from pinned memory."""
    disk: float
    """Sequential reads."""
    context: int
    """Device memory taken before the first tensor, outside torch's allocator: CUDA context, kernels, library handles."""
    workspaces: int
    """Device memory that cuBLAS takes from torch's allocator and keeps."""
    measured: bool
    """Whether the rates were measured here. Otherwise they are a vendor's figures times an assumed share."""
    arch: str = ""
    """"sm_89" and the like; empty for a CPU."""
    unfused: str = ""
    """Why the operations between multiplications are those of torch; "" if the fused kernels run."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each number comes from, by field."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured on this machine, kept until the device, its driver or torch changes."""

    device: str
    driver: str
    torch: str
    matmul: float
    attention: float
    link: float
    disk: float
    disk_folder: str
    """The folder whose disk was measured."""
    context: int
    workspaces: int


def machine_names() -> tuple[str, ...]:
    """The cards of the table."""
    return tuple(name for name in _table() if name not in ("defaults", "sources"))


def machine_profile(name: str) -> Machine:
    """The machine of the table called `name`. UsageError with the nearest name if there is none."""
    table = _table()
    defaults, sources = table.pop("defaults"), table.pop("sources")
    if name not in table:
        raise unknown_name("machine", name, table, where="--machine")
    card = defaults | table[name]
    return Machine(
        name=name,
        label=card["label"],
        kind="cuda",
        vram=card["vram"] - card["display"],
        ram=card["ram"],
        matmul=card["matmul"] * card["matmul_share"],
        attention=card["matmul"] * card["attention_share"],
        link=card["link"],
        disk=card["disk"],
        context=card["context"],
        workspaces=card["workspaces"],
        measured=False,
        arch=card["arch"],
        sources=sources | card.get("sources", {}),
    )


def _table() -> dict[str, Any]:
    return tomllib.loads(files("lowvram").joinpath("presets", "machines.toml").read_text(encoding="utf-8"))


def this_machine(device: str | None = None) -> Machine:
    """The machine this runs on: `device` ("cuda", "cpu"), or its CUDA device if there is one, else its processor.

    Rates are those that `lowvram doctor` measured and kept, if it did. Otherwise multiplication, attention and
    copies are measured now, in a fraction of a second, and the disk's rate is assumed.
    """
    import torch

    from lowvram import survey
    from lowvram.triton_kernels.dispatch import ops_obstacle

    place = survey.identify(device)
    rates = load_rates(rates_path(place.kind))
    if rates is not None and (rates.device, rates.driver, rates.torch) == (
        place.label,
        place.driver,
        place.torch_version,
    ):
        sources = dict.fromkeys(
            ("matmul", "attention", "link", "disk", "context", "workspaces"), "measured by the doctor"
        )
    else:
        rates = survey.quick_rates(place)
        sources = dict.fromkeys(("matmul", "attention", "link"), "measured just now") | {
            "disk": "assumed: `lowvram doctor` measures it",
            "context": "assumed" if place.kind == "cuda" else "none",
            "workspaces": "assumed" if place.kind == "cuda" else "none",
        }
    memory = survey.memory(place)
    return Machine(
        name="this machine",
        label=place.label,
        kind=place.kind,
        vram=memory.vram,
        ram=memory.ram,
        matmul=rates.matmul,
        attention=rates.attention,
        link=rates.link,
        disk=rates.disk,
        context=rates.context,
        workspaces=rates.workspaces,
        measured=True,
        arch=place.arch,
        unfused=ops_obstacle(torch.device(place.kind), place.arch),
        sources=sources | {"vram": "free now", "ram": "free now"},
    )


def rates_path(kind: str) -> Path:
    """Where the rates of this machine are kept."""
    return cache_folder() / f"machine-{kind}.json"


def save_rates(path: Path, rates: Rates) -> None:
    """Keep what was measured. StorageError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise StorageError(
            f"no folder can be made here ({problem.strerror})",
            where=str(path.parent),
            advice="set LOWVRAM_CACHE to a folder that you may write to",
        ) from problem
    values = {f.name: getattr(rates, f.name) for f in fields(Rates)}
    write_atomic(path, json.dumps({"schema": _SCHEMA} | values, indent=1).encode())


def load_rates(path: Path) -> Rates | None:
    """What was kept; None if nothing was, or if it cannot be understood: measuring again costs little."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(read_small_text(path, _MAX_SAVED))
        if stored.pop("schema") != _SCHEMA:
            return None
        rates = Rates(**stored)
        numbers = (rates.matmul, rates.attention, rates.link, rates.disk)
        return rates if all(n > 0 for n in numbers) and min(rates.context, rates.workspaces) >= 0 else None
    except (FileError, StorageError, ValueError, TypeError, KeyError, AttributeError):
        return None
