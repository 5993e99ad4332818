"""The memory of a job over time, written and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lowvram import Runtime
from lowvram.cli import work
from lowvram.cli.carry import write_report
from lowvram.offload.budget import Budget
from lowvram.report import Report, Sample
from lowvram.timeline import draw

SVG = "{http://www.w3.org/2000/svg}"
SAMPLES = [
    Sample(10.0, "text", 100, 50, 40),
    Sample(12.0, "text", 300, 50, 45),
    Sample(12.0, "denoise", 200, 60, 45),
    Sample(20.0, "denoise", 900, 60, 55),
    Sample(20.0, "<decode>", 400, 60, 50),
    Sample(26.0, "<decode>", 500, 60, 50),
]


def texts(svg: str) -> list[str]:
    return ["".join(found.itertext()) for found in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_stages_are_named_and_peaks_and_caps_are_told() -> None:
    said = texts(draw(SAMPLES, Budget(1000, 100)))
    assert {"text", "denoise", "<decode>", "900 B", "1.00 KB", "60 B", "100 B", "16.0 s"} <= set(said)


def test_what_is_claimed_is_drawn_to_scale_and_inside_the_panel() -> None:
    shape = next(ElementTree.fromstring(draw(SAMPLES, Budget(1000, 100))).iter(f"{SVG}polygon"))
    points = [tuple(map(float, point.split(","))) for point in shape.attrib["points"].split()]
    base, tops = points[0][1], [y for _, y in points[1:-1]]
    heights = [base - y for y in tops]
    assert all(
        abs(h / heights[0] - s.vram / SAMPLES[0].vram) < 0.1 for h, s in zip(heights, SAMPLES, strict=True)
    )
    assert min(tops) > base - 200 and [x for x, _ in points] == sorted(x for x, _ in points)


def test_a_cap_far_above_everything_is_named_and_not_drawn() -> None:
    near, far = (draw(SAMPLES, Budget(cap, 100)).count("stroke-dasharray") for cap in (1000, 10**6))
    assert near == 2 and far == 1


def test_one_moment_can_be_drawn() -> None:
    assert "text" not in texts(draw(SAMPLES[:1], Budget(1000, 100)))


def test_generate_writes_its_report(cli: Callable[..., Any], tmp_path: Path) -> None:
    args = (
        "generate",
        "a red circle moves left on a teal background",
        "--preset",
        "lightning-4",
        "--frames",
        1,
    )
    said = cli(*args, "-o", tmp_path / "a.mp4", "--report", tmp_path / "a.json")
    assert said.code == 0
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert found["schema"] == "lowvram.report/1"
    assert list(dict.fromkeys(m["stage"] for m in found["memory"])) == [
        "text",
        "prepare",
        "denoise",
        "decode",
    ]
    most = {
        name: max(m["vram"] for m in found["memory"] if m["stage"] == name) for name in ("denoise", "decode")
    }
    planned = {stage["name"]: stage["vram"]["predicted"] for stage in found["stages"]}
    assert all(0 < most[name] <= planned[name] for name in most)
    assert cli(*args, "-o", tmp_path / "b.mp4", "--report", tmp_path / "b.svg").code == 0
    assert "denoise" in texts((tmp_path / "b.svg").read_text(encoding="utf-8"))
    drawn, latent = tmp_path / "c.svg", tmp_path / "latent.safetensors"
    assert cli("decode", "last", "-o", tmp_path / "c.mp4", "--report", drawn).code == 0
    assert "decode" in texts(drawn.read_text(encoding="utf-8"))
    assert cli("decode", latent, "-o", tmp_path / "d.mp4", "--report", drawn).code == 2


def test_a_resumed_job_writes_its_report(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Any, latent: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(work, "save_latent", interrupted)
        said = cli("generate", "a red circle", "--steps", 2, "--frames", 1, "-o", tmp_path / "a.mp4")
    assert said.code == 130 and "interrupted; go on with `lowvram resume" in said.err
    assert cli("resume", "last", "--report", tmp_path / "a.json").code == 0
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [stage["name"] for stage in found["stages"]] == ["text", "prepare", "denoise", "decode"]
    assert found["stages"][0]["disk_read"] == 0  # the text came from the cache


def test_a_report_of_nothing_is_drawn_as_nothing(tmp_path: Path) -> None:
    plan = Runtime("500MB", "2GB", "cpu").load("nano").plan("a red circle", steps=1, frames=1)
    write_report(Report(()), plan, tmp_path / "a.svg")
    assert "VRAM" in texts((tmp_path / "a.svg").read_text())
