"""Peak memory of a callable, on meta tensors or real ones, by the same count of live storages.

    peak_memory(fn, *args)   run `fn` on meta tensors: no memory, no arithmetic, the same allocations
    track(...)               count what really is allocated inside a `with` block

What is counted: every storage made by an operation, from that operation until nothing refers to it. Views add
nothing. What existed before (arguments, weights) is not counted, nor is memory that a kernel takes and gives
back inside itself, the allocator's fragmentation, or the device's context; nor, on meta tensors, the few numbers
of `torch.tensor(...)`, which is made out of sight there, and what is copied to the host. On a machine without
CUDA, tensors on "cpu" stand for tensors on the GPU: the counts are the same. Meta tensors and not torch's fake
ones: those take three times as long.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lowvram.errors import OutOfMemoryError
from lowvram.offload.allocator import Block, CachingAllocator
from lowvram.offload.budget import exact_size, format_bytes

Rounding = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Live:
    """One storage that was live at the peak."""

    nbytes: int
    """After rounding."""
    where: str
    """The operation that made it and the line that asked for it: "aten.mm.default at dit.py:120"."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that was live at once."""

    peak_bytes: int
    reach: int
    """Bytes from the first to the last address that torch's allocator would have used for it: what was live, and the
    holes between that nothing fitted into (`lowvram.offload.allocator`). Never less than `peak_bytes`."""
    live: tuple[Live, ...]
    """What made up the peak, largest first."""


def peak_memory(
    fn: Callable[..., object],
    *args: object,
    rounding: Rounding = exact_size,
    capacity: int | None = None,
    allocator: CachingAllocator | None = None,
) -> Peak:
    """Peak of `fn(*args)` on meta tensors, above what its arguments take.

    Tensors in `args` are replaced by meta tensors of the same sizes and strides; those that `fn` refers to otherwise
    (parameters) may be real, and what it makes without naming a device is a meta tensor. Raises OutOfMemoryError if more
    than `capacity` bytes would be live, or `allocator` finds no room; whatever `fn` raises; and torch's errors if it looks at values (`.item()`).
    """
    imagined = tree_map_only(Tensor, _imagined, args)
    tracker = Tracker(rounding, capacity, "meta", allocator)
    with torch.device("meta"), _Watch(tracker, imagine=True):
        fn(*imagined)
    return tracker.peak()


def _imagined(tensor: Tensor) -> Tensor:
    """A meta tensor like `tensor`."""
    if tensor.device.type == "meta":
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


@contextmanager
def track(
    *, rounding: Rounding = exact_size, capacity: int | None = None, device: str = "cpu"
) -> Iterator[Tracker]:
    """Count storages on devices of type `device` that this thread makes inside the block.

    Raises OutOfMemoryError from the operation that makes more than `capacity` bytes live: a hard cap.
    """
    tracker = Tracker(rounding, capacity, device)
    with _Watch(tracker, imagine=False):
        yield tracker


