"""What Wan-Animate adds to the transformer: how a face moves, and how the tokens of a latent slot hear of it.

motion_vectors   face crops -> one vector a frame         once per clip
face_tokens      vectors -> tokens for each latent slot   once per clip
keys_values      tokens -> keys and values of one adapter once per clip
attend_          an adapter, in place on the residual     after every fifth block, in every step

Formulas follow Wan-Video/Wan2.2 `wan/modules/animate/{motion_encoder,face_blocks}.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.models.rows import Rows, watch
from lowvram.quant.face_spec import FACE_STAGES, MOTION_LAYERS
from lowvram.quant.linear import Params
from lowvram.quant.spec import HEAD_DIM
from lowvram.triton_kernels.attention import attention

EPS = 1e-6
BLUR = (1.0, 3.0, 3.0, 1.0)

_CONVS = "motion_encoder.enc.net_app.convs"


# ---- motion encoder


def directions(p: Params) -> Tensor:
    """Orthonormal directions of motion [motion, directions] float32, on the device of the weight.

    The sign of each column is that of LAPACK's Householder reflections, so the host computes them for every device.
    """
    weight = p.dense("motion_encoder.dec.direction.weight", torch.float32)
    return torch.linalg.qr((weight + 1e-8).cpu()).Q.to(weight.device)


def motion_vectors(p: Params, faces: Tensor, basis: Tensor) -> Tensor:
    """Face crops [n, 3, 512, 512] in -1..1, float32 -> motion vectors [n, motion]. basis: see `directions`."""
    x = _biased_act(_conv(p, f"{_CONVS}.0.0.weight", faces), p[f"{_CONVS}.0.1.bias"])
    for n in range(1, FACE_STAGES + 1):
        x = _residual(p.scope(f"{_CONVS}.{n}."), x)
    x = _conv(p, f"{_CONVS}.{FACE_STAGES + 1}.weight", x).flatten(1)
    for n in range(MOTION_LAYERS):  # nothing between them, as upstream
        weight = p.dense(f"motion_encoder.enc.fc.{n}.weight", x.dtype)
        bias = p.dense(f"motion_encoder.enc.fc.{n}.bias", x.dtype)
        x = functional.linear(x, weight * weight.shape[1] ** -0.5, bias)
    return x @ basis.T


def _residual(p: Params, x: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, c', h/2, w/2]."""
    skip = _conv(p, "skip.1.weight", _blur(x, 1), stride=2)
    x = _biased_act(_conv(p, "conv1.0.weight", x, padding=1), p["conv1.1.bias"])
    x = _biased_act(_conv(p, "conv2.1.weight", _blur(x, 2), stride=2), p["conv2.2.bias"])
    return (x + skip) / math.sqrt(2)


