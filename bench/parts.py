"""The parts of an acceptance run, each in its own process: `python -m lowvram.bench.parts NAME SETUP` prints a Verdict.

A part that cannot run here says so instead of passing. One with several steps prints a Verdict after each of them, so
that a hang or a crash costs the step in which it happens and nothing before.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
import torch

from lowvram.bench import dequant_rates
from lowvram.bench.cases import GB, Case, Trial, What, dry_jobs
from lowvram.bench.child import run_module
from lowvram.bench.measure import Request
from lowvram.bench.results import Fact, Measurement
from lowvram.bench.suite import Forged
from lowvram.doctor import examine
from lowvram.errors import LowvramError, OutOfMemoryError
from lowvram.machine import rates_path, save_rates
from lowvram.offload.budget import Ledger
from lowvram.offload.device import CpuDevice, Device
from lowvram.offload.slab import as_bytes
from lowvram.quant.encodings.registry import encoding_by_name, encoding_names
from lowvram.survey import identify
from lowvram.triton_kernels import dispatch
from lowvram.triton_kernels.attention import attention
from lowvram.triton_kernels.modes import MODES, PRODUCTS

Facts = dict[str, Fact]


class Setup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where and how a part runs."""

    dry: bool
    """On a CPU with the embedded model: shows that the parts run."""
    folder: str
    """Where random checkpoints are written."""

    @property
    def kind(self) -> str:
        return "cpu" if self.dry else "cuda"


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a part found."""

    outcome: Literal["passed", "failed", "not possible here"]
    facts: Facts
    why: str = ""
    measurements: list[Measurement] = []


Found = Iterator[Verdict]
"""What a part has found so far, after each of its steps."""


class Unfit(Exception):
    """This machine cannot do the part."""


class Broken(Exception):
    """A trial came to nothing: what is known about why."""


# ---- the device


@contextmanager
def capped(setup: Setup, cap: int) -> Iterator[Device]:
    """The device under `cap` bytes."""
    ram = Ledger(2 * GB, "RAM")
    if setup.dry:
        device: Device = CpuDevice(cap, ram=ram)
    else:
        from lowvram.offload.cuda import CudaDevice

        device = CudaDevice(0, cap, ram=ram)
    try:
        yield device
    finally:
        device.close()


def smoke(setup: Setup) -> Found:
    """Memory by name under a cap, pinned memory, copies behind events: the bytes that arrive are those that were sent."""
    facts: Facts = {}
    with capped(setup, 2 * GB) as device:
        host = device.host_alloc("host", 64 << 20)
        slots = [device.alloc(f"slot {n}", 64 << 20) for n in range(2)]
        facts["pinned"], facts["not pinned because"] = host.pinned, host.unpinned
        memory = torch.frombuffer(as_bytes(host.tensor), dtype=torch.int64)
        seen = []
        for n in range(6):
            slot = slots[n % 2]
            torch.arange(n, n + memory.numel(), out=memory)
            arrived = device.copy_async(slot.tensor, host.tensor, after=device.record_compute())
            stall = device.wait(arrived)
            seen.append(int(slot.tensor.view(torch.int64).sum().item()))
            arrived.synchronize()
            facts["last stall, s"] = stall.seconds()
        count = memory.numel()
        expected = [n * count + count * (count - 1) // 2 for n in range(6)]
        facts["bytes arrive"] = seen == expected
        facts["claims are counted"] = device.ledger.used >= 128 << 20
        try:
            device.alloc("too much", 4 * GB)
            facts["the cap refuses"] = False
        except OutOfMemoryError:
            facts["the cap refuses"] = True
        if device.kind == "cuda":
            facts["the allocator refuses"] = _allocator_refuses(4 * GB)
        facts["free after"] = device.memory_free()
        del memory
        for buffer in (host, *slots):
            buffer.free()
        facts["everything is given back"] = device.ram.used == 0
    yield _all_true(facts)


def _allocator_refuses(nbytes: int) -> bool:
    try:
        torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return True
    return False


# ---- numbers


def kernels(setup: Setup) -> Found:
    """Every encoding decodes here to the numbers of the CPU; attention is as exact as its format allows."""
    facts: Facts = {}
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(256, 1024, generator=generator) / 32
    for name in encoding_names():
        encoding = encoding_by_name(name)
        if not encoding.fits(tuple(weight.shape)):
            continue
        parts = encoding.encode(weight)
        here = {role: part.to(setup.kind) for role, part in parts.items()}
        decoded = encoding.decode(here, tuple(weight.shape), torch.bfloat16).cpu()
        facts[f"{name} equals the CPU"] = torch.equal(
            decoded, encoding.decode(parts, tuple(weight.shape), torch.bfloat16)
        )
        yield _all_true(facts)
    q, k, v = (torch.randn(4, n, 128, generator=generator) for n in (300, 700, 700))
    bias = torch.randn(1, 1, 700, generator=generator)
    true = torch.softmax(q.double() @ k.double().mT / 128**0.5 + bias.double(), -1) @ v.double()
    dtype = torch.float32 if setup.dry else torch.bfloat16
    cast = [x.to(setup.kind, dtype) for x in (q, k, v, bias)]
    found = attention(*cast).cpu().double().unflatten(-1, (4, 128)).transpose(0, 1)
    error = float((found - true).norm() / true.norm())
    facts["attention error"] = error
    facts["attention is exact enough"] = error < (1e-5 if setup.dry else 1e-2)
    yield _all_true(facts)
    facts["attention makes no logits"] = _no_logits(setup, dtype)
    yield _all_true(facts)
    wrong: list[str] = []
    for name, cannot, problem in () if setup.dry else _self_tests(identify().arch):
        facts[name] = cannot or problem or "right"
        wrong += [] if cannot or not problem else [f"{name}: {problem}"]
        yield _all_true(facts, also=wrong)


def _self_tests(arch: str) -> Iterator[tuple[str, str, str]]:
    """What the product tries on a card before a run: name, why it cannot run there, and what is wrong with it."""
    device, packages = torch.device("cuda", 0), dispatch.installed()
    for mode in MODES.values():
        cannot = dispatch.obstacle(mode, arch, packages)
        yield f"attention {mode.name}", cannot, "" if cannot else dispatch.try_mode(mode, device, arch)
    for product in PRODUCTS.values():
        cannot = "" if arch in product.archs else f"there is none for {arch}"
        yield (
            f"{product.form} multiplication",
            cannot,
            "" if cannot else dispatch.try_w8a8(product.form, device),
        )
    cannot = dispatch.kernels_obstacle(arch)
    yield "fused operations", cannot, "" if cannot else dispatch.try_ops(device)


def _no_logits(setup: Setup, dtype: torch.dtype) -> Fact:
    """Whether attention takes much less memory than its logits would; None on a CPU."""
    if setup.dry:
        return None
    q, k = (torch.randn(8, n, 128, device="cuda", dtype=dtype) for n in (4096, 32768))
    attention(q, k, k)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, k)
    return torch.cuda.max_memory_allocated() - before < 8 * 4096 * 32768 // 4


def ceilings(setup: Setup) -> Found:
    """What the machine reaches; kept, so that the plans of the other parts use it."""
    with tempfile.TemporaryDirectory(dir=setup.folder) as folder:
        found = examine(identify(setup.kind), Path(folder), time.perf_counter)
    save_rates(rates_path(setup.kind), found.rates)
    facts: Facts = {r.name: r.value for r in found.readings}
    yield Verdict("passed", facts)


def speed(setup: Setup) -> Found:
    """One block at the true width, and its attention alone, against torch and, if it is there, diffusers."""
    from lowvram.bench import blocks

    for facts in blocks.compare(setup.kind, tokens=64 if setup.dry else 32_760, small=setup.dry):
        yield Verdict("passed", facts)


def attending(setup: Setup) -> Found:
    """Attention in every mode at 480p and 720p, against torch's backends and what else is installed: time and error."""
    if setup.dry:
        if "triton" not in dispatch.installed():
            yield Verdict("not possible here", {}, "triton is not installed")
            return
        os.environ["TRITON_INTERPRET"] = "1"
        from lowvram.bench import interpreter

        interpreter.mend()
    from lowvram.bench import attending

    heads = 2 if setup.dry else attending.HEADS
    facts: Facts = {}
    wrong: list[str] = []
    for n in (300,) if setup.dry else attending.TOKENS:
        found, bad = attending.compare(setup.kind, n, heads)
        facts, wrong = facts | found, wrong + bad
        yield Verdict("failed" if wrong else "passed", facts, "; ".join(wrong))


