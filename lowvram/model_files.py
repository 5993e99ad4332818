"""A model from its files: networks recognised from headers, LoRAs matched. Nothing else is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from lowvram.errors import FileError, UsageError
from lowvram.fewstep import acts_on
from lowvram.job import LoraChoice
from lowvram.library.naming import family_of
from lowvram.library.parts import FLAGS, PART_NAMES
from lowvram.model import Lora, Model, Transformer
from lowvram.offload.io import Opener
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.files.header import shown
from lowvram.quant.files.shards import open_checkpoint_files
from lowvram.quant.identify import Checkpoint, identify_path
from lowvram.quant.lora import LoraSet, match_lora
from lowvram.quant.refs import Part
from lowvram.quant.spec import CLIP_TOKENS, ClipSpec, DitSpec, ModelSpec, TextSpec, VaeSpec
from lowvram.sampling.presets import load_models


def open_model(name: str, files: Mapping[str, str]) -> Model:
    """Recognise the files of a model. FileError for a part that is missing or not what it should be, UsageError for one
    transformer where the model has two, and the other way round."""
    experts = ("high", "low") if "high" in files or "low" in files else ("single",)
    if (known := load_models().get(name)) is not None:
        _check_count(name, known, experts)
    for part in (*experts, "vae", "text"):
        _check_found(part, name, files)
    for expert in experts:
        _check_family(Path(files[expert]))
    opener = Opener()
    found = {e: identify_path(Path(files[e]), opener, "dit") for e in experts}
    vae = identify_path(Path(files["vae"]), opener, "vae")
    text = identify_path(Path(files["text"]), opener, "text")
    check_pair(found, files)
    dit = found[experts[0]]
    assert isinstance(dit.spec, DitSpec) and isinstance(vae.spec, VaeSpec) and isinstance(text.spec, TextSpec)
    spec = _model_spec(name, dit, len(experts))
    check_fit(spec, dit.spec, vae.spec, text.spec, files)
    spec = replace(
        spec, dit=dit.spec, vae=replace(vae.spec, mean=spec.vae.mean, std=spec.vae.std), text=text.spec
    )
    tokenizer = Path(files["tokenizer"]) if "tokenizer" in files else text.tokenizer
    transformers = {e: Transformer(c.refs, face_blocks=dit.spec.face_blocks) for e, c in found.items()}
    model = Model(name, spec, transformers, vae.refs, text.refs, tokenizer, opener=opener)
    return _with_clip(model, files) if dit.spec.image_tokens else model


def _check_family(path: Path) -> None:
    """FileError for a transformer that looks like Wan's but is shown more than Wan is."""
    family = family_of(path)
    if family:
        raise FileError(
            f"this is a {family} checkpoint, as its name says: not supported yet",
            where=str(path),
            advice="use a model of Wan 2.1 or 2.2, or rename the file if its name is wrong",
        )


def _check_found(part: str, name: str, files: Mapping[str, str]) -> None:
    if part not in files:
        raise FileError(
            f"no {PART_NAMES[part]} was found",
            where=name,
            advice=f"give its file with {FLAGS[part]} FILE",
        )


def _with_clip(model: Model, files: Mapping[str, str]) -> Model:
    """The model with the network that looks at its picture."""
    _check_found("clip", model.name, files)
    clip, dit = identify_path(Path(files["clip"]), model.opener, "clip"), model.spec.dit
    assert isinstance(clip.spec, ClipSpec)
    if clip.spec.dim != dit.image_dim or clip.spec.tokens != CLIP_TOKENS:
        raise FileError(
            f"a CLIP vision encoder of width {clip.spec.dim} with {clip.spec.tokens} tokens, "
            f"the transformer expects {dit.image_dim} and {CLIP_TOKENS}",
            where=files["clip"],
            expected="ViT-H/14 of open-clip (XLM-RoBERTa or LAION-2B), as clip_vision_h.safetensors",
            advice="give the one that belongs to this model",
        )
    return replace(model, spec=replace(model.spec, clip=clip.spec), clip=clip.refs)


def with_loras(model: Model, choices: tuple[LoraChoice, ...]) -> Model:
    """The model with the LoRAs beside its transformers. FileError for one that does not fit, UsageError for one whose
    name says that it was made for the other expert, or whose strengths cannot follow the steps."""
    loras: dict[str, list[Lora]] = {e: [] for e in model.transformers}
    opener = model.opener.copy()  # the LoRAs belong to one job: for the next they may be trained further
    for choice in choices:
        headers = open_checkpoint_files(Path(choice.path), opener)
        matched = match_lora(headers, model.spec.dit, choice.partial)
        ratios = _ratios(matched, opener)
        for expert in acts_on(choice, model.spec):
            lora = Lora(matched, choice.strengths, ratios)
            _check_faces(lora, model.transformers[expert], choice)
            loras[expert].append(lora)
    transformers = {e: replace(t, loras=tuple(loras[e])) for e, t in model.transformers.items()}
    return replace(model, transformers=transformers, opener=opener)


