"""A whole model as files: its networks recognised from headers, its LoRAs matched. Nothing else is read."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch

from lowvram.errors import FileError, UsageError
from lowvram.fewstep import acts_on
from lowvram.job import LoraChoice
from lowvram.library.naming import family_of
from lowvram.library.parts import FLAGS, PART_NAMES
from lowvram.offload.io import Opener
from lowvram.quant.encodings.base import TORCH_DTYPES, Encoding
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import planned_encoding
from lowvram.quant.face_spec import ADAPTERS, ENCODERS, FACE_SCOPE, KEPT_LEAVES
from lowvram.quant.files.header import shown
from lowvram.quant.files.shards import open_checkpoint_files
from lowvram.quant.identify import Checkpoint, Kind, identify_path
from lowvram.quant.lora import LoraPair, LoraSet, match_lora
from lowvram.quant.refs import Part, Shape, TensorRef
from lowvram.quant.spec import CLIP_TOKENS, ClipSpec, DitSpec, ModelSpec, TextSpec, VaeSpec
from lowvram.quant.vocabulary import Vocabulary
from lowvram.sampling.presets import load_models

_KINDS: Mapping[str, Kind] = MappingProxyType(
    {"high": "dit", "low": "dit", "single": "dit", "vae": "vae", "text": "text", "clip": "clip"}
)
"""What the file of a part holds."""
_NOWHERE = "<"
"""What the name of a file begins with that does not exist."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA on one transformer."""

    matched: LoraSet
    strengths: tuple[float, ...]
    """One for each equal share of the steps."""
    ratios: Mapping[str, float]
    """alpha / rank by the native name of the weight."""

    def told(self) -> str:
        """Its strengths as they are typed."""
        return ",".join(f"{strength:g}" for strength in self.strengths)

    def report(self) -> str:
        """How much of the file is used, in a few words."""
        found, ranks = self.matched, ", ".join(map(str, self.matched.ranks))
        text = f"{found.matched} of {found.total} parts" + (f", rank {ranks}" if ranks else "")
        if not found.unused:
            return text
        names = ", ".join(shown(name, 60) for name in found.unused[:2])
        return f"{text}; unused: {names}" + (
            f" and {len(found.unused) - 2} more" if len(found.unused) > 2 else ""
        )

    def strength(self, step: int, steps: int) -> float:
        """How strongly it acts in one of `steps` steps."""
        return self.strengths[step * len(self.strengths) // steps]

    @property
    def targets(self) -> list[str]:
        """Native names of the parameters that it changes."""
        return [
            *(pair.target for pair in self.matched.pairs),
            *(delta.target for delta in self.matched.deltas),
        ]

    @property
    def outside_blocks(self) -> bool:
        """Whether it changes anything outside the blocks."""
        return any(not target.startswith("blocks.") for target in self.targets)

    def scale(self, pair: LoraPair, strength: float) -> LoraScale:
        ratio = self.ratios[pair.target]
        if pair.magnitude is None:
            return LoraScale(pair.roles, strength * ratio)
        return LoraScale(pair.roles, ratio, strength, pair.of_base)


@dataclass(frozen=True, slots=True)
class LoraScale:
    """The numbers of one LoRA branch; see `lowvram.quant.branches`."""

    roles: tuple[str, ...]
    """Of its factors."""
    scale: float
    dora: float | None = None
    """Strength of a DoRA; None for a plain LoRA."""
    of_base: bool = True


@dataclass(frozen=True, slots=True)
class Transformer:
    """One expert: where its tensors lie, and the LoRAs beside them."""

    refs: Mapping[str, TensorRef]
    """By native name."""
    loras: tuple[Lora, ...] = ()
    face_blocks: range = range(0)
    """Blocks that a face adapter follows."""

    @property
    def file(self) -> Path:
        """Where it lies, or the first of its shards."""
        return next(iter(self.refs.values())).parts[0].file

    @property
    def is_here(self) -> bool:
        """Whether it lies in a file: one that is imagined does not."""
        return not str(self.file).startswith(_NOWHERE)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Of each LoRA at the first step."""
        return tuple(lora.strengths[0] for lora in self.loras)

    def groups(self, strengths: tuple[float, ...] | None = None) -> dict[str, Group]:
        """ "outer" and "blocks.0" to "blocks.N": each with the names its tensors have inside it.

        strengths: of each LoRA, those at the first step if left out. They change no tensor and no place.

        With a face branch also "face", its two encoders, and "face.0" to "face.N", what makes the keys and values of
        an adapter; the rest of an adapter belongs to the block that it follows.
        """
        refs: dict[str, dict[str, TensorRef]] = {}
        branches: dict[str, dict[str, tuple[LoraScale, ...]]] = {}
        deltas: dict[str, dict[str, tuple[float, ...]]] = {}
        for name, ref in self.refs.items():
            group, inner = self._split(name)
            refs.setdefault(group, {})[inner] = replace(ref, name=inner)
        for lora, strength in zip(self.loras, strengths or self.strengths, strict=True):
            for pair in lora.matched.pairs:
                group, inner = self._split(pair.target.removesuffix(".weight"))
                scales = branches.setdefault(group, {})
                index = len(scales.get(inner, ()))
                scales[inner] = (*scales.get(inner, ()), lora.scale(pair, strength))
                for part in (*pair.factors, *([pair.magnitude] if pair.magnitude else [])):
                    _add(refs[group], branch_name(inner, index, part.role), part)
            for delta in lora.matched.deltas:
                group, inner = self._split(delta.target)
                added = deltas.setdefault(group, {})
                index = len(added.get(inner, ()))
                ratio = 1.0 if delta.pair is None else lora.ratios[delta.pair]
                added[inner] = (*added.get(inner, ()), strength * ratio)
                _add(refs[group], delta_name(inner, index), delta.part)
        return {g: Group(tuple(r.values()), branches.get(g, {}), deltas.get(g, {})) for g, r in refs.items()}

    def is_of_faces(self, name: str) -> bool:
        """Whether the parameter is used before the first step, to make the faces' keys and values."""
        return self._split(name)[0].startswith("face")

    def _split(self, name: str) -> tuple[str, str]:
        """blocks.3.ffn.0.weight -> (blocks.3, ffn.0.weight); a name outside the blocks -> (outer, name)."""
        if name.startswith("blocks."):
            _, n, inner = name.split(".", 2)
            return f"blocks.{n}", inner
        if name.startswith(ADAPTERS):
            n, inner = name.removeprefix(ADAPTERS).split(".", 1)
            if inner.startswith(KEPT_LEAVES):
                return f"blocks.{self.face_blocks[int(n)]}", FACE_SCOPE + inner
            return f"face.{n}", inner
        return ("face" if name.startswith(ENCODERS) else "outer"), name


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that travel together: a transformer block, or all that is outside the blocks."""

    refs: tuple[TensorRef, ...]
    """Under their names inside the group, parts of LoRAs included (see `branch_name` and `delta_name`)."""
    branches: Mapping[str, tuple[LoraScale, ...]]
    """By name of a Linear: the scale of each of its LoRA branches."""
    deltas: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By name of a parameter: the strength of each difference that is added to it."""

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What a footprint depends on: names, shapes and encodings, but not where the bytes lie."""
        return tuple((ref.name, ref.shape, ref.encoding) for ref in self.refs)


def vae_group(model: Model, prefixes: tuple[str, ...]) -> Group:
    """The tensors of the VAE whose names begin with one of `prefixes`: one of its halves."""
    return Group(tuple(ref for name, ref in model.vae.items() if name.startswith(prefixes)), {})


def kinds(groups: Iterable[Group]) -> list[Group]:
    """One group of every make: those alike in names, shapes and encodings need the same memory, and what another has
    beside more needs no more.

    The blocks of a network may be stored differently, by depth or by expert, and have different LoRA branches or none.
    """
    found = {frozenset(group.kind): group for group in groups}
    return [group for kind, group in found.items() if not any(kind < other for other in found)]


def branch_name(linear: str, index: int, role: str) -> str:
    """Name under which `role` (of a factor, or "magnitude") of LoRA branch `index` travels beside a Linear."""
    return f"{linear}.lora.{index}.{role}"


def delta_name(parameter: str, index: int) -> str:
    """Name under which difference `index` travels beside a parameter."""
    return f"{parameter}.delta.{index}"


def _add(refs: dict[str, TensorRef], name: str, part: Part) -> None:
    """A part of a LoRA as a tensor of a group."""
    refs[name] = TensorRef(name, part.shape, Plain(part.dtype), (replace(part, role="weight"),))


@dataclass(frozen=True, slots=True)
class Model:
    """The networks of a model and where they lie."""

    name: str
    spec: ModelSpec
    transformers: Mapping[str, Transformer]
    """By expert: "high" and "low", or "single"."""
    vae: Mapping[str, TensorRef]
    text: Mapping[str, TensorRef]
    tokenizer: Path | Part | Vocabulary | None
    """A sentencepiece file, or what is one inside the text encoder's file."""
    clip: Mapping[str, TensorRef] = field(default_factory=dict)
    """Empty where the transformer has no branch for it."""
    opener: Opener = field(default_factory=Opener, compare=False)
    """Opens its files, as long as they are those whose headers were read."""

    def encodings(self) -> Mapping[Encoding, Shape]:
        """How weights outside the VAE are stored that are not plain numbers, and the shape of the largest of each."""
        refs = [
            ref
            for t in (*(t.refs for t in self.transformers.values()), self.text, self.clip)
            for ref in t.values()
        ]
        found = {ref.encoding: ref.shape for ref in sorted(refs, key=lambda ref: ref.nbytes)}
        return {encoding: shape for encoding, shape in found.items() if not isinstance(encoding, Plain)}


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
    _check_pair(found, files)
    dit = found[experts[0]]
    assert isinstance(dit.spec, DitSpec) and isinstance(vae.spec, VaeSpec) and isinstance(text.spec, TextSpec)
    spec = _model_spec(name, dit, len(experts))
    _check_fit(spec, dit.spec, vae.spec, text.spec, files)
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


def imagined_model(name: str, spec: ModelSpec, weights: str) -> Model:
    """A model of `spec` stored in the encoding `weights`, without files: for plans."""
    nowhere = Path(f"{_NOWHERE}{name} in {weights}>")
    refs = _imagined(spec.dit.shapes(), weights, nowhere)
    transformer = Transformer(refs, face_blocks=spec.dit.face_blocks)
    return Model(
        name,
        spec,
        dict.fromkeys(spec.expert_names(), transformer),
        _imagined(spec.vae.shapes(), "bf16", nowhere),
        _imagined(spec.text.shapes(), "bf16", nowhere),
        None,
        {} if spec.clip is None else _imagined(spec.clip.shapes(), "fp16", nowhere),
    )


def with_parts(model: Model, files: Mapping[str, str]) -> Model:
    """The model with these parts as their headers say that they are stored; the others stay as they were imagined.

    One of two transformers stands for both. FileError for a part that is not what it should be.
    """
    opener, spec = Opener(), model.spec
    kinds = {part: kind for part, kind in _KINDS.items() if part in files}
    found = {part: identify_path(Path(files[part]), opener, kind) for part, kind in kinds.items()}
    specs = {kinds[part]: checkpoint.spec for part, checkpoint in found.items()}
    dit, vae, text = specs.get("dit", spec.dit), specs.get("vae", spec.vae), specs.get("text", spec.text)
    assert isinstance(dit, DitSpec) and isinstance(vae, VaeSpec) and isinstance(text, TextSpec)
    experts = {part: checkpoint for part, checkpoint in found.items() if kinds[part] == "dit"}
    _check_pair(experts, files)
    _check_fit(spec, dit, vae, text, files)
    transformers = dict(model.transformers)
    if experts:
        stored = {part: Transformer(c.refs, face_blocks=dit.face_blocks) for part, c in experts.items()}
        transformers = {expert: stored.get(expert, next(iter(stored.values()))) for expert in transformers}
    refs = {part: checkpoint.refs for part, checkpoint in found.items()}
    return replace(
        model,
        transformers=transformers,
        opener=opener,
        vae=refs.get("vae", model.vae),
        text=refs.get("text", model.text),
        clip=refs.get("clip", model.clip),
    )


def _imagined(shapes: Mapping[str, Shape], weights: str, file: Path) -> dict[str, TensorRef]:
    refs, offset = {}, 0
    for name, shape in shapes.items():
        encoding = planned_encoding(name, shape, weights)
        parts = []
        for part in encoding.layout(shape):
            parts.append(Part(part.role, file, offset, part.nbytes, part.dtype, part.shape))
            offset += part.nbytes
        refs[name] = TensorRef(name, shape, encoding, tuple(parts))
    return refs


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


def _check_pair(found: Mapping[str, Checkpoint], files: Mapping[str, str]) -> None:
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


def _check_fit(spec: ModelSpec, dit: DitSpec, vae: VaeSpec, text: TextSpec, files: Mapping[str, str]) -> None:
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
