"""The attention of the autoencoders' middle blocks: single-head, over all pixels of a frame.

A frame is given as rows, one for each pixel. Keys and values are made once; then some queries at a time attend to
some keys at a time, with a running softmax (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"),
which is exact. So besides the frame nothing grows with its size but keys and values, and those may lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.models.vae_layers import History, Weights
from lowvram.triton_kernels.vae_norm import rms_norm

QUERIES, KEYS = 4096, 2048
"""Pixels that attend at once, and to how many; fixed, so that memory never changes the arithmetic."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Single-head attention over the pixels of each frame, plus the input."""

    name: str

    def __call__(self, x: Tensor, w: Weights, history: History) -> Tensor:
        b, c, t, height, width = x.shape
        frames = x.permute(0, 2, 3, 4, 1).reshape(
            b * t, height * width, c
        )  # a view of what lies channels last
        y = torch.empty_like(frames)
        for n, frame in enumerate(frames):
            attend(self.name, w, frame, y[n], torch.empty_like(frame), torch.empty_like(frame))
        return y.view(b, t, height, width, c).permute(0, 4, 1, 2, 3)


def attend(name: str, w: Mapping[str, Tensor], x: Tensor, out: Tensor, keys: Tensor, values: Tensor) -> None:
    """The block `name` of a frame x [pixels, C] into `out`, which may be x.

    keys, values  [pixels, C], to be overwritten. Each of the four may lie on a device of its own; computed on that of
                  the weights, in the dtype of x, the softmax in float32 at least.
    """
    gamma, proj = w[f"{name}.norm.gamma"], (_matrix(w, f"{name}.proj"), w[f"{name}.proj.bias"])
    matrix, bias = _matrix(w, f"{name}.to_qkv"), w[f"{name}.to_qkv.bias"]
    device, c = matrix.device, x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    for part in _parts(x, KEYS):
        rows = functional.linear(rms_norm(x[part].to(device), gamma), matrix[c:], bias[c:])
        keys[part], values[part] = rows.chunk(2, dim=1)
        del rows
    for part in _parts(x, QUERIES):
        here = x[part].to(device)
        q = functional.linear(rms_norm(here, gamma), matrix[:c], bias[:c]).to(wide) * c**-0.5
        out[part] = functional.linear(_attended(q, keys, values).to(x.dtype), *proj) + here


def _parts(x: Tensor, count: int) -> Iterator[slice]:
    """`count` rows of x at a time."""
    return (slice(i, i + count) for i in range(0, len(x), count))


def _matrix(w: Mapping[str, Tensor], name: str) -> Tensor:
    """A 1x1 convolution as the matrix that it is."""
    return w[f"{name}.weight"].flatten(1)


def _attended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q @ keys.T) @ values: [queries, C] in the dtype of q."""
    top, total = q.new_full((len(q), 1), -torch.inf), q.new_zeros(len(q), 1)
    y = torch.zeros_like(q)
    for part in _parts(keys, KEYS):
        p = q @ keys[part].to(q).t()
        highest = torch.maximum(top, p.detach().amax(1, keepdim=True))
        p.sub_(highest).exp_()
        fade = (top - highest).exp_()
        total, top = total * fade + p.sum(1, keepdim=True), highest
        y.mul_(fade).addmm_(p, values[part].to(q))
        del p
    return y / total
