"""The ways to run the forward, from the fastest to the leanest, and what each takes whatever the placement of blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from lowvram import footprint
from lowvram.conditions.contract import kept
from lowvram.models.dit import PARTS
from lowvram.models.self_attention import CHUNK
from lowvram.offload.budget import allocated_size
from lowvram.offload.rows import WINDOWS
from lowvram.offload.slab import build_layout
from lowvram.planning.facts import Facts
from lowvram.planning.plan import Lean
from lowvram.planning.prepare import kept_claims
from lowvram.quant.spec import HEAD_DIM, numel
from lowvram.sampling.solvers import kept_tensors
from lowvram.stages.condition import conditioning, held_claims
from lowvram.triton_kernels.keys import sample_stride, stored_bytes
from lowvram.triton_kernels.ops import ops_for

CHUNKS = (CHUNK, CHUNK // 2, CHUNK // 4)
"""Tokens at once. The first, wherever it fits, so that a budget does not change how a matmul is cut."""
GROUPS = (8, 4, 2, 1)
"""Heads at once, where not all are."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the forward."""

    lean: Lean
    slots: int
    """Device buffers for blocks that move; 1 leaves no copy to overlap with."""


def every_way(facts: Facts) -> list[Way]:
    """All that are worth a thought."""
    packed = facts.once(_unpacked_bytes) > 0
    return [Way(lean, slots) for lean in _leans(facts, packed) for slots in (2, 1)]


def _leans(facts: Facts, packed: bool) -> list[Lean]:
    """packed: whether any weight has to be decoded before it is used."""
    heads, guided = facts.spec.dit.heads, facts.passes == 2
    groups = [g for g in GROUPS if g < heads and heads % g == 0]
    found = []
    for chunk in CHUNKS:
        small = Lean(together=not guided, chunk=chunk, unpacked=not packed)
        found += [Lean(chunk=chunk)] + ([Lean(together=False, chunk=chunk)] if guided else [])
        found += [small] if packed else []
        found += [replace(small, group=g) for g in groups]
        found += [replace(small, group=g, away=True) for g in (0, *groups)]
    return found


# ---- memory


def claims(facts: Facts, lean: Lean) -> dict[str, int]:
    """Device memory beside the blocks."""
    block = facts.once(_scratch, lean.chunk, lean.group > 0, lean.unpacked)
    return _claims(facts, lean, block)


def least_claims(facts: Facts, lean: Lean) -> dict[str, int]:
    """As `claims`, with no more than is known of the scratch without running a block: what its FFN holds at once."""
    hidden = min(facts.tokens, lean.chunk) * facts.spec.dit.ffn * facts.dtype.itemsize
    return _claims(facts, lean, hidden)


def _claims(facts: Facts, lean: Lean, block: int) -> dict[str, int]:
    """block: scratch of the blocks and of the head."""
    spec, tokens = facts.spec.dit, facts.tokens
    heads = lean.group or spec.heads
    stored = [stored_bytes(mode, heads, tokens, facts.dtype) for mode in facts.job.attention.modes()]
    state = kept_tensors(facts.job.schedule.solver)
    # in the blocks: the latent, what the solver keeps, and the velocity of the pass before
    latents = 1 + state + (0 if lean.together else facts.passes - 1)
    solving = 3 + facts.passes + state - latents  # between the blocks of two steps
    claims = {
        **_residual_claims(facts, lean),
        "keys": allocated_size(max(keys for keys, _ in stored)),
        "values": allocated_size(max(values for _, values in stored)),
        "attention output": allocated_size(tokens * spec.dim * facts.dtype.itemsize),
        "rotary table": allocated_size(4 * tokens * HEAD_DIM),
        "token order": allocated_size(8 * tokens),
        "latents": latents * _latent_bytes(facts),
        "scratch": max(block, solving * _latent_bytes(facts) + _preview_scratch(facts)),
    }
    claims |= facts.once(_preview_weights)
    unpacked = facts.once(_unpacked_bytes) if lean.unpacked else 0
    if unpacked:
        claims["unpacked block"] = allocated_size(unpacked)
    claims |= facts.once(_condition)
    if not lean.group:
        del claims["attention output"]
    if not facts.job.attention.selects:
        del claims["token order"]
    return kept_claims(facts) | claims


def _condition(facts: Facts) -> dict[str, int]:
    condition = conditioning(facts.spec, facts.job)
    return {} if condition is None else {"condition": kept(condition, facts)}


