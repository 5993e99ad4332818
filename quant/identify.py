"""Names and shapes -> what a checkpoint is. Headers only; the order of the tests is checkpoint-formats 1.6."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from lowvram.errors import FileError
from lowvram.quant.deduce import Shapes, Spec, deduce, derived_family
from lowvram.quant.encodings import registry
from lowvram.quant.encodings.base import Recognised, StoredPart
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.files.header import Header, few
from lowvram.quant.files.shards import OpenReader, open_checkpoint_files
from lowvram.quant.lora import is_lora
from lowvram.quant.names import (
    BLUR_FILTER,
    CLIP,
    CLIP_OPEN,
    DIT,
    FILE_MARKERS,
    FUSED_QKV,
    TEXT,
    TEXT_GGUF,
    TIED_EMBEDDING,
    KeyStyle,
    detect_styles,
    is_vae_native,
    split_side,
    vae_renames,
)
from lowvram.quant.refs import Part, Shape, TensorRef
from lowvram.quant.stored import Group, Stored, group_by_weight, make_ref, recognise_group, refuse_packed
from lowvram.quant.vocabulary import Vocabulary, find_vocabulary

Kind = Literal["dit", "vae", "text", "clip", "lora"]

_KIND_NAMES: Mapping[str, str] = {
    "dit": "a transformer",
    "vae": "a VAE",
    "text": "a text encoder",
    "clip": "a CLIP vision encoder",
    "lora": "a LoRA",
}
_TOKENIZER = "spiece_model"
_BESIDE_CLIP = (
    "head", "visual_projection.", "text_projection.", "text_model.", "textual.", "logit_scale", "log_scale",
    "embeddings.position_ids",
)  # fmt: skip
"""Text half, projections and buffers that files of the picture half of a CLIP may hold besides."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A network found in files: its sizes and where its tensors lie. Nothing is read beyond headers."""

    kind: Kind
    spec: Spec | None
    """None for "lora", which is recognised only: its refs carry the stored names."""
    variant: str
    """dit: "t2v", "i2v", "ti2v", "i2v-clip", "flf2v", "animate"; vae: "2.1", "2.2"; text: "umt5"; else the kind."""
    refs: Mapping[str, TensorRef]
    """By native name: exactly the names and shapes of `spec.shapes()`."""
    files: tuple[Path, ...]
    metadata: Mapping[str, str]
    """Header metadata of all files; where two disagree, of the first."""
    style: str = "native"
    """How the file names its tensors: "native", "diffusers", "hf", "gguf"."""
    tokenizer: Part | Vocabulary | None = None
    """The sentencepiece model that ComfyUI text encoders carry, or the vocabulary of llama.cpp's."""


def identify_path(path: Path, open_reader: OpenReader, want: Kind | None = None) -> Checkpoint:
    """`identify` for the file, index or folder at `path`."""
    return identify(open_checkpoint_files(path, open_reader), want)


def kinds(headers: Sequence[Header]) -> tuple[Kind, ...]:
    """What the files hold, the largest network first; empty if nothing is known. An all-in-one file holds several."""
    names = [tensor.name for header in headers for tensor in header.tensors]
    if is_lora(names):
        return ("lora",)
    return tuple(style.kind for style in detect_styles(_base_names(names)))


def identify(headers: Sequence[Header], want: Kind | None = None) -> Checkpoint:
    """The checkpoint in the files of these headers; of several networks in one file the one that is `want`ed,
    or without `want` the transformer first.

    FileError if the files hold no Wan network, one that is derived from Wan but not supported, another kind than
    `want`, or a network with missing, extra or misshapen tensors.
    """
    where = headers[0].path if len(headers) == 1 else headers[0].path.parent
    refuse_packed((tensor.name for header in headers for tensor in header.tensors), where)
    groups = group_by_weight(headers)
    names = [tensor.name for header in headers for tensor in header.tensors]
    if is_lora(names):
        # Here ".alpha" and the like are the LoRA's own: nothing stands beside a quantised weight.
        single = {t.name: {"weight": Stored(t, h.path)} for h in headers for t in h.tensors}
        return _lora(want, single, headers, where)
    styles = {style.kind: style for style in detect_styles(groups)}
    chosen = next(
        (styles[kind] for kind in ("dit", "text", "vae", "clip") if kind in styles and want in (None, kind)),
        None,
    )
    if chosen is None:
        _refuse_unknown(groups, [_KIND_NAMES[kind] for kind in styles], want, where)
    return _network(chosen, groups, headers, where)


