"""Every attention mode end to end on the embedded model: how far its videos are from sdpa's, and whether they are right.

The arithmetic of our own modes in torch, on a CPU; held-out prompts of bench/nano, 4 steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lowvram import Runtime
from lowvram.triton_kernels.modes import MODES

sys.path.insert(0, str(Path(__file__).parent / "nano"))
from data import score, split  # noqa: E402

PROMPTS = 8


def scores() -> Iterator[dict[str, object]]:
    """One object a mode: psnr in dB against sdpa over all frames, and the shares of right videos."""
    pipe = Runtime(device="cpu").load("nano")
    scenes = split()[1][::6][:PROMPTS]
    plain: list[np.ndarray] = []
    for name in [m.name for m in MODES.values() if m.ours]:
        videos = []
        for i, scene in enumerate(scenes):
            video = pipe(scene.caption(), seed=i, preset="lightning-4", attention=name, attention_ends=name)
            videos.append(np.stack(list(video.frames())))
        plain = plain or videos
        results = [score(video, scene) for video, scene in zip(videos, scenes, strict=True)]
        error = np.mean([np.mean((a.astype(float) - b) ** 2) for a, b in zip(videos, plain, strict=True)])
        yield {
            "op": "nano",
            "mode": name,
            "prompts": len(scenes),
            "psnr": None if error == 0 else round(float(10 * np.log10(255**2 / error)), 2),
            **{k: float(np.mean([getattr(r, k) for r in results])) for k in ("colour", "direction", "shape")},
            "ok": True,
        }
