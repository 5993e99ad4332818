"""Train nano-animate: nano's low-noise transformer, four of its blocks, learns to be driven.

    python bench/nano/train_animate.py RUN --steps 5000

RUN is a folder; it gets the clips (`clips.pt`), a checkpoint every 250 steps (`animate.pt`; training goes on from it)
and a log. VAE and text encoder are nano's. The transformer, its face branch and the CLIP tower are trained together;
the motion encoder is not: its convolutions are random, and its last layer is the linear map from what they say of a
face to how far the mouth is open.

Two things make the shape learnable in thousands of steps instead of tens of thousands. A linear reader, thrown away
afterwards, names the shape from the picture's own tokens after the second block, and its error is part of the loss.
Half of every batch is drawn new, with latents from the closed-form projection (`patches.py`); the other half is stored
clips that went through the real encoder, as what drives the product does.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from data import SHAPES
from driven import Driven, combinations, draw, face, follows, summary, to_bytes
from networks import Weights, average, initial
from patches import Patches, fit
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn import functional

from lowvram.conditions.animate import packed_mask
from lowvram.models import animate, clip, dit, umt5, vae
from lowvram.quant.linear import Params
from lowvram.quant.spec import LATENT_MEAN_21, LATENT_STD_21
from lowvram.sampling.presets import model_preset
from lowvram.triton_kernels.attention import attention

SPEC = model_preset("nano-animate")
NANO = Path(__file__).parents[2] / "lowvram/assets/nano"
KEPT_BLOCKS = (0, 1, 3, 5)
"""Of nano's blocks."""
GRID = (4, 4, 4)
"""Latent slots, the picture's first, and rows and columns of tokens."""
LEVELS = 65
"""Openings of the mouth whose motion vectors are tabled."""
JITTER = 0.05
"""Noise on what is given: carried frames come from the decoder, driving videos from a codec."""
SHIFT = 3.0
READ_AFTER = 1
"""Block after which the picture's tokens should say its shape."""
READING = 0.1
"""Weight of the reader's error."""


# ---- what nano already knows


def nano_file(name: str) -> Weights:
    tensors = load_file(NANO / f"{name}.safetensors")
    weights = {k: v.float() for k, v in tensors.items() if v.numel() and not k.endswith(".scale_weight")}
    scales = {k[: -len("scale_weight")]: v for k, v in tensors.items() if k.endswith(".scale_weight")}
    return {k: w * scales.get(k.removesuffix("weight"), 1) for k, w in weights.items()}


