"""Decoding at the sizes of the real models, on tensors without memory and under torch's allocator in numbers: it finds room
in what the plan of its stage says, whole and in bands."""

from __future__ import annotations

import pytest
import torch
from meta_device import META, MetaDevice

from lowvram.codings import decodings
from lowvram.footprint import meta_params
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.machine import machine_profile
from lowvram.models import vae_clip
from lowvram.models.vae import to_uint8
from lowvram.offload.allocator import CachingAllocator
from lowvram.offload.budget import Budget, allocated_size, segment_size
from lowvram.offload.estimate import peak_memory
from lowvram.planning.choose import make_plan
from lowvram.planning.decode import decoder_group
from lowvram.sampling.presets import model_preset
from lowvram.stages.tiles import Shelf
from lowvram.stages.weights import Dense

GB = 10**9
FRAMES = 9
"""Of 121: the first, and twice what every later latent gives."""


@pytest.mark.parametrize(
    ("name", "size", "gigabytes"),
    [
        ("wan2.2-t2v-a14b", (1280, 720, 121), 16),
        ("wan2.2-t2v-a14b", (1280, 720, 121), 3.2),
        ("wan2.2-ti2v-5b", (1280, 704, 121), 8),
    ],
)
def test_a_decode_finds_room_in_its_plan(name: str, size: tuple[int, int, int], gigabytes: float) -> None:
    width, height, frames = size
    spec, machine = model_preset(name), machine_profile("rtx4090")
    model = imagined_model(name, spec, "fp8")
    job = make_job(spec, model=name, files={}, width=width, height=height, frames=frames, steps=4)
    plan = make_plan(job, model, Budget(int(gigabytes * GB), 64 * GB), machine)
    stage, dtype = plan.stage("decode"), plan.dtype
    tiling = stage.tiling
    assert tiling is not None
    plane = decodings(model, (frames, height, width), dtype, segment_size).plane
    with torch.device(META):
        w = Dense(meta_params(decoder_group(model)), dtype)
        latent = torch.empty(1, *spec.latent_shape(*size))
    outside = sum(stage.claims[name] for name in ("cuda context", "library workspaces"))
    allocator = CachingAllocator(stage.vram - outside)
    allocator.malloc(stage.claims["vae weights"])

    @torch.inference_mode()
    def run() -> None:
        memories = vae_clip.decoder(spec.vae).memories(tiling, plane, spec.vae.shapes())
        visits = -(-latent.shape[2] // tiling.visit)
        held: list[torch.Tensor] = []  # a frame is on its way while the next is made
        with Shelf(MetaDevice(), memories, dtype, visits, kept=tiling.kept, ahead=tiling.ahead) as shelf:
            pieces = vae_clip.decode(spec.vae, w, latent, tiling, shelf, META, dtype)
            for number, (_, _, _, frame) in enumerate(pieces):
                held = [*held[-1:], to_uint8(frame)]
                del frame
                if number == FRAMES * tiling.count:
                    return

    peak_memory(run, rounding=allocated_size, allocator=allocator)
    assert allocator.emptied <= 2
