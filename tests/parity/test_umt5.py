"""The text encoder against transformers' UMT5EncoderModel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.models import umt5
from lowvram.quant.linear import Params

Error = Callable[[Tensor, Tensor], float]
PADDED = 512


def tokens(n: int) -> Tensor:
    ids = torch.randint(2, 60, (n,), generator=torch.Generator().manual_seed(n))
    ids[-1] = 1  # </s>
    return ids


def features(case: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    rows = case.params["token_embedding.weight"][ids]
    layers = case.params.blocks(case.spec.layers)
    return umt5.encode(rows, layers, case.params["norm.weight"], case.spec, mask)


def reference(case: Any, ids: Tensor, length: int) -> Tensor:
    """Rows of the true tokens, from input padded to `length` with a mask, as upstream calls it."""
    n = len(ids)
    padded = torch.zeros(1, length, dtype=torch.int64)
    padded[0, :n] = ids
    mask = (torch.arange(length) < n)[None].long()
    with torch.no_grad():
        out: Tensor = case.reference(padded, attention_mask=mask).last_hidden_state[0, :n]
    return out


def test_native_names_and_shapes_are_those_of_the_reference_class(text_case: Any) -> None:
    assert {k: tuple(v.shape) for k, v in text_case.params.tensors.items()} == text_case.spec.shapes()


@pytest.mark.parametrize("n", [1, 2, 9, 77, 300])
def test_unpadded_rows_equal_the_masked_512_of_the_reference(text_case: Any, error: Error, n: int) -> None:
    ids = tokens(n)
    assert error(features(text_case, ids), reference(text_case, ids, PADDED)) <= 1e-5


def test_a_prompt_of_full_length_equals_the_reference(text_case: Any, error: Error) -> None:
    ids = tokens(PADDED)
    assert error(features(text_case, ids), reference(text_case, ids, PADDED)) <= 1e-5


def test_a_masked_batch_equals_its_prompts_one_by_one(text_case: Any, error: Error) -> None:
    lengths, longest = (3, 17, 11), 17
    ids = torch.stack([torch.nn.functional.pad(tokens(n), (0, longest - n)) for n in lengths])
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = torch.zeros(valid.shape).masked_fill(~valid, torch.finfo(torch.float32).min)[:, None, None]
    batch = features(text_case, ids, mask)
    for row, n in zip(batch, lengths, strict=True):
        assert error(row[:n], features(text_case, tokens(n))) <= 1e-6


def test_bf16_is_as_near_to_float32_as_the_reference_in_bf16(text_case: Any) -> None:
    """Both round each sum to 8 bits; ours must not lose more than that. Errors as root mean squares."""
    ids = tokens(77)
    exact = {k: v.bfloat16().float() for k, v in text_case.params.tensors.items()}
    half = {k: v.bfloat16() for k, v in text_case.params.tensors.items()}
    spec = text_case.spec

    def run(weights: dict[str, Tensor]) -> Tensor:
        rows = weights["token_embedding.weight"][ids]
        return umt5.encode(rows, Params(weights).blocks(spec.layers), weights["norm.weight"], spec).float()

    with torch.no_grad():
        theirs = copy.deepcopy(text_case.reference).bfloat16()(ids[None]).last_hidden_state[0].float()
    truth = run(exact)
    ours = (run(half) - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    other = (theirs - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert ours <= 1.2 * other
    assert ours <= 2**-6


@pytest.mark.parametrize("n", [1, 2, 8, 9, 17, 33, 65, 129, 300])
def test_the_bucket_table_is_the_reference_one(text_case: Any, n: int) -> None:
    attention = text_case.reference.encoder.block[0].layer[0].SelfAttention
    position = torch.arange(n)
    expected = attention._relative_position_bucket(position[None, :] - position[:, None])
    assert torch.equal(umt5.relative_buckets(n), expected)


def test_every_layer_uses_its_own_bias_table(text_case: Any, error: Error) -> None:
    ids = tokens(20)
    before = features(text_case, ids)
    weights = dict(text_case.params.tensors)
    shared = weights["blocks.0.pos_embedding.embedding.weight"]
    weights |= {f"blocks.{i}.pos_embedding.embedding.weight": shared for i in range(text_case.spec.layers)}
    params = Params(weights)
    rows = weights["token_embedding.weight"][ids]
    one_table = umt5.encode(
        rows, params.blocks(text_case.spec.layers), weights["norm.weight"], text_case.spec
    )
    assert error(one_table, before) > 1e-2
