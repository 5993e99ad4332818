"""The CLIP vision tower that shows a picture to Wan 2.1 image-to-video and to Wan-Animate.

ViT-H/14 of open-clip's XLM-R model, as Wan-Video/Wan2.1 `wan/modules/clip.py` uses it: the tokens that leave the last
layer but one, without a final norm. The layer after them is never computed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.quant.linear import Params
from lowvram.quant.spec import ClipSpec
from lowvram.triton_kernels.attention import attention

EPS = 1e-5
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours (0..1) that CLIP was trained on, red, green, blue."""


def layers_used(spec: ClipSpec) -> int:
    """Layers that have a part in the result."""
    return spec.layers - 1


def preprocess(spec: ClipSpec, picture: Tensor) -> Tensor:
    """Picture [3, H, W] in -1..1 -> what the tower takes, [3, side, side] float32.

    Squeezed to a square, whatever its shape: bicubic without a filter, as upstream.
    """
    size = (spec.side, spec.side)
    x = functional.interpolate(picture[None].float(), size=size, mode="bicubic", align_corners=False)[0]
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return (x * 0.5 + 0.5 - mean) / std


def embed(outer: Params, spec: ClipSpec, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `preprocess` gives -> tokens [1 + patches, dim] in `dtype`: class token first, patches row by row."""
    p = spec.patch
    patches = x.unfold(1, p, p).unfold(2, p, p).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
    weight = outer.dense("patch_embedding.weight", dtype).flatten(1)
    rows = functional.linear(patches.to(dtype), weight)
    rows = torch.cat([outer.dense("class_embedding", dtype)[None], rows])
    return _norm(outer, "pre_norm", rows + outer.dense("position_embedding.weight", dtype))


def layer(p: Params, spec: ClipSpec, x: Tensor) -> Tensor:
    """One layer: x [n, dim] -> the same."""
    h = _norm(p, "norm1", x)
    q, k, v = (p.linear(f"attn.{leaf}", h).unflatten(-1, (spec.heads, -1)).transpose(0, 1) for leaf in "qkv")
    x = x + p.linear("attn.o", attention(q, k, v))
    return x + p.linear("mlp.2", functional.gelu(p.linear("mlp.0", _norm(p, "norm2", x))))


def encode(outer: Params, layers: Iterable[Params], spec: ClipSpec, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `preprocess` gives -> tokens [1 + patches, dim]; `layers` are the first `layers_used`."""
    tokens = embed(outer, spec, x, dtype)
    for p in layers:
        tokens = layer(p, spec, tokens)
    return tokens


def _norm(p: Params, name: str, x: Tensor) -> Tensor:
    """LayerNorm in float32, rounded once."""
    weight, bias = p[f"{name}.weight"].float(), p[f"{name}.bias"].float()
    return functional.layer_norm(x.float(), x.shape[-1:], weight, bias, EPS).to(x.dtype)
