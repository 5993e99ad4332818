"""Procedural driving videos: a pose track, a face, a character's picture, and the clip that follows from them.

The world of `data.py`, seen by Wan-Animate: the picture shows a flat shape on a flat background, the pose video a
white cross that moves along a track, the face video a face whose mouth opens and closes. What follows is the picture's
shape at the cross, the larger the wider the mouth is open. In "replace" the background is the scene's. Whether a video
does this is computed from its frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data import BACKGROUNDS, COLOURS, FRAMES, SHAPES, SIZE, best_shape, coverage
from numpy.typing import NDArray
from PIL import Image

from lowvram.media.video import VideoWriter

Floats = NDArray[np.float32]

FACE_PIXELS = 512
MARGIN = 15
"""Pixels that the middle of a shape keeps from the border."""
FPS = 8
REACH = 20
"""Half the side of the square around the cross that replace mode may paint."""


@dataclass(frozen=True, slots=True)
class Driven:
    """A character and what it does; tracks are by frame."""

    colour: str
    shape: str
    background: str
    radius: float
    """Pixels, of the picture's shape."""
    at: tuple[float, float]
    """Middle of the shape in the picture."""
    track: Floats
    """[T, 2] x, y in pixels."""
    mouth: Floats
    """[T] 0 shut .. 1 open."""
    scene: str | None = None
    """The background that the character is put into, in "replace"."""

    def picture(self, size: int = SIZE) -> Floats:
        """[3, H, W] in -1..1."""
        one = np.ones(1, np.float32)
        mask = coverage(self.shape, self.at[0] * one, self.at[1] * one, self.radius * one, size)
        return paint(mask, self.colour, self.background)[0]

    def clip(self, size: int = SIZE) -> Floats:
        """What should be seen: [T, 3, H, W] in -1..1."""
        radii = (self.radius * (0.75 + 0.5 * self.mouth)).astype(np.float32)
        mask = coverage(self.shape, self.track[:, 0], self.track[:, 1], radii, size)
        return paint(mask, self.colour, self.scene or self.background)

    def pose(self, size: int = SIZE) -> Floats:
        """A white cross on black: [T, 3, H, W] in -1..1."""
        grid = np.arange(size, dtype=np.float32) + 0.5
        x = np.abs(grid[None, None, :] - self.track[:, 0, None, None])
        y = np.abs(grid[None, :, None] - self.track[:, 1, None, None])
        inside = np.minimum(8 - np.maximum(x, y), 1.5 - np.minimum(x, y))
        mask = np.clip(inside + 0.5, 0, 1)[:, None]
        return np.repeat(2 * mask - 1, 3, axis=1).astype(np.float32)

    def hole(self, size: int = SIZE) -> Floats:
        """[T, H, W]: 1 where replace mode paints."""
        grid = np.arange(size, dtype=np.float32) + 0.5
        x = np.abs(grid[None, None, :] - self.track[:, 0, None, None])
        y = np.abs(grid[None, :, None] - self.track[:, 1, None, None])
        return (np.maximum(x, y) < REACH).astype(np.float32)

    def emptied(self, size: int = SIZE) -> Floats:
        """The scene without the person, black where it was: [T, 3, H, W] in -1..1."""
        paper = np.array(BACKGROUNDS[self.scene or self.background], np.float32)[:, None, None] / 127.5 - 1
        hole = self.hole(size)[:, None]
        return (1 - hole) * paper - hole

    def faces(self) -> Floats:
        """[T, 3, 512, 512] in -1..1."""
        return np.stack([face(float(m)) for m in self.mouth])


def paint(mask: Floats, colour: str, background: str) -> Floats:
    """mask [n, H, W] -> [n, 3, H, W] in -1..1."""
    ink = np.array(COLOURS[colour], np.float32)[:, None, None]
    paper = np.array(BACKGROUNDS[background], np.float32)[:, None, None]
    mask = mask[:, None]
    return (mask * ink + (1 - mask) * paper).astype(np.float32) / 127.5 - 1


def face(mouth: float, x: float = 0.0, y: float = 0.0) -> Floats:
    """A face whose mouth is open by 0..1, shifted by x and y pixels: [3, 512, 512] in -1..1."""
    grid = np.arange(FACE_PIXELS, dtype=np.float32) + 0.5 - FACE_PIXELS / 2
    u, v = grid[None, :] - x, grid[:, None] - y

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> Floats:
        distance = np.hypot((u - cx) / rx, (v - cy) / ry)
        return np.clip((1 - distance) * min(rx, ry) + 0.5, 0, 1)[None].astype(np.float32)

    out = np.full((3, FACE_PIXELS, FACE_PIXELS), -0.6, np.float32)
    layers = [((0, 0, 180, 230), (0.75, 0.45, 0.2)), ((0, 100, 80, 8 + 72 * mouth), (-0.6, -0.9, -0.9))]
    layers += [((side * 70, -70, 26, 18), (-0.9, -0.9, -0.8)) for side in (-1, 1)]
    for where, tint in layers:
        mask = ellipse(*where)
        out = mask * np.array(tint, np.float32)[:, None, None] + (1 - mask) * out
    return out


