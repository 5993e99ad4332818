"""A GPU made of the CPU, stricter than any.

Its tensors have a device type of their own, so that a tensor made on the wrong device is met as on a GPU. Its copies
happen as late as they may, so that one nobody waited for shows; and each is held against the work that used its memory
before, so that one that did not wait for it shows too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from lowvram import Runtime
from lowvram.offload.budget import Ledger, allocated_size
from lowvram.offload.device import CpuDevice, Device, Event
from lowvram.offload.estimate import Tracker


class _Module(_DummyBackendModule):  # type: ignore[misc]
    """What torch asks of the device's module. Nothing is drawn there: noise comes from the CPU."""

    def get_rng_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor) -> None:
        return


_setup_privateuseone_for_python_backend("strict", _Module())

DEVICE = torch.device("strict", 0)


class Race(AssertionError):
    """Two queues used the same memory without order between them."""


class OnDevice(Tensor):
    """A tensor on the strict device; `raw` holds its numbers on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Self:
        with torch.inference_mode(False):
            return Tensor._make_wrapper_subclass(  # type: ignore[no-any-return, attr-defined]
                cls,
                raw.size(),
                strides=raw.stride(),
                storage_offset=raw.storage_offset(),
                dtype=raw.dtype,
                device=DEVICE,
            )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _operate(func, args, kwargs or {})

    def __repr__(self, **more: Any) -> str:
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Strict(TorchDispatchMode):
    """Tensors asked for on the strict device are made there."""

    def __enter__(self) -> Self:
        # `torch.tensor(..., device=)` is made on the CPU and then moved, as for a GPU
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _operate(func, args, kwargs or {})


# Operations that have no parts, and those whose parts a device chooses: here they shall be the CPU's.
_whole: set[Any] = {
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.matmul.default,
    torch.ops.aten.upsample_bicubic2d.vec,
}
_TWO_DEVICES = {"copy_", "_to_copy"}


def _operate(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One operation, on the CPU, with the devices checked and its memory told to the queues."""
    if func.namespace == "aten" and func not in _whole:
        with Strict():
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        _whole.add(func)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    here = [t for t in tensors if isinstance(t, OnDevice)]
    name = func._schema.name.split("::")[1]
    if here and name not in _TWO_DEVICES:
        # a number on the CPU may take part anywhere, as on a GPU
        away = [t for t in tensors if not isinstance(t, OnDevice) and t.dim()]
        assert not away, f"{func}: tensors on two devices, the CPU's have {[t.shape for t in away]}"
    if not getattr(func, "is_view", False):
        _Queues.compute(here, [t for t in _written(func, args, kwargs) if isinstance(t, OnDevice)])
    owners = {id(t.raw): t for t in here}
    raw_args, raw_kwargs = tree_map_only(OnDevice, lambda t: t.raw, (args, dict(kwargs)))
    to_device = bool(here)
    if raw_kwargs.get("device") is not None:
        to_device = torch.device(raw_kwargs["device"]).type == DEVICE.type
        raw_kwargs["device"] = torch.device("cpu")
    result = func(*raw_args, **raw_kwargs)
    if to_device:
        Meter.made([t for t in tree_leaves(result) if isinstance(t, Tensor)], here, name)

    def outside(t: Tensor) -> Tensor:
        owner = owners.get(id(t))
        if owner is not None:
            assert owner.shape == t.shape, f"{func} resized a tensor of shape {owner.shape} to {t.shape}"
            return owner
        return OnDevice(t) if to_device else t

    return tree_map_only(Tensor, outside, result)


class Meter:
    """Counts what lies on the strict device: there, unlike on the CPU, no tensor of the host is among it."""

    tracker: ClassVar[Tracker | None] = None

    @classmethod
    def made(cls, results: list[Tensor], given: list[OnDevice], where: str) -> None:
        if cls.tracker is not None:
            existing = {t.raw.untyped_storage()._cdata for t in given}
            for t in results:
                cls.tracker.made(t, existing, lambda: where)


