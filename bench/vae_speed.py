"""CPU seconds of our decode and of diffusers' untiled one: the same random weights and latents, in turn, in one run.

    python bench/vae_speed.py [ROWS COLUMNS LATENTS]

One thread, processor time, the least of three. The ratio is what carries over to another processor; a GPU is another
matter.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan

from lowvram.models import vae
from lowvram.quant.names import vae_renames
from lowvram.quant.spec import VaeSpec


def processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(rows: int = 16, columns: int = 16, latents: int = 2) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec, reference = VaeSpec(), AutoencoderKLWan().eval()
    rename = vae_renames(spec.version, spec.res_blocks).to_native
    shapes = spec.shapes()
    weights = {rename(k): v.detach() for k, v in reference.state_dict().items()}
    weights = {name: v.reshape(shapes[name]) for name, v in weights.items()}
    z = torch.randn(1, spec.z, latents, rows, columns)
    ours, theirs = [], []
    with torch.inference_mode():
        mean, std = vae.statistics(spec, z)
        for _ in range(3):
            ours.append(processor_seconds(lambda: list(vae.decode(spec, weights, z))))
            theirs.append(processor_seconds(lambda: reference.decode(z * std + mean)))
    print(f"{latents} latents of {rows}x{columns}: ours {min(ours):.2f} s, diffusers {min(theirs):.2f} s")
    print(f"ratio {min(ours) / min(theirs):.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
