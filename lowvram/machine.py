"""What a machine can do, as far as a forecast needs it: measured here, or read from a table for cards elsewhere."""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import psutil

from lowvram.sampling.presets import unknown_name


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
    """FLOP/s that large multiplications and attention reach in the compute dtype."""
    link: float
    """Host to device."""
    disk: float
    """Sequential reads."""
    context: int
    """Device memory taken before the first tensor: CUDA context, library workspaces."""
    measured: bool
    """Whether the rates were measured here. Otherwise they are a vendor's figures times an assumed share."""


def machine_profile(name: str) -> Machine:
    """The machine of the table called `name`. UsageError with the nearest name if there is none."""
    table = tomllib.loads(files("lowvram").joinpath("presets", "machines.toml").read_text(encoding="utf-8"))
    defaults = table.pop("defaults")
    if name not in table:
        raise unknown_name("machine", name, table, where="--machine")
    card = defaults | table[name]
    return Machine(
        name=name,
        label=card["label"],
        kind="cuda",
        vram=card["vram"] - card["display"],
        ram=card["ram"],
        matmul=card["matmul"] * card["efficiency"],
        link=card["link"],
        disk=card["disk"],
        context=card["context"],
        measured=False,
    )


def this_machine(device: str | None = None, clock: Callable[[], float] = time.perf_counter) -> Machine:
    """The machine this runs on: `device` ("cuda", "cpu"), or its CUDA device if there is one, else its processor.

    The multiplication rate is measured in a few milliseconds; disk and link rates are assumed.
    """
    import torch

    available = psutil.virtual_memory().available
    if device != "cpu" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Machine(
            name="this machine",
            label=torch.cuda.get_device_name(),
            kind="cuda",
            vram=free,
            ram=int(available * 0.8),
            matmul=_matmul_rate(torch.device("cuda"), torch.bfloat16, 4096, clock),
            link=20e9,
            disk=2e9,
            context=500_000_000,
            measured=True,
        )
    return Machine(
        name="this machine",
        label=f"CPU, {os.cpu_count()} threads",
        kind="cpu",
        vram=int(available * 0.4),
        ram=int(available * 0.4),
        matmul=_matmul_rate(torch.device("cpu"), torch.float32, 512, clock) / 2,
        link=10e9,
        disk=1e9,
        context=0,
        measured=True,
    )


def _matmul_rate(device: object, dtype: object, n: int, clock: Callable[[], float]) -> float:
    """FLOP/s of an n x n x n multiplication, best of three."""
    import torch

    a = torch.ones(n, n, device=device, dtype=dtype)  # type: ignore[call-overload]
    best = float("inf")
    for _ in range(4):
        start = clock()
        (a @ a)[0, 0].item()
        best = min(best, clock() - start)
    return 2 * n**3 / best
