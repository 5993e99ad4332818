"""The corpus of hostile files, walked through the command line: the right exit code, three lines, in little work and memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import FORMATS, places
from safetensors.torch import save_file
from work import fair_share, lines_run

from lowvram.cli.inspect import describe
from lowvram.errors import FileError

BYTES = 24 << 20
BAD_FILE = 3


@pytest.fixture
def refused(cli: Callable[..., Any]) -> Callable[..., str]:
    """(what, arguments): what the command says of a file that it refuses as bad."""

    def check(what: str, *arguments: object) -> str:
        said = cli(*arguments)
        lines = said.err.splitlines()
        assert (said.code, said.out) == (BAD_FILE, ""), (what, said)
        assert 1 <= len(lines) <= 3 and lines[0].startswith("error: "), (what, lines)
        assert all(line.isprintable() and len(line) < 1200 for line in lines), what
        return str(said.err)

    return check


@pytest.mark.parametrize("name", FORMATS)
def test_a_hostile_file_is_refused_in_three_lines(
    name: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    suffix, make = FORMATS[name]
    path = tmp_path / f"m{suffix}"
    count = 0
    for what, data in make():
        path.write_bytes(data)
        refused(what, "inspect", path)
        count += 1
    assert count >= 9


def test_a_path_that_leads_elsewhere_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    for what, path in places(tmp_path):
        refused(what, "inspect", path)


@pytest.mark.parametrize("name", FORMATS)
def test_no_number_in_a_file_is_believed_before_it_is_checked(name: str, tmp_path: Path) -> None:
    """Python's own memory and work; headers of tensors are no tensors."""
    suffix, make = FORMATS[name]
    path = tmp_path / f"m{suffix}"

    def refuse() -> None:
        with pytest.raises(FileError):
            describe(path)

    tracemalloc.start()
    try:
        for what, data in make():
            path.write_bytes(data)
            del data
            tracemalloc.reset_peak()
            refuse()
            assert tracemalloc.get_traced_memory()[1] < BYTES, what
    finally:
        tracemalloc.stop()
    for what, data in make():
        path.write_bytes(data)
        ran = lines_run(refuse)[1]
        assert ran < fair_share(data), f"{what}: {ran:,} lines of Python"


def hostile_loras() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    module = "diffusion_model.blocks.0.ffn.0"
    down, up = torch.zeros(4, 256), torch.zeros(768, 4)
    whole = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    yield "ranks differ", whole | {f"{module}.lora_up.weight": torch.zeros(768, 8)}
    yield "one factor", {f"{module}.lora_down.weight": down}
    yield "another width", whole | {f"{module}.lora_down.weight": torch.zeros(4, 5120)}
    yield "another height", whole | {f"{module}.lora_up.weight": torch.zeros(13824, 4)}
    yield "rank 0", {n: t[:0] if "down" in n else t[:, :0] for n, t in whole.items()}
    yield "one dimension", whole | {f"{module}.lora_down.weight": down.flatten()}
    yield "whole numbers", whole | {f"{module}.lora_down.weight": down.to(torch.int8)}
    yield "many alphas", whole | {f"{module}.alpha": torch.zeros(5)}
    yield "alpha that is none", whole | {f"{module}.alpha": torch.tensor(float("nan"))}
    again = {"lora_A": down.clone(), "lora_B": up.clone()}
    yield "twice", whole | {f"blocks.0.ffn.0.{k}.weight": t for k, t in again.items()}
    yield "LoKr", {f"{module}.lokr_w1": down}
    yield "LoHa", {f"{module}.hada_w1_a": down}
    yield "a difference of another size", {f"{module}.diff": torch.zeros(3, 3)}
    yield "of nothing here", {n.replace("blocks.0", "blocks.99"): t for n, t in whole.items()}


def test_a_hostile_lora_is_refused_before_anything_is_made(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "lora.safetensors"
    for what, tensors in hostile_loras():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        # the model itself is opened first
        said = refused(what, "generate", "a", "-o", tmp_path / "out.mp4", "--lora", path)
        assert "lora.safetensors" in said
    assert list(tmp_path.iterdir()) == [path]
