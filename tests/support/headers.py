"""Tensors as headers list them: networks of known sizes in the styles that files are written in."""

from __future__ import annotations

from dataclasses import replace

from lowvram.quant.face_spec import FaceSpec
from lowvram.quant.names import CLIP_OPEN
from lowvram.quant.spec import LATENT_MEAN_22, LATENT_STD_22, DitSpec, TextSpec, VaeSpec

A14B = {"dim": 5120, "ffn": 13824, "layers": 40, "out_channels": 16}
T2V, I2V = DitSpec(**A14B, in_channels=16), DitSpec(**A14B, in_channels=36)
TI2V = DitSpec(3072, 14336, 30, 48, 48)
I2V_CLIP, FLF = (DitSpec(**A14B, in_channels=36, image_tokens=n) for n in (257, 514))
ANIMATE = replace(I2V_CLIP, face=FaceSpec())
NANO = DitSpec(256, 768, 2, 16, 16, text_dim=256, freq_dim=64)
VAE_22 = VaeSpec("2.2", 160, 256, 48, 2, LATENT_MEAN_22, LATENT_STD_22)
NANO_VAE = VaeSpec(base=16, decoder_base=16, res_blocks=1)
TEXT_TINY = TextSpec(vocab=300, dim=64, heads=4, head_dim=16, ffn=96, layers=2)


def plain(shapes, dtype="BF16", prefix=""):
    return {prefix + name: (dtype, shape) for name, shape in shapes.items()}


def renamed(shapes, renames):
    return {renames.from_native(name): shape for name, shape in shapes.items()}


def fp8_scaled(shapes, scale="scale_weight", scale_shape=(), extras=("scale_input",)):
    """As ComfyUI writes it: every matrix of a Linear in fp8 with a scale and an activation scale."""
    entries = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            entries[name] = ("F8_E4M3", shape)
            layer = name.removesuffix(".weight")
            entries[f"{layer}.{scale}"] = (
                "F32",
                scale_shape(shape) if callable(scale_shape) else scale_shape,
            )
            entries |= {f"{layer}.{extra}": ("F32", ()) for extra in extras}
        else:
            entries[name] = ("BF16", shape)
    return entries


def authors_clip(spec):
    """The picture half as the authors' file holds it: one matrix for query, key and value, batches of one."""
    entries = {}
    for name, shape in spec.shapes().items():
        if ".attn.k." in name or ".attn.v." in name:
            continue
        if ".attn.q." in name:
            name, shape = name.replace(".attn.q.", ".attn.qkv."), (3 * shape[0], *shape[1:])
        ones = {"class_embedding": (1, 1), "position_embedding.weight": (1,)}.get(name, ())
        entries[f"visual.{CLIP_OPEN.from_native(name)}"] = ("F16", (*ones, *shape))
    beside = {"visual.head": (spec.dim, 8), "log_scale": (), "textual.norm.weight": (8,)}
    return entries | {name: ("F16", shape) for name, shape in beside.items()}
