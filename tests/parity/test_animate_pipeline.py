"""Three segments of Wan-Animate against diffusers' WanAnimatePipeline: videos in, latents out, on random weights.

The same noise, drawn by one generator, the same text features and the same noise levels on both sides. Switched off are
the documented differences: diffusers' own grid of levels (wan-models 3.4) and its resizing instead of padding: all
pictures have the video's size, which is CLIP's too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
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
from lowvram.animation import driven_settings
from lowvram.driving import open_folder
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.media.video import VideoWriter, read_frames
from lowvram.model import Model, Transformer
from lowvram.models import clip as clip_network
from lowvram.offload.io import FileReader
from lowvram.planning.choose import make_plan
from lowvram.quant.identify import identify_path
from lowvram.quant.spec import ClipSpec, DitSpec, TextSpec
from lowvram.sampling.presets import model_preset
from lowvram.stages.denoise import State
from lowvram.stages.run import Run
from lowvram.stages.segments import Forgetful, Stand, segments

STEPS, SIDE, SEED = 2, 32, 11
CLIP = ClipSpec(dim=160, ffn=320, layers=3, patch=2, tokens=257)
BASE = "wan2.2-animate-14b"


class Latents(Forgetful):
    """Remembers the latent of every segment."""

    def __init__(self) -> None:
        self.last: dict[int, Tensor] = {}

    def state(self, segment: int, state: State) -> None:
        self.last[segment] = state.x


def refs(folder: Path, name: str, kind: Any, weights: dict[str, Tensor]) -> Any:
    path = folder / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in weights.items()}, path)
    return identify_path(path, FileReader, kind).refs


def write(path: Path, frames: Sequence[np.ndarray]) -> None:
    with VideoWriter(path, frames[0].shape[1], frames[0].shape[0], 30) as writer:
        for frame in frames:
            writer.write(frame[None])


def make_folder(folder: Path, frames: int) -> None:
    generator = np.random.default_rng(frames)
    for name, side in (("pose", SIDE), ("bg", SIDE), ("face", 512)):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
        picture = np.asarray(coarse.resize((side, side)))
        write(folder / f"src_{name}.mp4", [np.roll(picture, n * side // 32, 1) for n in range(frames)])
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    mask[8:24, 8:24] = 255
    write(folder / "src_mask.mp4", [np.roll(mask, n, 0) for n in range(frames)])
    Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / "src_ref.png")


def pictures(path: Path, channel: int | None = None) -> list[Image.Image]:
    frames = list(read_frames(path))
    if channel is not None:  # a grey of one channel: the other two differ by the rounding of the codec
        frames = [np.repeat(f[..., channel : channel + 1], 3, axis=2) for f in frames]
    return [Image.fromarray(f) for f in frames]


@pytest.mark.parametrize(
    ("mode", "guidance", "carried", "length", "frames"),
    [
        ("animate", 1.0, 1, 9, 20),
        ("replace", 1.0, 1, 9, 20),
        ("animate", 2.0, 5, 13, 26),
        ("replace", 2.0, 5, 13, 26),
    ],
)
def test_the_latents_of_three_segments_are_those_of_diffusers(
    mode: str,
    guidance: float,
    carried: int,
    length: int,
    frames: int,
    tmp_path: Path,
    animate_reference: tuple[DitSpec, Any],
    vae_case: Callable[[str], Any],
    noise: Callable[..., Tensor],
    error: Callable[[Tensor, Tensor], float],
) -> None:
    dit, reference = animate_reference
    vae = vae_case("2.1-small")
    transformers, diffusers = importlib.import_module("transformers"), importlib.import_module("diffusers")
    config = transformers.CLIPVisionConfig(
        hidden_size=CLIP.dim, intermediate_size=CLIP.ffn, num_hidden_layers=CLIP.layers,
        num_attention_heads=CLIP.heads, image_size=CLIP.side, patch_size=CLIP.patch, hidden_act="gelu",
    )  # fmt: skip
    torch.manual_seed(21)
    tower = transformers.CLIPVisionModel(config).eval()
    spec = replace(
        model_preset(BASE), dit=dit, vae=vae.spec, text=TextSpec(100, dit.text_dim, 2, 32, 96, 1), clip=CLIP
    )
    transformer = Transformer(
        refs(tmp_path, "dit", "dit", reference.state_dict()), face_blocks=dit.face_blocks
    )
    model = Model(
        BASE, spec, {"single": transformer}, refs(tmp_path, "vae", "vae", dict(vae.weights)),
        imagined_model("", spec, "bf16").text, None, refs(tmp_path, "clip", "clip", tower.state_dict()),
    )  # fmt: skip
    make_folder(tmp_path, frames)
    driving = open_folder(tmp_path, mode, carried=carried)
    job = make_job(
        spec,
        model=BASE,
        files={},
        **driven_settings(
            spec, driving, {"frames": length, "steps": STEPS, "seed": SEED, "guidance": (guidance, guidance)}
        ),
    )
    texts = [noise(n, dit.text_dim, seed=n) for n in (7, 5)][: 1 if guidance == 1 else 2]
    runtime, kept = Runtime("2GB", "4GB", "cpu"), Latents()
    with runtime.device() as device:
        run = Run(device, make_plan(job, model, runtime.budget, runtime.machine))
        shown = [list(f) for _, f in segments(run, model, job, texts, Stand(), kept)]
    assert driving.segments(length) == 3 and sum(map(len, shown)) == frames

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=spec.shift
    )
    original, grid = scheduler.set_timesteps, np.linspace(np.float32(0.999), 0, STEPS + 1)[:-1]
    scheduler.set_timesteps = lambda n, device: original(device=device, sigmas=grid)
    pipeline = diffusers.WanAnimatePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.reference,
        scheduler=scheduler,
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size=SIDE,
            image_mean=clip_network.MEAN,
            image_std=clip_network.STD,
        ),
        image_encoder=tower,
        transformer=reference,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs: list[Tensor] = []

    def remember(_: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == STEPS - 1:
            theirs.append(tensors["latents"][0].clone())
        return tensors

    padded = [torch.cat([t, t.new_zeros(512 - len(t), t.shape[1])])[None] for t in texts]
    video = pipeline(
        image=Image.open(tmp_path / "src_ref.png"),
        pose_video=pictures(tmp_path / "src_pose.mp4"),
        face_video=pictures(tmp_path / "src_face.mp4"),
        background_video=pictures(tmp_path / "src_bg.mp4"),
        mask_video=pictures(tmp_path / "src_mask.mp4", channel=0),
        mode=mode,
        prompt_embeds=padded[0],
        negative_prompt_embeds=padded[1] if len(padded) == 2 else None,
        height=SIDE,
        width=SIDE,
        segment_frame_length=length,
        prev_segment_conditioning_frames=carried,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=remember,
    ).frames[0]
    assert len(theirs) == 3
    for number, expected in enumerate(theirs):
        assert error(kept.last[number], expected) <= 1e-4, number
    ours = np.concatenate([np.stack(part) for part in shown])
    assert ours.shape == video.shape
    assert np.abs(ours - video * 255).max() <= 1.01
