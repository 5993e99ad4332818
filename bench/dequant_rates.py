"""How fast weights are made dense, by torch and by kernels, beside a copy: the bytes that have to move at the rate they do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from lowvram.bench.results import Fact
from lowvram.quant import fused
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import encoding_by_name, encoding_names

SHAPE = (5120, 13824)
"""The largest matrix of a 14B model."""
AT_ONCE = 20
"""Decodes that are timed together on a card: one takes some tens of microseconds."""


def compare(kind: str, *, small: bool) -> Iterator[dict[str, Fact]]:
    """Of every encoding: the share of the rate of a copy at which its bytes become bfloat16, and whether the kernel
    gives the bits of torch; what is known so far, after each. A copy reads and writes 2 bytes a weight; a decode reads what is stored and writes 2."""
    device, shape = torch.device(kind), (256, 1024) if small else SHAPE
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    source = torch.ones_like(out)
    copy = rate(lambda: out.copy_(source), 2 * source.nbytes, kind)
    facts: dict[str, Fact] = {"copy: bytes/s": copy}
    for encoding in dict.fromkeys(encoding_by_name(name) for name in encoding_names()):
        name = encoding.name
        if isinstance(encoding, Plain) or not encoding.fits(shape):
            continue
        parts = fused.random_parts(encoding, shape, device)
        moved = encoding.nbytes(shape) + out.nbytes
        by_torch = rate(lambda e=encoding, p=parts: e.decode(p, shape, out.dtype, out), moved, kind)  # type: ignore[misc]
        facts[f"{name}, torch: share of a copy's rate"] = by_torch / copy
        yield dict(facts)
        if kind == "cpu" or not fused.has_kernel(encoding):
            continue
        facts[f"{name}, kernel"] = fused.try_encoding(encoding, shape, device, (out.dtype,)) or "right"
        if facts[f"{name}, kernel"] == "right":
            by_kernel = rate(lambda e=encoding, p=parts: fused.decode(e, p, out), moved, kind)  # type: ignore[misc]
            facts[f"{name}, kernel: share of a copy's rate"] = by_kernel / copy
        yield dict(facts)


def rate(run: Callable[[], object], nbytes: int, kind: str) -> float:
    """Bytes/s, the median of three."""
    run()
    return nbytes / max(1e-9, median((_on_card if kind == "cuda" else _on_cpu)(run) for _ in range(3)))


def _on_cpu(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _on_card(run: Callable[[], object]) -> float:
    """Seconds of one of AT_ONCE. The card multiplies first, so that it never waits for the host to launch the next."""
    busy = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    for _ in range(2):
        busy @ busy
    start.record()
    for _ in range(AT_ONCE):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / AT_ONCE