@contextmanager
def metered() -> Iterator[Tracker]:
    """Count, in sizes as torch's CUDA allocator makes of them."""
    tracker = Meter.tracker = Tracker(allocated_size, None, "cpu")
    try:
        yield tracker
    finally:
        Meter.tracker = None


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    schema = func._schema.arguments
    named = {a.name: v for a, v in zip(schema, args, strict=False)} | dict(kwargs)
    values = [named.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _memory(t: Tensor) -> int:
    """Which memory a tensor lies in."""
    return (t.raw if isinstance(t, OnDevice) else t).untyped_storage().data_ptr()


@dataclass(slots=True)
class _Copy:
    dst: Tensor
    src: Tensor
    over: bool = False


class _Queues:
    """What was queued on the strict device, and in which order it will certainly happen."""

    lock = threading.RLock()
    ticks = count(1)
    tick = 0  # of the last work on compute
    used: ClassVar[dict[int, int]] = {}
    wrote: ClassVar[dict[int, int]] = {}
    copies: ClassVar[list[_Copy]] = []  # that are not certainly over, in order
    horizon = 0  # work on compute that the queue of copies has waited for

    @classmethod
    def compute(cls, tensors: list[OnDevice], written: list[OnDevice]) -> None:
        if not tensors:
            return
        with cls.lock:
            cls.tick = next(cls.ticks)
            for t in tensors:
                if any(_memory(t) == _memory(c.dst) for c in cls.copies):
                    raise Race("compute uses what a copy that nobody waited for writes")
                cls.used[_memory(t)] = cls.tick
            for t in written:
                if any(_memory(t) == _memory(c.src) for c in cls.copies):
                    raise Race("compute writes what a copy that nobody waited for reads")
                cls.wrote[_memory(t)] = cls.tick

    @classmethod
    def copy(cls, dst: Tensor, src: Tensor, after: Event | None) -> _Arrival:
        with cls.lock:
            if isinstance(after, _Done):
                cls.horizon = max(cls.horizon, after.tick)
            if isinstance(dst, OnDevice) and cls.used.get(_memory(dst), 0) > cls.horizon:
                raise Race("a copy writes what compute may still use")
            if isinstance(src, OnDevice) and cls.wrote.get(_memory(src), 0) > cls.horizon:
                raise Race("a copy reads what compute may not have written")
            cls.copies.append(_Copy(dst, src))
            return _Arrival(cls.copies[-1])

    @classmethod
    def finish(cls, last: _Copy | None = None) -> None:
        """Let copies happen up to `last`, or all."""
        with cls.lock:
            while cls.copies and not (last is not None and last.over):
                copy = cls.copies.pop(0)
                dst, src = (t.raw if isinstance(t, OnDevice) else t for t in (copy.dst, copy.src))
                with torch.inference_mode():
                    dst.copy_(src)
                copy.over = True

    @classmethod
    def check_unused(cls, pages: Tensor) -> None:
        with cls.lock:
            if any(_memory(pages) in (_memory(c.dst), _memory(c.src)) for c in cls.copies):
                raise Race("host memory is given back under a copy")


@dataclass(frozen=True, slots=True)
class _Arrival:
    copy: _Copy

    def synchronize(self) -> None:
        _Queues.finish(self.copy)


@dataclass(frozen=True, slots=True)
class _Done:
    tick: int

    def synchronize(self) -> None:
        return

    def ready(self) -> bool:
        return True

    def seconds(self) -> float:
        return 0.0


class StrictDevice(CpuDevice):
    """The device of this file under a cap."""

    def __init__(self, capacity: int | None, ram: Ledger) -> None:
        super().__init__(capacity, ram=ram)
        self.torch_device = DEVICE

    def _allocate(self, name: str, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)

    def _unpin(self, pages: Tensor) -> None:
        _Queues.check_unused(pages)

    def copy_async(self, dst: Tensor, src: Tensor, *, after: Event | None = None) -> Event:
        assert dst.shape == src.shape and dst.dtype == src.dtype
        assert dst.is_contiguous() and src.is_contiguous()
        assert isinstance(dst, OnDevice) != isinstance(src, OnDevice), "one side is the host's"
        return _Queues.copy(dst, src, after)

    def wait(self, event: Event) -> _Done:
        event.synchronize()
        return _Done(_Queues.tick)

    def record_compute(self) -> Event:
        return _Done(_Queues.tick)

    def synchronize(self) -> None:
        _Queues.finish()


class StrictRuntime(Runtime):
    """A runtime on the strict device."""

    @contextmanager
    def device(self) -> Iterator[Device]:
        device = StrictDevice(self.budget.vram, Ledger(self.budget.ram, "RAM"))
        with Strict():
            yield device
        assert not _Queues.copies and not device.ledger.used and not device.ram.used
