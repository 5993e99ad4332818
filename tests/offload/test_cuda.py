"""CudaDevice on a stand-in for torch.cuda that writes down what is asked of it: in what order, and as torch is asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.errors import DeviceLostError, OutOfMemoryError
from lowvram.offload import cuda
from lowvram.offload.budget import Ledger
from lowvram.offload.cuda import CudaDevice

GB = 10**9


class Event:
    """Named by when it was made."""

    def __init__(self, card: StandIn, **how: bool) -> None:
        inspect.signature(torch.cuda.Event.__new__).bind(None, **how)
        self._card, self.timed = card, how["enable_timing"]
        self.name = f"event {len(card.events)}"
        card.events.append(self)

    def record(self, stream: Stream) -> None:
        self._card.said.append(f"{stream.name}: record {self.name}")

    def synchronize(self) -> None:
        self._card.said.append(f"host: wait for {self.name}")

    def elapsed_time(self, end: Event) -> float:
        assert self.timed and end.timed
        return 250.0


class Stream:
    def __init__(self, card: StandIn, name: str) -> None:
        self._card, self.name = card, name

    def wait_event(self, event: Event) -> None:
        self._card.said.append(f"{self.name}: wait for {event.name}")


class StandIn:
    """What `lowvram.offload.cuda` takes for torch."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.events: list[Event] = []
        self.status, self.queue = 0, Stream(self, "compute")
        self.fault: Exception | None = None
        self.cuda = SimpleNamespace(
            Event=lambda **how: Event(self, **how),
            Stream=lambda device: Stream(self, "copies"),
            stream=self._stream,
            device=lambda device: nullcontext(),
            current_stream=lambda device: self.queue,
            cudart=lambda: self,
            get_device_properties=lambda device: SimpleNamespace(total_memory=8 * GB),
            set_per_process_memory_fraction=self._as_torch("set_per_process_memory_fraction"),
            synchronize=self._as_torch("synchronize"),
            empty_cache=self._as_torch("empty_cache"),
            mem_get_info=lambda device: (6 * GB, 8 * GB),
            memory_reserved=lambda device: 2 * GB,
            memory_allocated=lambda device: GB,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert device == torch.device("cuda", 0)
        if self.fault is not None:
            raise self.fault
        return torch.empty(*shape, dtype=dtype)

    def ones(self, count: int, device: torch.device) -> None:
        self.said.append("a launch")
        raise torch.AcceleratorError("CUDA error: invalid argument")

    def cudaHostRegister(self, start: int, nbytes: int, flags: int) -> int:
        self.said.append(f"register {nbytes} bytes at {start % 4096} with {flags}")
        return self.status

    def cudaHostUnregister(self, start: int) -> None:
        self.said.append("unregister")

    @contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        before, self.queue = self.queue, stream
        yield
        self.queue = before

    def _as_torch(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            inspect.signature(getattr(torch.cuda, name)).bind(*arguments)
            numbers = [f"{value:.3f}" for value in arguments if isinstance(value, float)]
            self.said.append(" ".join([name, *numbers]))

        return call


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(cuda, "torch", stand_in)
    return stand_in


@pytest.fixture
def device(card: StandIn) -> CudaDevice:
    device = CudaDevice(0, 4 * GB, context=GB, ram=Ledger(GB, "RAM"))
    assert card.said == ["set_per_process_memory_fraction 0.375"]  # of 8 GB, without the context
    card.said.clear()
    return device


def test_a_copy_waits_for_the_work_before_it_and_work_for_the_copy(card: StandIn, device: CudaDevice) -> None:
    slot, host = device.alloc("slot", 4096), device.host_alloc("ring", 4096)
    before = device.record_compute()
    stall = device.wait(device.copy_async(slot.tensor, host.tensor, after=before))
    assert card.said[1:] == [
        "compute: record event 0",
        "copies: wait for event 0",
        "copies: record event 1",
        "compute: record event 2",
        "compute: wait for event 1",
        "compute: record event 3",
    ]
    assert stall.seconds() == 0.25 and card.said[-1] == "host: wait for event 3"
    assert torch.equal(slot.tensor, host.tensor)


def test_host_memory_is_page_locked_by_whole_pages(card: StandIn, device: CudaDevice) -> None:
    host = device.host_alloc("ring", 5000)
    assert host.pinned and card.said == ["register 8192 bytes at 0 with 1"]
    host.free()
    assert card.said[-1] == "unregister" and device.ram.used == 0


def test_a_refusal_to_lock_is_told_and_leaves_no_error_behind(card: StandIn, device: CudaDevice) -> None:
    card.status = 2
    host = device.host_alloc("ring", 4096)
    assert not host.pinned and host.unpinned == "cudaHostRegister refused 4.10 KB (CUDA error 2)"
    assert card.said[-1] == "a launch"
    host.free()
    assert "unregister" not in card.said


def test_what_may_still_be_had_is_what_cap_driver_and_allocator_leave(device: CudaDevice) -> None:
    assert device.memory_free() == 3 * GB and device.memory_left() == 4 * GB
    device.alloc("slot", GB)
    assert device.memory_free() < 2 * GB
    device.close()
    assert device.ledger.claims.keys() == {"slot"}


@pytest.mark.parametrize(("said", "kind"), [
    ("CUDA error: out of memory", OutOfMemoryError), ("CUDA error: an illegal memory access\nmore", DeviceLostError)
])  # fmt: skip
def test_an_error_of_the_driver_is_told_for_what_it_is(
    said: str, kind: type[Exception], card: StandIn, device: CudaDevice
) -> None:
    card.fault = torch.AcceleratorError(said)
    with pytest.raises(kind, match=said.splitlines()[0].removeprefix("CUDA error: ")):
        device.alloc("slot", 4096)
    card.fault = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(OutOfMemoryError, match="slot needs"):
        device.alloc("slot", 4096)
    assert device.ledger.used == GB  # the context's
