"""LoRA files: headers -> pairs matched to the native weights of one transformer. No factor is read.

Key styles and the formulas are in checkpoint-formats 10: W' = W + strength * alpha / rank * up @ down, and what a LoKr or
a LoHa of LyCORIS has in place of up @ down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from lowvram.errors import FileError
from lowvram.quant.files.header import Header, StoredTensor, shown
from lowvram.quant.files.strict_json import Malformed
from lowvram.quant.lora_alpha import HeaderAlpha, header_alpha
from lowvram.quant.names import DIT
from lowvram.quant.refs import Part, Shape
from lowvram.quant.spec import CLIP_TOKENS, DitSpec, numel

ENOUGH = 0.95
"""Share of a LoRA that must fit the model: less means that it was made for another one."""

_FACTOR_DTYPES = frozenset({"F32", "F16", "BF16"})
_SCALAR_DTYPES = _FACTOR_DTYPES | {"F64", "I64", "I32", "I16", "I8", "U8", "F8_E4M3", "F8_E5M2"}
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "transformer_2.",
    "pipe.dit.",
    "model.",
)
_FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lycoris_")

_ROLE = re.compile(
    r"""(?P<module>.+?)(?:
    (?P<down> \.lora_down\.weight | \.lora_A(\.\w+)?\.weight | \.lora_A | [._]lora\.down\.weight
            | \.lora_linear_layer\.down\.weight )
  | (?P<up>   \.lora_up\.weight | \.lora_B(\.\w+)?\.weight | \.lora_B | [._]lora\.up\.weight
            | \.lora_linear_layer\.up\.weight )
  | (?P<alpha>  \.alpha )
  | (?P<diff>   \.diff )
  | (?P<diff_b> \.diff_b )
  | (?P<bias>   \.lora_B(\.\w+)?\.bias )
  | (?P<diff_m> \.diff_m )
  | \.(?P<factor> lokr_w[12](_[ab])? | hada_w[12]_[ab] )
  | (?P<dora>   \.dora_scale )
  | (?P<magnitude> \.lora_magnitude_vector(\.\w+)?(\.weight)? )
  | (?P<middle> \.lora_mid\.weight | \.lokr_t2 | \.hada_t[12] )
    )""",
    re.VERBOSE | re.ASCII,
)
_HINTS = ("lora", ".alpha", ".diff", ".lokr_", ".hada_", ".dora_")
"""One of these is in every name that _ROLE matches: a quick way out for the others."""
_ROLES = (
    "down",
    "up",
    "alpha",
    "bias",
    "diff",
    "diff_b",
    "diff_m",
    "dora",
    "magnitude",
    "middle",
)
_MAGNITUDES = ("dora", "magnitude")
_FACTORS = frozenset(
    [
        "down",
        "up",
        *(f"lokr_w{n}{x}" for n in (1, 2) for x in ("", "_a", "_b")),
        *(f"hada_w{n}_{x}" for n in (1, 2) for x in "ab"),
    ]
)
"""Roles of factors."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The factors for one weight."""

    target: str
    """Native name of the weight, [out, in] (or a convolution [out, in, 1, 2, 2])."""
    factors: tuple[Part, ...]
    """"up" [out, rank] and "down" [rank, in], of a convolution [out, rank, 1, 1, 1] and [rank, in, 1, 2, 2]. Of a LoHa
    "hada_w1_a" [out, rank] and "hada_w1_b" [rank, in], and the same with w2: their products, element by element. Of a
    LoKr "lokr_w1" [m, n] and "lokr_w2" [out / m, in / n], each of them or both as a product of "_a" and "_b": their
    Kronecker product."""
    rank: int
    """Of a LoKr that of its last product; 0 if both matrices are whole."""
    alpha: Part | float | None
    """A scalar in the file, a number from its header, or None: alpha = rank, factor 1."""
    magnitude: Part | None = None
    """Of a DoRA: [out, 1] or [1, in]."""
    of_base: bool = True
    """Whether the directions of a DoRA are measured on the base weight (`dora_scale`, as ComfyUI does) or on the
    changed one (`lora_magnitude_vector`, as peft does)."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Of the factors."""
        return tuple(factor.role for factor in self.factors)


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """A full difference for one parameter (`.diff`, `.diff_b`, `.diff_m`, `.lora_B.bias`): added times strength."""

    target: str
    """Native name of the parameter."""
    part: Part
    pair: str | None = None
    """Target of the pair whose alpha / rank multiplies it too: it is the bias of that pair's up factor."""


