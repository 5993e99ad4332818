"""Write nano's checkpoints in the form in which Wan models are published.

    python bench/nano/export.py RUN lowvram/assets/nano
    python bench/nano/export.py RUN lowvram/assets/nano-animate --animate

RUN holds what the training scripts left. Where an expert was not fine-tuned yet, the common ancestor stands for
it. The VAE's latent statistics are folded into its 1x1x1 convolutions, so that nano uses those of Wan 2.1.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from distill import ALPHA, TARGETS
from driven import draw, write_folder
from networks import DIT, TEXT
from safetensors.torch import save_file
from torch import Tensor
from train_animate import averaged
from train_vae import SPEC, initial

from lowvram.quant.encodings.registry import planned_encoding
from lowvram.quant.names import CLIP
from lowvram.quant.spec import LATENT_MEAN_21, LATENT_STD_21

Weights = dict[str, Tensor]


def fold_statistics(w: Weights) -> Weights:
    """conv1 and conv2 such that (mu - mean) / std and z * std + mean give what was trained without them."""
    mean, std = torch.tensor(LATENT_MEAN_21), torch.tensor(LATENT_STD_21)
    out = dict(w)
    moments, bias = w["conv1.weight"].clone(), w["conv1.bias"].clone()
    moments[: SPEC.z] *= std.view(-1, 1, 1, 1, 1)
    bias[: SPEC.z] = bias[: SPEC.z] * std + mean
    out["conv1.weight"], out["conv1.bias"] = moments, bias
    weight = w["conv2.weight"] / std.view(1, -1, 1, 1, 1)
    out["conv2.weight"] = weight
    out["conv2.bias"] = w["conv2.bias"] - weight.flatten(1) @ mean
    return out


def save(
    weights: Weights, shapes: dict[str, tuple[int, ...]], path: Path, keep_float: tuple[str, ...] = ()
) -> None:
    assert {k: tuple(v.shape) for k, v in weights.items()} == shapes, "not the published key set"
    tensors = {
        k: v.detach()
        .to(torch.float32 if k.startswith(keep_float or ("\0",)) else torch.bfloat16)
        .contiguous()
        for k, v in weights.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def save_lora(factors: Weights, path: Path) -> None:
    """As Wan2.2-Lightning's files: lora_down, lora_up and alpha under the native names."""
    path.parent.mkdir(exist_ok=True)
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in factors.items()}
    for target in TARGETS:
        tensors[f"{target}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path, metadata={"format": "pt"})


def save_fp8(weights: Weights, path: Path) -> None:
    """As ComfyUI's `fp8_scaled` files: e4m3 matrices with one scale each, the rest in bf16."""
    tensors: dict[str, Tensor] = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, weight in weights.items():
        encoding = planned_encoding(name, tuple(weight.shape), "fp8")
        parts = encoding.encode(weight.detach().float())
        tensors[name] = parts["weight"].contiguous()
        if "scale" in parts:
            tensors[f"{name.removesuffix('.weight')}.scale_weight"] = parts["scale"]
    save_file(tensors, path, metadata={"format": "pt"})


def save_animate(run: Path, out: Path) -> None:
    """The transformer as Wan-Animate's authors name it, in fp8; CLIP as transformers names it, in bf16."""
    state = torch.load(run / "animate.pt", weights_only=True)
    weights, tower = averaged(state["mean"], state["dit"])
    save_fp8(weights, out / "diffusion_pytorch_model.safetensors")
    named = {
        f"vision_model.{CLIP.from_native(k)}": w.to(torch.bfloat16).contiguous() for k, w in tower.items()
    }
    save_file(named, out / "clip_vision.safetensors", metadata={"format": "pt"})
    sample = draw(np.random.default_rng(24), ("yellow", "triangle", "teal"), 25, replace=True)
    write_folder(sample, out / "sample")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fp8", action="store_true", help="transformers at half the size")
    parser.add_argument("--animate", action="store_true", help="what train_animate.py left, in fp8")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.animate:
        save_animate(args.run, args.out)
        return
    base = torch.load(args.run / "dit.pt", weights_only=True)
    for expert in ("high", "low"):
        path = args.run / f"dit-{expert}.pt"
        weights = torch.load(path, weights_only=True)["dit_mean"] if path.exists() else base["dit_mean"]
        target = args.out / f"{expert}_noise_model.safetensors"
        if args.fp8:
            save_fp8(weights, target)
        else:
            save(weights, DIT.shapes(), target)
    save(base["text_mean"], TEXT.shapes(), args.out / "text_encoder.safetensors")
    vae: Weights = {}
    for part in ("encoder", "decoder"):
        path = args.run / f"{part}.pt"
        vae |= (
            torch.load(path, weights_only=True)["mean"]
            if path.exists()
            else initial(part, torch.Generator().manual_seed(3))
        )
    with torch.no_grad():
        save(fold_statistics(vae), SPEC.shapes(), args.out / "vae.safetensors", keep_float=("conv1", "conv2"))
    for expert in ("high", "low"):
        path = args.run / f"lora-{expert}.pt"
        if path.exists():
            save_lora(
                torch.load(path, weights_only=True)["mean"],
                args.out / "loras" / f"lightning-4-{expert}.safetensors",
            )
    shutil.copy(args.run / "spiece.model", args.out / "spiece.model")
    for path in sorted(args.out.rglob("*")):
        if path.is_file():
            print(f"{path.name} {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
