"""Prompts -> text features. The vocabulary stays on disk: only the rows a prompt needs are read."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.model import Group, Model
from lowvram.models import umt5
from lowvram.offload.stream import BlockStream
from lowvram.planning.text import text_groups
from lowvram.planning.visits import all_on_disk, layouts_of
from lowvram.quant.rows import gather_rows
from lowvram.stages.run import Run
from lowvram.stages.weights import to_params
from lowvram.tokenizer import tokenize


@torch.inference_mode()
def encode(run: Run, model: Model, prompts: list[str]) -> list[Tensor]:
    """Text features [n, text_dim] of each prompt, on the device, in the compute dtype; n counts its true tokens."""
    ids = tokenize(model, prompts)
    groups = text_groups(model)
    table = next(ref for ref in groups["outer"].refs if ref.name == "token_embedding.weight")
    dtype, device = run.plan.dtype, run.device.torch_device
    with run.stage("text") as (stack, traffic):
        rows = [gather_rows(table, i, run.open_reader, dtype).to(device) for i in ids]
        buckets = [umt5.relative_buckets(len(i), device) for i in ids]
        layouts = layouts_of(groups, "text")
        stream = stack.enter_context(
            BlockStream(
                layouts, all_on_disk(layouts), run.device, run.open_reader, list(layouts), clock=run.clock
            )
        )
        for (_, n), views in stream:
            p = to_params(groups[f"blocks.{n}"], views)
            rows = [umt5.layer(p, model.spec.text, x, b) for x, b in zip(rows, buckets, strict=True)]
            run.step("text")
        traffic.add(stream)
        stream.close()
        norm = Group(tuple(r for r in groups["outer"].refs if r.name == "norm.weight"), {})
        with run.loaded("norm", norm, traffic) as p:
            return [umt5.rms_norm(x, p["norm.weight"]) for x in rows]
