"""Headers of whole networks in which a few names, shapes and dtypes are changed are a network or are refused: what
`tests/formats/test_mutants.py` is to bytes."""

from __future__ import annotations

import random

import pytest
from headers import NANO, NANO_VAE, TEXT_TINY, VAE_22, authors_clip, fp8_scaled, plain, renamed

from lowvram.errors import FileError
from lowvram.offload.slab import build_layout, read_runs
from lowvram.quant.identify import identify, kinds
from lowvram.quant.lora import is_lora, match_lora
from lowvram.quant.names import CLIP, DIT, TEXT, TEXT_GGUF, vae_renames
from lowvram.quant.refs import DTYPE_BITS
from lowvram.quant.spec import ClipSpec

CLIP_TINY = ClipSpec(160, 320, 2, tokens=5)
LORA = {
    f"diffusion_model.blocks.{n}.ffn.0.{leaf}": ("BF16", shape)
    for n in range(2)
    for leaf, shape in {"lora_down.weight": (4, 256), "lora_up.weight": (768, 4), "alpha": (), "diff_b": (768,)}.items()
}  # fmt: skip
WHOLE = {
    "transformer": plain(NANO.shapes()),
    "transformer of diffusers": plain(renamed(NANO.shapes(), DIT)),
    "transformer in fp8": fp8_scaled(NANO.shapes()),
    "vae": plain(NANO_VAE.shapes()),
    "vae of diffusers": plain(renamed(NANO_VAE.shapes(), vae_renames("2.1", 1))),
    "vae 2.2 of diffusers": plain(renamed(VAE_22.shapes(), vae_renames("2.2", 2))),
    "text encoder": fp8_scaled(TEXT_TINY.shapes(), "weight_scale", lambda shape: (shape[0], 1)),
    "text encoder of transformers": plain(renamed(TEXT_TINY.shapes(), TEXT)),
    "text encoder of llama.cpp": plain(renamed(TEXT_TINY.shapes(), TEXT_GGUF)),
    "clip": authors_clip(CLIP_TINY),
    "clip of transformers": plain(renamed(CLIP_TINY.shapes(), CLIP)),
    "lora": LORA,
}
WORDS = (
    "", "0", "3", "-1", "blocks", "encoder", "resnets", "attn", "to_qkv", "q", "weight", "bias", "gamma", "modulation",
    "scale_weight", "weight_scale", "weight_scale_2", "comfy_quant", "alpha", "_data", "absmax", "lora_A", "dora_scale",
)  # fmt: skip
SIZES = (0, 1, 2, 3, 16, 128, 255, 256, 768, 1 << 31)


def changed(entries, draw: random.Random):
    entries = dict(entries)
    for _ in range(draw.randint(1, 4)):
        name = draw.choice(list(entries))
        dtype, shape = entries[name]
        match draw.randrange(5):
            case 0 if len(entries) > 1:
                del entries[name]
            case 1:
                entries[name] = (draw.choice(list(DTYPE_BITS)), shape)
            case 2:
                sizes = tuple(draw.choice((*shape, *SIZES)) for _ in range(draw.randrange(6)))
                entries[name] = (dtype, draw.choice(((), shape[1:], (1, *shape), sizes)))
            case 3:
                entries[changed_name(name, draw)] = (dtype, shape)
            case _:
                entries[changed_name(name, draw)] = entries.pop(name)
    return entries


def changed_name(name: str, draw: random.Random) -> str:
    """A word less, more or other, or the words up to some place."""
    words = name.split(".")
    at = draw.randrange(len(words) + 1)
    return ".".join(
        [*words[:at], *draw.choices(WORDS, k=draw.randrange(2)), *words[at + draw.choice((0, 1, 9, 9)) :]]
    )


@pytest.mark.parametrize("what", WHOLE)
def test_a_changed_header_is_a_network_or_is_refused(what, header_of):
    read = 0
    for seed in range(150):
        entries = changed(WHOLE[what], random.Random(f"{what} {seed}")) if seed else WHOLE[what]
        header = header_of(entries)
        kinds([header])
        try:
            if is_lora(entries):
                match_lora([header], NANO, partial=True)
            else:
                found = identify([header])
                read_runs(build_layout(found.refs.values()))
                assert {name: ref.shape for name, ref in found.refs.items()} == found.spec.shapes()
            read += 1
        except FileError as error:
            assert seed and error.where and error.advice
    assert read