def multiplication(setup: Setup) -> Found:
    """The Linears of a 14B model at 720p and 121 frames: int8 by our kernel and by torch, against cuBLAS."""
    from lowvram.bench import products

    size = (64, products.SMALL) if setup.dry else (products.TOKENS, products.SHAPES)
    facts: Facts = {}
    for row in products.timings(setup.kind, *size):
        what = f"{row['kernel']}{row.get('tile', '')}, {row['out']}x{row['in']}"
        facts[f"{what}: ms"] = str(row["refused"]) if "refused" in row else float(str(row["ms"]))
        yield Verdict("passed", facts)


def producers(setup: Setup) -> Found:
    """What stands between multiplications, against the rate of a copy."""
    from lowvram.bench import producer_rates
    from lowvram.triton_kernels.tiles import arch_of

    cannot = "" if setup.dry else dispatch.kernels_obstacle(arch_of(torch.device(setup.kind)))
    if cannot:
        yield Verdict("not possible here", {}, cannot)
        return
    for facts in producer_rates.compare(setup.kind, small=setup.dry):
        yield Verdict("passed", facts)


def decoding_rates(setup: Setup) -> Found:
    """Weights of every encoding are made dense, in torch and by kernels that have to give its bits."""
    for facts in dequant_rates.compare(setup.kind, small=setup.dry):
        wrong = [name for name, value in facts.items() if isinstance(value, str) and value != "right"]
        yield Verdict("failed" if wrong else "passed", facts, ", ".join(wrong))


