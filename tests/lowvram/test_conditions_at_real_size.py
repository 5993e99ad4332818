"""Texts, pictures, faces and clips encoded at the sizes of the real models, on tensors without memory and under torch's
allocator in numbers: every stage finds room in what its plan says, where there is much and where there is little."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from meta_device import META, on_host
from nowhere import Nowhere, allocator_of

from lowvram.codings import encodings
from lowvram.conditions.clip import clip_tokens
from lowvram.conditions.faces import FACE_PIXELS, encode_faces
from lowvram.footprint import meta_params
from lowvram.imagined import imagined_model
from lowvram.job import Job, make_job
from lowvram.machine import machine_profile
from lowvram.model import Model
from lowvram.models import vae_clip
from lowvram.offload.budget import Budget, allocated_size, segment_size
from lowvram.offload.estimate import peak_memory
from lowvram.planning.choose import make_plan
from lowvram.planning.facts import prompts_of
from lowvram.planning.plan import Plan
from lowvram.sampling.presets import model_preset
from lowvram.stages import text
from lowvram.stages.tiles import Shelf
from lowvram.stages.weights import Dense

GB = 10**9
LATENTS = 3
"""Of 31 or 20: the first, and twice what every later one takes."""


def planned(name: str, size: tuple[int, int, int], gigabytes: float) -> tuple[Job, Model, Plan]:
    spec = model_preset(name)
    width, height, frames = size
    model = imagined_model(name, spec, "fp8")
    job = make_job(spec, model=name, files={}, width=width, height=height, frames=frames, steps=4)
    return job, model, make_plan(job, model, Budget(int(gigabytes * GB), 64 * GB), machine_profile("rtx4090"))


def finds_room(plan: Plan, stage: str, work: Callable[[Nowhere], object]) -> None:
    """`work` of a stage, beside what rests on the device meanwhile."""
    allocator = allocator_of(plan.stage(stage))
    if "texts" in plan.stage(stage).claims:
        allocator.malloc(plan.stage(stage).claims["texts"])
    run = Nowhere(plan, allocator)

    @torch.inference_mode()
    def whole() -> None:
        work(run)

    peak_memory(whole, rounding=allocated_size, allocator=allocator)
    assert allocator.emptied <= 2


@pytest.mark.parametrize(
    ("name", "size", "gigabytes"),
    [("wan2.2-t2v-a14b", (1280, 720, 121), 2.9), ("wan2.2-ti2v-5b", (1280, 704, 121), 16)],
)
def test_prompts_are_encoded_in_their_plan(
    name: str, size: tuple[int, int, int], gigabytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, model, plan = planned(name, size, gigabytes)
    words, dim = model.spec.dit.text_len, model.spec.text.dim
    row = on_host((words, dim), plan.dtype)
    monkeypatch.setattr(text, "tokenize", lambda _, prompts: [[0] * words for _ in prompts])
    monkeypatch.setattr(text, "gather_rows", lambda *_: row)
    finds_room(plan, "text", lambda run: text.encode(run, model, prompts_of(job)))


ANIMATE = ("wan2.2-animate-14b", (1280, 720, 77))


@pytest.mark.parametrize(("pictures", "gigabytes"), [(1, 2.9), (1, 24)])
def test_pictures_are_looked_at_in_their_plan(pictures: int, gigabytes: float) -> None:
    job, model, plan = planned(*ANIMATE, gigabytes)
    shown = [on_host((3, job.height, job.width), torch.float32)] * pictures
    finds_room(plan, "clip", lambda run: clip_tokens(run, model, shown))


@pytest.mark.parametrize("gigabytes", [2.9, 24])
def test_faces_are_encoded_in_their_plan(gigabytes: float) -> None:
    job, model, plan = planned(*ANIMATE, gigabytes)
    face = on_host((3, FACE_PIXELS, FACE_PIXELS), torch.float32)
    finds_room(plan, "faces", lambda run: encode_faces(run, model, [face] * job.frames, job.frames, 2))


@pytest.mark.parametrize(
    ("name", "size", "gigabytes"),
    [
        ("wan2.2-i2v-a14b", (1280, 720, 121), 16),
        ("wan2.2-i2v-a14b", (1280, 720, 121), 2.9),
        (*ANIMATE, 4),
    ],
)
def test_clips_are_encoded_in_their_plan(
    name: str, size: tuple[int, int, int], gigabytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, model, plan = planned(name, size, gigabytes)
    way = plan.stage("encode").encode
    assert way is not None
    spec, tiling = model.spec.vae, way.tiling
    ways = encodings(model, way.shape, way.dtype, segment_size)
    with torch.device(META):
        w = Dense(meta_params(ways.weights), way.dtype)
    frame = on_host((3, job.height, job.width), torch.float32)
    monkeypatch.setattr(
        vae_clip,
        "empty_plane",
        lambda channels, plane, dtype: on_host((1, 1, *plane, channels), dtype).permute(0, 4, 1, 2, 3),
    )

    def encode(run: Nowhere) -> None:
        run.allocator.malloc(way.claims["vae weights"])
        memories = vae_clip.encoder(spec).memories(tiling, ways.plane, spec.shapes())
        visits = -(-ways.latent[1] // tiling.visit)
        with Shelf(run.device, memories, way.dtype, visits, kept=tiling.kept, ahead=tiling.ahead) as shelf:
            made = vae_clip.encode(
                spec, w, iter([frame] * way.shape[0]), ways.plane, tiling, shelf, META, way.dtype
            )
            for number, z in enumerate(made, 1):
                del z
                if number == LATENTS:
                    return

    finds_room(plan, "encode", encode)
