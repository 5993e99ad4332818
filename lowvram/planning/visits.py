"""The blocks of a network as slabs, and the order in which a job visits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowvram.job import Job
from lowvram.model import Group
from lowvram.offload.placement import BlockId, Placement
from lowvram.offload.slab import BlockLayout, build_layout
from lowvram.quant.spec import ModelSpec
from lowvram.sampling.guidance import needs_uncond


def layouts_of(groups: Mapping[str, Group], network: str) -> dict[BlockId, BlockLayout]:
    """The slab of every block of a network, by block id."""
    blocks = {int(key.split(".")[1]): group for key, group in groups.items() if key.startswith("blocks.")}
    return {(network, n): build_layout(group.refs) for n, group in sorted(blocks.items())}


def all_on_disk(layouts: Mapping[BlockId, BlockLayout]) -> Placement:
    """Every block is read when it is needed: for networks that are used once."""
    return Placement(dict.fromkeys(layouts, "disk"))


def step_visits(job: Job, spec: ModelSpec, together: bool) -> list[int]:
    """Visits of a transformer block in each step: its layers, twice if two passes do not share them."""
    passes = [2 if needs_uncond(g) and not together else 1 for g in job.schedule.guidance]
    return [n * spec.dit.layers for n in passes]


def visiting_order(job: Job, spec: ModelSpec, together: bool) -> list[BlockId]:
    """Every visit of a transformer block in the whole job: all steps, both experts."""
    each = step_visits(job, spec, together)
    return order_of(spec.expert_names(), spec.dit.layers, job.schedule.experts, each)


def order_of(names: Sequence[str], layers: int, experts: Sequence[int], each: Sequence[int]) -> list[BlockId]:
    """The blocks of the expert of every step, over and over: `each` visits in the step."""
    visits = zip(experts, each, strict=True)
    return [(names[e], n % layers) for e, count in visits for n in range(count)]
