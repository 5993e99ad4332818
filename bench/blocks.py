"""One transformer block at the true width: ours against the plain form, torch's attention and diffusers' block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.bench.results import Fact
from lowvram.models import dit
from lowvram.models.self_attention import plain_workspace
from lowvram.quant.linear import Params
from lowvram.quant.spec import HEAD_DIM, DitSpec
from lowvram.sampling.presets import model_preset
from lowvram.triton_kernels.attention import attention


def compare(kind: str, tokens: int, *, small: bool) -> Iterator[dict[str, Fact]]:
    """Seconds and FLOP/s of one A14B block on `tokens` tokens, in the compute dtype; `small`: of the embedded model.

    What is known so far, after each measurement.
    """
    spec = model_preset("nano" if small else "wan2.2-t2v-a14b").dit
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    weights = _weights(spec, kind, dtype)
    x = torch.randn(tokens, spec.dim, device=kind).to(dtype)
    flops = 2 * tokens * (6 * spec.dim**2 + 2 * spec.dim * spec.ffn) + 4 * tokens**2 * spec.dim
    facts: dict[str, Fact] = {"tokens": tokens, "block FLOP": flops}
    with torch.inference_mode():
        facts |= _attention(spec, x, kind)
        yield dict(facts)
        ours, run = _ours(spec, weights, x, kind)
        facts["block, ours: seconds"] = seconds = seconds_of(run, kind)
        facts["block, ours: FLOP/s"] = flops / seconds
        yield dict(facts)
        try:
            theirs, run = _diffusers(spec, weights, x, kind)
        except ImportError:
            yield facts | {"block, diffusers: seconds": None}
            return
        facts["block, diffusers: seconds"] = seconds = seconds_of(run, kind)
        facts["block, diffusers: FLOP/s"] = flops / seconds
        facts["block: relative difference"] = float((ours - theirs).float().norm() / theirs.float().norm())
        yield facts


def _weights(spec: DitSpec, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    weights = {}
    for name, shape in spec.block_shapes().items():
        values = torch.randn(shape, device=kind)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values = values * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1)
        weights[name] = values.to(dtype)
    return weights


def _attention(spec: DitSpec, x: Tensor, kind: str) -> dict[str, Fact]:
    q, k, v = (torch.randn_like(x).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for _ in "qkv")
    flops = 4 * x.shape[0] ** 2 * spec.dim
    run = {
        "ours": lambda: attention(q, k, v),
        "torch": lambda: functional.scaled_dot_product_attention(q[None], k[None], v[None]),
    }
    return {f"attention, {name}: FLOP/s": flops / seconds_of(each, kind) for name, each in run.items()}


def _ours(
    spec: DitSpec, weights: dict[str, Tensor], x: Tensor, kind: str
) -> tuple[Tensor, Callable[[], object]]:
    """Result of the lean block, and a run of it that changes its own copy."""
    n = x.shape[0]
    p, rope = Params(weights), dit.rope_table(1, 1, n, device=x.device)
    time_row, text = _inputs(spec, x)
    k, v = (x.new_empty(spec.heads, n, HEAD_DIM) for _ in "kv")
    work = plain_workspace(k, v)
    context = dit.Context(text, torch.zeros(text.shape[0], device=x.device))
    row = dit.Time(time_row[:, 0].contiguous(), time_row, n)
    first = x.clone()
    dit.block_(p, first, row, context, rope, work)
    again = x.clone()
    return first, lambda: dit.block_(p, again.copy_(x), row, context, rope, work)


def _inputs(spec: DitSpec, x: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    time_row = torch.randn(1, 6, spec.dim, generator=generator) * 0.1
    text = torch.randn(32, spec.dim, generator=generator)
    return time_row.to(x.device), text.to(x.device, x.dtype)


def _diffusers(
    spec: DitSpec, weights: dict[str, Tensor], x: Tensor, kind: str
) -> tuple[Tensor, Callable[[], object]]:
    """The same with diffusers' block: same weights, same inputs, same attention (torch's)."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    from lowvram.quant.names import DIT

    with torch.device(kind):
        block: Any = WanTransformerBlock(spec.dim, spec.ffn, spec.heads, "rms_norm_across_heads", True, 1e-6)
    renamed = {
        (DIT.from_native(f"blocks.0.{name}") or "").removeprefix("blocks.0."): t
        for name, t in weights.items()
    }
    block.load_state_dict(renamed)
    block = block.to(x.dtype).eval()
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    time_row, text = _inputs(spec, x)
    table = dit.rope_table(1, 1, x.shape[0], device=x.device)
    rotary = tuple(table[..., i].repeat_interleave(2, -1)[None, :, None] for i in (0, 1))

    def run() -> Tensor:
        out: Tensor = block(x[None], text[None], time_row, rotary)
        return out

    return run()[0], run


def seconds_of(run: Callable[[], object], kind: str) -> float:
    """The median of three runs after a first."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        run()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return max(1e-9, median(times[1:]))
