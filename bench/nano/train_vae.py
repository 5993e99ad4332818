"""Train nano's VAE halves against the patch latents: the decoder to invert them, the encoder to reproduce them.

    python bench/nano/train_vae.py RUN --part decoder --steps 4500
    python bench/nano/train_vae.py RUN --part encoder --steps 2000

RUN must hold `basis.pt` (from train_dit.py). Checkpoints go to `decoder.pt` / `encoder.pt` every 250 steps;
training goes on from them. Latents here are the patch latents themselves; `export.py` folds the statistics of
the Wan 2.1 VAE into the first and last 1x1x1 convolutions, so that nano needs no statistics of its own.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from data import clips, score, split
from patches import Patches
from torch import Tensor

from lowvram.models import vae
from lowvram.quant.spec import VaeSpec

SPEC = VaeSpec(base=16, decoder_base=16, res_blocks=1)
JITTER = 0.08
"""Noise on the latents the decoder sees: what the transformer draws is never quite exact."""

Weights = dict[str, Tensor]


def initial(part: str, generator: torch.Generator) -> Weights:
    """He-uniform convolutions; the last of each residual pair starts small, so that depth costs nothing at first."""
    weights: Weights = {}
    for name, shape in SPEC.shapes().items():
        mine = name.startswith((part, "conv2" if part == "decoder" else "conv1"))
        if not mine:
            continue
        if name.endswith("gamma"):
            w = torch.ones(shape)
        elif name.endswith("bias"):
            w = torch.zeros(shape)
        else:
            bound = math.sqrt(3 / math.prod(shape[1:]))
            w = (2 * torch.rand(shape, generator=generator) - 1) * bound
            if name.endswith(("residual.6.weight", "proj.weight")):
                w = w * 0.1
            if len(shape) == 5:
                w = w.contiguous(memory_format=torch.channels_last_3d)
        weights[name] = w.requires_grad_()
    return weights


def batches(basis: Patches, batch: int, seed: int):  # noqa: ANN201
    source = clips(split()[0], seed)
    while True:
        video = torch.from_numpy(np.stack([next(source)[1] for _ in range(batch)]))
        yield video.transpose(1, 2).contiguous(), basis.encode(video)


def decode(w: Weights, z: Tensor) -> Tensor:
    return vae.run(vae.decoder_middle(SPEC) + vae.decoder_upsampling(SPEC), z, w, vae.History())


def encode(w: Weights, video: Tensor) -> Tensor:
    return vae.run(vae.encoder(SPEC), video, w, vae.History())[:, : SPEC.z]


@torch.no_grad()
def evaluate(basis: Patches, w: Weights, part: str) -> str:
    source = clips(split()[1], 99)
    items = [next(source) for _ in range(32)]
    video = torch.from_numpy(np.stack([c for _, c in items]))
    z = basis.encode(video)
    if part == "encoder":
        error = (encode(w, video.transpose(1, 2)) - z).square().mean() / z.square().mean()
        return f"relative error {error.sqrt():.4f}"
    out = decode(w, z).clamp(-1, 1).transpose(1, 2)
    psnr = 10 * math.log10(4 / (out - video).square().mean().item())
    frames = ((out + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
    results = [score(f, s) for f, (s, _) in zip(frames, items, strict=True)]
    right = [float(np.mean([getattr(r, k) for r in results])) for k in ("colour", "direction", "shape")]
    return f"psnr {psnr:.2f} dB, colour/direction/shape {right}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--part", choices=["decoder", "encoder"], required=True)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    basis: Patches = torch.load(args.run / "basis.pt", weights_only=False)
    target = args.run / f"{args.part}.pt"
    state = torch.load(target, weights_only=True) if target.exists() else {"step": 0}
    w = initial(args.part, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, value in state.get("weights", {}).items():
            w[name].copy_(value)
    mean = {k: v.detach().clone() for k, v in state.get("mean", w).items()}
    optimiser = torch.optim.AdamW(list(w.values()), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0)
    if "optimiser" in state:
        optimiser.load_state_dict(state["optimiser"])
    source = batches(basis, args.batch, seed=100 + state["step"])
    generator = torch.Generator().manual_seed(state["step"])
    log = (args.run / f"{args.part}.log").open("a")
    started, running = time.time(), 0.0
    for step in range(state["step"], args.steps):
        rate = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimiser.param_groups:
            group["lr"] = args.rate * rate
        video, z = next(source)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if args.part == "decoder":
                out = decode(w, z + JITTER * torch.randn(z.shape, generator=generator))
                error = out.float() - video
                loss = error.abs().mean() + error.square().mean()
            else:
                loss = (encode(w, video).float() - z).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(w.values()), 1.0)
        optimiser.step()
        with torch.no_grad():
            decay = min(0.998, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(mean.values()), [v.detach() for v in w.values()], 1 - decay)
        running += loss.item()
        if (step + 1) % 50 == 0:
            print(
                f"{step + 1} loss {running / 50:.4f} {(time.time() - started) / 60:.1f} min",
                file=log,
                flush=True,
            )
            running = 0.0
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            torch.save(
                {"step": step + 1, "weights": w, "mean": mean, "optimiser": optimiser.state_dict()}, target
            )
        if (step + 1) % 500 == 0:
            print(step + 1, evaluate(basis, mean, args.part), file=log, flush=True)


if __name__ == "__main__":
    main()
