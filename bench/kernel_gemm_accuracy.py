"""Error of 8-bit multiplication on synthetic data that holds what real activations hold: its arithmetic in torch.

256 bfloat16 tokens of width 4096, a weight of 512 rows from Student's t of 6 degrees of freedom. The error is the relative
L2 distance of the product from that of the unquantised tensors in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from lowvram.quant.encodings.base import Encoding
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.int8 import Int8
from lowvram.triton_kernels.fp8_gemm import fp8_linear
from lowvram.triton_kernels.gemm import LowRank, QuantisedMatrix, int8_linear, low_rank
from lowvram.triton_kernels.quantise import QuantisedRows, quantise

TOKENS, WIDTH, ROWS, RANK = 256, 4096, 512, 64
BOUND = 0.02
"""What rotated int8 weights and activations promise; the others promise nothing."""


def gaussian(x: Tensor, g: Generator) -> Tensor:
    return x


def modulated(x: Tensor, g: Generator) -> Tensor:
    """Channels of log-normal size, six of them 15 times as large: what a norm and its modulation give."""
    size = torch.exp(0.5 * torch.randn(WIDTH, generator=g))
    size[torch.randperm(WIDTH, generator=g)[:6]] *= 15
    return x * size


def activated(x: Tensor, g: Generator) -> Tensor:
    """After GELU, four channels ten times as large."""
    y = torch.nn.functional.gelu(x, approximate="tanh")
    y[:, torch.randperm(WIDTH, generator=g)[:4]] *= 10
    return y


def tokens(x: Tensor, g: Generator) -> Tensor:
    """Every 40th token 30 times as large."""
    x[::40] *= 30
    return x


Linear = Callable[[QuantisedRows, QuantisedMatrix, Tensor | None, LowRank | None], Tensor]
MODES: tuple[tuple[str, Encoding, Linear, float | None], ...] = (
    ("int8_convrot", Int8(group=256), int8_linear, BOUND),
    ("int8", Int8(), int8_linear, None),
    ("fp8_row", Fp8("F8_E4M3", "row"), fp8_linear, None),
)
DATA: tuple[Callable[[Tensor, Generator], Tensor], ...] = (gaussian, modulated, activated, tokens)


def errors(quick: bool) -> Iterator[dict[str, object]]:
    """One object a mode and data: 8-bit activations on weights of MODES, what a LoRA of RANK adds to them, and, for
    comparison, exact activations on the same weights. quick: the first data only."""
    for data in DATA[: 1 if quick else None]:
        g = torch.Generator().manual_seed(0)
        weight = _student(g) / WIDTH**0.5
        x = data(torch.randn(TOKENS, WIDTH, generator=g), g).bfloat16()
        exact = x.double() @ weight.double().mT
        down, up = torch.randn(RANK, WIDTH, generator=g) / WIDTH**0.5, torch.randn(ROWS, RANK, generator=g)
        for mode, encoding, linear, bound in MODES:
            form, group = encoding.w8a8, getattr(encoding, "group", 0)
            assert form is not None
            parts = encoding.encode(weight)
            matrix = encoding.w8a8_matrix(parts, (ROWS, WIDTH))
            rows = quantise(x.float(), group, form)
            got = linear(rows, matrix, None, None)
            yield _row(mode, data.__name__, got, exact, bound)
            lora = low_rank([quantise(down, group, form)], [up], [1.0])
            branch, exactly = (
                linear(rows, matrix, None, lora) - got,
                x.double() @ down.double().mT @ up.double().mT,
            )
            yield _row(f"{mode}, its LoRA", data.__name__, branch, exactly, bound)
            if mode != "int8":
                numbers = encoding.decode(parts, (ROWS, WIDTH), torch.float32)
                yield _row(f"{mode}, exact activations", data.__name__, x.float() @ numbers.mT, exact, None)


def _student(g: Generator) -> Tensor:
    """Student's t of 6 degrees of freedom: a normal over the root of a mean of six squares of others."""
    squares = torch.randn(6, ROWS, WIDTH, generator=g).square_().mean(0)
    return torch.randn(ROWS, WIDTH, generator=g) / squares.sqrt_()


def _row(mode: str, data: str, got: Tensor, exact: Tensor, bound: float | None) -> dict[str, object]:
    error = float((got.double() - exact).norm() / exact.norm())
    return {
        "op": "linear", "mode": mode, "data": data, "relative_error": round(error, 5), "bound": bound,
        "ok": bound is None or error <= bound,
    }  # fmt: skip
