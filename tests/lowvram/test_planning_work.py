"""A plan and a refusal cost little: networks run on meta tensors a few times, and the search among all ways is short."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
from imagined import Imagined
from work import lines_run

from lowvram.errors import BudgetError
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.machine import machine_profile
from lowvram.offload.budget import Budget
from lowvram.planning.choose import choose
from lowvram.planning.facts import Facts, gather
from lowvram.planning.plan import Plan
from lowvram.planning.ways import claims, every_way, least_claims
from lowvram.sampling.presets import model_preset

GB = 10**9


def facts(name: str, width: int, height: int, frames: int) -> Facts:
    spec = model_preset(name)
    job = make_job(spec, model=name, files={}, width=width, height=height, frames=frames)
    return gather(job, imagined_model(name, spec, "fp8"), machine_profile("rtx4090"))


def told(facts: Facts, vram: int, ram: int = 24) -> Plan | BudgetError:
    try:
        return choose(facts, Budget(vram * GB, ram * GB))
    except BudgetError as refused:
        return refused


class Counted(dict[Hashable, Any]):
    """Footprints that were measured, by kind; what is known in closed form is none."""

    @property
    def runs(self) -> int:
        return sum(1 for what in self if isinstance(what, tuple) and what[0] not in ("cells", "unpacked"))


@pytest.mark.parametrize(
    ("name", "size", "vram", "ram", "runs"),
    [
        ("wan2.2-t2v-a14b", (1280, 720, 121), 16, 24, 10),
        ("wan2.2-t2v-a14b", (1280, 720, 121), 6, 24, 10),
        ("wan2.2-t2v-a14b", (1280, 720, 121), 1, 24, 14),
        ("wan2.2-t2v-a14b", (1280, 720, 121), 16, 1, 10),
        ("wan2.2-i2v-a14b", (1280, 720, 121), 1, 24, 18),
        ("wan2.2-animate-14b", (1280, 720, 77), 1, 24, 26),
    ],
)
def test_few_networks_run_for_a_plan_or_a_refusal(
    name: str, size: tuple[int, int, int], vram: int, ram: int, runs: int
) -> None:
    known = Counted()
    found = told(replace(facts(name, *size), known=known), vram, ram)
    assert isinstance(found, BudgetError if 1 in (vram, ram) else Plan)
    assert 5 < known.runs <= runs


@pytest.mark.parametrize(
    ("name", "size"), [("wan2.2-t2v-a14b", (1280, 720, 121)), ("wan2.2-animate-14b", (832, 480, 77))]
)
def test_what_a_forward_claims_is_no_less_than_what_the_search_goes_by(
    name: str, size: tuple[int, int, int]
) -> None:
    known = facts(name, *size)
    for way in every_way(known):
        assert 0 < least_claims(known, way.lean)["scratch"] <= claims(known, way.lean)["scratch"]


@pytest.mark.parametrize(
    ("name", "vram", "lines"),
    [
        ("wan2.2-t2v-a14b", 8, 1_200_000),
        ("wan2.2-t2v-a14b", 1, 1_500_000),
        ("wan2.2-animate-14b", 1, 3_000_000),
    ],
)
def test_the_search_beside_them_is_short(name: str, vram: int, lines: int) -> None:
    imagined = replace(facts(name, 1280, 720, 77), known=Imagined())
    found, count = lines_run(lambda: told(imagined, vram))
    assert isinstance(found, BudgetError) is (vram == 1)
    assert count <= lines
