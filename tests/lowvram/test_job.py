"""Jobs: settled and checked before anything is loaded; kept on disk so that a kill loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from lowvram.discovery import find
from lowvram.errors import BusyError, FileError, LowvramError, StorageError, UsageError
from lowvram.job import MAX_FRAMES, Job, LoraChoice, describe, make_job
from lowvram.sampling.presets import load_models, model_preset
from lowvram.state import KEPT, JobFolder, Saved, find_job, find_latent, list_jobs, new_job


def job(model: str = "nano", **settings: Any) -> Job:
    return make_job(model_preset(model), model=model, files={}, **settings)


# ---- what a job holds


def test_what_is_left_out_is_the_models_own_default() -> None:
    for name, spec in load_models().items():
        made = job(name)
        assert (made.width, made.height, made.frames, made.fps) == (
            spec.width,
            spec.height,
            spec.frames,
            spec.fps,
        )
        assert (len(made.schedule), made.schedule.solver, made.negative) == (
            spec.steps,
            "unipc",
            spec.negative,
        )
        assert set(made.schedule.guidance) <= set(spec.guidance)


def test_jobs_are_values() -> None:
    assert job(prompt="a", seed=3) == job(prompt="a", seed=3) != job(prompt="a", seed=4)
    with pytest.raises(FrozenInstanceError):
        job().seed = 1  # type: ignore[misc]


def test_whitespace_in_prompts_means_nothing() -> None:
    assert job(prompt="  a red\n circle\t moves ").prompt == "a red circle moves"


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"width": 1000}, ("width 1000", "992 and 1008")),
        ({"width": 8}, ("width 8", "16 and 32")),
        ({"width": 0}, ("width 0", "16")),
        ({"height": 100_000}, ("height 100000", "16384")),
        ({"frames": 82}, ("82 frames", "81 and 85")),
        ({"frames": 0}, ("0 frames", "1 and 5")),
        ({"frames": 10_000}, ("10000 frames", str(MAX_FRAMES))),
        ({"seed": 2**63}, ("seed",)),
        ({"fps": 1000}, ("1000", "1 to 120")),
        ({"loras": (LoraChoice(path="a", strength=float("inf")),)}, ("inf",)),
        ({"preset": "lightning-4", "shift": 5.0}, ("--shift", "--preset lightning-4")),
    ],
)
def test_what_cannot_be_made_is_refused_with_what_can(
    settings: dict[str, Any], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as refused:
        job(**settings)
    assert all(fragment in str(refused.value) for fragment in fragments)


def test_the_5b_model_asks_for_multiples_of_32() -> None:
    assert job("wan2.2-ti2v-5b", width=1280, height=704).height == 704
    with pytest.raises(UsageError, match="704 and 736"):
        job("wan2.2-ti2v-5b", width=1280, height=720)


def test_a_lora_for_an_expert_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="one expert"):
        job("wan2.1-t2v-14b", loras=(LoraChoice(path="a.safetensors", expert="high"),))


def test_what_is_written_into_a_video_holds_no_paths_of_this_machine(tmp_path: Path) -> None:
    lora = LoraChoice(path=str(tmp_path / "style.safetensors"), strength=0.5)
    made = make_job(
        model_preset("nano"), model=str(tmp_path / "mine"), files={"vae": str(tmp_path)}, loras=(lora,)
    )
    text = json.dumps(describe(made, "1"))
    assert str(tmp_path) not in text and "style.safetensors" in text and '"model": "mine"' in text


# ---- where its files lie


def test_parts_are_found_in_anyones_layout(tmp_path: Path) -> None:
    layouts = {
        "native": ("low_noise_model/x", "high_noise_model/x", "Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model",
                   "models_t5_umt5-xxl-enc-bf16.pth"),
        "diffusers": ("transformer/x", "transformer_2/x", "vae/x", "text_encoder/x", "tokenizer/spiece.model"),
        "shipped": ("high_noise_model.safetensors", "low_noise_model.safetensors", "vae.safetensors",
                    "text_encoder.safetensors", "spiece.model", "dmd-4-high_noise.safetensors",
                    "lightning-4-low_noise.safetensors"),
    }  # fmt: skip
    for layout, files in layouts.items():
        for file in files:
            path = tmp_path / layout / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        found = find(str(tmp_path / layout)).paths
        assert set(found) == {"high", "low", "vae", "text", "tokenizer"}, layout
        assert all(Path(path).is_absolute() for path in found.values())
        experts = {part: Path(found[part]).name for part in ("high", "low")}
        assert (
            experts
            == {
                "native": {"high": "high_noise_model", "low": "low_noise_model"},
                "diffusers": {"high": "transformer", "low": "transformer_2"},
                "shipped": {"high": files[0], "low": files[1]},
            }[layout]
        )


def test_given_files_win_over_found_ones(tmp_path: Path) -> None:
    for name in ("transformer", "vae", "text_encoder"):
        (tmp_path / name).mkdir()
    mine = tmp_path / "mine.safetensors"
    mine.touch()
    found = find(str(tmp_path), {"single": str(mine)}).paths
    assert found["single"] == str(mine) and "high" not in found
    with pytest.raises(FileError, match="--vae"):
        find(str(tmp_path), {"vae": str(tmp_path / "gone")})


# ---- what survives


def saved(**settings: Any) -> Saved:
    return Saved(job=job(**settings), output="/somewhere/out.mp4", vram=10**9, ram=10**9, device="cpu")


def test_a_saved_job_comes_back_equal(jobs: Path) -> None:
    lora = LoraChoice(path="/a.safetensors", expert="high", strength=0.1)
    fading = LoraChoice(path="/b.safetensors", strength=(1.0, 0.5, 0.0))
    loras = (lora, fading)
    whole = saved(prompt="кот 猫", seed=2**62, guidance=(4.0, 3.5), loras=loras, solver="dpm++", steps=7)
    folder = new_job(whole, jobs, "20260101-000000")
    assert folder.load() == whole
    assert find_job("last", jobs) == find_job(folder.name, jobs) == folder


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"job": 3}', b"\xff\xfe\x00", b'{"output": "x"}'])
def test_a_damaged_job_file_is_a_file_error(damage: bytes, jobs: Path) -> None:
    folder = new_job(saved(), jobs, "20260101-000000")
    (folder.path / "job.json").write_bytes(damage)
    with pytest.raises(FileError, match=r"lowvram generate|UTF-8"):
        folder.load()


def test_jobs_of_one_second_get_names_of_their_own(jobs: Path) -> None:
    names = [new_job(saved(), jobs, "20260101-000000").name for _ in range(3)]
    assert len(set(names)) == 3 and [j.name for j in list_jobs(jobs)] == sorted(names)


def test_last_is_the_newest_that_is_not_finished(jobs: Path) -> None:
    first, second, third = (new_job(saved(seed=n), jobs, f"2026010{n}-000000") for n in (1, 2, 3))
    third.finish()
    assert find_job("last", jobs) == second
    second.finish()
    assert find_job("last", jobs) == first
    first.finish()
    with pytest.raises(UsageError, match="no unfinished job"):
        find_job("last", jobs)
    with pytest.raises(UsageError, match="20260102-000000"):
        find_job("2026", jobs)
    second.latent_path.touch()
    assert find_latent("last", jobs) == second


def test_finished_jobs_are_kept_for_a_while_and_unfinished_ones_for_good(jobs: Path) -> None:
    unfinished = new_job(saved(), jobs, "20250101-000000")
    for n in range(KEPT + 3):
        new_job(saved(), jobs, f"20260101-{n:06}").finish()
    newest = new_job(saved(), jobs, "20260102-000000")
    names = [j.name for j in list_jobs(jobs)]
    assert len(names) == KEPT + 2 and names[0] == unfinished.name and names[-1] == newest.name


def test_finishing_drops_the_state_and_keeps_the_latent(jobs: Path) -> None:
    folder = new_job(saved(), jobs, "20260101-000000")
    folder.state_path.touch()
    folder.latent_path.touch()
    folder.finish()
    assert folder.finished and folder.latent_path.exists() and not folder.state_path.exists()


def test_a_file_that_a_viewer_holds_open_does_not_undo_the_end(
    jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to remove it then."""
    folder = new_job(saved(), jobs, "20260101-000000")
    folder.state_path.touch()
    (folder.path / "segment-00000.mp4").touch()

    def held(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(Path, "unlink", held)
    folder.finish()
    assert folder.finished


def test_two_holders_of_one_job_are_refused_and_the_second_is_told_the_first(jobs: Path) -> None:
    folder = new_job(saved(), jobs, "20260101-000000")
    with (
        folder.locked(),
        pytest.raises(BusyError, match=f"process {os.getpid()} "),
        JobFolder(folder.path).locked(),
    ):
        pass
    with folder.locked():
        pass


def test_a_lock_ends_with_its_process(jobs: Path) -> None:
    folder = new_job(saved(), jobs, "20260101-000000")
    code = (
        "import os, sys; from pathlib import Path; from lowvram.state import JobFolder\n"
        "with JobFolder(Path(sys.argv[1])).locked(): os._exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder.path)], check=False).returncode == 7
    with folder.locked():
        pass


def test_an_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LowvramError) as refused:
        new_job(saved(), tmp_path / "file" / "jobs", "20260101-000000")
    assert refused.value.exit_code == 6


def test_21_image_to_video_has_another_shift_at_480p() -> None:
    shifts = [
        job("wan2.1-i2v-14b", **size).schedule for size in ({}, {"width": 480, "height": 832}, {"shift": 4.0})
    ]
    sigmas = [schedule.sigmas[20] for schedule in shifts]
    assert sigmas == pytest.approx(
        [shift * 0.4995 / (1 + (shift - 1) * 0.4995) for shift in (5, 3, 4)], abs=1e-4
    )


def test_a_job_that_cannot_be_locked_is_a_storage_error(jobs: Path) -> None:
    folder = new_job(saved(), jobs, "20260101-000000")
    (folder.path / "lock").mkdir()  # as a folder that may not be written to
    with pytest.raises(StorageError, match="lock"), folder.locked():
        pass


def test_what_is_no_text_is_told_before_the_job_begins(jobs: Path) -> None:
    """Names of files that are not UTF-8."""
    with pytest.raises(UsageError, match="cannot be saved"):
        new_job(saved(loras=(LoraChoice(path="/a \udcff"),)), jobs, "20260101-000000")
    assert list_jobs(jobs) == []
