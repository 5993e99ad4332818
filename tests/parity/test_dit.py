"""The transformer against diffusers' WanTransformer3DModel, and its two forms against each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.models import dit
from lowvram.models.self_attention import plain_workspace
from lowvram.quant.branches import Branch
from lowvram.quant.linear import Params
from lowvram.quant.names import DIT

Error = Callable[[Tensor, Tensor], float]
Noise = Callable[..., Tensor]

EXACT = 1e-5
"""Float32 against float32 in another order of summation: measured 2e-6 to 3e-6."""

SIZES = {
    "one token": (1, 2, 2),
    "one frame": (1, 6, 10),
    "portrait": (3, 10, 6),
    "landscape": (3, 6, 10),
    "long": (7, 4, 6),
}
"""Latent frames, rows and columns; 1, 15, 45, 45 and 42 tokens."""


def inputs(case: Any, noise: Noise, size: str = "landscape", rows: int = 77) -> dict[str, Tensor]:
    """Arguments of `plain` and `truth`; ti2v gets one timestep per latent frame, the first zero."""
    spec, (f, h, w) = case.spec, SIZES[size]
    given = {
        "latent": noise(spec.in_channels, f, h, w, seed=1),
        "t": torch.tensor([713.0]),
        "text": noise(rows, spec.text_dim, seed=2),
    }
    if spec.in_channels == 48 and f > 1:
        given["t"] = torch.tensor([0.0] + [713.0 + i for i in range(f - 1)])
    if spec.image_tokens:
        given["image"] = noise(spec.image_tokens, spec.image_dim, seed=3)
    return given


def lean(case: Any, given: dict[str, Tensor], chunk: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The chunked form for one text."""
    out: Tensor = case.lean(**given | {"text": [given["text"]]}, chunk=chunk, dtype=dtype)[0]
    return out


@pytest.mark.parametrize("variant", ["t2v", "i2v", "i2v-clip", "flf2v-clip", "ti2v"])
def test_native_names_and_shapes_are_those_of_the_reference_class(
    dit_case: Callable[[str], Any], variant: str
) -> None:
    case = dit_case(variant)
    assert {k: tuple(v.shape) for k, v in case.outer.tensors.items()} == case.spec.shapes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", ["t2v", "i2v", "i2v-clip", "ti2v"])
def test_both_forms_equal_the_reference(
    dit_case: Callable[[str], Any], noise: Noise, error: Error, variant: str, size: str
) -> None:
    case = dit_case(variant)
    given = inputs(case, noise, size)
    truth = case.truth(**given)
    assert error(case.plain(**given), truth) <= EXACT
    assert error(lean(case, given, chunk=16), truth) <= EXACT


def test_two_clip_images_equal_the_reference(
    dit_case: Callable[[str], Any], noise: Noise, error: Error
) -> None:
    case = dit_case("flf2v-clip")
    given = inputs(case, noise, "one frame")
    assert error(case.plain(**given), case.truth(**given)) <= EXACT


@pytest.mark.parametrize("rows", [1, 2, 77, 510, 511, 512])
@pytest.mark.parametrize("variant", ["t2v", "i2v-clip"])
def test_merged_padding_equals_512_zero_padded_rows(
    dit_case: Callable[[str], Any], noise: Noise, error: Error, variant: str, rows: int
) -> None:
    case = dit_case(variant)
    given = inputs(case, noise, "one frame", rows)
    assert error(case.plain(**given), case.truth(**given)) <= EXACT
    context = dit.embed_text(case.outer, case.spec, given["text"])
    assert len(context.text) == len(context.bias) <= case.spec.text_len


def test_merged_padding_keeps_its_weight_when_logits_are_rounded_to_bf16(
    dit_case: Callable[[str], Any],
) -> None:
    """Attention kernels take the logit offsets in the dtype of q: no more than 0.03 % may be lost there."""
    case = dit_case("t2v")
    for rows in range(512):
        bias = dit.embed_text(case.outer, case.spec, torch.zeros(rows, case.spec.text_dim)).bias[rows:]
        weight = bias.bfloat16().double().exp().sum()
        assert abs(float(weight) - (512 - rows)) <= 3e-4 * (512 - rows)


