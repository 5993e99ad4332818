"""CudaDevice: one NVIDIA GPU under a hard cap, with a stream of its own for copies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.errors import InternalError, OutOfMemoryError
from lowvram.offload.budget import Ledger, format_bytes, segment_size
from lowvram.offload.device import Device, Event, Stall, exhausted, lost, says_no_memory
from lowvram.offload.faults import Faults

_PORTABLE = 1
"""cudaHostRegisterPortable"""
CUDA_CONTEXT = 500_000_000
"""Bytes a CUDA process holds before its first tensor (context, kernels, cuBLAS workspace), if not measured."""


class CudaDevice(Device):
    """CUDA device `index` under a cap of `cap` bytes, of which `context` are claimed for the process itself.

    The rest is set as the limit of torch's allocator, so that an unplanned tensor fails there instead of
    taking the memory of other programs or spilling into system memory (Windows).
    """

    def __init__(
        self,
        index: int,
        cap: int,
        *,
        context: int = CUDA_CONTEXT,
        ram: Ledger | None = None,
        faults: Faults | None = None,
    ) -> None:
        super().__init__("cuda", torch.device("cuda", index), Ledger(cap, "VRAM"), ram, faults)
        self._context = self.ledger.claim("cuda context", context)
        with _cuda_errors(f"cuda:{index}"):
            self._total = int(torch.cuda.get_device_properties(index).total_memory)
            torch.cuda.set_per_process_memory_fraction(min(1.0, (cap - context) / self._total), index)
            self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def footprint(self, nbytes: int) -> int:
        return segment_size(nbytes)

    def _allocate(self, name: str, nbytes: int) -> Tensor:
        try:
            with _cuda_errors(str(self.torch_device)):
                return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            raise exhausted(self.ledger.what, name, nbytes) from error

    def _pin(self, pages: Tensor) -> str:
        return pin(pages, self.torch_device)

    def _unpin(self, pages: Tensor) -> None:
        unpin(pages, self.torch_device)

    def copy_async(self, dst: Tensor, src: Tensor, *, after: Event | None = None) -> Event:
        with _cuda_errors(str(self.torch_device)), torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(_cuda_event(after))
            dst.copy_(src, non_blocking=True)
            return _recorded(self._copies)

    def wait(self, event: Event) -> Stall:
        with _cuda_errors(str(self.torch_device)):
            compute = torch.cuda.current_stream(self.torch_device)
            before = _recorded(compute, timed=True)
            compute.wait_event(_cuda_event(event))
            return _CudaStall(before.event, _recorded(compute, timed=True).event)

    def time_compute(self, clock: Callable[[], float]) -> Callable[[], Stall]:
        with _cuda_errors(str(self.torch_device)):
            compute = torch.cuda.current_stream(self.torch_device)
            before = _recorded(compute, timed=True)

        def end() -> Stall:
            with _cuda_errors(str(self.torch_device)):
                return _CudaStall(before.event, _recorded(compute, timed=True).event)

        return end

    def record_compute(self) -> Event:
        with _cuda_errors(str(self.torch_device)):
            return _recorded(torch.cuda.current_stream(self.torch_device))

    def synchronize(self) -> None:
        with _cuda_errors(str(self.torch_device)):
            torch.cuda.synchronize(self.torch_device)

    def memory_free(self) -> int:
        with _cuda_errors(str(self.torch_device)):
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(
                self.torch_device
            )
        room = self.ledger.room
        return int(free + cached) if room is None else min(room, int(free + cached))

    def memory_left(self) -> int:
        # Not from claims: scratch that is claimed may be in the allocator's hands at this moment, and counted twice.
        with _cuda_errors(str(self.torch_device)):
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            held = self._context.nbytes + int(torch.cuda.memory_reserved(self.torch_device))
        left = held + int(free)
        return left if self.ledger.cap is None else min(self.ledger.cap, left)

    def release_unused(self) -> None:
        with _cuda_errors(str(self.torch_device)):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def close(self) -> None:
        try:
            self.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)
        finally:
            self._context.release()


def pin(pages: Tensor, device: torch.device) -> str:
    """Page-lock host memory for copies to and from every device of the process; "" or the reason why not."""
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = int(runtime.cudaHostRegister(pages.data_ptr(), pages.nbytes, _PORTABLE))
        if status == 0:
            return ""
        # A refused registration stays behind as this thread's last CUDA error and would be blamed on the
        # next kernel. A launch of no importance collects it.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=device)
        return f"cudaHostRegister refused {format_bytes(pages.nbytes)} (CUDA error {status})"


def unpin(pages: Tensor, device: torch.device) -> None:
    """Undo `pin`."""
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(pages.data_ptr())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _CudaEvent:
    event: torch.cuda.Event

    def synchronize(self) -> None:
        with _cuda_errors("cuda"):
            self.event.synchronize()


@dataclass(frozen=True, slots=True)
class _CudaStall:
    before: torch.cuda.Event
    after: torch.cuda.Event

    def ready(self) -> bool:
        with _cuda_errors("cuda"):
            return bool(self.after.query())  # type: ignore[no-untyped-call]

    def seconds(self) -> float:
        with _cuda_errors("cuda"):
            self.after.synchronize()
            return float(self.before.elapsed_time(self.after)) / 1000


def _recorded(stream: torch.cuda.Stream, *, timed: bool = False) -> _CudaEvent:
    # blocking: a host thread that waits for it sleeps instead of spinning
    event = torch.cuda.Event(enable_timing=timed, blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return _CudaEvent(event)


def _cuda_event(event: Event) -> torch.cuda.Event:
    if not isinstance(event, _CudaEvent):
        raise InternalError("an event of another device", where="cuda", advice="report this")
    return event.event


@contextlib.contextmanager
def _cuda_errors(where: str) -> Iterator[None]:
    """CUDA errors other than missing memory, as DeviceLostError; memory that the driver misses, as OutOfMemoryError."""
    try:
        yield
    except torch.AcceleratorError as error:
        if says_no_memory(error):
            raise OutOfMemoryError(
                f"the driver found no memory: {str(error).splitlines()[0]}",
                where=where,
                expected="the budget to be free on this machine",
                advice="close other programs that use the GPU, or give a smaller --vram",
            ) from error
        raise lost(error, where) from error
