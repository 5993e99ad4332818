"""A plan is one true object: it adds up, it fits, and more memory never makes it worse."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from lowvram import Plan, Runtime
from lowvram.elsewhere import plan_without_files
from lowvram.errors import BudgetError
from lowvram.offload.io import FileReader

GB = 10**9
COMMAND = (
    "plan --model wan2.2-t2v-a14b --weights fp8 --size 1280x720 --frames 121 --vram 16GB --machine rtx4090"
)


class Memory(msgspec.Struct, forbid_unknown_fields=True):
    vram: int
    ram: int


class Stage(msgspec.Struct, forbid_unknown_fields=True):
    name: Literal["text", "clip", "encode", "prepare", "denoise", "decode"]
    vram: int
    ram: int
    disk_read: int
    h2d: int
    seconds: float
    claims: dict[str, int]
    ram_claims: dict[str, int]


class Blocks(msgspec.Struct, forbid_unknown_fields=True):
    resident: int
    ram: int
    disk: int


class PlanDocument(msgspec.Struct, forbid_unknown_fields=True):
    """The schema "lowvram.plan/1": a program that reads plans may rely on exactly this."""

    schema: Literal["lowvram.plan/1"]
    fits: bool
    machine: str
    budget: Memory
    peak: Memory
    stages: list[Stage]
    saved: dict[str, int]
    blocks: Blocks
    choices: dict[str, str]
    advice: list[str]


def test_files_that_are_here_are_planned_as_they_are_stored(
    cli: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    """On another machine too, and where the other parts of the model are not here."""

    def denoise(*flags: object) -> Any:
        (plan,) = cli(
            "plan", "--machine", "rtx4090", "--json", "--frames", 5, "--size", "64x64", *flags
        ).objects
        assert ("as if" in plan["choices"]["job"]) is ("bf16" in flags or "int8" in flags)
        return next(stage for stage in plan["stages"] if stage["name"] == "denoise")

    folder = Path(str(files("lowvram") / "assets" / "nano"))
    small = tmp_path / "small.safetensors"
    assert cli("quantize", folder / "high_noise_model.safetensors", small, "--to", "int8").code == 0
    whole = denoise("--model", "nano", "--weights", "bf16")
    assert denoise("--model", "nano")["disk_read"] != whole["disk_read"]  # as it ships
    as_file = denoise("--model", "nano", "--weights", small)
    assert as_file["disk_read"] < whole["disk_read"]
    assert as_file["disk_read"] == denoise("--model", "nano", "--weights", "int8")["disk_read"]
    assert denoise("--model", tiny_model)["disk_read"] > 0


def test_loras_are_planned_beside_weights_that_are_not_here(cli: Callable[..., Any], tmp_path: Path) -> None:
    asked = ("plan", "--model", "nano", "--machine", "rtx4090", "--json")
    folder = Path(str(files("lowvram") / "assets" / "nano" / "loras"))
    loras = [f"{folder}/lightning-4-{expert}.safetensors:{expert}" for expert in ("high", "low")]
    (plain,), (beside,) = cli(*asked).objects, cli(*asked, "--lora", loras[0], "--lora", loras[1]).objects
    reads = [
        sum(stage["h2d"] for stage in plan["stages"] if stage["name"] == "denoise")
        for plan in (plain, beside)
    ]
    assert reads[0] < reads[1]
    assert cli(*asked, "--lora", tmp_path / "none.safetensors").code == 3


def check_sums(plan: PlanDocument, n_blocks: int) -> None:
    for stage in plan.stages:
        assert stage.vram == sum(stage.claims.values())
        assert stage.ram == sum(stage.ram_claims.values())
        assert min(stage.claims.values()) >= 0 and stage.seconds >= 0
    assert plan.peak.vram == max(stage.vram for stage in plan.stages) <= plan.budget.vram
    assert plan.peak.ram == max(stage.ram for stage in plan.stages) <= plan.budget.ram
    assert plan.blocks.resident + plan.blocks.ram + plan.blocks.disk == n_blocks
    assert plan.choices and all(plan.choices.values())


def test_a_plan_of_720p_with_121_frames_in_16_gb_needs_no_weights(cli: Callable[..., Any]) -> None:
    said = cli(*shlex.split(COMMAND), "--json")
    assert (said.code, said.err) == (0, "")
    plan = msgspec.json.decode(said.out, type=PlanDocument, strict=True)
    check_sums(plan, n_blocks=80)
    assert plan.fits and plan.machine == "rtx4090"
    assert plan.budget.vram == 16 * GB
    assert [stage.name for stage in plan.stages] == ["text", "prepare", "denoise", "decode"]
    denoise = plan.stages[2]
    assert denoise.disk_read >= 25 * GB, "both experts are read at least once"
    assert denoise.h2d >= denoise.disk_read and denoise.seconds > 60


def test_a_plan_for_people_names_budget_stages_and_choices(cli: Callable[..., Any]) -> None:
    said = cli(*shlex.split("plan --model wan2.1-t2v-1.3b --weights fp8 --machine rtx3060 --frames 17"))
    assert (said.code, said.err) == (0, "")
    for word in ("RTX 3060", "text", "denoise", "decode", "whole job", "resident", "forecast"):
        assert word in said.out


@pytest.mark.parametrize(
    ("name", "weights", "n_blocks"), [("wan2.1-t2v-1.3b", "bf16", 30), ("wan2.2-ti2v-5b", "fp8_scaled", 30)]
)
def test_one_expert_models_can_be_planned(name: str, weights: str, n_blocks: int) -> None:
    plan = plan_without_files(
        name, weights=weights, machine="rtx3060", vram="11GB", ram=None, width=832, height=480, frames=17
    )
    check_sums(msgspec.convert(plan.to_json(), PlanDocument, strict=True), n_blocks)


def plan_of(tiny_model: Path, vram: int, ram: int) -> Plan:
    return Runtime(vram, ram, device="cpu").load(str(tiny_model)).plan("a red circle", steps=3)


def test_the_minimum_of_a_refusal_is_the_true_one(tiny_model: Path) -> None:
    with pytest.raises(BudgetError) as refused:
        plan_of(tiny_model, 1000, GB)
    vram = refused.value.minimum_vram
    assert vram is not None
    with pytest.raises(BudgetError) as refused:
        plan_of(tiny_model, vram, 1000)
    ram = refused.value.minimum_ram
    assert ram is not None
    plan = plan_of(tiny_model, vram, ram)
    assert plan.vram <= vram and plan.ram <= ram
    with pytest.raises(BudgetError):
        plan_of(tiny_model, vram - 1, ram)
    with pytest.raises(BudgetError):
        plan_of(tiny_model, vram, ram - 1)


def test_more_memory_never_makes_a_plan_worse(tiny_model: Path) -> None:
    full = plan_of(tiny_model, GB, 2 * GB)
    assert full.blocks() == {"resident": 12, "ram": 0, "disk": 0}
    plans = [plan_of(tiny_model, full.vram * n // 8, full.ram) for n in (4, 5, 6)] + [full]
    for moved in ("disk_read", "h2d"):
        nbytes = [sum(getattr(stage, moved) for stage in plan.stages) for plan in plans]
        assert nbytes == sorted(nbytes, reverse=True) and nbytes[0] > nbytes[-1]


def test_a_plan_reads_headers_and_no_weights(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, int] = {}
    original = FileReader.read_into

    def counted(self: FileReader, offset: int, target: memoryview) -> None:
        read[self.path.name] = read.get(self.path.name, 0) + target.nbytes
        original(self, offset, target)

    monkeypatch.setattr(FileReader, "read_into", counted)
    plan_of(tiny_model, GB, GB)
    weights = {name: n for name, n in read.items() if name.endswith(".safetensors")}
    assert len(weights) == 4
    assert all(n < 64_000 < (tiny_model / name).stat().st_size for name, n in weights.items())
