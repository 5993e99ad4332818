"""The linear map from nano's latents to colours, by least squares: what previews of nano are made with.

    python bench/nano/preview.py        prints a table for lowvram/presets/previews.toml

Latents and frames of a few videos of nano; a latent cell is compared with the mean of the pixels that it stands for.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from lowvram import Runtime

COLOURS, SHAPES = ("red", "green", "blue", "yellow", "magenta", "orange"), ("circle", "square", "triangle")
WAYS, GROUNDS = ("left", "right", "up", "down"), ("black", "teal", "grey", "navy")


def main() -> None:
    pipe = Runtime(device="cpu").load("nano")
    cells, pixels = [], []
    for n, (colour, ground) in enumerate(itertools.product(COLOURS, GROUNDS)):
        prompt = f"a {colour} {SHAPES[n % 3]} moves {WAYS[n % 4]} on a {ground} background"
        video = pipe(prompt, seed=n, preset="lightning-4")
        frames = np.stack(list(video.frames())).astype(np.float32) / 127.5 - 1  # [T, H, W, 3]
        for f in range(video.latent.shape[1]):
            shown = frames[:1] if f == 0 else frames[4 * f - 3 : 4 * f + 1]
            height, width = video.latent.shape[2:]
            mean = shown.reshape(len(shown), height, 8, width, 8, 3).mean((0, 2, 4))
            cells.append(video.latent[:, f].flatten(1).T.numpy())
            pixels.append(mean.reshape(-1, 3))
    x, y = np.concatenate(cells), np.concatenate(pixels)
    x = np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)
    found = np.linalg.lstsq(x, y, rcond=None)[0]
    error = float(torch.tensor(x @ found - y).square().mean().sqrt())
    print(f"# {len(x)} cells, error {error:.3f} of a range of 2")
    print("factors = [")
    for row in found[:-1]:
        print("    [" + ", ".join(f"{v:.4f}" for v in row) + "],")
    print("]\nbias = [" + ", ".join(f"{v:.4f}" for v in found[-1]) + "]")


if __name__ == "__main__":
    main()
