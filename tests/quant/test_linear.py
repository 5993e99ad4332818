"""Decoding a weight once instead of at every use, or only some of its rows, gives the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowvram.quant.branches import Branch, Combined, Dora
from lowvram.quant.encodings.registry import encoding_by_name
from lowvram.quant.linear import Encoded, Params
from lowvram.triton_kernels.ops import TORCH
from lowvram.triton_kernels.quantise import quantise

OUT, IN = 512, 256
X = torch.randn(3, IN, generator=torch.Generator().manual_seed(0))


def params(encoding: str) -> Params:
    generator = torch.Generator().manual_seed(1)
    weight, factor = torch.randn(OUT, IN, generator=generator), torch.randn(OUT, IN, generator=generator)
    chosen = encoding_by_name(encoding)
    stored = Encoded(chosen, (OUT, IN), chosen.encode(weight))
    branch = Branch(factor[:4], factor[:, :4], 0.5)
    tensors = {
        "q.weight": stored,
        "q.bias": factor[:, 0].bfloat16(),
        "half.weight": weight.half(),
        "norm.weight": factor[0],
    }
    return Params(tensors, {"q": (branch,)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoding", ["fp8", "int8", "nf4", "q4_k", "bf16"])
def test_unpacked_weights_give_the_same_bits(encoding: str, dtype: torch.dtype) -> None:
    stored, x = params(encoding), X.to(dtype)
    scratch = torch.full((stored.unpacked_nbytes(dtype),), 0x7F, dtype=torch.uint8)
    unpacked = stored.unpacked(dtype, scratch)
    for name in ("q", "half"):
        assert torch.equal(unpacked.linear(name, x), stored.linear(name, x))
        weight = unpacked.tensors[f"{name}.weight"]
        assert isinstance(weight, torch.Tensor) and weight.dtype is dtype
    assert unpacked["norm.weight"] is stored["norm.weight"]


def test_a_linear_with_a_lora_takes_quantised_rows_and_its_slices_are_the_whole() -> None:
    plain = params("int8_convrot")
    ready = plain.multiplied(("q",), TORCH.int8, X.dtype)
    taking = ready.takes("q")
    assert taking is not None and taking.group == 256 and not ready.branches
    assert ready.takes("q", "half") is None and plain.takes("q") is None
    rows = quantise(X, 256)
    y = ready.linear("q", rows)
    assert torch.equal(y, ready.linear("q", X))
    exact, without = plain.linear("q", X), replace(plain, branches={}).linear("q", X)
    assert (y - exact).norm() < 0.02 * exact.norm() < (y - without).norm()
    for some in (slice(0, 128), slice(384, 512)):
        assert torch.equal(ready.slices(("q",), X.dtype, some).linear("q", rows), y[:, some])
    gates = [(slice(0, 1), torch.full((1, OUT), 2.0)), (slice(1, 3), torch.full((1, OUT), -3.0))]
    for some, x in ((ready, rows), (ready, X), (plain, X)):
        into = torch.ones(3, OUT)
        some.linear_gated_("q", x, into, gates, TORCH.gated_)
        want = 1 + some.linear("q", x) * torch.tensor([[2.0], [-3.0], [-3.0]])
        assert torch.allclose(into, want, rtol=1e-5, atol=1e-4)


def some(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


MAGNITUDE = some(OUT, 1) + 0.5
LOKR = Combined("kron", (some(4, 8),), (some(OUT // 4, 2), some(2, IN // 8)), 0.3)
LOHA = Combined("hada", (some(OUT, 2), some(2, IN)), (some(OUT, 2), some(2, IN)), 0.3)
INSIDE = [
    LOKR,
    LOHA,
    replace(LOKR, dora=Dora(MAGNITUDE, 0.7, of_base=True)),
    Branch(some(4, IN), some(OUT, 4), 0.3, Dora(MAGNITUDE, 0.7, of_base=False)),
]


@pytest.mark.parametrize("branch", INSIDE, ids=["LoKr", "LoHa", "LoKr with magnitudes", "DoRA"])
def test_what_changes_the_weight_itself_is_in_every_form_of_it(branch: Branch | Combined) -> None:
    """Beside another LoRA: a weight of 8 bits is then multiplied as numbers, and none of the branches twice."""
    beside = params("int8_convrot")
    stored = replace(beside, branches={"q": (branch, *beside.branches["q"])})
    whole, rows = stored.linear("q", X), slice(128, 384)
    assert not torch.allclose(whole, beside.linear("q", X), atol=0.1)
    ready = stored.multiplied(("q",), TORCH.int8, X.dtype)
    assert ready.takes("q") is None and torch.equal(ready.linear("q", X), whole)
    scratch = torch.zeros(stored.unpacked_nbytes(X.dtype), dtype=torch.uint8)
    for some in (stored.unpacked(X.dtype, scratch), stored.slices(("q",), X.dtype)):
        assert torch.equal(some.linear("q", X), whole)
    part = stored.slices(("q",), X.dtype, rows).linear("q", X)
    assert torch.allclose(part, whole[:, rows], rtol=1e-5, atol=1e-4)
    assert torch.equal(replace(stored, branches=stored.copied(("",)).branches).linear("q", X), whole)


def test_unpacking_needs_nothing_for_what_is_stored_in_the_dtype() -> None:
    plain = Params({"q.weight": torch.zeros(OUT, IN), "norm.weight": torch.zeros(IN).bfloat16()})
    assert plain.unpacked_nbytes(torch.float32) == 0
    assert plain.unpacked_nbytes(torch.bfloat16) == 2 * OUT * IN
    assert plain.unpacked(torch.float32, torch.empty(0, dtype=torch.uint8)).tensors == plain.tensors


@pytest.mark.parametrize("encoding", ["fp8", "q4_k", "bf16"])
def test_slices_are_the_outputs_of_the_whole(encoding: str) -> None:
    stored = params(encoding)
    whole = stored.linear("q", X)
    for rows in (slice(0, 128), slice(384, 512)):
        part = stored.slices(("q",), torch.float32, rows)
        assert torch.allclose(part.linear("q", X), whole[:, rows], rtol=1e-5, atol=1e-5)
        weight = part.tensors["q.weight"]
        assert isinstance(weight, torch.Tensor)
        assert weight.untyped_storage().nbytes() == 128 * IN * 4
    assert torch.equal(stored.slices(("q",), torch.float32).linear("q", X), whole)
