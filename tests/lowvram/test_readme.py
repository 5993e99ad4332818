"""Whatever the README shows is run here: what needs no weights as it stands, the rest up to its flags."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from lowvram.cli.main import app
from lowvram.errors import LowvramError
from lowvram.media.probe import probe
from lowvram.media.video import read_frames
from lowvram.quant.encodings.registry import encoding_names
from lowvram.sampling.presets import few_step

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, lines that go on joined."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def commands() -> list[list[str]]:
    """Arguments of every call of lowvram in the README."""
    lines = [
        line.removeprefix("$ ") for block in blocks("bash") + blocks("console") for line in block.splitlines()
    ]
    calls = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(call)[1:] for call in calls if re.match(r"(\.venv/bin/)?lowvram ", call)]


def runs_here(arguments: list[str]) -> bool:
    return arguments[0] in ("demo", "plan") or (arguments[0] == "generate" and "--model" not in arguments)


HERE = [c for c in commands() if runs_here(c)]
ELSEWHERE = [c for c in commands() if not runs_here(c)]


def test_the_readme_shows_every_verb() -> None:
    assert {c[0] for c in HERE} == {"demo", "plan", "generate"}
    assert {c[0] for c in ELSEWHERE} == {
        "generate",
        "animate",
        "inspect",
        "models",
        "quantize",
        "resume",
        "encode",
        "decode",
        "jobs",
    }


@pytest.mark.parametrize("arguments", [c for c in HERE if c[0] != "plan"], ids=shlex.join)
def test_videos_are_made_as_shown(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = cli(*arguments)
    assert said.code == 0
    output = tmp_path / arguments[arguments.index("-o") + 1]
    assert said.out.strip() == output.name
    info = probe(output)
    assert (info.width, info.height, info.frames) == (64, 64, 9)
    assert np.stack(list(read_frames(output))).std() > 10


@pytest.mark.parametrize("block", blocks("console"))
def test_plans_are_what_is_shown(block: str, cli: Callable[..., Any]) -> None:
    """The lines shown are lines of the real output, in order; "..." stands for what is left out."""
    command, *shown = block.strip().splitlines()
    said = cli(*shlex.split(command.removeprefix("$ lowvram ")))
    assert said.code == 0
    real = iter(said.out.splitlines())
    for line in shown:
        start, left_out, _ = line.partition("...")
        found = any(r.startswith(start) and (left_out or r.rstrip() == line) for r in real) if start else True
        assert found, f"{line!r} is not in what the command says now:\n{said.out}"


@pytest.mark.parametrize("arguments", ELSEWHERE, ids=shlex.join)
def test_flags_of_the_other_commands_exist(arguments: list[str]) -> None:
    verb: Any = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    named = len(arguments) > 1 and arguments[0] in ("models", "jobs")
    verb = verb.commands[arguments[1]] if named else verb
    known = {flag for parameter in verb.params for flag in parameter.opts}
    assert {a for a in arguments[1:] if a.startswith("-")} <= known
    if "--preset" in arguments:
        few_step(arguments[arguments.index("--preset") + 1])


@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_example_runs(block: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    (made,) = tmp_path.glob("*.mp4")
    assert probe(made).frames == 9


def test_the_test_command_is_the_gate() -> None:
    assert any(block.strip() == "bash .ci/run" for block in blocks("bash"))
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in gate
    for part in ('ruff" check', 'ruff" format', "mypy", "pytest"):
        assert part in gate


def test_exit_codes_and_formats_are_those_of_the_program() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert told == {kind.exit_code for kind in LowvramError.__subclasses__()} | {0}
    formats = re.findall(r"^\| Formats \| (.*?) \|", README, re.MULTILINE)[0]
    assert set(re.findall(r"`(\w+)`", formats)) <= set(encoding_names())
    assert all((ROOT / link).exists() for link in re.findall(r"\]\((\w[\w/.]*)\)", README))
