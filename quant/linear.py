"""The one Linear: an encoded weight, its bias, its LoRA branches.

Networks see parameters only through `Params`. Where the bytes came from, how they are encoded and where they
lie is settled before a network is called, so the same network code serves training, tests, resident and
streamed weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
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
    """strength * alpha / rank; with `dora`, whose strength is its own, alpha / rank"""
    dora: Dora | None = None

    def copied(self) -> Branch:
        dora = self.dora and replace(self.dora, magnitude=self.dora.magnitude.clone())
        return Branch(self.down.clone(), self.up.clone(), self.scale, dora)


@dataclass(frozen=True, slots=True)
class Dora:
    """What makes a LoRA branch a DoRA: the magnitudes of the rows, or of the columns, of the changed weight."""

    magnitude: Tensor
    """[out, 1] or [1, in]"""
    strength: float
    of_base: bool
    """Whether directions of rows are measured on the base weight (ComfyUI), not on the changed one (peft)."""

    def apply(self, weight: Tensor, change: Tensor) -> Tensor:
        """weight [out, in] and alpha / rank * up @ down, float32 -> W + strength * (V * magnitude / |V| - W), V their
        sum (ComfyUI `comfy/weight_adapter/base.py`, peft `tuners/lora/dora.py`)."""
        changed = weight + change
        rows = self.magnitude.shape[0] == weight.shape[0]
        measured = weight if rows and self.of_base else changed
        norm = measured.norm(dim=1 if rows else 0, keepdim=True)
        factor = self.magnitude.to(torch.float32) / norm.clamp_(min=torch.finfo(torch.float32).eps)
        return weight.lerp(changed.mul_(factor), self.strength)


@dataclass(frozen=True, slots=True)
class Delta:
    """A difference for one whole parameter: value += strength * delta."""

    delta: Tensor
    """Of as many elements as the parameter."""
    strength: float


@dataclass(frozen=True, slots=True)
class Params:
    """Named parameters of a network or of one of its blocks, with what LoRAs add to them."""

    tensors: Mapping[str, Tensor | Encoded]
    branches: Mapping[str, tuple[Branch, ...]] = field(default_factory=dict)
    """By name of a Linear."""
    deltas: Mapping[str, tuple[Delta, ...]] = field(default_factory=dict)
    """By name of a parameter."""

    def __getitem__(self, name: str) -> Tensor:
        """The parameter `name` as a dense tensor in its stored precision; in float32 if it is quantised or changed."""
        value = self.tensors[name]
        if isinstance(value, Encoded) or name in self.deltas:
            return self.dense(name, torch.float32)
        return value

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.tensors else None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """The parameter `name` in `dtype`. What is added to it is added in float32, and the sum rounded once."""
        value = self.tensors[name]
        deltas = self.deltas.get(name, ())
        wide = torch.float32 if deltas else dtype
        dense = value.decode(wide) if isinstance(value, Encoded) else value.to(wide)
        for delta in deltas:
            # Not in place: a float32 parameter is the slab's own memory.
            dense = dense.add(delta.delta.to(wide).view(dense.shape), alpha=delta.strength)
        return dense.to(dtype)

    def linear(self, name: str, x: Tensor, rows: slice | None = None) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x: the Linear `name` with its bias and LoRA branches.

        A convolution whose kernel is as large as its stride is a Linear on patches. rows: only these outputs are
        computed, as if the weight had no others.
        """
        keep = slice(None) if rows is None else rows
        bias = self.dense(f"{name}.bias", x.dtype)[keep] if f"{name}.bias" in self.tensors else None
        y = functional.linear(x, self._weight(name, x.dtype)[keep], bias)
        for branch in self.branches.get(name, ()):
            if branch.dora is None:
                down = functional.linear(x, branch.down.flatten(1).to(x.dtype))
                y = y.add_(
                    functional.linear(down, branch.up.flatten(1)[keep].to(x.dtype)), alpha=branch.scale
                )
        return y

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """The matrix [out, in] of a Linear, changed by its DoRA branches: they have no meaning beside the weight."""
        doras = [b for b in self.branches.get(name, ()) if b.dora is not None]
        weight = self.dense(f"{name}.weight", torch.float32 if doras else dtype).flatten(1)
        for branch in doras:
            assert branch.dora is not None
            change = branch.up.flatten(1).to(torch.float32) @ branch.down.flatten(1).to(torch.float32)
            weight = branch.dora.apply(weight, change.mul_(branch.scale))
        return weight.to(dtype)

    def copied(self, prefixes: tuple[str, ...]) -> Params:
        """A copy of the parameters whose names start with one of `prefixes`, differences added: it stays when the
        memory they lie in is used for something else."""
        return Params(
            {k: self[k].clone() for k in self.tensors if k.startswith(prefixes)},
            {
                k: tuple(b.copied() for b in v)
                for k, v in self.branches.items()
                if f"{k}.".startswith(prefixes)
            },
        )

    def scope(self, prefix: str) -> Params:
        """The parameters whose names start with `prefix`, under their names without it."""
        n = len(prefix)
        return Params(
            {k[n:]: v for k, v in self.tensors.items() if k.startswith(prefix)},
            {k[n:]: v for k, v in self.branches.items() if k.startswith(prefix)},
            {k[n:]: v for k, v in self.deltas.items() if k.startswith(prefix)},
        )

    def blocks(self, count: int) -> Iterable[Params]:
        """The scopes `blocks.0.` to `blocks.<count-1>.`."""
        return [self.scope(f"blocks.{n}.") for n in range(count)]
