"""GGUF blocks against gguf-py: what it decodes, and where it can encode, what it writes."""

from __future__ import annotations

import warnings

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from lowvram.errors import NonFiniteError
from lowvram.quant.encodings.base import StoredPart
from lowvram.quant.encodings.kquants import BLOCK_SIZES, MIXES, Blocks
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import encoding_by_name, planned_encoding, recognise
from lowvram.quant.spec import DitSpec, numel

KINDS = list(BLOCK_SIZES)
LOSS = {
    "Q8_0": 0.006, "Q4_0": 0.09, "Q4_1": 0.08, "Q5_0": 0.045, "Q5_1": 0.04, "Q2_K": 0.28, "Q3_K": 0.15,
    "Q4_K": 0.075, "Q5_K": 0.038, "Q6_K": 0.0185, "IQ4_NL": 0.075, "IQ4_XS": 0.077,
}  # fmt: skip
"""Error of normal weights, relative to them: a little above what was measured."""


def random_bytes(kind: str, blocks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (blocks, BLOCK_SIZES[kind][1]), dtype=np.uint8)


def theirs(kind: str, data: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # random scales overflow, and some are NaN
        return torch.from_numpy(gguf.dequantize(data, Type[kind]).copy())


def weights(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes_decode_to_the_bits_of_gguf_py(kind):
    data = random_bytes(kind, 1000)
    shape = (1000, BLOCK_SIZES[kind][0])
    ours = Blocks(kind).decode({"weight": torch.from_numpy(data)}, shape, torch.float32)
    expected = theirs(kind, data)
    real = ~expected.isnan()
    assert torch.equal(ours.isnan(), ~real) and real.float().mean() > 0.9
    assert torch.equal(ours[real].view(torch.int32), expected[real].view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_a_block_changes_what_it_decodes_to(kind):
    """That is: no byte is overlooked. Scales are 1 and codes vary, so no change can be hidden by a factor 0."""
    elements, nbytes = BLOCK_SIZES[kind]
    block = Blocks(kind).encode(weights((1, elements)))["weight"]

    def decode(block: torch.Tensor) -> torch.Tensor:
        return Blocks(kind).decode({"weight": block}, (1, elements), torch.float32)

    before = decode(block)
    for at in range(nbytes):
        changed = block.clone()
        changed[0, at] ^= 0x55
        assert not torch.equal(decode(changed), before), at


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_the_simple_types_are_encoded_to_the_bytes_of_gguf_py(kind):
    for seed in range(3):
        tensor = weights((40, 256), seed)
        tensor[3] = 0
        tensor[4, :32] = 0.25
        expected = torch.from_numpy(gguf.quantize(tensor.numpy(), Type[kind]))
        assert torch.equal(Blocks(kind).encode(tensor)["weight"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_loses_no_more_than_the_type_must(kind):
    tensor = weights((64, 512))
    parts = Blocks(kind).encode(tensor)
    decoded = theirs(kind, parts["weight"].numpy())
    assert (decoded - tensor).norm() / tensor.norm() < LOSS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_decoded_is_encoded_without_further_loss(kind):
    """Nearly: scales that were searched for may move by a rounding."""
    shape = (16, 512)
    once = Blocks(kind).decode(Blocks(kind).encode(weights(shape)), shape, torch.float32)
    twice = Blocks(kind).decode(Blocks(kind).encode(once), shape, torch.float32)
    assert (twice - once).norm() / once.norm() < 0.5 * LOSS[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.05, -0.05])
def test_constant_weights_are_kept(kind, value):
    shape = (2, 256)
    decoded = Blocks(kind).decode(Blocks(kind).encode(torch.full(shape, value)), shape, torch.float32)
    assert (decoded - value).abs().max() <= 0.01 * abs(value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_too_large_for_fp16_is_refused(kind):
    with pytest.raises(NonFiniteError):
        Blocks(kind).encode(weights((1, 256)) * 1e12)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_gguf_py(kind):
    shape = (6, 512)
    elements, nbytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    assert BLOCK_SIZES[kind] == (elements, nbytes)
    assert Blocks(kind).nbytes(shape) == numel(shape) // elements * nbytes
    assert Blocks(kind).layout(shape)[0].shape == gguf.quant_shape_to_byte_shape(shape, Type[kind])


def test_rows_must_be_whole_blocks():
    assert Blocks("Q8_0").fits((3, 64)) and not Blocks("Q8_0").fits((64, 48))
    assert (
        Blocks("Q4_K").fits((2, 3, 256))
        and not Blocks("Q4_K").fits((256, 128))
        and not Blocks("Q4_K").fits(())
    )


def test_blocks_are_recognised_by_their_type():
    assert recognise({"weight": StoredPart("Q4_K", (8, 256))}).encoding == Blocks("Q4_K")
    assert recognise({"weight": StoredPart("Q4_K", (8, 128))}) is None
    assert recognise({"weight": StoredPart("Q4_K", (8, 256)), "scale": StoredPart("F32", ())}) is None


DIT = DitSpec(dim=256, ffn=512, layers=3, in_channels=16, out_channels=16)


@pytest.mark.parametrize(
    ("name", "first_v", "v", "down", "other"),
    [
        ("q2_k", "q3_k", "q3_k", "q2_k", "q2_k"),
        ("q3_k", "q3_k", "q3_k", "q3_k", "q3_k"),
        ("q3_k_m", "q5_k", "q4_k", "q4_k", "q3_k"),
        ("q3_k_l", "q5_k", "q5_k", "q5_k", "q3_k"),
        ("q4_k", "q4_k", "q4_k", "q4_k", "q4_k"),
        ("q4_k_s", "q5_k", "q4_k", "q5_k", "q4_k"),
        ("q4_k_m", "q6_k", "q6_k", "q6_k", "q4_k"),
        ("q5_k_m", "q6_k", "q6_k", "q6_k", "q5_k"),
        ("q6_k", "q6_k", "q6_k", "q6_k", "q6_k"),
        ("q4_0", "q4_0", "q4_0", "q4_1", "q4_0"),
        ("q5_0", "q5_0", "q5_0", "q5_1", "q5_0"),
        ("q8_0", "q8_0", "q8_0", "q8_0", "q8_0"),
    ],
)
def test_mixes_choose_the_type_of_each_matrix_as_the_published_files_do(name, first_v, v, down, other):
    planned = {n: planned_encoding(n, s, name).name for n, s in DIT.shapes().items()}
    for attention in ("self_attn", "cross_attn"):
        assert planned[f"blocks.0.{attention}.v.weight"] == first_v
        assert planned[f"blocks.2.{attention}.v.weight"] == v
        assert planned[f"blocks.0.{attention}.q.weight"] == other
    assert planned["blocks.1.ffn.2.weight"] == down
    assert planned["blocks.1.ffn.0.weight"] == other
    assert planned["blocks.1.norm3.weight"] == planned["blocks.1.self_attn.q.bias"] == "fp32"
    assert planned["blocks.1.modulation"] == planned["patch_embedding.weight"] == "fp32"
    assert planned["text_embedding.0.weight"] == planned["head.head.weight"] == "bf16"


def test_q4_k_s_raises_the_values_of_two_blocks_only():
    kinds = [MIXES["q4_k_s"].pick(f"blocks.{n}.self_attn.v.weight").kind for n in range(4)]
    assert kinds == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]


def test_a_matrix_that_is_not_cut_into_blocks_keeps_its_precision():
    assert planned_encoding("blocks.0.ffn.2.weight", (256, 8960 + 64), "q4_k") == Plain("BF16")


def test_the_planned_size_of_a_14b_model_is_that_of_the_published_file():
    """QuantStack's Wan 2.2 T2V-A14B experts are listed at 9.65 GB (Q4_K_M) and 15.4 GB (Q8_0)."""
    spec = DitSpec(dim=5120, ffn=13824, layers=40, in_channels=16, out_channels=16)
    for name, expected in (("q4_k_m", 9.65e9), ("q8_0", 15.4e9)):
        total = sum(planned_encoding(n, s, name).nbytes(s) for n, s in spec.shapes().items())
        assert abs(total / expected - 1) < 0.01


def test_a_name_of_a_mix_stands_for_most_of_its_tensors():
    assert encoding_by_name("q4_k_m") == encoding_by_name("q4_k") == Blocks("Q4_K")
