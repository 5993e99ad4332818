"""The file that torch.save wrote before torch 1.6, and writes still if it is told to: pickles, and numbers behind them.

A magic number, a version, facts about the machine, what was saved, and the keys of its storages, each a pickle of its own;
then for every key the count of its numbers (8 bytes) and the numbers. Source: torch `serialization.py`, `_legacy_save`.
"""

from __future__ import annotations

from lowvram.quant.files.pickled import MAX_PICKLE_BYTES, Pickles, Run, Saved
from lowvram.quant.files.safetensors import MAX_TENSORS
from lowvram.quant.files.strict_json import Malformed
from lowvram.quant.refs import DTYPE_BITS, Reader

MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e" + "80024de9032e")
"""The pickles of the number 0x1950a86a20f9469cfc6c and of the version, 1001."""


def read_legacy(reader: Reader) -> Saved:
    """What is described, and where the numbers of each storage lie. Malformed if the file is not whole, or goes on."""
    pickles = Pickles(reader.read_at(0, min(reader.size, MAX_PICKLE_BYTES)), len(MAGIC))
    facts, made, keys = pickles.read(), pickles.read(), pickles.read()
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise Malformed("numbers of a big-endian machine", "a little-endian file")
    if not isinstance(keys, list) or len(keys) > MAX_TENSORS:
        raise Malformed("a list of storages that is none, or too long")
    runs: dict[str, Run] = {}
    at = pickles.at
    for key in keys:
        storage = pickles.storages.get(key) if isinstance(key, str) else None
        if storage is None or key in runs:
            raise Malformed("a storage that no tensor has, or one that comes twice")
        if reader.size - at < 8:
            raise Malformed("truncated: numbers are missing at the end", "a whole download")
        count = int.from_bytes(reader.read_at(at, 8), "little")
        nbytes = count * DTYPE_BITS[storage.dtype] // 8
        at += 8
        if count != storage.count:
            raise Malformed(f"{count:,} numbers at byte {at:,}", f"{storage.count:,}")
        if nbytes > reader.size - at:
            raise Malformed("truncated: numbers are missing at the end", "a whole download")
        runs[key] = Run(at, nbytes)
        at += nbytes
    if at != reader.size:
        raise Malformed(f"{reader.size - at:,} bytes after the last number")
    return Saved(made, runs)
