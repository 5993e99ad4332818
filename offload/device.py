"""What the rest of the program may ask of a device: memory under a name, copies, order between them.

Work on a device runs in two queues: *compute*, where kernels go, and *copies*. Nothing here makes the host
wait except `Event.synchronize` and `Device.synchronize`; the queues wait for each other through events.

    CpuDevice               one queue, the caller's thread; stands for a GPU of any capacity in tests
    lowvram.offload.cuda    CudaDevice: the current stream computes, a stream of our own copies
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from lowvram.errors import DeviceLostError, InternalError, OutOfMemoryError
from lowvram.offload.budget import Claim, Ledger, format_bytes
from lowvram.offload.faults import FaultKind, Faults

_PAGE = 4096
_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What stands in the errors of the driver (at a launch, or when it loads a kernel), Triton, cuBLAS and cuDNN when memory is
missing: none of them is torch.OutOfMemoryError."""


class Event(Protocol):
    """A point in a queue."""

    def synchronize(self) -> None:
        """Make the calling thread wait until the queue has passed this point."""


class Stall(Protocol):
    """How long a queue waited for an event, or worked."""

    def ready(self) -> bool:
        """Whether `seconds` can be asked without waiting."""

    def seconds(self) -> float: ...


class Buffer:
    """Named memory with its claim: 1-D, uint8.

    pinned    whether copies from it run beside the host's work (host memory only)
    unpinned  why it is not pinned although that was asked for; "" otherwise
    """

    __slots__ = ("_free", "_tensor", "name", "nbytes", "pinned", "unpinned")

    def __init__(
        self, name: str, tensor: Tensor, free: Callable[[], None], *, pinned: bool = False, unpinned: str = ""
    ) -> None:
        self._tensor: Tensor | None = tensor
        self._free: Callable[[], None] | None = free
        self.name, self.nbytes = name, tensor.numel()
        self.pinned, self.unpinned = pinned, unpinned

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            raise InternalError("used after it was freed", where=self.name, advice="report this")
        return self._tensor

    def free(self) -> None:
        """Return the memory and the claim; no copy may be under way. Calling it again does nothing.

        The memory itself lives as long as views of it: drop them first.
        """
        give_back, self._free, self._tensor = self._free, None, None
        if give_back is not None:
            give_back()


