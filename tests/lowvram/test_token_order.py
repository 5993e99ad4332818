"""The order of tokens for attention to some tiles: neighbours together, and nothing else of a forward changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram import Runtime
from lowvram.models import dit
from lowvram.models.self_attention import plain_workspace
from lowvram.models.token_order import TokenOrder, compact_order
from lowvram.offload.placement import Placement
from lowvram.quant.linear import Params
from lowvram.quant.spec import HEAD_DIM, DitSpec
from lowvram.stages import denoise
from lowvram.triton_kernels.attention import KEY_TILE, QUERY_TILE, pool_keys, select_tiles
from lowvram.triton_kernels.norm_rope import quantise_rows

GRIDS = [(21, 30, 52), (31, 45, 80), (1, 45, 80), (3, 4, 4), (2, 1, 1), (6, 7, 3)]


def test_where_attention_is_local_the_tiles_that_matter_are_selected_and_are_fewest_in_the_compact_order() -> (
    None
):
    """Logits that fall with the distance in frames, rows and columns; of the softmax, what lies in the selected tiles."""
    grid, keep = (9, 8, 64), 0.025
    places = torch.cartesian_prod(*(torch.arange(float(n)) for n in grid))
    waves = places @ (torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 0.3)
    raster = torch.cat([waves.cos(), waves.sin()], -1)[None] * 128**0.25
    kept, best = {}, {}
    for name, order in (("raster", None), ("compact", compact_order(grid))):
        x = raster if order is None else raster[:, order.raster]
        q, scale = quantise_rows(x)
        pooled = torch.empty(1, x.shape[1] // KEY_TILE, HEAD_DIM)
        pool_keys(q, scale, pooled)
        index = select_tiles(q, scale, pooled, keep)[0].long()
        p = (x[0] @ x[0].mT / 128**0.5).softmax(-1)
        of_tiles = p.unflatten(0, (-1, QUERY_TILE)).mean(1).unflatten(1, (-1, KEY_TILE)).sum(-1)
        kept[name] = float(of_tiles.gather(1, index).sum(1).mean())
        best[name] = float(of_tiles.topk(index.shape[1]).values.sum(1).mean())
        assert kept[name] > 0.98 * best[name]
    assert 1 - kept["compact"] < 0.6 * (1 - kept["raster"])  # of what is lost, little more than half


@pytest.mark.parametrize("framewise", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_token_has_one_place_in_the_slab_of_its_frame(
    grid: tuple[int, int, int], framewise: bool
) -> None:
    order = compact_order(grid, framewise=framewise)
    frames, per_frame = grid[0], grid[1] * grid[2]
    assert order.slabs[0] == (0, 1) and order.slabs[-1][1] == frames
    assert all(a[1] == b[0] for a, b in zip(order.slabs, order.slabs[1:], strict=False))
    assert len(order.slabs) == (frames if framewise else 1 + -(-(frames - 1) // 4))
    for n, (first, end) in enumerate(order.slabs):
        places = order.inside(n)
        assert torch.equal(places.sort().values, torch.arange((end - first) * per_frame))
        assert torch.equal(order.raster[first * per_frame : end * per_frame], places + first * per_frame)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_64_tokens_in_a_row_lie_within_a_small_block(grid: tuple[int, int, int]) -> None:
    """Whatever the height of the grid, and wherever the 64 begin; a band's last columns are followed by the next band's."""
    _, rows, columns = grid
    raster = compact_order(grid).raster[rows * columns :]
    places = torch.stack([raster // (rows * columns), raster // columns % rows, raster % columns], -1)
    windows = places.unfold(0, 64, 24)  # [n, 3, 64]
    extent = windows.amax(-1) - windows.amin(-1) + 1
    assert extent.float().mean(0).tolist() < [4.5, 7.0, 6.5]
    assert (extent.prod(-1) <= 2 * 4 * 5 * 6).float().mean() > 0.9
    raster_order = torch.arange(len(raster)).unfold(0, 64, 24) % columns
    assert (raster_order.amax(-1) - raster_order.amin(-1) + 1).min() >= 52  # a stripe, or a whole row


# ---- in a forward

SPEC = DitSpec(dim=256, ffn=384, layers=2, in_channels=20, out_channels=16, text_dim=64)
GRID = (6, 7, 5)
TOKENS = 6 * 7 * 5


@pytest.fixture
def params() -> Params:
    generator = torch.Generator().manual_seed(1)
    return Params(
        {
            name: torch.randn(shape, generator=generator) * 0.05 + (1.0 if "norm" in name else 0.0)
            for name, shape in SPEC.shapes().items()
        }
    )


def velocity(params: Params, order: TokenOrder | None, times: list[float], chunk: int = 64) -> Tensor:
    """A step of `times`, one for each of the first frames and one for the others, with channels beside the latent."""
    generator = torch.Generator().manual_seed(2)
    latent, given = (torch.randn(c, 6, 14, 10, generator=generator) for c in (16, 4))
    context = dit.embed_text(params, SPEC, torch.randn(7, 64, generator=generator))
    time = dit.embed_time(params, SPEC, torch.tensor(times), TOKENS // (6 if len(times) > 1 else 1))
    k, v = (torch.empty(SPEC.heads, TOKENS, HEAD_DIM) for _ in "kv")
    with torch.inference_mode():
        return dit.forward(
            params, params.blocks(2), SPEC, latent, time, [context], dit.rope_table(*GRID, order=order),
            plain_workspace(k, v, chunk=chunk), given, order=order,
        )[0]  # fmt: skip


@pytest.mark.parametrize("framewise", [False, True])
@pytest.mark.parametrize("times", [[500.0], [0.0, 500.0]], ids=["one time", "a first frame with its own"])
def test_dense_attention_gives_the_same_in_any_order(
    params: Params, times: list[float], framewise: bool
) -> None:
    want = velocity(params, None, times)
    got = velocity(params, compact_order(GRID, framewise=framewise), times)
    assert (got - want).norm() < 1e-5 * want.norm()


def test_the_order_has_to_be_that_of_the_rotary_table(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail: without the table in order the result is another."""
    want = velocity(params, None, [500.0])
    monkeypatch.setattr(dit, "rope_table", lambda *grid, order, plain=dit.rope_table: plain(*grid))
    assert (velocity(params, compact_order(GRID), [500.0]) - want).norm() > 1e-3 * want.norm()


