from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowvram.errors import OutOfMemoryError
from lowvram.offload.budget import allocated_size
from lowvram.offload.device import CpuDevice
from lowvram.offload.estimate import Peak, peak_memory, track
from lowvram.triton_kernels.attention import attention as kernel


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


def real_peak(fn: Callable[..., object], *args: Tensor) -> Peak:
    with track() as tracker:
        fn(*args)
    return tracker.peak()


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = functional.gelu(functional.linear(x, up), approximate="tanh")
    return x + functional.linear(hidden, down)


def attention(x: Tensor, qkv: Tensor) -> Tensor:
    q, k, v = functional.linear(x, qkv).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
    q = functional.rms_norm(q, (8,))
    scores = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, dim=-1)
    plain = (scores @ v).transpose(1, 2).flatten(2)
    fused = kernel(q, k, v)
    return x + plain.sub_(fused)


def chunked(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for rows, to in zip(x.split(5, dim=1), out.split(5, dim=1), strict=True):
        torch.add(rows, mlp(rows, up, down), out=to)
    return out


MLP = (torch.randn(2, 17, 32), torch.randn(96, 32), torch.randn(32, 96))
ATTENTION = (torch.randn(2, 17, 32), torch.randn(96, 32))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("fn", "args"), [(mlp, MLP), (chunked, MLP), (attention, ATTENTION)], ids=["mlp", "chunked", "attention"]
)
def test_predicted_and_measured_peaks_are_equal(
    fn: Callable[..., Tensor], args: tuple[Tensor, ...], inference: bool
) -> None:
    with torch.inference_mode(inference):
        fake, real = peak_memory(fn, *args), real_peak(fn, *args)
    assert fake.peak_bytes == real.peak_bytes > 0
    assert [live.nbytes for live in fake.live] == [live.nbytes for live in real.live]
    assert sum(live.nbytes for live in fake.live) == fake.peak_bytes


def test_the_peak_of_an_mlp_is_its_two_hidden_states() -> None:
    peak = peak_memory(mlp, *MLP)
    assert peak.peak_bytes == 2 * (2 * 17 * 96 * 4)
    assert ["gelu" in live.where or "mm" in live.where for live in peak.live] == [True, True]
    assert all("at test_estimate.py:" in live.where for live in peak.live)


def test_chunks_make_the_peak_smaller() -> None:
    assert peak_memory(chunked, *MLP).peak_bytes < peak_memory(mlp, *MLP).peak_bytes


def test_what_is_freed_is_not_counted() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(10):
            x = x * 2
        return x

    x = torch.zeros(100)
    assert peak_memory(chain, x).peak_bytes == real_peak(chain, x).peak_bytes == 2 * 400


def test_views_and_in_place_operations_add_nothing() -> None:
    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.view(10, 10).t()[2:5].reshape(-1, 1).flatten()
        return x.add_(1).mul_(2).unsqueeze(0), y

    x = torch.zeros(100)
    assert peak_memory(look, x).peak_bytes == real_peak(look, x).peak_bytes == 3 * 10 * 4


def test_an_operation_seen_before_is_counted_like_the_first_time() -> None:
    def repeated(x: Tensor) -> list[Tensor]:
        kept = []
        for _ in range(3):
            y = x.transpose(1, 2) @ x  # a view of what a batched product made
            kept.append(y.to(memory_format=torch.contiguous_format) + x.norm(dim=2, keepdim=True).sum())
            kept.append(x[:, ::2].clamp_min(1) if len(kept) > 2 else x[:, ::2].clamp_min(1.0))
        return kept

    x = torch.randn(2, 30, 30)
    assert peak_memory(repeated, x).peak_bytes == real_peak(repeated, x).peak_bytes


