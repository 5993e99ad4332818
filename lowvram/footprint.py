"""What the networks allocate while they run: the product's own code on meta tensors, at the real geometry.

Every function returns bytes above what its inputs take. Buffers that are allocated once, by name, are inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lowvram.matmul import as_multiplied
from lowvram.model import Group
from lowvram.models import animate, clip, dit, umt5
from lowvram.models.self_attention import CHUNK, Workspace
from lowvram.models.token_order import DEPTH, compact_order
from lowvram.offload.allocator import ROOM
from lowvram.offload.budget import allocated_size
from lowvram.offload.estimate import Peak, peak_memory
from lowvram.preview import Decoder, decoded
from lowvram.quant.encodings.base import TORCH_DTYPES, Encoding
from lowvram.quant.face_spec import FACE_PIXELS, FACE_SCOPE
from lowvram.quant.linear import Encoded, Params
from lowvram.quant.spec import HEAD_DIM, ClipSpec, DitSpec, TextSpec, numel
from lowvram.stages.weights import Dense, to_params
from lowvram.triton_kernels.keys import carve, stored_bytes
from lowvram.triton_kernels.modes import EXACT, MODES, Matmul, Mode
from lowvram.triton_kernels.ops import TORCH, Ops

META = torch.device("meta")
_HOLES: ContextVar[bool] = ContextVar("holes", default=False)


@dataclass(frozen=True, slots=True)
class _Imitated(Encoded):
    """A weight whose decoding is known: so many bytes come, and all but the result go."""

    known: torch.dtype = torch.float32
    peak: int = 0

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        if dtype != self.known or out is not None:
            return self.encoding.decode(self.parts, self.shape, dtype, out)
        like = next(iter(self.parts.values()))
        like.new_empty(self.peak, dtype=torch.uint8)
        return like.new_empty(self.shape, dtype=dtype)


def meta_params(group: Group, dtype: torch.dtype = torch.float32) -> Params:
    """Parameters as `carve` would give them, each part a tensor of its own: fewer operations to imitate.

    Weights of one encoding and shape are decoded to `dtype` once, and from then on imitated. To be called where
    tensors are made on META.
    """
    views = {
        ref.name: {p.role: torch.empty(p.shape, dtype=TORCH_DTYPES[p.dtype]) for p in ref.parts}
        for ref in group.refs
    }
    params = to_params(group, views)
    peaks: dict[tuple[Encoding, tuple[int, ...]], int] = {}
    tensors: dict[str, Tensor | Encoded] = {}
    for name, value in params.tensors.items():
        if isinstance(value, Encoded):
            key = value.encoding, value.shape
            if key not in peaks:
                decode = partial(value.encoding.decode, shape=value.shape, dtype=dtype)
                peaks[key] = _needed(peak_memory(decode, value.parts, rounding=allocated_size))
            value = _Imitated(value.encoding, value.shape, value.parts, known=dtype, peak=peaks[key])
        tensors[name] = value
    return replace(params, tensors=tensors)


def peak(run: Callable[[Tensor], object], x: Tensor) -> int:
    return _needed(peak_memory(run, x, rounding=allocated_size))


@contextmanager
def with_holes() -> Iterator[None]:
    """Inside, footprints are what torch's allocator needs on a card: what is live, and the holes it leaves between."""
    token = _HOLES.set(True)
    try:
        yield
    finally:
        _HOLES.reset(token)


