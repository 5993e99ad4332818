"""The one Linear: an encoded weight, its bias, its LoRA branches.

Networks see parameters only through `Params`. Where the bytes came from, how they are encoded and where they
lie is settled before a network is called, so the same network code serves training, tests, resident and
streamed weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from lowvram.quant.encodings.base import Encoding


@dataclass(frozen=True, slots=True)
class Encoded:
    """A weight as it is stored: `parts` by role, decoded to numbers only when it is used."""

    encoding: Encoding
    shape: tuple[int, ...]
    """Logical shape, [out, in] for a Linear."""
    parts: Mapping[str, Tensor]

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight as a dense tensor of `shape` in `dtype`, newly allocated unless the parts already are it."""
        return self.encoding.decode(self.parts, self.shape, dtype)


@dataclass(frozen=True, slots=True)
class Branch:
    """One LoRA on one Linear: y += scale * up(down(x))."""

    down: Tensor
    """[rank, in]"""
    up: Tensor
    """[out, rank]"""
    scale: float
    """strength * alpha / rank"""


@dataclass(frozen=True, slots=True)
class Params:
    """Named parameters of a network or of one of its blocks."""

    tensors: Mapping[str, Tensor | Encoded]
    branches: Mapping[str, tuple[Branch, ...]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """The parameter `name` as a dense tensor in its stored precision (float32 if it is quantised)."""
        value = self.tensors[name]
        return value.decode(torch.float32) if isinstance(value, Encoded) else value

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.tensors else None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """The parameter `name` in `dtype`."""
        value = self.tensors[name]
        return value.decode(dtype) if isinstance(value, Encoded) else value.to(dtype)

    def linear(self, name: str, x: Tensor, rows: slice | None = None) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x: the Linear `name` with its bias and LoRA branches.

        rows: only these outputs are computed, as if the weight had no others.
        """
        keep = slice(None) if rows is None else rows
        bias = self.dense(f"{name}.bias", x.dtype)[keep] if f"{name}.bias" in self.tensors else None
        y = functional.linear(x, self.dense(f"{name}.weight", x.dtype)[keep], bias)
        for branch in self.branches.get(name, ()):
            down = functional.linear(x, branch.down.to(x.dtype))
            y = y.add_(functional.linear(down, branch.up[keep].to(x.dtype)), alpha=branch.scale)
        return y

    def scope(self, prefix: str) -> Params:
        """The parameters whose names start with `prefix`, under their names without it."""
        n = len(prefix)
        return Params(
            {k[n:]: v for k, v in self.tensors.items() if k.startswith(prefix)},
            {k[n:]: v for k, v in self.branches.items() if k.startswith(prefix)},
        )

    def blocks(self, count: int) -> Iterable[Params]:
        """The scopes `blocks.0.` to `blocks.<count-1>.`."""
        return [self.scope(f"blocks.{n}.") for n in range(count)]
