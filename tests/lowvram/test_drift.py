"""Colours of segments, measured against numbers worked out otherwise, and when a person is told of them."""

from __future__ import annotations

import numpy as np
import pytest

from lowvram.drift import NOTABLE, Colours, Gauge, drift_note, shift
from lowvram.report import Report


def measured(frames: np.ndarray, segment: int = 0) -> Colours:
    gauge = Gauge()
    assert np.array_equal(np.stack(list(gauge.watch(frames))), frames)
    found = gauge.colours(segment)
    assert found is not None
    return found


def test_mean_and_spread_are_those_of_all_pixels_of_all_frames() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), np.uint8)
    found = measured(frames, 4)
    assert found.segment == 4
    assert found.mean == pytest.approx(frames.reshape(-1, 3).mean(0), abs=0.006)
    assert found.spread == pytest.approx(frames.reshape(-1, 3).std(0), abs=0.006)


def test_no_frames_have_no_colours() -> None:
    assert Gauge().colours(0) is None


def drifting(by: float, what: str) -> list[Colours]:
    """Three segments; the green of the last has moved `by` levels in mean or in spread."""
    frames = np.tile(np.array([60, 120], np.uint8)[:, None, None, None], (1, 4, 4, 3))
    moved = frames.astype(float)
    moved[..., 1] += by if what == "brightness" else np.where(frames[..., 1] > 90, by, -by)
    return [measured(f, n) for n, f in enumerate((frames, frames, moved.astype(np.uint8)))]


@pytest.mark.parametrize("what", ["brightness", "contrast"])
@pytest.mark.parametrize("by", [NOTABLE, -NOTABLE])
def test_what_moves_as_far_as_the_threshold_is_told_and_less_is_not(by: float, what: str) -> None:
    note = drift_note(drifting(by, what), matched=False)
    assert note is not None
    assert note.startswith(
        f"colours: segment 3 differs from the first by {by:+.0f} of 255 in the {what} of green"
    )
    assert "--match-colours holds them" in note
    assert "no more" in (drift_note(drifting(by, what), matched=True) or "")
    assert drift_note(drifting(by - np.sign(by), what), matched=False) is None


def test_one_segment_cannot_drift() -> None:
    assert drift_note(drifting(0, "contrast")[:1], matched=False) is None
    assert drift_note([], matched=False) is None


def test_the_report_states_the_shift_against_the_first_segment() -> None:
    colours = drifting(12, "brightness")
    assert shift(colours[2], colours[0]) == ((0, 12, 0), (0, 0, 0))
    stated = Report((), colours=tuple(colours)).to_json()["colours"]
    assert isinstance(stated, list) and [c["segment"] for c in stated] == [0, 1, 2]
    assert [c["mean_shift"] for c in stated] == [[0, 0, 0], [0, 0, 0], [0, 12, 0]]
    assert stated[2]["mean"] == [90, 102, 90] and stated[2]["spread"] == [30, 30, 30]
    assert Report(()).to_json()["colours"] == []
