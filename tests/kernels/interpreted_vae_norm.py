"""The norm before the autoencoders' convolutions is its reference, wherever a frame lies and is written to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvram.triton_kernels.vae_norm import fused_rms_silu, rms_silu


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    """Equal but for a rounding in float32, then one of the type of `got`."""
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - want.double()).abs()
    assert (error <= eps * want.double().abs() + 2e-6).all(), float(error.max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("channels", "rows", "columns"), [(96, 5, 7), (8, 1, 1), (160, 3, 33), (1024, 2, 3)])
def test_frames(dtype: torch.dtype, channels: int, rows: int, columns: int) -> None:
    lying = normal(1, 1, rows, columns, channels).to(dtype)
    lying[0, 0, 0, 0] = 0
    gamma = 1 + normal(channels, seed=1)
    for x in (lying.permute(0, 4, 1, 2, 3), lying.permute(0, 4, 1, 2, 3).contiguous()):
        want = rms_silu(x.double(), gamma.to(dtype).double())
        with torch.no_grad():
            close(fused_rms_silu(x, gamma), want)


def test_into_a_part_of_a_frame() -> None:
    """What lies around it is not touched."""
    x, gamma = normal(1, 4, 6, 96).permute(0, 3, 1, 2)[:, :, None], normal(96, 1, 1, 1, seed=1)
    room = torch.full((1, 1, 4, 9, 96), 7.0).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        made = fused_rms_silu(x, gamma, room.narrow(4, 2, 6))
        close(made, rms_silu(x.double(), gamma.double()))
    assert made.data_ptr() == room.narrow(4, 2, 6).data_ptr()
    assert (room[..., :2] == 7).all() and (room[..., 8:] == 7).all()
