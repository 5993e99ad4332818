"""What holds tensors moves as a whole, and leaves nothing behind."""

from __future__ import annotations

import gc
import weakref

import torch
from meta_device import META

from lowvram.models.dit import Context
from lowvram.stages.moving import moved


def test_everything_moves_and_what_is_shared_stays_shared() -> None:
    text, bias = torch.ones(2, 3), torch.zeros(2)
    context = Context(text, bias)
    there = moved({"a": (context, [context]), "b": text, "n": 3, "none": None}, META)
    (first, [second]) = there["a"]
    assert first is second and first.text is there["b"]
    assert first.text.device == first.bias.device == META and first.image is None
    assert (there["n"], there["none"]) == (3, None)


def test_nothing_waits_for_the_collector() -> None:
    gc.disable()
    try:
        there = moved((Context(torch.ones(2), torch.ones(2)),), META)
        storage = weakref.ref(there[0].text)
        del there
        assert storage() is None
    finally:
        gc.enable()
