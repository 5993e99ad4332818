"""The shapes a spec lists, against the published fingerprints, counts and parameters (checkpoint-formats 1.4, 7, 8)."""

from __future__ import annotations

import hashlib

import pytest

from lowvram.quant.face_spec import FaceSpec
from lowvram.quant.spec import LATENT_MEAN_22, LATENT_STD_22, DitSpec, TextSpec, VaeSpec, numel

A14B = {"dim": 5120, "ffn": 13824, "layers": 40, "out_channels": 16}
SMALL = {"dim": 1536, "ffn": 8960, "layers": 30, "out_channels": 16}
VAE_22 = VaeSpec("2.2", 160, 256, 48, 2, LATENT_MEAN_22, LATENT_STD_22)

PUBLISHED = {
    "2.1 T2V-1.3B": (DitSpec(**SMALL, in_channels=16), 825, 1_418_996_800, "9269f8db9040a9d860eaca435be61814"),
    "T2V-14B": (DitSpec(**A14B, in_channels=16), 1095, 14_288_491_584, "aafcfd9672c3a2456dc46e1cb6e52c70"),
    "I2V-A14B": (DitSpec(**A14B, in_channels=36), 1095, 14_288_901_184, "5b013604280dd715f8457c6ed6d6a626"),
    "TI2V-5B": (DitSpec(3072, 14336, 30, 48, 48), 825, 4_999_787_712, "1f5ab7703c6fc803fdded85ff040c316"),
    "2.1 I2V-14B": (
        DitSpec(**A14B, in_channels=36, image_tokens=257), 1303, 16_394_878_784, "6bfcfb3b342cb286ce886889d519a77e"
    ),
    "FLF2V-14B": (
        DitSpec(**A14B, in_channels=36, image_tokens=514), 1304, 16_395_536_704, "3ef3b1f8e1dab83d5b71fd7b617f859f"
    ),
    "Fun-14B-Control": (DitSpec(**A14B, in_channels=48, image_tokens=257), 1303, None, "efa44cddf936c70abd0ea28b6cbe946c"),
    "Fun-1.3B-InP": (DitSpec(**SMALL, in_channels=36, image_tokens=257), 983, None, "6d6ccde6845b95ad9114ab993d917893"),
    "UMT5-XXL": (TextSpec(), 242, 5_680_910_336, "9c8818c2cbea55eca56c7b447df170da"),
    "VAE 2.1": (VaeSpec(), 194, 126_892_531, "ccc42284ea13e1ad04693284c7a09be6"),
    "VAE 2.2": (VAE_22, 196, 704_688_668, "e1de6c02cdac79f8b739f4d3698cd216"),
}  # fmt: skip


def fingerprint(shapes):
    """MD5 of names and shapes, as DiffSynth-Studio publishes it for known files (checkpoint-formats 0.2)."""
    lines = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()]
    text = b",".join(sorted(line.encode() for line in [*lines, *shapes]))
    return hashlib.md5(text, usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("model", PUBLISHED)
def test_shapes_have_the_published_fingerprint_count_and_parameters(model):
    spec, tensors, parameters, md5 = PUBLISHED[model]
    shapes = spec.shapes()
    assert len(shapes) == tensors
    assert parameters is None or sum(numel(shape) for shape in shapes.values()) == parameters
    assert fingerprint(shapes) == md5


def test_animate_has_the_published_fingerprint_with_its_blur_filters():
    spec = DitSpec(**A14B, in_channels=36, image_tokens=257, face=FaceSpec())
    filters = {
        f"motion_encoder.enc.net_app.convs.{n}.{leaf}.0.kernel": (4, 4)
        for n in range(1, 8)
        for leaf in ("conv2", "skip")
    }
    shapes = spec.shapes() | filters
    assert len(shapes) == 1441
    assert sum(numel(shape) for shape in shapes.values()) == 17_274_817_108
    assert fingerprint(shapes) == "31fa352acb8a1b1d33cd8764273d80a2"


def test_the_light_vae_is_a_quarter_as_wide():
    assert VaeSpec(base=24, decoder_base=24).shapes()["decoder.conv1.bias"] == (96,)
