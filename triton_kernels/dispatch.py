"""Which implementation runs on a card: from the table of modes, what is installed, and a test on the card itself.

Nothing is chosen behind one's back: a choice is a value with its reason, made before a run and stored with the job.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable

import torch
from torch import Tensor

from lowvram.errors import UsageError
from lowvram.triton_kernels import backends, toolchain
from lowvram.triton_kernels.attention import attend_, attend_reference, attention, sdpa_backend
from lowvram.triton_kernels.gemm import QuantisedMatrix, low_rank
from lowvram.triton_kernels.modes import (
    ARCHS,
    AUTO,
    CAREFUL,
    EXACT,
    MATMULS,
    MEASURED,
    MODES,
    PRODUCTS,
    Choice,
    Matmul,
    Mode,
    Product,
)
from lowvram.triton_kernels.norm_rope import centre_of, quantise_rows, quantise_values
from lowvram.triton_kernels.ops import FUSED, TORCH, Ops, W8A8Ops
from lowvram.triton_kernels.quantise import GROUPS
from lowvram.triton_kernels.tiles import HALF

PACKAGES = ("triton", *(mode.package for mode in MODES.values() if mode.package))
"""What is looked for. None is needed."""
_SAME = 2e-2
"""Most relative difference of a kernel from its own arithmetic."""
_NEAR = 8e-2
"""Most relative difference of any attention from the exact one on Gaussian data; 8-bit formats take 0.01 to 0.03."""


def installed() -> frozenset[str]:
    """Those of PACKAGES that are there."""
    return frozenset(name for name in PACKAGES if importlib.util.find_spec(name) is not None)


def obstacle(mode: Mode, arch: str, packages: frozenset[str]) -> str:
    """Why a mode cannot run on an architecture with these packages; "" if nothing stands in its way."""
    if mode.name == "sdpa":
        return ""
    if not arch:
        return "" if mode.ours else f"{mode.what} needs an NVIDIA card"
    if arch not in mode.archs:
        return f"there is no {mode.name} kernel for {arch}"
    needed = mode.package or "triton"
    return "" if needed in packages else f"{needed} is not installed"


def choose(
    asked: str,
    arch: str,
    packages: frozenset[str],
    test: Callable[[Mode], str] | None = None,
    ends: str | None = None,
) -> Choice:
    """The mode to run for `asked`, a name or "auto"; `test` runs a mode on the card and says what is wrong with it.

    ends: mode of the first and last step and the first block; None for what suits the mode. UsageError for a mode
    that cannot run here. One that fails its test is replaced by sdpa, and the reason says so.
    """
    if asked != "auto":
        mode = mode_named(asked)
        _check_here(mode, arch, packages)
        wrong = _tested(mode, test)
        if wrong:
            return Choice("sdpa", "sdpa", f"sdpa, because {asked} failed its self-test: {wrong}")
        return _chosen(mode, arch, "as asked", ends)
    reasons = [f"chosen for {arch or 'a processor'}"]
    for name in AUTO.get(arch, ()):
        wrong = obstacle(MODES[name], arch, packages) or _tested(MODES[name], test)
        if not wrong:
            return _chosen(MODES[name], arch, "; ".join(reasons), ends)
        reasons.append(f"not {name}: {wrong}")
    return _chosen(MODES["sdpa"], arch, "; ".join(reasons), ends)


def _check_here(mode: Mode, arch: str, packages: frozenset[str]) -> None:
    wrong = obstacle(mode, arch, packages)
    if wrong:
        able = [m.name for m in MODES.values() if not obstacle(m, arch, packages)]
        raise UsageError(
            wrong,
            where=f"--attention {mode.name}",
            expected=f"one of auto, {', '.join(able)} here",
            advice="leave --attention out, or install what is missing",
        )


def _tested(mode: Mode, test: Callable[[Mode], str] | None) -> str:
    return "" if test is None or mode.name == "sdpa" else test(mode)


def _chosen(mode: Mode, arch: str, reason: str, ends: str | None) -> Choice:
    if ends not in (None, "sdpa", CAREFUL, mode.name):
        raise UsageError(
            f'"{ends}"',
            where="--attention-ends",
            expected=f"sdpa, {CAREFUL}, or {mode.name} itself",
            advice="leave it out",
        )
    risky = mode.v_format == "fp8" or mode.keep < 1
    ends = ends or (CAREFUL if risky else mode.name)
    why = f"{mode.name} ({mode.what}), {reason}"
    if not arch and mode.quantised:
        why += "; its arithmetic in torch, not its speed"
    elif mode.name != "sdpa" and (mode.name, arch) not in MEASURED:
        why += f"; nobody has timed it on {arch} yet"
    if ends != mode.name:
        why += f"; first and last step and first block in {ends}"
    return Choice(mode.name, ends, why)


def mode_named(name: str) -> Mode:
    """The mode called `name`. UsageError if there is none."""
    if name not in MODES:
        raise UsageError(
            f'"{name}"',
            where="--attention",
            expected=f"one of auto, {', '.join(MODES)}",
            advice="leave it out: auto takes what fits the card",
        )
    return MODES[name]


def choose_matmul(
    asked: str, arch: str, unfit: Callable[[str], str], test: Callable[[str], str] | None = None
) -> Matmul:
    """How to multiply for `asked`, a name of MATMULS or "auto".

    unfit: what the weights are if they are not of a form. `test` multiplies that form on the card and says what is wrong
    with it. UsageError for a name that is none, and for weights that cannot be multiplied so; a card that cannot do it
    multiplies exactly, and the reason says why.
    """
    if asked not in ("auto", *MATMULS):
        raise UsageError(
            f'"{asked}"',
            where="--matmul",
            expected=f"one of auto, {', '.join(MATMULS)}",
            advice="leave it out",
        )
    if asked == "exact":
        return EXACT
    if asked == "auto":
        product = next((p for p in PRODUCTS.values() if arch in p.archs and not unfit(p.form)), None)
        if product is None:
            return EXACT
        if arch not in product.measured:
            return Matmul("exact", f"exact: nobody has timed --matmul {product.form} on {arch} yet")
    else:
        product = PRODUCTS[asked]
        _check_weights(product, unfit(asked))
    form = product.form
    if arch and arch not in product.archs:
        return Matmul("exact", f"exact, because there is no {form} multiplication for {arch}")
    wrong = "" if test is None else test(form)
    if wrong:
        return Matmul("exact", f"exact, because {form} failed its self-test: {wrong}")
    why = f"{form} ({product.what}), " + ("as asked" if asked == form else f"chosen for {arch}")
    if not arch:
        why += "; its arithmetic in torch, not its speed"
    elif arch not in product.measured:
        why += f"; nobody has timed it on {arch} yet"
    return Matmul(form, why)


def _check_weights(product: Product, unfit: str) -> None:
    if unfit:
        raise UsageError(
            unfit,
            where=f"--matmul {product.form}",
            expected=product.weights,
            advice=f"make them with `lowvram quantize IN OUT --to {product.to}`, or leave --matmul out",
        )


def half_of(mode: Mode, arch: str) -> bool:
    """Whether P V of a tile is added up in float16; the arithmetic on a CPU is that of GeForce."""
    return mode.v_format != "bf16" and HALF.get(mode.v_format, {}).get(arch, True)


def sdpa_backend_of(device: torch.device) -> str:
    """The backend of torch that long attention in bfloat16 takes on a card."""
    return sdpa_backend(torch.empty(1, 2, 256, 128, dtype=torch.bfloat16, device=device))


# ---- tests on the card itself


def try_mode(mode: Mode, device: torch.device, arch: str) -> str:
    """What is wrong with a mode on a device, "" if nothing: a small attention against its own arithmetic in torch."""
    try:
        return _wrong(mode, device, arch)
    except Exception as problem:  # noqa: BLE001  whatever a compiler or a foreign package throws
        return told(problem)


def _wrong(mode: Mode, device: torch.device, arch: str) -> str:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if not arch else torch.bfloat16
    q, k, v = (torch.randn(2, n, 128, generator=generator).to(device, dtype) for n in (200, 330, 330))
    k[..., 5] += 4
    exact = attention(q.float(), k.float(), v.float())
    if not mode.quantised:
        return _far(backends.attention_by(q, k, v, mode.package), exact, _NEAR, "exact attention")
    rows = *quantise_rows(q), *quantise_rows(k, centre_of(k[:, ::64]))
    values = (
        quantise_values(v, mode.v_format)
        if mode.v_format != "bf16"
        else (v.to(torch.bfloat16), q[:0].float())
    )
    half = half_of(mode, arch)
    out = torch.full((200, 256), torch.nan, dtype=dtype, device=device)
    attend_(out, *rows, *values, v_format=mode.v_format, half=half)
    same = attend_reference(*rows, *values, v_format=mode.v_format, half=half)
    return _far(out, same, _SAME, "its own arithmetic") or _far(out, exact, _NEAR, "exact attention")


def told(problem: Exception) -> str:
    """What a compiler, a kernel or a foreign package threw, in a line."""
    if isinstance(problem, subprocess.CalledProcessError) or "C compiler" in str(problem):
        return toolchain.lack() or _first_line(problem)
    return _first_line(problem)


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem) or 'no message').splitlines()[0]}"


def _far(got: Tensor, want: Tensor, most: float, what: str) -> str:
    error = float((got.float() - want.float()).norm() / want.float().norm())
    return "" if error <= most else f"{error:.2g} from {what}"  # NaN is not <=


def try_ops(device: torch.device, ops: Ops = FUSED) -> str:
    """What is wrong with fused operations on a device, "" if nothing: each against the one in torch."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    n = 70
    x, y, weight = normal(n, 256).bfloat16(), normal(n, 256).bfloat16(), normal(256)
    shift, scale, rope = normal(1, 256), normal(1, 256), normal(n, 64, 2)
    frame = normal(1, 1, 5, 14, 256).bfloat16().permute(0, 4, 1, 2, 3)
    results = []
    for some in (TORCH, ops):
        try:
            rows = x.new_empty(2, n, 128)
            some.norm_rope_(rows, x, weight, rope, None)
            q8, scales = (
                rows.new_empty(2, n, 128, dtype=torch.int8),
                rows.new_empty(2, n, dtype=torch.float32),
            )
            some.norm_rope_int8_(q8, scales, x, weight, rope, some.rms_factor(x), None)
            v16, vs = rows.new_empty(2, n, 128, dtype=torch.float16), shift.new_empty(2, 1, 128)
            some.quantise_values_(v16, vs, x, "fp16")
            added = x.clone()
            some.gated_(added, y, shift)
            results.append(
                {
                    "norm_rope": rows,
                    "norm_rope_int8": q8.float() * scales.unsqueeze(-1),
                    "quantise_values": v16.float() * vs,
                    "modulate": some.modulate(x, shift, scale),
                    "gated": added,
                    "gelu": some.gelu(x.clone()),
                    "rms_silu": some.rms_silu(frame, weight, None),
                }
            )
        except Exception as problem:  # noqa: BLE001  whatever a compiler throws
            return told(problem)
    for name, want in results[0].items():
        wrong = _far(results[1][name], want, _SAME, "torch")
        if wrong:
            return f"{name} is {wrong}"
    return ""