def test_a_face_needs_frames_one_after_the_other(params: Params) -> None:
    from lowvram.sampling.presets import model_preset

    spec = model_preset("nano-animate").dit
    x = torch.empty(spec.out_channels, 6, 4, 4)
    nothing: Any = None
    with pytest.raises(ValueError, match="framewise"):
        dit.forward(params, [], spec, x, nothing, [], nothing, nothing, order=compact_order((6, 2, 2)))


# ---- through the product

PROMPT = "a red circle moves left on a black background"
SIZE: dict[str, Any] = {"steps": 3, "seed": 1, "frames": 9, "width": 96, "height": 96}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return Runtime(vram="2GB", ram="4GB", device="cpu", cache=False).load("nano")


def test_dense_attention_makes_the_same_video_in_any_order(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipe(PROMPT, **SIZE).latent
    orders = []

    def compact(job: Any, spec: DitSpec, grid: tuple[int, int, int], device: torch.device) -> TokenOrder:
        orders.append(compact_order(grid, device=device))
        return orders[-1]

    monkeypatch.setattr(denoise, "_order", compact)
    again = pipe(PROMPT, **SIZE).latent
    assert len(orders) == 1 and (again - plain).norm() < 1e-4 * plain.norm()


def test_tiles_are_selected_in_the_compact_order_wherever_the_weights_live(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = pipe.job(PROMPT, attention="sparse", attention_ends="sparse", **SIZE)
    plan = pipe.plan_job(job)
    assert plan.stage("denoise").claims["token order"] == 1024  # 108 numbers of 8 bytes
    resident = pipe.run(job, plan=plan).latent
    disk: dict[Any, Any] = {(e, n): "disk" for e in ("high", "low") for n in range(6)}
    assert torch.equal(pipe.run(job, plan=replace(plan, denoise=Placement(disk))).latent, resident)
    monkeypatch.setattr(denoise, "_order", lambda *_: None)
    assert not torch.equal(pipe.run(job, plan=plan).latent, resident)
    assert "token order" not in pipe.plan(PROMPT, attention="int8", **SIZE).stage("denoise").claims
