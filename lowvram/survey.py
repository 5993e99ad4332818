"""What this machine really does: rates of copies, disks and arithmetic, each measured with the clock it is given."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowvram.machine import ASSUMED_DISK, Rates
from lowvram.offload.cuda import pin, unpin
from lowvram.offload.direct import read_past_cache
from lowvram.offload.io import read_kernel_text, storage_errors, write_atomic
from lowvram.offload.limits import HostLimits, host_limits
from lowvram.triton_kernels.attention import attention

Clock = Callable[[], float]

CONTEXT = 500_000_000
"""Bytes of a CUDA process outside torch's allocator, where nobody measured them."""
WORKSPACES = 34_000_000
"""Bytes that cuBLAS keeps inside it: 32 MiB on Hopper, less elsewhere (CUDABlas.cpp of torch)."""
_DISK = 1 << 30
"""Bytes read to time a disk."""
_WRITTEN = 256 << 20
"""Bytes written to be read back, in a folder without large files."""


@dataclass(frozen=True, slots=True)
class Place:
    """The device whose rates are asked for."""

    kind: str
    label: str
    driver: str
    torch_version: str
    arch: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a job may take now, bytes."""

    vram: int
    ram: int


def identify(device: str | None = None) -> Place:
    """The CUDA device of this machine, unless there is none or `device` is "cpu"; else its processor."""
    version = str(torch.__version__)
    if device != "cpu" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return Place("cuda", torch.cuda.get_device_name(), _driver(), version, f"sm_{major}{minor}")
    return Place("cpu", f"CPU, {os.cpu_count()} threads", "", version, "")


def _driver() -> str:
    """Version of the NVIDIA driver; of the CUDA that it speaks where the driver's own is not told (Windows, WSL)."""
    text = read_kernel_text(Path("/sys/module/nvidia/version"))
    if text:
        return text.strip()
    number = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        driver.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return ""
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"


def memory(place: Place, limits: HostLimits | None = None) -> Memory:
    """What is free now. A CPU stands for a device beside a host: each gets a half of most of the RAM.

    On a GPU the context of this process is taken already when it is asked, and a plan claims it once more: so much stays
    free for what a display takes from one minute to the next.
    """
    usable = (limits or host_limits()).usable
    if place.kind == "cuda":
        torch.cuda.empty_cache()  # what measuring took is not taken
        free, _ = torch.cuda.mem_get_info()
        return Memory(int(free), int(usable * 0.8))
    return Memory(int(usable * 0.4), int(usable * 0.4))


def quick_rates(place: Place, clock: Clock = time.perf_counter) -> Rates:
    """Arithmetic and copies, measured in a fraction of a second; the disk's rate is assumed."""
    small = place.kind == "cpu"
    dtype = torch.float32 if small else torch.bfloat16
    # A CPU's own rates are halved: the job's other threads, readers and encoders, take their part.
    share = 0.5 if small else 1.0
    return Rates(
        device=place.label,
        driver=place.driver,
        torch=place.torch_version,
        matmul=matmul_rate(place, dtype, clock, 512 if small else 4096) * share,
        attention=attention_rate(place, dtype, clock, 512 if small else 8192) * share,
        link=copy_rate(place, clock, pinned=not small, nbytes=16 << 20 if small else 256 << 20)[0],
        disk=ASSUMED_DISK,
        disk_folder="",
        context=CONTEXT if place.kind == "cuda" else 0,
        workspaces=WORKSPACES if place.kind == "cuda" else 0,
    )


def matmul_rate(place: Place, dtype: torch.dtype, clock: Clock, n: int) -> float:
    """FLOP/s of an n x n x n multiplication of random numbers: on zeros some cards are faster."""
    a, b = (torch.randn(n, n, device=place.device).to(dtype) for _ in "ab")
    return 2 * n**3 / _median(lambda: a @ b, place, clock)


def int8_rate(place: Place, clock: Clock, n: int) -> float | None:
    """Operations/s of an int8 multiplication with int32 sums; None where torch has none."""
    a, b = (
        torch.randint(-127, 128, (n, n), device=place.device, dtype=torch.int32).to(torch.int8) for _ in "ab"
    )
    try:
        return 2 * n**3 / _median(lambda: torch._int_mm(a, b.t()), place, clock)
    except RuntimeError:
        return None


