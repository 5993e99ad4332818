"""The UMT5 encoder that reads the prompt.

Follows Wan-Video/Wan2.2 `wan/modules/t5.py`: no biases, no 1/sqrt(d), a relative bias table in every layer.
Padding keys are masked upstream, so the true tokens alone give the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.quant.linear import Params
from lowvram.quant.spec import TextSpec

EPS = 1e-6
BUCKETS = 32
MAX_DISTANCE = 128


def relative_buckets(n: int, device: torch.device | None = None) -> Tensor:
    """[n, n] int64 bucket of key minus query position: bidirectional, exact below 8, logarithmic to 128."""
    position = torch.arange(n, device=device)
    relative = position[None, :] - position[:, None]
    half = BUCKETS // 2
    exact = half // 2
    distance = relative.abs()
    far = torch.log(distance.clamp_min(1).float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    far = (exact + far.to(torch.int64)).clamp_max(half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) in float32, cast, then the weight."""
    full = x.float()
    return (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight.to(x.dtype)


def layer(p: Params, spec: TextSpec, x: Tensor, buckets: Tensor, mask: Tensor | None = None) -> Tensor:
    """One encoder layer: x [..., n, dim] -> the same. mask [..., 1, 1, n] adds to the logits (batches only)."""
    h = rms_norm(x, p["norm1.weight"])
    q, k, v = (p.linear(f"attn.{c}", h).unflatten(-1, (spec.heads, -1)).transpose(-2, -3) for c in "qkv")
    table = p["pos_embedding.embedding.weight"].to(x.dtype)
    logits = q @ k.transpose(-1, -2) + table[buckets].permute(2, 0, 1)
    if mask is not None:
        logits = logits + mask
    y = logits.float().softmax(-1).to(x.dtype) @ v
    x = x + p.linear("attn.o", y.transpose(-2, -3).flatten(-2))
    h = rms_norm(x, p["norm2.weight"])
    gate = functional.gelu(p.linear("ffn.gate.0", h), approximate="tanh")
    return x + p.linear("ffn.fc2", p.linear("ffn.fc1", h) * gate)


def encode(
    rows: Tensor, layers: Iterable[Params], final_norm: Tensor, spec: TextSpec, mask: Tensor | None = None
) -> Tensor:
    """Token embeddings [..., n, dim] -> text features [..., n, dim].

    rows: gathered from the vocabulary table by the caller, which need not hold the table on any device.
    """
    buckets = relative_buckets(rows.shape[-2], rows.device)
    for p in layers:
        rows = layer(p, spec, rows, buckets, mask)
    return rms_norm(rows, final_norm)