class Device(ABC):
    """One device and the host memory beside it, each under a ledger.

    kind          "cpu" or "cuda"
    torch_device  where `alloc` allocates
    ledger        claims on the device
    ram           claims on the host
    """

    def __init__(
        self, kind: str, torch_device: torch.device, ledger: Ledger, ram: Ledger | None, faults: Faults | None
    ) -> None:
        self.kind, self.torch_device, self.ledger = kind, torch_device, ledger
        self.ram = Ledger(None, "RAM") if ram is None else ram
        self.faults = faults

    def alloc(self, name: str, nbytes: int) -> Buffer:
        """`nbytes` of device memory, contents undefined. OutOfMemoryError if cap or device has no room."""
        claim = self.ledger.claim(name, self.footprint(nbytes))
        try:
            if self._fails("alloc"):
                raise exhausted(self.ledger.what, name, nbytes)
            return Buffer(name, self._allocate(name, nbytes), claim.release)
        except BaseException:
            claim.release()
            raise

    def host_alloc(self, name: str, nbytes: int, *, pin: bool = True) -> Buffer:
        """`nbytes` of page-aligned host memory, contents undefined; OutOfMemoryError if there is no room.

        Pinned if `pin` and the system allows; otherwise pageable, with the reason in `Buffer.unpinned`.
        """
        claim = self.ram.claim(name, nbytes)
        try:
            if self._fails("host_alloc"):
                raise MemoryError
            return self._host_buffer(name, nbytes, claim, pin)
        except MemoryError as error:
            claim.release()
            raise exhausted("RAM", name, nbytes) from error
        except BaseException:
            claim.release()
            raise

    def _host_buffer(self, name: str, nbytes: int, claim: Claim, pin: bool) -> Buffer:
        # Whole pages of our own: pinning works on pages, and a page must not be pinned twice. numpy and not
        # torch allocates, so that host memory is not taken for memory of a CPU device by `estimate.track`.
        size = max(1, -(-nbytes // _PAGE)) * _PAGE
        pages = np.empty(size + _PAGE, dtype=np.uint8)
        start = -pages.ctypes.data % _PAGE
        whole = torch.frombuffer(pages[start : start + size], dtype=torch.uint8)
        reason = ""
        if pin and nbytes:
            reason = "made to fail" if self._fails("pin") else self._pin(whole)
        pinned = pin and nbytes > 0 and not reason

        def free() -> None:
            try:
                if pinned:
                    self._unpin(whole)
            finally:
                claim.release()

        return Buffer(name, whole[:nbytes], free, pinned=pinned, unpinned=reason)

    def _fails(self, kind: FaultKind) -> bool:
        return self.faults is not None and self.faults.strikes(kind)

    @abstractmethod
    def footprint(self, nbytes: int) -> int:
        """Bytes the device gives up for an allocation of `nbytes`."""

    @abstractmethod
    def _allocate(self, name: str, nbytes: int) -> Tensor: ...

    @abstractmethod
    def _pin(self, pages: Tensor) -> str:
        """Page-lock `pages`; "" or the reason why not."""

    @abstractmethod
    def _unpin(self, pages: Tensor) -> None: ...

    @abstractmethod
    def copy_async(self, dst: Tensor, src: Tensor, *, after: Event | None = None) -> Event:
        """Queue a copy of `src` into `dst` (same shape, contiguous), behind `after`; its end as an event.

        Both must stay allocated and `src` unchanged until the event. DeviceLostError if it cannot be queued.
        """

    @abstractmethod
    def wait(self, event: Event) -> Stall:
        """Work queued on compute from now on starts after `event`; the host does not wait."""

    def time_compute(self, clock: Callable[[], float]) -> Callable[[], Stall]:
        """Begin to time what is queued on compute; what is returned ends it. `clock` is for a device without its own."""
        began = clock()
        return lambda: _Past(clock() - began)

    @abstractmethod
    def record_compute(self) -> Event:
        """The end of everything queued on compute so far."""

    @abstractmethod
    def synchronize(self) -> None:
        """Make the host wait for both queues. DeviceLostError if the device failed."""

    @abstractmethod
    def memory_free(self) -> int:
        """Bytes that can still be allocated, under the cap and in fact."""

    def memory_left(self) -> int:
        """Bytes that may be held on the device in all: what is claimed, and what is free under the cap and in fact."""
        return self.ledger.used + self.memory_free()

    def release_unused(self) -> None:  # noqa: B027 most devices keep nothing
        """Give memory that an allocator keeps although nothing uses it back to the system, and forget the peak so far: what
        was needed before stands neither in the way of new buffers nor in what is measured from now on."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the device object itself holds; its buffers are freed before."""

    def what_failed(self, error: RuntimeError) -> Literal["memory", "device"] | None:
        """What an error of torch says of the device: no memory, or that it stopped answering; None if neither."""
        if says_no_memory(error):
            return "memory"
        return "device" if isinstance(error, torch.AcceleratorError) else None


@dataclass(frozen=True, slots=True)
class _Past:
    """An event, and a wait, that is over before it can be asked about."""

    took: float = 0.0

    def synchronize(self) -> None:
        return

    def ready(self) -> bool:
        return True

    def seconds(self) -> float:
        return self.took


class CpuDevice(Device):
    """The CPU as a device of `capacity` bytes (None: no limit). Copies happen in the caller's thread.

    `capacity` bounds what is claimed; `estimate.track` bounds what is allocated besides.
    """

    def __init__(
        self, capacity: int | None = None, *, ram: Ledger | None = None, faults: Faults | None = None
    ) -> None:
        super().__init__("cpu", torch.device("cpu"), Ledger(capacity, "VRAM"), ram, faults)

    def footprint(self, nbytes: int) -> int:
        return nbytes

    def _allocate(self, name: str, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise exhausted(self.ledger.what, name, nbytes) from error

    def _pin(self, pages: Tensor) -> str:
        return ""

    def _unpin(self, pages: Tensor) -> None:
        return

    def copy_async(self, dst: Tensor, src: Tensor, *, after: Event | None = None) -> Event:
        if self._fails("copy"):
            raise DeviceLostError(
                "a copy failed", where="cpu", advice="resume the job with `lowvram resume last`"
            )
        dst.copy_(src)
        return _Past()

    def wait(self, event: Event) -> Stall:
        return _Past()

    def record_compute(self) -> Event:
        return _Past()

    def synchronize(self) -> None:
        return

    def memory_free(self) -> int:
        available = int(psutil.virtual_memory().available)
        room = self.ledger.room
        return available if room is None else min(room, available)

    def close(self) -> None:
        return


def says_no_memory(error: RuntimeError) -> bool:
    """Whether an error of torch, or of what it calls, is for want of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _NO_MEMORY)


def lost(error: RuntimeError, where: str) -> DeviceLostError:
    """The error for a device that stopped answering."""
    return DeviceLostError(
        f"the device stopped answering: {str(error).splitlines()[0]}",
        where=where,
        advice="check driver, power and temperature, then continue with `lowvram resume last`",
    )


def exhausted(what: str, name: str, nbytes: int) -> OutOfMemoryError:
    """The error for an allocation that the cap allowed and the system refused."""
    return OutOfMemoryError(
        f"{name} needs {format_bytes(nbytes)}, which could not be allocated although it was planned",
        where=what,
        expected="the budget to be free on this machine",
        advice="close other programs, or give a smaller budget",
    )
