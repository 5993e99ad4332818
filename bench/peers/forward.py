"""One program, one mode: a few forwards in this process, their cost as JSON on the last line of stdout.

    python bench/peers/forward.py MODE FOLDER SIZE DEVICE [CAP]

FOLDER holds `transformer/` in diffusers' layout, as `bench/peers/run.py` writes it; the output is left in it as
`MODE.pt`. CAP: bytes of the device. Exit code 3: not installed here. 4: needs a GPU, and came as far as one can
without. Linux only. Nothing of lowvram is imported for the modes of other programs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import statistics
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from programs import NeedsGpu
from sizes import SIZES, Work

ROUNDS = 3
"""Forwards that are timed, after one that is not."""
ELSEWHERE = {"lowvram": "ours", "mmgp": "gpl_mmgp"}
"""Programs whose modes are in a module of their own."""


def measure(mode: str, work: Work, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of a forward (median; on a CPU of the processor), bytes, and what came out. ImportError, NeedsGpu."""
    modes = importlib.import_module(ELSEWHERE.get(mode.split()[0], "programs")).MODES
    cuda = work.device.type == "cuda"
    with ExitStack() as stack, torch.inference_mode():
        before = torch.cuda.mem_get_info()[0] if cuda else 0
        least = stack.enter_context(LeastFree()) if cuda else None
        forward = modes[mode](work, stack)
        out = forward()
        read, spent = bytes_read(), []
        for _ in range(rounds):
            began = seconds(cuda)
            out = forward()
            spent.append(seconds(cuda) - began)
        read = (bytes_read() - read) // rounds
        out = out.float().cpu().contiguous()
    torch.save(out, work.folder / f"{mode}.pt")
    return {
        "seconds": statistics.median(spent),
        "disk_read": read,
        "rss": told("status", "VmHWM") * 1024,
        "vram": torch.cuda.max_memory_allocated() if cuda else None,
        "driver": before - least.free if least is not None else None,
        "checksum": hashlib.sha256(out.numpy().tobytes()).hexdigest()[:16],
    }


def seconds(cuda: bool) -> float:
    """Of this process's processors; with a GPU, of the clock once the GPU is done."""
    if not cuda:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def bytes_read() -> int:
    """Bytes this process has asked files for, from the disk or from the system's cache."""
    return told("io", "rchar")


def told(file: str, name: str) -> int:
    """What the kernel says of this process. Its peak of memory in `getrusage` begins with that of its parent."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class LeastFree(threading.Thread):
    """The least memory that the driver had left, looked at every 5 ms: some programs go around torch's allocator."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self.free = torch.cuda.mem_get_info()[0]

    def run(self) -> None:
        while not self._over.wait(0.005):
            self.free = min(self.free, torch.cuda.mem_get_info()[0])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def main() -> None:
    mode, folder, size, device, *cap = sys.argv[1:]
    torch.set_num_threads(1)
    work = Work(Path(folder), SIZES[size], torch.device(device), int(cap[0]) if cap else 0)
    try:
        facts = measure(mode, work)
    except ImportError as missing:
        print(missing, file=sys.stderr)
        sys.exit(3)
    except NeedsGpu:
        sys.exit(4)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
