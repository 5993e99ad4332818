"""Where an animation's weights lie, and what runs out on the way, changes nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_peaks import Peaks, check, with_residual_in_ram
from strict_device import StrictRuntime, metered
from torch import Tensor
from videos import frames_of

from lowvram.animation import part_path
from lowvram.api import Pipeline
from lowvram.conditions import animate
from lowvram.errors import BudgetError, OutOfMemoryError
from lowvram.job import LoraChoice
from lowvram.models.vae_tiles import Tiling
from lowvram.offload.device import CpuDevice
from lowvram.offload.placement import Placement
from lowvram.planning.facts import gather
from lowvram.planning.plan import Plan
from lowvram.stages import encode, steadfast, tiles
from lowvram.stages.run import Silent
from lowvram.stages.segments import Forgetful, Stand


def test_streamed_equals_resident_bit_for_bit_with_the_relighting_lora(
    pipe: Pipeline,
    drive: Callable[..., Path],
    settings: dict[str, Any],
    relighting_lora: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    resident, checkpoint = (
        pipe.animate(drive(12), "replace", loras=(LoraChoice(path=str(relighting_lora(name))),), **settings)
        for name in ("lora.safetensors", "lora.ckpt")
    )
    assert set(resident.plan.denoise.where.values()) == {"resident"}
    on_disk = Placement(dict.fromkeys(resident.plan.denoise.where, "disk"), slots=2, ring=2)
    streamed = replace(checkpoint, plan=replace(checkpoint.plan, denoise=on_disk))
    for name, animation in (("resident", resident), ("streamed", streamed)):
        animation.save(tmp_path / f"{name}.mp4")
    streamed_frames, resident_frames = (
        frames_of(tmp_path / f"{name}.mp4") for name in ("streamed", "resident")
    )
    assert np.array_equal(streamed_frames, resident_frames)


def test_a_strict_device_gives_the_same_video_and_holds_what_was_planned(
    pipe: Pipeline,
    tiny_animate: Path,
    drive: Callable[..., Path],
    settings: dict[str, Any],
    relighting_lora: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    lora = LoraChoice(path=str(relighting_lora("lora.safetensors")))
    plain = pipe.animate(drive(12), "replace", loras=(lora,), **settings)
    plain.save(tmp_path / "plain.mp4")
    strict = StrictRuntime("2GB", "4GB", "cpu", cache=False).load(str(tiny_animate))
    with metered() as tracker:
        stages = Peaks(tracker)
        replace(plain, pipeline=strict, listener=stages).save(tmp_path / "strict.mp4")
    check(plain.plan, stages)
    assert (tmp_path / "strict.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()


def test_a_residual_in_ram_gives_the_same_video_and_takes_what_was_planned(
    pipe: Pipeline,
    plan: Plan,
    tiny_animate: Path,
    drive: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    plain = replace(pipe.animate(drive(9), **settings), plan=plan)
    plain.save(tmp_path / "plain.mp4")
    away = with_residual_in_ram(plan, gather(plain.job, pipe.model, plan.machine))
    strict = StrictRuntime("2GB", "4GB", "cpu", cache=False).load(str(tiny_animate))
    with metered() as tracker:
        stages = Peaks(tracker)
        replace(plain, pipeline=strict, plan=away, listener=stages).save(tmp_path / "away.mp4")
    check(away, stages)
    assert (tmp_path / "away.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()


def test_memory_that_runs_out_while_driving_videos_are_encoded_is_met_with_smaller_tiles(
    pipe: Pipeline,
    drive: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In each of the three encodes, after its first latent: the videos are read again."""
    latents: list[Tensor] = []
    tilings: list[Tiling] = []

    def recorded(*args: Any) -> Tensor:
        latents.append(encode.encode(*args))
        return latents[-1]

    def scarce(device: Any, ways: Any, tiling: Tiling, attempt: Any, tell: Any) -> Iterator[Any]:
        def failing(now: Tiling, first: int) -> Iterator[Any]:
            tilings.append(now)
            results = attempt(now, first)
            if now == tiling:
                yield next(results)
                raise torch.OutOfMemoryError
            yield from results

        return tiles.in_tiles(device, ways, tiling, failing, tell)

    monkeypatch.setattr(animate, "encode", recorded)
    animation = pipe.animate(drive(9, 128, 128), "replace", **settings | {"steps": 1})
    animation.save(tmp_path / "plain.mp4")
    whole = latents[1:]  # the reference picture is one latent
    latents.clear()
    monkeypatch.setattr(encode, "in_tiles", scarce)
    animation.save(tmp_path / "scarce.mp4")
    assert len(tilings) == 6
    for made, expected in zip(latents[1:], whole, strict=True):
        assert float((made - expected).abs().max() / expected.abs().max()) <= 1e-5


@pytest.mark.parametrize("enough", [True, False])
def test_segments_are_planned_by_what_others_leave_between_them(
    pipe: Pipeline,
    plan: Plan,
    drive: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    enough: bool,
) -> None:
    needed = max(stage.vram for stage in plan.stages if stage.name != "text")
    left, notes, begun = needed if enough else 1000, list[str](), list[int]()
    denoise = plan.stage("denoise")
    generous = replace(denoise, claims=denoise.claims | {"more than it needs": needed})
    plan = replace(plan, stages=tuple(generous if stage is denoise else stage for stage in plan.stages))
    whole = CpuDevice.memory_free
    monkeypatch.setattr(
        CpuDevice, "memory_free", lambda device: left - device.ledger.used if begun == [1] else whole(device)
    )

    class Told(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    class Begun(Forgetful):
        def begin(self, segment: int, carried: Tensor) -> None:
            begun.append(segment)

    animation = replace(pipe.animate(drive(12), **settings), plan=plan, listener=Told())
    if not enough:

        def refused(*what: Any) -> Plan:
            raise BudgetError("nothing fits", advice="")

        monkeypatch.setattr(steadfast, "plan_segment", refused)
        with pytest.raises(OutOfMemoryError, match="other programs take VRAM") as told:
            animation.make(tmp_path / "out.mp4", tmp_path, Stand(), Begun())
        assert told.value.exit_code == 5 and begun == [1]
        assert part_path(tmp_path, 0).exists()
        return
    animation.make(tmp_path / "out.mp4", tmp_path, Stand(), Begun())
    (note,) = [note for note in notes if "planned again" in note]
    assert note.startswith("before segment 2, other programs take VRAM") and begun == [1, 2]
    assert len(frames_of(tmp_path / "out.mp4")) == 12
