"""The linear maps from nano's latents to colours, by least squares: what previews of nano are made with.

    python bench/nano/preview.py        prints a table for lowvram/presets/previews.toml

Least squares of the mean colour of a latent cell (4 frames, 8x8 pixels; the first frame alone) on the 16 channels of
the encoder's latent and a constant, over clips of the training scenes; R2 on the held-out ones is printed beside it.
The first frame has a map of its own: nano's latents are principal components, and of a frame alone they are others.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from data import clips, split
from safetensors.torch import load_file
from torch import Tensor

from lowvram.models import vae
from lowvram.quant.spec import VaeSpec
from lowvram.sampling.presets import model_preset

CLIPS = 96
ASSETS = Path(__file__).parents[2] / "lowvram/assets/nano"


def samples(spec: VaeSpec, weights: dict[str, Tensor], held_out: bool, first: bool) -> tuple[Tensor, Tensor]:
    """(latents with a constant [n, 17], colours [n, 3]) of the cells of first or of later frames, float64."""
    inputs, colours = [], []
    for _, clip in islice(clips(split()[held_out], 11 + held_out), CLIPS):
        video = torch.from_numpy(np.ascontiguousarray(clip)).transpose(0, 1)[None]
        z = vae.encode(spec, weights, video)[0]
        whole = torch.cat([video[0, :, :1].expand(-1, 3, -1, -1), video[0]], dim=1)
        cells = torch.nn.functional.avg_pool3d(whole, (4, 8, 8))
        kept = slice(None, 1) if first else slice(1, None)
        inputs.append(z[:, kept].flatten(1).T)
        colours.append(cells[:, kept].flatten(1).T)
    x = torch.cat(inputs).double()
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1), torch.cat(colours).double()


@torch.inference_mode()
def main() -> None:
    spec = model_preset("nano").vae
    weights = {k: v.float() for k, v in load_file(ASSETS / "vae.safetensors").items()}
    for first in (False, True):
        x, y = samples(spec, weights, False, first)
        fit = torch.linalg.lstsq(x, y).solution
        x, y = samples(spec, weights, True, first)
        r2 = 1 - (x @ fit - y).square().sum(0) / (y - y.mean(0)).square().sum(0)
        print("# R2 of red, green, blue on held-out scenes:", [round(v, 3) for v in r2.tolist()])
        prefix = "first_" if first else ""
        print(f"{prefix}factors = [")
        for row in fit[:-1].tolist():
            print("  [" + ", ".join(f"{v:.4f}" for v in row) + "],")
        print(f"]\n{prefix}bias = [" + ", ".join(f"{v:.4f}" for v in fit[-1].tolist()) + "]")


if __name__ == "__main__":
    main()
