"""Peak memory of a 14B forward at 1280x720, 121 frames, in each mode: the product's code on meta tensors.

One of the 40 blocks is run: the others repeat it. Weights are not counted, the residual stream and all
buffers are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowvram.matmul import as_multiplied
from lowvram.models import dit
from lowvram.models.self_attention import Workspace
from lowvram.models.token_order import compact_order
from lowvram.offload.budget import allocated_size
from lowvram.offload.estimate import peak_memory
from lowvram.quant.encodings.base import TORCH_DTYPES, Encoding
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.int8 import Int8
from lowvram.quant.linear import Encoded, Params
from lowvram.sampling.presets import model_preset
from lowvram.triton_kernels.keys import carve, stored_bytes
from lowvram.triton_kernels.modes import MODES, Matmul
from lowvram.triton_kernels.ops import FUSED, TORCH, Ops

DTYPE = torch.bfloat16
BLOCKS = 1
STORED: Mapping[str, Encoding | None] = {"exact": None, "int8": Int8(group=256), "fp8": Fp8("F8_E4M3", "row")}
"""How the Linears of the blocks are stored, by how they multiply."""


def peaks() -> Iterator[dict[str, object]]:
    """One object an attention mode, a way to multiply and an implementation: peak_bytes, and what K and V take of it."""
    for mode in MODES.values():
        if mode.ours:
            for (matmul, encoding), (name, ops) in itertools.product(
                STORED.items(), (("torch", TORCH), ("fused", FUSED))
            ):
                stored = sum(stored_bytes(mode, 40, 111_600, DTYPE))
                yield {
                    "model": "wan2.2-t2v-a14b", "tokens": 111_600, "mode": mode.name, "matmul": matmul, "ops": name,
                    "peak_bytes": _peak(mode.name, Matmul(matmul), encoding, ops), "keys_and_values": stored, "ok": True,
                }  # fmt: skip


def _weight(name: str, shape: tuple[int, ...], encoding: Encoding | None) -> Tensor | Encoded:
    if encoding is None or not name.startswith("blocks.") or not name.endswith(".weight") or len(shape) != 2:
        return torch.empty(shape, dtype=DTYPE)
    parts = {p.role: torch.empty(p.shape, dtype=TORCH_DTYPES[p.dtype]) for p in encoding.layout(shape)}
    return Encoded(encoding, shape, parts)


def _peak(mode: str, matmul: Matmul, encoding: Encoding | None, ops: Ops) -> int:
    spec = replace(model_preset("wan2.2-t2v-a14b").dit, layers=BLOCKS)
    grid = (31, 45, 80)
    tokens = grid[0] * grid[1] * grid[2]
    with torch.device("meta"):
        params = Params({n: _weight(n, s, encoding) for n, s in spec.shapes().items()})
        time = dit.Time(torch.empty(1, spec.dim), torch.empty(1, 6, spec.dim), tokens)
        context = dit.Context(torch.empty(512, spec.dim, dtype=DTYPE), torch.empty(512))
        rope = torch.empty(tokens, 64, 2)
        order = compact_order(grid) if MODES[mode].keep < 1 else None
        latent = torch.empty(spec.in_channels, grid[0], 2 * grid[1], 2 * grid[2])

    def run(latent: Tensor) -> None:
        stored = (torch.empty(n, dtype=torch.uint8) for n in stored_bytes(MODES[mode], 40, tokens, DTYPE))
        work = Workspace(carve(MODES[mode], 40, tokens, DTYPE, *stored), DTYPE, ops=ops)
        blocks = (as_multiplied(p, matmul, ops, DTYPE) for p in params.blocks(BLOCKS))
        dit.forward(params, blocks, spec, latent, time, [context], rope, work, order=order)

    with torch.no_grad():
        return peak_memory(run, latent, rounding=allocated_size).peak_bytes
