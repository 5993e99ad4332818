"""The size a video takes from its picture, and how the picture is laid onto it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lowvram.cli.options import JobFlags
from lowvram.errors import UsageError
from lowvram.framing import LONGEST, lay, size_for
from lowvram.media.resize import to_frame
from lowvram.sampling.presets import model_preset

I2V, TI2V = model_preset("wan2.2-i2v-a14b"), model_preset("wan2.2-ti2v-5b")
HD = 1280 * 720

SIDES = st.integers(64, 8000)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((1280, 720), (1280, 720)),
        ((1920, 1080), (1280, 720)),
        ((3024, 4032), (816, 1104)),
        ((1000, 1000), (960, 960)),
    ],
)
def test_the_14b_models_take_the_area_in_the_shape_of_the_picture(
    picture: tuple[int, int], size: tuple[int, int]
) -> None:
    assert size_for(I2V, *picture, HD) == size


def authors_rule(w: int, h: int, area: int, stride: int = 8, patch: int = 2) -> tuple[int, int]:
    """`lat = round(sqrt(area * h / w) // 8 // 2 * 2)`, pixels 8 * lat (wan-models 2)."""
    rows = round(math.sqrt(area * h / w) // stride // patch * patch)
    columns = round(math.sqrt(area * w / h) // stride // patch * patch)
    return columns * stride, rows * stride


@given(SIDES, SIDES, st.sampled_from([832 * 480, HD]))
@settings(max_examples=200)
def test_a_size_is_of_whole_tokens_inside_the_area_and_near_the_shape(w: int, h: int, area: int) -> None:
    for spec, unit in ((I2V, 16), (TI2V, 32)):
        try:
            width, height = size_for(spec, w, h, area)
        except UsageError:
            assert max(w / h, h / w) > 20
            continue
        assert (
            width % unit == height % unit == 0 and unit <= min(width, height) <= max(width, height) <= LONGEST
        )
        assert width * height <= area
        # Each side is less than one unit short.
        assert width > math.sqrt(area * w / h) - unit * max(1, w / h) and height > math.sqrt(
            area * h / w
        ) - unit * max(1, h / w)
        if spec is I2V:
            assert (width, height) == authors_rule(w, h, area)
        laid = lay(spec, (w, h), (width, height))
        assert 0 <= laid.left <= laid.width - width and 0 <= laid.top <= laid.height - height
        assert spec is TI2V or (laid.width, laid.height, laid.left, laid.top) == (width, height, 0, 0)


def test_5b_keeps_the_aspect_better_than_by_rounding_both_sides_down() -> None:
    assert size_for(TI2V, 1280, 704, 1280 * 704) == (1280, 704)
    assert size_for(TI2V, 1920, 1080, 1280 * 704) == (1248, 704)


def test_a_frame_of_another_shape_is_covered_and_the_middle_kept() -> None:
    laid = lay(I2V, (2000, 1000), (480, 480))
    assert (laid.width, laid.height, laid.left, laid.top) == (960, 480, 240, 0)
    laid = lay(TI2V, (1000, 3000), (640, 640))
    assert (laid.width, laid.height, laid.left, laid.top) == (640, 1920, 0, 640)


def test_480p_beside_a_picture_is_an_area_and_without_one_no_size() -> None:
    assert JobFlags(image="a.png", size="480p").settings()["area"] == 832 * 480
    assert JobFlags(image="a.png", size="832x480").settings()["width"] == 832
    with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
        JobFlags(size="480p").settings()


def test_a_sliver_is_refused() -> None:
    with pytest.raises(UsageError, match="too narrow"):
        size_for(I2V, 100_000, 10, HD)


@pytest.mark.parametrize("spec", [I2V, TI2V], ids=["bicubic", "lanczos"])
def test_a_picture_of_the_frame_s_size_is_not_touched_and_lies_upright(spec: object) -> None:
    pixels = torch.randint(
        0, 256, (32, 64, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    ).numpy()
    frame = to_frame(pixels, lay(spec, (64, 32), (64, 32)), 64, 32)  # type: ignore[arg-type]
    assert torch.allclose((frame + 1) * 127.5, torch.tensor(pixels).permute(2, 0, 1).float(), atol=1e-4)


def test_the_14b_models_resize_as_torch_s_bicubic_does() -> None:
    pixels = torch.randint(
        0, 256, (90, 160, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    frame = to_frame(pixels.numpy(), lay(I2V, (160, 90), (80, 48)), 80, 48)
    x = pixels.permute(2, 0, 1)[None] / 255
    expected = functional.interpolate((x - 0.5) / 0.5, size=(48, 80), mode="bicubic")[0]
    assert torch.allclose(frame, expected, atol=1e-5)
