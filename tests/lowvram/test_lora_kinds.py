"""What a LoRA adds - factors, DoRA, LoKr, LoHa, whole differences - is what merging it in float64 gives, wherever the weights lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvram import Pipeline, Runtime
from lowvram.errors import FileError, UsageError
from lowvram.job import LoraChoice
from lowvram.model_files import with_loras
from lowvram.phases import phase
from lowvram.quant.branches import Dora
from lowvram.sampling.presets import model_preset
from lowvram.stages.denoise import State

PROMPT = "a red circle moves left on a black background"
SETTINGS: dict[str, Any] = {"seed": 5, "steps": 2, "shift": 3.0, "guidance": (1.0, 1.0)}
GB = 10**9
RANK, ALPHA = 4, 6.0
SHAPES = model_preset("nano").dit.shapes()
PAIRS = ["blocks.0.self_attn.q", "blocks.3.ffn.2", "blocks.5.cross_attn.k", "patch_embedding", "head.head",
         "time_projection.1"]  # fmt: skip
BIASED = "blocks.3.ffn.2"
"""Its up factor has a bias, which peft (`lora_bias=True`) scales as it does their product."""
DORAS = {
    "blocks.0.ffn.0": "dora_scale",
    "blocks.1.self_attn.o": "lora_magnitude_vector",
    "blocks.2.ffn.2": "dora_scale",
}
LOKRS = {"blocks.1.ffn.0": ("w1", "w2_a", "w2_b"), "blocks.4.self_attn.v": ("w1", "w2"),
         "text_embedding.0": ("w1_a", "w1_b", "w2"), "blocks.2.cross_attn.q": ("w1_a", "w1_b", "w2_a", "w2_b")}  # fmt: skip
"""LoKr: which of its factors are products. The last has magnitudes as well."""
LOHA = "blocks.5.ffn.0"
DIFFS = ["blocks.0.norm3.weight", "blocks.2.ffn.0.weight", "blocks.1.self_attn.norm_q.weight", "blocks.4.ffn.0.bias",
         "blocks.0.self_attn.q.bias", "blocks.1.modulation", "head.modulation", "head.head.bias"]  # fmt: skip

Weights = dict[str, Tensor]


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def parts() -> Weights:
    """The parts of the LoRA by native name and what they are."""
    made: Weights = {}
    for i, module in enumerate([*PAIRS, *DORAS]):
        out, *inner = SHAPES[f"{module}.weight"]
        made[f"{module}.lora_down.weight"] = noise((RANK, *inner), i) / 16
        made[f"{module}.lora_up.weight"] = noise((out, RANK, *(1 for _ in inner[1:])), 100 + i) / 16
        made[f"{module}.alpha"] = torch.tensor(ALPHA, dtype=torch.float64)
        if module in DORAS:
            size = (1, inner[0]) if module == "blocks.2.ffn.2" else (out, 1)
            made[f"{module}.{DORAS[module]}"] = 0.5 + torch.rand(
                size, generator=torch.Generator().manual_seed(i)
            )
    for i, (module, roles) in enumerate(LOKRS.items()):
        out, inner = SHAPES[f"{module}.weight"]
        rows, columns = 4, 8
        sizes = {"w1": (rows, columns), "w1_a": (rows, 2), "w1_b": (2, columns), "w2_a": (out // rows, RANK),
                 "w2": (out // rows, inner // columns), "w2_b": (RANK, inner // columns)}  # fmt: skip
        for n, role in enumerate(roles):
            made[f"{module}.lokr_{role}"] = noise(sizes[role], 400 + 10 * i + n) / 5
        made[f"{module}.alpha"] = torch.tensor(ALPHA if len(roles) > 2 else 1e10)
    made["blocks.2.cross_attn.q.dora_scale"] = 0.5 + torch.rand(
        SHAPES["blocks.2.cross_attn.q.weight"][0], 1, generator=torch.Generator().manual_seed(9)
    )
    out, inner = SHAPES[f"{LOHA}.weight"]
    for n, (role, size) in enumerate(
        [("w1_a", (out, 2)), ("w1_b", (2, inner)), ("w2_a", (out, 2)), ("w2_b", (2, inner))]
    ):
        made[f"{LOHA}.hada_{role}"] = noise(size, 500 + n) / 4
    made[f"{BIASED}.lora_B.bias"] = noise(SHAPES[f"{BIASED}.bias"], 300) / 16
    for i, name in enumerate(DIFFS):
        module, _, kind = name.rpartition(".")
        suffix = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[kind]
        made[f"{module}.{suffix}"] = noise(SHAPES[name], 200 + i) / 16
    return made


@pytest.fixture(scope="module")
def lora(parts: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "everything.safetensors"
    save_file({f"diffusion_model.{name}": tensor for name, tensor in parts.items()}, path)
    return path


def merged(weights: Weights, parts: Weights, strength: float) -> Weights:
    """The formulas of checkpoint-formats 10.2, in float64."""
    made = {name: tensor.double() for name, tensor in weights.items()}
    p = {name: tensor.double() for name, tensor in parts.items()}
    for module in [*PAIRS, *DORAS]:
        up, down = p[f"{module}.lora_up.weight"].flatten(1), p[f"{module}.lora_down.weight"].flatten(1)
        change = (ALPHA / RANK * up @ down).view(SHAPES[f"{module}.weight"])
        w = made[f"{module}.weight"]
        if module not in DORAS:
            made[f"{module}.weight"] = w + strength * change
            continue
        v, m = w + change, p[f"{module}.{DORAS[module]}"]
        rows = m.shape[0] > 1
        norm = (w if rows and DORAS[module] == "dora_scale" else v).norm(dim=1 if rows else 0, keepdim=True)
        made[f"{module}.weight"] = w + strength * (v * m / norm - w)
    for module, roles in LOKRS.items():
        f = {role: p[f"{module}.lokr_{role}"] for role in roles}
        ranks = [f[role].shape[0] for role in roles if role.endswith("_b")]
        first, second = (f[w] if w in f else f[f"{w}_a"] @ f[f"{w}_b"] for w in ("w1", "w2"))
        w = made[f"{module}.weight"]
        change = torch.kron(first, second) * (ALPHA / ranks[-1] if ranks else 1)
        if f"{module}.dora_scale" in p:
            change = (w + change) * p[f"{module}.dora_scale"] / w.norm(dim=1, keepdim=True) - w
        made[f"{module}.weight"] = w + strength * change
    a, b, c, d = (p[f"{LOHA}.hada_{role}"] for role in ("w1_a", "w1_b", "w2_a", "w2_b"))
    made[f"{LOHA}.weight"] += strength * (a @ b) * (c @ d)
    made[f"{BIASED}.bias"] += strength * ALPHA / RANK * p[f"{BIASED}.lora_B.bias"]
    for name in DIFFS:
        module, _, kind = name.rpartition(".")
        made[name] += (
            strength * p[f"{module}.{ {'weight': 'diff', 'bias': 'diff_b', 'modulation': 'diff_m'}[kind] }"]
        )
    return {name: tensor.float() for name, tensor in made.items()}


def model_with(folder: Path, tiny_model: Path, change: Callable[[Weights], Weights]) -> Path:
    folder.mkdir()
    for file in tiny_model.iterdir():
        if file.name.endswith("noise_model.safetensors"):
            save_file(change(load_file(file)), folder / file.name)
        else:
            (folder / file.name).hardlink_to(file)
    return folder


def test_a_lora_beside_the_weights_is_the_merged_model(
    parts: Weights, lora: Path, tiny_model: Path, tmp_path: Path
) -> None:
    strength = 0.6
    whole = model_with(tmp_path / "merged", tiny_model, lambda w: merged(w, parts, strength))
    expected = Runtime(GB, 2 * GB, "cpu").load(str(whole))(PROMPT, **SETTINGS).latent
    pipe = Runtime(GB, 2 * GB, "cpu").load(str(tiny_model))
    choice = LoraChoice(path=str(lora), strength=strength)
    found = pipe(PROMPT, loras=(choice,), **SETTINGS).latent
    plain = pipe(PROMPT, **SETTINGS).latent
    assert (plain - expected).abs().max() > 0.05
    assert (found - expected).abs().max() < 2e-4


def test_streamed_and_resident_are_equal_and_the_plan_prices_every_part(lora: Path, tiny_model: Path) -> None:
    pipe = Runtime(GB, 2 * GB, "cpu").load(str(tiny_model))
    job = pipe.job(
        PROMPT, loras=(LoraChoice(path=str(lora)), LoraChoice(path=str(lora), strength=-0.3)), **SETTINGS
    )
    roomy = pipe.plan_job(job)
    bare = pipe.plan(PROMPT, **SETTINGS)
    assert sum(v for k, v in roomy.stage("denoise").claims.items() if k.startswith("resident")) > sum(
        v for k, v in bare.stage("denoise").claims.items() if k.startswith("resident")
    )
    whole = pipe.run(job, plan=roomy).latent
    least = min(s.vram for s in roomy.stages)
    for vram in (roomy.vram * 3 // 4, roomy.vram // 2):
        tight = Pipeline(Runtime(max(vram, least), 2 * GB, "cpu"), pipe.model, pipe.files)
        plan = tight.plan_job(job)
        assert plan.blocks()["resident"] < roomy.blocks()["resident"]
        assert torch.equal(tight.run(job, plan=plan).latent, whole)


def test_strength_over_steps_is_what_each_step_merged_with_its_own_gives(
    parts: Weights, lora: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Two steps: the first of a model merged at one strength, the second of one merged at another."""
    pipes = [
        Runtime(GB, 2 * GB, "cpu").load(
            str(model_with(tmp_path / f"{s}", tiny_model, lambda w, s=s: merged(w, parts, s)))
        )
        for s in (0.8, -0.3)
    ]
    states: list[State] = []
    job = pipes[0].job(PROMPT, **SETTINGS)
    pipes[0].run(job, save=states.append)
    expected = pipes[1].run(replace(job, files=pipes[1].files), state=states[0]).latent
    pipe = Runtime(GB, 2 * GB, "cpu").load(str(tiny_model))
    found = pipe(PROMPT, loras=(LoraChoice(path=str(lora), strength=(0.8, -0.3)),), **SETTINGS).latent
    first = pipe(PROMPT, loras=(LoraChoice(path=str(lora), strength=0.8),), **SETTINGS).latent
    assert (found - first).abs().max() > 0.01
    assert (found - expected).abs().max() < 2e-4