@pytest.mark.parametrize("chunk", [1, 7, 9, 16, 44, 45, 46, 4096])
@pytest.mark.parametrize("variant", ["i2v-clip", "ti2v"])
def test_any_chunk_size_gives_the_reference(
    dit_case: Callable[[str], Any], noise: Noise, error: Error, variant: str, chunk: int
) -> None:
    """45 tokens in 3 frames of 15: chunks that divide the tokens or not, that cut frames or not."""
    case = dit_case(variant)
    given = inputs(case, noise)
    assert error(lean(case, given, chunk), case.truth(**given)) <= EXACT


@pytest.mark.parametrize("chunk", [1, 16, 4096])
def test_a_block_in_place_equals_the_plain_block(
    dit_case: Callable[[str], Any], noise: Noise, error: Error, chunk: int
) -> None:
    case = dit_case("i2v-clip")
    given = inputs(case, noise)
    grid = case.grid(given["latent"])
    x = noise(45, 256, seed=5)
    time = dit.embed_time(case.outer, case.spec, given["t"], 45)
    context = dit.embed_text(case.outer, case.spec, given["text"], given["image"])
    rope = dit.rope_table(*grid)
    expected = dit.block(case.blocks[0], x, time, context, rope)
    kept, work = x.clone(), torch.full((2, 2, 45, 128), float("nan"))
    dit.block_(case.blocks[0], x, time, context, rope, plain_workspace(work[0], work[1], chunk=chunk))
    assert error(x, expected) <= 2e-6
    assert error(x, kept) > 0.1


