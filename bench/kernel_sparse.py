"""What the order of tokens is worth to attention that looks at some tiles of keys only.

Orders: raster; framewise, compact inside each latent frame; compact, blocks of four frames, four rows and four columns.
Numbers are exact, so that all of the difference is what was skipped:

local   No model: logits that fall with the distance of two tokens, equally in time, rows and columns. The mass alone.
mass    The embedded model, videos larger than it was trained for, of many tiles: the share of the softmax that lies in the tiles that are
        selected, mean over heads, queries, blocks and steps; and PSNR against attention to all. Its videos are not right
        at these sizes, whatever the attention: no score.
score   The embedded model, videos of its own size, 48 tokens, with tiles of 4 keys and queries in place of 64 and 128: PSNR, and whether
        videos are right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from lowvram import Pipeline, Runtime
from lowvram.models import self_attention, token_order
from lowvram.models.token_order import TokenOrder, compact_order
from lowvram.stages import denoise
from lowvram.triton_kernels.keys import Keys
from lowvram.triton_kernels.ops import Ops

sys.path.insert(0, str(Path(__file__).parent / "nano"))
from data import Scene, score, split  # noqa: E402

ORDERS = ("raster", "framewise", "compact")
KEEPS = (0.5, 0.25)
LOCAL_KEEPS = (0.05, 0.025)
LOCAL_GRID = (9, 16, 52)
LOCAL_LENGTH = 4.0
"""Tokens over which logits fall by half."""


@dataclass(frozen=True, slots=True)
class Case:
    """Videos of one size, and the tiles to select among."""

    name: str
    width: int
    frames: int
    keys: int
    queries: int
    prompts: int


CASES = (
    Case("mass", 192, 33, 64, 128, 2),
    Case("score", 64, 9, 4, 4, 8),
)


@dataclass
class Selecting:
    """Exact attention to the tiles that `select_tiles` would take, by the same rule; the mass of each call is noted."""

    case: Case
    keep: float
    masses: list[float] = field(default_factory=list)

    def __call__(
        self, ops: Ops, keys: Keys, x: Tensor, weight: Tensor, rope: Tensor, factor: Tensor | None, *_: object
    ) -> Tensor:
        if x.is_meta:  # a plan: what it would measure here is not what is run
            return torch.empty_like(x)
        q = x.new_empty(keys.heads, x.shape[0], 128)
        ops.norm_rope_(q, x, weight, rope, factor)
        p = _selected(q, keys.k, self.case.queries, self.case.keys, self.keep)
        mass = p.sum(-1, keepdim=True)
        self.masses.append(float(mass.mean()))
        return (p / mass @ keys.v).transpose(0, 1).flatten(1)


def _selected(q: Tensor, k: Tensor, queries: int, keys: int, keep: float) -> Tensor:
    """The softmax [heads, m, n], zero outside the selected tiles."""
    p = (q @ k.mT / 128**0.5).softmax(-1)
    means = _means(q, queries) @ _means(k, keys).mT
    best = means.topk(max(1, int(np.ceil(keep * means.shape[-1])))).indices
    kept = torch.zeros_like(means).scatter_(-1, best, 1.0).repeat_interleave(queries, -2)
    return p.mul_(kept.repeat_interleave(keys, -1)[:, : p.shape[-2], : p.shape[-1]])


def _local() -> Iterator[dict[str, object]]:
    """Queries and keys of one head as random waves over the grid: their products are a Gaussian of the distance."""
    generator = torch.Generator().manual_seed(0)
    places = torch.cartesian_prod(*(torch.arange(float(n)) for n in LOCAL_GRID))
    frequency = torch.randn(3, 64, generator=generator) * (2 * np.log(2)) ** 0.5 / LOCAL_LENGTH
    angle = places @ frequency
    rows = 8.0 * torch.cat([angle.cos(), angle.sin()], -1)[None] / 64**0.5 * 128**0.25
    for keep in LOCAL_KEEPS:
        for order in ORDERS:
            found = _order(order, LOCAL_GRID)
            x = rows if found is None else rows[:, found.raster]
            mass = _selected(x[:, ::4], x, 32, 64, keep).sum(-1).mean()
            yield {
                "op": "sparse", "case": "local", "order": order, "keep": keep,
                "mass": round(float(mass), 4), "ok": True,
            }  # fmt: skip


def _order(name: str, grid: tuple[int, int, int]) -> TokenOrder | None:
    return None if name == "raster" else compact_order(grid, framewise=name == "framewise")


def _means(x: Tensor, tile: int) -> Tensor:
    """x [heads, n, 128] -> the mean of each tile [heads, tiles, 128]."""
    return torch.stack([part.mean(1) for part in x.split(tile, 1)], 1)


def rows() -> Iterator[dict[str, object]]:
    """One object a case, share of tiles and order: mass, psnr against attention to all, shares of right videos."""
    yield from _local()
    pipe = Runtime(device="cpu").load("nano")
    for case in CASES:
        plain = _videos(pipe, case)
        yield _row(case, "sdpa", 1.0, 1.0, plain, plain)
        for keep in KEEPS:
            for order in ORDERS:
                attend = Selecting(case, keep)
                videos = _videos(pipe, case, attend, order)
                yield _row(case, order, keep, fmean(attend.masses), videos, plain)


def _scenes(case: Case) -> list[Scene]:
    return split()[1][::6][: case.prompts]


def _videos(
    pipe: Pipeline, case: Case, attend: Selecting | None = None, order: str = "raster"
) -> list[np.ndarray]:
    size = {"width": case.width, "height": case.width, "frames": case.frames, "preset": "lightning-4"}
    with ExitStack() as stack:
        if attend is not None:
            stack.enter_context(patch.object(self_attention, "attend", attend))
            stack.enter_context(patch.object(token_order, "KEY_TILE", case.keys))
        stack.enter_context(
            patch.object(denoise, "_order", lambda job, spec, grid, device: _order(order, grid))
        )
        return [
            np.stack(list(pipe(scene.caption(), seed=i, attention="sdpa", **size).frames()))
            for i, scene in enumerate(_scenes(case))
        ]


def _row(
    case: Case, order: str, keep: float, mass: float, videos: list[np.ndarray], plain: list[np.ndarray]
) -> dict[str, object]:
    error = np.mean([np.mean((a.astype(float) - b) ** 2) for a, b in zip(videos, plain, strict=True)])
    row: dict[str, object] = {
        "op": "sparse", "case": case.name, "order": order, "keep": keep, "mass": round(mass, 4),
        "psnr": None if error == 0 else round(float(10 * np.log10(255**2 / error)), 2),
    }  # fmt: skip
    if case.name == "score":
        results = [score(video, scene) for video, scene in zip(videos, _scenes(case), strict=True)]
        row |= {k: float(np.mean([getattr(r, k) for r in results])) for k in ("colour", "direction", "shape")}
    return row | {"ok": True}
