"""What common budgets get: the large videos at full speed in 8 and 6 GB, and a way in 4."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import pytest

from lowvram.errors import BudgetError
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.machine import machine_profile
from lowvram.offload.budget import Budget
from lowvram.planning.choose import choose, make_plan
from lowvram.planning.facts import gather
from lowvram.sampling.presets import model_preset
from lowvram.triton_kernels import dispatch
from lowvram.triton_kernels.modes import SDPA

GB = 10**9
MACHINE = machine_profile("rtx4090")


@pytest.mark.parametrize(
    ("name", "width", "height", "frames"),
    [
        ("wan2.2-t2v-a14b", 1280, 720, 121),
        ("wan2.2-t2v-a14b", 832, 480, 81),
        ("wan2.2-ti2v-5b", 1280, 704, 121),
    ],
)
def test_memory_costs_no_time_down_to_6_gb(name: str, width: int, height: int, frames: int) -> None:
    spec, known = model_preset(name), dict[Hashable, int]()
    job = make_job(spec, model=name, files={}, width=width, height=height, frames=frames)
    facts = gather(job, imagined_model(name, spec, "fp8"), MACHINE, known)
    fastest = choose(facts, Budget(80 * GB, 64 * GB))
    assert fastest.blocks()["resident"] == spec.dit.layers * spec.experts
    for vram in (16, 8, 6):
        plan = choose(facts, Budget(vram * GB, 32 * GB))
        assert plan.seconds <= 1.02 * fastest.seconds
        if vram == 16:
            assert plan.blocks()["resident"] >= 15 * spec.experts
    small = choose(facts, Budget(4 * GB, 8 * GB))
    assert small.vram <= 4 * GB and small.ram <= 8 * GB
    with pytest.raises(BudgetError) as refused:
        choose(facts, Budget(GB, 8 * GB))
    assert GB < (refused.value.minimum_vram or 0) <= 4 * GB


def test_a_refusal_says_so_if_exact_attention_would_fit() -> None:
    """Sparse attention, which keeps an order of tokens beside everything else, needs a little more."""
    spec = model_preset("wan2.2-t2v-a14b")
    model = imagined_model("wan2.2-t2v-a14b", spec, "fp8")
    sparse = dispatch.choose("sparse", MACHINE.arch, frozenset(dispatch.PACKAGES))
    job = make_job(spec, model=model.name, files={}, width=1280, height=720, frames=121, attention=sparse)
    with pytest.raises(BudgetError) as far:
        make_plan(job, model, Budget(GB, 16 * GB), MACHINE)
    assert "attention" not in far.value.nearest
    budget = Budget((far.value.minimum_vram or 0) - 1, 16 * GB)
    with pytest.raises(BudgetError, match="--attention sdpa") as refused:
        make_plan(job, model, budget, MACHINE)
    assert refused.value.nearest["attention"] == "sdpa"
    exact = make_plan(replace(job, attention=SDPA), model, budget, MACHINE)
    assert exact.vram <= budget.vram and exact.ram <= budget.ram
