"""The report: sums, peaks and stalls as JSON and as a table."""

from __future__ import annotations

import json

from lowvram import Runtime
from lowvram.report import BlockReport, Report, StageReport, merged, table

TEXT = StageReport("text", 3.25, 2_000_000_000, 1_950_000_000, 11_000_000_000, 11_000_000_000, {"disk": 2.0})
DENOISE = StageReport(
    "denoise",
    100.0,
    9_100_000_000,
    9_000_000_000,
    0,
    500_000_000_000,
    {"copy": 7.5, "disk": 1.0, "decode": 0.01},
)
DECODE = StageReport("decode", 12.0, 4_000_000_000, None, 250_000_000, 0)


def test_json_is_one_plain_object_with_integers_for_bytes() -> None:
    record = Report((TEXT, DENOISE)).to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["schema"] == "lowvram.report/1"
    assert record["vram"] == {"predicted": 9_100_000_000, "measured": 9_000_000_000}
    assert (record["seconds"], record["disk_read"], record["h2d"]) == (
        103.25,
        11_000_000_000,
        511_000_000_000,
    )
    assert record["stalls"] == {"copy": 7.5, "disk": 3.0, "decode": 0.01}
    stages = record["stages"]
    assert isinstance(stages, list) and [stage["name"] for stage in stages] == ["text", "denoise"]
    assert stages[0] == {
        "name": "text",
        "seconds": 3.25,
        "vram": {"predicted": 2_000_000_000, "measured": 1_950_000_000},
        "ram": {"predicted": 0, "seen": 0},
        "disk_read": 11_000_000_000,
        "h2d": 11_000_000_000,
        "stalls": {"disk": 2.0},
        "blocks": [],
    }


def test_a_peak_that_was_not_measured_everywhere_is_not_claimed() -> None:
    report = Report((DENOISE, DECODE))
    assert report.vram_measured is None
    assert report.vram_predicted == 9_100_000_000
    assert Report((DENOISE,)).vram_measured == 9_000_000_000


def test_the_table_is_short_and_aligned() -> None:
    assert table(Report((TEXT, DENOISE, DECODE))).splitlines() == [
        "stage         time  peak VRAM  planned     disk  to device  waited",
        "text         3.2 s    1.95 GB  2.00 GB  11.0 GB    11.0 GB  disk 2.0 s",
        "denoise    100.0 s    9.00 GB  9.10 GB      0 B     500 GB  copy 7.5 s, disk 1.0 s",
        "decode      12.0 s          -  4.00 GB   250 MB        0 B  -",
        "whole job  115.2 s          -  9.10 GB  11.2 GB     511 GB  copy 7.5 s, disk 3.0 s",
    ]


def test_a_job_without_stages_is_still_a_report() -> None:
    report = Report(())
    assert report.to_json()["seconds"] == 0
    assert len(table(report).splitlines()) == 2


def test_every_block_is_reported_and_the_stage_is_their_sum() -> None:
    pipe = Runtime("13MB", "2GB", "cpu", cache=False).load("nano")
    ticks = iter(range(10**9))
    job = pipe.job("a red circle", steps=2, frames=1)
    video = pipe.run(job, clock=lambda: float(next(ticks)))
    text, denoise = (next(s for s in video.reports if s.name == name) for name in ("text", "denoise"))
    spec = pipe.model.spec
    assert [b.name for b in text.blocks] == ["norm.0", *(f"text.{n}" for n in range(spec.text.layers))]
    assert len(denoise.blocks) == spec.dit.layers * len(spec.expert_names())
    for stage in (text, denoise):
        assert sum(block.disk_bytes for block in stage.blocks) == stage.disk_bytes
        assert sum(block.h2d_bytes for block in stage.blocks) == stage.h2d_bytes
        assert all(block.compute > 0 and block.visits > 0 for block in stage.blocks)
        assert stage.ram_predicted > 0 and stage.ram_seen > 0
    assert {block.name.split(".")[0] for block in denoise.blocks} == set(spec.expert_names())


def test_segments_add_up_block_by_block() -> None:
    block = BlockReport("single.0", 2, 1.5, 10, 20, {"disk": 0.5, "copy": 0.0})
    stage = StageReport("denoise", 1.0, 5, None, 10, 20, {"disk": 0.5}, 7, 6, (block,))
    (both,) = merged(Report((stage, stage))).stages
    assert both.blocks == (BlockReport("single.0", 4, 3.0, 20, 40, {"disk": 1.0, "copy": 0.0}),)
    assert (both.ram_predicted, both.ram_seen) == (7, 6)