def _conv(p: Params, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution with equalised learning rate: the stored weight times 1 / sqrt(fan in)."""
    weight = p.dense(name, x.dtype)
    fan_in = math.prod(weight.shape[1:])
    return functional.conv2d(x, weight * fan_in**-0.5, stride=stride, padding=padding)


def _biased_act(x: Tensor, bias: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2 on x + bias, times sqrt(2). In place."""
    return functional.leaky_relu_(x.add_(bias.to(x.dtype)), 0.2).mul_(math.sqrt(2))


def _blur(x: Tensor, padding: int) -> Tensor:
    """Each channel by the normalised outer product of BLUR with itself."""
    taps = torch.tensor(BLUR, dtype=x.dtype, device=x.device) / sum(BLUR)
    kernel = taps.outer(taps).expand(x.shape[1], 1, -1, -1)
    return functional.conv2d(x, kernel, padding=padding, groups=x.shape[1])


# ---- face encoder


def face_tokens(p: Params, motion: Tensor) -> Tensor:
    """Motion vectors [T, motion] of a clip -> tokens [1 + latent frames, heads + 1, dim].

    Causal in time, two halvings: 77 frames make 39 and then 20 steps. The first slot is the reference picture's and
    hears of no face: zeros. The last token of every other slot is a learned one.
    """
    hidden = p["face_encoder.conv2.conv.weight"].shape[0]
    x = _causal(p, "conv1_local", motion.T[None], stride=1)
    x = _norm_act(x.unflatten(1, (-1, hidden)).squeeze(0))  # [heads, hidden, T]
    x = _norm_act(_causal(p, "conv2", x, stride=2))
    x = _norm_act(_causal(p, "conv3", x, stride=2))
    x = p.linear("face_encoder.out_proj", x.transpose(1, 2)).transpose(0, 1)  # [steps, heads, dim]
    padding = p.dense("face_encoder.padding_tokens", x.dtype)[0].expand(x.shape[0], 1, -1)
    x = torch.cat([x, padding], dim=1)
    return torch.cat([torch.zeros_like(x[:1]), x])


def _causal(p: Params, name: str, x: Tensor, stride: int) -> Tensor:
    """x [n, c, T] -> [n, c', ceil(T / stride)]; the first step stands for those before it."""
    weight, bias = (p.dense(f"face_encoder.{name}.conv.{leaf}", x.dtype) for leaf in ("weight", "bias"))
    x = functional.pad(x, (weight.shape[2] - 1, 0), mode="replicate")
    return functional.conv1d(x, weight, bias, stride=stride)


def _norm_act(x: Tensor) -> Tensor:
    """SiLU of the normalised channels of x [n, c, T]."""
    return functional.silu(_layer_norm(x.transpose(1, 2))).transpose(1, 2)


# ---- face adapter


@dataclass(frozen=True, slots=True)
class FaceKV:
    """Keys and values of one adapter for a clip: [slots, heads, tokens of a slot, 128]."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Driving:
    """What drives the character of a clip: the same in every step."""

    pose: Tensor
    """Latent [C_out, F - 1, H, W] of the pose video; the first latent frame is the reference picture's."""
    kv: Mapping[int, FaceKV]
    """By number of the transformer block that the adapter follows."""


def keys_values(p: Params, tokens: Tensor) -> FaceKV:
    """tokens: see `face_tokens`. p: one adapter. The norm of keys is per head, unlike that of self attention."""
    h = _layer_norm(tokens)
    if "linear1_kv.weight" in p:
        k, v = p.linear("linear1_kv", h).chunk(2, dim=-1)
    else:
        k, v = p.linear("linear1_k", h), p.linear("linear1_v", h)
    return FaceKV(_head_norm(_heads(k), p["k_norm.weight"]), _heads(v).contiguous())


def add_pose_(x: Rows, frames: Iterable[Tensor], chunk: int) -> None:
    """Add the tokens of each pose frame [L / F, dim] to x [L, dim], `chunk` at a time; the first slot, the reference
    picture's, has none."""
    start = 0
    for tokens in frames:
        start += tokens.shape[0]
        for i, part in zip(range(start, start + tokens.shape[0], chunk), tokens.split(chunk), strict=True):
            x[i : i + part.shape[0]] += part


def attend_(p: Params, x: Rows, kv: FaceKV, chunk: int, finite: Tensor | None = None) -> None:
    """x [L, dim] += what its tokens hear of the face, `chunk` tokens at a time; tokens are ordered by slot.

    Each token attends to the tokens of its own latent slot alone: no positions, no gate. finite: as `dit.block_` has it.
    """
    per_slot = x.shape[0] // kv.k.shape[0]
    for i in range(0, x.shape[0], chunk):
        c = x[i : i + chunk]
        q = _head_norm(_heads(p.linear("linear1_q", _layer_norm(c, kv.k.dtype))), p["q_norm.weight"])
        heard = []
        start = 0
        while start < c.shape[0]:
            slot = (i + start) // per_slot
            stop = min(c.shape[0], (slot + 1) * per_slot - i)
            heard.append(attention(q[:, start:stop], kv.k[slot], kv.v[slot]))
            start = stop
        c = c + p.linear("linear2", torch.cat(heard))
        watch(finite, -1, c)
        x[i : i + chunk] = c


def _layer_norm(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm without weights in float32, rounded once to `dtype`, or to that of x."""
    return functional.layer_norm(x.float(), x.shape[-1:], eps=EPS).to(dtype or x.dtype)


def _heads(x: Tensor) -> Tensor:
    """[..., n, dim] -> [..., heads, n, 128] (a view)."""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(-2, -3)


def _head_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS over the channels of each head in float32, cast, then the weight."""
    normed = functional.rms_norm(x.float(), x.shape[-1:], eps=EPS)
    return normed.to(x.dtype) * weight.to(x.dtype)
