"""What stands before every convolution of the autoencoders: RMS norm over the channels, and SiLU.

Plain functions are the reference and the CPU path; `rms_silu_` is an op with a kernel for CUDA, which reads a frame once
and writes it once, rounded once, to where the convolution remembers it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST = 1e-12
"""The least norm that is divided by, as `functional.normalize` has it."""


def rms_norm(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """x / ||x|| * sqrt(C) * gamma over the channels (dim 1), statistics in float32 at least; into `out` if given."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale = (x.shape[1] ** 0.5 / norm.clamp_min(LEAST)).to(x.dtype)
    gamma = gamma.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))
    return x * scale * gamma if torch.is_grad_enabled() else torch.mul(x, scale, out=out).mul_(gamma)


def rms_silu(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """SiLU of `rms_norm`, into `out` if given."""
    return functional.silu(rms_norm(x, gamma, out), inplace=not torch.is_grad_enabled())


@torch.library.custom_op("lowvram::rms_silu_", mutates_args=("out",))
def rms_silu_(out: Tensor, x: Tensor, gamma: Tensor) -> None:
    """`rms_silu` of a frame x [C, H, W], C at most 1024, into `out`, whose channels lie side by side."""
    from lowvram.triton_kernels import vae_norm_triton

    vae_norm_triton.rms_silu(out, x, gamma)


@rms_silu_.register_fake
def _(out: Tensor, x: Tensor, gamma: Tensor) -> None:
    return None


def fused_rms_silu(x: Tensor, gamma: Tensor, out: Tensor | None = None) -> Tensor:
    """`rms_silu` of one frame [1, C, 1, H, W] by the kernel."""
    _, channels, _, height, width = x.shape
    if out is None:
        out = x.new_empty(1, 1, height, width, channels).permute(0, 4, 1, 2, 3)
    rms_silu_(out[0, :, 0], x[0, :, 0], gamma.to(x.dtype).flatten())
    return out
