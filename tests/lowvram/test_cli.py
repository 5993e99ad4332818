"""The command line: wrong input is told in three lines and leaves nothing behind; right input does what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowvram import __version__
from lowvram.cli import console, main
from lowvram.errors import LowvramError

GENERATE = ("generate", "a red circle", "-o", "out.mp4", "--model", "model")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Iterator[Path]:
    """The current folder: files of many wrong kinds, and `model`, the small model by links."""
    monkeypatch.chdir(tmp_path)
    whole = (tiny_model / "vae.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[:-1000])
    (tmp_path / "page.safetensors").write_bytes(
        b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
    )
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(1, 256)) * 40)
    (tmp_path / "notes.txt").write_text("nothing to see")
    (tmp_path / "exists.mp4").write_bytes(b"mine")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "model").mkdir()
    for file in tiny_model.iterdir():
        (tmp_path / "model" / file.name).hardlink_to(file)
    yield tmp_path


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if "model/" not in p.relative_to(folder).as_posix()
    }


# ---- wrong input

USAGE: list[tuple[list[str], list[str]]] = [
    (["frobnicate"], ["frobnicate"]),
    (["generate", "x", "--stepz", "4"], ["--stepz", "--steps"]),
    (["generate"], ["PROMPT"]),
    (["plan", "one", "two"], ["two"]),
    ([*GENERATE, "--lora", ""], ["--lora", "FILE"]),
    ([*GENERATE, "--size", "480p"], ["480p", "--image"]),
    (["generate", "a \udcff"], ["UTF-8"]),
    ([*GENERATE, "--negative", "\udcff"], ["UTF-8"]),
    ([*GENERATE, "--frames", "10"], ["10 frames", "9 and 13"]),
    ([*GENERATE, "--frames", "0"], ["0 frames", "1"]),
    ([*GENERATE, "--frames", "many"], ["--frames"]),
    ([*GENERATE, "--size", "100x64"], ["width 100", "96 and 112"]),
    ([*GENERATE, "--size", "64x0"], ["height 0", "16"]),
    ([*GENERATE, "--size", "large"], ["large", "--size 1280x720"]),
    ([*GENERATE, "--steps", "0"], ["0 steps"]),
    ([*GENERATE, "--shift", "nan"], ["shift nan"]),
    ([*GENERATE, "--guidance", "strong"], ["strong", "--guidance 4,3"]),
    ([*GENERATE, "--guidance", "1,2,3"], ["1,2,3"]),
    ([*GENERATE, "--guidance", "inf"], ["inf"]),
    ([*GENERATE, "--fps", "0"], ["--fps"]),
    ([*GENERATE, "--seed=-1"], ["seed -1"]),
    ([*GENERATE, "--solver", "unipcc"], ["unipcc", 'did you mean "unipc"']),
    ([*GENERATE, "--preset", "lightnin-4"], ["lightnin-4", 'did you mean "lightning-4"']),
    ([*GENERATE, "--preset", "lightning-4", "--steps", "9"], ["--steps"]),
    ([*GENERATE, "--model", "wan2.2-t2v-a14"], ['did you mean "wan2.2-t2v-a14b"']),
    ([*GENERATE, "--model", "notes.txt"], ["notes.txt", "--transformer"]),
    ([*GENERATE, "--device", "tpu"], ["tpu", "cpu or cuda"]),
    ([*GENERATE, "--vram", "16"], ["16GB", "16GiB"]),
    ([*GENERATE, "--vram", "16G"], ["16GB", "16GiB"]),
    ([*GENERATE, "--ram", "lots"], ["--ram", "lots"]),
    ([*GENERATE, "--lora", "a.safetensors@strong"], ["strong"]),
    ([*GENERATE, "--lora", "a.safetensors@nan"], ["nan"]),
    ([*GENERATE, "--lora", "a.safetensors@1,"], ['"a.safetensors@1,"', "equal shares"]),
    ([*GENERATE, "--steps", "2", "--lora", "a.safetensors@1,0.5,0"], ["3 strengths for 2 steps"]),
    ([*GENERATE, "--offload_model", "True"], ["--offload_model", "--vram"]),
    ([*GENERATE, "--t5_cpu"], ["--t5_cpu", "--vram"]),
    (["generate", "x", "-o", "exists.mp4"], ["exists.mp4", "--overwrite"]),
    (["generate", "x", "-o", "out.avi"], ["out.avi", ".mp4"]),
    (["generate", "x", "-o", "nowhere/out.mp4"], ["nowhere", "make the folder"]),
    (["generate", "x", "-o", "nothing"], ["nothing"]),
    (["generate", "x", "-o", "out.mp4", "--report", "nowhere/report.json"], ["its folder does not exist"]),
    (["generate", "x", "-o", "out.mp4", "--report", "exists.mp4"], ["--report exists.mp4", ".svg"]),
    (["plan", "--model", "wan2.2-t2v", "--machine", "rtx4090"], ["wan2.2-t2v-a14b"]),
    (["plan", "--machine", "rtx409"], ['did you mean "rtx4090"']),
    (["plan", "--weights", "fp7"], ["fp7", "fp8"]),
    (["plan", "--weights", "fp8", "--model", "model"], ["--weights", "--model model"]),
    (
        ["plan", "--model", "wan2.1-t2v-14b", "--transformer", "page.safetensors", "--weights", "fp8"],
        ["--weights", "--transformer"],
    ),
    (["resume", "last"], ["no unfinished job"]),
    (["resume", "20990101"], ["20990101", "there are none yet"]),
    (["decode", "last"], ["no finished latent"]),
    (["animate", "nothing", "--prompt", "dance", "--carry", "2"], ["2 carried frames"]),
]

FILE: list[tuple[list[str], list[str]]] = [
    ([*GENERATE, "--model", "wan2.2-t2v-a14b"], ["wan2.2-t2v-a14b", "--models-dir", "models pull"]),
    ([*GENERATE, "--model", "nothing"], ["nothing", "--high"]),
    ([*GENERATE, "--vae", "gone.safetensors"], ["gone.safetensors", "--vae"]),
    (["plan", "--weights", "page.safetensors", "--machine", "rtx4090"], ["page.safetensors", "HTML"]),
    (["plan", "--weights", "model/vae.safetensors"], ["a VAE", "a transformer"]),
    ([*GENERATE, "--vae", "truncated.safetensors"], ["truncated.safetensors", "download"]),
    ([*GENERATE, "--vae", "page.safetensors"], ["page.safetensors", "HTML", "download"]),
    ([*GENERATE, "--text-encoder", "empty.safetensors"], ["empty.safetensors", "empty"]),
    ([*GENERATE, "--high", "noise.safetensors"], ["noise.safetensors"]),
    ([*GENERATE, "--high", "model/vae.safetensors"], ["a VAE", "a transformer"]),
    ([*GENERATE, "--low", "model/high_noise_model.safetensors"], ["same file", "--low"]),
    ([*GENERATE, "--lora", "gone.safetensors"], ["gone.safetensors"]),
    ([*GENERATE, "--lora", "page.safetensors:high@0.5"], ["page.safetensors", "HTML"]),
    ([*GENERATE, "--lora", "model/vae.safetensors"], ["model/vae.safetensors"]),
    (["inspect", "gone.safetensors"], ["gone.safetensors"]),
    (["inspect", "page.safetensors"], ["page.safetensors", "HTML"]),
    (["inspect", "truncated.safetensors"], ["truncated.safetensors"]),
    (["inspect", "gone.mp4"], ["gone.mp4"]),
    (["inspect", "exists.mp4"], ["exists.mp4"]),
]

WRONG = [pytest.param(2, *case, id=" ".join(case[0])) for case in USAGE] + [
    pytest.param(3, *case, id=" ".join(case[0])) for case in FILE
]


@pytest.mark.parametrize(("code", "arguments", "fragments"), WRONG)
def test_wrong_input_is_told_and_leaves_nothing_behind(
    code: int, arguments: list[str], fragments: list[str], folder: Path, jobs: Path, cli: Callable[..., Any]
) -> None:
    before = tree(folder)
    said = cli(*arguments)
    lines = said.err.splitlines()
    assert (said.code, said.out) == (code, "")
    assert 2 <= len(lines) <= 3 and lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in said.err
    assert "Traceback" not in said.err
    assert tree(folder) == before and not jobs.exists()


@pytest.mark.parametrize("arguments", [USAGE[4][0], FILE[4][0], ["generate", "x", "--stepz", "4"]])
def test_errors_are_json_too(arguments: list[str], folder: Path, cli: Callable[..., Any]) -> None:
    said = cli(*arguments, "--json")
    (record,) = said.objects
    assert record["schema"] == "lowvram.error/1" and record["exit_code"] == said.code != 0
    assert record["error"] in said.err and all(detail in said.err for detail in record["details"])


def test_debug_adds_the_traceback_and_nothing_else_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main.run(["plan", "--debug", "--frames", "10"])
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert "Traceback" in err and err.splitlines()[-3].startswith("error: ")


def test_a_budget_too_small_names_one_that_works(folder: Path, jobs: Path, cli: Callable[..., Any]) -> None:
    before = tree(folder)
    job = (*GENERATE, "--steps", "2", "--quiet")
    small = cli(*job, "--vram", "1MB")
    assert small.code == 4 and len(small.err.splitlines()) <= 3 and "decode" in small.err
    assert tree(folder) == before and not jobs.exists()
    enough = re.search(r"--vram (\S+)", small.err)
    assert enough is not None
    tight = cli(*job, "--vram", enough[1], "--ram", "100MB")
    assert tight.code == 4
    ram = re.search(r"--ram (\S+)", tight.err)
    assert ram is not None
    assert cli(*job, "--vram", enough[1], "--ram", ram[1]).code == 0
    assert (folder / "out.mp4").stat().st_size > 0


def test_where_no_job_can_be_kept_is_a_storage_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    monkeypatch.setenv("LOWVRAM_STATE", str(folder / "notes.txt" / "jobs"))
    said = cli(*GENERATE)
    assert said.code == 6 and "LOWVRAM_STATE" in said.err
    assert not (folder / "out.mp4").exists()


def test_a_report_that_cannot_be_written_is_known_before_the_job(
    folder: Path, jobs: Path, cli: Callable[..., Any]
) -> None:
    said = cli(*GENERATE, "--report", "r" * 250 + ".json")  # longer than a name may be
    assert said.code == 6 and not jobs.exists() and not (folder / "out.mp4").exists()


@pytest.mark.parametrize(("signal_error", "code"), [(KeyboardInterrupt(), 130), (console.Terminated(), 143)])
def test_interruptions_have_their_exit_codes(
    signal_error: KeyboardInterrupt,
    code: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Callable[..., Any],
) -> None:
    def stop(*arguments: object) -> None:
        raise signal_error

    monkeypatch.setattr("lowvram.cli.inspect.describe", stop)
    said = cli("inspect", "notes.txt")
    assert said.code == code and said.err.startswith("error: ")


def test_an_unforeseen_error_is_called_a_bug(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("lowvram.cli.inspect.describe", fail)
    said = cli("inspect", "notes.txt")
    assert said.code == 70 and "ZeroDivisionError" in said.err and "--debug" in said.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="streams as Linux has them")
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("--version >&-", 0),
        ("--version > /dev/full", 6),
        ("--stepz 2>&-", 2),
        ("--json > /dev/full", 2),  # not the second error, and no traceback
    ],
)
def test_streams_that_are_closed_or_full_are_no_bug(command: str, code: int) -> None:
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m lowvram {command}",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and "Traceback" not in done.stderr


def test_every_error_has_an_exit_code_of_its_own_and_advice() -> None:
    kinds = LowvramError.__subclasses__()
    assert sorted(kind.exit_code for kind in kinds) == [2, 3, 4, 5, 6, 7, 8, 9, 70]
    for kind in kinds:
        code, lines = console.explain(kind("met", where="here", expected="that", advice="do this"))
        assert (code, lines) == (kind.exit_code, ("here: met", "expected that", "do this"))
        with pytest.raises(TypeError):
            kind("met")  # type: ignore[call-arg]


# ---- right input


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; from lowvram.cli.main import _run\n"
        "for line in ([], ['--help'], ['--version'], ['generate', '--help'], ['plan', '--help'], ['inspect', '--help']):\n"
        "    assert _run(line, False, False) == 0\n"
        "print(sorted({'torch', 'numpy', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"lowvram {__version__}" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    verbs = done.stdout.partition("Commands:")[2].partition("Usage:")[0].splitlines()
    assert len(verbs) > 10 and not any(line.endswith("...") for line in verbs)  # each is told in a line
    for verb in ("demo", "generate", "plan", "inspect", "resume", "decode"):
        assert f"\n  {verb} " in done.stdout


def test_help_names_what_every_value_is_and_the_flag_that_errors_speak_of(cli: Callable[..., Any]) -> None:
    assert "--debug" in cli("--help").out
    for verb in (*(verb.__name__ for verb in main.VERBS), "models pull", "models verify", "jobs rm"):
        said = cli(*verb.split(), "--help")
        assert said.code == 0 and not re.search(r"^  -.*<", said.out, re.MULTILINE), verb
        assert "[[" not in said.out and "......" not in said.out


def test_flags_of_wan_itself_are_understood(folder: Path, cli: Callable[..., Any]) -> None:
    flags = "--frame_num 5 --sample_steps 2 --sample_solver dpm++ --sample_shift 5 --sample_guide_scale 4,3 --base_seed 7"
    made = cli(
        "generate", "a red circle", "--ckpt_dir", "model", "--save_file", "wan.mp4", *flags.split(), "--json"
    )
    assert made.code == 0
    (result,) = made.objects
    assert (result["schema"], result["output"], result["seed"]) == ("lowvram.result/1", "wan.mp4", 7)
    seen = cli("inspect", "wan.mp4", "--json")
    (facts,) = seen.objects
    assert (facts["kind"], facts["size"], facts["frames"], facts["fps"]) == ("video", "64x64", 5, 8.0)
    job = facts["job"]
    assert (job["prompt"], job["seed"], job["steps"], job["solver"]) == ("a red circle", 7, 2, "dpm++")
    assert set(job["guidance"]) == {4.0, 3.0} and job["lowvram"] == __version__
    assert str(folder) not in seen.out


def test_inspect_says_what_each_part_is(folder: Path, cli: Callable[..., Any]) -> None:
    parts = ["high_noise_model", "vae", "text_encoder"]
    said = cli("inspect", *(f"model/{name}.safetensors" for name in parts), "--json")
    assert [(f["kind"], f["variant"]) for f in said.objects] == [
        ("dit", "t2v"),
        ("vae", "2.1"),
        ("text", "umt5"),
    ]
    assert said.objects[0]["sizes"]["dim"] == 256 and said.objects[0]["encodings"] == {
        "bf16": said.objects[0]["tensors"]
    }
    text = cli("inspect", "model/vae.safetensors")
    assert "kind: vae" in text.out and text.err == ""


def test_a_lora_whose_name_holds_a_strength_s_sign_is_found(folder: Path, cli: Callable[..., Any]) -> None:
    (folder / "style@2x.safetensors").write_bytes(b"")
    for given in ("style@2x.safetensors", "style@2x.safetensors@0.5"):
        said = cli(*GENERATE, "--lora", given)
        assert said.code == 3 and "style@2x.safetensors: " in said.err and "empty" in said.err
