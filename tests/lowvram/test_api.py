"""lowvram as a library: what it exports, what it says of itself, and what is given to it wrongly."""

from __future__ import annotations

import pickle
import pydoc
import typing
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import lowvram
from lowvram import BudgetError, LoraChoice, Runtime, UsageError
from lowvram.api import Pipeline
from lowvram.job import make_job

PROMPT = "a red circle moves left"
ANIMATE = str(files("lowvram") / "assets" / "nano-animate" / "diffusion_pytorch_model.safetensors")
SMALL: dict[str, Any] = {"steps": 1, "frames": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Runtime("500MB", "2GB", "cpu", cache=False).load("nano")


def test_everything_that_is_exported_is_explained() -> None:
    for name in lowvram.__all__:
        found = getattr(lowvram, name)
        assert isinstance(found, str) or len(found.__doc__ or "") > 20, name
        assert name in (lowvram.__doc__ or "") or name == "__version__", name
    for kind in (lowvram.Runtime, lowvram.Pipeline, lowvram.Video, lowvram.Animation):
        for name, found in vars(kind).items():
            assert name.startswith("_") or not callable(found) or found.__doc__, f"{kind.__name__}.{name}"
    assert "Runtime" in pydoc.render_doc(lowvram)


def test_every_setting_of_a_job_is_explained_where_it_is_given() -> None:
    said = Pipeline.job.__doc__ or ""
    settings = typing.get_type_hints(make_job).keys() - {"return", "spec", "model", "files", "prompt"}
    assert not [name for name in settings - {"driving"} if f"\n        {name} " not in said]


def test_errors_come_back_from_other_processes(pipe: Pipeline) -> None:
    with pytest.raises(BudgetError) as told:
        Runtime("1MB", "2GB", "cpu").load("nano").plan(PROMPT)
    again = pickle.loads(pickle.dumps(told.value))
    assert type(again) is BudgetError and str(again) == str(told.value)
    assert (again.minimum_vram, again.nearest) == (told.value.minimum_vram, told.value.nearest)


def test_a_video_that_is_saved_twice_reports_one_decode_each_time(pipe: Pipeline, tmp_path: Path) -> None:
    video = pipe(PROMPT, **SMALL)
    reports = [video.save(tmp_path / f"{n}.mp4") for n in range(2)]
    for report in reports:
        assert [stage.name for stage in report.stages] == ["text", "prepare", "denoise", "decode"]
    assert len(reports[0].samples) == len(reports[1].samples)


def test_what_a_notebook_shows_is_a_line(pipe: Pipeline, tmp_path: Path) -> None:
    video = pipe(PROMPT, **SMALL)
    for shown in (pipe.runtime, pipe, pipe.model, video):
        assert len(repr(shown)) < 120 and "\n" not in repr(shown)
    assert "nano" in repr(video) and "64x64" in repr(video)
    assert str(video.save(tmp_path / "a.mp4")).splitlines()[-1].startswith("whole job")


def test_loras_are_named_by_their_paths(pipe: Pipeline) -> None:
    paths = [
        str(files("lowvram") / f"assets/nano/loras/lightning-4-{e}.safetensors") for e in ("high", "low")
    ]
    chosen = tuple(LoraChoice(path=path) for path in paths)
    assert pipe.job(PROMPT, loras=paths) == pipe.job(PROMPT, loras=chosen)
    assert pipe.job(PROMPT, loras=Path(paths[0]), force=True).loras == chosen[:1]


def test_one_scale_of_guidance_is_that_of_both_experts(pipe: Pipeline) -> None:
    assert pipe.job(PROMPT, guidance=3, **SMALL).schedule.guidance == (3.0,)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda pipe: Runtime(vram=1.5), "vram"),  # type: ignore[arg-type]
        (lambda pipe: Runtime(ram=-1), "ram"),
        (lambda pipe: pipe.runtime.load("nano", transformer="a.safetensors"), "single"),
        (lambda pipe: pipe.runtime.load("nano", single=pipe.files["high"]), "--high and --low"),
        (lambda pipe: pipe.runtime.load("nano-animate", high=ANIMATE), "--transformer"),
        (lambda pipe: pipe.job(PROMPT, loras=(LoraChoice(path="a", expert="middle"),)), "middle"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    wrong: Callable[[Pipeline], Any], words: str, pipe: Pipeline
) -> None:
    with pytest.raises(UsageError, match=words):
        wrong(pipe)


def test_names_of_users_there_are_not_are_names_of_files(pipe: Pipeline) -> None:
    for path in ("~nobody-of-this-name/a.png", "~a.png"):
        with pytest.raises(lowvram.FileError, match=r"a\.png"):
            pipe.job(PROMPT, image=path)
        with pytest.raises(lowvram.FileError, match=r"a\.png"):
            pipe.runtime.load("nano", vae=path)


def test_one_folder_of_models_may_be_given_by_itself(tmp_path: Path) -> None:
    """And is not taken for the folders that its letters name, of which "/" is one."""
    pipe = Runtime("500MB", "2GB", "cpu").load("nano", models_dirs=str(tmp_path))
    assert pipe.models_dirs == (str(tmp_path),)


def test_a_folder_of_models_that_is_not_there_is_refused_even_where_none_is_needed(tmp_path: Path) -> None:
    with pytest.raises(lowvram.FileError, match="--models-dir"):
        Runtime("500MB", "2GB", "cpu").load("nano", models_dirs=[str(tmp_path / "none")])
