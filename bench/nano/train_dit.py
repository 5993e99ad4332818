"""Train nano's transformer and text encoder together on patch latents.

    python bench/nano/train_dit.py RUN --steps 8000                      both experts' common ancestor
    python bench/nano/train_dit.py RUN --expert high --steps 1500        fine-tune a copy above the boundary

RUN is a folder; it gets the tokenizer, the latent basis, checkpoints (`dit.pt`, `dit-high.pt`, `dit-low.pt`)
and a log. A checkpoint is written every 500 steps; training goes on from it.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from data import Scene, clips, split
from networks import DIT, NULL, TEXT, Text, Weights, average, initial, train_tokenizer, velocity
from patches import Patches, fit
from sample import evaluate
from torch import Tensor

from lowvram.quant.linear import Params

SHIFT = 3.0
BOUNDARY = 0.875


def sigmas(batch: int, expert: str, generator: torch.Generator) -> Tensor:
    """Noise levels: logit-normal, shifted by 3; an expert sees its side of the boundary only."""
    u = torch.sigmoid(torch.randn(8 * batch, generator=generator))
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    if expert == "high":
        sigma = BOUNDARY + (1 - BOUNDARY) * torch.rand(batch, generator=generator)
    elif expert == "low":
        sigma = sigma[sigma < BOUNDARY]
    return sigma[:batch]


def dataset(basis: Patches, count: int, seed: int) -> tuple[Tensor, list[Scene]]:
    source = clips(split()[0], seed)
    latents, scenes = [], []
    for _ in range(count // 500):
        items = [next(source) for _ in range(500)]
        latents.append(basis.encode(torch.from_numpy(np.stack([c for _, c in items]))))
        scenes += [s for s, _ in items]
    return torch.cat(latents), scenes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--expert", choices=["", "high", "low"], default="")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--clips", type=int, default=24000)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed({"": 0, "high": 1, "low": 2}[args.expert])

    if not (args.run / "spiece.model").exists():
        train_tokenizer(args.run)
    text = Text(args.run / "spiece.model")
    if not (args.run / "basis.pt").exists():
        torch.save(fit(), args.run / "basis.pt")
    basis: Patches = torch.load(args.run / "basis.pt", weights_only=False)
    latents, scenes = dataset(basis, args.clips, seed=11)
    rows = text.rows(list(scenes))

    target = args.run / (f"dit-{args.expert}.pt" if args.expert else "dit.pt")
    if target.exists():
        state = torch.load(target, weights_only=True)
    elif args.expert:
        base = torch.load(args.run / "dit.pt", weights_only=True)
        state = {"step": 0, "dit": base["dit_mean"], "text": base["text_mean"]}
    else:
        state = {"step": 0, "dit": initial(DIT, generator), "text": initial(TEXT, generator)}
    dit: Weights = {k: v.detach().clone().requires_grad_() for k, v in state["dit"].items()}
    # the experts share one text encoder, so it is trained only with their common ancestor
    words: Weights = {k: v.detach().clone().requires_grad_(not args.expert) for k, v in state["text"].items()}
    dit_mean = {k: v.detach().clone() for k, v in state.get("dit_mean", dit).items()}
    words_mean = {k: v.detach().clone() for k, v in state.get("text_mean", words).items()}
    trained = [*dit.values(), *(w for w in words.values() if w.requires_grad)]
    optimiser = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.01, betas=(0.9, 0.98))
    if "optimiser" in state:
        optimiser.load_state_dict(state["optimiser"])

    params, blocks = Params(dit), list(Params(dit).blocks(DIT.layers))
    log = (args.run / f"dit{args.expert}.log").open("a")
    started, running = time.time(), 0.0
    for step in range(state["step"], args.steps):
        warm = min(1.0, (step + 1) / 300) if not args.expert else min(1.0, (step + 1) / 50)
        for group in optimiser.param_groups:
            group["lr"] = args.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        pick = torch.randint(len(latents), (args.batch,), generator=generator)
        x0 = latents[pick]
        chosen = rows[pick].clone()
        chosen[torch.rand(args.batch, generator=generator) < NULL] = len(text.scenes)
        sigma = sigmas(args.batch, args.expert, generator)
        noise = torch.randn(x0.shape, generator=generator)
        s = sigma[:, None, None, None, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context = text.context(params, *text.features(words, chosen))
            v = velocity(params, blocks, (1 - s) * x0 + s * noise, 1000 * sigma, context)
        loss = (v - (noise - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        decay = min(0.999, (step + 1) / (step + 10))
        average(dit_mean, dit, decay)
        average(words_mean, words, decay)
        running += loss.item()
        if (step + 1) % 50 == 0:
            print(
                f"{step + 1} loss {running / 50:.4f} {(time.time() - started) / 60:.1f} min",
                file=log,
                flush=True,
            )
            running = 0.0
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            torch.save(
                {
                    "step": step + 1,
                    "dit": dit,
                    "text": words,
                    "dit_mean": dit_mean,
                    "text_mean": words_mean,
                    "optimiser": optimiser.state_dict(),
                },
                target,
            )
        if (step + 1) % 2000 == 0 and not args.expert:
            print(
                step + 1, evaluate(dit_mean, dit_mean, words_mean, text, basis.decode), file=log, flush=True
            )


if __name__ == "__main__":
    main()
