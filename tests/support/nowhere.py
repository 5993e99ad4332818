"""A run on tensors without memory: weights have no bytes, and torch's allocator is in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from meta_device import META, MetaDevice, nothing

from lowvram.model import Group
from lowvram.offload.allocator import CachingAllocator
from lowvram.offload.placement import BlockId
from lowvram.offload.slab import BlockLayout, build_layout, carve
from lowvram.planning.plan import Plan, StagePlan
from lowvram.stages.run import Run, Traffic
from lowvram.stages.weights import Views

OUTSIDE = ("cuda context", "library workspaces")
"""Claims of what the limit of the allocator leaves out, or is not here."""


def allocator_of(stage: StagePlan) -> CachingAllocator:
    """The allocator of a card, under the limit that a stage's plan gives it."""
    return CachingAllocator(stage.vram - sum(n for name, n in stage.claims.items() if name in OUTSIDE))


def imagined(group: Group) -> Views:
    """The tensors of a group on no device."""
    layout = build_layout(group.refs)
    return carve(layout, nothing(layout.nbytes))


class Nowhere(Run):
    """A run whose weights take their place in the numbers of an allocator, and nowhere else."""

    def __init__(self, plan: Plan, allocator: CachingAllocator) -> None:
        super().__init__(MetaDevice(), plan)
        self.allocator = allocator

    @contextmanager
    def stage(self, name: str, done: int = 0) -> Iterator[tuple[ExitStack, Traffic]]:
        self.allocator.empty_cache()
        with ExitStack() as stack:
            yield stack, Traffic()

    @contextmanager
    def carried(self, name: str, group: Group, traffic: Traffic) -> Iterator[Views]:
        place = self.allocator.malloc(build_layout(group.refs).nbytes)
        yield imagined(group)
        self.allocator.free(place)

    @contextmanager
    def streamed(
        self, layouts: Mapping[BlockId, BlockLayout], traffic: Traffic
    ) -> Iterator[Iterator[tuple[BlockId, Views]]]:
        slot = self.allocator.malloc(max(layout.nbytes for layout in layouts.values()))
        yield iter([(block, carve(layout, nothing(layout.nbytes))) for block, layout in layouts.items()])
        self.allocator.free(slot)

    def step(self, stage: str) -> None:
        pass

    def check_room(self, stage: str) -> None:
        pass

    def check_ram(self) -> None:
        pass


def texts(lengths: list[int], dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty(n, dim, dtype=dtype, device=META) for n in lengths]
