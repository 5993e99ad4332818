"""Encoding as a stage: planned like decoding, fed frame by frame, equal to the whole clip at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tilings import TILINGS
from torch import Tensor

from lowvram import Runtime
from lowvram.autoencoder import Autoencoder
from lowvram.codings import Encodings, encodings
from lowvram.errors import InternalError
from lowvram.imagined import imagined_model
from lowvram.machine import machine_profile
from lowvram.model import Model, vae_group
from lowvram.models import vae, vae_clip
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.allocator import ROOM
from lowvram.offload.budget import Ledger, allocated_size, exact_size, segment_size
from lowvram.offload.device import CpuDevice
from lowvram.offload.estimate import track
from lowvram.planning.encode import EncodePlan, plan_encode
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.spec import LATENT_MEAN_22, LATENT_STD_22, VaeSpec
from lowvram.sampling.presets import model_preset
from lowvram.stages.encode import encode
from lowvram.stages.run import Run, Traffic
from lowvram.stages.tiles import Shelf
from lowvram.stages.weights import Dense, to_params

GB = 10**9
SPECS = {
    "2.1": VaeSpec("2.1", 8, 8, 16, 1),
    "2.2": VaeSpec("2.2", 8, 8, 48, 1, LATENT_MEAN_22, LATENT_STD_22),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- planned


@pytest.mark.parametrize("version", SPECS)
@pytest.mark.parametrize("tiling", TILINGS)
def test_the_planned_peak_is_the_measured_one(version: str, tiling: Tiling) -> None:
    """Tensors on the CPU stand for the device's, so planes that wait on the host are counted too."""
    spec, plane = SPECS[version], (16, 10)
    group = vae_group(imagined_model("none", replace(model_preset("nano"), vae=spec), "bf16"), vae.ENCODER)
    views = {
        r.name: {p.role: torch.zeros(p.shape, dtype=TORCH_DTYPES[p.dtype]) for p in r.parts}
        for r in group.refs
    }
    w = Dense(to_params(group, views), torch.float32)
    frames = torch.zeros(9, 3, plane[0] * spec.stride[1], plane[1] * spec.stride[2]).unbind()
    planned = Encodings(spec, group, (spec.z, 3, *plane), 1, torch.float32, exact_size).exactly(tiling)
    with torch.no_grad(), track(rounding=allocated_size) as tracker:
        memories = vae_clip.encoder(spec).memories(tiling, plane, spec.shapes())
        visits = math.ceil(3 / tiling.visit)
        shelf = Shelf(CpuDevice(), memories, torch.float32, visits, kept=tiling.kept, ahead=tiling.ahead)
        latents = vae_clip.encode(spec, w, frames, plane, tiling, shelf, torch.device("cpu"), torch.float32)
        made = 0
        while next(latents, None) is not None:  # and nothing of it is kept
            made += 1
        del shelf
    assert made == 3
    measured, expected = tracker.peak().peak_bytes, planned.vram + planned.waiting
    assert measured <= expected <= 1.03 * measured
    assert planned.slab > 0.3 * measured


