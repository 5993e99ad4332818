"""Distil nano's experts into a 4-step LoRA pair, Lightning style.

    python bench/nano/distill.py RUN --make 1024 --shard 0       the teacher's trajectories, with guidance
    python bench/nano/distill.py RUN --expert high --steps 2500
    python bench/nano/distill.py RUN --expert low --steps 2500

The teacher walks from each of the four noise levels to the next in small guided Euler steps. That walk is a
deterministic map, so the student learns, by plain regression, the one velocity that covers it in a single step
without guidance: the high-noise LoRA the first two, the low-noise LoRA the last two.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from data import split
from networks import DIT, Text, Weights, average, velocity
from torch import Tensor

from lowvram.quant.branches import Branch
from lowvram.quant.linear import Params

LEVELS = (1.0, 0.9375, 5 / 6, 0.625, 0.0)
"""Wan2.2-Lightning's noise levels for four steps."""
SUBSTEPS = (3, 4, 5, 8)
GUIDANCE = 3.0
BOUNDARY = 0.875
RANK = 32
ALPHA = 32.0
TARGETS = tuple(
    f"blocks.{n}.{name}"
    for n in range(DIT.layers)
    for name in (*(f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"), "ffn.0", "ffn.2")
)


def experts(run: Path) -> dict[str, Weights]:
    return {e: torch.load(run / f"dit-{e}.pt", weights_only=True)["dit_mean"] for e in ("high", "low")}


@torch.no_grad()
def make(run: Path, count: int, shard: int, batch: int = 32) -> None:
    """States at the five levels [count, 5, 16, 3, 8, 8] and rows of their captions."""
    text = Text(run / "spiece.model")
    words = torch.load(run / "dit.pt", weights_only=True)["text_mean"]
    teachers = {e: (Params(w), list(Params(w).blocks(DIT.layers))) for e, w in experts(run).items()}
    generator = torch.Generator().manual_seed(77 + shard)
    scenes, rng = split()[0], np.random.default_rng(77 + shard)
    states, rows = [], []
    started = time.time()
    for n in range(0, count, batch):
        row = text.rows([scenes[i] for i in rng.integers(len(scenes), size=batch)])
        features, empty = text.features(words, row), text.features(words, text.rows([None] * batch))
        x = torch.randn(batch, 16, 3, 8, 8, generator=generator)
        path = [x]
        for level, following, parts in zip(LEVELS, LEVELS[1:], SUBSTEPS, strict=False):
            grid = torch.linspace(level, following, parts + 1)
            for sigma, after in zip(grid, grid[1:], strict=False):
                params, blocks = teachers["high" if sigma >= BOUNDARY else "low"]
                t = torch.full((batch,), 1000 * float(sigma))
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    cond = velocity(params, blocks, x, t, text.context(params, *features))
                    uncond = velocity(params, blocks, x, t, text.context(params, *empty))
                x = x + (after - sigma) * (uncond + GUIDANCE * (cond - uncond)).float()
            path.append(x)
        states.append(torch.stack(path, 1))
        rows.append(row)
        torch.save({"states": torch.cat(states), "rows": torch.cat(rows)}, run / f"trajectories-{shard}.pt")
        print(f"{n + batch} trajectories, {(time.time() - started) / 60:.1f} min", flush=True)


def train(run: Path, expert: str, steps: int, batch: int, rate: float) -> None:
    text = Text(run / "spiece.model")
    words = torch.load(run / "dit.pt", weights_only=True)["text_mean"]
    base = experts(run)[expert]
    shards = [torch.load(path, weights_only=True) for path in sorted(run.glob("trajectories-*.pt"))]
    data = {key: torch.cat([shard[key] for shard in shards]) for key in ("states", "rows")}
    generator = torch.Generator().manual_seed(5)
    lora: Weights = {}
    for target in TARGETS:
        out, inner = base[f"{target}.weight"].shape
        lora[f"{target}.lora_down.weight"] = torch.randn(RANK, inner, generator=generator) / math.sqrt(inner)
        lora[f"{target}.lora_up.weight"] = torch.zeros(out, RANK)
    for w in lora.values():
        w.requires_grad_()
    branches = {
        t: (Branch(lora[f"{t}.lora_down.weight"], lora[f"{t}.lora_up.weight"], ALPHA / RANK),)
        for t in TARGETS
    }
    params = Params(base, branches)
    blocks = list(params.blocks(DIT.layers))
    mean = {k: v.detach().clone() for k, v in lora.items()}
    optimiser = torch.optim.AdamW(list(lora.values()), lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    segments = (0, 1) if expert == "high" else (2, 3)
    log = (run / f"lora-{expert}.log").open("a")
    started, running = time.time(), 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = (
                rate * min(1, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
            )
        pick = torch.randint(len(data["rows"]), (batch,), generator=generator)
        segment = torch.tensor(segments)[torch.randint(2, (batch,), generator=generator)]
        x, target_x = data["states"][pick, segment], data["states"][pick, segment + 1]
        level = torch.tensor(LEVELS)
        width = (level[segment + 1] - level[segment])[:, None, None, None, None]
        target: Tensor = (target_x - x) / width
        with torch.no_grad():
            features = text.features(words, data["rows"][pick])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v = velocity(params, blocks, x, 1000 * level[segment], text.context(params, *features))
        loss = (v - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(lora.values()), 1.0)
        optimiser.step()
        average(mean, lora, min(0.998, (step + 1) / (step + 10)))
        running += loss.item()
        if (step + 1) % 50 == 0:
            print(
                f"{step + 1} loss {running / 50:.4f} {(time.time() - started) / 60:.1f} min",
                file=log,
                flush=True,
            )
            running = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            torch.save({"step": step + 1, "mean": mean}, run / f"lora-{expert}.pt")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--make", type=int, default=0)
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--expert", choices=["high", "low"])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    if args.make:
        make(args.run, args.make, args.shard)
    if args.expert:
        train(args.run, args.expert, args.steps, args.batch, args.rate)


if __name__ == "__main__":
    main()
