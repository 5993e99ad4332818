"""Error of 8-bit attention on synthetic data that holds what real keys and values hold: its arithmetic in torch.

Queries, keys and values are bfloat16 with the rotary embedding of an 8 x 16 x 32 grid. The error is the relative L2
distance of the output from exact attention in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowvram.models.dit import rope_table
from lowvram.triton_kernels.attention import attend_reference
from lowvram.triton_kernels.keys import SAMPLE, balanced_centre
from lowvram.triton_kernels.modes import MODES
from lowvram.triton_kernels.norm_rope import quantise_rows, quantise_values, rotate

GRID = (8, 16, 32)
TOKENS = 4096
HEADS = 2
Rows = tuple[Tensor, Tensor, Tensor]

BOUNDS = {
    ("int8", "gaussian"): 0.012, ("int8", "offsets"): 0.012, ("int8", "channels"): 0.012, ("int8", "tokens"): 0.025, ("int8", "sink"): 0.01,
    ("int8-fp16", "gaussian"): 0.012, ("int8-fp16", "offsets"): 0.012, ("int8-fp16", "channels"): 0.012, ("int8-fp16", "tokens"): 0.025,
    ("int8-fp16", "sink"): 0.01,
}  # fmt: skip
"""What is promised; int8-fp8 promises nothing."""


def gaussian(q: Tensor, k: Tensor, v: Tensor) -> Rows:
    return q, k, v


def offsets(q: Tensor, k: Tensor, v: Tensor) -> Rows:
    """Six channels of k eight away from zero, before the rotary embedding."""
    k[..., 5:125:20] += 8 * k.new_tensor([1, -1] * 3)
    return q, k, v


def channels(q: Tensor, k: Tensor, v: Tensor) -> Rows:
    """Four channels of q and k six times as large as the others, eight of v four away from zero."""
    q[..., ::32] *= 6**0.5
    k[..., ::32] *= 6
    v[..., ::16] += 4
    return q, k, v


def tokens(q: Tensor, k: Tensor, v: Tensor) -> Rows:
    """Every 90th query and key six times as large."""
    q[:, ::90] *= 6
    k[:, ::90] *= 6
    return q, k, v


def _with_sink(q: Tensor, k: Tensor) -> None:
    """One key that every query likes, after the rotary embedding: its logit stands about 10 above the others."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(128, generator=generator), dim=0)
    q += 4 * direction
    k[:, 0] = direction * 10 * math.sqrt(128) / 4


def sink(q: Tensor, k: Tensor, v: Tensor) -> Rows:
    return q, k, v


DATA: tuple[Callable[[Tensor, Tensor, Tensor], Rows], ...] = (gaussian, offsets, channels, tokens, sink)


def errors(quick: bool) -> Iterator[dict[str, object]]:
    """One object a mode and data: op, mode, data, relative_error, bound, ok. quick: the first data only."""
    rope = rope_table(*GRID)
    for data in DATA[: 1 if quick else None]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = data(*(torch.randn(HEADS, TOKENS, 128, generator=generator) for _ in "qkv"))
        q, k = rotate(q, rope)[:, ::4], rotate(k, rope)
        if data is sink:
            _with_sink(q, k)
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        exact = _exact(q, k, v)
        balance, centre = balanced_centre(q[:, ::SAMPLE], k[:, ::SAMPLE])
        scale = balance.view(HEADS, 1, 128).bfloat16()  # of powers of two: nothing is rounded
        rows = *quantise_rows(q * scale), *quantise_rows(k / scale, centre)
        for mode in MODES.values():
            if mode.quantised and mode.keep == 1:
                values = (v, q[:0].float()) if mode.v_format == "bf16" else quantise_values(v, mode.v_format)
                got = attend_reference(*rows, *values, v_format=mode.v_format, half=True)
                error = float((got.double() - exact).norm() / exact.norm())
                bound = BOUNDS.get((mode.name, data.__name__))
                yield {
                    "op": "attention",
                    "mode": mode.name,
                    "data": data.__name__,
                    "relative_error": round(error, 5),
                    "bound": bound,
                    "ok": bound is None or error <= bound,
                }


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q.double() @ k.double().mT / math.sqrt(128)
    return (logits.softmax(-1) @ v.double()).transpose(0, 1).flatten(1)
