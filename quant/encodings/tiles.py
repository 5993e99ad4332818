"""The order in which tensor cores want the scales of small groups: tiles of 128 rows x 4 scales, each stored as
32 x (4 x 4), rows and columns padded to whole tiles (checkpoint-formats 3.3)."""

from __future__ import annotations

from torch import Tensor

from lowvram.quant.refs import Shape


def tiled_shape(rows: int, columns: int) -> Shape:
    """Shape in tile order of scales [rows, columns]."""
    return (-(-rows // 128) * 128, -(-columns // 4) * 4)


def from_tiles(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in tile order, any shape -> [rows, columns], as bytes."""
    bands, tiles = -(-rows // 128), -(-columns // 4)
    plain = stored.reshape(bands, tiles, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(bands * 128, tiles * 4)
    return plain[:rows, :columns].contiguous()


def to_tiles(scales: Tensor) -> Tensor:
    """[rows, columns] -> tile order [rows up to 128s, columns up to 4s]; the padding is 0."""
    bands, tiles = -(-scales.shape[0] // 128), -(-scales.shape[1] // 4)
    padded = scales.new_zeros(bands * 128, tiles * 4)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    return padded.view(bands, 4, 32, tiles, 4).permute(0, 3, 2, 1, 4).reshape(bands * 128, tiles * 4)
