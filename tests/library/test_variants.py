"""The real keys and shapes of every published network, in every way people store them, are known for what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from headers import authors_clip

from lowvram.discovery import is_embedded
from lowvram.library.entries import models_with
from lowvram.quant.encodings.base import Encoding
from lowvram.quant.face_spec import FaceSpec
from lowvram.quant.identify import identify
from lowvram.quant.names import CLIP, DIT, TEXT, TEXT_GGUF, vae_renames
from lowvram.quant.refs import Shape
from lowvram.quant.spec import ClipSpec, DitSpec, VaeSpec
from lowvram.sampling.presets import load_models, model_preset

Shapes = Mapping[str, Shape]
Entries = dict[str, tuple[str, Shape]]

A14B = {"dim": 5120, "ffn": 13824, "layers": 40, "out_channels": 16}
ALL = [name for name in load_models() if not is_embedded(name)]
OF_21_VAE = [name for name in ALL if name != "wan2.2-ti2v-5b"]
NETWORKS: dict[str, tuple[Any, str, str, list[str]]] = {
    # what: spec, kind, variant, known models it is a part of
    "t2v 14B": (DitSpec(**A14B, in_channels=16), "dit", "t2v", ["wan2.2-t2v-a14b", "wan2.1-t2v-14b"]),
    "i2v A14B": (DitSpec(**A14B, in_channels=36), "dit", "i2v", ["wan2.2-i2v-a14b"]),
    "ti2v 5B": (DitSpec(3072, 14336, 30, 48, 48), "dit", "ti2v", ["wan2.2-ti2v-5b"]),
    "t2v 1.3B": (DitSpec(1536, 8960, 30, 16, 16), "dit", "t2v", ["wan2.1-t2v-1.3b"]),
    "i2v 14B 2.1": (DitSpec(**A14B, in_channels=36, image_tokens=257), "dit", "i2v-clip", ["wan2.1-i2v-14b"]),
    "flf2v 14B 2.1": (
        DitSpec(**A14B, in_channels=36, image_tokens=514),
        "dit",
        "flf2v",
        ["wan2.1-flf2v-14b"],
    ),
    "animate 14B": (
        DitSpec(**A14B, in_channels=36, image_tokens=257, face=FaceSpec()),
        "dit",
        "animate",
        ["wan2.2-animate-14b"],
    ),
    "CLIP": (
        ClipSpec(),
        "clip",
        "clip",
        ["wan2.1-i2v-14b", "wan2.1-flf2v-14b", "wan2.2-animate-14b"],
    ),
    "VAE 2.1": (model_preset("wan2.2-t2v-a14b").vae, "vae", "2.1", OF_21_VAE),
    "VAE 2.2": (model_preset("wan2.2-ti2v-5b").vae, "vae", "2.2", ["wan2.2-ti2v-5b"]),
    "UMT5": (model_preset("wan2.2-t2v-a14b").text, "text", "umt5", ALL),
}


def native(shapes: Shapes) -> Entries:
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def prefixed(prefix: str) -> Callable[[Shapes], Entries]:
    return lambda shapes: {f"{prefix}{name}": ("F16", shape) for name, shape in shapes.items()}


def renamed(table: Any) -> Callable[[Shapes], Entries]:
    return lambda shapes: {table.from_native(name): ("BF16", shape) for name, shape in shapes.items()}


def flattened(shapes: Shapes) -> Entries:
    """As stable-diffusion.cpp writes it: a fifth dimension folded away."""
    entries = native(shapes)
    d, inputs, *rest = shapes["patch_embedding.weight"]
    return entries | {"patch_embedding.weight": ("F32", (d * inputs, *rest))}


def quantised(weight: str, dtype: str, extra: Callable[[str, Shape], Entries]) -> Callable[[Shapes], Entries]:
    """Matrices of blocks in `dtype` under another name, with what belongs to them."""

    def write(shapes: Shapes) -> Entries:
        entries: Entries = {}
        for name, shape in shapes.items():
            if (
                len(shape) == 2
                and name.startswith("blocks.")
                and name.endswith(".weight")
                and "pos_emb" not in name
            ):
                layer = name.removesuffix(".weight")
                entries[layer + weight] = (dtype, shape)
                entries |= extra(layer, shape)
            else:
                entries[name] = ("BF16", shape)
        return entries

    return write


COMFY = quantised(".weight", "F8_E4M3", lambda layer, shape: {f"{layer}.scale_weight": ("F32", ())})
LIGHTX2V = quantised(".weight", "I8", lambda layer, shape: {f"{layer}.weight_scale": ("F32", (shape[0], 1))})
QUANTO = quantised(
    ".weight._data", "I8", lambda layer, shape: {f"{layer}.weight._scale": ("BF16", (shape[0], 1))}
)
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.", "module.")
DIT_STYLES: dict[str, Callable[[Shapes], Entries]] = {
    "native": native,
    **{prefix: prefixed(prefix) for prefix in PREFIXES},
    "diffusers": renamed(DIT),
    "folded": flattened,
    "ComfyUI fp8": COMFY,
    "LightX2V int8": LIGHTX2V,
    "WanGP quanto": QUANTO,
}
TEXT_STYLES = {
    "native": native,
    "hf": renamed(TEXT),
    "gguf": renamed(TEXT_GGUF),
    "ComfyUI": lambda shapes: {**renamed(TEXT)(shapes), "spiece_model": ("U8", (4_548_313,))},
    "LightX2V int8": LIGHTX2V,
    "WanGP quanto": QUANTO,
}


BLUR_FILTERS = {
    f"motion_encoder.enc.net_app.convs.{n}.{leaf}.0.kernel": (4, 4)
    for n in range(1, 8)
    for leaf in ("conv2", "skip")
}


def animate_in_diffusers(shapes: Shapes) -> Entries:
    """Keys and values of the face adapters apart, biases of the motion encoder without their ones."""
    apart: dict[str, Shape] = {}
    for name, (rows, *rest) in shapes.items():
        if ".linear1_kv." in name:
            apart |= {name.replace("_kv", f"_{half}"): (rows // 2, *rest) for half in "kv"}
        else:
            apart[name] = (rows, *rest)
    entries = renamed(DIT)(apart)
    return {n: (code, s[1:2] if "act_fn" in n else s) for n, (code, s) in entries.items()}


ANIMATE_STYLES = {
    **DIT_STYLES,
    "authors', with blur filters": lambda shapes: native({**shapes, **BLUR_FILTERS}),
    "diffusers": animate_in_diffusers,
}


def hf_clip(prefix: str) -> Callable[[Shapes], Entries]:
    def write(shapes: Shapes) -> Entries:
        entries = {f"{prefix}{name}": part for name, part in renamed(CLIP)(shapes).items()}
        return entries | {"visual_projection.weight": ("F16", (1024, 1280))}

    return write


CLIP_STYLES = {
    "authors'": lambda shapes: authors_clip(ClipSpec()),
    "hf": hf_clip("vision_model."),
    "hf of transformers 5": hf_clip(""),
}


def vae_styles(spec: VaeSpec) -> dict[str, Callable[[Shapes], Entries]]:
    return {
        "native": native,
        "model.": prefixed("model."),
        "diffusers": renamed(vae_renames(spec.version, spec.res_blocks)),
    }


def styles(what: str) -> dict[str, Callable[[Shapes], Entries]]:
    spec, kind, variant, _ = NETWORKS[what]
    if kind == "vae":
        return vae_styles(spec)
    tables = {"text": TEXT_STYLES, "clip": CLIP_STYLES, "dit": DIT_STYLES}
    return ANIMATE_STYLES if variant == "animate" else tables[kind]


@pytest.mark.parametrize(("what", "style"), [(what, style) for what in NETWORKS for style in styles(what)])
def test_a_network_is_known_in_every_style(what: str, style: str, header_of: Callable[..., Any]) -> None:
    spec, kind, variant, names = NETWORKS[what]
    found = identify([header_of(styles(what)[style](spec.shapes()))])
    assert (found.kind, found.variant) == (kind, variant)
    if (variant, style) == ("animate", "diffusers"):
        spec = replace(spec, face=FaceSpec(split_kv=True))
    assert {name: ref.shape for name, ref in found.refs.items()} == spec.shapes()
    fits, standard = models_with(found)
    assert ([name for name in fits if not is_embedded(name)], standard) == (names, True)
    assert all(isinstance(ref.encoding, Encoding) for ref in found.refs.values())


def test_every_model_of_the_registry_is_among_them() -> None:
    known = {name for _, kind, _, names in NETWORKS.values() if kind == "dit" for name in names}
    assert known == set(ALL)
    models = [load_models()[name] for name in ALL]
    assert {(m.variant, m.dit) for m in models} == {
        (load_models()[names[0]].variant, spec) for spec, kind, _, names in NETWORKS.values() if kind == "dit"
    }
