"""What LoRAs add to a Linear: low-rank branches beside its weight, changes of the weight itself, whole differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


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
class Branch:
    """One LoRA on one Linear: y += scale * up(down(x))."""

    down: Tensor
    """[rank, in]"""
    up: Tensor
    """[out, rank]"""
    scale: float
    """strength * alpha / rank; with `dora`, whose strength is its own, alpha / rank"""
    dora: Dora | None = None

    @property
    def is_beside(self) -> bool:
        """Whether it is added to what the Linear gives, and leaves the weight as it is."""
        return self.dora is None

    def change(self) -> Tensor:
        """What it adds to the weight, [out, in] in float32, without `scale`."""
        return _product((self.up, self.down))

    def copied(self) -> Branch:
        dora = self.dora and replace(self.dora, magnitude=self.dora.magnitude.clone())
        return Branch(self.down.clone(), self.up.clone(), self.scale, dora)


@dataclass(frozen=True, slots=True)
class Combined:
    """One LoKr or LoHa on one Linear: what two matrices make together is added to the weight (LyCORIS)."""

    how: Literal["kron", "hada"]
    """Kronecker product, LoKr; product of the elements, LoHa"""
    first: tuple[Tensor, ...]
    """A matrix, or two whose product it is."""
    second: tuple[Tensor, ...]
    scale: float
    """As that of `Branch`."""
    dora: Dora | None = None
    is_beside = False

    def change(self) -> Tensor:
        """What it adds to the weight, [out, in] in float32, without `scale`."""
        first, second = _product(self.first), _product(self.second)
        return torch.kron(first, second) if self.how == "kron" else first.mul_(second)

    def copied(self) -> Combined:
        first, second = (tuple(t.clone() for t in factors) for factors in (self.first, self.second))
        dora = self.dora and replace(self.dora, magnitude=self.dora.magnitude.clone())
        return Combined(self.how, first, second, self.scale, dora)


@dataclass(frozen=True, slots=True)
class Delta:
    """A difference for one whole parameter: value += strength * delta."""

    delta: Tensor
    """Of as many elements as the parameter."""
    strength: float


def branch_of(factors: Mapping[str, Tensor], scale: float, dora: Dora | None) -> Branch | Combined:
    """The branch that these factors make, by their roles in `lowvram.quant.lora`."""
    if "down" in factors:
        return Branch(factors["down"], factors["up"], scale, dora)
    how: Literal["kron", "hada"] = "kron" if next(iter(factors)).startswith("lokr") else "hada"
    first, second = (tuple(t for role, t in factors.items() if f"_w{n}" in role) for n in (1, 2))
    return Combined(how, first, second, scale, dora)


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    """A matrix, or the product of two, in float32 and memory of its own; a convolution's as a matrix on patches."""
    if len(factors) == 1:
        return factors[0].flatten(1).to(torch.float32, copy=True)
    up, down = (factor.flatten(1).to(torch.float32) for factor in factors)
    return up @ down
