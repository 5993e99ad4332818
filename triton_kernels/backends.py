"""Attention of other people's packages, where they are installed: sageattention, flash-attn, comfy-kitchen.

One op, so that a plan sees what it allocates. What a package needs inside is hidden from the plan; packages that
quantise take about K and V once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.triton_kernels.attention import attention


@torch.library.custom_op("lowvram::attention_by", mutates_args=())
def attention_by(q: Tensor, k: Tensor, v: Tensor, package: str) -> Tensor:
    """q [heads, m, 128], k and v [heads, n, 128] -> [m, heads * 128], by the package of that import name."""
    y: Tensor
    if package == "sageattention":
        from sageattention import sageattn

        y = sageattn(q[None], k[None], v[None], tensor_layout="HND", is_causal=False)[0]
    elif package == "flash_attn":
        from flash_attn import flash_attn_func

        y = flash_attn_func(*(t.transpose(0, 1)[None] for t in (q, k, v)))[0].transpose(0, 1)
    elif package == "comfy_kitchen":
        from comfy_kitchen import int8_attention

        y = int8_attention(q[None], k[None], v[None])[0]
    else:
        return attention(q, k, v)
    return y.transpose(0, 1).flatten(1).contiguous()


@attention_by.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, package: str) -> Tensor:
    return q.new_empty(q.shape[1], q.shape[0] * q.shape[2])
