"""What decoding and encoding 121 frames takes, whole and in tiles: planned on meta tensors, no weights and no GPU.

    python bench/vae_peaks.py > bench/vae_peaks.md

Peaks are of the whole stage: CUDA context (0.5 GB), bf16 weights of the half, histories, everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lowvram.codings import decodings, encodings
from lowvram.imagined import imagined_model
from lowvram.offload.budget import format_bytes, segment_size
from lowvram.sampling.presets import model_preset
from lowvram.tiling import Codings
from lowvram.tiling_search import Cost, forecast

GB = 10**9
CONTEXT = GB // 2
RAM = 24 * GB
FRAMES = 121
MODELS = {"2.1": "wan2.2-t2v-a14b", "2.2": "wan2.2-ti2v-5b"}
DECODE = (
    ("2.1", 1280, 720, (48, 4, 3, 1)),
    ("2.1", 1920, 1088, (48, 3, 1)),
    ("2.1", 3840, 2160, (48, 3, 1)),
    ("2.2", 1280, 704, (48, 3.5, 2)),
    ("2.2", 1920, 1088, (48, 3.5, 2)),
)
ENCODE = (
    ("2.1", 1280, 720, (48, 3, 1)),
    ("2.1", 1920, 1088, (3, 1)),
    ("2.1", 3840, 2160, (3, 1)),
    ("2.2", 1280, 704, (48, 3, 1)),
)
HEAD = """| VAE | size | budget GB | tiles | peak VRAM | histories | scratch | RAM | more work | moved |
|---|---|---|---|---|---|---|---|---|---|"""


def seconds(cost: Cost) -> Any:
    """On a card that takes 8 s for whole frames."""
    return forecast(cost, 8, 20 * GB)


def rows(version: str, width: int, height: int, budgets: tuple[float, ...], ways: Codings) -> Iterator[str]:
    fixed = CONTEXT + sum(ref.nbytes for ref in ways.weights.refs)
    seen = set()
    for budget in budgets:
        found = ways.choose(int(budget * GB) - fixed, RAM, seconds)
        tiling = found.tiling
        if tiling in seen:
            continue
        seen.add(tiling)
        sizes = (fixed + found.vram, found.slab, found.scratch, found.ram)
        shown = " | ".join(format_bytes(n) for n in sizes)
        limit = f"{budget:g}" if fixed + found.vram <= budget * GB else "least"
        cut = f"{tiling.rows}x{tiling.columns}{' bands' if tiling.banded else ''}"
        late = ", frames last" if not tiling.kept and not found.shelf else ""
        yield (
            f"| {version} | {width}x{height} | {limit} | {cut}{late} "
            f"| {shown} | {found.work - 1:.0%} | {format_bytes(found.moved + found.passed)} |"
        )


def main() -> None:
    print(
        "# What the autoencoders take\n\n"
        f"{FRAMES} frames, planned by `python bench/vae_peaks.py`: predictions on meta tensors, not measured on a GPU.\n"
        "The peak is of the whole stage, CUDA context (0.5 GB) and weights included, and does not depend on the number\n"
        "of frames; RAM is beside the program's own. Every row gives the same pixels. `least` is the least there is.\n"
        "More work is what tiles compute twice; bands compute nothing twice along the longer side. Moved is what goes to\n"
        "RAM and back over the clip.\n"
    )
    print(f"## Decode, bf16\n\n{HEAD}")
    for version, width, height, budgets in DECODE:
        model = imagined_model(MODELS[version], model_preset(MODELS[version]), "bf16")
        ways = decodings(model, (FRAMES, height, width), torch.bfloat16, segment_size)
        print(*rows(version, width, height, budgets, ways), sep="\n", flush=True)
    print(f"\n## Encode, float32\n\n{HEAD}")
    for version, width, height, budgets in ENCODE:
        model = imagined_model(MODELS[version], model_preset(MODELS[version]), "bf16")
        found = encodings(model, (FRAMES, height, width), torch.float32, segment_size)
        print(*rows(version, width, height, budgets, found), sep="\n", flush=True)


if __name__ == "__main__":
    main()
