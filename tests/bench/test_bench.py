"""`lowvram bench`: every case in a process of its own, into a file that is valid at every moment."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from zipfile import ZipFile

import msgspec
import pytest
import torch

from lowvram.bench import acceptance, attending, child, gpu, measure, parts, ready, suite, wheels
from lowvram.bench.cases import GB, Case, Trial, chosen, dry_jobs, dry_trials, full_trials
from lowvram.bench.child import Outcome
from lowvram.bench.project import project
from lowvram.bench.results import load, new_results, save
from lowvram.bench.work import forward_work
from lowvram.cli.main import _run
from lowvram.errors import FileError, UsageError
from lowvram.sampling.presets import model_preset
from lowvram.survey import identify
from lowvram.triton_kernels.attention import attention


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOWVRAM_STATE", str(tmp_path / "jobs"))
    monkeypatch.setattr("lowvram.survey._WRITTEN", 4 << 20)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Children run in this process: a new interpreter each would take most of the time."""

    def run_module(module: str, arguments: list[str], limit: float | None, **_: Any) -> Outcome:
        main: Callable[[], None] = {"lowvram.bench.measure": measure.main, "lowvram.bench.parts": parts.main}[
            module
        ]
        monkeypatch.setattr("sys.argv", [module, *arguments])
        before = capsys.readouterr().out
        main()
        said = capsys.readouterr().out.strip().splitlines()[-1]
        print(before, end="")  # what a part had said before it started this
        return Outcome(said, "", 0.1)

    for module in (suite, acceptance, parts):
        monkeypatch.setattr(module, "run_module", run_module)


