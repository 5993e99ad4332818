"""Tiles of the autoencoders give the numbers of the whole plane, whatever their shape and order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowvram.models import vae, vae_clip, vae_layers, vae_tiles
from lowvram.models.vae_clip import Piece
from lowvram.models.vae_history import Kept, memories, pack, packed_size, tile_memories
from lowvram.models.vae_tiles import Span, Tiling, field_of, make_tile
from lowvram.quant.spec import LATENT_MEAN_22, LATENT_STD_22, VaeSpec

CPU = torch.device("cpu")
EXACT = 1e-10
"""Float64 in another order of summation: measured 2e-15."""
SPECS = {
    "2.1": VaeSpec("2.1", 8, 8, 16, 1),
    "2.2": VaeSpec("2.2", 8, 8, 48, 1, LATENT_MEAN_22, LATENT_STD_22),
}
PUBLISHED = {"2.1": VaeSpec(), "2.2": VaeSpec("2.2", 160, 256, 48)}


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_no_gradients() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> VaeSpec:
    return SPECS[request.param]


def random_weights(spec: VaeSpec, gain: float = 2.0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Nothing neutral: large convolutions, biases, uneven norms."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in spec.shapes().items():
        w = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("gamma"):
            w = 1 + 0.3 * w
        elif name.endswith("weight"):
            w = w * gain / math.sqrt(math.prod(shape[1:]))
        else:
            w = 0.3 * w
        weights[name] = w.to(dtype)
    return weights


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assemble(pieces: Iterator[Piece], like: Tensor) -> Tensor:
    """A clip from its pieces; every pixel must come exactly once."""
    clip, times = torch.zeros_like(like), torch.zeros(like.shape[2:], dtype=torch.int)
    for piece in pieces:
        place = (piece.frame, slice(*piece.rows), slice(*piece.columns))
        clip[0, :, *place] = piece.pixels[0, :, 0]
        times[place] += 1
    assert (times == 1).all()
    return clip


def untiled(spec: VaeSpec, w: Mapping[str, Tensor], z: Tensor) -> Tensor:
    return torch.cat(list(vae.decode(spec, w, z)), dim=2)


def tiled(spec: VaeSpec, w: Mapping[str, Tensor], z: Tensor, tiling: Tiling, like: Tensor) -> Tensor:
    return assemble(vae_clip.decode(spec, w, z, tiling, Kept(), CPU, z.dtype), like)


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# ---- what depends on what


@pytest.mark.parametrize("version", PUBLISHED)
def test_the_decoder_sees_13_latents_around_and_the_encoder_8_before_and_9_after(version: str) -> None:
    spec, far = PUBLISHED[version], 1000
    seen = field_of(vae.decoder_upsampling(spec), Span(far, far + 1).scaled(8))
    assert (far - seen.start, seen.stop - far - 1) == (13, 13)
    seen = field_of(vae.encoder_downsampling(spec), Span(far, far + 1))
    assert (8 * far - seen.start, seen.stop - 1 - 8 * far) == (61, 75)
    assert (math.ceil((8 * far - seen.start) / 8), math.ceil((seen.stop - 8 * far - 8) / 8)) == (8, 9)


def test_a_change_reaches_exactly_the_cells_whose_field_holds_it(spec: VaeSpec) -> None:
    w = random_weights(spec)
    for layers, channels, size in (
        (vae.decoder_upsampling(spec), 4 * spec.decoder_base, 26),
        (vae.encoder_downsampling(spec), 3 * spec.patch**2, 176),
    ):
        x = noise(1, channels, 1, size, 8)
        changed = x.clone()
        changed[..., size // 2, :] += 1
        before, after = (vae.run(layers, t, w, vae.History()) for t in (x, changed))
        moved = (before != after).flatten(0, 2).any(0).any(-1).tolist()
        seen = [field_of(layers, Span(i, i + 1)) for i in range(len(moved))]
        assert moved == [span.start <= size // 2 < span.stop for span in seen]
        assert any(moved) and not all(moved)


def test_attention_needs_the_whole_plane() -> None:
    assert vae_tiles.windows(vae.decoder_middle(SPECS["2.1"]), Span(3, 4), 50)[0] == Span(0, 50)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (7, 3), (90, 4), (160, 160)])
def test_spans_cover_an_axis_evenly(size: int, count: int) -> None:
    spans = vae_tiles.split(size, count)
    assert [i for span in spans for i in range(*span)] == list(range(size))
    assert max(s.size for s in spans) - min(s.size for s in spans) <= 1


# ---- tiled = untiled


@pytest.mark.parametrize(
    ("latents", "plane", "tiling"),
    [
        (1, (24, 20), Tiling(2, 2)),
        (3, (23, 2), Tiling(2, 1, visit=2)),
        (2, (3, 22), Tiling(1, 5, visit=2)),
        (3, (4, 3), Tiling(4, 3, visit=3)),
        (3, (3, 40), Tiling(1, 3, visit=2, banded=True)),
        (2, (37, 2), Tiling(2, 1, banded=True)),
        (3, (5, 37), Tiling(2, 2, visit=2, banded=True)),
        (2, (37, 4), Tiling(2, 3, banded=True, strips=3)),
        (3, (13, 4), Tiling(visit=2, strips=2, resident=False)),
        (2, (29, 3), Tiling(2, 1, visit=2, strips=5)),
    ],
)
def test_tiles_decode_to_the_untiled_frames(
    spec: VaeSpec, latents: int, plane: tuple[int, int], tiling: Tiling
) -> None:
    w, z = random_weights(spec), noise(1, spec.z, latents, *plane)
    whole = untiled(spec, w, z)
    assert whole.std() > 0.5
    assert error(tiled(spec, w, z, tiling, whole), whole) <= EXACT


@dataclass(frozen=True)
class Whole:
    """One half of an autoencoder on a whole plane, two chunks of time."""

    layers: tuple[vae.Layer, ...]
    weights: Mapping[str, Tensor]
    chunks: list[Tensor]
    made: list[Tensor]

    @property
    def given_plane(self) -> tuple[int, int]:
        return self.chunks[0].shape[3], self.chunks[0].shape[4]

    @property
    def made_plane(self) -> tuple[int, int]:
        return self.made[0].shape[3], self.made[0].shape[4]


@cache
def whole(version: str, part: str) -> Whole:
    spec = SPECS[version]
    w = random_weights(spec, gain=3.0)
    if part == "decoder":
        layers, channels, plane, lengths = (
            vae.decoder_upsampling(spec),
            4 * spec.decoder_base,
            (5, 17),
            (1, 1),
        )
    else:
        layers, channels, plane, lengths = (
            vae.encoder_downsampling(spec),
            3 * spec.patch**2,
            (24, 168),
            (1, 4),
        )
    chunks = [noise(1, channels, n, *plane, seed=n + i) for i, n in enumerate(lengths)]
    history = vae.History()
    with torch.no_grad():
        return Whole(layers, w, chunks, [vae.run(layers, x, w, history) for x in chunks])


@pytest.mark.parametrize("part", ["decoder", "encoder"])
@pytest.mark.parametrize("version", SPECS)
@settings(max_examples=12)
@given(data=st.data())
def test_any_rectangle_can_be_a_tile(version: str, part: str, data: st.DataObject) -> None:
    """Not aligned to latents either, as small as a pixel, touching borders or not; over two chunks of time."""
    case = whole(version, part)
    rows, columns = (
        Span(*sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))))
        for size in case.made_plane
    )
    tile = make_tile(case.layers, case.given_plane, rows, columns)
    history = vae.History()
    for chunk, made in zip(case.chunks, case.made, strict=True):
        part_made = vae.run(tile.layers, tile.cut(chunk), case.weights, history)
        expected = made[..., slice(*rows), slice(*columns)]
        assert part_made.shape == expected.shape
        assert float((part_made - expected).abs().max() / made.abs().max()) <= EXACT


@pytest.mark.parametrize(
    ("plane", "tiling"),
    [
        ((22, 3), Tiling(2, 1, visit=2)),
        ((3, 19), Tiling(1, 3)),
        ((5, 3), Tiling(5, 3, visit=3)),
        ((2, 33), Tiling(1, 3, visit=2, banded=True)),
        ((25, 2), Tiling(2, 1, banded=True)),
        ((4, 26), Tiling(3, 2, visit=2, banded=True, strips=2)),
        ((11, 2), Tiling(1, 2, visit=2, strips=2, resident=False)),
        ((26, 2), Tiling(2, 1, banded=True, strips=5)),
    ],
)
def test_tiles_encode_to_the_untiled_latent(spec: VaeSpec, plane: tuple[int, int], tiling: Tiling) -> None:
    w, stride = random_weights(spec), spec.stride[1]
    video = noise(1, 3, 9, plane[0] * stride, plane[1] * stride).clamp(-1, 1)
    whole = vae.encode(spec, w, video)
    frames = iter(video[0].unbind(1))
    latents = list(vae_clip.encode(spec, w, frames, plane, tiling, Kept(), CPU, video.dtype))
    assert [z.shape[2] for z in latents] == [1, 1, 1]
    parts = torch.cat(latents, dim=2)
    assert parts.shape == whole.shape and whole.std() > 0.1
    assert error(parts, whole) <= EXACT


def seam(parts: Tensor, whole: Tensor, borders: list[int]) -> tuple[float, float]:
    """How wrong steps across `borders` (columns before them) are, and how wrong steps elsewhere: relative means."""
    steps, wrong = whole.diff(dim=-1).abs(), (parts.diff(dim=-1) - whole.diff(dim=-1)).abs()
    elsewhere = [i for i in range(steps.shape[-1]) if i not in borders]
    across, inside = (float(wrong[..., i].mean() / steps[..., i].mean()) for i in (borders, elsewhere))
    return across, inside


@pytest.mark.parametrize("tiling", [Tiling(1, 4), Tiling(1, 3, banded=True)])
def test_float32_frames_in_tiles_have_no_seams(spec: VaeSpec, tiling: Tiling) -> None:
    """Steps across tile borders are those of the untiled frames, and hardly more wrong than steps elsewhere."""
    w, z = random_weights(spec, dtype=torch.float32), noise(1, spec.z, 2, 3, 40, dtype=torch.float32)
    whole = untiled(spec, w, z)
    tiles = vae_clip.decoder(spec).tiles(tiling, (3, 40))
    parts = tiled(spec, w, z, tiling, whole)
    assert error(parts, whole) <= 1e-5
    across, inside = seam(parts, whole, [tile.columns.stop * spec.patch - 1 for tile in tiles[:-1]])
    assert across <= 1e-5 and across <= 1.25 * inside + 1e-8


def test_float32_latents_in_tiles_have_no_seams(spec: VaeSpec) -> None:
    w = random_weights(spec, dtype=torch.float32)
    video = noise(1, 3, 5, 2 * spec.stride[1], 20 * spec.stride[2], dtype=torch.float32).clamp(-1, 1)
    whole = vae.encode(spec, w, video)
    frames = video[0].unbind(1)
    latents = vae_clip.encode(spec, w, frames, (2, 20), Tiling(1, 5), Kept(), CPU, torch.float32)
    parts = torch.cat(list(latents), dim=2)
    assert error(parts, whole) <= 1e-5
    across, inside = seam(parts, whole, [3, 7, 11, 15])
    assert across <= 1e-5 and across <= 1.25 * inside + 1e-8


def test_one_tile_is_the_untiled_decoder_bit_for_bit(spec: VaeSpec) -> None:
    w, z = random_weights(spec, dtype=torch.float32), noise(1, spec.z, 3, 5, 4, dtype=torch.float32)
    whole = untiled(spec, w, z)
    assert torch.equal(tiled(spec, w, z, Tiling(), whole), whole)


def test_how_many_latents_pass_at_a_visit_changes_no_bit(spec: VaeSpec) -> None:
    w, z = random_weights(spec, dtype=torch.float32), noise(1, spec.z, 3, 3, 8, dtype=torch.float32)
    like = untiled(spec, w, z)
    clips = [tiled(spec, w, z, Tiling(1, 2, visit=n), like) for n in (1, 2, 3)]
    assert torch.equal(clips[0], clips[1]) and torch.equal(clips[0], clips[2])


@pytest.mark.parametrize("bands", [2, 3, 5])
def test_bands_compute_no_cell_twice(spec: VaeSpec, bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplications of all convolutions are those of the whole plane."""
    made = 0

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal made
        y = conv2d(*args, **kwargs)
        made += y.numel() * args[1][0].numel()
        return y

    conv2d = vae_layers.functional.conv2d
    monkeypatch.setattr(vae_layers.functional, "conv2d", counted)
    w, z = random_weights(spec, dtype=torch.float32), noise(1, spec.z, 2, 2, 60, dtype=torch.float32)
    works = []
    for tiling in (Tiling(), Tiling(1, bands, banded=True), Tiling(1, bands)):
        made = 0
        list(vae_clip.decode(spec, w, z, tiling, Kept(), CPU, z.dtype))
        works.append(made)
    # a widening convolution makes a column more for every band, and drops it
    assert works[0] < works[1] < 1.005 * works[0] < works[2]


