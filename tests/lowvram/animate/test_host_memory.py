"""What lies on the host while a segment is made: as much as is claimed, and nothing of the segments before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lowvram.api import Pipeline
from lowvram.conditions.animate import Animate
from lowvram.conditions.contract import Condition
from lowvram.planning.facts import gather
from lowvram.stages.segments import Forgetful, Stand


class Weighed(Forgetful):
    """The condition of every segment by tensor: bytes, and whether it is still there."""

    def __init__(self) -> None:
        self.sizes: list[dict[str, int]] = []
        self.alive: list[weakref.ref[Tensor]] = []

    def condition(self, segment: int, made: Condition) -> None:
        # what the segments share is that of the picture: its CLIP tokens
        assert [ref() for ref in self.alive] == [None] * len(self.alive)
        found = made.to_tensors()
        self.sizes.append({name: t.untyped_storage().nbytes() for name, t in found.items()})
        self.alive += [weakref.ref(t) for name, t in found.items() if name != "image"]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_conditions_lie_on_the_host_is_claimed_and_is_that_of_one_segment(
    pipe: Pipeline, drive: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, guidance: float
) -> None:
    short = settings | {"frames": 5, "steps": 1, "guidance": (guidance, guidance)}
    animation = pipe.animate(drive(12), **short)
    weighed = Weighed()
    animation.make(tmp_path / "out.mp4", tmp_path, Stand(), weighed)
    sizes = Animate().makes(gather(animation.job, pipe.model, animation.plan.machine))
    assert weighed.sizes == [sizes] * 3
    for stage in animation.plan.stages[1:]:
        assert stage.ram_claims["condition"] == sum(sizes.values()), stage.name
