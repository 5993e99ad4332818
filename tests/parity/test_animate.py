"""Wan-Animate's networks against diffusers' WanAnimateTransformer3DModel, and the traps of its face branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.models import animate, dit
from lowvram.models.self_attention import plain_workspace
from lowvram.models.token_order import TokenOrder, compact_order
from lowvram.offload.device import CpuDevice
from lowvram.offload.rows import HostRows
from lowvram.quant.face_spec import FACE_PIXELS, FACE_SCOPE, FaceSpec
from lowvram.quant.linear import Params
from lowvram.quant.names import DIT
from lowvram.quant.spec import DitSpec

Error = Callable[[Tensor, Tensor], float]
Noise = Callable[..., Tensor]

EXACT = 1e-5
FACE = FaceSpec((4, 4, 6, 6, 8, 8, 8, 8), style=12, directions=5, motion=16, hidden=24, heads=2, every=2)
SPEC = DitSpec(256, 512, 4, 36, 16, text_dim=64, image_tokens=257, image_dim=160, face=FACE)
FRAMES, GRID = 9, (4, 3, 5)
"""Nine frames of the driving video make three latents; with the reference picture four slots of 3x5 tokens."""


@dataclass(frozen=True)
class Case:
    """A transformer in both forms; `reference` is a diffusers WanAnimateTransformer3DModel in float32."""

    reference: Any
    params: Params

    def blocks(self) -> list[Params]:
        """Each block with the adapter that follows it, as a slab holds them."""
        scopes = []
        for n in range(SPEC.layers):
            p = self.params.scope(f"blocks.{n}.")
            if n in SPEC.face_blocks:
                adapter = self.adapter(SPEC.face_blocks.index(n))
                p = Params(dict(p.tensors) | {FACE_SCOPE + k: v for k, v in adapter.tensors.items()})
            scopes.append(p)
        return scopes

    def adapter(self, n: int) -> Params:
        return self.params.scope(f"face_adapter.fuser_blocks.{n}.")

    def kv(self, tokens: Tensor) -> dict[int, animate.FaceKV]:
        return {b: animate.keys_values(self.adapter(i), tokens) for i, b in enumerate(SPEC.face_blocks)}

    def motion(self, faces: Tensor) -> Tensor:
        return animate.motion_vectors(self.params, faces, animate.directions(self.params))

    def tokens(self, faces: Tensor) -> Tensor:
        return animate.face_tokens(self.params, self.motion(faces))


@pytest.fixture(scope="module")
def case(animate_reference: tuple[DitSpec, Any]) -> Case:
    spec, model = animate_reference
    shapes = replace(spec, face=replace(FACE, split_kv=True)).shapes()
    weights = {}
    for name, tensor in model.state_dict().items():
        native = DIT.to_native(name)
        assert native is not None, name
        weights[native] = tensor.view(shapes[native])
    assert weights.keys() == shapes.keys() and spec == SPEC
    return Case(model, Params(weights))


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    """Arguments of a whole forward."""
    generator = torch.Generator().manual_seed(22)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    f, h, w = GRID
    return {
        "latent": draw(36, f, 2 * h, 2 * w),
        "pose": draw(16, f - 1, 2 * h, 2 * w),
        "text": draw(30, 64),
        "image": draw(257, 160),
        "faces": torch.rand((FRAMES, 3, FACE_PIXELS, FACE_PIXELS), generator=generator) * 2 - 1,
    }


@pytest.fixture(scope="module")
def truth(case: Case, given: dict[str, Tensor]) -> Tensor:
    text = torch.cat([given["text"], torch.zeros(512 - 30, 64)])
    with torch.no_grad():
        out: Tensor = case.reference(
            given["latent"][None],
            torch.tensor([713.0]),
            text[None],
            given["image"][None],
            given["pose"][None],
            given["faces"].transpose(0, 1)[None],
        ).sample[0]
    return out


def forward(
    case: Case,
    given: dict[str, Tensor],
    chunk: int,
    group: int = 0,
    away: bool = False,
    order: TokenOrder | None = None,
) -> Tensor:
    f, h, w = GRID
    n = f * h * w
    with torch.inference_mode():
        driving = animate.Driving(given["pose"], case.kv(case.tokens(given["faces"])))
        context = dit.embed_text(case.params, SPEC, given["text"], given["image"])
        time = dit.embed_time(case.params, SPEC, torch.tensor([713.0]), n)
        garbage = torch.full((2, group or SPEC.heads, n, 128), float("nan"))
        work = plain_workspace(
            garbage[0], garbage[1], torch.full((n, SPEC.dim), float("nan")) if group else None, chunk
        )
        if away:
            rows = HostRows(CpuDevice(), "x", n, SPEC.dim, torch.float32, chunk)
            work = replace(work, residuals=(rows,))
        contexts = [replace(context, driving=driving)]
        return dit.forward(
            case.params, case.blocks(), SPEC, given["latent"], time, contexts,
            dit.rope_table(*GRID, order=order), work, order=order,
        )[0]  # fmt: skip


@pytest.mark.parametrize(("chunk", "group"), [(4096, 0), (15, 0), (16, 0), (7, 1)])
def test_the_whole_forward_equals_the_reference_for_any_chunk(
    case: Case, given: dict[str, Tensor], truth: Tensor, error: Error, chunk: int, group: int
) -> None:
    assert error(forward(case, given, chunk, group), truth) <= EXACT


@pytest.mark.parametrize(("chunk", "group"), [(4096, 0), (16, 0), (7, 1)])
def test_a_residual_on_the_host_changes_no_bit(
    case: Case, given: dict[str, Tensor], chunk: int, group: int
) -> None:
    on_host, on_device = (forward(case, given, chunk, group, away=each) for each in (True, False))
    assert torch.equal(on_host, on_device)


def test_the_whole_forward_equals_the_reference_with_the_tokens_of_a_frame_in_another_order(
    case: Case, given: dict[str, Tensor], truth: Tensor, error: Error
) -> None:
    order = compact_order(GRID, framewise=True)
    assert not torch.equal(order.raster, torch.arange(len(order.raster)))
    assert error(forward(case, given, 15, order=order), truth) <= EXACT


def test_the_motion_encoder_equals_the_reference(case: Case, given: dict[str, Tensor], error: Error) -> None:
    with torch.no_grad():
        assert error(case.motion(given["faces"]), case.reference.motion_encoder(given["faces"])) <= EXACT


@pytest.mark.parametrize("frames", [1, 5, 9, 77])
def test_the_face_encoder_equals_the_reference_behind_a_slot_of_zeros(
    case: Case, noise: Noise, error: Error, frames: int
) -> None:
    motion = noise(frames, FACE.motion, seed=23)
    with torch.no_grad():
        tokens, expected = (
            animate.face_tokens(case.params, motion),
            case.reference.face_encoder(motion[None])[0],
        )
    assert tokens.shape == (1 + (frames + 3) // 4, FACE.tokens, SPEC.dim)
    assert error(tokens[1:], expected) <= EXACT
    assert not tokens[0].any()


@pytest.mark.parametrize("chunk", [4096, 15, 7, 1])
def test_an_adapter_equals_the_reference_for_any_chunk(
    case: Case, noise: Noise, error: Error, chunk: int
) -> None:
    tokens, x = noise(4, FACE.tokens, SPEC.dim, seed=24), noise(60, SPEC.dim, seed=25)
    with torch.inference_mode():
        expected = x + case.reference.face_adapter[1](x[None], tokens[None])[0]
        animate.attend_(case.adapter(1), x, animate.keys_values(case.adapter(1), tokens), chunk)
    assert error(x, expected) <= EXACT


def test_one_matrix_of_keys_and_values_is_the_same_as_two(case: Case, noise: Noise) -> None:
    tokens, split = noise(4, FACE.tokens, SPEC.dim, seed=24), dict(case.adapter(0).tensors)
    for leaf in ("weight", "bias"):
        parts = [split.pop(f"linear1_{half}.{leaf}") for half in "kv"]
        split[f"linear1_kv.{leaf}"] = torch.cat(parts)  # type: ignore[arg-type]
    joined, apart = animate.keys_values(Params(split), tokens), animate.keys_values(case.adapter(0), tokens)
    torch.testing.assert_close(joined.k, apart.k, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined.v, apart.v, rtol=1e-5, atol=1e-6)


# ---- traps (wan-models 5.2 to 5.4): each is a mistake that would pass a glance


def test_the_pose_does_not_reach_the_reference_pictures_slot(case: Case, given: dict[str, Tensor]) -> None:
    per_slot = GRID[1] * GRID[2]
    x = torch.zeros(GRID[0] * per_slot, SPEC.dim)
    frames = given["pose"].split(1, dim=1)
    animate.add_pose_(
        x, (dit.embed_latent(case.params, SPEC, f, x.dtype, "pose_patch_embedding") for f in frames), 7
    )
    whole = dit.embed_latent(case.params, SPEC, given["pose"], x.dtype, "pose_patch_embedding")
    assert not x[:per_slot].any()
    torch.testing.assert_close(x[per_slot:], whole)


def test_a_slots_tokens_hear_of_no_other_slots_face(case: Case, noise: Noise) -> None:
    tokens = noise(4, FACE.tokens, SPEC.dim, seed=24)
    other = tokens.clone()
    other[2] = noise(FACE.tokens, SPEC.dim, seed=26)
    heard = []
    for each in (tokens, other):
        x = noise(60, SPEC.dim, seed=25)
        with torch.inference_mode():
            animate.attend_(case.adapter(0), x, animate.keys_values(case.adapter(0), each), 16)
        heard.append(x)
    changed = (heard[0] != heard[1]).any(1)
    assert changed[30:45].all() and not changed[:30].any() and not changed[45:].any()


def test_adapter_keys_are_normed_by_head_and_values_are_not(case: Case, noise: Noise) -> None:
    p, tokens = dict(case.adapter(0).tensors), noise(2, FACE.tokens, SPEC.dim, seed=24)
    p["k_norm.weight"] = torch.ones(128)
    kv = animate.keys_values(Params(p), tokens)
    square = kv.k.square().mean(-1)
    torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-4, atol=1e-4)
    assert (kv.v.square().mean(-1) - 1).abs().max() > 0.05


def test_the_face_encoder_never_looks_ahead(case: Case, noise: Noise) -> None:
    motion = noise(9, FACE.motion, seed=27)
    later = motion.clone()
    later[5:] = noise(4, FACE.motion, seed=28)
    a, b = (animate.face_tokens(case.params, m) for m in (motion, later))
    assert torch.equal(a[:3], b[:3]) and not torch.equal(a[3], b[3])


def test_the_directions_keep_the_sign_of_the_householder_reflections(case: Case) -> None:
    weight = case.params["motion_encoder.dec.direction.weight"]
    basis = animate.directions(case.params)
    torch.testing.assert_close(basis.T @ basis, torch.eye(FACE.directions), rtol=0, atol=1e-5)
    # LAPACK reflects each column onto minus its own direction: with positive diagonals every sign would be other.
    diagonal = (basis.T @ weight).diagonal()
    assert (diagonal < 0).any()
    assert torch.equal(basis, torch.linalg.qr(weight + 1e-8).Q)