def kernels_obstacle(arch: str) -> str:
    """Why kernels of Triton cannot run on an architecture, here; "" if nothing stands in their way."""
    if arch not in ARCHS:
        return "no NVIDIA card" if not arch else f"no kernels for {arch}"
    return "" if "triton" in installed() else "triton is not installed"


def ops_obstacle(device: torch.device, arch: str) -> str:
    """Why the operations between multiplications are those of torch on a device; "" if the fused ones run."""
    return kernels_obstacle(arch) or try_ops(device)


def try_w8a8(form: str, device: torch.device, ops: Ops = FUSED) -> str:
    """What is wrong with multiplication by weights of a form on a device, "" if nothing: each operation against the one in
    torch, on a CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, up, bias = normal(70, 512).bfloat16(), normal(112, 40).bfloat16(), normal(112).bfloat16()
    shift, gate, w, reference = normal(1, 512), normal(1, 112), normal(112, 512), TORCH.w8a8(form)
    try:
        for group in GROUPS if form == "int8" else (0,):
            rows = reference.quantise(w, group)
            weight = QuantisedMatrix(rows.values, rows.scale, group)
            want = _w8a8_results(reference, x, shift, gate, bias, up, weight)
            a, b, c, d, e = (t.to(device) for t in (x, shift, gate, bias, up))
            got = _w8a8_results(ops.w8a8(form), a, b, c, d, e, weight.to(device))
            for name, right in want.items():
                wrong = _far(got[name].cpu(), right, _SAME, "torch")
                if wrong:
                    return f"{name} is {wrong}"
    except Exception as problem:  # noqa: BLE001  whatever a compiler throws
        return told(problem)
    return ""


def _w8a8_results(
    ops: W8A8Ops, x: Tensor, shift: Tensor, gate: Tensor, bias: Tensor, up: Tensor, weight: QuantisedMatrix
) -> dict[str, Tensor]:
    """What every operation makes of x [n, in], whose first rows are the down of a LoRA too."""
    made = {
        "quantise": ops.quantise(x, weight.group),
        "modulate and quantise": ops.modulate(x, shift, shift, weight.group),
        "gelu and quantise": ops.gelu(x.clone(), weight.group),
    }
    results = {name: rows.values.float() * rows.scale.unsqueeze(-1) for name, rows in made.items()}
    lora = low_rank([made["quantise"][: up.shape[1]]], [up], [0.5])
    for name, branch in (("", None), (" with a LoRA", lora)):
        added = x[:, : gate.shape[1]].clone()
        ops.linear_gated_(added, made["quantise"], weight, bias, gate, branch)
        results[f"gated product{name}"] = added
        results[f"product{name}"] = ops.linear(made["quantise"], weight, bias, branch)
    return results
