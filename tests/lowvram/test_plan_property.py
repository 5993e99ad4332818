"""Any job, any budget: the plan is inside both caps, or the refusal names the true minimum and settings that fit.

    LOWVRAM_PLANS=100000 LOWVRAM_BUDGETS=1 python -m pytest -q -n 2 tests/lowvram/test_plan_property.py

plans a hundred thousand jobs that have nothing in common; the gate plans ten thousand, 50 budgets for each of the
clips that it draws. What is drawn: see `clips` and `budgets`. What the networks allocate is imagined here, as a round
number a token or a cell: the promise holds whatever it is, above the floors that a search goes by
(`test_tiling_search`), and running them on meta tensors would take most of the time.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from imagined import Imagined

from lowvram.errors import BudgetError
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.machine import machine_names, machine_profile
from lowvram.media.picture import Picture
from lowvram.model import Group, Model
from lowvram.models.tae import TaeSpec
from lowvram.offload.budget import Budget
from lowvram.planning.choose import choose, fits
from lowvram.planning.facts import Facts, gather
from lowvram.planning.once import Once
from lowvram.planning.plan import Plan
from lowvram.preview import Decoder
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.refs import Part, TensorRef
from lowvram.quant.spec import CLIP_TOKENS, VaeSpec, numel
from lowvram.sampling.presets import load_models
from lowvram.triton_kernels.modes import EXACT, SDPA, Choice, Matmul

PLANS = int(os.environ.get("LOWVRAM_PLANS", "10000"))
BUDGETS = int(os.environ.get("LOWVRAM_BUDGETS", "50"))
"""Of each clip."""
PARTS = 2
"""Processes that can share the work."""
MODELS = load_models()
WEIGHTS = ("bf16", "fp8", "int8", "nf4", "q4_k", "q8_0")
SIZES = (
    (832, 480),
    (480, 832),
    (1280, 704),
    (704, 1280),
    (640, 640),
    (320, 192),
    (64, 64),
    (1920, 1088),
    (960, 544),
)
FRAMES = (1, 5, 17, 49, 81, 121, 241)
MACHINES = {name: machine_profile(name) for name in machine_names()}


@dataclass(frozen=True)
class Clip:
    """A job and its machine."""

    facts: Facts
    told: str


def clips(seed: int) -> Iterator[Clip]:
    """Every kind of model and how it is stored, size, length, number of steps and guidance, solver, pictures, attention and
    matmul, with and without text features that are kept and a decoder for previews, on every card of the table, with
    links and disks of several speeds."""
    rng, known = random.Random(seed), Imagined()
    models: dict[tuple[str, str], Once[Model]] = {}
    while True:
        name, weights = rng.choice(list(MODELS)), rng.choice(WEIGHTS)
        spec = MODELS[name]
        if (name, weights) not in models:
            models[name, weights] = Once(imagined_model(name, spec, weights))
        width, height = rng.choice(SIZES)
        taken = rng.choice([(640, 480), (6000, 4000)])
        picture = Picture(path="a.png", sha256="0" * 64, width=taken[0], height=taken[1])
        frames = rng.choice(FRAMES)
        both = spec.variant == "i2v" and spec.dit.image_tokens != CLIP_TOKENS and frames > 1
        shown = spec.variant == "i2v" or (spec.variant == "ti2v" and rng.random() < 0.5)
        quantised = not spec.dit.face_blocks and rng.random() < 0.2
        job = make_job(
            spec,
            model=name,
            files={},
            width=width,
            height=height,
            frames=frames,
            image=picture if shown else None,
            last_image=picture if both and rng.random() < 0.5 else None,
            steps=rng.choice([1, 4, 20, 50]),
            guidance=rng.choice(
                [(1.0, 1.0), (4.0, 3.0), (1.0, 3.5)] if spec.experts == 2 else [1.0, 4.0, 1.0]
            ),
            solver=rng.choice(["unipc", "dpm++", "euler"]),
            attention=Choice("int8-fp16", "sdpa") if quantised else SDPA,
            matmul=Matmul("int8") if weights == "int8" and rng.random() < 0.5 else EXACT,
        )
        machine = MACHINES[rng.choice(list(MACHINES))]
        machine = replace(machine, link=machine.link * rng.choice([0.1, 1, 1]), disk=rng.choice([1e8, 3e9]))
        of_model = models[name, weights]
        facts = gather(
            job,
            of_model.subject,
            machine,
            known,
            of_model=of_model,
            text_cached=rng.random() < 0.2,
            preview=preview(spec.vae) if rng.random() < 0.2 and "nano" not in name else None,
        )
        yield Clip(facts, _told(facts, weights))


def _told(facts: Facts, weights: str) -> str:
    job, machine = facts.job, facts.machine
    return (
        f"{job.model} {weights} {job.width}x{job.height}x{job.frames}, {len(job.schedule)} steps of "
        f"{job.schedule.guidance[0]}, {job.schedule.solver}, {job.attention.mode}, {len(job.pictures)} pictures, preview "
        f"{facts.preview is not None}, on {machine.name} link {machine.link:.3g} disk {machine.disk:.3g}"
    )


def preview(vae: VaeSpec) -> Decoder:
    """A small decoder, as `lowvram.preview.open_decoder` finds it in a file."""
    spec, refs = TaeSpec(vae.z, vae.patch), []
    for name, shape in spec.shapes().items():
        part = Part("weight", Path("taew.safetensors"), 0, 2 * numel(shape), "F16", shape)
        refs.append(TensorRef(name, shape, Plain("F16"), (part,)))
    return Decoder(spec, Group(tuple(refs), {}))


def budgets(rng: random.Random) -> Iterator[Budget]:
    """From 10 MB, in which nothing fits, to 300 GB, each cap apart; is sent what a plan took, for others about it."""
    took: Plan | None = None
    while True:
        sizes = [int(10 ** rng.uniform(7, 11.5)) for _ in range(2)]
        if took is not None and rng.random() < 0.4:
            sizes = [peak + rng.choice([-1, 0, 0, 1]) for peak in (took.vram, took.ram)]
        took = (yield Budget(*sizes)) or took


def check_plan(facts: Facts, budget: Budget) -> Plan:
    found = choose(facts, budget)
    for stage in found.stages:
        assert 0 < stage.vram == sum(stage.claims.values()) <= budget.vram
        assert 0 < stage.ram == sum(stage.ram_claims.values()) <= budget.ram
        assert min(stage.claims.values()) >= 0 and min(stage.ram_claims.values()) >= 0
        assert stage.seconds >= 0 and stage.h2d >= stage.disk_read >= 0
    depth = facts.spec.dit.layers * len(facts.model.transformers)
    assert sum(found.blocks().values()) == depth
    assert found.choices and found.advice
    return found


def check_refusal(facts: Facts, budget: Budget, refused: BudgetError) -> None:
    assert refused.minimum_vram is not None or refused.minimum_ram is not None
    least = Budget(refused.minimum_vram or budget.vram, refused.minimum_ram or budget.ram)
    assert least.vram >= budget.vram and least.ram >= budget.ram and least != budget
    check_plan(facts, least)
    for name in ("vram", "ram"):
        if getattr(refused, f"minimum_{name}") is not None:
            assert not fits(facts, replace(least, **{name: getattr(least, name) - 1}))
    for flag, value in refused.nearest.items():
        check_plan(changed(facts, flag, value), budget)
    if "frames" in refused.nearest:
        assert not fits(changed(facts, "frames", str(int(refused.nearest["frames"]) + 4)), budget)
    assert len(str(refused).splitlines()) <= 3


def changed(facts: Facts, flag: str, value: str) -> Facts:
    """The same job with what a refusal proposes."""
    job, model = facts.job, facts.model
    match flag:
        case "frames":
            job = replace(job, frames=int(value))
        case "size":
            width, height = map(int, value.split("x"))
            job = replace(job, width=width, height=height)
        case "attention":
            job = replace(job, attention=Choice(value))
        case "weights":
            imagined = imagined_model(job.model, model.spec, value)
            model = replace(model, transformers=imagined.transformers)
        case _:
            raise AssertionError(flag)
    return gather(
        job,
        model,
        facts.machine,
        facts.known,
        of_model=facts.of_model if model is facts.model else None,
        text_cached=facts.text_cached,
        preview=facts.preview,
    )


def check(facts: Facts, budget: Budget) -> Plan | None:
    """The plan, or None if there is none, as there should be."""
    try:
        return check_plan(facts, budget)
    except BudgetError as refused:
        check_refusal(facts, budget, refused)
        return None


@pytest.mark.parametrize("part", range(PARTS))
def test_a_plan_is_inside_both_caps_or_names_the_true_minimum(part: int) -> None:
    refusals, jobs = 0, PLANS // PARTS
    for clip in clips(part):
        asked = budgets(random.Random(f"{part} {jobs}"))
        budget = next(asked)
        for _ in range(min(BUDGETS, jobs)):
            try:
                found = check(clip.facts, budget)
            except Exception as problem:
                raise AssertionError(f"{clip.told} in {budget}") from problem
            refusals += found is None
            jobs -= 1
            budget = asked.send(found)
        if not jobs:
            break
    assert 0 < refusals < PLANS // PARTS