class Tracker:
    """Live storages and their peak."""

    def __init__(
        self,
        rounding: Rounding,
        capacity: int | None,
        device: str,
        allocator: CachingAllocator | None = None,
    ) -> None:
        self._rounding, self._capacity, self._device = rounding, capacity, device
        self._lock = threading.RLock()  # a finalizer may run inside any of our own statements
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], Live]] = {}
        self._live_bytes = 0
        self._peak_bytes = 0
        self._peak_live: tuple[Live, ...] | None = ()
        self._allocator = allocator or CachingAllocator.endless()
        self._blocks: dict[int, Block] = {}

    @property
    def live_bytes(self) -> int:
        """Bytes of the storages that were counted and still live."""
        return self._live_bytes

    def peak(self) -> Peak:
        """The peak so far."""
        with self._lock:
            return Peak(self._peak_bytes, max(self._peak_bytes, self._allocator.reach), self._at_peak())

    def restart(self) -> None:
        """Forget the peak so far: what lives now is where the next begins."""
        with self._lock:
            self._peak_bytes, self._peak_live = self._live_bytes, None

    def _at_peak(self) -> tuple[Live, ...]:
        # Listed only when the peak is left or asked for: a run passes many peaks on its way up.
        if self._peak_live is None:
            found = (live for _, live in self._live.values())
            self._peak_live = tuple(sorted(found, key=lambda live: (-live.nbytes, live.where)))
        return self._peak_live

    def made(self, tensor: Tensor, existing: set[int], says: Callable[[], str]) -> None:
        """Count the storage of an operation's result, unless it is one of its inputs' (`existing`). says: where it was
        made."""
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        nbytes = self._rounding(storage.nbytes())
        with self._lock:
            known = self._live.get(key)
            if known is not None and known[0]() is storage:
                if known[1].nbytes != nbytes:  # resized in place, as `out=` does
                    where = says()
                    self._leave_peak()
                    self._live[key] = (known[0], Live(nbytes, where))
                    self._place(key, nbytes)
                    self._grow(nbytes - known[1].nbytes, where)
            elif key not in existing:
                where = says()
                self._live[key] = (weakref.ref(storage), Live(nbytes, where))
                weakref.finalize(storage, self._gone, key).atexit = False
                self._place(key, nbytes)
                self._grow(nbytes, where)

    def _place(self, key: int, nbytes: int) -> None:
        """Where the allocator puts a storage; if it had a place, that is given back afterwards."""
        last = self._blocks.pop(key, None)
        if nbytes:
            self._blocks[key] = self._allocator.malloc(nbytes)
        if last is not None:
            self._allocator.free(last)

    def _grow(self, nbytes: int, where: str) -> None:
        self._live_bytes += nbytes
        if self._live_bytes > self._peak_bytes:
            self._peak_bytes, self._peak_live = self._live_bytes, None
        if self._capacity is not None and self._live_bytes > self._capacity:
            raise OutOfMemoryError(
                f"{format_bytes(nbytes)} more make {format_bytes(self._live_bytes)}",
                where=where,
                expected=f"at most {format_bytes(self._capacity)}",
                advice="raise the cap, or ask `lowvram plan` for settings that fit it",
            )

    def _leave_peak(self) -> None:
        if self._live_bytes == self._peak_bytes:
            self._at_peak()

    def _gone(self, key: int) -> None:
        with self._lock:
            self._leave_peak()
            self._live_bytes -= self._live.pop(key)[1].nbytes
            self._place(key, 0)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows the tracker every operation's results. With `imagine`, real tensors met on the way become meta tensors
    first, each once, so that they are known as what existed before."""

    def __init__(self, tracker: Tracker, *, imagine: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracker, self._imagine = tracker, imagine
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._whole: set[Any] = set()  # operations that have no parts
        self._effects: dict[Any, str] = {}
        self._alike: dict[Any, torch.dtype] = {}  # what pointwise operations make of tensors that are alike
        self._made: dict[Any, tuple[Sequence[int], Sequence[int], torch.dtype]] = {}
        self._torch_folder = str(Path(torch.__file__).parent)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and what keeps the compiler out imports it

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        # `torch.tensor(...)` makes its storage out of sight and shows it first as the input of this operation.
        constant = func is torch.ops.aten.lift_fresh.default
        inputs = _tensors((args, named))
        if self._imagine and not all(t.device.type == "meta" for t in inputs):
            args, named = tree_map_only(Tensor, self._as_meta, (args, named))
            inputs = _tensors((args, named))
        if func.namespace == "aten" and func not in self._whole:
            # Under inference_mode operations arrive here whole; their parts are what allocates.
            with self:
                parts = func.decompose(*args, **named)
            if parts is not NotImplemented:
                return parts
            self._whole.add(func)
        if func not in self._effects:
            self._effects[func] = "new" if constant else _effect(func)
        if self._effects[func] != "new":
            return inputs[0] if self._imagine and self._effects[func] == "writes" else func(*args, **named)
        if self._imagine and named.get("device") is not None and torch.device(named["device"]).type != "meta":
            return func(
                *args, **named | {"device": torch.device("meta")}
            )  # it leaves the device: not counted
        result = self._results(func, args, named) if self._imagine else func(*args, **named)
        existing = set() if constant else {t.untyped_storage()._cdata for t in inputs}
        for tensor in _tensors(result):
            self._tracker.made(tensor, existing, lambda: f"{func} at {self._caller()}")
        return result

    def _results(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What `func` returns. Networks repeat themselves, and torch takes a millisecond to say what some operations
        would make: it is asked once for every combination of operation and arguments, and of pointwise operations once
        for all tensors of a kind."""
        what = func, _signature(args), _signature(tuple(named.items()))
        if what in self._made:
            shape, stride, dtype = self._made[what]
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        inputs = _tensors((args, named))
        kind = _kind(func, args, named) if _are_alike(inputs) else None
        if kind in self._alike:
            return torch.empty_strided(
                inputs[0].shape, inputs[0].stride(), dtype=self._alike[kind], device="meta"
            )
        result = func(*args, **named)
        if isinstance(result, Tensor) and _is_new(result, inputs):
            self._made[what] = result.shape, result.stride(), result.dtype
            if kind is not None and _are_alike([*inputs, result]):
                self._alike[kind] = result.dtype
        return result

    def _as_meta(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            return tensor
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = tensor, _imagined(tensor)
        return self._seen[id(tensor)][1]

    def _caller(self) -> str:
        """File and line of the innermost frame that is neither torch's nor ours."""
        frame = sys._getframe(1)
        while frame.f_back is not None:
            name = frame.f_code.co_filename
            if name != __file__ and not name.startswith((self._torch_folder, "<")):
                break
            frame = frame.f_back
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def _effect(func: Any) -> str:
    """What an operation returns: "new" memory, a "view" of its input, or its first input after it "writes" to it."""
    arguments, returns = func._schema.arguments, func._schema.returns
    aliases = bool(returns) and all(r.alias_info is not None for r in returns)
    # those with `out`, and those that change the shape of an input, may change its size
    if not aliases or torch.Tag.inplace_view in func.tags or any(a.is_out for a in arguments):
        return "new"
    return "writes" if returns[0].alias_info.is_write else "view"


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors lie in memory in the same way, without holes: a pointwise result of them does so too."""
    if not tensors:
        return False
    shape, stride = tensors[0].shape, tensors[0].stride()
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return extent == prod(shape) and all(t.shape == shape and t.stride() == stride for t in tensors[1:])


def _is_new(result: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether `result` has memory of its own that holds nothing else."""
    storage = result.untyped_storage()
    if result.device.type != "meta" or any(storage._cdata == t.untyped_storage()._cdata for t in inputs):
        return False
    like = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
    return storage.nbytes() == like.untyped_storage().nbytes()


def _signature(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What the size of a result depends on."""
    return _described(arguments, lambda t: (t.shape, t.stride(), t.dtype))


def _kind(func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """What the dtype of a pointwise result depends on; None if `func` is no pointwise operation."""
    if torch.Tag.pointwise not in func.tags:
        return None
    return func, _described((args, tuple(named.items())), lambda t: t.dtype)


def _described(arguments: Sequence[Any], of_tensor: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    """Arguments as something to remember by. Numbers are told apart by type: 1, 1.0 and True are equal otherwise."""
    return tuple(
        of_tensor(a)
        if isinstance(a, Tensor)
        else _described(a, of_tensor)
        if isinstance(a, (list, tuple))
        else (type(a), a)
        for a in arguments
    )


def _tensors(tree: object) -> list[Tensor]:
    """All tensors in the arguments or the results of an operation."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for part in tree for tensor in _tensors(part)]
