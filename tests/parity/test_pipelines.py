"""Whole jobs against diffusers' WanPipeline and WanImageToVideoPipeline: pictures in, if any, latent out, on random weights.

The same noise, the same text features and the same noise levels on both sides; diffusers' own grid of levels differs
from the authors' (wan-models 3.4), so it is given ours. Pictures are of the video's size and of CLIP's: diffusers resizes
with Lanczos and crops for CLIP, the authors do neither.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lowvram import Runtime
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.media.picture import open_picture
from lowvram.model import Model, Transformer
from lowvram.models import clip as clip_network
from lowvram.offload.io import FileReader
from lowvram.planning.choose import make_plan
from lowvram.quant.identify import identify_path
from lowvram.quant.spec import ClipSpec, TextSpec
from lowvram.sampling.presets import model_preset
from lowvram.stages import denoise
from lowvram.stages.condition import condition
from lowvram.stages.denoise import State
from lowvram.stages.run import Run

STEPS, FRAMES = 4, 9
CLIP = ClipSpec(dim=160, ffn=320, layers=3, patch=2, tokens=257)


def refs(folder: Path, name: str, kind: Any, weights: dict[str, Tensor]) -> Any:
    path = folder / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in weights.items()}, path)
    return identify_path(path, FileReader, kind).refs


def clip_tower() -> Any:
    transformers = importlib.import_module("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=CLIP.dim, intermediate_size=CLIP.ffn, num_hidden_layers=CLIP.layers,
        num_attention_heads=CLIP.heads, image_size=CLIP.side, patch_size=CLIP.patch, hidden_act="gelu",
    )  # fmt: skip
    torch.manual_seed(21)
    return transformers.CLIPVisionModel(config).eval()


def scheduler(job: Any) -> Any:
    """diffusers' UniPC on the authors' grid."""
    kind = importlib.import_module("diffusers").UniPCMultistepScheduler
    made = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=job_shift(job))
    original, grid = made.set_timesteps, np.linspace(np.float32(0.999), 0, STEPS + 1)[:-1]
    made.set_timesteps = lambda n, device: original(device=device, sigmas=grid)
    return made


def job_shift(job: Any) -> float:
    """The shift that made the first noise level of the job from 0.999."""
    sigma, u = job.schedule.sigmas[0], float(np.float32(0.999))
    return float(sigma * (1 - u) / (u * (1 - sigma)))


@pytest.mark.parametrize(
    ("variant", "base", "pictures"),
    [
        ("t2v", "wan2.2-t2v-a14b", 0),
        ("ti2v", "wan2.2-ti2v-5b", 0),
        ("i2v", "wan2.2-i2v-a14b", 1),
        ("i2v", "wan2.2-i2v-a14b", 2),
        ("i2v-clip", "wan2.1-i2v-14b", 1),
        ("flf2v-clip", "wan2.1-flf2v-14b", 2),
        ("ti2v", "wan2.2-ti2v-5b", 1),
    ],
)
def test_the_latent_is_that_of_diffusers(
    variant: str,
    base: str,
    pictures: int,
    tmp_path: Path,
    dit_case: Callable[[str], Any],
    vae_case: Callable[[str], Any],
    randomised: Callable[[Any, int], None],
    noise: Callable[..., Tensor],
    error: Callable[[Tensor, Tensor], float],
) -> None:
    case, vae = dit_case(variant), vae_case("2.2" if variant == "ti2v" else "2.1-small")
    side = 2 * CLIP.side if variant == "ti2v" else CLIP.side
    spec = replace(
        model_preset(base), dit=case.spec, vae=vae.spec, text=TextSpec(100, case.spec.text_dim, 2, 32, 96, 1), clip=CLIP
    )  # fmt: skip
    references = [case.reference]
    if spec.experts == 2:
        references.append(copy.deepcopy(case.reference))
        randomised(references[1], 15)
    experts = {}
    for name, reference in zip(spec.expert_names(), references, strict=True):
        experts[name] = Transformer(refs(tmp_path, name, "dit", reference.state_dict()))
    tower = clip_tower() if case.spec.image_tokens else None
    model = Model(
        base, spec, experts, refs(tmp_path, "vae", "vae", dict(vae.weights)), imagined_model("", spec, "bf16").text, None,
        {} if tower is None else refs(tmp_path, "clip", "clip", tower.state_dict()),
    )  # fmt: skip

    paths = []
    for n in range(pictures):
        pixels = np.random.default_rng(n).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        paths.append(tmp_path / f"{n}.png")
    opened = [open_picture(p) for p in paths]
    job = make_job(
        spec, model=base, files={}, **dict(zip(("image", "last_image"), opened, strict=False)), width=side, height=side, frames=FRAMES, steps=STEPS
    )  # fmt: skip
    texts = [noise(n, spec.text.dim, seed=n) for n in (7, 5)]
    start = noise(*spec.latent_shape(side, side, FRAMES), seed=3)
    runtime = Runtime("2GB", "4GB", "cpu")
    plan = make_plan(job, model, runtime.budget, runtime.machine)
    with runtime.device() as device:
        run = Run(device, plan)
        made = condition(run, model, job)
        ours = denoise.denoise(run, model, job, texts, made, State(start.clone()), lambda state: None)

    diffusers, transformers = importlib.import_module("diffusers"), importlib.import_module("transformers")
    networks = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae.reference,
        "scheduler": scheduler(job),
        "transformer": references[0],
        "transformer_2": references[1] if spec.experts == 2 else None,
        "boundary_ratio": spec.boundary or None,
        "expand_timesteps": variant == "ti2v",
    }
    if pictures:
        looking = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": side},
            crop_size=side,
            image_mean=clip_network.MEAN,
            image_std=clip_network.STD,
        )
        pipeline = diffusers.WanImageToVideoPipeline(**networks, image_processor=looking, image_encoder=tower)
    else:
        pipeline = diffusers.WanPipeline(**networks)
    pipeline.set_progress_bar_config(disable=True)
    padded = [torch.cat([t, t.new_zeros(512 - len(t), t.shape[1])])[None] for t in texts]
    theirs = pipeline(
        **{name: Image.open(path) for name, path in zip(("image", "last_image"), paths, strict=False)},
        prompt_embeds=padded[0],
        negative_prompt_embeds=padded[1],
        height=side,
        width=side,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=spec.guidance[0],
        guidance_scale_2=spec.guidance[1] if spec.experts == 2 else None,
        latents=start[None].clone(),
        output_type="latent",
    ).frames[0]
    assert set(job.schedule.experts) == set(range(spec.experts))
    assert [int(t) for t in pipeline.scheduler.timesteps] == list(job.schedule.timesteps)
    assert error(ours, theirs) <= 1e-4
