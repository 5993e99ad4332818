"""The one Linear: an encoded weight, its bias, its LoRA branches.

Networks see parameters only through `Params`. Where the bytes came from, how they are encoded and where they
lie is settled before a network is called, so the same network code serves training, tests, resident and
streamed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.quant import fused
from lowvram.quant.branches import Branch, Combined, Delta
from lowvram.triton_kernels.gemm import LowRank, low_rank
from lowvram.triton_kernels.ops import W8A8Ops
from lowvram.triton_kernels.quantise import QuantisedRows

if TYPE_CHECKING:
    from lowvram.quant.encodings.base import Encoding


Gated = tuple[slice, Tensor]
"""A run of rows and the gate [1, out] that they share."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A weight as it is stored: `parts` by role, decoded to numbers only when it is used."""

    encoding: Encoding
    shape: tuple[int, ...]
    """Logical shape, [out, in] for a Linear."""
    parts: Mapping[str, Tensor]
    by_kernel: bool = False
    """Whether a kernel decodes it, to the same bits: `fused.choose` settles it."""

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight as a dense tensor of `shape` in `dtype`: in `out`, or newly allocated unless the parts are it."""
        if self.by_kernel:
            if out is None:
                out = next(iter(self.parts.values())).new_empty(self.shape, dtype=dtype)
            return fused.decode(self.encoding, self.parts, out)
        return self.encoding.decode(self.parts, self.shape, dtype, out)


@dataclass(frozen=True, slots=True)
class Multiplied(Encoded):
    """A weight of 8 bits that is multiplied as it is stored, by activations of the same form, as its LoRA is."""

    ops: W8A8Ops = field(kw_only=True)
    lora: LowRank | None = None

    @property
    def group(self) -> int:
        """Columns of the activations that are rotated together before they are quantised, or 0."""
        return self.encoding.w8a8_matrix(self.parts, self.shape).group

    def linear(self, x: Tensor | QuantisedRows, bias: Tensor | None) -> Tensor:
        """x [..., in] -> [..., out] in its dtype."""
        matrix = self.encoding.w8a8_matrix(self.parts, self.shape)
        rows = x if isinstance(x, QuantisedRows) else self.ops.quantise(x, matrix.group)
        return self.ops.linear(rows, matrix, bias, self.lora)

    def linear_gated_(
        self, x: Tensor | QuantisedRows, bias: Tensor | None, into: Tensor, gates: Iterable[Gated]
    ) -> None:
        """into [n, out] += linear(x [n, in]) * gate, run by run."""
        matrix = self.encoding.w8a8_matrix(self.parts, self.shape)
        rows = x if isinstance(x, QuantisedRows) else self.ops.quantise(x, matrix.group)
        for run, gate in gates:
            self.ops.linear_gated_(into[run], rows[run], matrix, bias, gate, self.lora)

    def of_rows(self, rows: slice) -> Multiplied:
        """As if it had only these outputs. Nothing is copied."""
        n = self.shape[0]
        parts = {
            role: part.reshape(n, -1)[rows] if part.numel() % n == 0 and part.dim() else part
            for role, part in self.parts.items()
        }
        lora = self.lora and replace(self.lora, up=self.lora.up[rows])
        return replace(self, shape=(parts["weight"].shape[0], self.shape[1]), parts=parts, lora=lora)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in] transposed, plus bias [out]: `functional.linear`, into `out` [..., out] unless a
    gradient is wanted."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return functional.linear(x, weight, bias)
    rows, columns = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(rows, weight.t(), out=columns)
    else:
        torch.addmm(bias, rows, weight.t(), out=columns)
    return out


_ALIGNMENT = 256
"""Bytes between the starts of unpacked weights: what matmul kernels read fastest from."""


@dataclass(frozen=True, slots=True)
class Params:
    """Named parameters of a network or of one of its blocks, with what LoRAs add to them."""

    tensors: Mapping[str, Tensor | Encoded]
    branches: Mapping[str, tuple[Branch | Combined, ...]] = field(default_factory=dict)
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

    def linear(self, name: str, x: Tensor | QuantisedRows) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x: the Linear `name` with its bias and LoRA branches.

        A convolution whose kernel is as large as its stride is a Linear on patches. `x` may be quantised if `takes` says so.
        """
        value, bias = self.tensors[f"{name}.weight"], self._bias(name, x.dtype)
        if isinstance(value, Multiplied):
            return value.linear(x, bias)
        assert isinstance(x, Tensor)
        # Before the dense weight, which it outlives: an allocator then has no hole below it.
        y = x.new_empty(*x.shape[:-1], value.shape[0])
        y = _multiply(x, self._weight(name, x.dtype), bias, y)
        for branch in self._beside(name):
            down = functional.linear(x, branch.down.flatten(1).to(x.dtype))
            y = y.add_(functional.linear(down, branch.up.flatten(1).to(x.dtype)), alpha=branch.scale)
        return y

    def linear_gated_(
        self,
        name: str,
        x: Tensor | QuantisedRows,
        into: Tensor,
        gates: Iterable[Gated],
        gated_: Callable[[Tensor, Tensor, Tensor], None],
    ) -> None:
        """into [n, out] += linear(name, x [n, in]) * gate, run by run; by `gated_` where that is not one operation."""
        value = self.tensors[f"{name}.weight"]
        if isinstance(value, Multiplied):
            value.linear_gated_(x, self._bias(name, x.dtype), into, gates)
            return
        y = self.linear(name, x)
        for run, gate in gates:
            gated_(into[run], y[run], gate)

    def takes(self, *names: str) -> Multiplied | None:
        """One of these Linears, to quantise their common input by, if all of them multiply 8-bit activations that are
        rotated alike; None if any of them takes activations as they are."""
        weights = [self.tensors[f"{name}.weight"] for name in names]
        ready = [value for value in weights if isinstance(value, Multiplied)]
        alike = len({value.group for value in ready}) == 1 and len(ready) == len(weights)
        return ready[0] if alike else None

    def multiplied(self, prefixes: tuple[str, ...], ops: W8A8Ops, dtype: torch.dtype) -> Params:
        """The same parameters; Linears whose names start with one of `prefixes` multiply as they are stored where that is
        the form of `ops`, with their LoRA branches, which are made ready here for activations of `dtype`.

        A weight that a difference, a DoRA, a LoKr or a LoHa changes is not what is stored any more: it is multiplied as numbers.
        """
        tensors, branches = dict(self.tensors), dict(self.branches)
        for name, value in self.tensors.items():
            if (
                isinstance(value, Encoded)
                and name.startswith(prefixes)
                and name.endswith(".weight")
                and len(value.shape) == 2
                and value.encoding.w8a8 == ops.form
                and not any(size % ops.multiple for size in value.shape)
                and not self._is_changed(name)
            ):
                weight = Multiplied(value.encoding, value.shape, value.parts, ops=ops)
                beside = self._beside(name.removesuffix(".weight"))
                branches.pop(name.removesuffix(".weight"), None)
                lora = _low_rank(beside, weight.group, ops, dtype) if beside else None
                tensors[name] = replace(weight, lora=lora)
        return replace(self, tensors=tensors, branches=branches)

    def _bias(self, name: str, dtype: torch.dtype) -> Tensor | None:
        return self.dense(f"{name}.bias", dtype) if f"{name}.bias" in self.tensors else None

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """The matrix [out, in] of a Linear, changed by those branches that are not beside it."""
        inside = [b for b in self.branches.get(name, ()) if not b.is_beside]
        weight = self.dense(f"{name}.weight", torch.float32 if inside else dtype).flatten(1)
        for branch in inside:
            change = branch.change().mul_(branch.scale)
            # Never in place on the weight: one of float32 is the slab's own memory.
            weight = change.add_(weight) if branch.dora is None else branch.dora.apply(weight, change)
        return weight.to(dtype)

    def slices(self, names: Iterable[str], dtype: torch.dtype, rows: slice | None = None) -> Params:
        """The Linears `names` alone, as if they had only the outputs `rows`; dense in `dtype` but those of 8 bits.

        For many uses in a row: a weight that is stored otherwise is made once, not at every use.
        """
        keep = slice(None) if rows is None else rows
        tensors: dict[str, Tensor | Encoded] = {}
        branches: dict[str, tuple[Branch | Combined, ...]] = {}
        for name in names:
            stored = self.tensors[f"{name}.weight"]
            if isinstance(stored, Multiplied):
                tensors[f"{name}.weight"] = stored if rows is None else stored.of_rows(rows)
            else:
                weight = self._weight(name, dtype)[keep]
                # A slice of what was just made would keep all of it alive.
                fresh = rows is not None and self._is_packed(f"{name}.weight", dtype)
                tensors[f"{name}.weight"] = weight.clone() if fresh else weight
            if f"{name}.bias" in self.tensors:
                tensors[f"{name}.bias"] = self.dense(f"{name}.bias", dtype)[keep]
            branches[name] = tuple(replace(b, up=b.up[keep]) for b in self._beside(name))
        return Params(tensors, branches)

    def unpacked_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of scratch that `unpacked` needs: 0 if every matrix is stored in `dtype`, as it is used."""
        return sum(_aligned(nbytes) for _, nbytes in self._packed(dtype))

    def unpacked(self, dtype: torch.dtype, scratch: Tensor) -> Params:
        """The same parameters, every matrix that is stored otherwise made in `dtype` in `scratch`.

        scratch: 1-D uint8 of at least `unpacked_nbytes(dtype)`; whoever used it before must be done with it. A block
        whose tokens pass in chunks then makes each weight once, not once a chunk; the numbers are the same.
        """
        tensors, branches, deltas = dict(self.tensors), dict(self.branches), dict(self.deltas)
        offset = 0
        for name, nbytes in self._packed(dtype):
            value, linear = self.tensors[name], name.removesuffix(".weight")
            out = scratch[offset : offset + nbytes].view(dtype).view(tuple(value.shape))
            offset += _aligned(nbytes)
            if isinstance(value, Encoded) and not self._is_changed(name):
                tensors[name] = value.decode(dtype, out)
                continue
            tensors[name] = out.copy_(self._weight(linear, dtype))
            deltas.pop(name, None)
            branches[linear] = self._beside(linear)
        return Params(tensors, branches, deltas)

    def _packed(self, dtype: torch.dtype) -> Iterable[tuple[str, int]]:
        """Matrices of Linears that are not stored as they are used, by name, with their bytes in `dtype`."""
        for name, value in self.tensors.items():
            if name.endswith(".weight") and len(value.shape) == 2 and self._is_packed(name, dtype):
                yield name, value.shape[0] * value.shape[1] * dtype.itemsize

    def _is_packed(self, name: str, dtype: torch.dtype) -> bool:
        value = self.tensors[name]
        if isinstance(value, Multiplied):
            return False
        return isinstance(value, Encoded) or value.dtype != dtype or self._is_changed(name)

    def _is_changed(self, name: str) -> bool:
        """Whether a LoRA changes the weight `name` itself, not only what its Linear gives."""
        branches = self.branches.get(name.removesuffix(".weight"), ())
        return name in self.deltas or not all(branch.is_beside for branch in branches)

    def _beside(self, linear: str) -> tuple[Branch, ...]:
        """The branches of a Linear that leave its weight as it is."""
        return tuple(b for b in self.branches.get(linear, ()) if isinstance(b, Branch) and b.is_beside)

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


def _low_rank(branches: tuple[Branch, ...], group: int, ops: W8A8Ops, dtype: torch.dtype) -> LowRank:
    """The branches of a weight rotated by `group`, for activations of `dtype`."""
    return low_rank(
        [ops.quantise(branch.down.flatten(1).to(dtype), group) for branch in branches],
        [branch.up.flatten(1).to(dtype) for branch in branches],
        [branch.scale for branch in branches],
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
