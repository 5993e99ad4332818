"""Stored tensors as the parameters of a network: from views into a slab to `Params`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.model import Group, branch_name
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.linear import Branch, Encoded, Params

Views = Mapping[str, Mapping[str, Tensor]]
"""Parts by tensor name and role, as `lowvram.offload.slab.carve` gives them."""


def to_params(group: Group, views: Views) -> Params:
    """The parameters of `group`, whose parts are `views`. Nothing is copied."""
    tensors: dict[str, Tensor | Encoded] = {}
    for ref in group.refs:
        parts = views[ref.name]
        plain = isinstance(ref.encoding, Plain)
        tensors[ref.name] = (
            parts["weight"].view(ref.shape) if plain else Encoded(ref.encoding, ref.shape, parts)
        )
    branches = {}
    for linear, scales in group.branches.items():
        found = []
        for i, scale in enumerate(scales):
            down, up = (tensors.pop(branch_name(linear, i, role)) for role in ("down", "up"))
            assert isinstance(down, Tensor) and isinstance(up, Tensor)
            found.append(Branch(down, up, scale))
        branches[linear] = tuple(found)
    return Params(tensors, branches)


@dataclass(frozen=True, slots=True)
class Dense(Mapping[str, Tensor]):
    """Parameters as tensors of one dtype, converted when they are asked for and kept no longer than used."""

    params: Params
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.params.dense(name, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.params.tensors)

    def __len__(self) -> int:
        return len(self.params.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.params.tensors
