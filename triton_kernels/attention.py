"""Attention as one op, so that a plan on fake tensors sees what it allocates: its result, never the logits.

    attention(q, k, v, bias)    softmax(q k^T / sqrt(d) + bias) v

The reference is torch's scaled_dot_product_attention, which is at the ceiling of bf16 on every card this runs on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """q [..., heads, m, d], k and v [..., heads, n, d] -> [..., m, heads * d], contiguous.

    bias: added to the logits, broadcastable to [..., heads, m, n], in the dtype of q.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _reference(q, k, v, bias)
    out: Tensor = torch.ops.lowvram.attention(q, k, v, bias)
    return out


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    # The fused kernels write [m, heads, d]: joining the heads is then a view, not a copy.
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(-2, -3).flatten(-2)


@torch.library.custom_op("lowvram::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return _reference(q, k, v, bias)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    *batch, heads, m, d = q.shape
    return q.new_empty(*batch, m, heads * d)
