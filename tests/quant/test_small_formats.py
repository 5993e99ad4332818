"""int8, int4, NF4 and FP4: against the libraries that own them where they run here, else against the formula
of checkpoint-formats, written out plainly in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from optimum.quanto import (
    MaxOptimizer,
    freeze,
    qfloat8_e4m3fn,
    qfloat8_e5m2,
    qint4,
    qint8,
    quantize,
    quantize_weight,
)
from optimum.quanto.tensor.packed import PackedTensor

from lowvram.quant.encodings.base import StoredPart
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.int4 import ConvrotInt4, QuantoInt4
from lowvram.quant.encodings.int8 import Int8
from lowvram.quant.encodings.nf4 import Bnb4
from lowvram.quant.encodings.registry import encoding_by_name, recognise
from lowvram.quant.refs import DTYPE_BITS
from lowvram.triton_kernels.hadamard import rotate, rotate_whole

SHAPE = (48, 512)
CODES = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
         torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # fmt: skip


def weights(shape=SHAPE, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def seen(parts, **notes) -> dict[str, StoredPart]:
    """What a header says of these parts, and what notes beside them hold."""
    stored = {role: StoredPart(CODES[part.dtype], tuple(part.shape)) for role, part in parts.items()}
    return stored | {role: StoredPart("U8", (99,), note) for role, note in notes.items()}


def decoded(parts, shape=SHAPE, **notes) -> torch.Tensor:
    found = recognise(seen(parts, **notes))
    assert found is not None
    return found.encoding.decode({role: parts[role] for role in found.roles}, shape, torch.float32)


def loss(encoding, shape=SHAPE) -> float:
    tensor = weights(shape)
    back = encoding.decode(encoding.encode(tensor), shape, torch.float32)
    return ((back - tensor).norm() / tensor.norm()).item()


def hadamard(group: int) -> np.ndarray:
    small = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=np.float64)
    matrix = small
    while len(matrix) < group:
        matrix = np.kron(matrix, small)
    return matrix / math.sqrt(group)


@pytest.mark.parametrize(
    ("name", "most"),
    [("int8", 0.0085), ("int8_tensor", 0.014), ("int8_convrot", 0.0085), ("int4", 0.105), ("int4_convrot", 0.155),
     ("nf4", 0.093), ("fp4", 0.124), ("nvfp4", 0.097), ("nvfp4_lightx2v", 0.097)],
)  # fmt: skip
def test_encoding_loses_no_more_than_the_format_must(name, most):
    assert loss(encoding_by_name(name)) < most


# int8


@pytest.mark.parametrize(
    ("kind", "family"),
    [(qint8, Int8("row")), (qfloat8_e4m3fn, Fp8(scaling="row")), (qfloat8_e5m2, Fp8("F8_E5M2", "row"))],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_8_bits_of_quanto_decode_as_quanto_does(kind, family, dtype):
    layer = torch.nn.Sequential(torch.nn.Linear(512, 48).to(dtype))
    quantize(layer, weights=kind)
    freeze(layer)
    state = layer.state_dict()
    parts = {"weight": state["0.weight._data"], "scale": state["0.weight._scale"]}
    extra = {"input_scale": state["0.input_scale"], "output_scale": state["0.output_scale"]}
    found = recognise(seen(parts | extra))
    assert found.encoding == replace(family, scale_code=CODES[dtype]) and found.roles == ("weight", "scale")
    # Both multiply in float32 and round the product once.
    assert torch.equal(found.encoding.decode(parts, SHAPE, dtype), layer[0].weight.dequantize())


def test_bitsandbytes_int8_decodes_as_bitsandbytes_does():
    codes, scb, _ = bnb.int8_vectorwise_quant(weights().to(torch.float16))
    parts = {"weight": codes, "scb": scb}
    assert torch.equal(decoded(parts), bnb.int8_vectorwise_dequant(codes, scb))
    ours = Int8("absmax").encode(weights().to(torch.float16))
    assert (
        torch.equal(ours["scb"], scb) and (ours["weight"] - codes).abs().max() <= 1
    )  # halves round differently


@pytest.mark.parametrize("shape", [(), (1,), (48,), (48, 1)])
def test_int8_is_the_product_with_its_scale(shape):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-128, 128, SHAPE, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape, generator=generator)
    expected = codes.double() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale).double()
    assert torch.equal(decoded({"weight": codes, "scale": scale}), expected.float())


@pytest.mark.parametrize("group", [4, 16, 64, 256])
@pytest.mark.parametrize("nested", [False, True])
def test_a_rotated_int8_weight_is_rotated_back_exactly(group, nested):
    """Exactly: correctly rounded from the true value, which no float32 matrix product of scaled weights gives."""
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(-128, 128, SHAPE, generator=generator, dtype=torch.int8)
    scale = torch.rand(48, 1, generator=generator) * 1e-3
    options = {"convrot": True, "convrot_groupsize": group}
    note = {"format": "int8_tensorwise"} | ({"params": options} if nested else options)
    whole = codes.double().view(48, -1, group) @ torch.from_numpy(hadamard(group))
    expected = whole.view(SHAPE) * scale.double()
    assert torch.equal(decoded({"weight": codes, "scale": scale}, comfy_quant=note), expected.float())


def test_the_rotation_undoes_itself():
    x = weights((8, 1024))
    for group in (4, 256, 1024):
        assert torch.allclose(rotate(rotate(x, group), group) / group, x, atol=1e-6)
        expected = x.double().view(8, -1, group) @ torch.from_numpy(hadamard(group))
        assert torch.allclose(
            rotate(x, group).double().view(expected.shape), expected * math.sqrt(group), atol=1e-5
        )


def test_rotating_integers_by_product_and_by_sums_is_the_same():
    codes = torch.randint(-128, 128, (8, 1024), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    for group in (4, 16, 64, 256, 1024):
        assert torch.equal(rotate_whole(codes, group), rotate(codes.float(), group))


def test_a_rotation_spreads_an_outlier_and_so_costs_less():
    tensor = weights()
    tensor[:, 7] *= 30
    errors = [
        (e.decode(e.encode(tensor), SHAPE, torch.float32) - tensor).norm() for e in (Int8(group=256), Int8())
    ]
    assert errors[0] < 0.5 * errors[1]


INT8 = {"weight": StoredPart("I8", SHAPE), "scale": StoredPart("F32", (48, 1))}


@pytest.mark.parametrize(
    "note",
    [
        {}, {"format": "nvfp4"}, {"format": "int8"}, {"format": 7}, {"convrot": True, "per_row": True},
        {"format": "int8_tensorwise", "convrot": "yes"}, {"format": "int8_tensorwise", "convrot": 2},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 128},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1024},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "256"},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 0},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": True},
    ],
)  # fmt: skip
def test_a_note_that_cannot_be_followed_is_not_ignored(note):
    assert recognise(INT8 | {"comfy_quant": StoredPart("U8", (9,), note)}) is None


def test_a_note_that_was_not_read_is_not_ignored():
    assert recognise(INT8 | {"comfy_quant": StoredPart("U8", (9,))}) is None
    fp8 = {"weight": StoredPart("F8_E4M3", SHAPE), "scale": StoredPart("F32", ())}
    assert recognise(fp8 | {"comfy_quant": StoredPart("U8", (9,))}) is not None
    assert recognise(fp8 | {"comfy_quant": StoredPart("U8", (9,), {"format": "float8_e4m3fn"})}) is not None
    turned = {"format": "float8_e4m3fn", "convrot": True}
    assert recognise(fp8 | {"comfy_quant": StoredPart("U8", (9,), turned)}) is None
    assert recognise(fp8 | {"comfy_quant": StoredPart("U8", (9,), {"format": "mxfp8"})}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"scale": StoredPart("F32", (47, 1))}, {"scale": StoredPart("F32", (48, 2))}, {"scale": StoredPart("I32", ())},
        {"scb": StoredPart("F32", (48,))}, {"shift": StoredPart("F32", (48, 1))}, {"weight": StoredPart("I8", ())},
        {"scale_2": StoredPart("F32", ())}, {"pre_quant_scale": StoredPart("F32", (512,))},
    ],
)  # fmt: skip
def test_int8_with_side_tensors_that_do_not_belong_is_not_recognised(change):
    assert recognise(INT8 | change) is None


# int4


def quanto_parts(dtype, features):
    """What quanto stores for a weight [48, features], and what it decodes that to."""
    tensor, group = weights((48, features)).to(dtype), 128 if features > 128 else None
    scale, shift = MaxOptimizer()(tensor, qint4, 0, group)
    owned = quantize_weight(tensor, qint4, 0, scale, shift, group, optimized=False)
    state: dict[str, torch.Tensor] = {}
    owned.save_to_state_dict(state, "", False)
    # Its unpacking would compile an extension first; the codes before packing spare that.
    codes = torch.ops.quanto.quantize_affine(tensor, 4, 0, group, scale, shift)
    assert torch.equal(PackedTensor.pack(codes)._data, state["_data._data"])
    owned._data = codes
    names = {"_data._data": "packed", "_scale": "scale", "_shift": "shift"}
    return {role: state[key] for key, role in names.items()}, owned.dequantize()


@pytest.mark.parametrize("features", [512, 128, 96])
def test_quanto_qint4_in_float32_decodes_as_quanto_does(features):
    parts, expected = quanto_parts(torch.float32, features)
    found = recognise(seen(parts))
    assert found.flat and found.encoding == QuantoInt4(min(features, 128), "F32", "F32")
    assert torch.equal(found.encoding.decode(parts, (48, features), torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quanto_qint4_in_half_precision_is_the_same_formula_with_fewer_roundings(dtype):
    """quanto rounds scale * q to the model's dtype before it subtracts; we round once, at the end."""
    parts, theirs = quanto_parts(dtype, 512)
    encoding = recognise(seen(parts)).encoding
    exact = encoding.decode(parts, SHAPE, torch.float32)
    step = torch.finfo(dtype).eps * (
        exact + parts["shift"].float().view(-1, 4, 1).expand(-1, -1, 128).reshape(SHAPE)
    )
    assert ((theirs.float() - exact).abs() <= step.abs() + torch.finfo(dtype).eps * exact.abs()).all()
    assert torch.equal(encoding.decode(parts, SHAPE, dtype), exact.to(dtype))