def write_folder(driven: Driven, folder: Path) -> None:
    """What Wan-Animate's preprocessing would write of it, `src_bg.mp4` and `src_mask.mp4` included."""
    folder.mkdir(parents=True, exist_ok=True)
    hole = np.repeat(2 * driven.hole()[:, None] - 1, 3, axis=1)
    videos = {"pose": driven.pose(), "face": driven.faces(), "bg": driven.emptied(), "mask": hole}
    for name, video in videos.items():
        frames = to_bytes(video)
        with VideoWriter(folder / f"src_{name}.mp4", *frames.shape[2:0:-1], FPS, overwrite=True) as writer:
            writer.write(frames)
    Image.fromarray(to_bytes(driven.picture()[None])[0]).save(folder / "src_ref.png")


def to_bytes(video: Floats) -> NDArray[np.uint8]:
    """[T, 3, H, W] in -1..1 -> [T, H, W, 3]"""
    return ((video.transpose(0, 2, 3, 1) + 1) * 127.5).round().astype(np.uint8)


def combinations() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """(training, held out): colour, shape, background; 12 of the 72 are never seen in training."""
    every = [(c, s, b) for c in COLOURS for s in SHAPES for b in BACKGROUNDS]
    order = np.random.default_rng(7).permutation(len(every))
    held_out = set(order[:12].tolist())
    return [e for i, e in enumerate(every) if i not in held_out], [every[i] for i in sorted(held_out)]


def draw(
    rng: np.random.Generator, chosen: tuple[str, str, str], frames: int = FRAMES, *, replace: bool = False
) -> Driven:
    """A random character of this colour, shape and background, on a random track."""
    colour, shape, background = chosen
    t = np.arange(frames, dtype=np.float32)
    middle, swing = SIZE / 2, SIZE / 2 - MARGIN

    def wave(fastest: float) -> Floats:
        amplitude, phase = rng.uniform(0.3, 1), rng.uniform(0, 2 * np.pi)
        offset = rng.uniform(-1, 1) * (1 - amplitude)
        rate = rng.uniform(0.3, 1) * fastest / amplitude
        return (offset + amplitude * np.sin(phase + rate * t)).astype(np.float32)

    track = np.stack([middle + swing * wave(3.2 / swing), middle + swing * wave(3.2 / swing)], 1)
    others = [b for b in BACKGROUNDS if b != background]
    return Driven(
        colour,
        shape,
        background,
        radius=float(rng.uniform(10, 13)),
        at=(float(middle + rng.uniform(-8, 8)), float(middle + rng.uniform(-8, 8))),
        track=track.astype(np.float32),
        mouth=0.5 + 0.5 * wave(0.5),
        scene=str(rng.choice(others)) if replace else None,
    )


@dataclass(frozen=True, slots=True)
class Followed:
    """How well a video follows what drives it."""

    colour: bool
    shape: bool
    path: float
    """Mean distance in pixels between the middle of the shape and the cross."""
    size: float
    """Correlation of the shape's width with the mouth."""


def follows(frames: NDArray[np.uint8], driven: Driven) -> Followed:
    """Read a video back: frames [T, H, W, 3]. Of what should be seen only the background's colour is used to look."""
    video = frames.astype(np.float32)
    paper = np.array(BACKGROUNDS[driven.scene or driven.background], np.float32)
    mask = np.abs(video - paper).sum(-1) > 110
    areas = mask.sum((1, 2))
    if areas.min() < 20:
        return Followed(False, False, float(SIZE), 0.0)
    ink = video[mask].mean(0)
    colour = min(COLOURS, key=lambda c: float(np.abs(ink - np.array(COLOURS[c])).sum()))
    centres = np.array([[m.nonzero()[1].mean() + 0.5, m.nonzero()[0].mean() + 0.5] for m in mask])
    middle = len(mask) // 2
    shape = best_shape(mask[middle], (float(centres[middle, 0]), float(centres[middle, 1])))
    distance = np.hypot(*(centres - driven.track).T)
    size = np.corrcoef(np.sqrt(areas), driven.mouth)[0, 1]
    return Followed(colour == driven.colour, shape == driven.shape, float(distance.mean()), float(size))


def summary(results: list[Followed]) -> dict[str, float]:
    """Shares of right colours and shapes, mean distance from the path in pixels, mean correlation of the size."""
    return {
        "colour": float(np.mean([r.colour for r in results])),
        "shape": float(np.mean([r.shape for r in results])),
        "path": float(np.mean([r.path for r in results])),
        "within 2 px": float(np.mean([r.path < 2 for r in results])),
        "size": float(np.mean([r.size for r in results])),
    }
