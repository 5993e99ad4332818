"""The ways to decode a clip, and those to encode one: what `lowvram.tiling` asks of either half of an autoencoder."""

from __future__ import annotations

import torch

from lowvram import vae_footprint
from lowvram.model import Model, vae_group
from lowvram.models.vae import DECODER, ENCODER
from lowvram.models.vae_clip import FRAMES, Half, decoder, encoder
from lowvram.models.vae_tiles import Tile, Tiling
from lowvram.offload.budget import allocated_size
from lowvram.offload.estimate import Rounding
from lowvram.quant.spec import numel
from lowvram.tiling import Codings, Measured, anew
from lowvram.vae_footprint import Ends


class Decodings(Codings):
    """The ways to decode one clip; `frame` in bytes as it leaves."""

    @property
    def half(self) -> Half:
        return decoder(self.spec)

    def tile_scratch(self, tile: Tile, before: Tile | None) -> int:
        return vae_footprint.decode_scratch(self.spec, self.weights, tile, self.dtype, before)

    def under_way(self, tile: Tile) -> int:
        cells = numel(self.plane) * self._half.made**2
        return allocated_size(self.frame * tile.rows.size * tile.columns.size // cells)

    @property
    def ends(self) -> Ends:
        return vae_footprint.decoder_ends(self.spec)

    @property
    def result(self) -> int:
        return 0

    def frames_held(self, tiling: Tiling) -> int:
        return FRAMES * tiling.visit if tiling.rows * tiling.columns > 1 else 1


class Encodings(Codings):
    """The ways to encode one clip; `frame` in bytes as it comes."""

    @property
    def half(self) -> Half:
        return encoder(self.spec)

    def tile_scratch(self, tile: Tile, before: Tile | None) -> int:
        return vae_footprint.encode_scratch(self.spec, self.weights, tile, self.dtype, before)

    def under_way(self, tile: Tile) -> int:
        return 0

    @property
    def ends(self) -> Ends:
        return vae_footprint.encoder_ends(self.spec)

    @property
    def result(self) -> int:
        return 2 * self.spec.z

    def frames_held(self, tiling: Tiling) -> int:
        return FRAMES * tiling.visit


def encodings(
    model: Model,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    rounding: Rounding,
    measured: Measured = anew,
) -> Encodings:
    """The ways to encode a clip of `shape`: frames, rows and columns of pixels."""
    frames, height, width = shape
    latent = model.spec.latent_shape(width, height, frames)
    group = vae_group(model, ENCODER)
    return Encodings(model.spec.vae, group, latent, 12 * height * width, dtype, rounding, measured)


def decodings(
    model: Model, shape: tuple[int, int, int], dtype: torch.dtype, rounding: Rounding, itemsize: int = 1
) -> Decodings:
    """The ways to decode a clip of `shape`: frames, rows and columns of pixels. itemsize: bytes of a colour as it leaves."""
    frames, height, width = shape
    latent = model.spec.latent_shape(width, height, frames)
    group = vae_group(model, DECODER)
    return Decodings(model.spec.vae, group, latent, 3 * height * width * itemsize, dtype, rounding)
