"""Peaks do not grow unnoticed."""

from __future__ import annotations

import pytest

from lowvram.bench import peaks
from lowvram.bench.cases import GB


@pytest.mark.parametrize("name", list(peaks.CASES))
def test_no_recorded_peak_has_grown(name: str) -> None:
    """Under one budget; `python -m lowvram.bench.peaks --check` compares them all, and the least budgets."""
    found = {name: peaks.peaks(name, (8,), least=False)}
    assert list(found[name]) == ["8 GB"]
    assert list(peaks.grown(peaks.load(), found)) == []


def test_growth_of_over_one_percent_is_told() -> None:
    recorded = {"a": {"8 GB": {"denoise": 1000, "ram": 10}}}
    assert not list(peaks.grown(recorded, {"a": {"8 GB": {"denoise": 1010, "ram": 9}}}))
    (line,) = peaks.grown(recorded, {"a": {"8 GB": {"denoise": 1011, "ram": 10}}})
    assert "denoise: 1,000 bytes recorded, 1011 now" in line
    assert len(list(peaks.grown(recorded, {"a": {"8 GB": {}}}))) == 2  # it does not fit any more


def test_the_table_holds_every_case_and_keeps_the_promise_of_16_gb() -> None:
    table = peaks.load()
    assert set(table) == set(peaks.CASES)
    for name, budgets in table.items():
        assert budgets["16 GB"]["denoise"] <= 16 * GB and budgets["least"]["vram"] > 0, name


def test_the_table_keeps_the_promises_of_least_budgets() -> None:
    table = {name: budgets["least"]["vram"] for name, budgets in peaks.load().items()}
    assert max(table.values()) <= 4 * GB, table
    t2v, i2v = table["wan2.2-t2v-a14b fp8 1280x720x121"], table["wan2.2-i2v-a14b fp8 1280x720x121"]
    assert i2v <= 1.03 * t2v
    assert table["wan2.2-ti2v-5b fp8 1280x704x121"] <= 2.1 * GB
    assert table["wan2.1-t2v-1.3b fp8 832x480x81"] <= 1.65 * GB