def test_an_odd_number_of_groups_leaves_the_last_high_nibbles_unused():
    encoding, tensor = QuantoInt4(128, "F32", "F32"), weights((3, 128))
    parts = encoding.encode(tensor)
    assert parts["packed"].shape == (2, 128) and parts["packed"][1].max() < 16
    assert ((encoding.decode(parts, (3, 128), torch.float32) - tensor).norm() / tensor.norm()) < 0.12


def test_whole_shifts_are_zero_points():
    q, zero = torch.arange(16, dtype=torch.uint8).view(1, 16), torch.tensor([[5]], dtype=torch.int8)
    parts = {"packed": q, "scale": torch.tensor([[0.5]]), "shift": zero}
    encoding = QuantoInt4(16, "F32", "I8")
    assert recognise(seen(parts)).encoding == encoding
    assert encoding.decode(parts, (1, 16), torch.float32).tolist() == [[0.5 * (n - 5) for n in range(16)]]


@pytest.mark.parametrize("group", [64, 256])
def test_convrot_w4a4_is_unpacked_scaled_and_rotated_back(group):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-8, 8, SHAPE, generator=generator)
    parts = {
        "weight": ((codes[:, ::2] & 15) | (codes[:, 1::2] << 4)).to(torch.int8),
        "scale": torch.rand(48, generator=generator),
    }
    turned = codes.double().view(48, -1, group) @ torch.from_numpy(hadamard(group))
    expected = turned.view(SHAPE) * parts["scale"].double().view(-1, 1)
    note = {"format": "convrot_w4a4", "linear_dtype": "int8"} | (
        {} if group == 256 else {"convrot_groupsize": group}
    )
    assert torch.equal(decoded(parts, comfy_quant=note), expected.float())
    assert recognise(seen(parts, comfy_quant=note)).shape == SHAPE