def lost_between_visits(nbytes: int) -> int:
    """What a card's allocator loses, beside its `ROOM`, where work that needs `nbytes` is done again and again.

    The pieces of one visit lie where those of another sort left holes. The larger they are the more is lost: an eighth
    has to be there for whole frames in float32, by tests/lowvram/test_conditions_at_real_size.py.
    """
    return max(0, nbytes // 8 - ROOM) if _HOLES.get() else 0


def _needed(peak: Peak) -> int:
    return peak.reach if _HOLES.get() else peak.peak_bytes


def block_scratch(
    spec: DitSpec,
    block: Group,
    tokens: int,
    per_frame: int,
    words: int,
    dtype: torch.dtype,
    *,
    group: int = 0,
    chunk: int = CHUNK,
    unpacked: bool = False,
    attention: Mode = MODES["sdpa"],
    matmul: Matmul = EXACT,
    ops: Ops = TORCH,
    residual: torch.dtype | None = None,
) -> int:
    """Transient bytes of `dit.block_` on a long sequence. Two chunks tell: later ones repeat the second.

    per_frame: tokens of a latent frame if the first ones have another time, or 0 if all have the same. words: tokens
    of the longest prompt. group: heads at a time, or 0 for all. unpacked: whether the block's weights are decoded into
    a buffer (`unpacked_nbytes`) before. matmul: how the Linears multiply. residual: what the residual stream is in, if not
    in `dtype`.
    """
    n = min(tokens, 2 * chunk)
    with META:
        p = meta_params(block, dtype)
        rows = 2 if per_frame else 1
        # some chunk holds tokens of both rows
        first = min(per_frame, n // 2) or n
        time = dit.Time(torch.empty(rows, spec.dim), torch.empty(rows, 6, spec.dim), first)
        rows_of_text = context_rows(spec, words)
        text = torch.empty(rows_of_text, spec.dim, dtype=dtype)
        image = torch.empty(spec.image_tokens, spec.dim, dtype=dtype) if spec.image_tokens else None
        context = dit.Context(text, torch.empty(rows_of_text), image)
        heads = group or spec.heads
        stored = (
            torch.empty(nbytes, dtype=torch.uint8) for nbytes in stored_bytes(attention, heads, tokens, dtype)
        )
        keys = carve(attention, heads, tokens, dtype, *stored)
        x, rope = torch.empty(n, spec.dim, dtype=residual or dtype), torch.empty(n, HEAD_DIM // 2, 2)
        out = torch.empty(n, spec.dim, dtype=dtype) if group else None
        work = Workspace(keys, dtype, out, chunk, ops)
        finite = torch.ones(len(dit.PARTS), dtype=torch.bool)
        scratch = torch.empty(as_multiplied(p, matmul, ops, dtype).unpacked_nbytes(dtype), dtype=torch.uint8)
    factors = factor_bytes(tokens) - factor_bytes(n) if group else 0

    def run(x: Tensor) -> None:
        before = as_multiplied(
            p, matmul, ops, dtype
        )  # LoRAs are made ready while those of the last block are there
        ready = as_multiplied(p, matmul, ops, dtype)
        del before
        ready = ready.unpacked(dtype, scratch) if unpacked else ready
        dit.block_(ready, x, time, context, rope, work, finite)

    return factors + peak(run, x)


def factor_bytes(tokens: int) -> int:
    """The norm factors of q and k where heads are processed in groups: float32, one a token."""
    return 2 * allocated_size(4 * tokens)


def time_bytes(spec: DitSpec, time_rows: int) -> int:
    """Bytes of one step's `dit.Time`: a row of the head and six of the blocks, float32."""
    return allocated_size(4 * spec.dim * time_rows) + allocated_size(24 * spec.dim * time_rows)


def unpacked_nbytes(block: Group, dtype: torch.dtype, matmul: Matmul = EXACT) -> int:
    """Bytes of the buffer for the matrices of a block in `dtype`; 0 if they are stored as they are multiplied."""
    with META:
        return as_multiplied(meta_params(block, dtype), matmul, TORCH, dtype).unpacked_nbytes(dtype)


def context_rows(spec: DitSpec, words: int) -> int:
    """Rows of the text context of a prompt of `words` tokens: the zero padding is merged into at most two."""
    return words + min(2, spec.text_len - words)


def embed_scratch(
    spec: DitSpec, outer: Group, grid: tuple[int, int, int], dtype: torch.dtype, *, slabs: bool = False
) -> int:
    """Transient bytes of `dit.embed_framewise_` into a residual stream of any dtype, a frame at a time or by the slabs of
    `compact_order`."""
    frames, rows, columns = grid
    frames = min(frames, 1 + DEPTH) if slabs else 1
    with META:
        p = meta_params(outer, dtype)
        order = compact_order((frames, rows, columns), framewise=bool(spec.face_blocks)) if slabs else None
        latent = torch.empty(spec.out_channels, frames, 2 * rows, 2 * columns)
        beside = spec.in_channels - spec.out_channels
        given = torch.empty(beside, *latent.shape[1:]) if beside else None
        x = torch.empty(frames * rows * columns, spec.dim, dtype=dtype)
    return peak(lambda latent: dit.embed_framewise_(p, spec, latent, given, x, dtype, order=order), latent)


def prepare_scratch(
    spec: DitSpec, outer: Group, lengths: Sequence[int], steps: int, time_rows: int, dtype: torch.dtype
) -> int:
    """Bytes at the peak of using one transformer's outer weights: what is kept of them included."""
    with META:
        p = meta_params(outer, dtype)
        text = torch.empty(max(lengths), spec.text_dim, dtype=dtype)
        tokens = torch.empty(spec.image_tokens, spec.image_dim, dtype=dtype)

    def run(text: Tensor) -> None:
        kept: list[object] = [dit.embed_image(p, tokens.clone())] if spec.image_tokens else []
        kept += [dit.embed_text(p, spec, text[:n]) for n in lengths]
        t = torch.zeros(time_rows, dtype=torch.float64)
        kept += [dit.embed_time(p, spec, t, 1) for _ in range(min(steps, 2))]
        kept += [t.new_empty(rows, dtype=torch.uint8) for rows in [time_bytes(spec, time_rows)] * (steps - 2)]
        kept.append(p.copied(dit.ENDS))

    return peak(run, text)


def attend_scratch(
    spec: DitSpec,
    block: Group,
    tokens: int,
    slots: int,
    dtype: torch.dtype,
    chunk: int,
    residual: torch.dtype | None = None,
) -> int:
    """Transient bytes of the face adapter behind a block, on a long sequence; 0 if none is there. residual: as above."""
    if spec.face is None or not any(ref.name.startswith(FACE_SCOPE) for ref in block.refs):
        return 0
    with META:
        p = meta_params(block, dtype).scope(FACE_SCOPE)
        per_slot = tokens // slots
        x = torch.empty(-(-min(tokens, 2 * chunk) // per_slot) * per_slot, spec.dim, dtype=residual or dtype)
        kv = torch.empty(2, x.shape[0] // per_slot, spec.heads, spec.face.tokens, HEAD_DIM, dtype=dtype)
        finite = torch.ones(len(dit.PARTS), dtype=torch.bool)
    return peak(lambda x: animate.attend_(p, x, animate.FaceKV(kv[0], kv[1]), chunk, finite), x)


def faces_scratch(spec: DitSpec, encoders: Group, adapter: Group, frames: int, dtype: torch.dtype) -> int:
    """Transient bytes of a clip's faces on their way to keys and values, what is kept of them included."""
    assert spec.face is not None
    with META:
        p, q = meta_params(encoders), meta_params(adapter)
        face = torch.empty(1, 3, FACE_PIXELS, FACE_PIXELS)

    def run(face: Tensor) -> None:
        basis = animate.directions(p)
        vectors = torch.empty(frames, basis.shape[0])
        vectors[:1] = animate.motion_vectors(p, face.clone(), basis)
        animate.keys_values(q, animate.face_tokens(p, vectors).to(dtype))

    return peak(run, face)


def head_scratch(
    spec: DitSpec, outer: Group, grid: tuple[int, int, int], dtype: torch.dtype, *, chunk: int = CHUNK
) -> int:
    """Transient bytes of `dit.head` behind a residual stream in `dtype`, its result included. Two chunks tell: later
    ones repeat the second."""
    tokens = numel(grid)
    n = min(tokens, 2 * chunk)
    with META:
        p = meta_params(outer, dtype)
        time = dit.Time(torch.empty(1, spec.dim), torch.empty(1, 6, spec.dim), n)
        x = torch.empty(n, spec.dim, dtype=dtype)
        out, whole = (torch.empty(rows, 4 * spec.out_channels) for rows in (n, tokens))
    project = peak(lambda x: dit.head_rows(p, x, time, out, chunk), x)
    return allocated_size(whole.nbytes) + max(project, peak(lambda y: dit.from_patches(y, spec, grid), whole))


def text_scratch(spec: TextSpec, layer: Group, rows: int, dtype: torch.dtype) -> int:
    """Transient bytes of one text layer on `rows` tokens."""
    with META:
        p = meta_params(layer, dtype)
        x, buckets = torch.empty(rows, spec.dim, dtype=dtype), umt5.relative_buckets(rows)
    return peak(lambda x: umt5.layer(p, spec, x, buckets), x)


def clip_embed_scratch(spec: ClipSpec, outer: Group, dtype: torch.dtype) -> int:
    """Transient bytes of the embedding of one picture in the CLIP vision tower, its rows included."""
    with META:
        p, picture = meta_params(outer, dtype), torch.empty(3, spec.side, spec.side)
    return peak(lambda picture: clip.embed(p, spec, picture, dtype), picture)


def clip_layer_scratch(spec: ClipSpec, layer: Group, dtype: torch.dtype) -> int:
    """Transient bytes of one layer of the CLIP vision tower on one picture, its result included."""
    with META:
        p, x = meta_params(layer, dtype), torch.empty(spec.tokens, spec.dim, dtype=dtype)
    return peak(lambda x: clip.layer(p, spec, x), x)


def preview_scratch(decoder: Decoder, latent: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """Transient bytes of `preview.decoded` on a latent [C, F, h, w]. Two latent frames tell: later ones repeat the second."""
    with META:
        w = Dense(meta_params(decoder.weights), dtype)
        x = torch.empty(latent[0], min(2, latent[1]), *latent[2:])

    def run(x: Tensor) -> None:
        for _ in decoded(x, x, 0.5, decoder, w):
            pass

    with torch.no_grad():
        return peak(run, x)