class Codec:
    """nano's VAE on batches."""

    def __init__(self) -> None:
        self.weights = {
            k: v.contiguous(memory_format=torch.channels_last_3d) if v.dim() == 5 else v
            for k, v in nano_file("vae").items()
        }
        self.mean = torch.tensor(LATENT_MEAN_21).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(LATENT_STD_21).view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> [B, 16, 1 + k, h, w]"""
        layers = vae.encoder(SPEC.vae)
        z = vae.run(layers, video.transpose(1, 2).contiguous(), self.weights, vae.History())
        return (z[:, : SPEC.vae.z].float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        layers = vae.decoder_middle(SPEC.vae) + vae.decoder_upsampling(SPEC.vae)
        x = vae.run(layers, z * self.std + self.mean, self.weights, vae.History())
        return x.float().clamp(-1, 1).transpose(1, 2)


@torch.no_grad()
def prompt_features() -> Tensor:
    """[n, text_dim] of the one prompt that the model is made for."""
    words = nano_file("text_encoder")
    processor = SentencePieceProcessor(model_file=str(NANO / "spiece.model"))
    ids = torch.tensor([*processor.encode(SPEC.prompt), 1])
    x = words["token_embedding.weight"][ids]
    return umt5.encode(x, Params(words).blocks(SPEC.text.layers), words["norm.weight"], SPEC.text)


# ---- the motion encoder


@torch.no_grad()
def motion_encoder(generator: torch.Generator) -> Weights:
    """Random convolutions; the last linear layer fitted so that the first direction is how far the mouth is open."""
    assert SPEC.dit.face is not None
    shapes = SPEC.dit.face.encoder_shapes(SPEC.dit.dim)
    w = {
        k: torch.zeros(s) if k.endswith("bias") else torch.randn(s, generator=generator)
        for k, s in shapes.items()
        if k.startswith("motion_encoder.")
    }
    style = SPEC.dit.face.style
    for n in range(
        4
    ):  # nothing lies between the linear layers, so all but the last may pass on what they get
        w[f"motion_encoder.enc.fc.{n}.weight"] = torch.eye(style) * style**0.5
    last = "motion_encoder.enc.fc.4"
    probe = dict(w) | {f"{last}.weight": torch.eye(style) * style**0.5, f"{last}.bias": torch.zeros(style)}
    rng = np.random.default_rng(5)
    mouths = rng.uniform(-0.1, 1.1, 300)
    seen = [
        animate.motion_vectors(
            Params(probe), torch.from_numpy(face(m, *rng.uniform(-6, 6, 2)))[None], torch.eye(style)
        )
        for m in mouths
    ]
    x = torch.cat(seen).double()
    mean, spread = x.mean(0), x.std(0) + 1e-6
    m = torch.tensor(mouths)
    wanted = torch.stack([2 * m - 1, torch.sin(torch.pi * m), torch.cos(torch.pi * m), (2 * m - 1) ** 3], 1)
    centred = torch.cat([(x - mean) / spread, torch.ones(len(x), 1)], 1).double()
    ridge = 1e-3 * torch.eye(style + 1).double() * len(x)
    solved = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ wanted.double())
    weight = (solved[:-1] / spread[:, None]).T
    print("motion encoder: error of the mouth", (centred @ solved - wanted)[:, 0].abs().mean().item() / 2)
    w[f"{last}.weight"] = (weight * style**0.5).float()
    w[f"{last}.bias"] = (solved[-1] - weight @ mean).float()
    return w


@torch.no_grad()
def motion_table(w: Weights) -> Tensor:
    """[LEVELS, motion]"""
    p = Params(w)
    basis = animate.directions(p)
    rows = [
        animate.motion_vectors(p, torch.from_numpy(face(n / (LEVELS - 1)))[None], basis)
        for n in range(LEVELS)
    ]
    return torch.cat(rows)


# ---- clips


def carried_frames(rng: np.random.Generator, first: bool) -> int:
    return 0 if first else int(rng.choice([1, 5], p=[0.75, 0.25]))


@torch.no_grad()
def dataset(
    basis: Patches, encode: Callable[[Tensor], Tensor], count: int, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Latents, given channels, poses, pictures, mouths and shapes of `count` clips; `encode` makes what is given."""
    made = []
    chosen = combinations()[0]
    for _ in range(count):
        replaced = rng.random() < 0.25
        scene = draw(rng, chosen[rng.integers(len(chosen))], replace=replaced)
        made.append(sample(basis, encode, scene, carried_frames(rng, rng.random() < 0.55)))
    return {k: torch.stack([m[k] for m in made]) for k in made[0]}


def sample(
    basis: Patches, encode: Callable[[Tensor], Tensor], scene: Driven, carried: int
) -> dict[str, Tensor]:
    video = torch.from_numpy(scene.clip())
    picture = torch.from_numpy(scene.picture())
    given = torch.from_numpy(scene.emptied()) if scene.scene else torch.zeros_like(video)
    given[:carried] = video[:carried]
    hole = torch.from_numpy(scene.hole())[:, ::8, ::8]
    known = 1 - hole if scene.scene else torch.zeros_like(hole)
    known[:carried] = 1
    shown = encode(picture[None, None])[0]
    still = torch.cat([torch.ones(4, *shown.shape[1:]), shown])
    rest = encode(torch.stack([torch.from_numpy(scene.pose()), given]))
    return {
        "latent": torch.cat([shown, basis.encode(video[None])[0]], 1),
        "given": torch.cat([still, torch.cat([packed_mask(known), rest[1]])], 1),
        "pose": rest[0],
        "picture": clip.preprocess(SPEC.clip, picture),
        "mouth": torch.from_numpy(scene.mouth),
        "shape": torch.tensor(SHAPES.index(scene.shape)),
    }


# ---- batched forward: the product's own, where it takes batches


def look(p: Params, pictures: Tensor) -> Tensor:
    """`clip.encode` of pictures [B, 3, side, side] -> [B, 257, dim]"""
    spec = SPEC.clip
    assert spec is not None and spec.heads == 1
    patches = pictures.unfold(2, spec.patch, spec.patch).unfold(3, spec.patch, spec.patch)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
    x = functional.linear(patches, p["patch_embedding.weight"].flatten(1))
    x = torch.cat([p["class_embedding"].expand(len(x), 1, -1), x], 1) + p["position_embedding.weight"]

    def norm(p: Params, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], clip.EPS)

    x = norm(p, "pre_norm", x)
    for n in range(clip.layers_used(spec)):
        q = p.scope(f"blocks.{n}.")
        h = norm(q, "norm1", x)
        heard = functional.scaled_dot_product_attention(*(q.linear(f"attn.{leaf}", h) for leaf in "qkv"))
        x = x + q.linear("attn.o", heard)
        x = x + q.linear("mlp.2", functional.gelu(q.linear("mlp.0", norm(q, "norm2", x))))
    return x


