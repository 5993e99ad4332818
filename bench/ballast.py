"""A second process that takes the rest of the card, so that a cap holds in fact: what goes past it fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowvram.errors import OutOfMemoryError
from lowvram.offload.budget import format_bytes

_STEP = 64 << 20
SLACK = 256 << 20
"""Bytes left beside the cap: the driver's granules, and what other programs take meanwhile."""


@contextmanager
def ballast(cap: int) -> Iterator[int]:
    """While the block lasts, this process can have about `cap` bytes of the card. Yields the bytes left.

    Must be entered before this process has used the card. OutOfMemoryError if less than `cap` is free to begin with.
    """
    command = [sys.executable, "-c", f"from lowvram.bench.ballast import hold; hold({cap + SLACK})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            said = child.stdout.readline().strip()
            if not said.isdigit():
                raise OutOfMemoryError(
                    f"the card has no {format_bytes(cap)} to leave free",
                    where="ballast",
                    expected="a card with that much memory and nothing else on it",
                    advice="give a smaller budget, or close other programs",
                )
            yield int(said)
        finally:
            child.stdin.close()


def hold(left: int) -> None:
    """The second process: take memory until only `left` bytes are free, tell how much is, wait for the end of input."""
    held = []
    free, _ = torch.cuda.mem_get_info()
    if free < left:
        return
    while free - left >= _STEP:
        held.append(torch.empty(min(free - left, 1 << 30) // _STEP * _STEP, dtype=torch.uint8, device="cuda"))
        free, _ = torch.cuda.mem_get_info()
    print(free, flush=True)
    sys.stdin.read()
