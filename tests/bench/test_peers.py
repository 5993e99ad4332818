"""Other programs on the same toy transformer as ours: the same numbers, and what moving the weights costs in bytes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.bench.results import Peer, load
from lowvram.errors import OutOfMemoryError

PEERS = Path(__file__).parents[2] / "bench" / "peers"
pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bytes are counted with /proc")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Any:
    """The scripts import one another as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PEERS))
        yield {name: importlib.import_module(name) for name in ("forward", "programs", "run", "sizes")}


@pytest.fixture(scope="module")
def folder(scripts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy, written once."""
    path = tmp_path_factory.mktemp("toy")
    scripts["run"].write_model(path, scripts["sizes"].SIZES["toy"], "fp32")
    return path


@pytest.fixture
def work(scripts: Any, folder: Path) -> Any:
    return scripts["sizes"].Work(folder, scripts["sizes"].SIZES["toy"], torch.device("cpu"), 0)


def facts_of(mode: str, work: Any, scripts: Any, rounds: int = 1) -> dict[str, Any]:
    """As in its own process, but in this one: starting one takes seconds."""
    try:
        return scripts["forward"].measure(mode, work, rounds)
    except ImportError as missing:
        pytest.skip(f"not installed: {missing}")


@pytest.fixture(scope="module")
def resident(scripts: Any, folder: Path) -> dict[str, Any]:
    """lowvram and diffusers with everything in memory."""
    work = scripts["sizes"].Work(folder, scripts["sizes"].SIZES["toy"], torch.device("cpu"), 0)
    return {
        mode: scripts["forward"].measure(mode, work, 1) for mode in ("lowvram resident", "diffusers resident")
    }


def test_ours_and_theirs_do_the_same_work(resident: dict[str, Any], scripts: Any, folder: Path) -> None:
    difference = scripts["run"].difference(folder, "lowvram resident")
    assert 0 < difference < 1e-5  # other kernels, the same function


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_where_our_weights_live_changes_no_bit(
    where: str, work: Any, scripts: Any, resident: dict[str, Any]
) -> None:
    # The reader may be two forwards ahead when the counting begins, and only just ahead when it ends.
    found = facts_of(f"lowvram {where}", work, scripts, rounds=8)
    assert found["checksum"] == resident["lowvram resident"]["checksum"]
    blocks = sum(p.stat().st_size for p in (work.folder / "transformer").glob("*.safetensors"))
    if where == "disk":
        assert found["disk_read"] > 0.5 * blocks
    assert found["rss"] > 0 and found["seconds"] > 0


@pytest.mark.parametrize(
    "mode",
    [
        "diffusers group block",
        "diffusers group leaf",
        "diffusers group disk",
        "accelerate cpu_offload",
        "accelerate disk_offload",
        "aircanvas disk",
        "aircanvas disk, 2 resident",
        "diffsynth ram",
        "diffsynth disk",
        "diffusers-dynamic-offloader auto",
    ],
)
def test_theirs_changes_no_bit_either(mode: str, work: Any, scripts: Any, resident: dict[str, Any]) -> None:
    found = facts_of(mode, work, scripts)
    assert found["checksum"] == resident["diffusers resident"]["checksum"]
    if mode.startswith("aircanvas disk"):
        assert found["disk_read"] > 10**6


def test_fewer_bits_are_seen_as_other_bits(work: Any, scripts: Any, resident: dict[str, Any]) -> None:
    found = facts_of("diffusers layerwise fp8", work, scripts)
    assert found["checksum"] != resident["diffusers resident"]["checksum"]
    assert 0.001 < scripts["run"].difference(work.folder, "diffusers layerwise fp8") < 0.3


def test_a_program_that_needs_a_gpu_says_so_and_its_call_is_checked(work: Any, scripts: Any) -> None:
    programs = scripts["programs"]
    with pytest.raises(programs.NeedsGpu):
        programs.on_gpu(work, lambda model, budget: None, "model", budget=3)
    with pytest.raises(TypeError, match="budgets"):
        programs.on_gpu(work, lambda model, budget=1: None, "model", budgets=3)


def test_a_process_of_its_own_says_what_it_found_or_why_not(folder: Path, scripts: Any) -> None:
    options = Namespace(peers=None, size="toy", device="cpu", cap=0)
    found = scripts["run"].measure("accelerate disk_offload", str(folder), options)
    assert found["disk_read"] >= 0 and json.dumps(found)
    missing = scripts["run"].measure("mmgp budget", str(folder), options)
    assert missing == {"note": "not installed"}


def test_rows_take_ratios_inside_a_round(scripts: Any, tmp_path: Path) -> None:
    def facts(seconds: float, checksum: str = "a") -> dict[str, Any]:
        return {
            "seconds": seconds,
            "rss": 5,
            "vram": None,
            "driver": None,
            "disk_read": 7,
            "checksum": checksum,
        }

    rounds = [
        {"diffusers resident": facts(1), "aircanvas disk": facts(2), "mmgp budget": {"note": "needs a GPU"}},
        {"diffusers resident": facts(4), "aircanvas disk": facts(4)},
        {"diffusers resident": facts(2), "aircanvas disk": facts(3, "b")},
    ]
    whole, other, gone = scripts["run"].rows(rounds, tmp_path, None, "toy")
    assert whole.overhead == 1 and whole.exact
    assert other.overheads == [2, 1, 1.5] and other.overhead == 1.5 and other.seconds == 3 and not other.exact
    assert isinstance(gone, Peer) and gone.note == "needs a GPU" and gone.seconds is gone.exact is None


def test_the_process_of_a_gpl_program_loads_nothing_of_ours() -> None:
    code = "import forward, programs, sizes, gpl_mmgp, sys; print([m for m in sys.modules if m.startswith('lowvram')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PEERS, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_table_that_was_stopped_goes_on_where_it_was(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = scripts["run"], []
    monkeypatch.setattr(run, "write_model", lambda folder, size, weights: None)

    def measure(mode: str, folder: str, options: Namespace, limit: float) -> dict[str, Any]:
        asked.append(mode)
        if len(asked) == 3:
            raise KeyboardInterrupt
        if mode == "lowvram resident":
            return {"note": "stopped after 9 s"}
        return {"seconds": 1.0, "rss": 1, "vram": None, "driver": None, "disk_read": 0, "checksum": "a"}

    monkeypatch.setattr(run, "measure", measure)
    output = tmp_path / "peers.json"
    command = ["run.py", "--size", "toy", "--rounds", "1", "--folder", str(tmp_path), "-o", str(output)]
    monkeypatch.setattr("sys.argv", [*command, "--only", "lowvram", "--only", "aircanvas"])
    with pytest.raises(KeyboardInterrupt):
        run.main()
    # What had run out of time is tried again, what was measured is not.
    modes = [mode for mode in run.MODES if mode.split()[0] in ("lowvram", "aircanvas")]
    assert asked == modes[:3] == ["lowvram resident", "lowvram disk", "aircanvas disk"]
    run.main()
    assert asked[3:] == ["lowvram resident", *modes[2:]]
    assert [f"{peer.name} {peer.mode}" for peer in load(output).peers] != []
    asked.clear()
    monkeypatch.setattr("sys.argv", [*command, "--only", "diffusers", "--minutes", "0.1"])
    run.main()
    assert asked == []


def test_what_is_compared_with_has_the_whole_card(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert of 29 GB does not fit the cap that others are measured under; a card without that room says so."""
    run, caps = scripts["run"], []

    @contextmanager
    def ballast(cap: int) -> Iterator[int]:
        caps.append(cap)
        raise OutOfMemoryError(
            "the card has no 16.0 GB to leave free", where="ballast", advice="close others"
        )
        yield 0

    monkeypatch.setattr(run, "ballast", ballast)
    monkeypatch.setattr(
        run.subprocess, "run", lambda command, **_: Namespace(returncode=3, stdout="", stderr=command[-1])
    )
    options = Namespace(peers=None, size="720p", device="cuda", cap=16)
    assert run.measure("diffusers resident", "x", options) == {"note": "not installed"} and not caps
    assert run.measure("lowvram ram", "x", options)["note"].startswith("failed: the card has no")
    assert caps == [16 * 10**9]