def test_the_dry_benchmark_leaves_a_valid_file_and_goes_on_where_it_was(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [t for t in dry_trials() if t.case.what == "decode"] + [dry_jobs("pair")[2]]
    monkeypatch.setattr(suite, "dry_trials", lambda: tuple(kept[:1]))
    path = tmp_path / "r.json"
    command = ["bench", "--dry", "--device", "cpu", "--quiet", "-o", str(path)]
    assert _run(command, False, False) == 0
    assert len(load(path).measurements) == 1
    monkeypatch.setattr(suite, "dry_trials", lambda: tuple(kept))
    assert _run(command, False, False) == 0
    results = load(path)
    assert [m.case.split()[0] for m in results.measurements] == ["decode", "pair"]
    tight = results.measurements[1]
    assert tight.blocks["disk"] > 0 and tight.placement == "disk cold"
    for m in results.measurements:
        assert (m.vram_allocated or 10**12) <= m.vram_predicted  # what the host has is not counted
        assert all((s.vram_measured or 0) <= s.vram_predicted for s in m.stages)
        assert m.seconds > 0 and m.rss > 10**7 and m.stages and m.vram_allocated
    assert len(tight.steps) == 2 and tight.handover is not None and tight.fraction is not None
    assert results.ceilings is not None


def test_a_results_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    save(path, new_results(identify("cpu"), "2026-01-02"))
    assert load(path).date == "2026-01-02"
    spoilt = json.loads(path.read_text()) | {"surprise": 1}
    for text in ("{}", "", json.dumps(spoilt)):
        path.write_text(text)
        with pytest.raises(FileError, match="not a results file"):
            load(path)


def test_a_file_holds_the_figures_of_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    begun = new_results(identify("cpu"), "2026-01-02")
    begun.environment = msgspec.structs.replace(begun.environment, device="another")
    save(path, begun)
    before = path.read_bytes()
    assert _run(["bench", "--dry", "--device", "cpu", "-o", str(path)], False, False) == 2
    assert "another" in capsys.readouterr().err and path.read_bytes() == before


def test_without_a_folder_only_a_dry_benchmark_is_possible(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["bench"], False, False) == 2
    assert "--dry" in capsys.readouterr().err


def test_children_are_stopped_and_their_last_words_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleeps.py").write_text("import time; print('x', flush=True); time.sleep(60)")
    (tmp_path / "fails.py").write_text("print('no result'); raise ValueError('the reason')")
    (tmp_path / "works.py").write_text("print('noise'); print('{}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stopped = child.run_module("sleeps", [], 1.0)
    assert stopped.timed_out and stopped.result == "" and "stopped after 1 s" in stopped.why
    assert "the reason" in child.run_module("fails", [], 30).why
    assert child.run_module("works", [], 30).result == "{}"


def test_a_trial_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(suite, "run_module", lambda *a: asked.append(a[0]) or Outcome("", "broken", 1.0))
    results = new_results(identify("cpu"), "2026-01-02")
    tried = list(
        suite.run_trials(results, tmp_path / "r", dry_trials()[:2], lambda t: {}, device="cpu", repeats=1)
    )
    assert [t.why for t in tried] == ["broken", "broken"] and len(asked) == 2 and not results.measurements


def test_trials_at_true_sizes_stay_inside_the_card() -> None:
    trials = full_trials(16 * 1024**3, 60 * GB)
    assert {t.case.model for t in trials} == {"wan2.2-t2v-a14b", "wan2.2-ti2v-5b"}
    assert {t.vram for t in trials} == {b * GB for b in (16, 12, 8, 6)}
    assert {t.case.what for t in trials} >= {"text", "forward", "step", "decode", "job", "handover"}
    assert not any(t.placement == "resident" for t in trials)
    assert any(t.placement == "resident" for t in full_trials(80 * GB, 60 * GB))


def test_every_placement_is_tried_and_some_can_be_chosen() -> None:
    trials = full_trials(80 * GB, 60 * GB)
    assert {t.placement for t in trials} == {"resident", "ram", "disk cold", "disk warm"}
    for what in ("text", "forward", "step", "handover", "decode", "job"):
        assert {t.placement for t in trials if t.case.what == what} == {t.placement for t in trials}
    assert len({t.label for t in trials}) == len(trials)
    some = chosen(trials, ["job ", "832x480x81", "disk cold"])
    assert [t.vram // GB for t in some] == [24, 16, 12, 8, 6]
    with pytest.raises(UsageError, match="trials has jop"):
        chosen(trials, ["jop"])


def test_work_is_what_the_papers_count() -> None:
    """12.9 PFLOP a forward at 1280x720x121, 79 % of it self attention."""
    work = forward_work(model_preset("wan2.2-t2v-a14b"), 1280, 720, 121)
    assert work.flops == pytest.approx(12.92e15, rel=0.01)
    assert work.attention / work.flops == pytest.approx(0.79, abs=0.01)


def test_a_projection_is_never_more_than_the_card_has() -> None:
    case = Case("job", "nano", "fp8", 64, 64, 9)
    found = list(project([case], ("rtx3060",), (GB, 100 * GB)))
    assert [p.vram_budget for p in found] == [GB] and found[0].vram <= GB


def test_a_handover_is_what_the_first_step_takes_more() -> None:
    assert measure.handover([2.0, 2.0, 2.5, 2.0], (0, 0, 1, 1)) == 0.5
    assert measure.handover([2.0, 2.25], (0, 1)) == 0.25
    assert measure.handover([2.0, 2.0], (0, 0)) is None


def test_the_acceptance_run_goes_through_its_parts_and_goes_on(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--dry", "--output", str(tmp_path), "--folder", str(tmp_path)]
    # "attention" is in tests/kernels/interpreted_attention.py: a process that interprets kernels can compile none.
    quick = (
        "smoke",
        "kernels",
        "ceilings",
        "decoding",
        "producers",
        "speed",
        "multiplication",
        "vae",
        "vae beside diffusers",
    )
    assert gpu.main([*command, *(word for name in quick for word in ("--only", name))]) == 0
    (path,) = tmp_path.glob("dry-*.json")
    results = load(path)
    assert [p.name for p in results.parts] == list(quick)
    assert all(p.outcome == "passed" or p.why == "triton is not installed" for p in results.parts)
    assert results.ceilings is not None and results.measurements[0].vram_allocated
    assert not list(tmp_path.glob("lowvram-bench*"))
    capsys.readouterr()
    assert gpu.main([*command, "--minutes", "0.3"]) == 0  # no time: what is done stays, the rest waits
    assert load(path).parts == results.parts and "no time left" in capsys.readouterr().out


def test_attention_that_is_wrong_refuses_or_is_not_finite_is_told_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses() -> torch.Tensor:
        raise RuntimeError("not for this card\nand more")

    def runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[attending.Run]:
        y = attention(q, k, v)
        half = torch.zeros(2, 3, 2, dtype=torch.int32)  # two of three tiles of keys, by number
        half[..., 1] = 2
        return [
            attending.Run("right", lambda: y, 0.01),
            attending.Run("all instead of two tiles", lambda: y, 0.01, half),
            attending.Run("not a number", lambda: y * torch.nan, 0.01),
            attending.Run("refused", refuses, 0.01),
        ]

    monkeypatch.setattr(attending, "_runs", runs)
    facts, wrong = attending.compare("cpu", 192, 2)
    assert [w.partition(",")[0] for w in wrong] == ["all instead of two tiles", "not a number"]
    assert facts["refused, 192 tokens"] == "not for this card"
    assert facts["right, 192 tokens: error"] < 0.01  # type: ignore[operator]


def test_a_part_that_fails_says_why_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([Outcome("", "it crashed", 2.0), Outcome("", "stopped after 9 s", 9.0, timed_out=True)])
    monkeypatch.setattr(acceptance, "run_module", lambda *a: next(answers))
    folder = ["--output", str(tmp_path), "--folder", str(tmp_path)]
    assert gpu.main(["--dry", *folder, "--only", "smoke", "--only", "vae"]) == 1
    (path,) = tmp_path.glob("dry-*.json")
    assert [(p.name, p.outcome, p.why) for p in load(path).parts] == [
        ("smoke", "failed", "it crashed"),
        ("vae", "timed out", "stopped after 9 s"),
    ]


@pytest.mark.parametrize("end", ["os.abort()", "raise MemoryError('no more')"])
def test_what_a_child_said_before_it_came_to_grief_is_kept(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grief.py").write_text(
        f"import os; print('one', flush=True); print('two\\nthr', end='', flush=True); {end}"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = child.run_module("grief", [], None)
    assert (outcome.result, outcome.so_far, outcome.timed_out) == ("", "two", False)
    assert ("SIGABRT" if "abort" in end else "no more") in outcome.why


def test_what_a_child_said_before_it_was_stopped_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs:
        def __init__(self, *_: object, **__: object) -> None:
            self.killed = False

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            assert self.killed

        def communicate(self, timeout: float | None = None) -> tuple[str, str]:
            if timeout is not None:
                raise subprocess.TimeoutExpired("hangs", timeout)
            return "one\ntwo\nthr", ""

    monkeypatch.setattr("lowvram.bench.child.subprocess.Popen", Hangs)
    monkeypatch.setattr(child, "_kill", lambda hangs, apart: setattr(hangs, "killed", True))
    outcome = child.run_module("hangs", [], 9.0)
    assert (outcome.result, outcome.so_far, outcome.timed_out) == ("", "two", True)
    assert outcome.why == "stopped after 9 s"


def test_a_trial_that_crashes_leaves_the_other_one_of_its_part(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tax is of two jobs: one that breaks down does not take the other's figures with it."""
    run_module, asked = getattr(parts, "run_module"), []  # noqa: B009  its own name for it, replaced by `here`

    def second_crashes(module: str, arguments: list[str], *rest: Any, **more: Any) -> Outcome:
        asked.append(module)
        return (
            Outcome("", "killed by SIGSEGV", 1.0) if len(asked) == 2 else run_module(module, arguments, *rest)
        )

    monkeypatch.setattr(parts, "run_module", second_crashes)
    assert gpu.main(["--dry", "--output", str(tmp_path), "--folder", str(tmp_path), "--only", "tax"]) == 1
    (path,) = tmp_path.glob("dry-*.json")
    results = load(path)
    (part,) = results.parts
    assert part.outcome == "failed" and "resident" in part.why and "SIGSEGV" in part.why
    assert [m.placement for m in results.measurements] == ["ram"] and results.measurements[0].steps
    assert any(name.endswith(": seconds") for name in part.facts)


@pytest.mark.parametrize("how", ["timed out", "failed"])
def test_a_part_that_hangs_or_crashes_keeps_what_it_had_found(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    so_far = msgspec.json.encode(parts.Verdict("passed", {"fp8 equals the CPU": True})).decode()
    lost = Outcome("", "the end", 9.0, timed_out=how == "timed out", so_far=so_far)
    monkeypatch.setattr(acceptance, "run_module", lambda *a: lost)
    gpu.main(["--dry", "--output", str(tmp_path), "--folder", str(tmp_path), "--only", "kernels"])
    (path,) = tmp_path.glob("dry-*.json")
    (part,) = load(path).parts
    assert (part.outcome, part.facts, part.why) == (how, {"fp8 equals the CPU": True}, "the end")


def test_what_is_missing_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = list(ready.lacks(tmp_path, dry=True, has=lambda name: name not in ("av", "msgspec"), ram=0))
    assert [lack.what.split(":")[0] for lack in found] == ["the package av", "the package msgspec"]
    assert all(lack.fatal for lack in found)
    assert not list(ready.lacks(tmp_path, dry=True))
    if torch.cuda.is_available():
        return
    words = [
        str(lack) for lack in ready.lacks(tmp_path, dry=False, has=lambda name: name != "triton", ram=10**9)
    ]
    assert any(word.startswith("missing: a ") and "CUDA" in word for word in words)
    assert any("triton" in word for word in words) and any("1 GB are free" in word for word in words)
    assert gpu.main(["--check", "--folder", str(tmp_path)]) == 2
    assert "missing: a " in capsys.readouterr().err
    assert gpu.main(["--check", "--dry", "--folder", str(tmp_path)]) == 0


def test_a_kernel_that_fails_where_it_could_run_fails_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.triton_kernels.dispatch.installed", lambda: frozenset({"triton"}))
    monkeypatch.setattr(
        "lowvram.triton_kernels.dispatch.try_mode", lambda mode, device, arch: "0.5 from exact attention"
    )
    monkeypatch.setattr("lowvram.triton_kernels.dispatch.try_w8a8", lambda form, device: "")
    monkeypatch.setattr("lowvram.triton_kernels.dispatch.try_ops", lambda device: "")
    found = {name: (cannot, wrong) for name, cannot, wrong in parts._self_tests("sm_86")}
    assert found["attention int8"] == ("", "0.5 from exact attention")
    assert found["attention int8-fp8"] == ("there is no int8-fp8 kernel for sm_86", "")
    assert found["fp8 multiplication"] == ("there is none for sm_86", "")
    assert found["int8 multiplication"] == found["fused operations"] == ("", "")
    failed = parts._all_true({"bytes arrive": True}, also=["attention int8: 0.5 from exact attention"])
    assert failed.outcome == "failed" and failed.why == "attention int8: 0.5 from exact attention"


def test_wheels_that_need_what_nobody_carries_are_told(tmp_path: Path) -> None:
    """A package may need another in its next release."""
    needs = {
        "Hub_client": [
            "http.two<3,>=2",
            "numpy",
            "torch>=2",
            'tomli; python_version < "3.11"',
            'x; extra == "all"',
        ],
        "http_two": ["trust-store"],
    }
    for name, found in needs.items():
        with ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            lines = ["Name: x", *(f"Requires-Dist: {need}" for need in found)]
            wheel.writestr(
                f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n\nRequires-Dist: words of a readme"
            )
    assert wheels.wanting(tmp_path, "3.12", ["numpy"]) == {"trust-store": "http_two"}
    assert wheels.wanting(tmp_path, "3.10", []).keys() == {"numpy", "tomli", "trust-store"}


def test_a_part_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--dry", "--output", str(tmp_path), "--folder", str(tmp_path), "--only", "smok"]
    assert gpu.main(command) == 2
    assert "smoke, kernels" in capsys.readouterr().err


def test_a_trial_survives_the_way_to_its_process() -> None:
    trial = Trial(Case("job", "nano", "fp8", 64, 64, 9), "ram", 10**7, GB)
    request = measure.Request(trial, {"high": "/x"}, None, 2, True)
    assert msgspec.json.decode(msgspec.json.encode(request), type=measure.Request) == request