def attend(p: Params, x: Tensor, kv: animate.FaceKV) -> Tensor:
    """`animate.attend_` on x [B, L, dim]; kv [B, slots, ...]."""
    h = animate._layer_norm(x).unflatten(1, (GRID[0], -1))
    q = animate._head_norm(animate._heads(p.linear("linear1_q", h)), p["q_norm.weight"])
    return x + p.linear("linear2", attention(q, kv.k, kv.v).flatten(1, 2))


def velocity(
    p: Params,
    text: Tensor,
    latent: Tensor,
    given: Tensor,
    pose: Tensor,
    image: Tensor,
    motion: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    """latent [B, 16, 4, 8, 8], motion [B, T, motion], image [B, 257, 80], t [B] -> velocity like latent, and
    the mean of the picture's tokens after block READ_AFTER, [B, dim]."""
    spec = SPEC.dit
    context = dit.embed_text(p, spec, text)
    context = replace(context, image=dit.embed_image(p, image))
    row = dit.embed_time(p, spec, t[:, None], math.prod(GRID))
    x = dit.embed_latent(p, spec, torch.cat([latent, given], 1), torch.float32)
    tokens = dit.embed_latent(p, spec, pose, torch.float32, "pose_patch_embedding")
    x = x + functional.pad(tokens, (0, 0, GRID[1] * GRID[2], 0))
    faces = torch.stack([animate.face_tokens(p, m) for m in motion])
    rope = dit.rope_table(*GRID)
    for n, block in enumerate(p.blocks(spec.layers)):
        x = dit.block(block, x, row, context, rope)
        if n == READ_AFTER:
            seen = x[:, : GRID[1] * GRID[2]].mean(1)
        if n in spec.face_blocks:
            adapter = p.scope(f"face_adapter.fuser_blocks.{spec.face_blocks.index(n)}.")
            x = attend(adapter, x, animate.keys_values(adapter, faces))
    return dit.head(p, spec, x, row, GRID), seen


def reading(reader: Tensor, seen: Tensor, shape: Tensor) -> Tensor:
    """Cross entropy of the shape that `reader` [3, dim] names from `seen` [B, dim]."""
    return functional.cross_entropy(functional.layer_norm(seen.float(), seen.shape[-1:]) @ reader.T, shape)


# ---- training


def begin(generator: torch.Generator) -> Weights:
    """nano's low-noise expert where it has what is needed; new parts are drawn, and silent where they add to it."""
    nano = nano_file("low_noise_model")
    weights = initial(SPEC.dit, generator)
    for name, w in weights.items():
        source = name
        if name.startswith("blocks."):
            _, n, leaf = name.split(".", 2)
            source = f"blocks.{KEPT_BLOCKS[int(n)]}.{leaf}"
        with torch.no_grad():
            if name == "patch_embedding.weight":
                w[:, :16] = nano[source]
                w[:, 16:] *= 0.3
            elif source in nano:
                w.copy_(nano[source])
            elif name.endswith("linear2.weight"):
                w.zero_()
            elif name.endswith("v_img.weight"):
                w.mul_(0.1)
    weights |= {k: w.requires_grad_(False) for k, w in motion_encoder(generator).items()}
    return weights


def begin_tower(generator: torch.Generator) -> Weights:
    """CLIP; norms as ones, matrices small."""
    assert SPEC.clip is not None
    weights = {}
    for name, shape in SPEC.clip.shapes().items():
        if name.endswith("bias"):
            w = torch.zeros(shape)
        elif "norm" in name:
            w = torch.ones(shape)
        else:
            w = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
        weights[name] = w.requires_grad_()
    return weights


@torch.no_grad()
def evaluate(
    weights: Weights,
    tower: Weights,
    text: Tensor,
    table: Tensor,
    data: dict[str, Tensor],
    scenes: list[Driven],
    codec: Codec,
    steps: int = SPEC.steps,
) -> dict[str, float]:
    """What held-out videos of one segment do: shares of right colours and shapes, path error and size correlation."""
    p = Params(weights)
    image = look(Params(tower), data["picture"])
    motion = table[(data["mouth"] * (LEVELS - 1)).round().long()]
    u = torch.linspace(1, 0, steps + 1)
    sigmas = SHIFT * u / (1 + (SHIFT - 1) * u)
    x = torch.randn(data["latent"].shape, generator=torch.Generator().manual_seed(0))
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        t = torch.full((len(x),), 1000 * float(sigma))
        v, _ = velocity(p, text, x, data["given"], data["pose"], image, motion, t)
        x = x + (following - sigma) * v
    video = codec.decode(x[:, :, 1:])
    return summary([follows(to_bytes(v.numpy()), s) for v, s in zip(video, scenes, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument("--clips", type=int, default=3000)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    log = (args.run / "animate.log").open("a")

    def say(*words: object) -> None:
        print(*words, file=log, flush=True)

    generator = torch.Generator().manual_seed(0)
    codec, text = Codec(), prompt_features()
    basis, stored = fit(), args.run / "clips.pt"
    if not stored.exists():
        torch.save(dataset(basis, codec.encode, args.clips, np.random.default_rng(11)), stored)
    data = torch.load(stored, weights_only=True)
    rng = np.random.default_rng(99)
    scenes = [draw(rng, c, replace=n % 4 == 3) for n, c in enumerate(combinations()[1] * 2)]
    held = [sample(basis, codec.encode, s, 0) for s in scenes]
    held_out = {k: torch.stack([h[k] for h in held]) for k in held[0]}

    target = args.run / "animate.pt"
    if target.exists():
        state = torch.load(target, weights_only=True)
    else:
        state = {"step": 0, "dit": begin(generator), "clip": begin_tower(generator)}
        state["reader"] = torch.zeros(len(SHAPES), SPEC.dit.dim)
    net: Weights = {
        k: v.detach().clone().requires_grad_(not k.startswith("motion_encoder."))
        for k, v in state["dit"].items()
    }
    tower: Weights = {k: v.detach().clone().requires_grad_() for k, v in state["clip"].items()}
    trained = {k: w for k, w in net.items() if w.requires_grad} | {f"clip.{k}": w for k, w in tower.items()}
    reader = state["reader"].detach().clone().requires_grad_()
    mean = {k: v.detach().clone() for k, v in state.get("mean", trained).items()}
    optimiser = torch.optim.AdamW(
        [*trained.values(), reader], lr=args.rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    if "optimiser" in state:
        optimiser.load_state_dict(state["optimiser"])
    table = motion_table(net)
    say("motion", [round(float(x), 3) for x in table.std(0)], "held out", len(scenes))

    params, started, running = Params(net), time.time(), np.zeros(2)
    for step in range(state["step"], args.steps):
        warm = min(1.0, (step + 1) / 200)
        for group in optimiser.param_groups:
            group["lr"] = args.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        pick = torch.randint(len(data["latent"]), (args.batch // 2,), generator=generator)
        new = dataset(basis, basis.encode, args.batch - len(pick), np.random.default_rng([12, step]))
        x0, given, pose, picture, mouth, shape = (
            torch.cat([data[k][pick], new[k]])
            for k in ("latent", "given", "pose", "picture", "mouth", "shape")
        )
        given[:, 4:] += JITTER * torch.randn(given[:, 4:].shape, generator=generator)
        pose = pose + JITTER * torch.randn(pose.shape, generator=generator)
        motion = table[(mouth * (LEVELS - 1)).round().long()]
        u = torch.sigmoid(torch.randn(args.batch, generator=generator))
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        noise = torch.randn(x0.shape, generator=generator)
        s = sigma[:, None, None, None, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image = look(Params(tower), picture)
            v, seen = velocity(
                params, text, (1 - s) * x0 + s * noise, given, pose, image, motion, 1000 * sigma
            )
        error, misread = (v - (noise - x0)).square().mean(), reading(reader, seen, shape)
        optimiser.zero_grad()
        (error + READING * misread).backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimiser.step()
        average(mean, trained, min(0.998, (step + 1) / (step + 10)))
        running += (error.item(), misread.item())
        if (step + 1) % 50 == 0:
            minutes = (time.time() - started) / 60
            say(f"{step + 1} loss {running[0] / 50:.4f} reading {running[1] / 50:.3f} {minutes:.1f} min")
            running[:] = 0
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            torch.save(
                {
                    "step": step + 1,
                    "dit": net,
                    "clip": tower,
                    "mean": mean,
                    "reader": reader,
                    "optimiser": optimiser.state_dict(),
                },
                target.with_suffix(".new"),
            )
            target.with_suffix(".new").replace(target)
        if (step + 1) % 500 == 0:
            say(step + 1, evaluate(*averaged(mean, net), text, table, held_out, scenes, codec))


def averaged(mean: Weights, net: Weights) -> tuple[Weights, Weights]:
    """(transformer, CLIP tower): the averaged weights, and what was not trained."""
    tower = {k.removeprefix("clip."): w for k, w in mean.items() if k.startswith("clip.")}
    return {k: mean.get(k, w) for k, w in net.items()}, tower


if __name__ == "__main__":
    main()
