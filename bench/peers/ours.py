"""lowvram on the same work: its own network, its own stream."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch
from programs import Forward, Mode
from sizes import Work
from torch import Tensor

ROUNDS = 64
"""Forwards that a stream is told of; fewer may be asked for."""


def streamed(work: Work, stack: ExitStack, where: str) -> Forward:
    from lowvram.model import Transformer
    from lowvram.models import dit
    from lowvram.models.self_attention import plain_workspace
    from lowvram.offload.device import CpuDevice
    from lowvram.offload.io import FileReader
    from lowvram.offload.placement import Placement
    from lowvram.offload.slab import as_bytes, build_layout, carve, read_runs
    from lowvram.offload.stream import BlockStream
    from lowvram.quant.identify import identify_path
    from lowvram.quant.spec import HEAD_DIM, DitSpec
    from lowvram.stages.weights import to_params
    from lowvram.survey import identify
    from lowvram.triton_kernels import dispatch
    from lowvram.triton_kernels.ops import FUSED

    found = identify_path(work.folder / "transformer", FileReader, "dit")
    spec = found.spec
    assert isinstance(spec, DitSpec)
    device: Any = CpuDevice()
    if work.device.type == "cuda":
        from lowvram.offload.cuda import CudaDevice

        total = torch.cuda.get_device_properties(work.device).total_memory
        device = stack.enter_context(closing(CudaDevice(0, work.cap or total)))
    groups = Transformer(found.refs).groups()
    layouts = {("x", n): build_layout(groups[f"blocks.{n}"].refs) for n in range(spec.layers)}
    place = Placement(dict.fromkeys(layouts, where), slots=2, ring=2)  # type: ignore[arg-type]
    stream = stack.enter_context(BlockStream(layouts, place, device, FileReader, list(layouts) * ROUNDS))
    ends = build_layout(groups["outer"].refs)
    slab = torch.empty(ends.nbytes, dtype=torch.uint8)
    for run in read_runs(ends):
        with FileReader(run.file) as reader:
            reader.read_into(run.file_offset, as_bytes(slab)[run.slab_offset : run.slab_offset + run.nbytes])
    outer = to_params(groups["outer"], carve(ends, slab.to(work.device)))
    latent, t, text = work.inputs()
    _, _, f, height, width = latent.shape
    tokens = f * height * width // 4
    row = dit.embed_time(outer, spec, t.double(), tokens)
    # diffusers attends to the rows it is given and no others
    rows = outer.linear("text_embedding.0", text[0])
    rows = outer.linear("text_embedding.2", torch.nn.functional.gelu(rows, approximate="tanh"))
    context = dit.Context(rows, torch.zeros(rows.shape[0], device=work.device))
    rope = dit.rope_table(f, height // 2, width // 2, device=work.device)
    k, v = (torch.empty(spec.heads, tokens, HEAD_DIM, dtype=work.dtype, device=work.device) for _ in "kv")
    space = plain_workspace(k, v)
    if work.device.type == "cuda" and not dispatch.ops_obstacle(work.device, identify().arch):
        space = replace(space, ops=FUSED)

    def forward() -> Tensor:
        blocks = (to_params(groups[f"blocks.{n}"], next(stream)[1]) for n in range(spec.layers))
        return dit.forward(outer, blocks, spec, latent[0], row, (context,), rope, space)[0][None]

    return forward


MODES: Mapping[str, Mode] = {
    "lowvram resident": lambda w, s: streamed(w, s, "resident"),
    "lowvram ram": lambda w, s: streamed(w, s, "ram"),
    "lowvram disk": lambda w, s: streamed(w, s, "disk"),
}