def test_a_changing_strength_is_kept_resumed_and_priced(lora: Path, tiny_model: Path) -> None:
    pipe = Runtime(GB, 2 * GB, "cpu").load(str(tiny_model))
    settings = SETTINGS | {"steps": 6}
    choice = LoraChoice(path=str(lora), strength=(1.0, 0.5, 0.0), expert="low")
    job = pipe.job(PROMPT, loras=(choice,), **settings)
    transformers = tuple(with_loras(pipe.model, job.loras).transformers.values())
    told = [(p.expert, p.strengths) for p in (phase(job, transformers, i) for i in range(6))]
    assert told == [(0, ())] * 2 + [(1, (0.5,))] * 2 + [(1, (0.0,))] * 2
    states: list[State] = []
    whole = pipe.run(job, save=states.append).latent
    assert torch.equal(pipe.run(job, state=states[2]).latent, whole)
    steady = pipe.plan(PROMPT, loras=(replace(choice, strength=1.0),), **settings).stage("denoise").claims
    changing = pipe.plan_job(job).stage("denoise").claims
    # The LoRA changes what is outside the blocks too: each of its strengths has a copy of its own.
    for claim in ("ends", "contexts"):
        assert changing[claim] * 2 == steady[claim] * 3


def test_more_strengths_than_steps_are_refused(lora: Path, tiny_model: Path) -> None:
    pipe = Runtime(GB, 2 * GB, "cpu").load(str(tiny_model))
    with pytest.raises(UsageError, match="3 strengths for 2 steps"):
        pipe.job(PROMPT, loras=(LoraChoice(path=str(lora), strength=(1.0, 0.5, 0.0)),), **SETTINGS)


