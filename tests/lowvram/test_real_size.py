"""The denoise stage itself, at the sizes of the real models, on tensors without memory and under torch's allocator in
numbers: it finds room in what its plan says, and that is at most 3 % more than the allocator reserves for it, or the room set aside for the allocator.

Blocks come from nowhere, two an expert, and the latent is not looked at; everything else is the code that runs on a card, in every
attention mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from meta_device import META
from nowhere import OUTSIDE, Nowhere, allocator_of, imagined

from lowvram.imagined import imagined_model
from lowvram.job import Job, make_job
from lowvram.machine import machine_profile
from lowvram.model import Model
from lowvram.offload.allocator import ROOM, CachingAllocator
from lowvram.offload.budget import Budget, allocated_size
from lowvram.offload.estimate import Peak, peak_memory
from lowvram.offload.placement import BlockId
from lowvram.planning.choose import make_plan
from lowvram.planning.plan import Plan
from lowvram.planning.visits import visiting_order
from lowvram.sampling.presets import model_preset
from lowvram.sampling.solvers import SolverState
from lowvram.stages import denoise
from lowvram.stages.condition import Condition
from lowvram.stages.weights import Views
from lowvram.triton_kernels.modes import Choice

GB = 10**9
MOVED = ("slot", "resident", "allocator")
"""Claims that no tensor of the stage takes."""


def peak(plan: Plan, job: Job, model: Model, patch: pytest.MonkeyPatch, allocator: CachingAllocator) -> Peak:
    """Of preparation and denoise together, without weights, which are in the allocator alone. A step that nobody can look
    at is taken to be finite."""
    blocks = {
        (expert, n): imagined(transformer.groups()[f"blocks.{n}"])
        for expert, transformer in model.transformers.items()
        for n in range(model.spec.dit.layers)
    }
    order = visiting_order(job, model.spec, plan.lean.together)
    weights = [n for name, n in plan.stage("denoise").claims.items() if name.startswith(("slot", "resident"))]

    def open_stream(*_: object) -> Iterator[tuple[BlockId, Views]]:
        for nbytes in weights:
            allocator.malloc(nbytes)
        return iter([(block, blocks[block]) for block in order])

    patch.setattr(denoise, "_open_stream", open_stream)
    patch.setattr(denoise, "_check_finite", lambda *_: None)
    spec, dtype = model.spec, plan.dtype
    run = Nowhere(plan, allocator)
    lengths = [spec.dit.text_len] * (1 + (max(job.schedule.guidance) > 1))
    shape = spec.denoised_shape(job.width, job.height, job.frames)
    state = denoise.State(torch.empty(shape, device=META), SolverState())

    @torch.inference_mode()
    def whole() -> None:
        texts = [torch.empty(n, spec.dit.text_dim, dtype=dtype) for n in lengths]
        denoise.denoise(run, model, job, texts, Condition(), state, lambda _: None)

    return peak_memory(whole, rounding=allocated_size, allocator=allocator)


CASES = [
    ("wan2.2-t2v-a14b", (1280, 720, 121), 16, "sdpa"),
    ("wan2.2-t2v-a14b", (1280, 720, 121), 6, "int8-fp16"),
    ("wan2.2-t2v-a14b", (1280, 720, 121), 4.2, "sdpa"),
    ("wan2.2-ti2v-5b", (1280, 704, 121), 8, "int8"),
]


@pytest.mark.parametrize(("name", "size", "gigabytes", "mode"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_a_stage_at_real_size_finds_room_in_its_plan_and_its_plan_is_hardly_more(
    name: str, size: tuple[int, int, int], gigabytes: float, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = model_preset(name)
    spec = replace(spec, dit=replace(spec.dit, layers=2))
    attention = Choice(mode, mode, "as asked")
    job = make_job(
        spec,
        model=name,
        files={},
        width=size[0],
        height=size[1],
        frames=size[2],
        steps=4,
        attention=attention,
    )
    model, machine = imagined_model(name, spec, "fp8"), machine_profile("rtx4090")
    plan = make_plan(job, model, Budget(int(gigabytes * GB), 64 * GB), machine)
    stage = plan.stage("denoise")
    outside = sum(n for claim, n in stage.claims.items() if claim in OUTSIDE)
    allocator = allocator_of(stage)
    found = peak(plan, job, model, monkeypatch, allocator)
    held = stage.vram - outside - sum(n for claim, n in stage.claims.items() if claim.startswith(MOVED))
    assert found.peak_bytes <= held, found.live[:12]
    taken = outside + allocator.peak
    assert stage.vram <= max(1.03 * taken, taken + ROOM)  # two blocks of thirty are little beside the room
    assert allocator.emptied <= 2  # the device waits for it