def _network(
    style: KeyStyle, groups: Mapping[str, Group], headers: Sequence[Header], where: Path
) -> Checkpoint:
    inside = {name[len(style.prefix) :]: g for name, g in groups.items() if name.startswith(style.prefix)}
    if style.kind == "dit":
        family = derived_family(inside)
        if family is not None:
            advice = "use a text-to-video or image-to-video model of Wan 2.1 or 2.2"
            raise FileError(
                f"this is a {family} checkpoint: not supported yet", where=str(where), advice=advice
            )
    to_native = _namer(style, inside, where)
    found: dict[str, tuple[Recognised, Group]] = {}
    extra: list[str] = []
    for name, group in inside.items():
        if name in FILE_MARKERS or _is_ignored(style, name, inside):
            continue
        native = to_native(name)
        if native is None:
            extra.append(name)
        elif native in found:
            _refuse(where, f"two tensors for {native}", "every tensor once")
        else:
            found[native] = (recognise_group(name, group, _bias(name, inside), where), group)
    width = _width(found)
    refs = {
        native: make_ref(native, recognised, group, _logical_shape(native, recognised.shape, width))
        for native, (recognised, group) in found.items()
    }
    refs = {name: ref for fused in refs.values() for name, ref in _unfused(fused, where).items()}
    shapes = {name: ref.shape for name, ref in refs.items()}
    metadata = _merged_metadata(headers)
    spec, variant = deduce(style.kind, shapes, metadata, where)
    _check_complete(spec.shapes(), shapes, extra, where)
    _check_scales(refs, where)
    files = tuple(dict.fromkeys(part.file for ref in refs.values() for part in ref.parts))
    tokenizer: Part | Vocabulary | None = None
    if style.kind == "text":
        tokenizer = _tokenizer(groups, style.prefix) or find_vocabulary(headers)
    return Checkpoint(style.kind, spec, variant, refs, files, metadata, style.style, tokenizer)


def _base_names(names: Iterable[str]) -> set[str]:
    return {split_side(name)[0] for name in names}


def _namer(style: KeyStyle, names: Iterable[str], where: Path) -> Callable[[str], str | None]:
    """The function from names of this style to native names."""
    if style.kind == "clip":
        return (CLIP if style.style == "hf" else CLIP_OPEN).to_native
    if style.style == "native":
        known = {"dit": DIT.knows_native, "text": TEXT.knows_native, "vae": is_vae_native}[style.kind]
        return lambda name: name if known(name) else None
    if style.kind == "dit":
        return DIT.to_native
    if style.style == "gguf":
        return TEXT_GGUF.to_native
    if style.kind == "text":
        return lambda name: "token_embedding.weight" if name == TIED_EMBEDDING else TEXT.to_native(name)
    return vae_renames(*_diffusers_vae(names, where)).to_native


def _diffusers_vae(names: Iterable[str], where: Path) -> tuple[str, int]:
    """Version and residual blocks per encoder stage, from the number of modules diffusers lists."""
    modules = {tuple(name.split(".")[2:5]) for name in names if name.startswith("encoder.down_blocks.")}
    last = {rest[2] for rest in modules if rest[:2] == ("3", "resnets") and len(rest) == 3}
    if last:
        return "2.2", len(last)
    flat = len({rest[0] for rest in modules})
    if flat < 7 or flat % 4 != 3:
        _refuse(where, f"a diffusers VAE with {flat} encoder modules", "a Wan 2.1 or 2.2 VAE")
    return "2.1", (flat - 3) // 4


