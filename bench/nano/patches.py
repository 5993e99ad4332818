"""The latent space of nano: principal components of pixel patches.

A latent is what a linear projection of a patch says: 1x8x8 pixels for the first frame, 4x8x8 for every later
group of four. The projection is known in closed form, so the transformer, the decoder (which learns to invert
it, seeing neighbours and time) and the encoder (which learns to reproduce it) train independently.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from data import clips, split
from torch import Tensor

CHANNELS = 16
SOFTNESS = 0.5
"""Components are divided by std ** SOFTNESS: 1 would make faint detail as loud as colour, 0 leaves it silent."""


def cut(video: Tensor, frames: int) -> Tensor:
    """video [B, T, 3, H, W] with T a multiple of `frames` -> [B, T/frames, H/8, W/8, frames*3*64]."""
    b, t, c, h, w = video.shape
    x = video.reshape(b, t // frames, frames, c, h // 8, 8, w // 8, 8)
    return x.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(b, t // frames, h // 8, w // 8, frames * c * 64)


def uncut(x: Tensor, frames: int) -> Tensor:
    b, t, h, w, _ = x.shape
    x = x.reshape(b, t, h, w, frames, 3, 8, 8).permute(0, 1, 4, 5, 2, 6, 3, 7)
    return x.reshape(b, t * frames, 3, h * 8, w * 8)


@dataclass(frozen=True, slots=True)
class Patches:
    """Means and bases of both patch kinds; `scale` makes the latents about unit variance."""

    mean1: Tensor
    basis1: Tensor
    mean4: Tensor
    basis4: Tensor
    scale1: Tensor
    scale4: Tensor

    def encode(self, video: Tensor) -> Tensor:
        """[B, 1+4k, 3, H, W] in -1..1 -> [B, 16, 1+k, H/8, W/8]"""
        first = (cut(video[:, :1], 1) - self.mean1) @ self.basis1 * self.scale1
        rest = (cut(video[:, 1:], 4) - self.mean4) @ self.basis4 * self.scale4
        return torch.cat([first, rest], 1).permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, z: Tensor) -> Tensor:
        """The linear inverse, for a first look."""
        z = z.permute(0, 2, 3, 4, 1)
        first = uncut((z[:, :1] / self.scale1) @ self.basis1.T + self.mean1, 1)
        rest = uncut((z[:, 1:] / self.scale4) @ self.basis4.T + self.mean4, 4)
        return torch.cat([first, rest], 1)


def fit(count: int = 2000, seed: int = 1) -> Patches:
    source = clips(split()[0], seed)
    video = torch.from_numpy(np.stack([next(source)[1] for _ in range(count)]))
    parts = []
    for x in (cut(video[:, :1], 1), cut(video[:, 1:], 4)):
        flat = x.reshape(-1, x.shape[-1])
        mean = flat.mean(0)
        covariance = (flat - mean).T @ (flat - mean) / len(flat)
        values, vectors = torch.linalg.eigh(covariance.double())
        basis = vectors[:, -CHANNELS:].flip(1).float()
        std = values[-CHANNELS:].flip(0).sqrt().float()
        scale = std**-SOFTNESS
        scale = scale / (std * scale).square().mean().sqrt()
        parts.append((mean, basis, scale, std))
    (m1, b1, s1, _), (m4, b4, s4, _) = parts
    return Patches(m1, b1, m4, b4, s1, s4)
