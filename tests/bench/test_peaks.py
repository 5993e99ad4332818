"""Peaks do not grow unnoticed."""

from __future__ import annotations

from lowvram.bench import peaks
from lowvram.bench.cases import GB

SMALL = "wan2.2-t2v-a14b fp8 832x480x81"


def test_no_recorded_peak_has_grown() -> None:
    """One case a run; `python -m lowvram.bench.peaks --check` compares them all."""
    found = {SMALL: peaks.peaks(SMALL, (8,), least=False)}
    assert list(found[SMALL]) == ["8 GB"]
    assert list(peaks.grown(peaks.load(), found)) == []


def test_growth_of_over_one_percent_is_told() -> None:
    recorded = {"a": {"8 GB": {"denoise": 1000, "ram": 10}}}
    assert not list(peaks.grown(recorded, {"a": {"8 GB": {"denoise": 1010, "ram": 9}}}))
    (line,) = peaks.grown(recorded, {"a": {"8 GB": {"denoise": 1011, "ram": 10}}})
    assert "denoise: 1,000 bytes recorded, 1011 now" in line


def test_the_table_holds_every_case_and_keeps_the_promise_of_16_gb() -> None:
    table = peaks.load()
    assert set(table) == set(peaks.CASES)
    for name, budgets in table.items():
        assert budgets["16 GB"]["denoise"] <= 16 * GB and budgets["least"]["vram"] > 0, name
