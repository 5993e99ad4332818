"""What common budgets get: the large videos at full speed in 8 and 6 GB, and a way in 4."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from lowvram.errors import BudgetError
from lowvram.job import make_job
from lowvram.machine import machine_profile
from lowvram.model import imagined_model
from lowvram.offload.budget import Budget
from lowvram.planning.choose import choose
from lowvram.planning.facts import gather
from lowvram.sampling.presets import model_preset

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
