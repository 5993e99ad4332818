"""A tiling is found without running most of them: what is found is what a look at all of them would find."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lowvram.codings import Decodings, Encodings, decodings, encodings
from lowvram.footprint import META, meta_params
from lowvram.imagined import imagined_model
from lowvram.models.vae_bands import Band, Borders
from lowvram.models.vae_handed import handed_on
from lowvram.models.vae_history import Memory, tile_memories
from lowvram.models.vae_layers import History
from lowvram.models.vae_tiles import Tile, Tiling
from lowvram.offload.budget import exact_size
from lowvram.quant.spec import LATENT_MEAN_22, LATENT_STD_22, VaeSpec, numel
from lowvram.sampling.presets import model_preset
from lowvram.stages.weights import Dense
from lowvram.tiling import FLOOR
from lowvram.tiling_search import Cost, forecast
from lowvram.vae_footprint import _decoded, _encoded

SPECS = {
    "2.1": VaeSpec("2.1", 8, 8, 16, 1),
    "2.2": VaeSpec("2.2", 8, 8, 48, 1, LATENT_MEAN_22, LATENT_STD_22),
}
HALVES = ("decoder", "encoder")


def ways(half: str, spec: VaeSpec, pixels: tuple[int, int], frames: int = 33) -> Decodings | Encodings:
    model = imagined_model("none", replace(model_preset("nano"), vae=spec), "bf16")
    shape = frames, *pixels
    if half == "decoder":
        return decodings(model, shape, torch.bfloat16, exact_size)
    return encodings(model, shape, torch.float32, exact_size)


def seconds(cost: Cost) -> Any:
    return forecast(cost, 10, 10**8)


class Visited(History):
    """A history of a clip that has begun."""

    def __init__(self, memories: Sequence[Memory], band: Band) -> None:
        super().__init__(band=band)
        for m in memories:
            self.frames[m.name] = (torch.empty(1, m.shape[0], 1, *m.shape[1:]),) * m.frames

    def first(self, name: str) -> bool:
        return False


class Arbitrary(Decodings):
    """Tiles that allocate anything from their floor to five times as much."""

    def tile_scratch(self, tile: Tile, before: Tile | None) -> int:
        largest = max(numel(m.shape) for m in tile_memories(tile, self.spec.shapes()))
        factor = random.Random(repr(tile)).uniform(FLOOR, 5 * FLOOR)
        return int(factor * largest * self.dtype.itemsize)


def arbitrary() -> Arbitrary:
    found = ways("decoder", SPECS["2.1"], (384, 512), frames=81)
    return Arbitrary(found.spec, found.weights, found.latent, found.frame, found.dtype, found.rounding)


def test_what_is_found_is_the_best_of_all_whatever_tiles_allocate() -> None:
    searched, everything = arbitrary(), arbitrary()
    codings = [everything.exactly(tiling) for tiling in everything.tilings]
    rng = random.Random(7)
    for coding in rng.sample(codings, 40):
        vram, ram = (peak - rng.choice([0, 0, 1]) for peak in (coding.vram, coding.ram))
        found = searched.choose(vram, ram, seconds)
        inside = [c for c in codings if c.vram <= vram and c.ram <= ram]
        early = [c for c in inside if not everything.late(c.tiling)]
        if inside:
            assert found in inside
            assert seconds(found) == min(seconds(c) for c in early or inside)
        least = searched.choose(1, ram, seconds)
        assert least.vram == min(c.vram for c in codings if c.ram <= ram) and least.ram <= ram
        least = searched.choose(vram, 1, seconds)
        if any(c.vram <= vram for c in codings):
            assert least.ram == min(c.ram for c in codings if c.vram <= vram) and least.vram <= vram
    assert searched.choose(1, 1, seconds).vram == min(c.vram for c in codings)


def test_what_is_found_does_not_depend_on_what_was_asked_before() -> None:
    used, rng = arbitrary(), random.Random(8)
    for _ in range(25):
        budget = int(10 ** rng.uniform(6, 9)), int(10 ** rng.uniform(6, 9))
        assert used.choose(*budget, seconds) == arbitrary().choose(*budget, seconds)


def test_a_search_runs_few_tilings() -> None:
    runs = 0

    class Counted(Decodings):
        def tile_scratch(self, tile: Tile, before: Tile | None) -> int:
            nonlocal runs
            runs += 1
            return super().tile_scratch(tile, before)

    found = ways("decoder", VaeSpec(), (720, 1280), frames=121)
    counted = Counted(found.spec, found.weights, found.latent, found.frame, found.dtype, found.rounding)
    assert len({tiling.grid for tiling in counted.tilings}) > 100
    counted.choose(1, 24 * 10**9, seconds)
    assert runs <= 4
    counted.choose(10**9, 24 * 10**9, seconds)
    assert runs <= 6


@pytest.mark.parametrize("version", SPECS)
@pytest.mark.parametrize("half", HALVES)
def test_no_tile_allocates_less_than_its_floor(half: str, version: str) -> None:
    found = ways(half, SPECS[version], (384, 512))
    for grid in sorted({tiling.grid for tiling in found.tilings})[::4]:
        assert 0 < found.cut(grid).floor <= found.tile(grid)


@pytest.mark.parametrize("version", SPECS)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("plane", "tiling"), [((40, 24), Tiling(3, 2, banded=True)), ((24, 40), Tiling(1, 2, banded=True))]
)
def test_bands_hand_on_what_is_planned(
    half: str, version: str, plane: tuple[int, int], tiling: Tiling
) -> None:
    spec = SPECS[version]
    found = ways(half, spec, (plane[0] * spec.stride[1], plane[1] * spec.stride[2]))
    shapes, band = spec.shapes(), Band(3 if tiling.rows > tiling.columns else 4, True, False, {})
    with META, torch.no_grad():
        w, like = Dense(meta_params(found.weights), torch.float32), torch.empty(())
        for tile in found.half.tiles(tiling, plane):
            assert tile.flow is not None
            left: Borders = band.borders if tile.flow.start else {}
            band = Band(tile.flow.axis, tile.flow.start == 0, tile.flow.stop == tile.flow.end, left)
            history = Visited(tile_memories(tile, shapes), band)
            if half == "decoder":
                list(_decoded(spec, tile, like, w, history))
            else:
                _encoded(spec, tile, like, w, history)
            planned = handed_on(tile, shapes, found.half.frames)
            if not band.last:
                assert {name: [tuple(t.shape[1:]) for t in each] for name, each in left.items()} == {
                    each.name: [each.shape] * each.times for each in planned
                }
            assert bool(planned) is not band.last