def test_convrot_w4a4_packs_as_it_unpacks():
    tensor = weights()
    parts = ConvrotInt4().encode(tensor)
    again = ConvrotInt4().encode(ConvrotInt4().decode(parts, SHAPE, torch.float32))
    assert (again["weight"] == parts["weight"]).float().mean() > 0.99


# bitsandbytes


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4_bit_weights_of_bitsandbytes_decode_as_there(kind, nested, dtype):
    tensor = weights((160, 512)).to(dtype)
    packed, state = bnb.quantize_4bit(tensor, blocksize=64, quant_type=kind, compress_statistics=nested)
    stored = state.as_dict(packed=True)
    note = json.loads(bytes(stored.pop(f"quant_state.bitsandbytes__{kind}").tolist()))
    parts = {"weight": packed} | stored
    found = recognise(seen(parts, quant_state=note))
    assert found.shape == (160, 512) and found.encoding.name == (f"{kind}_nested" if nested else kind)
    ours = found.encoding.decode({role: parts[role] for role in found.roles}, found.shape, dtype)
    theirs = bnb.dequantize_4bit(packed, state)
    if dtype == torch.float32:
        assert torch.equal(ours, theirs)
    # The CPU kernels of bitsandbytes build bf16 and fp16 results on their own; a rounding may fall the other way.
    assert ((ours.float() - theirs.float()).abs() <= torch.finfo(dtype).eps * theirs.float().abs()).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_weights_are_encoded_to_the_bytes_of_bitsandbytes(kind):
    packed, state = bnb.quantize_4bit(weights(), blocksize=64, quant_type=kind)
    ours = Bnb4(kind).encode(weights())
    assert torch.equal(ours["absmax"], state.absmax) and torch.equal(ours["quant_map"], state.code)
    assert (ours["weight"] == packed).float().mean() > 0.999  # a weight on a border may fall to either side


