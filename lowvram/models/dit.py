"""The Wan diffusion transformer.

Order of operations, formulas and dtypes follow the native implementation (Wan-Video/Wan2.2
`wan/modules/model.py`); deviations are stated where they stand. Two forms of a block live here: `block`, plain
and differentiable, is the reference; `block_` does the same in place and by chunks, so that beside the residual
stream only K and V of all tokens exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowvram.models import animate
from lowvram.models.rows import Rows, watch
from lowvram.models.self_attention import CHUNK, SelfAttention, Workspace, chunks, modulated
from lowvram.models.token_order import TokenOrder
from lowvram.quant.face_spec import FACE_SCOPE
from lowvram.quant.linear import Gated, Params
from lowvram.quant.spec import DitSpec
from lowvram.triton_kernels.attention import attention
from lowvram.triton_kernels.modulate import gated as _gated
from lowvram.triton_kernels.modulate import gelu as _gelu
from lowvram.triton_kernels.modulate import layer_norm as _layer_norm
from lowvram.triton_kernels.modulate import modulate as _modulate
from lowvram.triton_kernels.norm_rope import EPS
from lowvram.triton_kernels.norm_rope import heads as _heads
from lowvram.triton_kernels.norm_rope import rms_norm as _rms_norm
from lowvram.triton_kernels.norm_rope import rotate as _rotate
from lowvram.triton_kernels.ops import Ops
from lowvram.triton_kernels.quantise import QuantisedRows

ENDS = ("patch_embedding.", "pose_patch_embedding.", "head.")
"""How the names outside the blocks begin that every step needs."""
W8A8_LINEARS = ("self_attn.", "cross_attn.", "ffn.")
"""How the names inside a block begin of the Linears that may multiply 8 bits: all but those of a face adapter."""
PARTS = ("self attention", "cross attention", "FFN", "face adapter")
"""What a block adds to the residual stream, in order; the last in some blocks of Animate only."""
ROPE_THETA = 10000.0
ROPE_PAIRS = (22, 21, 21)
"""Complex pairs of a head given to time, rows and columns."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the transformer is told beside the latent and the time: one prompt and what goes with it."""

    text: Tensor
    """[..., n, dim] embedded text rows; zero padding merged into the last one or two (see `embed_text`)."""
    bias: Tensor
    """[..., n] float32, added to the attention logits of each row."""
    image: Tensor | None = None
    """[..., 257 or 514, dim] embedded CLIP tokens."""
    driving: animate.Driving | None = None


