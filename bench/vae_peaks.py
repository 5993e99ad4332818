"""What decoding and encoding 121 frames takes, whole and in tiles: planned as jobs are, on meta tensors, no weights and no GPU.

python bench/vae_peaks.py > bench/vae_peaks.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from lowvram.codings import decodings, encodings
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.machine import machine_profile
from lowvram.model import Model
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.budget import Budget, format_bytes
from lowvram.planning.decode import plan_decode
from lowvram.planning.encode import planned
from lowvram.planning.facts import PROGRAM_RAM, Facts, gather
from lowvram.sampling.presets import model_preset
from lowvram.tiling import Codings

GB = 10**9
RAM = 24 * GB
FRAMES = 121
CARD = machine_profile("rtx4090")
MODELS = {"2.1": "wan2.2-t2v-a14b", "2.2": "wan2.2-ti2v-5b"}
DECODE = (
    ("2.1", 1280, 720, (48, 4, 3, 1)),
    ("2.1", 1920, 1088, (48, 3, 1)),
    ("2.1", 3840, 2160, (48, 3, 1)),
    ("2.2", 1280, 704, (48, 3.5, 2.1)),
    ("2.2", 1920, 1088, (48, 3.5, 2.1)),
)
ENCODE = (
    ("2.1", 1280, 720, (48, 3, 1)),
    ("2.1", 1920, 1088, (3, 1)),
    ("2.1", 3840, 2160, (3, 1)),
    ("2.2", 1280, 704, (48, 3, 1)),
)
HEAD = """| VAE | size | budget GB | tiles | peak VRAM | histories | scratch | RAM | more work | moved |
|---|---|---|---|---|---|---|---|---|---|"""


def rows(half: str, version: str, width: int, height: int, budgets: tuple[float, ...]) -> Iterator[str]:
    """As the stage of a job would be planned, on a card whose memory is the budget."""
    spec = model_preset(MODELS[version])
    model: Model = imagined_model(MODELS[version], spec, "bf16")
    job = make_job(spec, model=model.name, files={}, width=width, height=height, frames=FRAMES, steps=4)
    facts = gather(job, model, CARD)
    shape = FRAMES, height, width
    ways: Codings = (
        decodings(model, shape, facts.dtype, facts.footprint)
        if half == "decode"
        else encodings(model, shape, torch.float32, facts.footprint)
    )
    seen = set[Tiling]()
    for budget in budgets:
        claims, ram, tiling = (_decode if half == "decode" else _encode)(facts, int(budget * GB))
        if tiling in seen:
            continue
        seen.add(tiling)
        found, vram = ways.exactly(tiling), sum(claims.values())
        sizes = vram, claims["vae histories"], claims["vae scratch"], ram
        shown = " | ".join(format_bytes(n) for n in sizes)
        limit = f"{budget:g}" if vram <= budget * GB else "least"
        cut = f"{tiling.rows}x{tiling.columns}{' bands' if tiling.banded else ''}"
        late = ", frames last" if not tiling.kept and not found.shelf else ""
        yield (
            f"| {version} | {width}x{height} | {limit} | {cut}{late} "
            f"| {shown} | {found.work - 1:.0%} | {format_bytes(found.moved + found.passed)} |"
        )


Planned = tuple[Mapping[str, int], int, Tiling]
"""Claims of the card, bytes of RAM beside the program's own, and how the plane is cut."""


def _decode(facts: Facts, vram: int) -> Planned:
    (stage,) = plan_decode(facts, Budget(vram, RAM))
    assert stage.tiling is not None
    return stage.claims, stage.ram - PROGRAM_RAM, stage.tiling


def _encode(facts: Facts, vram: int) -> Planned:
    own = facts.context
    plan = planned(facts, FRAMES, vram - sum(own.values()), RAM - PROGRAM_RAM)
    return own | dict(plan.claims), sum(plan.ram_claims.values()), plan.tiling


def main() -> None:
    print(
        "# What the autoencoders take\n\n"
        f"{FRAMES} frames on a {CARD.label} within a budget, planned by `python bench/vae_peaks.py` as for a job: predictions\n"
        "on meta tensors, not measured on a GPU. The peak is of the whole stage and does not depend on the number of frames. It\n"
        "counts what a card gives up: CUDA context (0.5 GB), library workspaces, 134 MB that torch's allocator may leave in\n"
        "pieces, weights in bf16, histories, scratch. RAM is beside the program's own. Every row gives the same pixels.\n"
        "`least` is the least there is. More work is what tiles compute twice; bands compute nothing twice along the longer\n"
        "side. Moved is what goes to RAM and back over the clip.\n"
    )
    for half, title, cases in (("decode", "Decode, bf16", DECODE), ("encode", "Encode, float32", ENCODE)):
        print(f"{'' if half == 'decode' else chr(10)}## {title}\n\n{HEAD}")
        for version, width, height, budgets in cases:
            print(*rows(half, version, width, height, budgets), sep="\n", flush=True)


if __name__ == "__main__":
    main()