def _check_faces(lora: Lora, transformer: Transformer, choice: LoraChoice) -> None:
    """UsageError if it would change from step to step what is made of the faces once, before the first."""
    faces = [name for name in lora.targets if transformer.is_of_faces(name)]
    if faces and len(set(lora.strengths)) > 1:
        raise UsageError(
            f"{len(lora.strengths)} strengths, but it changes how faces are seen ({shown(faces[0], 60)})",
            where=f"--lora {choice.path}",
            expected="one strength: faces are looked at once, before the first step",
            advice=f"give one, such as @{lora.strengths[0]:g}",
        )


def _ratios(matched: LoraSet, opener: Opener) -> dict[str, float]:
    """Alphas stored in the file are single numbers: the only tensor values read before a plan exists."""
    ratios = {}
    with ExitStack() as stack:
        readers = {f: stack.enter_context(opener(f)) for f in matched.files}
        for pair in matched.pairs:
            alpha = pair.alpha
            if isinstance(alpha, Part):
                data = readers[alpha.file].read_at(alpha.offset, alpha.nbytes)
                alpha = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[alpha.dtype])[0].item()
            ratio = 1.0 if alpha is None else float(alpha) / pair.rank
            if not math.isfinite(ratio):
                raise FileError(
                    f"the alpha of {pair.target} is not finite",
                    where=str(pair.factors[0].file),
                    advice="the LoRA is damaged: download it again, or use another",
                )
            ratios[pair.target] = ratio
    return ratios


def _model_spec(name: str, dit: Checkpoint, experts: int) -> ModelSpec:
    """The defaults of a model: of its name, else of the first known model with the same transformers."""
    preset = load_models().get(name)
    if preset is not None:
        return preset
    for candidate in load_models().values():
        if candidate.dit == dit.spec and candidate.experts == experts:
            return candidate
        if candidate.variant == dit.variant == "animate" and experts == 1 and isinstance(dit.spec, DitSpec):
            return replace(candidate, dit=dit.spec)  # the face branch tells, whatever the size
    raise FileError(
        f"a transformer with {experts} expert(s) that is no model known here",
        where=name,
        expected=", ".join(load_models()),
        advice="name the model it was made from with --model NAME, and give its files",
    )


def _check_count(name: str, spec: ModelSpec, given: tuple[str, ...]) -> None:
    """UsageError unless as many transformers are given as the model has."""
    if len(given) != spec.experts:
        has, wants = (" and ".join(FLAGS[part] for part in parts) for parts in (given, spec.expert_names()))
        raise UsageError(
            f"{has} for a model with {'two transformers' if spec.experts == 2 else 'one transformer'}",
            where=name,
            expected=wants,
            advice=f"give {wants}, or the name of the model that the file belongs to",
        )


def check_pair(found: Mapping[str, Checkpoint], files: Mapping[str, str]) -> None:
    specs = {c.spec for c in found.values()}
    if len(specs) > 1:
        raise FileError(
            "the two transformers are of different sizes",
            where=" and ".join(files[e] for e in found),
            expected="the high-noise and the low-noise expert of one model",
            advice="check --high and --low",
        )
    if len(found) == 2 and found["high"].files == found["low"].files:
        raise FileError(
            "the same file for both experts",
            where=files["high"],
            expected="the high-noise and the low-noise expert",
            advice="check --high and --low",
        )


def check_fit(spec: ModelSpec, dit: DitSpec, vae: VaeSpec, text: TextSpec, files: Mapping[str, str]) -> None:
    if dit.out_channels != vae.z:
        raise FileError(
            f"a VAE with {vae.z} latent channels, the transformer has {dit.out_channels}",
            where=files["vae"],
            expected=f"the Wan {spec.vae.version} VAE",
            advice="give the VAE that belongs to this model",
        )
    if text.dim != dit.text_dim:
        raise FileError(
            f"a text encoder of width {text.dim}, the transformer expects {dit.text_dim}",
            where=files["text"],
            advice="give the UMT5 encoder that belongs to this model",
        )
    if spec.dit != dit:
        raise FileError(
            f"a transformer with width {dit.dim}, {dit.layers} layers, {dit.in_channels} input channels",
            where=next(files[e] for e in ("high", "single", "low") if e in files),
            expected=f"width {spec.dit.dim}, {spec.dit.layers} layers, {spec.dit.in_channels} input channels",
            advice="give the files of the model you named, or leave the name out",
        )
