"""Peak memory of a 14B forward at 1280x720, 121 frames, in each attention mode: the product's code on meta tensors.

One of the 40 blocks is run: the others repeat it. Weights are not counted, the residual stream and all
buffers are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lowvram.models import dit
from lowvram.models.self_attention import Workspace
from lowvram.models.token_order import compact_order
from lowvram.offload.budget import allocated_size
from lowvram.offload.estimate import peak_memory
from lowvram.quant.linear import Params
from lowvram.sampling.presets import model_preset
from lowvram.triton_kernels.keys import carve, stored_bytes
from lowvram.triton_kernels.modes import MODES
from lowvram.triton_kernels.ops import FUSED, TORCH, Ops

DTYPE = torch.bfloat16
BLOCKS = 1


def peaks() -> Iterator[dict[str, object]]:
    """One object a mode: mode, ops, peak_bytes, and what K and V take of it."""
    for mode in MODES.values():
        if mode.ours:
            for name, ops in (("torch", TORCH), ("fused", FUSED)):
                stored = sum(stored_bytes(mode, 40, 111_600, DTYPE))
                yield {
                    "model": "wan2.2-t2v-a14b", "tokens": 111_600, "mode": mode.name, "ops": name,
                    "peak_bytes": _peak(mode.name, ops), "keys_and_values": stored, "ok": True,
                }  # fmt: skip


def _peak(mode: str, ops: Ops) -> int:
    spec = replace(model_preset("wan2.2-t2v-a14b").dit, layers=BLOCKS)
    grid = (31, 45, 80)
    tokens = grid[0] * grid[1] * grid[2]
    with torch.device("meta"):
        params = Params({n: torch.empty(s, dtype=DTYPE) for n, s in spec.shapes().items()})
        time = dit.Time(torch.empty(1, spec.dim), torch.empty(1, 6, spec.dim), tokens)
        context = dit.Context(torch.empty(512, spec.dim, dtype=DTYPE), torch.empty(512))
        rope = torch.empty(tokens, 64, 2)
        order = compact_order(grid) if MODES[mode].keep < 1 else None
        latent = torch.empty(spec.in_channels, grid[0], 2 * grid[1], 2 * grid[2])

    def run(latent: Tensor) -> None:
        stored = (torch.empty(n, dtype=torch.uint8) for n in stored_bytes(MODES[mode], 40, tokens, DTYPE))
        work = Workspace(carve(MODES[mode], 40, tokens, DTYPE, *stored), DTYPE, ops=ops)
        dit.forward(params, params.blocks(BLOCKS), spec, latent, time, [context], rope, work, order=order)

    with torch.no_grad():
        return peak_memory(run, latent, rounding=allocated_size).peak_bytes
