"""A run tries the kernels for the weights of its model, and hands what passed to every network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lowvram.model import Group, Model, Transformer
from lowvram.offload.device import CpuDevice
from lowvram.quant import fused
from lowvram.quant.encodings.registry import encoding_by_name
from lowvram.quant.linear import Encoded
from lowvram.quant.refs import Part, TensorRef
from lowvram.stages.run import Run

SHAPE = (64, 256)


def ref(name: str, encoding: str, shape: tuple[int, ...] = SHAPE) -> TensorRef:
    found = encoding_by_name(encoding)
    parts = tuple(Part(p.role, Path("x"), 0, p.nbytes, p.dtype, p.shape) for p in found.layout(shape))
    return TensorRef(name, shape, found, parts)


def test_what_passed_is_decoded_by_kernels_and_the_rest_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(encoding: Any, parts: fused.Parts, out: Tensor) -> None:
        encoding.decode(parts, tuple(out.shape), out.dtype, out)
        if encoding == encoding_by_name("q4_k"):
            out[0, 0] = 5

    monkeypatch.setattr(fused, "_DECODERS", dict.fromkeys(fused._DECODERS, stand_in))
    monkeypatch.setattr(fused, "kernels_obstacle", lambda arch: "")
    refs = [ref("a", "bf16"), ref("b", "fp8", (32, 16)), ref("c", "q4_k"), ref("d", "fp8")]
    by_name = {one.name: one for one in refs}
    model = Model("m", cast(Any, None), {"single": Transformer(by_name)}, {}, {"e": ref("e", "q8_0")}, None)
    assert set(model.encodings()) == {encoding_by_name(name) for name in ("fp8", "q4_k", "q8_0")}
    assert model.encodings()[encoding_by_name("fp8")] == SHAPE  # the larger one
    plan = SimpleNamespace(dtype=torch.bfloat16, machine=SimpleNamespace(arch="sm_89"))
    run = Run(CpuDevice(), cast(Any, plan))
    run.choose_decoders(model)
    assert run.by_kernel == {encoding_by_name("fp8"), encoding_by_name("q8_0")}
    assert run.notes == ["q4_k is decoded by torch: other numbers than torch in bfloat16"]
    views = {r.name: fused.random_parts(r.encoding, r.shape, torch.device("cpu")) for r in refs}
    params = run.params(Group(tuple(refs), {}), views)
    chosen = {name: v.by_kernel for name, v in params.tensors.items() if isinstance(v, Encoded)}
    assert chosen == {"b": True, "c": False, "d": True}
