"""What torchao writes. No published Wan file is known to be its work: these are what people make of one themselves, with
diffusers or `flatten_tensor_state_dict`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from lowvram.offload.slab import as_bytes, build_layout, carve, read_runs
from lowvram.quant.encodings.registry import keeps_precision
from lowvram.quant.identify import identify_path
from lowvram.quant.spec import DitSpec

SPEC = DitSpec(dim=256, ffn=512, layers=1, in_channels=16, out_channels=16, text_dim=256, freq_dim=64)
MATRICES = [n for n, s in SPEC.shapes().items() if not keeps_precision(n, s)]

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    generator = torch.Generator().manual_seed(0)
    made = {n: torch.randn(s, generator=generator) * 0.05 for n, s in SPEC.shapes().items()}
    return {n: t.bfloat16() for n, t in made.items()}


def decoded(path: Path, open_file) -> tuple[State, set[str]]:
    """Every matrix in float32, and the encodings they are in."""
    refs = identify_path(path, open_file).refs
    assert {n: r.shape for n, r in refs.items()} == SPEC.shapes()
    chosen = [refs[name] for name in MATRICES]
    layout = build_layout(chosen)
    slab = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for run in read_runs(layout):
        with open_file(run.file) as reader:
            data = reader.read_at(run.file_offset, run.nbytes)
        as_bytes(slab)[run.slab_offset : run.slab_offset + run.nbytes] = data
    views = carve(layout, slab)
    made = {r.name: r.encoding.decode(views[r.name], r.shape, torch.float32) for r in chosen}
    return made, {ref.encoding.name for ref in chosen}


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_file_of_torchao_decodes_to_what_torchao_makes_of_it(
    kind: str, state: State, tmp_path: Path, open_file
) -> None:
    config = Int8WeightOnlyConfig(version=2) if kind == "int8" else Float8WeightOnlyConfig()
    stored, expected = {n: t for n, t in state.items() if n not in MATRICES}, {}
    for name in MATRICES:
        out, inner = state[name].shape
        linear = torch.nn.Linear(inner, out, bias=False, dtype=torch.bfloat16)
        linear.weight = torch.nn.Parameter(state[name], requires_grad=False)
        module = torch.nn.Sequential(linear)
        quantize_(module, config)
        quantised = module[0].weight
        expected[name] = quantised.dequantize(torch.float32)
        stored[name] = quantised
    tensors, metadata = flatten_tensor_state_dict(stored)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "m.safetensors", metadata)
    found, encodings = decoded(tmp_path / "m.safetensors", open_file)
    assert encodings == {{"int8": "int8_zero", "float8": "fp8_row"}[kind]}
    for name in MATRICES:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("zero", [0, -7])
def test_its_names_shapes_and_zero_points(zero: int, state: State, tmp_path: Path, open_file) -> None:
    """As torchao 0.18 was seen to write an Int8Tensor."""
    stored, expected = {n: t for n, t in state.items() if n not in MATRICES}, {}
    for name in MATRICES:
        layer, weight = name.removesuffix("weight"), state[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 120
        points = torch.full(scale.shape, zero, dtype=torch.int8)
        q = (weight / scale + zero).round().to(torch.int8)
        stored |= {
            f"{layer}_weight_qdata": q,
            f"{layer}_weight_scale": scale,
            f"{layer}_weight_zero_point": points,
        }
        expected[name] = ((q.double() - zero) * scale.double()).float()
    save_file(stored, tmp_path / "m.safetensors")
    found, encodings = decoded(tmp_path / "m.safetensors", open_file)
    assert encodings == {"int8_zero"}
    for name in MATRICES:
        assert torch.equal(found[name], expected[name]), name
