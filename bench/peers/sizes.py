"""The work that every program does: one Wan transformer, one latent, one prompt. Imports nothing but torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """A transformer and what it is asked for."""

    heads: int
    """of width 128"""
    layers: int
    ffn: int
    text: int
    """width of the text features"""
    latent: tuple[int, int, int]
    """frames, rows, columns, of 16 channels"""
    rows: int
    """of text features"""

    @property
    def config(self) -> dict[str, int]:
        """What diffusers' WanTransformer3DModel takes."""
        return {
            "num_attention_heads": self.heads, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16,
            "text_dim": self.text, "freq_dim": 256, "ffn_dim": self.ffn, "num_layers": self.layers,
        }  # fmt: skip

    @property
    def tokens(self) -> int:
        f, h, w = self.latent
        return f * h * w // 4


SIZES: Mapping[str, Size] = {
    "toy": Size(2, 3, 512, 64, (2, 8, 8), 8),
    "small": Size(6, 6, 3072, 512, (3, 16, 16), 24),
    "480p": Size(40, 40, 13824, 4096, (21, 60, 104), 512),
    "720p": Size(40, 40, 13824, 4096, (21, 90, 160), 512),
    "720p-121": Size(40, 40, 13824, 4096, (31, 90, 160), 512),
}
"""The last three: an expert of A14B at 832x480x81, 1280x720x81 and 1280x720x121."""


@dataclass(frozen=True)
class Work:
    """What one process does."""

    folder: Path
    """holds `transformer/` in diffusers' layout"""
    size: Size
    device: torch.device
    cap: int
    """Bytes of the device that may be used; 0: no bound."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latent [1, 16, F, H, W], time [1], text [1, rows, text]: the same for everyone."""
        generator = torch.Generator().manual_seed(7)
        latent = torch.randn(1, 16, *self.size.latent, generator=generator)
        text = torch.randn(1, self.size.rows, self.size.text, generator=generator)
        time = torch.tensor([700], device=self.device)
        return latent.to(self.device, self.dtype), time, text.to(self.device, self.dtype)