def test_nested_scales_cost_little():
    nested = Bnb4("nf4", 64, 256, 0.1)
    assert nested.nbytes(SHAPE) < Bnb4().nbytes(SHAPE) - 1000 + 1024 + 4 * 2
    assert loss(nested) < 1.03 * loss(Bnb4())


def bnb_note(**changes):
    note = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [48, 512]}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
    return note | nested | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": "int8"}, {"quant_type": None}, {"blocksize": 63}, {"blocksize": True}, {"blocksize": "64"},
        {"shape": [48, 513]}, {"shape": [48, 0]}, {"shape": [-48, -512]}, {"shape": [24576]}, {"shape": "48"},
        {"shape": [2**40, 2**40]}, {"shape": [48.0, 512]}, {"nested_blocksize": 0}, {"nested_offset": "0"},
        {"nested_offset": float("inf")}, {"nested_offset": 10**400}, {"nested_offset": None},
    ],
)  # fmt: skip
def test_a_quant_state_that_makes_no_sense_is_not_believed(changes):
    layout = Bnb4("nf4", 64, 256, 0.1).layout(SHAPE)
    stored = {part.role: StoredPart(part.dtype, part.shape) for part in layout}
    good = StoredPart("U8", (99,), bnb_note())
    assert recognise(stored | {"quant_state": good}).encoding == Bnb4("nf4", 64, 256, 0.1)
    assert recognise(stored | {"quant_state": StoredPart("U8", (99,), bnb_note(**changes))}) is None
    for role in ("weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map"):
        part = StoredPart(stored[role].dtype, (stored[role].shape[0] + 1, *stored[role].shape[1:]))
        assert recognise(stored | {"quant_state": good, role: part}) is None


def test_every_dtype_code_used_here_is_one_of_the_product():
    assert set(CODES.values()) <= DTYPE_BITS.keys()
