"""The second pass: when it is needed and what is made of it."""

from __future__ import annotations

import pytest
import torch

from lowvram.errors import InternalError
from lowvram.sampling.guidance import combine, needs_uncond


@pytest.mark.parametrize(("scale", "needed"), [(1.0, False), (1.0000001, True), (0.0, True), (5.0, True)])
def test_only_a_scale_of_exactly_one_saves_the_second_pass(scale: float, needed: bool) -> None:
    assert needs_uncond(scale) is needed


def test_combine_is_uncond_plus_scaled_difference_in_float32() -> None:
    torch.manual_seed(0)
    c, u = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(combine(c, u, 3.5), u + 3.5 * (c - u))
    assert torch.allclose(combine(c, u, 0.0), u)


def test_combine_computes_in_float32_whatever_the_passes_are_in() -> None:
    c, u = torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    result = combine(c, u, 5.0)
    assert result.dtype == torch.float32
    assert result.item() == 1.0 + 5.0 * 255.0


def test_at_scale_one_the_first_pass_comes_back_unrounded_with_or_without_the_second() -> None:
    c, u = torch.tensor([0.1]), torch.tensor([1e8])
    assert torch.equal(combine(c, u, 1.0), c)
    assert torch.equal(combine(c, None, 1.0), c)


def test_neither_pass_is_changed() -> None:
    c, u = torch.ones(3), torch.zeros(3)
    combine(c, u, 4.0)
    assert torch.equal(c, torch.ones(3))
    assert torch.equal(u, torch.zeros(3))


def test_a_missing_or_broadcastable_second_pass_is_refused() -> None:
    with pytest.raises(InternalError):
        combine(torch.ones(3), None, 2.0)
    with pytest.raises(InternalError):
        combine(torch.ones(2, 3), torch.ones(3), 2.0)
