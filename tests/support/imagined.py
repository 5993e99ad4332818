"""What networks allocate, imagined: plans of it take no longer than the search for them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from lowvram.quant.spec import numel


class Imagined(dict[Hashable, Any]):
    """Footprints that need no measuring; what is no footprint is kept as ever."""

    def __contains__(self, what: object) -> bool:
        return super().__contains__(what) or (isinstance(what, tuple) and what[0] != "cells")

    def __getitem__(self, what: Any) -> Any:
        match what:
            case ("cells", *_):
                return super().__getitem__(what)
            case ("text", _, rows, dtype):
                return int(180_000 * rows * dtype.itemsize)
            case ("prepare", kind, lengths, *_):
                return int(2 * sum(numel(shape) for _, shape, _ in kind) + 20_000 * sum(lengths))
            case ("block", kind, n, _, words, _, group, *_):
                width = max(max(shape) for _, shape, _ in kind)
                return int((6 if group else 8) * n * width + 10_000 * words)
            case ("unpacked", kind, dtype, *_):
                return int(dtype.itemsize * sum(numel(shape) for _, shape, _ in kind))
            case ("face", _, tokens, slots, dtype, chunk, *_):
                return int(dtype.itemsize * (20_000 * slots + 9000 * min(tokens, chunk)))
            case ("faces", _, _, frames, dtype):
                return int(600_000_000 + 120_000 * frames * dtype.itemsize)
            case ("clip", spec, _, dtype):
                return int(9 * spec.tokens * spec.dim * dtype.itemsize)
            case ("embed", _, grid, *_):
                return int(40_000 * numel(grid[1:]))
            case ("head", _, grid, *_):
                return 900 * numel(grid)
            case ("preview", _, latent, dtype):
                return int(9000 * numel(latent[2:]) * dtype.itemsize)
            case ("tile", _, spec, _, _, window, _):
                return int(40 * spec.decoder_base * 64 * numel([span.size for span in window]))
            case ("borders", _, spec, *_):
                return 30_000 * spec.decoder_base
            case ("middle", _, spec, _, _, plane):
                return int(90 * spec.decoder_base * numel(plane))
            case ("strips", count, _, spec, _, _, plane):
                return tuple(n * spec.decoder_base * numel(plane) // count for n in (60, 40, 5))
        raise AssertionError(what)
