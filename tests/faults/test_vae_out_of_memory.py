"""Memory runs out inside the autoencoder in spite of the plan: smaller tiles go on from the same frame.

    LOWVRAM_FAULTS=1 python -m pytest -q -n 2 tests/faults/test_vae_out_of_memory.py

lets every allocation of a decode and of an encode fail in its turn, of both autoencoders, whole and cut in every way, which
takes about half an hour of processor time; LOWVRAM_FAULTS=30: every thirtieth. The gate lets a few.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram import Runtime
from lowvram.api import Pipeline, Video
from lowvram.codings import Decodings, Encodings, decodings
from lowvram.conditions.pictures import GivenClip
from lowvram.errors import OutOfMemoryError
from lowvram.imagined import imagined_model
from lowvram.job import Job
from lowvram.media.picture import open_picture
from lowvram.model import Model, vae_group
from lowvram.models import vae, vae_clip
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.budget import Ledger, exact_size
from lowvram.offload.device import CpuDevice
from lowvram.planning.encode import plan_encode
from lowvram.quant.spec import LATENT_MEAN_22, LATENT_STD_22, VaeSpec
from lowvram.sampling.presets import model_preset
from lowvram.stages import decode, encode, tiles
from lowvram.stages.outbox import Outbox
from lowvram.stages.run import Run, Traffic
from lowvram.stages.tiles import Shelf
from lowvram.tiling import Codings

GB = 10**9
STRIDE = int(os.environ.get("LOWVRAM_FAULTS", "0"))
"""Allocations from one that fails to the next; 0 for a few in all."""


@cache
def _aliases(func: Any) -> bool:
    """Whether an operation never makes a tensor: a view, or one that writes. What is made of others (`contiguous`) may be new
    or not."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return not composite and any(result.alias_info is not None for result in func._schema.returns)


