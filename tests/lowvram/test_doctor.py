"""The doctor measures, says what is wrong, and what it measured is what the next plan uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowvram import survey
from lowvram.doctor import Findings, Reading, _software, published_matmul
from lowvram.errors import StorageError, UsageError
from lowvram.machine import (
    Rates,
    load_rates,
    machine_names,
    machine_profile,
    rates_path,
    save_rates,
    this_machine,
)

GB = 10**9


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_WRITTEN", 4 << 20)


def known_rates() -> Rates:
    place = survey.identify("cpu")
    return Rates(place.label, place.driver, place.torch_version, 7e9, 5e9, 3e9, 2.5e9, "/models", 0, 0)


def test_what_the_doctor_measures_is_what_plans_use(cli: Callable[..., Any], tmp_path: Path) -> None:
    said = cli("doctor", "--device", "cpu", "--folder", tmp_path, "--json")
    assert said.code == 0
    (found,) = said.objects
    values = {r["name"]: r["value"] for r in found["readings"]}
    assert found["schema"] == "lowvram.doctor/1" and values["multiply fp32"] > 1e6
    machine = this_machine("cpu")
    assert machine.attention == values["attention"] / 2 and machine.link == values["copy in RAM"]
    assert machine.disk == max(values["disk, direct reads"] or 0, values["disk, buffered reads"])
    assert machine.sources["disk"] == "measured by the doctor"
    assert list(tmp_path.iterdir()) == []  # what was written to be read is gone


@pytest.mark.parametrize(("library", "version"), [(True, "CUDA 13.1"), (False, "")])
def test_where_the_driver_tells_no_version_it_is_asked_for_its_cuda(
    library: bool, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and WSL; and a machine that has not even the library says nothing."""

    def opened(name: str) -> Any:
        if not library:
            raise OSError(f"{name}: cannot open shared object file")

        def get(number: Any) -> int:
            number._obj.value = 13010
            return 0

        return SimpleNamespace(cuDriverGetVersion=get)

    monkeypatch.setattr(survey, "read_kernel_text", lambda path: None)
    monkeypatch.setattr("ctypes.CDLL", opened)
    assert survey._driver() == version


def test_what_measuring_took_of_a_card_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [5 * GB]
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: free.append(6 * GB))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free[-1], 8 * GB))
    assert survey.memory(survey.Place("cuda", "a card", "", "", "sm_89")).vram == 6 * GB


def test_a_triton_that_cannot_start_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.doctor._version", lambda package: "3.6.0" if package == "triton" else "")
    monkeypatch.setattr("lowvram.triton_kernels.toolchain.lack", lambda: "no C compiler is here: install gcc")
    on_card, on_cpu = (
        {reading.name: reading for reading in _software(survey.Place(kind, "a card", "570", "2.11.0", arch))}
        for kind, arch in (("cuda", "sm_89"), ("cpu", ""))
    )
    assert on_card["triton"].verdict == "fair" and "install gcc" in on_card["triton"].advice
    assert on_cpu["triton"].verdict == "" and on_card["driver"].value == "570"


def test_rates_are_kept_until_device_driver_or_torch_changes() -> None:
    path = rates_path("cpu")
    save_rates(path, known_rates())
    assert (this_machine("cpu").matmul, this_machine("cpu").disk) == (7e9, 2.5e9)
    for change in ({"device": "another"}, {"driver": "1.2"}, {"torch": "2.10"}):
        save_rates(path, replace(known_rates(), **change))
        assert this_machine("cpu").disk != 2.5e9
        assert this_machine("cpu").sources["disk"].startswith("assumed")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "lowvram.machine/1"}', '{"schema": "other"}'])
def test_what_was_kept_and_cannot_be_understood_is_measured_again(text: str) -> None:
    path = rates_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert load_rates(path) is None and this_machine("cpu").matmul > 0


def test_readings_are_for_people() -> None:
    assert Reading("a", 3.25e12, "FLOP/s").shown() == "3.25 TFLOP/s"
    assert Reading("a", 26.5e9, "FLOP/s").shown() == "26.5 GFLOP/s"
    assert Reading("a", 12.5e9, "bytes/s").shown() == "12.5 GB/s"
    assert Reading("a", None, "bytes").shown() == "not available"


def test_bad_readings_come_with_what_to_do() -> None:
    from lowvram.cli.doctor import table

    slow = Reading("copy", 1e9, "bytes/s", "bad", "check the slot")
    lines = table(Findings(known_rates(), (slow, Reading("RAM", 8 * GB, "bytes")))).splitlines()
    assert lines[0].endswith("bad") and "-> check the slot" in lines[1] and lines[-1].startswith("1 bad")


def test_every_number_of_a_profile_has_a_source(cli: Callable[..., Any]) -> None:
    assert len(machine_names()) >= 11
    for name in machine_names():
        machine = machine_profile(name)
        for number in ("vram", "ram", "matmul", "attention", "link", "disk", "context", "workspaces"):
            assert machine.sources[number], f"{name} {number}"
        assert machine.label in cli("doctor", "--machine", name).out
    with pytest.raises(UsageError, match="rtx4090"):
        machine_profile("rtx4091")


def test_a_folder_that_is_not_there_is_refused(cli: Callable[..., Any], tmp_path: Path) -> None:
    assert cli("doctor", "--folder", tmp_path / "none").code == 2


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3060", 25.5),
        ("NVIDIA GeForce RTX 4070", 58.3),
        ("NVIDIA GeForce RTX 4070 Ti", 0),  # another chip
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
        ("NVIDIA GeForce RTX 5090 D", 0),
    ],
)
def test_a_card_is_measured_against_its_own_figures_or_none(name: str, tflops: float) -> None:
    card = survey.Place("cuda", name, "", "", "sm_89")
    assert published_matmul(card) == pytest.approx(0.85e12 * tflops)


def test_a_profile_is_an_object_for_programs(cli: Callable[..., Any]) -> None:
    (card,) = cli("doctor", "--machine", "rtx4090", "--json").objects
    assert (card["schema"], card["label"], card["arch"]) == ("lowvram.profile/1", "GeForce RTX 4090", "sm_89")
    assert card["matmul"] == machine_profile("rtx4090").matmul and "whitepaper" in card["sources"]["matmul"]


def test_a_folder_that_cannot_be_written_to_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="writing failed") as refused:
        survey.disk_rate(tmp_path / "gone", time.perf_counter, direct=False)
    assert str(tmp_path / "gone") in str(refused.value)
