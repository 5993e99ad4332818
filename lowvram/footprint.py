"""What the networks allocate while they run: the product's own code on fake tensors, at the real geometry.

Every function returns bytes above what its inputs take. Buffers that are allocated once, by name, are inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.model import Group
from lowvram.models import dit, umt5, vae
from lowvram.offload.budget import allocated_size
from lowvram.offload.estimate import peak_memory
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.linear import Params
from lowvram.quant.spec import HEAD_DIM, DitSpec, TextSpec, VaeSpec
from lowvram.stages.weights import Dense, to_params


def _fake_params(group: Group) -> Params:
    """Parameters as `carve` would give them, each part a tensor of its own: fewer operations to imitate."""
    views = {
        ref.name: {p.role: torch.empty(p.shape, dtype=TORCH_DTYPES[p.dtype]) for p in ref.parts}
        for ref in group.refs
    }
    return to_params(group, views)


def _peak(run: Callable[[Tensor], object], x: Tensor) -> int:
    return peak_memory(run, x, rounding=allocated_size).peak_bytes


def block_scratch(
    spec: DitSpec,
    block: Group,
    tokens: int,
    per_frame: int,
    dtype: torch.dtype,
    *,
    group: int = 0,
    chunk: int = dit.CHUNK,
) -> int:
    """Transient bytes of `dit.block_` on a long sequence. Two chunks tell: later ones repeat the second.

    per_frame: tokens that share a time row, or 0 if all do. group: heads at a time, or 0 for all.
    """
    n = min(tokens, 2 * chunk)
    mode = FakeTensorMode()
    with mode:
        p = _fake_params(block)
        rows = 1 if not per_frame else -(-n // per_frame)
        time = dit.Time(torch.empty(rows, spec.dim), torch.empty(rows, 6, spec.dim), per_frame or n)
        text = torch.empty(spec.text_len, spec.dim, dtype=dtype)
        image = torch.empty(spec.image_tokens, spec.dim, dtype=dtype) if spec.image_tokens else None
        context = dit.Context(text, torch.empty(spec.text_len), image)
        k, v = (torch.empty(group or spec.heads, n, HEAD_DIM, dtype=dtype) for _ in "kv")
        x, rope = torch.empty(n, spec.dim, dtype=dtype), torch.empty(n, HEAD_DIM // 2, 2)
        work = dit.Workspace(k, v, torch.empty_like(x) if group else None, chunk)
    factors = 2 * (allocated_size(4 * tokens) - allocated_size(4 * n)) if group else 0  # one a token, not a chunk
    return factors + _peak(lambda x: dit.block_(p, x, time, context, rope, work), x)


def head_scratch(
    spec: DitSpec, outer: Group, grid: tuple[int, int, int], dtype: torch.dtype, *, chunk: int = dit.CHUNK
) -> int:
    """Transient bytes of `dit.head`, its result included."""
    mode = FakeTensorMode()
    with mode:
        p = _fake_params(outer)
        n = grid[0] * grid[1] * grid[2]
        time = dit.Time(torch.empty(1, spec.dim), torch.empty(1, 6, spec.dim), n)
        x = torch.empty(n, spec.dim, dtype=dtype)
    return _peak(lambda x: dit.head(p, spec, x, time, grid, chunk), x)


def text_scratch(spec: TextSpec, layer: Group, rows: int, dtype: torch.dtype) -> int:
    """Transient bytes of one text layer on `rows` tokens."""
    mode = FakeTensorMode()
    with mode:
        p = _fake_params(layer)
        x, buckets = torch.empty(rows, spec.dim, dtype=dtype), umt5.relative_buckets(rows)
    return _peak(lambda x: umt5.layer(p, spec, x, buckets), x)


def decode_scratch(spec: VaeSpec, weights: Group, latent: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """Transient bytes of `vae.decode`, its history and one chunk of frames included: the second chunk meets every history full."""
    z, frames, height, width = latent
    mode = FakeTensorMode()
    with mode:
        w = Dense(_fake_params(weights), dtype)
        x = torch.empty(1, z, min(frames, 2), height, width, dtype=dtype)

    def run(x: Tensor) -> None:
        for _ in vae.decode(spec, w, x):
            pass

    return _peak(run, x)