class Scarce(TorchDispatchMode):
    """Counts the tensors that the autoencoder makes; making the Nth fails, as on a GPU that is full; `forever`
    from then on."""

    def __init__(self, nth: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nth, self.made, self.forever = nth, 0, False
        self.tilings: list[Tiling] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _aliases(func) and isinstance(result, Tensor) and result.device.type == "cpu":
            given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
            self.made += result.untyped_storage()._cdata not in given
            if self.made == self.nth or (self.forever and self.made > self.nth):
                self.made += 1
                raise torch.OutOfMemoryError("made to fail")
        return result


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Scarce:
    """Counts inside the attempts only: without weights no tile is small enough, and plans are made on meta tensors."""
    mode = Scarce(0)

    def watched(device: Any, ways: Any, tiling: Tiling, attempt: Any, tell: Any) -> Iterator[Any]:
        def seen(tiling: Tiling, first: int) -> Iterator[Any]:
            mode.tilings.append(tiling)
            with mode:
                yield from attempt(tiling, first)

        return tiles.in_tiles(device, ways, tiling, seen, tell)

    monkeypatch.setattr(decode, "in_tiles", watched)
    monkeypatch.setattr(encode, "in_tiles", watched)
    known: dict[Any, Decodings] = {}  # what was measured of a clip is, when it comes again

    def planned(model: Model, *clip: Any) -> Decodings:
        if clip not in known:
            known[clip] = decodings(model, *clip)
        return known[clip]

    monkeypatch.setattr(decode, "decodings", planned)
    return mode


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Runtime(GB, 2 * GB, device="cpu").load("nano")


@pytest.fixture(scope="module")
def job(pipe: Pipeline) -> Job:
    return pipe.job("a red circle", width=128, height=144, frames=5, steps=1)


@pytest.fixture(scope="module")
def run(pipe: Pipeline, job: Job) -> Run:
    return Run(CpuDevice(GB, ram=Ledger(2 * GB, "RAM")), pipe.plan_job(job))


def decoded(pipe: Pipeline, job: Job, run: Run) -> np.ndarray:
    shape = pipe.model.spec.latent_shape(job.width, job.height, job.frames)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return np.concatenate(list(decode.decode(run, pipe.model, job, latent)))


def test_whatever_fails_while_decoding_every_frame_comes_once_and_is_the_same(
    pipe: Pipeline, job: Job, run: Run, scarce: Scarce
) -> None:
    """Frames after the failure come from other tiles, whose sums are made in another order where a library chooses
    by shape: a last bit of float32 may then fall on the other side of a step of 1/255."""
    whole = decoded(pipe, job, run)
    count, before = scarce.made, list(scarce.tilings)
    assert count > 100 and len(before) == 1
    for nth in range(1, count, count // (16 if STRIDE else 4)):
        scarce.nth, scarce.made, scarce.tilings = nth, 0, []
        clip = decoded(pipe, job, run)
        assert len(scarce.tilings) == 2 and scarce.tilings[0] == before[0] != scarce.tilings[1]
        assert clip.shape == whole.shape
        off = np.abs(clip.astype(int) - whole)
        assert off.max() <= 1 and (off > 0).mean() < 1e-3
        assert run.device.ledger.used == run.device.ram.used == 0


def test_frames_that_leave_as_floats_are_counted_as_floats(
    pipe: Pipeline, job: Job, run: Run, scarce: Scarce, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory runs out, too: what waits for the tiles of a driven video is four bytes a colour."""
    counted: list[int] = []

    def seen(device: Any, ways: Codings, *rest: Any) -> Iterator[Any]:
        counted.append(ways.frame)
        return iter(())

    monkeypatch.setattr(decode, "in_tiles", seen)
    latent = torch.zeros(pipe.model.spec.latent_shape(job.width, job.height, job.frames))
    assert not list(decode.decode(run, pipe.model, job, latent))
    assert not list(decode.decode_floats(run, pipe.model, job, latent))
    assert counted == [3 * 128 * 144, 4 * 3 * 128 * 144]


def test_a_report_says_that_memory_ran_out_while_decoding(
    pipe: Pipeline, job: Job, run: Run, scarce: Scarce, tmp_path: Path
) -> None:
    shape = pipe.model.spec.latent_shape(job.width, job.height, job.frames)
    scarce.nth, scarce.made, scarce.tilings = 50, 0, []
    video = Video(pipe, job, run.plan, torch.zeros(shape), notes=["said before"])
    report = video.save(tmp_path / "a.mp4")
    assert report.notes[0] == "said before" and len(report.notes) == 2
    assert report.notes[1].startswith("decode: memory ran out after 0 frames; it went on in ")


SPECS = {
    "2.1": VaeSpec("2.1", 8, 8, 16, 1),
    "2.2": VaeSpec("2.2", 8, 8, 48, 1, LATENT_MEAN_22, LATENT_STD_22),
}
LATENTS = 2
COUNT = vae_clip.FRAMES * (LATENTS - 1) + 1
"""Frames of that many latents."""
STARTS = {
    "whole": ((4, 32), Tiling()),
    "tiles": ((4, 32), Tiling(1, 2, visit=1, kept=False)),
    "bands": ((4, 32), Tiling(1, 2, visit=1, kept=False, banded=True)),
    "strips": ((8, 16), Tiling(visit=1, kept=False, strips=2, ahead=True)),
}
"""A plane of latents, and how it is cut before memory runs out."""


@cache
def ways_of(version: str, half: str, plane: tuple[int, int]) -> Codings:
    spec = SPECS[version]
    model = imagined_model("none", replace(model_preset("nano"), vae=spec), "bf16")
    group = vae_group(model, vae.DECODER if half == "decode" else vae.ENCODER)
    kind = Decodings if half == "decode" else Encodings
    return kind(spec, group, (spec.z, LATENTS, *plane), 1, torch.float32, exact_size)


AFTER: dict[tuple[object, ...], list[Tensor]] = {}
"""What comes after a failure, by what it depends on: the tiling and what was given before. It is made once; a failure could
change it only by what is given to both, which is looked at."""


class Given(NamedTuple):
    """What a small random autoencoder is given: weights, a latent [1, z, F, h, w], and frames [3, H, W]."""

    w: dict[str, Tensor]
    latent: Tensor
    clip: list[Tensor]


@cache
def given(version: str, plane: tuple[int, int]) -> Given:
    spec, generator = SPECS[version], torch.Generator().manual_seed(4)
    w = {
        name: torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        for name, shape in spec.shapes().items()
    }
    latent = torch.randn(1, spec.z, LATENTS, *plane, generator=generator)
    size = 3, plane[0] * spec.stride[1], plane[1] * spec.stride[2]
    return Given(w, latent, [torch.randn(size, generator=generator).clamp(-1, 1) for _ in range(COUNT)])


def brought_through(version: str, half: str, start: str, scarce: Scarce, nth: int) -> list[Tensor]:
    """The frames, or latents, of a clip of noise through a small random autoencoder whose Nth allocation fails. What comes
    after it is not watched."""
    spec, (plane, cut) = SPECS[version], STARTS[start]
    w, latent, clip = given(version, plane)
    size = clip[0].shape[1:]
    device = CpuDevice(GB, ram=Ledger(2 * GB, "RAM"))

    def attempt(tiling: Tiling, first: int) -> Iterator[Tensor]:
        scarce.tilings.append(tiling)
        if len(scarce.tilings) == 1:
            with scarce:
                yield from really(tiling, first)
            return
        key = version, half, start, tiling, first
        if key not in AFTER:
            AFTER[key] = list(really(tiling, first))
        yield from AFTER[key]

    def really(tiling: Tiling, first: int) -> Iterator[Tensor]:
        part = vae_clip.decoder(spec) if half == "decode" else vae_clip.encoder(spec)
        memories = part.memories(tiling, plane, spec.shapes())
        visits = -(-LATENTS // tiling.visit)
        with Shelf(device, memories, torch.float32, visits, kept=tiling.kept, ahead=tiling.ahead) as shelf:
            cpu = device.torch_device
            if half == "encode":
                latents = vae_clip.encode(spec, w, clip, plane, tiling, shelf, cpu, torch.float32)
                yield from islice(latents, first, None)
                return
            pieces = vae_clip.decode(spec, w, latent, tiling, shelf, cpu, torch.float32)
            with Outbox(device, 12 * math.prod(size)) as outbox:
                converted = decode._converted(pieces, decode.to_floats, outbox, first)
                for frame in decode._frames(converted, (COUNT, *size), tiling.count):
                    yield torch.from_numpy(frame)

    scarce.nth, scarce.made, scarce.tilings = nth, 0, []
    ways = ways_of(version, half, plane)
    with torch.inference_mode():
        made = list(tiles.in_tiles(device, ways, cut, attempt, lambda *_: None))
    assert device.ledger.used == device.ram.used == 0
    return made


def checksum(version: str, plane: tuple[int, int]) -> float:
    """Of all that an autoencoder is given: a failure must leave it as it was."""
    w, latent, clip = given(version, plane)
    return float(sum(part.abs().sum(dtype=torch.float64) for part in (*w.values(), latent, *clip)))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("half", ["decode", "encode"])
@pytest.mark.parametrize("version", SPECS)
def test_whatever_fails_in_either_autoencoder_the_result_is_the_same(
    version: str, half: str, start: str, scarce: Scarce
) -> None:
    whole = brought_through(version, half, start, scarce, 0)
    count = scarce.made
    assert count > 100 and len(whole) == (LATENTS if half == "encode" else 5)
    largest = max(float(part.abs().max()) for part in whole)
    before = checksum(version, STARTS[start][0])
    for nth in range(1 if STRIDE else count // 5, count, STRIDE or count // 2):
        made = brought_through(version, half, start, scarce, nth)
        assert len(scarce.tilings) == 2 and scarce.tilings[1] != scarce.tilings[0]
        for part, expected in zip(made, whole, strict=True):
            assert float((part - expected).abs().max()) <= 1e-5 * largest
    assert checksum(version, STARTS[start][0]) == before


def test_where_no_tile_is_smaller_the_error_says_so(
    pipe: Pipeline, job: Job, run: Run, scarce: Scarce
) -> None:
    small = replace(job, width=64, height=64)
    scarce.nth, scarce.forever = 50, True
    with pytest.raises(OutOfMemoryError, match="smallest tile"):
        decoded(pipe, small, run)
    assert run.device.ledger.used == run.device.ram.used == 0


@pytest.mark.parametrize("nth", [3, 200])
def test_encoding_goes_on_in_smaller_tiles_if_the_frames_can_come_again(
    pipe: Pipeline, job: Job, run: Run, scarce: Scarce, nth: int
) -> None:
    clip = torch.rand(9, 3, 144, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    plan = plan_encode(pipe.model, (9, 144, 128), GB, GB, run.plan.machine)
    whole = encode.encode(run, pipe.model, clip.unbind(), plan, Traffic())
    scarce.nth, scarce.made, scarce.tilings = nth, 0, []
    latent = encode.encode(run, pipe.model, clip.unbind(), plan, Traffic())
    assert len(scarce.tilings) == 2
    assert float((latent - whole).abs().max() / whole.abs().max()) <= 1e-5
    assert run.device.ledger.used == run.device.ram.used == 0


def test_given_pictures_are_encoded_in_smaller_tiles_where_memory_runs_out(
    pipe: Pipeline, job: Job, run: Run, scarce: Scarce, tmp_path: Path
) -> None:
    """The pictures are read again: the clip that they make begins anew."""
    noise = np.random.default_rng(1).integers(0, 256, (2, 144, 128, 3), np.uint8)
    for name, pixels in zip("ab", noise, strict=True):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    first, last = (open_picture(tmp_path / f"{name}.png") for name in "ab")
    clip = GivenClip(pipe.model.spec, replace(job, frames=9, image=first, last_image=last), 9)
    plan = plan_encode(pipe.model, (9, 144, 128), GB, GB, run.plan.machine)
    whole = encode.encode(run, pipe.model, clip, plan, Traffic())
    count = scarce.made
    for nth in (count // 3, count - 1):
        scarce.nth, scarce.made, scarce.tilings = nth, 0, []
        latent = encode.encode(run, pipe.model, clip, plan, Traffic())
        assert len(scarce.tilings) == 2 and scarce.tilings[0] == plan.tiling != scarce.tilings[1]
        assert float((latent - whole).abs().max() / whole.abs().max()) <= 1e-5
        assert run.device.ledger.used == run.device.ram.used == 0


def test_frames_that_come_only_once_end_in_the_error(
    pipe: Pipeline, job: Job, run: Run, scarce: Scarce
) -> None:
    clip = torch.zeros(9, 3, 144, 128)
    plan = plan_encode(pipe.model, (9, 144, 128), GB, GB, run.plan.machine)
    scarce.nth = 250
    with pytest.raises(OutOfMemoryError):
        encode.encode(run, pipe.model, iter(clip.unbind()), plan, Traffic())
    assert run.device.ledger.used == run.device.ram.used == 0