@pytest.mark.parametrize("chunk", [16, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_contexts_in_one_forward_equal_two_forwards_bit_for_bit(
    dit_case: Callable[[str], Any], noise: Noise, dtype: torch.dtype, chunk: int
) -> None:
    case = dit_case("i2v-clip")
    given = inputs(case, noise)
    texts = [given.pop("text"), noise(3, 64, seed=6)]
    both = case.lean(**given, text=texts, chunk=chunk, dtype=dtype)
    for text, velocity in zip(texts, both, strict=True):
        assert torch.equal(velocity, case.lean(**given, text=[text], chunk=chunk, dtype=dtype)[0])
    assert not torch.equal(*both)


@pytest.mark.parametrize("rows", [2, 77])
@pytest.mark.parametrize("variant", ["t2v", "i2v-clip", "ti2v"])
def test_bf16_loses_no_more_than_the_reference_in_bf16(
    dit_case: Callable[[str], Any], noise: Noise, variant: str, rows: int
) -> None:
    """Truth is the float32 reference with the same rounded weights and inputs.

    Every sum is rounded to 8 bits, a relative root mean square of at most 2^-9 / sqrt(3) = 0.0011 each; about a
    dozen such roundings lie between input and output, independent of each other, which makes 0.004. The bound is
    twice that. The reference in bf16 (with the modules it keeps in float32) rounds at the same places and the time
    embedding too, so ours may not be worse but for chance, 20 %.
    """
    case = dit_case(variant)
    halves = {k: v if k == "t" else v.bfloat16() for k, v in inputs(case, noise, rows=rows).items()}
    rounded = {k: v.float() for k, v in halves.items()}
    expected = replace(case, reference=copy.deepcopy(case.reference).bfloat16().float()).truth(**rounded)

    def loss(x: Tensor) -> float:
        return float((x.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    theirs = loss(replace(case, reference=_mixed(case.reference)).truth(**halves))
    for ours in (lean(case, rounded, 16, torch.bfloat16), case.plain(**rounded, dtype=torch.bfloat16)):
        assert loss(ours) <= 1.2 * theirs
        assert loss(ours) <= 0.008


def _mixed(model: Any) -> Any:
    """A copy of the reference as diffusers loads it in bfloat16: some modules stay in float32."""
    mixed = copy.deepcopy(model).bfloat16()
    for name, module in mixed.named_modules():
        if name.rpartition(".")[2] in mixed._keep_in_fp32_modules:
            module.float()
    for name, p in mixed.named_parameters():
        if "scale_shift_table" in name:
            p.data = p.data.float()
    return mixed


def silent(case: Any) -> dict[str, Tensor]:
    """A block in bfloat16 whose attention and FFN put out nothing: what it adds is then put in by hand."""
    p = {k: v.bfloat16() for k, v in case.blocks[0].tensors.items()}
    for name in ("self_attn.o", "cross_attn.o", "ffn.2"):
        p[f"{name}.weight"], p[f"{name}.bias"] = (
            torch.zeros_like(p[f"{name}.{k}"]) for k in ("weight", "bias")
        )
    return p


def run_block(case: Any, p: dict[str, Tensor], x: Tensor, time: dit.Time) -> Tensor:
    context = dit.embed_text(case.cast(torch.bfloat16)[0], case.spec, torch.zeros(1, 64).bfloat16())
    out = dit.block(Params(p), x, time, context, dit.rope_table(1, 1, len(x)))
    in_place, work = x.clone(), torch.empty(2, 2, len(x), 128, dtype=x.dtype)
    dit.block_(
        Params(p),
        in_place,
        time,
        context,
        dit.rope_table(1, 1, len(x)),
        plain_workspace(work[0], work[1]),
    )
    assert torch.equal(out, in_place)
    return out


def test_a_bf16_residual_is_rounded_once_per_gate(dit_case: Callable[[str], Any], noise: Noise) -> None:
    case = dit_case("t2v")
    time = dit.embed_time(case.outer, case.spec, torch.tensor([713.0]), 9)
    p = silent(case)
    p["self_attn.o.bias"] = noise(256, seed=91).bfloat16()
    x = noise(9, 256, seed=92).bfloat16()
    gate = p["modulation"].double()[0, 2] + time.blocks.double()[0, 2]
    expected = (x.double() + p["self_attn.o.bias"].double() * gate).bfloat16()
    assert (run_block(case, p, x, time) == expected).float().mean() > 0.999


def test_a_modulated_norm_is_rounded_once(dit_case: Callable[[str], Any], noise: Noise) -> None:
    """A single token attends to itself: with v and o the identity and a gate of 1, the block adds the norm."""
    case = dit_case("t2v")
    time = dit.embed_time(case.outer, case.spec, torch.tensor([713.0]), 1)
    time.blocks[..., 2, :] = 1
    p = silent(case)
    p["modulation"][:, 2] = 0
    p["self_attn.v.weight"] = p["self_attn.o.weight"] = torch.eye(256).bfloat16()
    p["self_attn.v.bias"] = torch.zeros(256).bfloat16()
    same = []
    for seed in range(8):
        x = noise(1, 256, seed=93 + seed).bfloat16() / 64
        shift, scale = (p["modulation"].double()[0, i] + time.blocks.double()[0, i] for i in (0, 1))
        wide = x.double() - x.double().mean()
        wide = wide / (wide.square().mean() + 1e-6).sqrt()
        expected = (x.double() + (wide * (1 + scale) + shift).bfloat16().double()).bfloat16()
        same.append((run_block(case, p, x, time) == expected).float().mean())
    assert torch.stack(same).mean() > 0.99


def test_time_and_head_are_float32_whatever_the_weights(
    dit_case: Callable[[str], Any], noise: Noise, error: Error
) -> None:
    case = dit_case("ti2v")
    outer, _ = case.cast(torch.bfloat16)
    w = {k: v.double() for k, v in outer.tensors.items()}
    t = torch.tensor([0.0, 713.4375, 999.9])
    angle = t.double()[:, None] * 10000.0 ** -(torch.arange(128).double() / 128)
    e = (
        torch.cat([angle.cos(), angle.sin()], -1) @ w["time_embedding.0.weight"].T
        + w["time_embedding.0.bias"]
    )
    e = torch.nn.functional.silu(e) @ w["time_embedding.2.weight"].T + w["time_embedding.2.bias"]
    e0 = torch.nn.functional.silu(e) @ w["time_projection.1.weight"].T + w["time_projection.1.bias"]
    time = dit.embed_time(outer, case.spec, t, 15)
    assert time.head.dtype == time.blocks.dtype == torch.float32
    assert error(time.head, e) <= 1e-6
    assert error(time.blocks.flatten(-2), e0) <= 1e-6
    x = noise(45, 256, seed=97).bfloat16()
    narrow = dit.head(outer, case.spec, x, time, (3, 3, 5))
    wide = dit.head(case.cast(torch.bfloat16)[0], case.spec, x.float(), time, (3, 3, 5), chunk=7)
    assert narrow.dtype == torch.float32
    assert error(narrow, wide) <= 1e-6


def test_gradients_of_every_parameter_and_input_equal_the_reference(
    dit_case: Callable[[str], Any], noise: Noise, error: Error
) -> None:
    """`block` is what the embedded model is trained with."""
    case = dit_case("i2v-clip")
    given = inputs(case, noise, "one frame")
    leaves = {k: v.clone().requires_grad_() for k, v in case.outer.tensors.items()}
    params = Params(leaves)
    ours = replace(case, outer=params, blocks=tuple(params.blocks(case.spec.layers)))
    latent = given.pop("latent").requires_grad_()
    probe = noise(16, 1, 6, 10, seed=8)
    got = torch.autograd.grad((ours.plain(latent, **given) * probe).sum(), [latent, *leaves.values()])

    named = dict(case.reference.named_parameters())
    text = torch.nn.functional.pad(given["text"], (0, 0, 0, 512 - 77))
    out = case.reference(latent[None], given["t"], text[None], given["image"][None]).sample[0]
    theirs = [named[str(DIT.from_native(k))] for k in leaves]
    expected = torch.autograd.grad((out * probe).sum(), [latent, *theirs])
    for name, a, b in zip(["latent", *leaves], got, expected, strict=True):
        assert error(a, b) <= 1e-4, name


def test_a_batch_equals_its_samples_one_by_one(
    dit_case: Callable[[str], Any], noise: Noise, error: Error
) -> None:
    case = dit_case("ti2v")
    spec, grid = case.spec, (3, 3, 5)
    latent = noise(2, 48, 3, 6, 10, seed=1)
    t = torch.tensor([[0.0, 500.0, 501.0], [0.0, 20.0, 21.0]])
    singles = [dit.embed_text(case.outer, spec, noise(9, 64, seed=s)) for s in (1, 2)]
    rope = dit.rope_table(*grid)

    def run(latent: Tensor, t: Tensor, context: dit.Context) -> Tensor:
        time = dit.embed_time(case.outer, spec, t, 15)
        x = dit.embed_latent(case.outer, spec, latent, torch.float32)
        for p in case.blocks:
            x = dit.block(p, x, time, context, rope)
        return dit.head(case.outer, spec, x, time, grid)

    text, bias = (torch.stack(pair) for pair in zip(*((c.text, c.bias) for c in singles), strict=True))
    batch = run(latent, t, dit.Context(text, bias))
    assert batch.shape == (2, 48, 3, 6, 10)
    for i in range(2):
        assert error(batch[i], run(latent[i], t[i], singles[i])) <= EXACT


def test_a_lora_branch_equals_the_merged_weight(
    dit_case: Callable[[str], Any], noise: Noise, error: Error
) -> None:
    case = dit_case("t2v")
    given = inputs(case, noise, "one frame")
    branches, merged = {}, dict(case.outer.tensors)
    for i, name in enumerate(("blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.cross_attn.v")):
        out, into = merged[f"{name}.weight"].shape
        pair = [
            Branch(noise(4, into, seed=20 + i + k) / 16, noise(out, 4, seed=30 + i + k), 0.7) for k in (0, 9)
        ]
        branches[name] = tuple(pair)
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + sum(0.7 * (b.up @ b.down) for b in pair)
    branched, dense = (
        replace(case, outer=p, blocks=tuple(p.blocks(case.spec.layers))).plain(**given)
        for p in (Params(case.outer.tensors, branches), Params(merged))
    )
    assert error(branched, dense) <= EXACT
    assert error(branched, case.plain(**given)) > 0.01
