"""8-bit attention in torch: near the exact one, whatever the data; and how keys and values are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvram.offload.estimate import peak_memory
from lowvram.triton_kernels.attention import V_RUN, _sdpa, attend_, attention, sdpa_order
from lowvram.triton_kernels.keys import Keys, attend, carve, finish_, stored_bytes, write_keys_, write_values_
from lowvram.triton_kernels.modes import MODES
from lowvram.triton_kernels.norm_rope import balance_of, hadamard
from lowvram.triton_kernels.norm_rope import heads as heads_of
from lowvram.triton_kernels.ops import FUSED, TORCH

OURS = [m.name for m in MODES.values() if m.ours]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(name: str, tokens: int, heads: int, chunk: int, dtype: torch.dtype = torch.float32) -> Keys:
    """Keys of some projections, written chunk by chunk into buffers of garbage."""
    mode = MODES[name]
    garbage = [
        torch.full((n + 64,), 0x7F, dtype=torch.uint8) for n in stored_bytes(mode, heads, tokens, dtype)
    ]
    keys = carve(mode, heads, tokens, dtype, *garbage)
    k, v = (normal(tokens, heads * 128, seed=s).to(dtype) for s in (1, 2))
    for start in range(0, tokens, chunk):
        some = slice(start, start + chunk)
        write_keys_(TORCH, keys, start, k[some], torch.ones(heads * 128), turns(tokens)[some], None, None)
        write_values_(TORCH, keys, start, v[some])
    finish_(keys)
    return keys


def turns(tokens: int) -> Tensor:
    angle = normal(tokens, 64, seed=3)
    return torch.stack([angle.cos(), angle.sin()], -1)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("tokens", [1, 70, 2500])
def test_a_mode_is_near_exact_attention_and_does_not_depend_on_chunks(name: str, tokens: int) -> None:
    heads = 2
    q, weight, rope = normal(50, heads * 128), torch.ones(heads * 128), turns(50)
    exact = attend(TORCH, filled("sdpa", tokens, heads, tokens), q, weight, rope, None)
    got = attend(TORCH, filled(name, tokens, heads, tokens), q, weight, rope, None)
    if name != "sparse" or tokens == 1:  # half of the tiles of noise is not near all of them
        assert (got - exact).norm() < 0.04 * exact.norm()
    again = torch.full((50, 3 * heads * 128), 7.0)
    attend(TORCH, filled(name, tokens, heads, V_RUN), q, weight, rope, None, again[:, 256:512])
    assert torch.equal(again[:, 256:512], got)
    assert (again[:, :256] == 7).all() and (again[:, 512:] == 7).all()


def test_heads_of_exact_attention_are_joined_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card, the result of torch's attention lies as the queries do."""
    kept, made = filled("sdpa", 70, 2, 70), []

    def attention_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made.append(_sdpa(q, k, v, None))
        return made[-1]

    monkeypatch.setattr("lowvram.triton_kernels.keys.attention", attention_of)
    attend(TORCH, kept, normal(50, 256), torch.ones(256), turns(50), None)
    assert made[0].is_contiguous() and made[0]._base is not None


