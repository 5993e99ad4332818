"""What stands between the multiplications of a block: norm and modulation, activation, gated residual.

Plain functions are the reference and the CPU path; those that end in `_op` or an underscore are ops with a fused
kernel for CUDA, which keep every intermediate number in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.triton_kernels.norm_rope import EPS


def layer_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """LayerNorm without weights, computed and returned in float32."""
    return functional.layer_norm(x.float(), x.shape[-1:], eps=eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """LN(x) * (1 + scale) + shift in float32, rounded once to `dtype`, or to that of x."""
    return (layer_norm(x) * (1 + scale) + shift).to(dtype or x.dtype)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate in float32, rounded once to the dtype of x."""
    return (x.float() + y.float() * gate).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """The tanh form."""
    return functional.gelu(x, approximate="tanh")


@torch.library.custom_op("lowvram::modulate", mutates_args=())
def modulate_op(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`modulate` of x [n, width]; shift and scale [1 or n, width] float32."""
    from lowvram.triton_kernels import modulate_triton

    return modulate_triton.modulate(x, shift, scale, dtype)


@modulate_op.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("lowvram::gated_", mutates_args=("x",))
def gated_(x: Tensor, y: Tensor, gate: Tensor) -> None:
    """`gated` into x [n, width], whose dtype may be another than that of y; gate [1 or n, width] float32."""
    from lowvram.triton_kernels import modulate_triton

    modulate_triton.gated(x, y, gate)


@gated_.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> None:
    return None


@torch.library.custom_op("lowvram::gelu_", mutates_args=("x",))
def gelu_(x: Tensor) -> None:
    """`gelu` into x [n, width]."""
    from lowvram.triton_kernels import modulate_triton

    modulate_triton.gelu(x)


@gelu_.register_fake
def _(x: Tensor) -> None:
    return None