def test_pointwise_results_of_other_sizes_are_counted_like_the_first() -> None:
    def pointwise(x: Tensor) -> list[Tensor]:
        kept = []
        for part in (x[:8], x[8:], x[:, :5], x[:, ::2].transpose(0, 1), x[0]):
            kept += [
                part * 2,
                part > 0,
                part.to(torch.bfloat16) + 1,
                part + torch.ones(1),
            ]
            kept[-2].mul_(2).add_(kept[-2])
        return kept

    x = torch.randn(30, 30)
    fake, real = peak_memory(pointwise, x), real_peak(pointwise, x)
    assert fake.peak_bytes == real.peak_bytes
    assert [live.nbytes for live in fake.live] == [live.nbytes for live in real.live]


def test_out_arguments_are_counted_as_large_as_they_become() -> None:
    def grown(x: Tensor) -> Tensor:
        out = torch.empty(0)
        return torch.cat([x, x], out=out)

    x = torch.zeros(100)
    assert peak_memory(grown, x).peak_bytes == real_peak(grown, x).peak_bytes == 800


def test_outputs_of_custom_operations_are_counted() -> None:
    @torch.library.custom_op("lowvram_test_estimate::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return torch.cat([x, x])

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(2 * x.shape[0])

    x = torch.zeros(100)
    fake = peak_memory(lambda x: twice(x) + 1, x)
    assert fake.peak_bytes == real_peak(lambda x: twice(x) + 1, x).peak_bytes == 1600
    assert fake.live[0].where.startswith(("lowvram_test_estimate.twice", "aten.add"))


def test_constants_are_counted_where_they_are_real() -> None:
    def constant() -> Tensor:
        return torch.tensor([1.0, 2.0, 3.0]) * 2

    assert real_peak(constant).peak_bytes == 2 * 12
    assert peak_memory(constant).peak_bytes == 12


def test_what_leaves_the_device_is_not_counted() -> None:
    x = torch.empty(10, device="meta")
    assert peak_memory(lambda x: (x * 2).to("cpu", torch.float64), x).peak_bytes == 40


def test_parameters_that_are_not_arguments_may_be_real() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8))
    x = torch.zeros(5, 8)
    assert peak_memory(model, x).peak_bytes == real_peak(model, x).peak_bytes == 2 * 5 * 64 * 4


def test_sizes_no_machine_has_are_estimated_from_meta_tensors() -> None:
    x = torch.empty(1, 10**6, 5120, dtype=torch.bfloat16, device="meta")
    up, down = torch.empty(13824, 5120, device="meta"), torch.empty(5120, 13824, device="meta")
    peak = peak_memory(mlp, x, up.to(torch.bfloat16), down.to(torch.bfloat16))
    assert peak.peak_bytes == 2 * (10**6 * 13824 * 2)


def test_rounding_applies_to_each_storage() -> None:
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2

    assert peak_memory(two, torch.zeros(1), rounding=allocated_size).peak_bytes == 1024


@pytest.mark.parametrize("real", [False, True])
def test_the_capacity_is_a_hard_cap(real: bool) -> None:
    size = 2 * 17 * 96 * 4
    with pytest.raises(OutOfMemoryError, match="gelu"):
        if real:
            with track(capacity=2 * size - 1):
                mlp(*MLP)
        else:
            peak_memory(mlp, *MLP, capacity=2 * size - 1)
    assert peak_memory(mlp, *MLP, capacity=2 * size).peak_bytes == 2 * size


def test_results_that_outlive_the_block_are_let_go_later() -> None:
    with track() as tracker:
        kept = torch.zeros(10)
        torch.zeros(90)
    assert (tracker.live_bytes, tracker.peak().peak_bytes) == (40, 400)
    del kept
    assert (tracker.live_bytes, tracker.peak().peak_bytes) == (0, 400)


def test_another_device_type_is_not_counted() -> None:
    with track(device="cuda") as tracker:
        torch.zeros(10)
    assert tracker.peak().peak_bytes == 0


def test_memory_of_a_cpu_device_is_counted_and_host_memory_is_not() -> None:
    device = CpuDevice()
    with track() as tracker:
        slot, ring = device.alloc("slot 0", 1000), device.host_alloc("ring 0", 50_000)
        slot.tensor.copy_(ring.tensor[:1000])
    assert tracker.live_bytes == 1000
    slot.free()
    assert tracker.live_bytes == 0