# ---- jobs


def forecast(setup: Setup) -> Found:
    """On the embedded model: what was measured is at most what was planned."""
    yield from _trials(setup, [Trial(dry_jobs("job")[0].case, "resident", GB, 8 * GB)])


def placement(setup: Setup) -> Found:
    """Where the weights live never changes a bit of the frames."""
    trials = dry_jobs("pair")
    if not setup.dry:  # a context alone is larger than the whole job: only resident blocks can be had
        trials = tuple(Trial(t.case, "resident", t.vram + GB, 8 * GB) for t in trials[:3])
    for verdict in _trials(setup, trials):
        yield _same_bits(verdict)


def _same_bits(verdict: Verdict) -> Verdict:
    """The verdict, failed if its measurements did not end in the same bits."""
    if len(verdict.measurements) < 2 or verdict.outcome == "failed":
        return verdict
    same = len({m.checksum for m in verdict.measurements}) == 1
    return _all_true(verdict.facts | {"same bits": same}, verdict.measurements)


def true_size(
    setup: Setup, what: What, budget_gb: int, *, resident: bool = False, long: bool = True
) -> Trial:
    """A case of A14B with fp8 weights under a hard cap; of the embedded model if the run is dry."""
    if setup.dry:
        return dry_jobs(what)[0 if resident else 1]
    size = (1280, 720, 121) if long else (832, 480, 81)
    case = Case(what, "wan2.2-t2v-a14b", "fp8", *size)
    return Trial(case, "resident" if resident else "ram", budget_gb * GB, 48 * GB)


def real(setup: Setup, what: What, budget_gb: int, *, long: bool = True) -> Found:
    """One case at the true size."""
    yield from _trials(setup, [true_size(setup, what, budget_gb, long=long)])


def tax(setup: Setup) -> Found:
    """The same job with most blocks streamed and with all of them resident: the time between, and the same bits."""
    trials = [
        true_size(setup, "pair", 12, long=False),
        true_size(setup, "pair", 48, resident=True, long=False),
    ]
    for verdict in _trials(setup, trials):
        if len(verdict.measurements) == 2:
            streamed, resident = (sum(m.steps) for m in verdict.measurements)
            verdict = msgspec.structs.replace(
                verdict, facts=verdict.facts | {"streamed over resident": streamed / resident}
            )
        yield _same_bits(verdict)


def vae(setup: Setup) -> Found:
    """A latent to frames: time, and peak against plan."""
    if setup.dry:
        yield from _trials(setup, [Trial(Case("decode", "nano", "fp8", 64, 64, 9), "resident", GB, 8 * GB)])
    else:
        yield from real(setup, "decode", 16, long=False)


def beside_diffusers(setup: Setup) -> Found:
    """A 720p latent of 81 and of 121 frames to frames, and diffusers' untiled and tiled decode of it."""
    from lowvram.bench import autoencoders

    try:
        for facts in autoencoders.compare(setup.kind, small=setup.dry):
            wrong = [
                f"{n} of {name}" for name, n in facts.items() if " ours, " in name and "refused" in name and n
            ]
            yield Verdict("failed" if wrong else "passed", facts, ", ".join(wrong))
    except ImportError as problem:
        raise Unfit(str(problem)) from None


