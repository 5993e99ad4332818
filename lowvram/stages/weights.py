"""Stored tensors as the parameters of a network: from views into a slab to `Params`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram.model import Group, branch_name, delta_name
from lowvram.quant.branches import Delta, Dora, branch_of
from lowvram.quant.encodings.base import Encoding
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.linear import Encoded, Params

Views = Mapping[str, Mapping[str, Tensor]]
"""Parts by tensor name and role, as `lowvram.offload.slab.carve` gives them."""


def to_params(group: Group, views: Views, by_kernel: frozenset[Encoding] = frozenset()) -> Params:
    """The parameters of `group`, whose parts are `views`; kernels decode the encodings `by_kernel`. Nothing is copied."""
    tensors: dict[str, Tensor | Encoded] = {}
    for ref in group.refs:
        parts = views[ref.name]
        plain = isinstance(ref.encoding, Plain)
        tensors[ref.name] = (
            parts["weight"].view(ref.shape)
            if plain
            else Encoded(ref.encoding, ref.shape, parts, ref.encoding in by_kernel)
        )

    def taken(name: str) -> Tensor:
        value = tensors.pop(name)
        assert isinstance(value, Tensor)
        return value

    branches = {}
    for linear, scales in group.branches.items():
        found = []
        for i, scale in enumerate(scales):
            factors = {role: taken(branch_name(linear, i, role)) for role in scale.roles}
            dora = None
            if scale.dora is not None:
                dora = Dora(taken(branch_name(linear, i, "magnitude")), scale.dora, scale.of_base)
            found.append(branch_of(factors, scale.scale, dora))
        branches[linear] = tuple(found)
    deltas = {
        name: tuple(Delta(taken(delta_name(name, i)), strength) for i, strength in enumerate(strengths))
        for name, strengths in group.deltas.items()
    }
    return Params(tensors, branches, deltas)


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
