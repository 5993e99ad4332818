"""Pictures -> CLIP tokens, for the transformers that have a branch for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lowvram import footprint
from lowvram.conditions.contract import resting
from lowvram.model import Group, Model
from lowvram.models import clip
from lowvram.offload.budget import allocated_size
from lowvram.offload.placement import BlockId, Traffic, plan_traffic
from lowvram.offload.slab import BlockLayout, build_layout
from lowvram.planning.facts import Facts
from lowvram.planning.plan import StagePlan
from lowvram.planning.visits import all_on_disk
from lowvram.quant.spec import ClipSpec, numel
from lowvram.stages.run import Run


def clip_groups(model: Model, spec: ClipSpec) -> list[Group]:
    """What the tower is used of, in its order: what is outside the layers, then layer by layer."""
    outer = [ref for name, ref in model.clip.items() if not name.startswith(("blocks.", "post_norm."))]
    groups = [Group(tuple(outer), {})]
    for n in range(clip.layers_used(spec)):
        prefix = f"blocks.{n}."
        refs = (
            replace(ref, name=name[len(prefix) :])
            for name, ref in model.clip.items()
            if name.startswith(prefix)
        )
        groups.append(Group(tuple(refs), {}))
    return groups


def _layouts(groups: Sequence[Group]) -> dict[BlockId, BlockLayout]:
    return {("clip", n): build_layout(group.refs) for n, group in enumerate(groups)}


def _streamed(model: Model, spec: ClipSpec) -> tuple[list[Group], Traffic, int]:
    groups = clip_groups(model, spec)
    layouts = _layouts(groups)
    traffic = plan_traffic(layouts, all_on_disk(layouts), list(layouts))
    return groups, traffic, sum(layout.nbytes for layout in layouts.values())


def image_bytes(facts: Facts) -> dict[str, int]:
    """What `clip_tokens` makes for the model, as `Conditioning.makes` says it; nothing if it has no CLIP."""
    spec = facts.spec.dit
    nbytes = spec.image_tokens * spec.image_dim * facts.dtype.itemsize
    return {"image": nbytes} if nbytes else {}


def plan_clip(facts: Facts, pictures: int, host: Mapping[str, int]) -> StagePlan:
    """The stage "clip": the tower streams past `pictures` pictures. host: claims of the pictures and of what is made."""
    spec = facts.spec.clip
    assert spec is not None
    groups, traffic, nbytes = facts.of_model(_streamed, spec)
    rows = pictures * allocated_size(spec.tokens * spec.dim * facts.dtype.itemsize)
    shown = allocated_size(12 * spec.side**2)  # a picture as the tower takes it
    embed, layer = (
        facts.measured(partial(measure, spec, group, facts.dtype), "clip", spec, group.kind, facts.dtype)
        for measure, group in zip(
            (footprint.clip_embed_scratch, footprint.clip_layer_scratch), groups[:2], strict=True
        )
    )
    # Pictures become rows one by one: most is held before the first does, before the last does, or in the layers.
    peak = max(embed + pictures * shown, embed + shown + rows - rows // pictures, layer + rows)
    claims = traffic.device_claims(facts.footprint) | {
        "clip rows": rows,
        "clip scratch": peak - rows,
    }
    parameters = sum(numel(s) for s in spec.layer_shapes().values()) * clip.layers_used(spec)
    machine = facts.machine
    return StagePlan(
        "clip",
        len(groups),
        resting(facts) | claims,
        facts.host({**facts.state, **traffic.host_claims(), **host}),
        nbytes,
        nbytes,
        max(
            2 * pictures * spec.tokens * parameters / machine.matmul,
            nbytes / machine.link,
            nbytes / machine.disk,
        ),
    )


@torch.inference_mode()
def clip_tokens(run: Run, model: Model, pictures: Iterable[Tensor]) -> Tensor:
    """Pictures [3, H, W] in -1..1 on the host -> tokens [257 each, dim] in the compute dtype on the host."""
    spec, dtype, device = model.spec.clip, run.plan.dtype, run.device.torch_device
    assert spec is not None
    groups = clip_groups(model, spec)
    with run.stage("clip") as (_, traffic):
        rows = [clip.preprocess(spec, picture).to(device) for picture in pictures]
        with run.streamed(_layouts(groups), traffic) as stream:
            for (_, n), views in stream:
                run.check_ram()
                p = run.params(groups[n], views)
                for i, x in enumerate(rows):
                    rows[i] = clip.layer(p, spec, x) if n else clip.embed(p, spec, x, dtype)
                run.step("clip")
        return torch.cat([x.cpu() for x in rows])
