"""The lean forward: fewer heads or tokens at once, the passes apart, and what the planner says each needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowvram import footprint
from lowvram.errors import BudgetError
from lowvram.imagined import imagined_model
from lowvram.job import make_job
from lowvram.machine import machine_profile
from lowvram.models import dit
from lowvram.models.self_attention import Workspace, plain_workspace
from lowvram.offload.budget import Budget, allocated_size
from lowvram.offload.device import CpuDevice
from lowvram.offload.estimate import track
from lowvram.offload.rows import HostRows
from lowvram.planning.choose import make_plan
from lowvram.planning.plan import Lean, Plan
from lowvram.planning.visits import visiting_order
from lowvram.quant.branches import Branch
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.linear import Encoded, Params
from lowvram.quant.spec import HEAD_DIM, DitSpec, numel
from lowvram.sampling.presets import model_preset
from lowvram.triton_kernels.keys import carve, stored_bytes
from lowvram.triton_kernels.modes import MODES

SPEC = DitSpec(dim=512, ffn=768, layers=2, in_channels=16, out_channels=16, text_dim=64)
GRID = (3, 5, 4)
TOKENS = 60


@pytest.fixture
def params() -> Params:
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.05 + (1.0 if "norm" in name else 0.0)
        for name, shape in SPEC.shapes().items()
    }
    factors = [torch.randn(s, generator=generator) * 0.05 for s in ((4, 512), (512, 4))]
    return Params(weights, {"blocks.0.self_attn.q": (Branch(factors[0], factors[1], 0.7),)})


def run(
    params: Params,
    group: int,
    chunk: int,
    dtype: torch.dtype = torch.float32,
    away: bool = False,
    mode: str = "sdpa",
    grid: tuple[int, int, int] = GRID,
    residual: torch.dtype | None = None,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    tokens = numel(grid)
    latent = torch.randn(16, grid[0], 2 * grid[1], 2 * grid[2], generator=generator)
    context = dit.embed_text(params, SPEC, torch.randn(7, 64, generator=generator).to(dtype))
    time = dit.embed_time(params, SPEC, torch.tensor([500.0]), tokens)
    stored = stored_bytes(MODES[mode], group or SPEC.heads, tokens, dtype)
    buffers = (torch.empty(n, dtype=torch.uint8) for n in stored)
    keys = carve(MODES[mode], group or SPEC.heads, tokens, dtype, *buffers)
    out = torch.empty(tokens, SPEC.dim, dtype=dtype) if group else None
    work = Workspace(keys, dtype, out, chunk)
    if away:
        kept = keys.stride_of_sample() if keys.mode.quantised else 0
        rows = HostRows(CpuDevice(), "x", tokens, SPEC.dim, residual or dtype, chunk, kept)
        work = replace(work, residuals=(rows,))
    elif residual is not None:
        work = replace(work, residuals=(torch.empty(tokens, SPEC.dim, dtype=residual),))
    with torch.inference_mode():
        return dit.forward(
            params, params.blocks(2), SPEC, latent, time, [context], dit.rope_table(*grid), work
        )[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("group", "chunk"), [(1, 4096), (2, 4096), (1, 16), (2, 17), (0, 16)])
def test_heads_and_tokens_at_once_do_not_change_the_result(
    params: Params, group: int, chunk: int, dtype: torch.dtype
) -> None:
    whole = run(params, 0, 4096, dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert (run(params, group, chunk, dtype) - whole).abs().max() <= tolerance * whole.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("group", "chunk"), [(0, 4096), (0, 16), (1, 17), (2, 30)])
def test_a_residual_on_the_host_changes_no_bit(
    params: Params, group: int, chunk: int, dtype: torch.dtype
) -> None:
    assert torch.equal(run(params, group, chunk, dtype, away=True), run(params, group, chunk, dtype))


@pytest.mark.parametrize("mode", ["sdpa", "int8"])
def test_a_residual_in_float32_is_nearer_to_a_forward_in_float32(params: Params, mode: str) -> None:
    rounded = Params({name: params[name].bfloat16().float() for name in params.tensors})
    truth = run(rounded, 0, 4096)
    usual, exact = (
        (run(rounded, 0, 16, torch.bfloat16, mode=mode, residual=kept) - truth).norm()
        for kept in (torch.bfloat16, torch.float32)
    )
    assert 0 < exact < 0.8 * usual
    on_host, grouped = (
        run(rounded, group, 16, torch.bfloat16, True, mode, residual=torch.float32) for group in (0, 2)
    )
    assert torch.equal(on_host, run(rounded, 0, 16, torch.bfloat16, mode=mode, residual=torch.float32))
    assert torch.equal(grouped, run(rounded, 2, 16, torch.bfloat16, mode=mode, residual=torch.float32))


@pytest.mark.parametrize("mode", ["int8", "int8-fp8", "sparse"])
@pytest.mark.parametrize(("group", "chunk"), [(0, 1024), (2, 1024)])
def test_nor_where_keys_are_centred_by_tokens_from_all_over_the_sequence(
    params: Params, group: int, chunk: int, mode: str
) -> None:
    grid = (3, 20, 18)  # 1080 tokens, of which 68 are sampled, some in the second chunk
    plain, away = (run(params, group, chunk, mode=mode, grid=grid, away=each) for each in (False, True))
    assert torch.equal(away, plain)


@pytest.mark.parametrize(("group", "chunk"), [(0, 4096), (0, 16), (1, 4096), (2, 32)])
def test_what_a_block_allocates_is_what_fake_tensors_say(params: Params, group: int, chunk: int) -> None:
    from lowvram.imagined import imagined_model as imagine  # the block's shapes, as a plan sees them

    spec = model_preset("nano")
    block = imagine("nano", spec, "fp32").transformers["high"].groups()["blocks.0"]
    tokens = 2 * chunk if chunk < 100 else 96
    predicted = footprint.block_scratch(
        spec.dit, block, tokens, 0, 510, torch.float32, group=min(group, 1), chunk=chunk
    )
    own = {n: torch.randn(s) * 0.05 for n, s in spec.dit.block_shapes().items()}
    group = min(group, 1)
    k, v = (torch.empty(group or 2, tokens, HEAD_DIM) for _ in "kv")
    x, rope = torch.randn(tokens, 256), torch.rand(tokens, 64, 2)
    work = plain_workspace(k, v, torch.empty_like(x) if group else None, chunk)
    time = dit.Time(torch.zeros(1, 256), torch.zeros(1, 6, 256), tokens)
    context = dit.Context(torch.randn(512, 256), torch.zeros(512))
    with torch.inference_mode(), track(rounding=allocated_size) as tracker:
        dit.block_(Params(own), x, time, context, rope, work)
    measured = tracker.peak().peak_bytes
    assert measured <= predicted <= 1.03 * measured


@pytest.mark.parametrize(("encoding", "unpacked"), [("fp8", False), ("fp8", True), ("q4_k", True)])
def test_what_encoded_weights_take_is_what_fake_tensors_say(encoding: str, unpacked: bool) -> None:
    spec = model_preset("nano")
    block = imagined_model("nano", spec, encoding).transformers["high"].groups()["blocks.0"]
    tokens, dim = 64, spec.dit.dim
    predicted = footprint.block_scratch(
        spec.dit, block, tokens, 0, 510, torch.float32, chunk=32, unpacked=unpacked
    )
    stored: dict[str, torch.Tensor | Encoded] = {}
    for ref in block.refs:
        parts = ref.encoding.encode(torch.randn(ref.shape) * 0.05)
        plain = isinstance(ref.encoding, Plain)
        stored[ref.name] = parts["weight"] if plain else Encoded(ref.encoding, ref.shape, parts)
    p = Params(stored)
    k, v = (torch.empty(spec.dit.heads, tokens, HEAD_DIM) for _ in "kv")
    scratch = torch.empty(p.unpacked_nbytes(torch.float32), dtype=torch.uint8)
    x, rope = torch.randn(tokens, dim), torch.rand(tokens, 64, 2)
    time = dit.Time(torch.zeros(1, dim), torch.zeros(1, 6, dim), tokens)
    context, work = dit.Context(torch.randn(512, dim), torch.zeros(512)), plain_workspace(k, v, None, 32)
    with torch.inference_mode(), track(rounding=allocated_size) as tracker:
        dit.block_(p.unpacked(torch.float32, scratch) if unpacked else p, x, time, context, rope, work)
    measured = tracker.peak().peak_bytes
    assert measured <= predicted <= 1.03 * measured


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("name", ["int8", "int8-fp16"])
def test_8_bit_attention_does_not_see_on_which_side_of_a_product_a_channel_is_large(
    params: Params, name: str, group: int
) -> None:
    """Rows of q and k are balanced channel by channel before they are quantised: no bit depends on who was larger."""

    def result() -> torch.Tensor:
        stored = stored_bytes(MODES[name], group or SPEC.heads, TOKENS, torch.float32)
        keys = carve(
            MODES[name], group or SPEC.heads, TOKENS, torch.float32,
            *(torch.empty(n, dtype=torch.uint8) for n in stored),
        )  # fmt: skip
        out = torch.empty(TOKENS, SPEC.dim) if group else None
        x = torch.randn(TOKENS, SPEC.dim, generator=torch.Generator().manual_seed(2))
        time = dit.embed_time(params, SPEC, torch.tensor([500.0]), TOKENS)
        context = dit.embed_text(params, SPEC, torch.zeros(7, 64))
        with torch.inference_mode():
            dit.block_(
                params.scope("blocks.0."), x, time, context, dit.rope_table(*GRID),
                Workspace(keys, torch.float32, out),
            )  # fmt: skip
        return x

    before = result()
    by = torch.ones(SPEC.dim)
    by[128:140], by[300:302] = 4, 0.5
    params["blocks.0.self_attn.norm_q.weight"].div_(by)
    params["blocks.0.self_attn.norm_k.weight"].mul_(by)
    assert torch.equal(result(), before)


def plan(vram: str, **settings: object) -> Plan:
    from lowvram.offload.budget import parse_bytes

    spec = model_preset("wan2.2-t2v-a14b")
    size: dict[str, object] = {"width": 832, "height": 480, "frames": 81}
    job = make_job(spec, model="wan2.2-t2v-a14b", files={}, **(size | settings))  # type: ignore[arg-type]
    budget = Budget(parse_bytes(vram), 64 * 10**9)
    return make_plan(job, imagined_model("wan2.2-t2v-a14b", spec, "fp8"), budget, machine_profile("rtx4090"))


def test_a_large_budget_runs_the_fastest_way() -> None:
    assert plan("24GB").lean == Lean()
    assert plan("24GB").blocks()["resident"] == 80


def test_a_smaller_budget_never_plans_more_than_it_has() -> None:
    spent = []
    for vram in ("16GB", "8GB", "6GB", "5GB"):
        found = plan(vram)
        assert found.vram <= found.budget.vram
        assert found.ram <= found.budget.ram
        spent.append(found.blocks()["resident"])
    assert spent == sorted(spent, reverse=True)


def test_the_minimum_that_a_refusal_names_is_true() -> None:
    with pytest.raises(BudgetError) as refused:
        plan("1GB")
    minimum = refused.value.minimum_vram
    assert minimum is not None
    assert plan(f"{minimum}B").vram <= minimum
    with pytest.raises(BudgetError):
        plan(f"{minimum - 1}B")


def test_passes_apart_visit_every_block_twice() -> None:
    spec = model_preset("nano")
    job = make_job(spec, model="nano", files={}, steps=4)
    together, apart = visiting_order(job, spec, True), visiting_order(job, spec, False)
    assert len(together) == 4 * 6
    assert len(apart) == 2 * len(together)
    assert apart[:6] == apart[6:12] == together[:6]


def test_the_same_claims_make_the_sum_of_every_stage() -> None:
    found = plan("8GB").to_json()
    for stage in found["stages"]:
        assert sum(stage["claims"].values()) == stage["vram"]
        assert sum(stage["ram_claims"].values()) == stage["ram"]
    assert found["peak"]["vram"] == max(stage["vram"] for stage in found["stages"])
