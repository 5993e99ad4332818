"""Shared by the offload tests: small checkpoints on disk, and a device whose queues really are queues."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowvram.offload.device import CpuDevice, Event, Stall
from lowvram.offload.faults import Faults
from lowvram.offload.placement import BlockId
from lowvram.offload.slab import BlockLayout, build_layout
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.refs import DTYPE_BITS, Part, TensorRef


@dataclass(frozen=True)
class Checkpoint:
    """Blocks in files, and the bytes every part must have."""

    layouts: Mapping[BlockId, BlockLayout]
    parts: Mapping[BlockId, Mapping[tuple[str, str], bytes]]
    files: tuple[Path, ...]

    def check(self, block: BlockId, views: Mapping[str, Mapping[str, Tensor]]) -> None:
        found = {
            (name, role): view.contiguous().view(torch.uint8).numpy().tobytes() if view.numel() else b""
            for name, roles in views.items()
            for role, view in roles.items()
        }
        assert found == self.parts[block]


def write_checkpoint(
    folder: Path,
    n_blocks: Mapping[str, int],
    *,
    seed: int = 0,
    counts: tuple[int, ...] = (1, 7, 64, 100, 128),
    padding: int = 8,
) -> Checkpoint:
    """One file per network; every block has five parts of the element counts `counts` in mixed dtypes."""
    rng = random.Random(seed)
    layouts, parts, files = {}, {}, []
    for network, count in n_blocks.items():
        path = folder / f"{network}.bin"
        data = bytearray(rng.randbytes(rng.randrange(64)))
        for depth in range(count):
            refs: list[TensorRef] = []
            expected: dict[tuple[str, str], bytes] = {}
            for n, numel in enumerate(counts):
                dtype = rng.choice(["F32", "BF16", "F8_E4M3", "U8", "I8"])
                nbytes = numel * DTYPE_BITS[dtype] // 8
                data += bytes(rng.randrange(padding + 1))
                content = rng.randbytes(nbytes)
                part = Part("weight", path, len(data), nbytes, dtype, (numel,))
                data += content
                expected[f"tensor{n}", "weight"] = content
                refs.append(TensorRef(f"tensor{n}", (numel,), Plain("F32"), (part,)))
            rng.shuffle(refs)
            layouts[network, depth] = build_layout(refs)
            parts[network, depth] = expected
        path.write_bytes(data)
        files.append(path)
    return Checkpoint(layouts, parts, tuple(files))


@pytest.fixture(scope="session")
def checkpoint() -> Callable[..., Checkpoint]:
    return write_checkpoint


class QueuedDevice(CpuDevice):
    """A device whose two queues run only when the host waits, or when it is told to: one step at a time, the
    `eager` queue ("copies" or "compute") always as far ahead of the other as events allow."""

    def __init__(self, eager: str, *, faults: Faults | None = None) -> None:
        super().__init__(faults=faults)
        self.lock = threading.RLock()
        self.queues: dict[str, deque[Callable[[], bool]]] = {"copies": deque(), "compute": deque()}
        self.turns = ["copies", "compute"] if eager == "copies" else ["compute", "copies"]

    def _push(self, queue: str, step: Callable[[], bool]) -> None:
        with self.lock:
            self.queues[queue].append(step)

    def _event(self, queue: str) -> _QueuedEvent:
        event = _QueuedEvent(self)
        self._push(queue, event.pass_by)
        return event

    def step(self) -> bool:
        """Run one entry of the first queue that can go on."""
        with self.lock:
            for queue in self.turns:
                entries = self.queues[queue]
                if entries and entries[0]():
                    entries.popleft()
                    return True
            return False

    def run(self, until: Callable[[], bool]) -> None:
        with self.lock:
            while not until():
                assert self.step(), "the device waits for something that never comes"

    def compute(self, work: Callable[[], None]) -> None:
        """Queue a kernel."""

        def step() -> bool:
            work()
            return True

        self._push("compute", step)

    def copy_async(self, dst: Tensor, src: Tensor, *, after: Event | None = None) -> Event:
        with self.lock:
            if after is not None:
                assert isinstance(after, _QueuedEvent)
                self._push("copies", lambda: after.passed)
            self._push("copies", lambda: dst.copy_(src) is not None)
            return self._event("copies")

    def wait(self, event: Event) -> Stall:
        assert isinstance(event, _QueuedEvent)
        self._push("compute", lambda: event.passed)
        return super().wait(event)

    def record_compute(self) -> Event:
        return self._event("compute")

    def synchronize(self) -> None:
        self.run(lambda: not any(self.queues.values()))


class _QueuedEvent:
    def __init__(self, device: QueuedDevice) -> None:
        self.device, self.passed = device, False

    def pass_by(self) -> bool:
        self.passed = True
        return True

    def synchronize(self) -> None:
        self.device.run(lambda: self.passed)


@pytest.fixture(scope="session")
def queued_device() -> type[QueuedDevice]:
    return QueuedDevice
