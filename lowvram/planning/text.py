"""The text stage: the encoder's layers pass once, one after the other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from lowvram import footprint
from lowvram.model import Group, Model, kinds
from lowvram.offload.budget import Budget, allocated_size
from lowvram.offload.placement import Traffic, plan_traffic
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan
from lowvram.planning.visits import all_on_disk, layouts_of
from lowvram.quant.spec import numel


def text_groups(model: Model) -> dict[str, Group]:
    """The text encoder's layers and what is outside of them, grouped like a transformer's."""
    groups: dict[str, list[Any]] = {}
    for name, ref in model.text.items():
        key, inner = (
            (".".join(name.split(".", 2)[:2]), name.split(".", 2)[2])
            if name.startswith("blocks.")
            else ("outer", name)
        )
        groups.setdefault(key, []).append(replace(ref, name=inner))
    return {key: Group(tuple(refs), {}) for key, refs in groups.items()}


def plan_text(facts: Facts, budget: Budget) -> tuple[StagePlan]:
    """One slot, one ring buffer, the rows of every prompt.

    If the prompts' features are kept from an earlier job, no byte is moved. The memory is planned all the same, for what
    is kept may turn out to be damaged.
    """
    return (facts.once(_text),)


def _streamed(model: Model) -> tuple[list[Group], Traffic, int]:
    """One layer of every make, and the passage of all of them."""
    groups = text_groups(model)
    layouts = layouts_of(groups, "text")
    layers = kinds(group for key, group in groups.items() if key != "outer")
    traffic = plan_traffic(layouts, all_on_disk(layouts), list(layouts))
    return layers, traffic, sum(layout.nbytes for layout in layouts.values())


def _text(facts: Facts) -> StagePlan:
    spec, lengths = facts.spec.text, facts.lengths
    layers, traffic, nbytes = facts.of_model(_streamed)
    rows = max(lengths)
    scratch = max(
        facts.measured(
            partial(footprint.text_scratch, spec, layer, rows, facts.dtype),
            "text", layer.kind, rows, facts.dtype,
        )
        for layer in layers
    )  # fmt: skip
    claims = traffic.device_claims(facts.footprint) | {
        "text rows": 2 * sum(allocated_size(n * spec.dim * facts.dtype.itemsize) for n in lengths),
        "text scratch": scratch,
    }
    flops = 2 * sum(lengths) * sum(numel(s) for s in spec.layer_shapes().values()) * spec.layers
    machine = facts.machine
    stage = StagePlan(
        "text",
        spec.layers,
        facts.context | claims,
        facts.host(facts.state | traffic.host_claims()),
        nbytes,
        nbytes,
        max(flops / machine.matmul, nbytes / machine.link, nbytes / machine.disk),
    )
    if facts.text_cached:
        why = {"text": "cached: these prompts were encoded before, the text encoder is not loaded"}
        return replace(stage, steps=1, disk_read=0, h2d=0, seconds=0.0, choices=why)
    return stage