@dataclass(frozen=True, slots=True)
class Time:
    """Time embedding of one step: one row for all tokens, or rows for the first latent frames and one for the rest."""

    head: Tensor
    """[..., rows, dim] float32: modulates the head."""
    blocks: Tensor
    """[..., rows, 6, dim] float32: modulates the blocks."""
    tokens_per_row: int
    """Tokens that share a row: those of a latent frame. The last row serves all that follow."""

    def row(self, token: int) -> int:
        """The row of a token."""
        return min(token // self.tokens_per_row, self.head.shape[-2] - 1)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Tokens start..stop in runs that share a row."""
        while start < stop:
            last = self.row(start) == self.head.shape[-2] - 1
            end = stop if last else min(stop, (self.row(start) + 1) * self.tokens_per_row)
            yield start, end
            start = end

    def rows(self, values: Tensor, start: int, stop: int, step: int = 1) -> Tensor:
        """What tokens start, start + step.. take of values [..., rows, dim]: [..., 1, dim] if they share a row."""
        first, last = self.row(start), self.row(stop - 1)
        if first == last:
            return values[..., first : first + 1, :]
        tokens = torch.arange(start, stop, step, device=values.device)
        rows = (tokens // self.tokens_per_row).clamp_max_(values.shape[-2] - 1)
        return values.index_select(-2, rows)


# ---- embeddings


def embed_latent(
    outer: Params,
    spec: DitSpec,
    latent: Tensor,
    dtype: torch.dtype,
    name: str = "patch_embedding",
    order: Tensor | None = None,
) -> Tensor:
    """latent [..., C, F, H, W] -> tokens [..., F*H/2*W/2, dim] in `dtype`, row-major over (f, h, w) or in `order`.

    A convolution with kernel = stride = (1, 2, 2) is a Linear on each patch, channel slowest.
    """
    patches = latent.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # [..., C, F, h, 2, w, 2]
    patches = patches.movedim((-6, -3, -1), (-3, -2, -1)).flatten(-3)  # [..., F, h, w, C*4]
    patches = patches.flatten(-4, -2)
    return outer.linear(name, (patches if order is None else patches.index_select(-2, order)).to(dtype))


def embed_framewise_(
    outer: Params,
    spec: DitSpec,
    latent: Tensor,
    given: Tensor | None,
    x: Rows,
    dtype: torch.dtype,
    chunk: int = CHUNK,
    order: TokenOrder | None = None,
) -> None:
    """`embed_latent` in `dtype` of latent [C, F, H, W] and the channels given beside it into x, a latent frame or a slab at
    a time."""
    f, per_frame = latent.shape[1], latent.shape[2] * latent.shape[3] // 4
    for n, (first, end) in enumerate(((n, n + 1) for n in range(f)) if order is None else order.slabs):
        frames = latent[:, first:end]
        if given is not None:
            frames = torch.cat([frames, given[:, first:end]])
        tokens = embed_latent(outer, spec, frames, dtype, order=None if order is None else order.inside(n))
        for i, j in chunks(tokens.shape[0], chunk):
            x[first * per_frame + i : first * per_frame + j] = tokens[i:j]


def embed_text(outer: Params, spec: DitSpec, text: Tensor, image: Tensor | None = None) -> Context:
    """UMT5 output [n, text_dim] of the prompt's true length -> Context of up to n + 2 rows, at most text_len.

    Upstream pads the text with zero rows to `text_len` and attends to all of them. Those rows are equal, so one
    or two of them, with the logarithm of the number each stands for added to its logit, are the same attention.
    """
    padding = _padding_bias(spec.text_len - text.shape[0])
    bias = torch.tensor([0.0] * text.shape[0] + padding, dtype=torch.float32, device=text.device)
    text = torch.cat([text, text.new_zeros(len(padding), text.shape[1])])
    rows = outer.linear("text_embedding.0", text)
    rows = outer.linear("text_embedding.2", functional.gelu(rows, approximate="tanh"))
    return Context(rows, bias, None if image is None else embed_image(outer, image))


def _padding_bias(count: int) -> list[float]:
    """Logit offsets of the rows that stand for `count` equal rows, at most two: sum(exp) = count.

    ln(count) alone would lose up to 1.6 % of the padding's weight when it is rounded to bfloat16. A multiple of
    1/32 is exact there and takes at least 97 % of the weight, so rounding the rest costs 0.03 % at most.
    """
    if count == 0:
        return []
    first = math.floor(32 * math.log(count)) / 32
    rest = count - math.exp(first)
    return [first, math.log(rest)] if rest > 0 else [first]


def embed_image(outer: Params, image: Tensor) -> Tensor:
    """CLIP tokens [257 or 514, image_dim] -> [.., dim]. LayerNorm eps 1e-5, exact GELU."""
    if "img_emb.emb_pos" in outer:
        image = image + outer.dense("img_emb.emb_pos", image.dtype)[0]
    dtype = image.dtype
    x = _affine_norm(image, outer["img_emb.proj.0.weight"], outer["img_emb.proj.0.bias"], dtype, 1e-5)
    x = outer.linear("img_emb.proj.3", functional.gelu(outer.linear("img_emb.proj.1", x)))
    return _affine_norm(x, outer["img_emb.proj.4.weight"], outer["img_emb.proj.4.bias"], dtype, 1e-5)


def embed_time(outer: Params, spec: DitSpec, t: Tensor, tokens_per_row: int) -> Time:
    """t [..., rows] on the 0..1000 scale -> Time. Sinusoid in float64 (cosines first), the rest in float32."""
    half = spec.freq_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angle = t.double().unsqueeze(-1) * ROPE_THETA**-exponent
    x = torch.cat([angle.cos(), angle.sin()], dim=-1).float()
    e = outer.linear("time_embedding.2", functional.silu(outer.linear("time_embedding.0", x)))
    e0 = outer.linear("time_projection.1", functional.silu(e)).unflatten(-1, (6, spec.dim))
    return Time(e, e0, tokens_per_row)


def rope_table(
    frames: int,
    rows: int,
    columns: int,
    device: torch.device | None = None,
    order: TokenOrder | None = None,
) -> Tensor:
    """Rotations [F*h*w, 64, 2] float32 (cos, sin) of a grid of tokens, row-major or in `order`, from float64 angles.

    Each axis has its own spectrum: pos * 10000^(-2i/D) with D = 44, 42, 42 channels for time, rows, columns.
    """
    angles = []
    for size, pairs in zip((frames, rows, columns), ROPE_PAIRS, strict=True):
        frequency = ROPE_THETA ** -(torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
        angles.append(torch.arange(size, dtype=torch.float64, device=device).outer(frequency))
    t, h, w = angles
    grid = torch.cat(
        [
            t[:, None, None].expand(-1, rows, columns, -1),
            h[None, :, None].expand(frames, -1, columns, -1),
            w[None, None, :].expand(frames, rows, -1, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    if order is not None:
        grid = grid[order.raster]
    return torch.stack([grid.cos().float(), grid.sin().float()], dim=-1)


# ---- pieces of a block


def _affine_norm(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, eps: float = EPS) -> Tensor:
    return functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(dtype)


def _self_q(p: Params, h: Tensor, rope: Tensor) -> Tensor:
    return _rotate(_heads(_rms_norm(p.linear("self_attn.q", h), p["self_attn.norm_q.weight"])), rope)


def _self_k(p: Params, h: Tensor, rope: Tensor) -> Tensor:
    return _rotate(_heads(_rms_norm(p.linear("self_attn.k", h), p["self_attn.norm_k.weight"])), rope)


def _self_v(p: Params, h: Tensor) -> Tensor:
    return _heads(p.linear("self_attn.v", h))


@dataclass(frozen=True, slots=True)
class _CrossKV:
    """Keys and values of one block's cross attention: [..., heads, n, 128]."""

    k: Tensor
    v: Tensor
    bias: Tensor
    k_image: Tensor | None = None
    v_image: Tensor | None = None


def _cross_kv(p: Params, context: Context) -> _CrossKV:
    k = _heads(_rms_norm(p.linear("cross_attn.k", context.text), p["cross_attn.norm_k.weight"]))
    v = _heads(p.linear("cross_attn.v", context.text))
    bias = context.bias.to(k.dtype)[..., None, None, :]
    if context.image is None:
        return _CrossKV(k, v, bias)
    k_image = _heads(
        _rms_norm(p.linear("cross_attn.k_img", context.image), p["cross_attn.norm_k_img.weight"])
    )
    return _CrossKV(k, v, bias, k_image, _heads(p.linear("cross_attn.v_img", context.image)))


def _cross(p: Params, x: Tensor, kv: _CrossKV) -> Tensor:
    """Cross attention of the residual stream x [..., n, dim] to text and, if there is one, image: in their dtype."""
    h = _affine_norm(x, p["norm3.weight"], p["norm3.bias"], kv.k.dtype)
    q = _heads(_rms_norm(p.linear("cross_attn.q", h), p["cross_attn.norm_q.weight"]))
    y = attention(q, kv.k, kv.v, kv.bias)
    if kv.k_image is not None and kv.v_image is not None:
        y = y + attention(q, kv.k_image, kv.v_image)
    return p.linear("cross_attn.o", y)


def _ffn(p: Params, h: Tensor) -> Tensor:
    return p.linear("ffn.2", _gelu(p.linear("ffn.0", h)))


def _activated(p: Params, ops: Ops, h: Tensor) -> Tensor | QuantisedRows:
    """What the second Linear of the FFN takes; h is lost."""
    taking = p.takes("ffn.2")
    return ops.gelu(h) if taking is None else taking.ops.gelu(h, taking.group)


class _Modulation:
    """Shift, scale and gate of attention, then of the FFN, for any run of tokens."""

    def __init__(self, p: Params, time: Time) -> None:
        self._values = p["modulation"].float() + time.blocks  # [..., rows, 6, dim]
        self._time = time

    def __call__(self, index: int, start: int, stop: int, step: int = 1) -> Tensor:
        """Part `index` (0..5) of tokens start, start + step..: [..., 1, dim] if they share a row, else one each."""
        return self._time.rows(self._values[..., index, :], start, stop, step)

    def gates(self, index: int, start: int, stop: int) -> Iterator[Gated]:
        """Part `index` of tokens start..stop by runs that share a row, counted from the first of these tokens."""
        for i, j in self._time.runs(start, stop):
            yield slice(i - start, j - start), self(index, i, j)


# ---- blocks


def block(p: Params, x: Tensor, time: Time, context: Context, rope: Tensor) -> Tensor:
    """One transformer block, plain and differentiable: x [..., L, dim] -> the same shape and dtype."""
    n = x.shape[-2]
    mod = _Modulation(p, time)
    h = _modulate(x, mod(0, 0, n), mod(1, 0, n))
    y = attention(_self_q(p, h, rope), _self_k(p, h, rope), _self_v(p, h))
    x = _gated(x, p.linear("self_attn.o", y), mod(2, 0, n))
    x = x + _cross(p, x, _cross_kv(p, context))
    h = _modulate(x, mod(3, 0, n), mod(4, 0, n))
    return _gated(x, _ffn(p, h), mod(5, 0, n))


def block_(
    p: Params,
    x: Rows,
    time: Time,
    context: Context,
    rope: Tensor,
    work: Workspace,
    finite: Tensor | None = None,
) -> None:
    """`block` on x [L, dim] in place, `work.chunk` tokens at a time.

    Sweeps before the last fill K and V, of all heads or of one group after the other; the last carries each chunk
    through the rest of the block. A chunk of x is overwritten only after its own query was taken, and keys and
    values were taken before, so no copy is needed.

    finite: a truth for each of PARTS on the device of x, made false where the residual stream is not finite behind it.
    """
    mod, ops, kv = _Modulation(p, time), work.ops, _cross_kv(p, context)
    attend = SelfAttention(p, x, mod, rope, work)
    if work.out is not None:
        for rows in attend.groups():
            attend.fill(rows)
            for i, j in chunks(x.shape[0], work.chunk):
                attend(i, j, rows, work.out[i:j, rows])
    else:
        attend.fill(None)
    for i, j in chunks(x.shape[0], work.chunk):
        y = attend(i, j, None) if work.out is None else work.out[i:j]
        c = x[i:j]
        p.linear_gated_("self_attn.o", y, c, mod.gates(2, i, j), ops.gated_)
        watch(finite, 0, c)
        c += _cross(p, c, kv)
        watch(finite, 1, c)
        h = modulated(p, ops, ("ffn.0",), c, mod(3, i, j), mod(4, i, j), work.dtype)
        p.linear_gated_("ffn.2", _activated(p, ops, p.linear("ffn.0", h)), c, mod.gates(5, i, j), ops.gated_)
        watch(finite, 2, c)
        if not isinstance(x, Tensor):  # what was worked on is a copy
            x[i:j] = c


# ---- head and whole


def head(
    outer: Params,
    spec: DitSpec,
    x: Tensor | Rows,
    time: Time,
    grid: tuple[int, int, int],
    chunk: int = CHUNK,
    order: TokenOrder | None = None,
) -> Tensor:
    """x [..., L, dim] -> velocity [..., C_out, F, H, W] float32. Modulated by e, not e0; all in float32.

    grid: latent frames, and rows and columns of tokens. A token's vector is ordered (p_h, p_w, channel).
    """
    out = torch.empty(*x.shape[:-1], 4 * spec.out_channels, device=x.device)
    head_rows(outer, x, time, out, chunk, order)
    return from_patches(out, spec, grid)


def head_rows(
    outer: Params,
    x: Tensor | Rows,
    time: Time,
    out: Tensor,
    chunk: int,
    order: TokenOrder | None = None,
) -> None:
    """The head of every token of x [..., L, dim] into out [..., L, 4 * C_out] float32, row-major whatever the order of x."""
    shift, scale = (outer["head.modulation"].float() + time.head.unsqueeze(-2)).unbind(-2)
    for i, j in chunks(x.shape[-2], chunk):
        s, g = time.rows(shift, i, j), time.rows(scale, i, j)
        c = x[..., i:j, :] if isinstance(x, Tensor) else x[i:j]
        rows = outer.linear("head.head", _layer_norm(c) * (1 + g) + s)
        if order is None:
            out[..., i:j, :] = rows
        else:
            out.index_copy_(-2, order.raster[i:j], rows)


def from_patches(out: Tensor, spec: DitSpec, grid: tuple[int, int, int]) -> Tensor:
    """[..., L, 4 * C_out] -> [..., C_out, F, H, W]."""
    out = out.unflatten(-1, (2, 2, spec.out_channels)).unflatten(-4, grid)
    # [..., F, h, w, p_h, p_w, C] -> [..., C, F, h, p_h, w, p_w]
    return out.movedim((-1, -3), (-6, -3)).flatten(-2).flatten(-3, -2)


def forward(
    outer: Params,
    blocks: Iterable[Params],
    spec: DitSpec,
    latent: Tensor,
    time: Time,
    contexts: Sequence[Context],
    rope: Tensor,
    work: Workspace,
    given: Tensor | None = None,
    first: Workspace | None = None,
    finite: Tensor | None = None,
    order: TokenOrder | None = None,
) -> list[Tensor]:
    """One evaluation per context: latent [C, F, H, W] -> velocities [C_out, F, H, W] float32.

    What is multiplied is in the dtype of the workspace; the residual streams in theirs.

    given: channels [C', F, H, W] float32 that follow those of the latent, the same in every step. first: the
    workspace of the first block, if another attention mode runs there. finite: [blocks, PARTS] bool, see `block_`.
    order: of the tokens between patches and head, that of `rope`; one frame after the other where a face is heard.

    Each block is used for all contexts before the next is asked for, so guidance costs no second weight pass.
    """
    _, f, height, width = latent.shape
    grid = (f, height // 2, width // 2)
    if spec.face_blocks and order is not None and len(order.slabs) != f:
        raise ValueError("a face is heard frame by frame: the order of tokens has to be framewise")
    shape = math.prod(grid), spec.dim
    streams: Sequence[Rows] = work.residuals or [latent.new_empty(shape, dtype=work.dtype) for _ in contexts]
    streams = streams[: len(contexts)]
    for x, context in zip(streams, contexts, strict=True):
        embed_framewise_(outer, spec, latent, given, x, work.dtype, work.chunk, order)
        if context.driving is not None:
            poses = context.driving.pose.split(1, dim=1)
            places = [None if order is None else order.inside(n + 1) for n in range(len(poses))]
            animate.add_pose_(
                x,
                (
                    embed_latent(outer, spec, pose, work.dtype, "pose_patch_embedding", inside)
                    for pose, inside in zip(poses, places, strict=True)
                ),
                work.chunk,
            )
    for n, stored in enumerate(blocks):
        p = stored if work.unpacked is None else stored.unpacked(work.dtype, work.unpacked)
        for x, context in zip(streams, contexts, strict=True):
            here = first if first is not None and n == 0 else work
            flags = None if finite is None else finite[n]
            block_(p, x, time, context, rope, here, flags)
            if context.driving is not None and n in spec.face_blocks:
                animate.attend_(p.scope(FACE_SCOPE), x, context.driving.kv[n], work.chunk, flags)
    return [head(outer, spec, x, time, grid, work.chunk, order) for x in streams]