def _trials(setup: Setup, trials: Sequence[Trial]) -> Found:
    """Each in a process of its own: one that fails, crashes or hangs takes nothing from the others."""
    facts: Facts = {}
    done: list[Measurement] = []
    wrong: list[str] = []
    for trial in trials:
        label = f"{trial.case.what} {trial.placement} {trial.vram / GB:.3g} GB"
        try:
            m = _measured(setup, trial)
        except Broken as error:
            wrong.append(f"{label}: {error}")
        else:
            done.append(m)
            # Small jobs: the allocator's smallest segments, of 2 and 20 MiB, are larger than what they hold.
            slack = 64 << 20 if not setup.dry else 0
            true = (m.vram_allocated or 0) <= m.vram_predicted + slack
            facts |= {
                f"{label}: seconds": m.seconds,
                f"{label}: planned": m.vram_predicted,
                f"{label}: allocator": m.vram_allocated,
                f"{label}: driver": m.vram_driver,
                f"{label}: within the plan": true,
            }
            wrong += [] if true else [f"{label}: within the plan"]
        yield Verdict("failed" if wrong else "passed", dict(facts), "; ".join(wrong), list(done))


def _measured(setup: Setup, trial: Trial) -> Measurement:
    """Unfit if the card is too small for the trial, Broken if it came to nothing."""
    if not setup.dry:
        free, _ = torch.cuda.mem_get_info()
        if trial.vram > free:
            raise Unfit(f"the card has less than {trial.vram / GB:.3g} GB free")
    files = Forged(Path(setup.folder), lambda text: None).source(trial)
    # At true sizes a job warms itself up: its first step says what that took.
    request = Request(trial, files, setup.kind, 0 if files else 1, ballast=not setup.dry and trial.vram >= GB)
    outcome = run_module("lowvram.bench.measure", [msgspec.json.encode(request).decode()], None, apart=False)
    if not outcome.result:
        raise Broken(outcome.why)
    return msgspec.json.decode(outcome.result, type=Measurement)


PARTS: Mapping[str, tuple[float, Callable[[Setup], Found]]] = {
    "smoke": (60, smoke),
    "kernels": (90, kernels),
    "ceilings": (90, ceilings),
    "forecast": (120, forecast),
    "placement": (120, placement),
    "job at 16 GB": (420, lambda s: real(s, "pair", 16)),
    "job at 8 GB": (300, lambda s: real(s, "pair", 8)),
    "job at 6 GB": (300, lambda s: real(s, "pair", 6)),
    "job at 4 GB": (300, lambda s: real(s, "pair", 4)),
    "job at 12 GB": (300, lambda s: real(s, "pair", 12)),
    "tax": (300, tax),
    "decoding": (120, decoding_rates),
    "producers": (60, producers),
    "speed": (120, speed),
    "attention": (240, attending),
    "multiplication": (120, multiplication),
    "vae": (240, vae),
    "vae beside diffusers": (420, beside_diffusers),
    "handover": (300, lambda s: real(s, "handover", 16, long=False)),
}
"""By name, the most valuable first: the seconds that a part may take, and what it does."""


def _all_true(facts: Facts, measurements: Sequence[Measurement] = (), also: Sequence[str] = ()) -> Verdict:
    """Passed if no fact is False, and nothing is wrong `also`."""
    wrong = [*(name for name, value in facts.items() if value is False), *also]
    return Verdict("failed" if wrong else "passed", dict(facts), ", ".join(wrong), list(measurements))


def main() -> None:
    """The process that `lowvram.bench.gpu` starts."""
    setup = msgspec.json.decode(sys.argv[2], type=Setup)
    verdict = Verdict("failed", {}, "nothing was found")
    try:
        for verdict in PARTS[sys.argv[1]][1](setup):
            _say(verdict)
    except Unfit as why:
        _say(msgspec.structs.replace(verdict, outcome="not possible here", why=str(why)))
    except LowvramError as error:
        _say(msgspec.structs.replace(verdict, outcome="failed", why=" ".join(str(error).split("\n"))))


def _say(verdict: Verdict) -> None:
    """A line that stays, whatever happens to this process next."""
    print(msgspec.json.encode(verdict).decode(), flush=True)


if __name__ == "__main__":
    main()
