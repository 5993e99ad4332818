"""CPU seconds of our decode, whole and in bands, and of diffusers' untiled one: the same random weights and latents, in
turn, in one run.

    python bench/vae_speed.py [ROWS COLUMNS LATENTS] > bench/vae_speed.md

One thread, processor time, the least of three. The ratio is what carries over to another processor; a GPU is another
matter.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan

from lowvram.models import vae, vae_clip
from lowvram.models.vae_history import Kept
from lowvram.models.vae_tiles import Tiling
from lowvram.quant.names import vae_renames
from lowvram.quant.spec import VaeSpec


def processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(rows: int = 8, columns: int = 48, latents: int = 2) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec, reference = VaeSpec(), AutoencoderKLWan().eval()
    rename = vae_renames(spec.version, spec.res_blocks).to_native
    shapes = spec.shapes()
    weights = {rename(k): v.detach() for k, v in reference.state_dict().items()}
    weights = {name: v.reshape(shapes[name]) for name, v in weights.items()}
    z = torch.randn(1, spec.z, latents, rows, columns)
    bands, cpu = Tiling(1, 3, banded=True), torch.device("cpu")
    ours, banded, theirs = [], [], []
    with torch.inference_mode():
        mean, std = vae.statistics(spec, z)
        for _ in range(3):
            ours.append(processor_seconds(lambda: list(vae.decode(spec, weights, z))))
            banded.append(
                processor_seconds(
                    lambda: list(vae_clip.decode(spec, weights, z, bands, Kept(), cpu, z.dtype))
                )
            )
            theirs.append(processor_seconds(lambda: reference.decode(z * std + mean)))
    best = {"whole": min(ours), "3 bands": min(banded), "diffusers": min(theirs)}
    print(
        "# How fast the autoencoder decodes on a CPU\n\n"
        f"The 2.1 decoder in float32 on {latents} latents of {rows}x{columns}, the same random weights and latents, in turn in one\n"
        "run, one thread (`python bench/vae_speed.py`). Processor time as a share of diffusers' untiled decode.\n\n"
        "| decode | share |\n|---|---|"
    )
    for name, seconds in best.items():
        print(f"| {name} | {seconds / best['diffusers']:.2f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
