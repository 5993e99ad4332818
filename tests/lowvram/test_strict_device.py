"""The whole program on a strict device: nothing on the wrong device, no race between queues, the bits of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strict_device import DEVICE, Race, Strict, StrictDevice, StrictRuntime
from torch import Tensor

from lowvram import Pipeline, Runtime
from lowvram.errors import BudgetError
from lowvram.job import Job
from lowvram.offload.budget import Budget
from lowvram.offload.device import Event
from lowvram.offload.placement import Placement, Where
from lowvram.planning.choose import make_plan
from lowvram.planning.plan import Plan
from lowvram.quant.encodings.registry import encoding_by_name, encoding_names

GB = 10**9
PROMPT = "a red circle moves left on a black background"


@pytest.fixture(scope="module")
def pipes(tiny_model: Path) -> tuple[Pipeline, Pipeline]:
    return on_both(tiny_model)


def on_both(folder: Path) -> tuple[Pipeline, Pipeline]:
    """The model on the CPU, and on the strict device."""
    plain, strict = (kind(GB, 2 * GB, "cpu").load(str(folder)) for kind in (Runtime, StrictRuntime))
    return plain, strict


@pytest.fixture(scope="module")
def job(pipes: tuple[Pipeline, Pipeline]) -> Job:
    """A step of each expert."""
    job = pipes[0].job(PROMPT, seed=5, steps=2, shift=3.0)
    assert set(job.schedule.experts) == {0, 1}
    return job


@pytest.fixture(scope="module")
def resident(pipes: tuple[Pipeline, Pipeline], job: Job) -> Tensor:
    """The latent that the CPU makes."""
    return pipes[0].run(job).latent


def all_(where: Where) -> Callable[[int], Where]:
    return lambda n: where


def mixed(n: int) -> Where:
    kinds: tuple[Where, ...] = ("resident", "ram", "disk")
    return kinds[n * 2 % 3]


def placed(plan: Plan, where: Callable[[int], Where], slots: int) -> Plan:
    places = {block: where(n) for n, block in enumerate(plan.denoise.where)}
    return replace(plan, denoise=Placement(places, slots=slots, ring=slots))


@pytest.mark.parametrize(("where", "slots"), [(all_("ram"), 1), (all_("disk"), 2), (mixed, 2), (mixed, 3)])
def test_streams(
    where: Callable[[int], Where],
    slots: int,
    pipes: tuple[Pipeline, Pipeline],
    job: Job,
    resident: Tensor,
) -> None:
    plan = placed(pipes[0].plan_job(job), where, slots)
    assert torch.equal(pipes[1].run(job, plan=plan).latent, resident)


@pytest.mark.parametrize(
    "lean",
    [
        {"group": 1, "away": True, "chunk": 16},
        {"away": True, "together": False},
        {"group": 1, "unpacked": False},
    ],
)
def test_lean_ways(lean: dict[str, Any], pipes: tuple[Pipeline, Pipeline], job: Job) -> None:
    plan = pipes[0].plan_job(job)
    plan = replace(plan, lean=replace(plan.lean, **lean))
    plain, strict = (pipe.run(job, plan=plan).latent for pipe in pipes)
    assert torch.equal(strict, plain)


@pytest.mark.parametrize("attention", ["int8", "int8-fp16", "int8-fp8", "sparse"])
def test_attention(attention: str, pipes: tuple[Pipeline, Pipeline]) -> None:
    """Wherever the residual lies."""
    job = pipes[0].job(PROMPT, steps=1, shift=3.0, attention=attention)
    plan = pipes[0].plan_job(job)
    away = replace(plan, lean=replace(plan.lean, away=True, together=False))
    plain, strict, passing = (
        p.run(job, plan=w).latent for p, w in zip((*pipes, pipes[1]), (plan, plan, away), strict=True)
    )
    assert torch.equal(strict, plain) and torch.equal(passing, plain)


def test_half_precision_and_frames(pipes: tuple[Pipeline, Pipeline]) -> None:
    job = pipes[0].job(PROMPT, steps=1, shift=3.0, frames=5)
    plan = replace(pipes[0].plan_job(job), dtype=torch.bfloat16)
    plain, strict = (pipe.run(job, plan=plan) for pipe in pipes)
    assert torch.equal(strict.latent, plain.latent)
    for ours, theirs in zip(strict.frames(), plain.frames(), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["tiny-i2v-a14b", "tiny-flf2v-14b", "tiny-ti2v-5b"])
def test_models_that_begin_with_a_picture(
    kind: str, pictured_models: dict[str, Path], picture_files: tuple[Path, Path]
) -> None:
    pipes = on_both(pictured_models[kind])
    last = {"last_image": picture_files[1]} if "flf2v" in kind else {}
    job = pipes[0].job(PROMPT, image=picture_files[0], width=64, height=64, steps=2, shift=3.0, **last)
    plain, strict = (pipe.run(job) for pipe in pipes)
    assert torch.equal(strict.latent, plain.latent)
    for ours, theirs in zip(strict.frames(), plain.frames(), strict=True):
        assert np.array_equal(ours, theirs)


def test_the_least_budget(pipes: tuple[Pipeline, Pipeline], job: Job) -> None:
    with pytest.raises(BudgetError) as refused:
        make_plan(job, pipes[0].model, Budget(1000, 2 * GB), pipes[0].runtime.machine)
    least = Budget(refused.value.minimum_vram or 0, 2 * GB)
    plan = make_plan(job, pipes[0].model, least, pipes[0].runtime.machine)
    videos = []
    for pipe in pipes:
        small = replace(pipe, runtime=type(pipe.runtime)(least.vram, least.ram, "cpu"))
        videos.append(small.run(job, plan=plan))
    plain, strict = videos
    assert torch.equal(strict.latent, plain.latent)
    for ours, theirs in zip(strict.frames(), plain.frames(), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", encoding_names())
def test_encodings_decode_where_their_bytes_are(name: str) -> None:
    encoding = encoding_by_name(name)
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    parts = encoding.encode(weight)
    expected = encoding.decode(parts, weight.shape, torch.bfloat16)
    with torch.inference_mode(), Strict():
        there = {role: part.to(DEVICE) for role, part in parts.items()}
        assert torch.equal(encoding.decode(there, weight.shape, torch.bfloat16).cpu(), expected)


# ---- the device itself


class Deaf(StrictDevice):
    """A device whose user forgets to wait for copies."""

    def wait(self, event: Event) -> Any:
        return super().wait(self.record_compute())


class Hasty(StrictDevice):
    """A device whose user forgets that copies have to wait for work."""

    def copy_async(self, dst: Tensor, src: Tensor, *, after: Event | None = None) -> Event:
        return super().copy_async(dst, src)


@pytest.mark.parametrize("kind", [Deaf, Hasty])
def test_a_missing_wait_is_found(
    kind: type[StrictDevice], pipes: tuple[Pipeline, Pipeline], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strict_device.StrictDevice", kind)
    plan = placed(pipes[0].plan_job(job), all_("disk"), 2)
    with pytest.raises(Race):
        pipes[1].run(job, plan=plan)


def test_a_tensor_on_the_wrong_device_is_found() -> None:
    with Strict():
        x = torch.ones(3, device=DEVICE)
        assert (x + torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]
        with pytest.raises(AssertionError, match="two devices"):
            x + torch.ones(3)
