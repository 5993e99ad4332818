"""A whole model: where the tensors of its networks lie, which of them travel together, and the LoRAs beside them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lowvram.offload.io import Opener
from lowvram.quant.encodings.base import Encoding
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.face_spec import ADAPTERS, ENCODERS, FACE_SCOPE, KEPT_LEAVES
from lowvram.quant.files.header import shown
from lowvram.quant.lora import LoraPair, LoraSet
from lowvram.quant.refs import Part, Shape, TensorRef
from lowvram.quant.spec import ModelSpec
from lowvram.quant.vocabulary import Vocabulary

NOWHERE = "<"
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
        return not str(self.file).startswith(NOWHERE)

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

    def __repr__(self) -> str:
        return f"Model({self.name})"  # not its thousands of tensors

    def encodings(self) -> Mapping[Encoding, Shape]:
        """How weights outside the VAE are stored that are not plain numbers, and the shape of the largest of each."""
        refs = [
            ref
            for t in (*(t.refs for t in self.transformers.values()), self.text, self.clip)
            for ref in t.values()
        ]
        found = {ref.encoding: ref.shape for ref in sorted(refs, key=lambda ref: ref.nbytes)}
        return {encoding: shape for encoding, shape in found.items() if not isinstance(encoding, Plain)}
