"""The embedded model that is driven by a video: what its frames show is what it was shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lowvram.media.video import read_frames


def differs(video: np.ndarray) -> np.ndarray:
    """[T, H, W]: where frames [T, H, W, 3] are not their background, which is what lies in the corners."""
    corners = video[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
    return np.abs(video - np.median(corners, axis=(0, 1))).sum(-1) > 110


def middles(masks: np.ndarray) -> np.ndarray:
    """[T, 2] x, y of the middle of each mask."""
    return np.array([[m.nonzero()[1].mean(), m.nonzero()[0].mean()] for m in masks])


def test_the_pictures_colour_follows_the_cross_over_three_segments(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    folder, output = tmp_path / "drive", tmp_path / "out.mp4"
    said = cli("demo", "--drive", folder, "-o", output, "--quiet")
    assert said.code == 0, said.err
    video, pose = (np.stack(list(read_frames(path))) for path in (output, folder / "src_pose.mp4"))
    picture = np.asarray(Image.open(folder / "src_ref.png"))[None]
    assert video.shape == pose.shape == (25, 64, 64, 3)
    masks, asked = differs(video), differs(picture)
    assert masks.sum((1, 2)).min() > 40
    path, track = middles(masks), middles(pose.sum(-1) > 380)
    assert np.ptp(track, axis=0).max() > 15
    assert np.hypot(*(path - track).T).mean() < 2.5
    assert np.abs(video[masks].mean(0) - picture[asked].mean(0)).max() < 30
    assert np.abs(video[~masks].mean(0) - picture[~asked].mean(0)).max() < 15

    # the sample is the user's then: it is not written over
    again = cli("demo", "--drive", folder, "-o", tmp_path / "again.mp4", "--quiet")
    assert again.code == 2 and "lowvram animate" in again.err and not (tmp_path / "again.mp4").exists()
    refused = cli("demo", "-o", output, "--quiet")
    assert refused.code == 2 and "--overwrite" in refused.err
