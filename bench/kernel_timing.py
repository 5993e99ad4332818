"""Attention on a card: every tile that may be taken, against torch's own backends and what is installed beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial

import torch

from lowvram.bench.attending import BACKENDS, HEADS, TOKENS, by_backend
from lowvram.triton_kernels import attention_triton, backends, dispatch
from lowvram.triton_kernels.attention import attention
from lowvram.triton_kernels.modes import MODES
from lowvram.triton_kernels.norm_rope import centre_of, quantise_rows, quantise_values
from lowvram.triton_kernels.tiles import CANDIDATES, arch_of

REPEATS = 5


def timings() -> Iterator[dict[str, object]]:
    """One object a kernel, tile and length: milliseconds, median of REPEATS after one for the compiler."""
    device = torch.device("cuda", 0)
    arch = arch_of(device)
    for n in TOKENS:
        q, k, v = (torch.randn(HEADS, n, 128, device=device, dtype=torch.bfloat16) for _ in "qkv")
        runs: dict[str, Callable[[], object]] = {"sdpa": partial(attention, q, k, v)}
        for backend in BACKENDS:
            runs[f"sdpa {backend.name.lower()}"] = partial(by_backend, backend, q, k, v)
        for mode in MODES.values():
            if mode.package in dispatch.installed() and mode.package:
                runs[mode.name] = partial(backends.attention_by, q, k, v, mode.package)
        for name, run in runs.items():
            yield {"kernel": name, "tokens": n} | _timed(run, n)
        rows = *quantise_rows(q), *quantise_rows(k, centre_of(k[:, ::64]))
        out = q.new_empty(n, HEADS * 128)
        for mode in MODES.values():
            if not mode.quantised or mode.keep < 1 or arch not in mode.archs:
                continue
            values = (v, q[:0].float()) if mode.v_format == "bf16" else quantise_values(v, mode.v_format)
            half = dispatch.half_of(mode, arch)
            for tile in CANDIDATES:
                run = partial(
                    attention_triton.attend, out, *rows, *values, v_format=mode.v_format, half=half, tile=tile
                )
                facts = {"kernel": mode.name, "tokens": n, "tile": list(astuple(tile))}
                yield facts | _timed(run, n)


def _timed(run: Callable[[], object], n: int) -> dict[str, object]:
    """Milliseconds and TOPS; what a kernel says if it is not for this card."""
    try:
        run()
    except Exception as problem:  # noqa: BLE001  a backend says in its own way that it is not for this card
        return {"ok": True, "refused": str(problem).splitlines()[0]}
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    median = statistics.median(times)
    return {"ok": True, "ms": round(median, 3), "tops": round(4 * n * n * 128 * HEADS / median / 1e9, 1)}
