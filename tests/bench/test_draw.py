"""Documents made of results: what is not measured says so, and pictures are well-formed."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from lowvram.bench import draw
from lowvram.bench.results import Part, Peer, new_results
from lowvram.survey import identify

PEAKS = {
    "a14b": {
        "16 GB": {"text": 10**9, "denoise": 15 * 10**9, "decode": 6 * 10**9, "ram": 7 * 10**9},
        "8 GB": {"text": 10**9, "denoise": 8 * 10**9, "decode": 6 * 10**9, "ram": 7 * 10**9},
        "least": {"vram": 3_900_000_000},
    }
}
PEERS = [
    Peer(name="lowvram", version="1", mode="disk", seconds=2.0, overhead=1.1, rss=10**9, disk_read=5, exact=True),
    Peer(name="other & co", version="2", mode="<x>", seconds=3.0, overhead=1.5, rss=10**9, disk_read=0, exact=False),
    Peer(
        name="gone", version="", mode="y", seconds=None, overhead=None, rss=None, disk_read=None, exact=None,
        note="not installed",
    ),
]  # fmt: skip


def test_what_has_no_measurement_says_so() -> None:
    text = draw.document(PEAKS, {})
    assert "| a14b | 15.0 GB | 8.00 GB | - | - | 3.90 GB |" in text
    gpu, peers = text.split("## On a GPU")[1].split("## Beside other programs")
    assert draw.NOT_YET in gpu and draw.COMMAND in gpu and draw.NOT_YET in peers


def test_measurements_replace_the_sentence() -> None:
    results = new_results(identify("cpu"), "2026-01-02")
    results.environment = msgspec.structs.replace(results.environment, kind="cuda", device="A card")
    results.parts = [Part("smoke", "passed", 3.2, {})]
    results.peers = PEERS
    text = draw.document(PEAKS, {"a-card.json": results})
    assert "### A card, 2026-01-02" in text and "| smoke | passed | 3 s |" in text
    assert "| other & co 2 | <x> | 3.00 | 1.50 | 1.00 GB | 0 B | no |" in text and "| not installed |" in text
    assert "hand-over: not measured yet" not in text


def test_pictures_are_well_formed_and_hold_what_they_show() -> None:
    for picture in (draw.peaks_plot(PEAKS), draw.peers_plot(PEERS)):
        root = ElementTree.fromstring(picture)
        assert float(root.attrib["width"]) > 0
    assert "other &amp; co: &lt;x&gt;" in picture and "1.50, other bits" in picture and "gone" not in picture


@pytest.mark.parametrize("name", ["RESULTS.md", "results/peaks.svg"])
def test_what_is_committed_was_drawn_from_what_is_committed(name: str, tmp_path: Path) -> None:
    """RESULTS.md and the plots follow from the results files: run `python bench/draw.py` after changing them."""
    found = {p.name: draw.load(p) for p in sorted((draw.FOLDER / "results").glob("*.json"))}
    recorded = draw.peaks.load()
    fresh = draw.document(recorded, found) if name == "RESULTS.md" else draw.peaks_plot(recorded)
    assert (draw.FOLDER / name).read_text(encoding="utf-8") == fresh
