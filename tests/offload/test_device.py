from __future__ import annotations

import pytest
import torch

from lowvram.errors import DeviceLostError, InternalError, OutOfMemoryError
from lowvram.offload.budget import Ledger
from lowvram.offload.cuda import CudaDevice
from lowvram.offload.device import CpuDevice
from lowvram.offload.faults import FaultKind, FaultPlan, Faults


def test_memory_is_claimed_under_its_name_and_given_back() -> None:
    device = CpuDevice(1000, ram=Ledger(5000, "RAM"))
    slot, ring = device.alloc("slot 0", 600), device.host_alloc("ring 0", 5000)
    assert (slot.tensor.shape, slot.tensor.dtype) == ((600,), torch.uint8)
    assert (ring.tensor.shape, ring.tensor.dtype) == ((5000,), torch.uint8)
    assert device.ledger.claims == {"slot 0": 600}
    assert device.ram.claims == {"ring 0": 5000}
    slot.free()
    slot.free()
    ring.free()
    assert (device.ledger.used, device.ram.used) == (0, 0)
    with pytest.raises(InternalError, match="slot 0"):
        _ = slot.tensor


def test_more_than_the_capacity_is_refused_before_it_is_allocated() -> None:
    device = CpuDevice(1000, ram=Ledger(10, "RAM"))
    with pytest.raises(OutOfMemoryError, match="VRAM: big needs"):
        device.alloc("big", 10**18)
    with pytest.raises(OutOfMemoryError, match="RAM: big needs"):
        device.host_alloc("big", 10**18)
    assert (device.ledger.used, device.ram.used) == (0, 0)


def test_memory_the_system_refuses_is_an_out_of_memory_error_without_a_claim() -> None:
    device = CpuDevice()
    with pytest.raises(OutOfMemoryError, match="could not be allocated"):
        device.alloc("big", 2**62)
    with pytest.raises(OutOfMemoryError, match="could not be allocated"):
        device.host_alloc("big", 2**62)
    assert (device.ledger.used, device.ram.used) == (0, 0)


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 100_000])
def test_host_memory_starts_on_a_page_and_is_pinned(nbytes: int) -> None:
    buffer = CpuDevice().host_alloc("ring 0", nbytes)
    assert buffer.tensor.numel() == nbytes
    assert buffer.tensor.data_ptr() % 4096 == 0 or nbytes == 0
    assert buffer.pinned == (nbytes > 0)
    assert buffer.unpinned == ""


def test_memory_that_cannot_be_pinned_is_pageable_with_the_reason() -> None:
    device = CpuDevice(faults=Faults(FaultPlan("pin", 1)))
    first, second = device.host_alloc("ring 0", 10), device.host_alloc("ring 1", 10)
    assert (first.pinned, first.unpinned) == (False, "made to fail")
    assert (second.pinned, second.unpinned) == (True, "")
    assert not device.host_alloc("ring 2", 10, pin=False).pinned


def test_pinned_pages_are_unpinned_once_when_freed() -> None:
    class Pinning(CpuDevice):
        pages = 0

        def _pin(self, pages: torch.Tensor) -> str:
            self.pages += pages.numel()
            return ""

        def _unpin(self, pages: torch.Tensor) -> None:
            self.pages -= pages.numel()

    device = Pinning()
    buffer = device.host_alloc("ring 0", 5000)
    assert device.pages == 8192
    buffer.free()
    buffer.free()
    assert device.pages == 0


def test_copies_are_done_when_their_event_is() -> None:
    device = CpuDevice()
    dst, src = torch.zeros(4), torch.arange(4.0)
    event = device.copy_async(dst, src, after=device.record_compute())
    event.synchronize()
    stall = device.wait(event)
    assert (stall.ready(), stall.seconds()) == (True, 0.0)
    assert torch.equal(dst, src)


def test_free_memory_is_what_cap_and_machine_leave() -> None:
    device = CpuDevice(1000)
    buffer = device.alloc("x", 400)
    assert device.memory_free() == 600
    buffer.free()
    assert CpuDevice().memory_free() > 1000


@pytest.mark.parametrize(("kind", "error"), [("alloc", OutOfMemoryError), ("host_alloc", OutOfMemoryError)])
def test_an_allocation_made_to_fail_leaves_no_claim(kind: FaultKind, error: type[Exception]) -> None:
    device = CpuDevice(faults=Faults(FaultPlan(kind, 2, persistent=True)))
    alloc = device.alloc if kind == "alloc" else device.host_alloc
    alloc("a", 10)
    for _ in range(2):
        with pytest.raises(error):
            alloc("b", 10)
    assert device.ledger.used + device.ram.used == 10


def test_a_copy_made_to_fail_is_a_lost_device() -> None:
    faults = Faults(FaultPlan("copy", 1))
    device = CpuDevice(faults=faults)
    with pytest.raises(DeviceLostError):
        device.copy_async(torch.zeros(1), torch.ones(1))
    device.copy_async(torch.zeros(1), torch.ones(1))
    assert faults.struck == 1


def test_the_cuda_device_implements_the_whole_interface() -> None:
    assert not CudaDevice.__abstractmethods__