def _is_ignored(style: KeyStyle, name: str, names: Mapping[str, Group]) -> bool:
    """Tensors some files carry that no Wan computation uses."""
    if style.kind == "text" and style.style == "hf":
        return name.startswith(("decoder.", "lm_head.")) or (
            name == TIED_EMBEDDING and "shared.weight" in names
        )
    if style.kind == "clip":
        return name.startswith(_BESIDE_CLIP)
    if style.style == "gguf":
        return name.startswith(("dec.", "output."))
    return style.kind == "dit" and name.endswith((".attn2.norm_added_q.weight", BLUR_FILTER))


def _bias(name: str, groups: Mapping[str, Group]) -> Stored | None:
    """The bias of the layer whose weight is called `name`."""
    return groups.get(name.removesuffix(".weight") + ".bias", {}).get("weight")


def _width(found: Mapping[str, tuple[Recognised, Group]]) -> int:
    """Rows of the patch embedding, from its bias; 0 if that is not there."""
    bias = found.get("patch_embedding.bias")
    return bias[0].shape[0] if bias is not None and len(bias[0].shape) == 1 else 0


def _unfused(ref: TensorRef, where: Path) -> dict[str, TensorRef]:
    """The tensor by its name; query, key and value by theirs, if it is all of them (`FUSED_QKV`)."""
    before, fused, parameter = ref.name.partition(f".{FUSED_QKV}.")
    if not fused:
        return {ref.name: ref}
    if not ref.shape or ref.shape[0] % 3 or not isinstance(ref.encoding, Plain):
        _refuse(
            where, f"{ref.name} is {ref.encoding.name} {list(ref.shape)}", "three equal parts in bf16 or fp16"
        )
    rows, part = ref.shape[0] // 3, ref.parts[0]
    found, shape = {}, (rows, *ref.shape[1:])
    for n, leaf in enumerate("qkv"):
        name, nbytes = f"{before}.attn.{leaf}.{parameter}", part.nbytes // 3
        piece = replace(part, offset=part.offset + n * nbytes, nbytes=nbytes, shape=shape)
        found[name] = TensorRef(name, shape, ref.encoding, (piece,))
    return found


