"""The embedded model at its least budget, a byte under it, and far over it: it runs, or is refused with the true least."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram import Runtime
from lowvram.errors import BudgetError
from lowvram.media.probe import probe
from lowvram.offload.budget import parse_bytes
from lowvram.offload.estimate import track

PROMPT = "a red circle moves left on a black background"
SETTINGS: dict[str, Any] = {"frames": 5, "steps": 1}
PLENTY = {"vram": 10**9, "ram": 2 * 10**9}


@pytest.fixture(scope="module", params=["vram", "ram"])
def cap(request: pytest.FixtureRequest) -> tuple[str, int]:
    """Which memory is capped, and the least of it, with plenty of the other."""
    name = str(request.param)
    with pytest.raises(BudgetError) as refused:
        Runtime(**PLENTY | {name: 1000}, device="cpu").load("nano").plan(PROMPT, **SETTINGS)
    least = getattr(refused.value, f"minimum_{name}")
    assert isinstance(least, int)
    return name, least


def generate(cli: Callable[..., Any], cap: tuple[str, int], target: Path) -> Any:
    """`lowvram generate` with so many bytes of the memory."""
    budget = PLENTY | dict([cap])
    flags = [f"--{name}={nbytes}B" for name, nbytes in budget.items()]
    return cli("generate", PROMPT, "--frames", 5, "--steps", 1, "--device", "cpu", *flags, "-o", target)


@pytest.mark.parametrize("more", [0, 10**8])
def test_the_least_is_enough_and_so_is_more(
    more: int, cap: tuple[str, int], cli: Callable[..., Any], tmp_path: Path
) -> None:
    said = generate(cli, (cap[0], cap[1] + more), tmp_path / "out.mp4")
    assert said.code == 0, said.err
    assert probe(tmp_path / "out.mp4").frames == 5


def test_a_byte_less_is_refused_with_the_least(
    cap: tuple[str, int], cli: Callable[..., Any], tmp_path: Path
) -> None:
    name, least = cap
    said = generate(cli, (name, least - 1), tmp_path / "out.mp4")
    assert said.code == 4
    typed = re.search(rf"--{name} (\S+) or more", said.err)
    assert typed is not None and least <= parse_bytes(typed[1]) <= 1.1 * least
    assert not list(tmp_path.iterdir())


def test_what_lies_on_the_device_is_no_more_than_the_least(tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as refused:
        Runtime(**PLENTY | {"vram": 1000}, device="cpu").load("nano").plan(PROMPT, **SETTINGS)
    least = refused.value.minimum_vram
    assert least is not None
    pipe = Runtime(**PLENTY | {"vram": least}, device="cpu", cache=False).load("nano")
    with track() as tracker:
        pipe(PROMPT, **SETTINGS).save(tmp_path / "out.mp4")
    host = 4 * 16 * 2 * 8 * 8 + 5 * 64 * 64 * 3  # the latent and the frames, which lie on the host
    assert tracker.peak().peak_bytes <= least + host
