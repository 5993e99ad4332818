"""A matrix on the host behaves like a tensor, whatever is read and written in which order."""

from __future__ import annotations

import random

import pytest
import torch
from strict_device import DEVICE, Strict, StrictDevice

from lowvram.errors import DeviceLostError, OutOfMemoryError
from lowvram.offload.budget import Ledger
from lowvram.offload.device import CpuDevice
from lowvram.offload.estimate import track
from lowvram.offload.faults import FaultPlan, Faults
from lowvram.offload.rows import HostRows


@pytest.mark.parametrize(("n", "window"), [(1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (9, 4), (31, 8)])
def test_reads_and_writes_are_those_of_a_tensor(n: int, window: int) -> None:
    """Without a race between the queues."""
    with Strict():
        check_reads_and_writes(StrictDevice(None, Ledger(None, "RAM")), n, window)


def check_reads_and_writes(device: StrictDevice, n: int, window: int) -> None:
    rng = random.Random(n)
    rows, tensor = HostRows(device, "x", n, 3, torch.float32, window), torch.zeros(n, 3)
    runs = [(i, min(i + window, n)) for i in range(0, n, window)]
    for i, j in runs:
        tensor[i:j] = torch.randn(j - i, 3)
        rows[i:j] = tensor[i:j].to(DEVICE)
    for _ in range(40):
        sweep = runs if rng.random() < 0.7 else rng.sample(runs, len(runs))
        if rng.random() < 0.2:  # runs that begin elsewhere, and are shorter
            sweep = [(i, min(i + rng.randint(1, window), n)) for i in rng.sample(range(n), min(n, 4))]
        for i, j in sweep:
            held = rows[i:j]
            assert torch.equal(held.cpu(), tensor[i:j])
            if rng.random() < 0.3:
                held += 1
                rows[i:j] = held
                tensor[i:j] += 1
            if rng.random() < 0.5:
                tensor[i:j] = tensor[i:j] * 0.5 + rng.random()
                rows[i:j] = tensor[i:j].to(DEVICE)
            if rng.random() < 0.2:
                a, b = rng.choice(runs)
                tensor[a:b] += 1
                rows[a:b] = tensor[a:b].to(DEVICE)
    assert rows.shape == tensor.shape and rows.device == DEVICE
    rows.close()
    assert device.ram.used == 0


@pytest.mark.parametrize(("n", "kept"), [(1, 3), (9, 3), (10, 3), (31, 5)])
def test_rows_that_are_kept_on_the_device_are_those_of_the_matrix(n: int, kept: int) -> None:
    device, rng = CpuDevice(), random.Random(n)
    rows, tensor = HostRows(device, "x", n, 3, torch.float32, 4, kept), torch.zeros(n, 3)
    for start in [*range(0, n, 4), *(rng.randrange(n) for _ in range(20))]:
        some = slice(start, min(n, start + 4))
        tensor[some] = torch.randn(some.stop - start, 3)
        rows[some] = tensor[some]
        if start + 4 >= n:
            assert torch.equal(rows[0:n:kept], tensor[::kept])
    for start in range(0, n, 4):  # changed where it lies
        held = rows[start : start + 4]
        held += 1
        rows[start : start + 4] = held
    assert torch.equal(rows[::kept], tensor[::kept] + 1)
    rows.close()
    assert device.ram.used == 0


def test_a_slice_longer_than_the_window_is_refused() -> None:
    rows = HostRows(CpuDevice(), "x", 9, 3, torch.float32, 4)
    for wrong in (slice(0, 5), slice(3, 3), slice(0, 4, 2)):
        with pytest.raises(IndexError):
            rows[wrong]
    rows.close()


def test_no_room_and_failed_copies_leave_nothing_claimed() -> None:
    with pytest.raises(OutOfMemoryError):
        HostRows(CpuDevice(ram=Ledger(100, "RAM")), "x", 9, 3, torch.float32, 4)
    device = CpuDevice()
    with (
        pytest.raises(OutOfMemoryError),
        track(capacity=2 * 4 * 3 * 4 - 1),
    ):  # one byte less than both windows
        HostRows(device, "x", 9, 3, torch.float32, 4)
    assert device.ram.used == 0
    device = CpuDevice(faults=Faults(FaultPlan("copy", 2)))
    rows = HostRows(device, "x", 9, 3, torch.float32, 4)
    rows[0:4] = torch.ones(4, 3)
    with pytest.raises(DeviceLostError):
        rows[4:8]
    rows.close()
    assert device.ram.used == 0