def attention_rate(place: Place, dtype: torch.dtype, clock: Clock, tokens: int, heads: int = 8) -> float:
    """FLOP/s of attention among `tokens` tokens, both multiplications counted, with the op that jobs use."""
    q, k, v = (torch.randn(heads, tokens, 128, device=place.device).to(dtype) for _ in "qkv")
    return 4 * tokens**2 * 128 * heads / _median(lambda: attention(q, k, v), place, clock)


def copy_rate(place: Place, clock: Clock, *, pinned: bool, nbytes: int) -> tuple[float, str]:
    """Bytes/s from host to device; and why the memory could not be pinned, or ""."""
    target = torch.empty(nbytes, dtype=torch.uint8, device=place.device)
    source = torch.full((nbytes,), 7, dtype=torch.uint8)
    page_locked = pinned and place.kind == "cuda"
    refused = pin(source, place.device) if page_locked else ""
    try:
        seconds = _median(lambda: target.copy_(source, non_blocking=pinned), place, clock)
    finally:
        if page_locked and not refused:
            unpin(source, place.device)
    return nbytes / seconds, refused


def device_copy_rate(place: Place, clock: Clock, nbytes: int) -> float:
    """Bytes/s inside the device, those read and those written."""
    a, b = (torch.full((nbytes,), n, dtype=torch.uint8, device=place.device) for n in (1, 2))
    return 2 * nbytes / _median(lambda: a.copy_(b), place, clock)


def disk_rate(folder: Path, clock: Clock, *, direct: bool) -> float | None:
    """Bytes/s of reading a large file of `folder` from its beginning, past the cache.

    Without a large file there, one is written and removed. None where there is no direct reading.
    StorageError if the folder cannot be written to or read from.
    """
    large = _largest(folder)
    if large is not None:
        return _read_rate(large, clock, direct)
    with ExitStack() as stack:
        with storage_errors(folder):
            own = stack.enter_context(tempfile.TemporaryDirectory(prefix="lowvram-doctor-", dir=folder))
        path = Path(own) / "bytes"
        piece = os.urandom(1 << 20)  # a disk that compresses must not win by it
        write_atomic(path, (piece for _ in range(_WRITTEN >> 20)))
        return _read_rate(path, clock, direct)


def _read_rate(path: Path, clock: Clock, direct: bool) -> float | None:
    began = clock()
    done = read_past_cache(path, _DISK, direct=direct)
    return done / max(1e-9, clock() - began) if done else None


def _largest(folder: Path) -> Path | None:
    """The largest file below `folder` that is worth timing; two levels, as model folders are laid out."""
    found = [p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.is_file()]
    sizes = sorted(((p.stat().st_size, str(p)) for p in found), reverse=True)
    return Path(sizes[0][1]) if sizes and sizes[0][0] >= _WRITTEN else None


def context_bytes() -> tuple[int, int] | None:
    """What a process holds of the CUDA device outside torch's allocator once its kernels and libraries are loaded, and
    what libraries keep inside it.

    A second process is started, asked what torch holds, and compared with what the device lost meanwhile. None if
    it could not be started. What other programs take or give back in that second counts too.
    """
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    command = [sys.executable, "-c", "from lowvram.survey import hold_context; hold_context()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        kept = child.stdout.readline().strip()
        after, _ = torch.cuda.mem_get_info()
        child.stdin.close()
    return (max(0, int(before - after) - int(kept)), int(kept)) if kept.isdigit() else None


def hold_context() -> None:
    """The second process of `context_bytes`: use the device as a job does, free it, tell what torch still holds, wait."""
    x = torch.randn(8, 1024, 128, device="cuda", dtype=torch.bfloat16)
    y = attention(x, x, x)
    (y @ y).sum().item()
    torch.nn.functional.conv3d(x.view(1, 8, 16, 64, 128), x.new_zeros(8, 8, 3, 3, 3)).sum().item()
    del x, y
    torch.cuda.empty_cache()
    print(torch.cuda.memory_reserved(), flush=True)
    sys.stdin.read()


def _median(run: Callable[[], Tensor], place: Place, clock: Clock) -> float:
    """Seconds of `run`, the median of five after one to warm up; never 0."""
    times = []
    for _ in range(6):
        _wait(place)
        began = clock()
        run()
        _wait(place)
        times.append(clock() - began)
    return max(1e-9, statistics.median(times[1:]))


def _wait(place: Place) -> None:
    if place.kind == "cuda":
        torch.cuda.synchronize()