def test_720p_in_float32_needs_half_a_gigabyte_beside_the_context() -> None:
    """Weights included. Bands in tiles compute little twice; tiles alone four times as much as the whole plane."""
    model = imagined_model("wan2.2-t2v-a14b", model_preset("wan2.2-t2v-a14b"), "bf16")
    plan = plan_encode(model, (81, 720, 1280), GB // 2, 24 * GB, machine_profile("rtx4090"))
    assert plan.dtype == torch.float32
    assert sum(plan.claims.values()) <= GB // 2
    assert encodings(model, plan.shape, plan.dtype, segment_size).exactly(plan.tiling).work < 1.2


def test_a_plan_to_encode_for_a_card_counts_what_the_allocator_leaves_between() -> None:
    """As the plan of a job that encodes does."""
    model = imagined_model("wan2.2-t2v-a14b", model_preset("wan2.2-t2v-a14b"), "bf16")
    runtime = Runtime(3 * GB, 24 * GB, device="cpu")
    runtime.machine = machine_profile("rtx4090")
    stage = Autoencoder(runtime, model).plan_encode((9, 720, 1280)).stage("encode")
    assert stage.encode is not None and stage.claims["allocator"] == ROOM
    alive = encodings(model, (9, 720, 1280), torch.float32, segment_size).exactly(stage.encode.tiling)
    assert stage.claims["vae scratch"] > alive.scratch


def test_whole_frames_of_the_5b_model_fit_4_gb_for_any_number_of_frames() -> None:
    model = imagined_model("wan2.2-ti2v-5b", model_preset("wan2.2-ti2v-5b"), "bf16")
    card = machine_profile("rtx4090")
    plan, longer = (plan_encode(model, (n, 704, 1280), 4 * GB, 2 * GB, card) for n in (121, 1001))
    assert plan.tiling == Tiling() and sum(plan.claims.values()) <= 4 * GB
    assert longer.claims == plan.claims and longer.ram_claims == plan.ram_claims


# ---- the stage


class Clip:
    """Frames of noise that count how many were asked for."""

    def __init__(self, count: int, height: int, width: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.frames = torch.rand(3, count, height, width, generator=generator) * 2 - 1
        self.asked = 0

    def __iter__(self) -> Iterator[Tensor]:
        for frame in self.frames.unbind(1):
            self.asked += 1
            yield frame


class Case:
    """The VAE of a model on a CPU that stands for a device."""

    def __init__(self, folder: Path) -> None:
        pipeline = Runtime(GB, 2 * GB, device="cpu").load(str(folder))
        self.model: Model = pipeline.model
        job = pipeline.job("a red circle", width=64, height=64, frames=5, steps=1)
        self.run = Run(CpuDevice(GB, ram=Ledger(2 * GB, "RAM")), pipeline.plan_job(job))

    def plan(self, clip: Clip) -> EncodePlan:
        machine = self.run.plan.machine
        return plan_encode(self.model, tuple(clip.frames.shape[1:]), GB, GB, machine)

    def untiled(self, clip: Clip) -> Tensor:
        with self.run.loaded("vae", vae_group(self.model, vae.ENCODER), Traffic()) as params:
            weights = Dense(params, torch.float32)
            return vae.encode(self.model.spec.vae, weights, clip.frames[None])[0]


@pytest.fixture(scope="module")
def case(tiny_model: Path) -> Case:
    return Case(tiny_model)


@pytest.mark.parametrize(
    "tiling",
    [None, Tiling(2, 2), Tiling(2, 1, visit=1, kept=False), Tiling(1, 3, visit=2, kept=False)],
)
def test_the_stage_gives_the_latent_of_the_whole_clip(case: Case, tiling: Tiling | None) -> None:
    clip = Clip(9, 72, 104)
    plan = case.plan(clip)
    plan = plan if tiling is None else replace(plan, tiling=tiling)
    traffic, expected = Traffic(), case.untiled(clip)
    latent = encode(case.run, case.model, clip, plan, traffic)
    assert latent.shape == expected.shape and latent.dtype == torch.float32
    assert float((latent - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert case.run.device.ledger.used == case.run.device.ram.used == 0
    assert traffic.total.device_bytes > 0


def test_frames_are_asked_for_when_their_latent_has_its_turn(case: Case) -> None:
    clip, seen = Clip(13, 16, 16), []

    class Watch:
        def begin(self, stage: str, done: int = 0) -> None: ...
        def step(self, vram: int | None = None) -> None:
            seen.append(clip.asked)

        def end(self) -> None: ...
        def note(self, text: str) -> None: ...

    run = replace(case.run, listener=Watch())
    encode(run, case.model, clip, case.plan(clip), Traffic())
    assert seen == [1, 5, 9, 13]


@pytest.mark.parametrize("shape", [(8, 16, 16), (9, 16, 20), (0, 16, 16)])
def test_a_clip_that_has_no_whole_latents_is_a_bug(case: Case, shape: tuple[int, int, int]) -> None:
    with pytest.raises(InternalError, match="encode"):
        plan = replace(case.plan(Clip(9, 16, 16)), shape=shape)
        encode(case.run, case.model, Clip(*shape), plan, Traffic())


@pytest.mark.parametrize("shape", [(5, 16, 16), (13, 16, 16), (9, 16, 24)])
def test_frames_that_were_not_planned_are_a_bug(case: Case, shape: tuple[int, int, int]) -> None:
    with pytest.raises(InternalError, match="frame"):
        encode(case.run, case.model, Clip(*shape), case.plan(Clip(9, 16, 16)), Traffic())
    assert case.run.device.ledger.used == 0