def _logical_shape(native: str, shape: Shape, width: int) -> Shape:
    """The native shape of a tensor that other writers store in another: CLIP's embeddings as a batch of one; a patch
    convolution [D, in, 1, 2, 2] as a matrix [D, in*4], or [D*in, 1, 2, 2] where four dimensions are the limit
    (checkpoint-formats 4.1, 6.5); a bias of the motion encoder, [1, C, 1, 1], as [C]. `width`: D, or 0 if not known."""
    if ".net_app.convs." in native and native.endswith(".bias") and len(shape) == 1:
        return (1, shape[0], 1, 1)
    dims = {"class_embedding": 1, "position_embedding.weight": 2}.get(native)
    if dims is not None and set(shape[:-dims]) <= {1}:
        return shape[-dims:]
    if not native.endswith("patch_embedding.weight"):
        return shape
    if len(shape) == 2 and shape[1] % 4 == 0:
        return (shape[0], shape[1] // 4, 1, 2, 2)
    if len(shape) == 4 and shape[1:] == (1, 2, 2) and width and shape[0] % width == 0:
        return (width, shape[0] // width, 1, 2, 2)
    return shape


def _check_complete(expected: Shapes, actual: Shapes, extra: list[str], where: Path) -> None:
    missing = [name for name in expected if name not in actual]
    extra = [name for name in actual if name not in expected] + extra
    wrong = [name for name, shape in actual.items() if name in expected and shape != expected[name]]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({few(missing)})")
    if wrong:
        name = wrong[0]
        detail = f"{name} is {list(actual[name])} instead of {list(expected[name])}"
        problems.append(f"{len(wrong)} tensors have a wrong shape ({detail})")
    if extra:
        problems.append(f"{len(extra)} tensors belong to no Wan model we know ({few(extra)})")
    if not problems:
        return
    if missing:
        advice = "the file is a part of a model, or damaged: give all its files, or download it again"
    else:
        advice = "use an unmodified Wan 2.1 or 2.2 model; models derived from it may come to be supported"
    raise FileError("; ".join(problems), where=str(where), advice=advice)


def _check_scales(refs: Mapping[str, TensorRef], where: Path) -> None:
    """In a file of scaled fp8, a matrix of fp8 without a scale has lost it: its numbers would be noise."""
    fp8 = [(ref, ref.encoding.scaling) for ref in refs.values() if isinstance(ref.encoding, Fp8)]
    if all(scaling == "none" for _, scaling in fp8):
        return
    for ref, scaling in fp8:
        if scaling == "none" and not registry.keeps_precision(ref.name, ref.shape):
            _refuse(where, f"{ref.name} is fp8 without a scale, while others have one", "a scale for each")


def _tokenizer(groups: Mapping[str, Group], prefix: str) -> Part | None:
    """The sentencepiece model: beside the weights, or (all-in-one files) a level above them."""
    for name in (prefix + _TOKENIZER, prefix.removesuffix("transformer.") + _TOKENIZER):
        stored = groups.get(name, {}).get("weight")
        if stored is not None and stored.tensor.dtype == "U8" and len(stored.tensor.shape) == 1:
            tensor = stored.tensor
            return Part(_TOKENIZER, stored.file, tensor.offset, tensor.nbytes, tensor.dtype, tensor.shape)
    return None


def _merged_metadata(headers: Sequence[Header]) -> dict[str, str]:
    merged: dict[str, str] = {}
    for header in reversed(headers):
        merged |= header.metadata
    return merged


def _lora(
    want: Kind | None, groups: Mapping[str, Group], headers: Sequence[Header], where: Path
) -> Checkpoint:
    if want not in (None, "lora"):
        _refuse_unknown(groups, [_KIND_NAMES["lora"]], want, where)
    refs: dict[str, TensorRef] = {}
    for name, group in groups.items():
        parts = {role: StoredPart(s.tensor.dtype, s.tensor.shape, s.note) for role, s in group.items()}
        recognised = registry.recognise(parts)
        if recognised is not None and not recognised.flat:
            refs[name] = make_ref(name, recognised, group, recognised.shape)
    return Checkpoint("lora", None, "lora", refs, tuple(h.path for h in headers), _merged_metadata(headers))


def _refuse_unknown(groups: Mapping[str, Group], held: list[str], want: Kind | None, where: Path) -> NoReturn:
    if held and want is not None:
        found, advice = f"this is {' and '.join(held)}", f"give {_KIND_NAMES[want]}"
        raise FileError(found, where=str(where), expected=_KIND_NAMES[want], advice=advice)
    if {"decoder.22.weight", "encoder.17.weight"} <= groups.keys():
        found = "this is a tiny preview decoder (TAEHV): not supported yet"
        raise FileError(found, where=str(where), advice="use the full Wan VAE")
    if family := derived_family(groups):
        found = f"this is a {family} checkpoint without its base model: not supported yet"
        raise FileError(
            found, where=str(where), advice="use a text-to-video or image-to-video model of Wan 2.1 or 2.2"
        )
    first = few(list(groups)) or "none"
    found = f"not a model that lowvram knows: {len(groups)} tensors, the first are {first}"
    expected = "a Wan 2.1 or 2.2 transformer, VAE or text encoder, or a LoRA"
    raise FileError(found, where=str(where), expected=expected, advice="check that the right file was given")


def _refuse(where: Path, found: str, expected: str) -> NoReturn:
    advice = "check that the file is whole and is a Wan 2.1 or 2.2 model"
    raise FileError(found, where=str(where), expected=expected, advice=advice)
