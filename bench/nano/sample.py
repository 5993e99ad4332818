"""Sample nano during training and score what it drew, before the product's own path exists for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from data import score, split
from networks import DIT, Text, Weights, velocity
from torch import Tensor

from lowvram.quant.linear import Params


def sample(
    high: Params,
    low: Params,
    words: Weights,
    text: Text,
    scenes: list,
    steps: int = 20,
    guidance: float = 3.0,
    shift: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Euler over shifted sigmas with classifier-free guidance -> latents [B, 16, 3, 8, 8]."""
    u = torch.linspace(1, 0, steps + 1)
    sigmas = shift * u / (1 + (shift - 1) * u)
    experts = {True: (high, list(high.blocks(DIT.layers))), False: (low, list(low.blocks(DIT.layers)))}
    features = text.features(words, text.rows(scenes))
    empty = text.features(words, text.rows([None] * len(scenes)))
    x = torch.randn(len(scenes), 16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        params, blocks = experts[bool(sigma >= 0.875)]
        t = torch.full((len(scenes),), 1000 * float(sigma))
        v = velocity(params, blocks, x, t, text.context(params, *features))
        if guidance != 1:
            u_ = velocity(params, blocks, x, t, text.context(params, *empty))
            v = u_ + guidance * (v - u_)
        x = x + (following - sigma) * v
    return x


@torch.no_grad()
def evaluate(
    high: Weights,
    low: Weights,
    words: Weights,
    text: Text,
    decode: Callable[[Tensor], Tensor],
    **options: float,
) -> dict[str, float]:
    """Share of held-out prompts whose video shows the right colour, direction and shape."""
    scenes = split()[1]
    video = decode(sample(Params(high), Params(low), words, text, scenes, **options))  # type: ignore[arg-type]
    frames = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
    results = [score(f, s) for f, s in zip(frames, scenes, strict=True)]
    return {k: float(np.mean([getattr(r, k) for r in results])) for k in ("colour", "direction", "shape")}
