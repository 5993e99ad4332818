"""Documents made of results: what is not measured says so, and pictures are well-formed."""

from __future__ import annotations

from xml.etree import ElementTree

import msgspec

from lowvram.bench import results_page
from lowvram.bench.results import Ceilings, Measurement, Part, Peer, Stage, new_results
from lowvram.survey import identify

PEAKS = {
    "a14b": {
        "16 GB": {"text": 10**9, "denoise": 15 * 10**9, "decode": 6 * 10**9, "ram": 7 * 10**9},
        "8 GB": {"text": 10**9, "denoise": 8 * 10**9, "decode": 6 * 10**9, "ram": 7 * 10**9},
        "least": {"vram": 3_900_000_000},
    }
}
PEERS = [
    Peer(name="lowvram", version="1", mode="disk", size="toy", seconds=2.0, overhead=1.1, rss=10**9, disk_read=5, exact=True),
    Peer(name="other & co", version="2", mode="<x>", size="toy", seconds=3.0, overhead=1.5, rss=10**9, disk_read=0, exact=False),
    Peer(
        name="gone", version="", mode="y", size="toy", seconds=None, overhead=None, rss=None, disk_read=None, exact=None,
        note="not installed",
    ),
]  # fmt: skip


MEASURED = Measurement(
    case="job nano", model="nano", weights="bf16", width=64, height=64, frames=9, placement="disk", vram_budget=10**7,
    ram_budget=10**9, ballast=False, blocks={"resident": 0, "ram": 0, "disk": 12}, seconds=2.0, runs=[2.0], steps=[1.0],
    handover=None, vram_predicted=10**7, vram_allocated=9 * 10**6, vram_driver=None, ram_predicted=10**9, rss=8 * 10**8,
    pinned=0, stages=[
        Stage(
            name="denoise", seconds=2.0, vram_predicted=10**7, vram_measured=9 * 10**6, disk_read=10**8, h2d=10**8,
            stalls={"disk": 0.5, "copy": 0.25},
        )
    ], flops=4e9, fraction=0.5, checksum="ab",
)  # fmt: skip


def test_what_has_no_measurement_says_so() -> None:
    text = results_page.document(PEAKS, {})
    assert "| a14b | 15.0 GB | 8.00 GB | - | - | 3.90 GB |" in text
    gpu, peers = text.split("## On a GPU")[1].split("## Beside other programs")
    assert results_page.NOT_YET in gpu and results_page.COMMAND in gpu and results_page.NOT_YET in peers


def test_measurements_replace_the_sentence() -> None:
    results = new_results(identify("cpu"), "2026-01-02")
    results.environment = msgspec.structs.replace(results.environment, kind="cuda", device="A card")
    results.parts = [Part("smoke", "passed", 3.2, {})]
    results.peers = PEERS
    text = results_page.document(PEAKS, {"a-card.json": results})
    assert "### A card, 2026-01-02" in text and "| smoke | passed | 3 s |" in text
    assert (
        "| other & co 2 | <x> | 3.00 | 1.50 | 1.00 GB | 0 B | no |  |" in text and "| not installed |" in text
    )
    assert "hand-over: not measured yet" not in text


def test_pictures_are_well_formed_and_hold_what_they_show() -> None:
    stalls = results_page.stalls_plot([MEASURED])
    roofline = results_page.roofline_plot(
        [MEASURED], Ceilings(matmul=1e10, attention=5e9, link=1e9, disk=1e8)
    )
    for picture in (results_page.peaks_plot(PEAKS), stalls, roofline, results_page.peers_plot(PEERS)):
        root = ElementTree.fromstring(picture)
        assert float(root.attrib["width"]) > 0
    assert "other &amp; co: &lt;x&gt;" in picture and "1.50, other bits" in picture and "gone" not in picture
    # 0.5 and 0.25 of 2 seconds
    widths = [float(box.attrib["width"]) for box in ElementTree.fromstring(stalls) if "rect" in box.tag]
    whole = sum(widths[-3:])
    assert [round(w / whole, 3) for w in widths[-3:]] == [0.625, 0.125, 0.25]
    assert "job 64p x 9, disk" in roofline


def test_what_is_committed_was_drawn_from_what_is_committed() -> None:
    """RESULTS.md and the plots follow from the results files: run `python bench/results_page.py` after changing them."""
    found = {p.name: results_page.load(p) for p in sorted((results_page.FOLDER / "results").glob("*.json"))}
    recorded = results_page.peaks.load()
    for name, picture in results_page.pictures(recorded, found).items():
        assert (results_page.FOLDER / "results" / name).read_text(encoding="utf-8") == picture
    assert (results_page.FOLDER / "RESULTS.md").read_text(encoding="utf-8") == results_page.document(
        recorded, found
    )
