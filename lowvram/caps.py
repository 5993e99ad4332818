"""The device of a job and its budget, from what was asked for and what is here."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowvram.errors import UsageError
from lowvram.machine import Machine, this_machine
from lowvram.offload.budget import Budget, format_bytes, parse_bytes


def check_device(device: str | None) -> None:
    """UsageError for a device that is none, or that is not here."""
    if device not in (None, "cpu", "cuda"):
        raise UsageError(
            f'device "{device}"', where="--device", expected="cpu or cuda", advice="leave it out"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "no CUDA device here", where="--device", advice="check the driver, or use --device cpu"
        )


def machine_here(device: str | None) -> Machine:
    check_device(device)
    return this_machine(device)


def budget_of(vram: str | int | None, ram: str | int | None, machine: Machine) -> Budget:
    return Budget(
        machine.vram if vram is None else size_of(vram, "--vram"),
        machine.ram if ram is None else size_of(ram, "--ram"),
    )


def size_of(value: str | int, flag: str) -> int:
    """Bytes, typed with a unit or given as a whole number. UsageError for anything else."""
    if isinstance(value, str):
        return parse_bytes(value, flag=flag)
    if not isinstance(value, int) or value < 1:
        raise UsageError(
            f"{value!r} bytes",
            where=flag,
            expected='a size such as "16GB", or a whole number of bytes',
            advice='write it with its unit, such as "16GB"',
        )
    return value


def beside(budget: Budget, kept: int) -> Budget:
    """What is left for jobs. UsageError if that is nothing."""
    if not 0 <= kept < budget.ram:
        raise UsageError(
            f"{format_bytes(kept)} of {format_bytes(budget.ram)} RAM are to be kept",
            where="keep",
            expected="less than the RAM of the budget",
            advice="give a larger ram, or keep less",
        )
    return replace(budget, ram=budget.ram - kept)
