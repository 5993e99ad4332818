"""How fast the operations between multiplications are, beside a copy: the bytes that have to move at the rate they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowvram.bench.dequant_rates import rate
from lowvram.bench.results import Fact
from lowvram.triton_kernels.modes import PRODUCTS
from lowvram.triton_kernels.ops import FUSED, TORCH
from lowvram.triton_kernels.tiles import arch_of

TOKENS, WIDTH, HIDDEN = 32_760, 5120, 13824
"""Of a 14B model at 832x480 with 81 frames: no cache holds them."""
FRAME = (96, 720, 1280)
Work = tuple[int, Callable[[], object]]


def compare(kind: str, *, small: bool) -> Iterator[dict[str, Fact]]:
    """Share of a copy's rate of every operation, what is known so far after each: kernels on a card, torch elsewhere. Bytes
    are what an operation has to read and write once."""
    device = torch.device(kind)
    n, width, hidden, frame = (48, 256, 512, (32, 8, 12)) if small else (TOKENS, WIDTH, HIDDEN, FRAME)
    x = torch.ones(n, width, dtype=torch.bfloat16, device=device)
    y = torch.ones_like(x)
    copy = rate(lambda: y.copy_(x), 2 * x.nbytes, kind)
    facts: dict[str, Fact] = {"copy: bytes/s": copy}
    for name, (nbytes, run) in _works(x, y, hidden, frame).items():
        facts[f"{name}: share of a copy's rate"] = rate(run, nbytes, kind) / copy
        yield dict(facts)


def _works(x: Tensor, y: Tensor, hidden: int, frame: tuple[int, int, int]) -> dict[str, Work]:
    """By name: bytes that move, and what moves them."""
    ops, (n, width) = FUSED if x.is_cuda else TORCH, x.shape
    row, weight = (torch.zeros(size, device=x.device) for size in ((1, width), (width,)))
    rope, factor = torch.ones(n, 64, 2, device=x.device), torch.ones(n, 1, device=x.device)
    h = torch.ones(n, hidden, dtype=x.dtype, device=x.device)
    rows = x.new_empty(width // 128, n, 128)
    q8, scale = torch.empty_like(rows, dtype=torch.int8), factor.new_empty(width // 128, n)
    v16, runs = (
        torch.empty_like(rows, dtype=torch.float16),
        factor.new_empty(width // 128, -(-n // 1024), 128),
    )
    channels, height, columns = frame
    pixels = x.new_ones(1, 1, height, columns, channels).permute(0, 4, 1, 2, 3)
    found: dict[str, Work] = {
        "rms_factor": (x.nbytes, lambda: ops.rms_factor(x)),
        "norm_rope": (2 * x.nbytes + rope.nbytes, lambda: ops.norm_rope_(rows, x, weight, rope, None)),
        "norm_rope_int8": (
            x.nbytes + q8.nbytes + scale.nbytes + rope.nbytes,
            lambda: ops.norm_rope_int8_(q8, scale, x, weight, rope, factor, None),
        ),
        "quantise_values": (2 * x.nbytes, lambda: ops.quantise_values_(v16, runs, x, "fp16")),
        "modulate": (2 * x.nbytes, lambda: ops.modulate(x, row, row)),
        "gated": (3 * x.nbytes, lambda: ops.gated_(y, x, row)),
        "gelu": (2 * h.nbytes, lambda: ops.gelu(h)),
        "rms_silu": (2 * pixels.nbytes, lambda: ops.rms_silu(pixels, weight[:channels], None)),
    }
    for form, product in PRODUCTS.items():
        if not x.is_cuda or arch_of(x.device) in product.archs:
            by, group = ops.w8a8(form), 256 if form == "int8" else 0
            found |= {
                f"quantise, {form}": (3 * n * width, lambda by=by, g=group: by.quantise(x, g)),  # type: ignore[misc]
                f"modulate and quantise, {form}": (
                    3 * n * width,
                    lambda by=by, g=group: by.modulate(x, row, row, g),  # type: ignore[misc]
                ),
                f"gelu and quantise, {form}": (3 * n * hidden, lambda by=by, g=group: by.gelu(h, g)),  # type: ignore[misc]
            }
    return found
