"""Procedural clips with captions, and the score that reads a caption's claims back from pixels.

A clip is [T, 3, H, W] float32 in -1..1: one flat shape moves straight over a flat background. Whether a video
shows what its prompt says is computed from its frames alone: colour, direction of motion, shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (225, 35, 35),
    "green": (30, 175, 55),
    "blue": (40, 70, 235),
    "yellow": (245, 220, 40),
    "magenta": (225, 45, 205),
    "orange": (250, 135, 20),
}
BACKGROUNDS = {"black": (8, 8, 12), "teal": (10, 110, 115), "grey": (140, 140, 145), "navy": (20, 25, 85)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZE = 64
FRAMES = 9


@dataclass(frozen=True, slots=True)
class Scene:
    colour: str
    shape: str
    direction: str
    background: str

    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction} on a {self.background} background"


def all_scenes() -> list[Scene]:
    return [Scene(c, s, d, b) for c in COLOURS for s in SHAPES for d in DIRECTIONS for b in BACKGROUNDS]


def split(held_out: int = 48, seed: int = 7) -> tuple[list[Scene], list[Scene]]:
    """(training, held out): combinations never seen in training, each word seen in others."""
    scenes = all_scenes()
    order = np.random.default_rng(seed).permutation(len(scenes))
    chosen = set(order[:held_out].tolist())
    return [s for i, s in enumerate(scenes) if i not in chosen], [scenes[i] for i in sorted(chosen)]


def coverage(shape: str, cx: np.ndarray, cy: np.ndarray, radius: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Antialiased mask [n, size, size] of shapes centred at (cx, cy) [n], from a signed distance in pixels."""
    grid = np.arange(size, dtype=np.float32) + 0.5
    x = grid[None, None, :] - cx[:, None, None]
    y = grid[None, :, None] - cy[:, None, None]
    r = radius[:, None, None]
    if shape == "circle":
        inside = r - np.hypot(x, y)
    elif shape == "square":
        inside = 0.88 * r - np.maximum(np.abs(x), np.abs(y))
    else:  # an upright triangle: apex 1.15 r above its centre, base 0.62 r below, 2 r wide
        side = 0.8707 * np.abs(x) - 0.4919 * (y + 1.15 * r)
        inside = np.minimum(0.62 * r - y, -side)
    return np.clip(inside + 0.5, 0, 1)


def draw(scene: Scene, rng: np.random.Generator, frames: int = FRAMES, size: int = SIZE) -> np.ndarray:
    """A clip of the scene, place, size and speed drawn at random: [frames, 3, size, size] float32 in -1..1."""
    scale = size / 64
    radius = rng.uniform(11, 15) * scale
    speed = rng.uniform(2.4, 3.2) * scale
    dx, dy = DIRECTIONS[scene.direction]
    travel = speed * (frames - 1)
    margin = 1.15 * radius
    slack = max(size - 2 * margin - travel, 0)
    along = margin + rng.uniform(0, slack)
    across = rng.uniform(margin, size - margin)
    t = np.arange(frames, dtype=np.float32) * speed
    forward = along + t if dx + dy > 0 else size - along - t
    cx = forward if dx else np.full(frames, across, np.float32)
    cy = forward if dy else np.full(frames, across, np.float32)
    mask = coverage(scene.shape, cx, cy, np.full(frames, radius, np.float32), size)[:, None]
    ink = np.array(COLOURS[scene.colour], np.float32)[None, :, None, None]
    paper = np.array(BACKGROUNDS[scene.background], np.float32)[None, :, None, None]
    return (mask * ink + (1 - mask) * paper).astype(np.float32) / 127.5 - 1


def clips(scenes: list[Scene], seed: int) -> Iterator[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(seed)
    while True:
        scene = scenes[rng.integers(len(scenes))]
        yield scene, draw(scene, rng)


@dataclass(frozen=True, slots=True)
class Score:
    colour: bool
    direction: bool
    shape: bool


def score(frames: np.ndarray, scene: Scene) -> Score:
    """Read a video back. frames [T, H, W, 3] uint8; only pixels are looked at, and only the scene's background
    colour is taken from the caption."""
    video = frames.astype(np.float32)
    paper = np.array(BACKGROUNDS[scene.background], np.float32)
    mask = np.abs(video - paper).sum(-1) > 110
    if not all(m.sum() >= 20 for m in (mask[0], mask[len(mask) // 2], mask[-1])):
        return Score(False, False, False)
    ink = video[mask].mean(0)
    colour = min(COLOURS, key=lambda c: float(np.abs(ink - np.array(COLOURS[c])).sum()))

    def centre(m: np.ndarray) -> tuple[float, float]:
        y, x = np.nonzero(m)
        return float(x.mean()) + 0.5, float(y.mean()) + 0.5

    (x0, y0), (x1, y1) = centre(mask[0]), centre(mask[-1])
    dx, dy = x1 - x0, y1 - y0
    horizontal = abs(dx) > abs(dy)
    direction = ("right" if dx > 0 else "left") if horizontal else ("down" if dy > 0 else "up")
    moved = max(abs(dx), abs(dy)) > 4 * frames.shape[1] / 64

    middle = mask[len(mask) // 2]
    shape = best_shape(middle, centre(middle))
    return Score(colour == scene.colour, moved and direction == scene.direction, shape == scene.shape)


def best_shape(mask: np.ndarray, centre: tuple[float, float]) -> str:
    """The shape whose template, over sizes and small shifts, overlaps the mask best (intersection over union)."""
    best = {}
    size = mask.shape[0]
    offsets = np.array([(ox, oy) for ox in (-2, 0, 2) for oy in (-2, 0, 2)], np.float32) * size / 64
    for shape in SHAPES:
        scores = []
        for radius in np.arange(8.0, 18.0, 1.0) * size / 64:
            cx, cy = centre[0] + offsets[:, 0], centre[1] + offsets[:, 1]
            template = coverage(shape, cx, cy, np.full(len(offsets), radius, np.float32), size) > 0.5
            both = (template & mask).sum((1, 2))
            scores.append((both / np.maximum((template | mask).sum((1, 2)), 1)).max())
        best[shape] = max(scores)
    return max(best, key=lambda s: best[s])