@dataclass(frozen=True, slots=True)
class LoraSet:
    """A LoRA matched to a transformer."""

    files: tuple[Path, ...]
    pairs: tuple[LoraPair, ...]
    deltas: tuple[LoraDelta, ...]
    matched: int
    """Pairs and deltas that fit: len(pairs) + len(deltas)."""
    total: int
    """Pairs and deltas in the file, without the `skipped` ones."""
    unused: tuple[str, ...]
    """Stored names that fit nothing in this transformer."""
    skipped: tuple[str, ...]
    """Stored names for the image branch of 2.1 I2V, which this transformer does not have: harmless."""
    metadata: Mapping[str, str]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks, rising."""
        return tuple(sorted({pair.rank for pair in self.pairs if pair.rank}))


def is_lora(names: Iterable[str]) -> bool:
    """Whether most of these tensor names are LoRA names."""
    total = hits = 0
    for name in names:
        total += 1
        hits += _split(name) is not None
    return 2 * hits > total


def match_lora(headers: Sequence[Header], spec: DitSpec, partial: bool = False) -> LoraSet:
    """The LoRA in these files, matched to the transformer `spec`.

    FileError if it is none, if a factor is missing or of another rank than its twin, if its convolutions have a factor
    in the middle, or if less than ENOUGH of it fits; with `partial` any fit will do.
    """
    where = headers[0].path
    modules = _Modules(spec)
    try:
        match = _Match(where, spec.shapes(), header_alpha(headers))
    except Malformed as error:
        _refuse(where, error.found)
    for module, roles in _by_module(headers, where).items():
        match.add(module, modules.native(module), roles)
    return match.result(headers, partial)


Roles = dict[str, tuple[StoredTensor, Path]]


def _split(name: str) -> tuple[str, str] | None:
    """(module, role) of a LoRA tensor name, the module as the file spells it."""
    found = _ROLE.fullmatch(name) if any(hint in name for hint in _HINTS) else None
    if found is None:
        return None
    role = found["factor"] or next(role for role in _ROLES if found[role] is not None)
    return found["module"], role


def _by_module(headers: Sequence[Header], where: Path) -> dict[str, Roles]:
    modules: dict[str, Roles] = {}
    for header in headers:
        for tensor in header.tensors:
            module, role = _split(tensor.name) or (tensor.name, "other")
            if role == "middle":
                found = f"{shown(tensor.name)}: convolutions with a factor in the middle are not supported"
                raise FileError(found, where=str(where), advice="use a LoRA without it")
            roles = modules.setdefault(module, {})
            if role in roles:
                _refuse(where, f"two {role} tensors for {shown(module)}")
            roles[role] = (tensor, header.path)
    return modules


@dataclass(frozen=True, slots=True)
class _Product:
    """The matrix that some factors make."""

    roles: tuple[str, ...]
    rows: int
    columns: int
    rank: int
    """Of the products in it; 0 if there are none."""


class _Modules:
    """Module names of a transformer with every optional branch, and how files spell them."""

    def __init__(self, spec: DitSpec) -> None:
        shapes = replace(spec, image_tokens=2 * CLIP_TOKENS).shapes()
        self._native = {name.removesuffix(".weight").removesuffix(".bias") for name in shapes}
        # "_" also stands inside names, so flat names are looked up, never split.
        self._flat = {module.replace(".", "_"): module for module in self._native}
        for module in self._native:
            other = DIT.from_native(f"{module}.weight") or DIT.from_native(module)
            if other is not None:
                self._flat.setdefault(other.removesuffix(".weight").replace(".", "_"), module)

    def native(self, module: str) -> str | None:
        """The native name of a module as a LoRA file spells it; None if no Wan transformer has it."""
        for prefix in _FLAT_PREFIXES:
            if module.startswith(prefix):
                return self._flat.get(module[len(prefix) :])
        while (prefix := next((p for p in _PREFIXES if module.startswith(p)), "")) != "":
            module = module[len(prefix) :]
        renamed = DIT.to_native(f"{module}.weight") or DIT.to_native(module) or ""
        for name in (module, renamed.removesuffix(".weight"), f"{module}.modulation"):
            # ".diff_m" hangs on the block or the head, not on its modulation.
            if name in self._native:
                return name
        return None


class _Match:
    """What has been matched so far."""

    def __init__(self, where: Path, shapes: Mapping[str, Shape], alpha: HeaderAlpha | None) -> None:
        self.where, self.shapes, self.alpha = where, shapes, alpha
        self.pairs: dict[str, LoraPair] = {}
        self.deltas: dict[str, LoraDelta] = {}
        self.unused: list[str] = []
        self.skipped: list[str] = []
        self.misfit = ""
        self.total = 0

    def add(self, spelled: str, native: str | None, roles: Roles) -> None:
        """Takes the tensors of one module of the file."""
        if any(role in _FACTORS for role in roles):
            self._add_pair(spelled, native, roles)
        else:
            self.unused += [roles[role][0].name for role in ("alpha", *_MAGNITUDES) if role in roles]
        for role in ("bias", "diff", "diff_b", "diff_m"):
            if role in roles:
                self._add_delta(native, role, *roles[role])
        if "other" in roles:
            self.total += 1
            self.unused.append(roles["other"][0].name)

    def _add_pair(self, spelled: str, native: str | None, roles: Roles) -> None:
        made = self._product(spelled, roles)
        if not _FACTORS.isdisjoint(roles.keys() - set(made.roles)):
            _refuse(self.where, f"{shown(spelled)} has factors of two kinds")
        rank = made.rank
        alpha: Part | float | None = self.alpha.of(spelled, rank) if self.alpha else None
        if "alpha" in roles:
            scalar, file = roles["alpha"]
            if numel(scalar.shape) != 1 or scalar.dtype not in _SCALAR_DTYPES:
                _refuse(
                    self.where, f"{shown(scalar.name)} is {scalar.dtype} {list(scalar.shape)}, not a number"
                )
            alpha = _part("alpha", scalar, file)
        names = [t.name for role, (t, _) in roles.items() if role in (*_FACTORS, "alpha", *_MAGNITUDES)]
        target = f"{native}.weight"
        shape = self._wanted(native, target, names)
        if shape is None:
            return
        if (made.rows, made.columns) != (shape[0], numel(shape[1:])):
            sizes = " x ".join(str(list(roles[role][0].shape)) for role in made.roles)
            self._misfit(names, f"{target} is {list(shape)} here, but {sizes} in the LoRA")
        elif target in self.pairs:
            _refuse(self.where, f"two LoRAs for {target} (a file for both experts must be split)")
        else:
            factors = tuple(_part(role, *roles[role]) for role in made.roles)
            # Two whole matrices are what they are: LyCORIS writes an alpha that means nothing then.
            alpha = alpha if rank else None
            magnitude = self._magnitude(shape, roles)
            self.pairs[target] = LoraPair(target, factors, rank, alpha, magnitude, "dora" in roles)

    def _product(self, spelled: str, roles: Roles) -> _Product:
        """What the factors of a module make together; all of them are there and fit each other."""
        if "up" in roles or "down" in roles:
            return self._factors(spelled, roles, "up", "down")
        if any(role.startswith("hada") for role in roles):
            first, second = (self._factors(spelled, roles, f"hada_w{n}_a", f"hada_w{n}_b") for n in (1, 2))
            if (first.rows, first.columns) != (second.rows, second.columns):
                _refuse(self.where, f"{shown(spelled)} has two products of different sizes")
            return replace(first, roles=first.roles + second.roles)
        first, second = (
            self._factors(
                spelled, roles, f"lokr_w{n}" if f"lokr_w{n}" in roles else f"lokr_w{n}_a", f"lokr_w{n}_b"
            )
            for n in (1, 2)
        )
        rows, columns = first.rows * second.rows, first.columns * second.columns
        return _Product(first.roles + second.roles, rows, columns, second.rank or first.rank)

    def _factors(self, spelled: str, roles: Roles, *wanted: str) -> _Product:
        """The product of these two factors, or the first alone if it is a whole matrix of a LoKr."""
        whole = wanted[0] in ("lokr_w1", "lokr_w2")
        wanted = wanted[:1] if whole else wanted
        for role in wanted:
            if role not in roles:
                _refuse(self.where, f"the {role} factor of {shown(spelled)} is missing")
            factor = roles[role][0]
            if factor.dtype not in _FACTOR_DTYPES or len(factor.shape) < 2 or 0 in factor.shape:
                _refuse(self.where, f"the factor {shown(factor.name)} is {factor.dtype} {list(factor.shape)}")
        left, right = roles[wanted[0]][0].shape, roles[wanted[-1]][0].shape
        if whole:
            return _Product(wanted, left[0], numel(left[1:]), 0)
        if left[1] != right[0]:
            _refuse(self.where, f"{shown(spelled)} has factors of rank {right[0]} and {left[1]}")
        # A kernel belongs to the second factor: what has one in the first is of no size that any weight has.
        return _Product(wanted, left[0] if numel(left[2:]) == 1 else 0, numel(right[1:]), right[0])

    def _magnitude(self, shape: Shape, roles: Roles) -> Part | None:
        """The magnitudes of a DoRA for a weight of `shape`; None for a plain LoRA."""
        role = next((role for role in _MAGNITUDES if role in roles), None)
        if role is None:
            return None
        tensor, file = roles[role]
        rows, columns = (shape[0], 1), (1, numel(shape[1:]))
        fits = [form for form in (rows, columns) if numel(form) == numel(tensor.shape)]
        if tensor.dtype not in _FACTOR_DTYPES or not fits:
            _refuse(self.where, f"{shown(tensor.name)} is {tensor.dtype} {list(tensor.shape)}")
        # A square weight: the place of the long dimension tells.
        form = columns if tensor.shape[:1] == (1,) and columns in fits else fits[0]
        return replace(_part("magnitude", tensor, file), shape=form)

    def _add_delta(self, native: str | None, role: str, tensor: StoredTensor, file: Path) -> None:
        # Modulations and position tables have no ".weight" of their own.
        whole = native is not None and native in self.shapes
        is_bias = role in ("bias", "diff_b")
        target = f"{native}.bias" if is_bias else f"{native}" if whole else f"{native}.weight"
        shape = self._wanted(native, target, [tensor.name])
        if shape is None:
            return
        if tensor.dtype not in _FACTOR_DTYPES:
            _refuse(self.where, f"{shown(tensor.name)} is {tensor.dtype}")
        if numel(tensor.shape) != numel(shape) or tensor.shape[-1:] != shape[-1:]:
            self._misfit(
                [tensor.name], f"{target} is {list(shape)} here, but {list(tensor.shape)} in the LoRA"
            )
        elif target in self.deltas:
            _refuse(self.where, f"two differences for {target}")
        else:
            pair = f"{native}.weight" if role == "bias" and f"{native}.weight" in self.pairs else None
            self.deltas[target] = LoraDelta(target, _part("diff", tensor, file), pair)

    def _wanted(self, native: str | None, target: str, names: list[str]) -> Shape | None:
        """Shape of the target if this transformer has it; else the tensors are put aside."""
        shape = self.shapes.get(target)
        if shape is not None:
            self.total += 1
        elif native is not None and ("_img" in native or native.startswith("img_emb.")):
            self.skipped += names
        else:
            self.total += 1
            self.unused += names
        return shape

    def _misfit(self, names: list[str], reason: str) -> None:
        self.unused += names
        self.misfit = self.misfit or reason

    def result(self, headers: Sequence[Header], partial: bool) -> LoraSet:
        matched = len(self.pairs) + len(self.deltas)
        if matched == 0 or (matched < ENOUGH * self.total and not partial):
            found = f"{matched} of {self.total} parts of this LoRA fit the transformer"
            unused = ", ".join(shown(name) for name in self.unused[:2])
            reason = self.misfit or (f"unknown: {unused}" if unused else "")
            advice = "use a LoRA made for this model"
            advice += ", or give --lora-partial to use what fits" if matched else ""
            found = f"{found}; {reason}" if reason else found
            raise FileError(found, where=str(self.where), expected=f"{ENOUGH:.0%} or more", advice=advice)
        return LoraSet(
            files=tuple(header.path for header in headers),
            pairs=tuple(self.pairs.values()),
            deltas=tuple(self.deltas.values()),
            matched=matched,
            total=self.total,
            unused=tuple(self.unused),
            skipped=tuple(self.skipped),
            metadata=headers[0].metadata,
        )


def _part(role: str, tensor: StoredTensor, file: Path) -> Part:
    return Part(role, file, tensor.offset, tensor.nbytes, tensor.dtype, tensor.shape)


def _refuse(where: Path, found: str) -> NoReturn:
    advice = "the LoRA is damaged or of an unknown kind: download it again, or use another"
    raise FileError(found, where=str(where), advice=advice)