def _residual_claims(facts: Facts, lean: Lean) -> dict[str, int]:
    """On the device: the residual streams, or what passes of those in RAM."""
    row = facts.spec.dit.dim * facts.residual.itemsize
    if not lean.away:
        return {"residual": _streams(facts, lean) * allocated_size(facts.tokens * row)}
    claims = {"residual window": WINDOWS * allocated_size(min(lean.chunk, facts.tokens) * row)}
    if any(mode.quantised for mode in facts.job.attention.modes()):
        sampled = -(-facts.tokens // sample_stride(facts.tokens))
        claims["residual sample"] = allocated_size(sampled * row)
    return {name: _streams(facts, lean) * nbytes for name, nbytes in claims.items()}


def ram_claims(facts: Facts, lean: Lean) -> dict[str, int]:
    """Host memory beside the blocks: among it the state that the denoise began from, the last one, and the next."""
    stream = facts.tokens * facts.spec.dit.dim * facts.residual.itemsize
    away = {f"ram residual {n}": stream for n in range(_streams(facts, lean))} if lean.away else {}
    states = {"states": 3 * sum(facts.state.values())}
    return facts.once(held_claims) | facts.once(_preview_ram) | states | away


def _streams(facts: Facts, lean: Lean) -> int:
    """Residual streams at once."""
    return facts.passes if lean.together else 1


def _scratch(facts: Facts, chunk: int, grouped: bool, unpacked: bool) -> int:
    """Transient bytes of a block or of the head, whichever takes more.

    Groups of fewer heads take no more than the largest, so that one stands for all.
    """
    spec, tokens, n = facts.spec.dit, facts.tokens, min(facts.tokens, 2 * chunk)
    group = next(g for g in GROUPS if g < spec.heads and spec.heads % g == 0) if grouped else 0
    per_frame = tokens // facts.latent[1] if facts.time_rows > 1 else 0
    found, machine, matmul = [], facts.machine, facts.job.matmul
    for block in facts.transformers.blocks:
        what = n, per_frame, max(facts.lengths), facts.dtype
        for mode in facts.job.attention.modes():
            measure = partial(
                footprint.block_scratch, spec, block, *what, group=group, chunk=chunk,
                unpacked=unpacked, attention=mode, matmul=matmul, ops=ops_for(machine.arch, machine.unfused),
                residual=facts.residual,
            )  # fmt: skip
            how = (
                group,
                chunk,
                unpacked,
                mode.name,
                matmul.mode,
                machine.arch,
                machine.unfused,
                facts.residual,
            )
            inside = facts.measured(measure, "block", block.kind, *what, *how)
            factors = footprint.factor_bytes(tokens) - footprint.factor_bytes(n) if group else 0
            found.append(inside + factors)
        if spec.face_blocks:
            face = tokens, facts.latent[1], facts.dtype, chunk, facts.residual
            attend = partial(footprint.attend_scratch, spec, block, *face)
            found.append(facts.measured(attend, "face", block.kind, *face))
    found.append(facts.once(_ends_scratch, chunk))
    return max(found) + allocated_size(len(PARTS) * spec.layers)  # a truth a part


def _ends_scratch(facts: Facts, chunk: int) -> int:
    """Of what is before the blocks and behind them."""
    found = []
    for outer in facts.transformers.outers:
        ends, key = (facts.spec.dit, outer, facts.grid), (outer.kind, facts.grid)
        head = partial(footprint.head_scratch, *ends, facts.residual, chunk=chunk)
        behind = facts.measured(head, "head", *key, facts.residual, chunk)
        slabs = facts.job.attention.selects
        embed = partial(footprint.embed_scratch, *ends, facts.dtype, slabs=slabs)
        before = facts.measured(embed, "embed", *key, facts.dtype, slabs)
        found += [behind + _latent_bytes(facts), before]
    return max(found)


def _preview_weights(facts: Facts) -> dict[str, int]:
    if facts.preview is None:
        return {}
    return {"preview weights": facts.footprint(build_layout(facts.preview.weights.refs).nbytes)}


def _preview_scratch(facts: Facts) -> int:
    """Of a preview by a decoder, made between two steps: the scratch of the blocks is free then."""
    if facts.preview is None:
        return 0
    what = facts.latent, facts.dtype
    measure = partial(footprint.preview_scratch, facts.preview, *what)
    return facts.measured(measure, "preview", facts.preview.weights.kind, *what)


def _preview_ram(facts: Facts) -> dict[str, int]:
    """The decoder on its way to the device, and the pictures it makes."""
    if facts.preview is None:
        return {}
    pictures = facts.preview.pictures_bytes(facts.latent[1], facts.latent[2:])
    nbytes = build_layout(facts.preview.weights.refs).nbytes
    return {"ram preview": nbytes, "preview pictures": pictures}


def _unpacked_bytes(facts: Facts) -> int:
    """Of a block's matrices in the compute dtype; 0 if they are stored in it."""
    dtype, matmul = facts.dtype, facts.job.matmul
    return max(
        facts.measured(
            partial(footprint.unpacked_nbytes, block, dtype, matmul),
            "unpacked",
            block.kind,
            dtype,
            matmul.mode,
        )
        for block in facts.transformers.blocks
    )


def _latent_bytes(facts: Facts) -> int:
    return allocated_size(4 * numel(facts.latent))
