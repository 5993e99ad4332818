"""What a machine lacks before an acceptance run begins: a line each, with what to do about it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowvram.offload.io import free_bytes
from lowvram.triton_kernels import toolchain

NEEDED = (
    "numpy",
    "sentencepiece",
    "safetensors",
    "av",
    "PIL",
    "typer",
    "rich",
    "msgspec",
    "platformdirs",
    "psutil",
    "yaml",
)
"""What lowvram imports, by import name."""
COMPARED: Mapping[str, str] = {
    "diffusers": "its block beside ours",
    "sageattention": "its attention beside ours",
}
DISK = 40 * 10**9
"""Bytes of random checkpoints, and some for results."""
RAM = 56 * 10**9
"""Bytes of host memory for jobs that keep their blocks there: 48 GB, and the process."""


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that is not here."""

    what: str
    fatal: bool
    """Whether nothing can run without it."""

    def __str__(self) -> str:
        return f"{'missing' if self.fatal else 'note'}: {self.what}"


def lacks(
    folder: Path,
    *,
    dry: bool,
    has: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
    ram: int | None = None,
) -> Iterator[Lack]:
    """What is missing here for a run whose checkpoints go to `folder`. Touches no GPU memory.

    has  whether a package can be imported
    ram  bytes of host memory that can be had; measured if None
    """
    for name in ("torch", *NEEDED):
        if not has(name):
            yield Lack(f"the package {name}: carry it as a wheel (python bench/wheels.py)", True)
    if dry or not has("torch"):
        return
    yield from _of_the_card(has)
    for name, what in COMPARED.items():
        if not has(name):
            yield Lack(f"the package {name}: {what} is not measured", False)
    room = free_bytes(folder)
    if room < DISK:
        yield Lack(
            f"{DISK / 1e9:.0f} GB of disk in {folder} ({room / 1e9:.0f} GB are free): give --folder", False
        )
    there = _available() if ram is None else ram
    if there < RAM:
        yield Lack(
            f"{RAM / 1e9:.0f} GB of RAM for blocks ({there / 1e9:.0f} GB are free): some jobs will fail",
            False,
        )


def _of_the_card(has: Callable[[str], bool]) -> Iterator[Lack]:
    import torch

    if torch.version.cuda is None:
        yield Lack(f"a torch with CUDA; this is {torch.__version__}", True)
    elif not torch.cuda.is_available():
        yield Lack(
            "a CUDA device that torch can use: nvidia-smi shows the driver; --dry runs every part on a CPU",
            True,
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        yield Lack(f"torch 2.10 or newer; this is {torch.__version__}", True)
    if not has("triton"):
        yield Lack("the package triton: kernels are not measured, torch does their work", False)
    elif toolchain.lack():
        yield Lack(f"{toolchain.lack()}; triton starts no kernel without, torch does their work", False)


def _available() -> int:
    if importlib.util.find_spec("psutil") is None:
        return RAM
    from lowvram.offload.limits import host_limits

    return host_limits().usable
