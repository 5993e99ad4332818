"""What a band of an autoencoder's plane hands on to the next, known without running it: see `vae_bands.Band`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lowvram.models.vae import Layer
from lowvram.models.vae_layers import Conv, Crop, Double, Down, Head, Residual, Stage, Up
from lowvram.models.vae_tiles import Flow, Tile, extent
from lowvram.quant.spec import Shape


class Left(NamedTuple):
    """What one layer leaves for the next band while a latent passes."""

    name: str
    times: int
    """Calls, each of which leaves as much."""
    shape: tuple[int, int, int, int]
    """Channels, frames, rows, columns."""


def handed_on(band: Tile, shapes: Mapping[str, Shape], frames: int) -> list[Left]:
    """All that `band` leaves; nothing if it is the last. frames: that enter it for a latent. shapes: of the weights."""
    assert band.flow is not None
    if band.flow.stop == band.flow.end:
        return []
    across = band.window[4 - band.flow.axis].size
    return list(_Walk(shapes, band.flow, across, frames).through(band.layers))


@dataclass(slots=True)
class _Walk:
    """Where a latent is on its way through a band."""

    shapes: Mapping[str, Shape]
    flow: Flow
    across: int
    """Cells of the other axis."""
    frames: int
    """Of the latent."""
    together: int = 1
    """Frames in a call."""

    def through(self, layers: Sequence[Layer]) -> Iterator[Left]:
        for layer in layers:
            flow = self.flow.through(layer)
            match layer:
                case Conv(name=name, radius=radius) if radius:
                    yield self._given(name)
                case Head(name=name):
                    yield self._given(f"{name}.2")
                case Residual(name=name):
                    yield self._given(f"{name}.residual.2")
                    yield self._given(f"{name}.residual.6")
                    made = self.shapes[f"{name}.residual.6.weight"][0]
                    yield self._behind(name, made, self.flow.stop - flow.stop)
                case Up(name=name, time=time):
                    self.frames *= 1 + time
                    yield self._given(f"{name}.resample.1")
                case Down(name=name, time=time):
                    yield self._given(f"{name}.resample.1", self.flow.stop - 2 * flow.stop)
                    self.frames //= 1 + time
                case Double():
                    self.frames *= 2
                case Stage(name=name, layers=inner, time=time, space=space, up=up):
                    first = self.shapes[f"{inner[0].name}.residual.2.weight"][1]
                    seen = flow.stop // space if up else flow.stop * space
                    self.together = 1 if up else time
                    yield self._behind(name, first, self.flow.stop - seen)
                    inside = _Walk(self.shapes, self.flow, self.across, self.frames, self.together)
                    yield from inside.through(inner)
                    self.frames, self.together = inside.frames, 1
                case Crop():
                    kept = layer.rows if self.flow.axis == 4 else layer.columns
                    self.across = len(range(self.across)[kept])
            self.flow, self.across = flow, extent(layer, self.across)

    def _given(self, conv: str, cells: int = 2) -> Left:
        """The last of what a convolution took, frame by frame: what it makes next depends on them."""
        return Left(conv, self.frames, self._shape(self.shapes[f"{conv}.weight"][1], 1, cells))

    def _behind(self, name: str, channels: int, cells: int) -> Left:
        """What was taken past its layer and came out ahead of it."""
        return Left(name, self.frames // self.together, self._shape(channels, self.together, cells))

    def _shape(self, channels: int, frames: int, cells: int) -> tuple[int, int, int, int]:
        plane = (cells, self.across) if self.flow.axis == 3 else (self.across, cells)
        return channels, frames, *plane