def test_a_plane_too_short_for_bands_has_none() -> None:
    spec = PUBLISHED["2.1"]
    layers = vae.decoder_upsampling(spec)
    assert vae_tiles.band_edges(layers, 15, 3, 1) == []
    edges = vae_tiles.band_edges(layers, 160, 4, 1)
    assert edges[0] == 0 and edges[-1] == 160 and len(edges) == 5
    assert vae_tiles.lag(layers) <= edges[1]


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("kind", [vae_layers.Residual, vae_layers.Head])
def test_one_cell_less_around_a_tile_would_show(
    spec: VaeSpec, kind: type, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = vae_tiles.reach

    def short(layer: vae.Layer, span: Span) -> Span:
        reached = true(layer, span)
        return Span(reached.start + before, reached.stop - 1 + before) if isinstance(layer, kind) else reached

    w, z = random_weights(spec), noise(1, spec.z, 1, 3, 24)
    whole = untiled(spec, w, z)
    assert error(tiled(spec, w, z, Tiling(1, 2), whole), whole) <= EXACT
    monkeypatch.setattr(vae_tiles, "reach", short)
    assert error(tiled(spec, w, z, Tiling(1, 2), whole), whole) > 1e3 * EXACT


# ---- histories


def test_what_is_remembered_is_known_beforehand(spec: VaeSpec) -> None:
    w, plane = random_weights(spec, dtype=torch.float32), noise(1, spec.z, 4, 6, 9, dtype=torch.float32)
    down = vae.encoder_downsampling(spec)
    tile = make_tile(down, (48, 72), Span(2, 5), Span(0, 4))
    shelf, history = Kept(), vae.History()
    list(vae_clip.decode(spec, w, plane, tiling := Tiling(2, 2), shelf, CPU, plane.dtype))
    for n in (1, 4, 4):
        vae.run_pairwise(
            tile.layers, tile.cut(noise(1, 3 * spec.patch**2, n, 48, 72, dtype=torch.float32)), w, history
        )
    known = [
        *vae_clip.decoder(spec).memories(tiling, (6, 9), spec.shapes()),
        tile_memories(tile, spec.shapes()),
    ]
    histories = [*(shelf.histories[i] for i in range(5)), history]
    for found, true in zip(known, histories, strict=True):
        kept = {name: (len(frames), *frames[0][0, :, 0].shape) for name, frames in true.frames.items()}
        assert {m.name: (m.frames, *m.shape) for m in found} == kept


@pytest.mark.parametrize(
    ("plane", "tiling"),
    [
        ((2, 33), Tiling(1, 3, visit=2, banded=True)),
        ((25, 2), Tiling(2, 2, banded=True, strips=2)),
    ],
)
def test_what_bands_remember_is_known_beforehand(
    spec: VaeSpec, plane: tuple[int, int], tiling: Tiling
) -> None:
    w = random_weights(spec, dtype=torch.float32)
    z = noise(1, spec.z, 3, *plane, dtype=torch.float32)
    clip = noise(9, 3, *(n * spec.stride[1] for n in plane), dtype=torch.float32)
    for half in (vae_clip.decoder(spec), vae_clip.encoder(spec)):
        shelf = Kept()
        if half.cells == 1:
            list(vae_clip.decode(spec, w, z, tiling, shelf, CPU, z.dtype))
        else:
            list(vae_clip.encode(spec, w, clip.unbind(), plane, tiling, shelf, CPU, clip.dtype))
        for number, found in enumerate(half.memories(tiling, plane, spec.shapes())):
            true = shelf.histories[number].frames
            kept = {name: (len(frames), *frames[0][0, :, 0].shape) for name, frames in true.items()}
            assert {m.name: (m.frames, *m.shape) for m in found} == kept


def test_a_packed_history_is_a_history_bit_for_bit(spec: VaeSpec) -> None:
    """In a slab of garbage, and moved away and back between chunks."""
    for layers, channels, lengths in (
        (vae.decoder_upsampling(spec), 4 * spec.decoder_base, (1, 1, 2)),
        (vae.encoder_downsampling(spec), 3 * spec.patch**2, (1, 4, 8)),
    ):
        w = random_weights(spec, dtype=torch.float32)
        found = memories(layers, (8, 8), spec.shapes())
        slab = torch.full((packed_size(found, torch.float32),), 0xFF, dtype=torch.uint8)
        loose, packed = vae.History(), pack(found, slab, torch.float32)
        for seed, n in enumerate(lengths):
            x = noise(1, channels, n, 8, 8, seed=seed, dtype=torch.float32)
            expected = vae.run(layers, x, w, loose)
            assert torch.equal(vae.run(layers, x, w, packed), expected)
            away = slab.clone()
            slab.fill_(0xFF)
            slab.copy_(away)


# ---- layers write only into what is theirs


@pytest.mark.parametrize("version", SPECS)
def test_results_are_the_same_with_and_without_gradients(version: str) -> None:
    """Sums in place, frame by frame and early release are for inference only; nothing is written to an input."""
    spec = SPECS[version]
    w = random_weights(spec)
    clip, z = noise(1, 3 * spec.patch**2, 5, 32, 16), noise(1, spec.z, 3, 4, 2)
    for layers, x in (
        (vae.encoder(spec), clip),
        (vae.decoder_middle(spec) + vae.decoder_upsampling(spec), z),
    ):
        kept, lean = x.clone(), vae.run(layers, x, w, vae.History())
        assert torch.equal(x, kept)
        with torch.enable_grad():
            x.requires_grad_()
            full = vae.run(layers, x, w, vae.History())
            full.square().mean().backward()
        assert error(lean, full.detach()) <= 1e-12
        assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_layer_returns_nothing_that_the_history_refers_to(spec: VaeSpec) -> None:
    """The first frame passes the halving of time untouched, and is remembered."""
    w = random_weights(spec)
    down = vae_layers.Down(
        next(n for n in w if n.endswith("time_conv.weight")).removesuffix(".time_conv.weight"), True
    )
    history = vae.History()
    result = down(noise(1, w[f"{down.name}.resample.1.weight"].shape[1], 1, 4, 4), w, history)
    remembered = history.frames[f"{down.name}.time_conv"][0].clone()
    result.add_(1)
    assert torch.equal(history.frames[f"{down.name}.time_conv"][0], remembered)
