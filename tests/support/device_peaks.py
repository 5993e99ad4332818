"""The highest count of every stage of a job on the strict device, held against its plan."""

from __future__ import annotations

from dataclasses import replace

from lowvram.offload.estimate import Tracker
from lowvram.planning.denoise import Room, place, stage_plan, ways
from lowvram.planning.facts import Facts
from lowvram.planning.plan import Plan

SLACK = 4096
"""Bytes of tensors that hold a few numbers each: no plan counts them."""


class Peaks:
    """The highest count of every stage."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.name = tracker, ""
        self.peaks: dict[str, int] = {}

    def begin(self, stage: str, done: int = 0) -> None:
        self.name = stage
        self.tracker._peak_bytes = self.tracker.live_bytes

    def step(self, vram: int | None = None) -> None:
        return

    def note(self, text: str) -> None:
        return

    def end(self) -> None:
        self.peaks[self.name] = max(self.peaks.get(self.name, 0), self.tracker.peak().peak_bytes)


def check(plan: Plan, stages: Peaks) -> None:
    assert list(stages.peaks) == [stage.name for stage in plan.stages]
    for stage in plan.stages:
        measured = stages.peaks[stage.name]
        assert measured <= stage.vram + SLACK, stage.name
        assert stage.vram <= 1.03 * measured, stage.name


def with_residual_in_ram(plan: Plan, facts: Facts) -> Plan:
    """`plan`, but the steps run the first way whose residual lies in RAM."""
    way = next(way for way in ways(facts) if way.lean.away)
    denoise = stage_plan(facts, way, Room())
    stages = tuple(denoise if stage.name == "denoise" else stage for stage in plan.stages)
    return replace(plan, stages=stages, denoise=place(facts, way, Room()), lean=way.lean)
