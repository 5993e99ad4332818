from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.errors import FileError, InternalError
from lowvram.offload.device import CpuDevice
from lowvram.offload.io import FileReader
from lowvram.offload.slab import ALIGNMENT, as_bytes, build_layout, carve, read_runs
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.refs import Part, TensorRef


def ref(name: str, *parts: Part) -> TensorRef:
    return TensorRef(name, (1,), Plain("F32"), parts)


def part(offset: int, nbytes: int, role: str = "weight", file: str = "a", dtype: str = "U8") -> Part:
    return Part(role, Path(file), offset, nbytes, dtype, (nbytes,))


def test_parts_lie_in_file_order_at_multiples_of_256() -> None:
    layout = build_layout(
        [ref("second", part(700, 300)), ref("first", part(100, 10), part(200, 256, "scale"))]
    )
    assert [(e.name, e.role, e.offset) for e in layout.entries] == [
        ("first", "weight", 0),
        ("first", "scale", 256),
        ("second", "weight", 512),
    ]
    assert (layout.nbytes, layout.stored_bytes) == (1024, 566)


def test_a_contiguous_block_of_aligned_parts_is_one_read() -> None:
    refs = [ref(f"t{n}", part(77 + 512 * n, 512)) for n in range(20)]
    (run,) = read_runs(build_layout(reversed(refs)))
    assert (run.file_offset, run.slab_offset, run.nbytes) == (77, 0, 20 * 512)


def test_a_gap_of_the_same_size_in_file_and_slab_is_read_through() -> None:
    layout = build_layout([ref("a", part(1000, 100)), ref("b", part(1256, 100)), ref("c", part(1500, 100))])
    assert [(r.file_offset, r.slab_offset, r.nbytes) for r in read_runs(layout)] == [
        (1000, 0, 356),
        (1500, 512, 100),
    ]


def test_reads_never_cross_files() -> None:
    layout = build_layout([ref("a", part(0, 256, file="x")), ref("b", part(256, 256, file="y"))])
    assert [(r.file, r.nbytes) for r in read_runs(layout)] == [(Path("x"), 256), (Path("y"), 256)]


def test_parts_without_bytes_cost_no_read() -> None:
    layout = build_layout([ref("a", part(0, 0)), ref("b", part(0, 4))])
    assert len(read_runs(layout)) == 1
    assert carve(layout, torch.zeros(layout.nbytes, dtype=torch.uint8))["a"]["weight"].shape == (0,)
    assert build_layout([]).nbytes == 0


def test_parts_that_cannot_be_viewed_are_refused() -> None:
    with pytest.raises(FileError, match="stored as F4"):
        build_layout([ref("a", Part("weight", Path("f"), 0, 4, "F4", (8,)))])
    with pytest.raises(InternalError, match="disagree"):
        build_layout([ref("a", Part("weight", Path("f"), 0, 4, "F32", (2,)))])
    with pytest.raises(InternalError, match="twice"):
        build_layout([ref("a", part(0, 4)), ref("a", part(4, 4))])


def test_views_share_the_memory_of_the_slab() -> None:
    layout = build_layout(
        [
            ref("w", Part("weight", Path("f"), 0, 12, "BF16", (2, 3))),
            ref("s", Part("scale", Path("f"), 12, 4, "F32", ())),
        ]
    )
    slab = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = carve(layout, slab)
    assert (views["w"]["weight"].dtype, views["w"]["weight"].shape) == (torch.bfloat16, (2, 3))
    assert views["s"]["scale"].shape == ()
    views["s"]["scale"].fill_(1.0)
    assert slab[256:260].view(torch.float32).item() == 1.0
    assert views["w"]["weight"].untyped_storage().data_ptr() == slab.untyped_storage().data_ptr()


@settings(max_examples=40)
@given(
    st.integers(0, 2**32), st.lists(st.integers(0, 300), min_size=0, max_size=6), st.sampled_from([0, 8, 300])
)
def test_runs_and_views_give_the_bytes_of_the_file(
    checkpoint: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    counts: list[int],
    padding: int,
) -> None:
    made = checkpoint(
        tmp_path_factory.mktemp("slab"), {"high": 2}, seed=seed, counts=tuple(counts), padding=padding
    )
    for block, layout in made.layouts.items():
        assert all(entry.offset % ALIGNMENT == 0 for entry in layout.entries)
        runs = read_runs(layout)
        assert all(a.slab_offset + a.nbytes <= b.slab_offset for a, b in pairwise(runs))
        slab = CpuDevice().host_alloc("slab", layout.nbytes).tensor.fill_(0xA5)
        for run in runs:
            with FileReader(run.file) as reader:
                end = run.slab_offset + run.nbytes
                reader.read_into(run.file_offset, as_bytes(slab)[run.slab_offset : end])
        made.check(block, carve(layout, slab))