@pytest.mark.parametrize(("card", "cudnn", "first"), [
    ((8, 6), 92000, "flash"), ((8, 9), 92000, "flash"), ((12, 0), 92000, "flash"),
    ((9, 0), 91900, "cudnn"), ((10, 3), 91900, "cudnn"), ((9, 0), 91002, "flash"), ((9, 0), None, "flash"),
])  # fmt: skip
def test_torch_is_asked_for_what_is_fast_and_sound_on_a_card(
    card: tuple[int, int], cudnn: int | None, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    q = torch.empty(1, 2, 4, 128)
    asked = [backend.name.split("_")[0].lower() for backend in sdpa_order(q)]
    assert asked[0] == first and asked[-3:] == ["flash", "efficient", "math"]
    assert [backend.name for backend in sdpa_order(q, biased=True)] == ["EFFICIENT_ATTENTION", "MATH"]


@pytest.mark.parametrize("name", ["int8", "int8-fp16", "int8-fp8", "sparse"])
def test_a_mode_stores_less_than_bfloat16(name: str) -> None:
    keys, values = stored_bytes(MODES[name], 40, 111_600, torch.bfloat16)
    plain = 2 * 40 * 111_600 * 128
    assert keys < 0.56 * plain
    assert values < (0.51 if name == "int8-fp8" else 1.01) * plain


def test_rows_quantised_in_chunks_let_projections_die_before_attention() -> None:
    """q, k and v of 1280x720 with 121 frames: 3.4 GB as bfloat16, 2.3 GB as R2 takes them."""
    n, heads, chunk = 111_600, 40, 4096
    with torch.device("meta"):
        x, weight = torch.empty(n, 5120, dtype=torch.bfloat16), torch.empty(5120, 5120, dtype=torch.bfloat16)
        norm, rope, out = torch.empty(5120), torch.empty(n, 64, 2), torch.empty(n, 5120, dtype=torch.bfloat16)
        runs = torch.empty(heads, -(-n // V_RUN), 128)

    def joint(x: Tensor) -> None:
        q, k, v = (x.new_empty(heads, n, 128) for _ in "qkv")
        for some in slices():
            for rows in (q, k):
                FUSED.norm_rope_(rows[:, some], x[some] @ weight, norm, rope[some], None)
            v[:, some] = heads_of(x[some] @ weight)
        out.copy_(attention(q, k, v))

    def early(x: Tensor) -> None:
        q, k = (x.new_empty(heads, n, 128, dtype=torch.int8) for _ in "qk")
        scales, v = (
            x.new_empty(2, heads, n, dtype=torch.float32),
            x.new_empty(heads, n, 128, dtype=torch.float16),
        )
        for some in slices():
            for rows, scale in zip((q, k), scales, strict=True):
                FUSED.norm_rope_int8_(
                    rows[:, some], scale[:, some], x[some] @ weight, norm, rope[some], None, None
                )
            FUSED.quantise_values_(v[:, some], runs, x[some] @ weight, "fp16")
        attend_(out, q, scales[0], k, scales[1], v, runs, v_format="fp16", half=True)

    def slices() -> list[slice]:
        return [slice(start, start + chunk) for start in range(0, n, chunk)]

    plain = 2 * n * 5120
    passing = 2 * chunk * 5120  # a chunk's projection
    assert 3 * plain <= peak_memory(joint, x).peak_bytes - plain <= 3 * plain + 2 * passing
    assert 2 * plain <= peak_memory(early, x).peak_bytes <= 2 * plain + 8 * heads * n + passing < 2.37e9


def test_the_hadamard_matrix_is_orthogonal_and_its_own_transpose() -> None:
    matrix = hadamard(torch.empty(0))
    assert torch.equal(matrix, matrix.mT) and torch.equal(matrix @ matrix, 128 * torch.eye(128))
    assert torch.equal(matrix, torch.kron(torch.tensor([[1.0, 1], [1, -1]]), matrix[:64, :64]))


def test_a_balance_changes_no_product_and_makes_the_smallest_lengths() -> None:
    q, k = normal(2, 200, 128), normal(2, 300, 128, seed=1)
    k[..., 6:8] *= 16
    k[..., 9] += 100  # an offset is the centre's to take away
    q[..., 32:40] /= 4
    balance = balance_of(q, k)
    want = torch.ones(128)
    want[6:8], want[32:40] = 4, 2
    assert torch.equal(balance, want.expand(2, 128))
    scale = balance.unsqueeze(-2)
    assert torch.equal((q * scale)[:, :5, None] * (k / scale)[:, None, :5], q[:, :5, None] * k[:, None, :5])


@pytest.mark.parametrize(("q", "k"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e-30, 1e30)])
def test_a_balance_of_a_sample_that_says_nothing_is_finite(q: float, k: float) -> None:
    balance = balance_of(normal(1, 3, 128) * q, normal(1, 3, 128, seed=1) * k)
    assert balance.min() >= 2**-4 and balance.max() <= 2**4


def test_the_ops_hold_what_torch_asks_of_ops() -> None:
    keys = filled("int8-fp16", 70, 2, 70)
    q = torch.zeros(2, 5, 128, dtype=torch.int8)
    args = (torch.empty(5, 256), q, torch.ones(2, 5), keys.k, keys.k_scale, keys.v, keys.v_scale, None)
    torch.library.opcheck(torch.ops.lowvram.attend_.default, (*args, "fp16", True))
    torch.library.opcheck(
        torch.ops.lowvram.attention.default, (normal(2, 5, 128), normal(2, 7, 128), normal(2, 7, 128), None)
    )


def test_without_a_card_the_op_is_its_reference() -> None:
    keys = filled("int8-fp8", 100, 1, 100)
    q, scale = torch.randint(-127, 128, (1, 3, 128), dtype=torch.int8), torch.full((1, 3), 0.01)
    out = torch.empty(3, 128)
    attend_(out, q, scale, keys.k, keys.k_scale, keys.v, keys.v_scale, v_format="fp8", half=True)
    rows = (q.float() * scale[..., None], keys.k.float() * keys.k_scale[..., None])
    values = (keys.v[..., :100].mT.float()) * keys.v_scale
    assert (out - attention(*rows, values)).norm() < 0.04 * out.norm()