def test_dora_with_the_norms_of_the_base_changes_nothing() -> None:
    w, zero = noise((6, 4), 1), torch.zeros(6, 4)
    assert torch.allclose(Dora(w.norm(dim=1, keepdim=True), 1.0, True).apply(w, zero.clone()), w, atol=1e-6)
    assert torch.allclose(Dora(w.norm(dim=0, keepdim=True), 0.5, False).apply(w, zero.clone()), w, atol=1e-6)


def test_a_lora_goes_to_the_expert_its_name_says_and_to_no_other(
    lora: Path, tiny_model: Path, tmp_path: Path
) -> None:
    pipe = Runtime(GB, 2 * GB, "cpu").load(str(tiny_model))
    path = tmp_path / "style_HIGH.safetensors"
    path.hardlink_to(lora)
    model = with_loras(pipe.model, (LoraChoice(path=str(path)),))
    assert {e: len(t.loras) for e, t in model.transformers.items()} == {"high": 1, "low": 0}
    with pytest.raises(UsageError, match="high-noise"):
        with_loras(pipe.model, (LoraChoice(path=str(path), expert="low"),))


def test_a_lora_that_fits_in_part_is_taken_only_when_asked_for(
    parts: Weights, tiny_model: Path, tmp_path: Path
) -> None:
    pipe = Runtime(GB, 2 * GB, "cpu").load(str(tiny_model))
    path = tmp_path / "half.safetensors"
    foreign = {n.replace("blocks.0", "blocks.77"): t for n, t in parts.items() if "blocks." in n}
    save_file(foreign, path)
    with pytest.raises(FileError, match="95%"):
        with_loras(pipe.model, (LoraChoice(path=str(path)),))
    model = with_loras(pipe.model, (LoraChoice(path=str(path), partial=True),))
    (used,) = model.transformers["high"].loras
    assert 0 < used.matched.matched < used.matched.total and used.matched.unused
    assert used.report().startswith(
        f"{used.matched.matched} of {used.matched.total} parts, rank 2, 4; unused: "
    )
    assert "blocks.77" in used.report() and used.report().endswith("more")


def test_a_plan_tells_what_every_lora_does(cli: Callable[..., Any]) -> None:
    said = cli("plan", "--preset", "lightning-4")
    lines = [line for line in said.err.splitlines() if line.startswith("lora ")]
    assert said.code == 0 and len(lines) == 2
    assert all("60 of 60 parts, rank 32" in line and "strength 1" in line for line in lines)
    assert "(of --preset lightning-4, high" in lines[0] and "(of --preset lightning-4, low" in lines[1]
