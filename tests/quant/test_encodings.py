"""Plain and fp8 encodings against torch's own casts and the formula in float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.errors import NonFiniteError, UsageError
from lowvram.offload.estimate import peak_memory
from lowvram.quant.encodings import base
from lowvram.quant.encodings.base import TORCH_DTYPES, StoredPart
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import (
    encoding_by_name,
    encoding_names,
    keeps_precision,
    planned_encoding,
    recognise,
)
from lowvram.quant.refs import stored_bytes
from lowvram.quant.spec import DitSpec, TextSpec, VaeSpec

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
SHAPE, LARGER = (6, 128), (32, 256)
SCALED = [
    Fp8(),
    Fp8("F8_E5M2"),
    Fp8("F8_E4M3", "row"),
    Fp8("F8_E4M3", "block", 64),
    Fp8("F8_E5M2", "row", 0, "BF16"),
]


def random(shape=SHAPE, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def all_values(code: str) -> torch.Tensor:
    """Every bit pattern of an fp8 dtype but NaN and infinity."""
    values = torch.arange(256, dtype=torch.uint8).view(TORCH_DTYPES[code])
    return values[torch.isfinite(values.float())]


def expected_product(parts, encoding) -> torch.Tensor:
    weight, scale = parts["weight"].float(), parts["scale"].float()
    if encoding.scaling == "block":
        return (
            weight.reshape(weight.shape[0], -1, encoding.block) * scale.reshape(weight.shape[0], -1, 1)
        ).reshape(weight.shape)
    return weight * (scale.reshape(-1, 1) if encoding.scaling == "row" else scale)


def fitting(encoding) -> tuple[int, int]:
    """A small matrix that the encoding can hold."""
    return SHAPE if encoding.fits(SHAPE) else LARGER


@pytest.mark.parametrize("name", encoding_names())
@pytest.mark.parametrize("shape", [SHAPE, LARGER, (130, 512), (4, 16, 1, 2, 2), (1, 64)])
def test_what_is_encoded_is_what_the_layout_says(name, shape):
    encoding = encoding_by_name(name)
    if not encoding.fits(shape):
        with pytest.raises(ValueError, match="cannot"):
            encoding.encode(random(shape))
        return
    parts = encoding.encode(random(shape))
    assert {
        r: (TORCH_DTYPES[p.dtype], p.shape, p.nbytes) for p in encoding.layout(shape) for r in [p.role]
    } == {
        role: (part.dtype, tuple(part.shape), part.numel() * part.element_size())
        for role, part in parts.items()
    }
    assert encoding.nbytes(shape) == sum(p.numel() * p.element_size() for p in parts.values())


@pytest.mark.parametrize("name", encoding_names())
@pytest.mark.parametrize("dtype", FLOATS)
def test_decoding_into_out_equals_decoding_anew(name, dtype):
    encoding = encoding_by_name(name)
    shape = fitting(encoding)
    parts = encoding.encode(random(shape))
    out = torch.full(shape, math.nan, dtype=dtype)
    fresh = encoding.decode(parts, shape, dtype)
    assert encoding.decode(parts, shape, dtype, out=out) is out
    assert fresh.dtype == dtype and tuple(fresh.shape) == shape
    assert torch.equal(out, fresh)
    # One rounding from float32: casts compose no other way.
    assert torch.equal(fresh, encoding.decode(parts, shape, torch.float32).to(dtype))


@pytest.mark.parametrize("code", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_plain_weights_decode_to_torchs_cast(code, dtype):
    stored = random().to(TORCH_DTYPES[code])
    assert torch.equal(Plain(code).decode({"weight": stored}, SHAPE, dtype), stored.to(dtype))


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_fp8_value_decodes_exactly(code, dtype):
    stored = all_values(code)
    decoded = Fp8(code, "none").decode({"weight": stored}, tuple(stored.shape), dtype)
    assert torch.equal(decoded, stored.to(dtype)) and torch.equal(decoded.float(), stored.float())


@pytest.mark.parametrize("encoding", SCALED, ids=lambda e: e.name)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scaled_fp8_is_the_float32_product_rounded_once(encoding, dtype):
    parts = encoding.encode(random())
    assert torch.equal(encoding.decode(parts, SHAPE, dtype), expected_product(parts, encoding).to(dtype))


EVERY = list(dict.fromkeys([*SCALED, *(encoding_by_name(name) for name in encoding_names())]))


@pytest.mark.parametrize("encoding", EVERY, ids=lambda e: e.name)
def test_converting_in_chunks_changes_nothing(encoding, monkeypatch):
    shape = (160, 512)
    tensor = random(shape)
    parts = encoding.encode(tensor)
    whole = encoding.decode(parts, shape, torch.float32)
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 1000)
    assert torch.equal(encoding.decode(parts, shape, torch.float32), whole)
    again = encoding.encode(tensor)
    for role, part in parts.items():
        assert torch.equal(again[role].flatten().view(torch.uint8), part.flatten().view(torch.uint8))


@pytest.mark.parametrize("encoding", EVERY, ids=lambda e: e.name)
def test_decoding_takes_little_memory_beside_its_result(encoding):
    """Four chunks of a matrix, 25 MiB in bf16: what is live does not add up from chunk to chunk."""
    shape = (2560, 5120)
    with FakeTensorMode():
        parts = {p.role: torch.empty(p.shape, dtype=TORCH_DTYPES[p.dtype]) for p in encoding.layout(shape)}
        out = torch.empty(shape, dtype=torch.bfloat16)
    peak = peak_memory(lambda out: encoding.decode(parts, shape, out.dtype, out), out).peak_bytes
    assert peak <= 40 << 20


def test_scales_are_the_peak_over_the_largest_value():
    tensor = random()
    assert Fp8().encode(tensor)["scale"] == tensor.abs().max() / 448
    assert Fp8("F8_E5M2").encode(tensor)["scale"] == tensor.abs().max() / 57344
    rows = Fp8("F8_E4M3", "row").encode(tensor)["scale"]
    assert torch.equal(rows, tensor.abs().amax(1, keepdim=True) / 448)
    blocks = Fp8("F8_E4M3", "block", 64).encode(tensor)["scale"]
    assert torch.equal(blocks, tensor.view(6, 2, 64).abs().amax(2, keepdim=True) / 448)


@pytest.mark.parametrize(("encoding", "bits"), [(Fp8(), 4), (Fp8("F8_E4M3", "row"), 4), (Fp8("F8_E5M2"), 3)])
def test_encoding_loses_no_more_than_half_a_step(encoding, bits):
    tensor = random()
    decoded = encoding.decode(encoding.encode(tensor), SHAPE, torch.float32)
    floor = tensor.abs().max() * 2.0**-16
    assert ((decoded - tensor).abs() <= tensor.abs() * 2.0**-bits + floor).all()


@pytest.mark.parametrize("encoding", [Fp8(c, "none") for c in ("F8_E4M3", "F8_E5M2")], ids=lambda e: e.name)
def test_values_beyond_the_range_saturate_instead_of_becoming_nan(encoding):
    peak = torch.finfo(TORCH_DTYPES[encoding.code]).max
    parts = encoding.encode(torch.tensor([[1e9, -1e9]]))
    assert encoding.decode(parts, (1, 2), torch.float32).tolist() == [[peak, -peak]]


def test_a_zero_tensor_survives_every_encoding():
    for name in encoding_names():
        encoding = encoding_by_name(name)
        shape = fitting(encoding)
        assert encoding.decode(encoding.encode(torch.zeros(shape)), shape, torch.float32).abs().max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", encoding_names())
def test_non_finite_weights_are_refused(name, bad):
    encoding = encoding_by_name(name)
    tensor = random(fitting(encoding))
    tensor[3, 5] = bad
    with pytest.raises(NonFiniteError):
        encoding.encode(tensor)


def test_a_value_too_large_for_fp16_is_refused():
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        Plain("F16").encode(torch.tensor([1e6]))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (None, Fp8("F8_E4M3", "none")),
        (("F32", ()), Fp8()),
        (("F32", (1,)), Fp8()),
        (("F32", (6,)), Fp8("F8_E4M3", "row")),
        (("BF16", (6, 1)), Fp8("F8_E4M3", "row", 0, "BF16")),
        (("F32", (6, 2, 1)), Fp8("F8_E4M3", "block", 64)),
        (("F32", (6, 3, 1)), None),
        (("F32", (5, 1)), None),
        (("F32", (1, 128)), None),
        (("F8_E8M0", (6, 4)), None),
        (("I32", ()), None),
    ],
)
def test_fp8_is_recognised_by_the_shape_of_its_scales(scale, expected):
    stored = {"weight": StoredPart("F8_E4M3", SHAPE)}
    if scale:
        stored["scale"] = StoredPart(*scale)
    found = recognise(stored)
    assert (found and found.encoding) == expected
    if found and scale:
        parts = Fp8.encode(expected, random())
        stored_scale = {"weight": parts["weight"], "scale": parts["scale"].reshape(scale[1])}
        assert torch.equal(
            expected.decode(stored_scale, SHAPE, torch.float32), expected.decode(parts, SHAPE, torch.float32)
        )


@pytest.mark.parametrize("dtype", ["I8", "U8", "F4", "BOOL"])
def test_unknown_storage_is_not_recognised(dtype):
    assert recognise({"weight": StoredPart(dtype, (4, 4))}) is None


def test_a_plain_weight_with_a_scale_is_not_recognised():
    assert recognise({"weight": StoredPart("BF16", (4, 4)), "scale": StoredPart("F32", ())}) is None


def test_names_lead_back_to_their_encoding():
    assert encoding_by_name("fp8") == encoding_by_name("fp8_scaled") == Fp8()
    for name in encoding_names():
        assert encoding_by_name(encoding_by_name(name).name) == encoding_by_name(name)
    with pytest.raises(UsageError, match="fp8_row"):
        encoding_by_name("fp7")


def test_encodings_compare_by_value():
    assert len({Fp8(), Fp8(), Plain("BF16"), Plain("BF16"), Fp8("F8_E4M3", "row")}) == 3


def test_only_the_matrices_of_the_blocks_lose_precision():
    dit = DitSpec(dim=256, ffn=512, layers=2, in_channels=36, out_channels=16, image_tokens=514)
    quantised = {name for name, shape in dit.shapes().items() if not keeps_precision(name, shape)}
    leaves = [f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"]
    leaves += ["cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"]
    assert quantised == {f"blocks.{n}.{leaf}.weight" for n in range(2) for leaf in leaves}
    text = {name for name, shape in TextSpec(layers=1).shapes().items() if not keeps_precision(name, shape)}
    assert len(text) == 7 and all(".attn." in name or ".ffn." in name for name in text)
    assert all(keeps_precision(name, shape) for name, shape in VaeSpec().shapes().items())


def test_the_plan_keeps_what_cannot_be_quantised_in_high_precision():
    matrix, norm = "blocks.0.ffn.0.weight", "blocks.0.norm3.weight"
    assert planned_encoding(matrix, (64, 64), "fp8") == Fp8()
    assert planned_encoding(norm, (64,), "fp8") == Plain("BF16")
    assert planned_encoding("head.head.weight", (64, 64), "fp8_row") == Plain("BF16")
    assert planned_encoding(norm, (64,), "fp32") == Plain("F32")


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("F32", (3, 5), 60), ("F4", (3,), 2), ("F8_E4M3", (), 1), ("I64", (0, 9), 0)],
)
def test_stored_bytes_count_bits(dtype, shape, nbytes):
    assert stored_bytes(dtype, shape) == nbytes
