"""Which of the files that were found make the model that was asked for.

Transformers are never guessed: if several sets fit, the person is asked. A VAE and a text encoder are the same for all
that ask for them, so the most exact one is taken. Everything that is taken is taken for a stated reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from lowvram.errors import FileError, UsageError
from lowvram.library.entries import Entry
from lowvram.library.known import known_file
from lowvram.library.naming import series
from lowvram.library.parts import FLAGS, PART_NAMES, typed
from lowvram.quant.spec import ModelSpec
from lowvram.sampling.presets import load_models

_EXACT = (
    "fp32",
    "bf16",
    "fp16",
    "q8_0",
    "int8",
    "fp8_row",
    "fp8_scaled",
    "fp8",
    "q6_k",
    "q5_k",
    "q5_1",
    "q5_0",
    "nf4",
)
"""Encodings from the most exact; others come after."""
_TASK = re.compile(r"(?<![a-z])(t2v|i2v)")
_MODEL_WORDS = re.compile(r"flf2v|ti2v|t2v|i2v|animate|5b|1[._]3b")
"""What the names of models, and of their transformers, tell models apart by."""
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Taken:
    """A file that was chosen."""

    path: str
    why: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files of one model."""

    model: str
    parts: dict[str, Taken]
    """By part; those that are not there are left out."""
    missing: tuple[str, ...]
    """Parts that a video needs and that are not there."""


def needed_parts(spec: ModelSpec) -> tuple[str, ...]:
    """The parts without which no video can be made."""
    clip = ("clip",) if spec.clip else ()
    return (*spec.expert_names(), "vae", "text", *clip, "tokenizer")


def choose(
    entries: Sequence[Entry],
    model: str,
    *,
    given: Iterable[str] = (),
    weights: str | None = None,
    preset: str | None = None,
) -> Chosen:
    """The parts of `model` among `entries`.

    given    parts that the person named: they are not looked for
    weights  the encoding that the transformers must have; None for any
    preset   the few-step preset: its own distilled transformers are taken where they are here

    UsageError if several sets of transformers fit equally.
    """
    spec = load_models()[model]
    usable = [entry for entry in entries if not entry.problem]
    named = set(given)
    parts: dict[str, Taken] = {}
    experts = spec.expert_names()
    if not named.intersection((*experts, "single")):
        parts |= _transformers(usable, model, spec, weights, preset)
    elif missing := [expert for expert in experts if expert not in named and "single" not in named]:
        parts |= {
            expert: taken for expert in missing if (taken := _one_expert(usable, model, expert, weights))
        }
    if "vae" not in named and (vae := _most_exact(_of(usable, "vae", model))):
        parts["vae"] = vae
    if spec.clip and "clip" not in named and (clip := _most_exact(_of(usable, "clip", model))):
        parts["clip"] = clip
    if "text" not in named:
        parts |= _text(usable, model, spec, "tokenizer" in named)
    elif "tokenizer" not in named and (tokenizer := _tokenizer(usable, spec)):
        parts["tokenizer"] = tokenizer
    have = named | parts.keys()
    if "text" in named or _brings_tokenizer(usable, parts.get("text")):
        # A text encoder that the person gave says for itself, when it is opened, whether it carries one.
        have.add("tokenizer")
    return Chosen(model, parts, tuple(part for part in needed_parts(spec) if part not in have))


def choose_loras(
    entries: Sequence[Entry], models: Iterable[str], spec: ModelSpec, preset: str
) -> dict[str, str]:
    """The LoRAs made for a few-step preset, by expert ("both" on one-expert models); empty if an expert has none.

    Text-to-video and image-to-video LoRAs of one preset differ in their names only. UsageError if several fit.
    """
    fits = [
        entry
        for entry in entries
        if entry.kind == "lora" and not entry.problem and set(models) & set(entry.models)
        and _is_lora_of(entry, preset) and _task_of(entry) in (None, spec.variant[:3])
    ]  # fmt: skip
    chosen: dict[str, str] = {}
    for expert in spec.expert_names():
        mine = _distinct([(e,) for e in fits if spec.experts == 1 or e.expert == expert])
        if len(mine) > 1:
            names = "; ".join(PurePath(each[0].path).name for each in mine[:_SHOWN])
            mark = "" if spec.experts == 1 else f":{expert}"
            raise UsageError(
                f"{len(mine)} LoRAs fit --preset {preset}",
                expected=f"one of {names}",
                advice=f"choose with --lora {typed(mine[0][0].path + mark)}",
            )
        if not mine:
            return {}
        chosen["both" if spec.experts == 1 else expert] = mine[0][0].path
    return chosen


def _is_lora_of(entry: Entry, preset: str) -> bool:
    """Whether a LoRA is of this preset, or of the same training in another number of steps ("lightning-8")."""
    return entry.preset is not None and entry.preset.rpartition("-")[0] == preset.rpartition("-")[0]


def _task_of(entry: Entry) -> str | None:
    """ "t2v" or "i2v" as the name of a file says."""
    said = set(_TASK.findall(PurePath(entry.path).name.lower()))
    return said.pop() if len(said) == 1 else None


def possible_models(entries: Sequence[Entry]) -> list[str]:
    """The known models whose transformers are among `entries`, each named as sizes and names allow."""
    found = []
    for model, spec in load_models().items():
        try:
            chosen = _transformers([e for e in entries if not e.problem], model, spec, None, None)
        except UsageError:
            found.append(model)
            continue
        if all(expert in chosen for expert in spec.expert_names()):
            found.append(model)
    return found


def distilled(entries: Sequence[Entry], model: str) -> list[str]:
    """The few-step presets that transformers of `model` which are here were made for."""
    return sorted({e.preset for e in _of(entries, "dit", model) if e.preset and not e.problem})


def _of(entries: Iterable[Entry], kind: str, model: str) -> list[Entry]:
    return [entry for entry in entries if entry.kind == kind and model in entry.models]


def _transformers(
    entries: Sequence[Entry], model: str, spec: ModelSpec, weights: str | None, preset: str | None
) -> dict[str, Taken]:
    fitting = [entry for entry in _of(entries, "dit", model) if _is_version(entry, model)]
    base = [entry for entry in fitting if not entry.derived and entry.preset in (None, preset)]
    if preset is not None and (distilled := [entry for entry in base if entry.preset == preset]):
        base = distilled
    else:
        base = [entry for entry in base if entry.preset is None]
    if weights is not None:
        base = [entry for entry in base if _is_stored_as(entry, weights)]
    if spec.experts == 1:
        return _single([entry for entry in base if entry.expert is None], model)
    return _pair(base, model)


def _is_version(entry: Entry, model: str) -> bool:
    """Whether the name of a file allows the model: names say 2.1 or 2.2 where sizes do not."""
    return entry.version is None or not model.startswith("wan") or model.startswith(f"wan{entry.version}")


def _is_stored_as(entry: Entry, weights: str) -> bool:
    """ "fp8" means any fp8, "q4_k_m" a Q4_K file: the mixes differ in names only."""
    return (
        entry.encoding == weights or entry.encoding.startswith(weights) or weights.startswith(entry.encoding)
    )


def _single(candidates: list[Entry], model: str) -> dict[str, Taken]:
    sets = _distinct([(entry,) for entry in candidates])
    if len(sets) > 1:
        raise _ask(model, sets, ("single",))
    return {"single": _taken(sets[0][0], "the only one that fits")} if sets else {}


def _pair(candidates: list[Entry], model: str) -> dict[str, Taken]:
    by_expert = {expert: [e for e in candidates if e.expert == expert] for expert in ("high", "low")}
    pairs = [(h, l) for h in by_expert["high"] for l in by_expert["low"] if _belong_together(h, l)]
    if not pairs and all(by_expert.values()):
        pairs = [(h, l) for h in by_expert["high"] for l in by_expert["low"]]
    sets = _distinct(pairs)
    if len(sets) > 1:
        raise _ask(model, sets, ("high", "low"))
    if sets:
        high, low = sets[0]
        how = "by its hash" if known_file(high.sha256) else "by its name"
        return {"high": _taken(high, f"high-noise {how}"), "low": _taken(low, f"low-noise {how}")}
    unmarked = [entry for entry in candidates if entry.expert is None]
    if len(unmarked) >= 2 and not any(by_expert.values()):
        raise UsageError(
            f"{len(unmarked)} transformers fit {model}, and no name says which is for high noise",
            where=", ".join(PurePath(entry.path).name for entry in unmarked[:_SHOWN]),
            expected="high and low in the names: the two experts have the same keys and shapes",
            advice=f"give --high {typed(unmarked[0].path)} --low {typed(unmarked[1].path)}, or the other way round",
        )
    return {
        expert: _taken(found[0], f"{expert}-noise by its name")
        for expert, found in by_expert.items()
        if len(found) == 1
    }


def _belong_together(high: Entry, low: Entry) -> bool:
    return high.encoding == low.encoding and (
        series(Path(high.path), "high") == series(Path(low.path), "low")
        or (
            Path(high.path).parent.parent == Path(low.path).parent.parent
            and Path(high.path).parent != Path(low.path).parent
        )
    )


def _one_expert(entries: Sequence[Entry], model: str, expert: str, weights: str | None) -> Taken | None:
    """The other expert of a pair of which one was given: only if there is no choice."""
    found = [
        entry
        for entry in _of(entries, "dit", model)
        if entry.expert == expert and not entry.derived and entry.preset is None and _is_version(entry, model)
        and (weights is None or _is_stored_as(entry, weights))
    ]  # fmt: skip
    sets = _distinct([(entry,) for entry in found])
    if len(sets) > 1:
        raise _ask(model, sets, (expert,))
    return _taken(sets[0][0], f"{expert}-noise by its name") if sets else None


def _distinct(sets: Sequence[tuple[Entry, ...]]) -> list[tuple[Entry, ...]]:
    """Without sets whose files are copies of those of an earlier one: the same names, sizes and encodings."""
    kept: dict[tuple[object, ...], tuple[Entry, ...]] = {}
    for each in sets:
        key = tuple((PurePath(entry.path).name, entry.nbytes, entry.encoding) for entry in each)
        kept.setdefault(key, each)
    return list(kept.values())


def _ask(model: str, sets: list[tuple[Entry, ...]], parts: tuple[str, ...]) -> UsageError:
    """The question which of several sets is meant, with what to type."""
    encodings = [each[0].encoding for each in sets]
    listed = "; ".join(
        f"{each[0].encoding}: {' + '.join(PurePath(entry.path).name for entry in each)}"
        for each in sets[:_SHOWN]
    )
    if len(sets) > _SHOWN:
        listed += f"; and {len(sets) - _SHOWN} more (see `lowvram models list`)"
    flags = " ".join(f"{FLAGS[part]} {typed(entry.path)}" for part, entry in zip(parts, sets[0], strict=True))
    if len(set(encodings)) == len(sets):
        advice = f"choose with --weights {encodings[0]}, or name the files: {flags}"
    else:
        advice = f"name the files: {flags}"
    what = "sets of transformers" if len(parts) == 2 else "transformers"
    return UsageError(
        f"{len(sets)} {what} fit {model}", where="--model", expected=f"one of {listed}", advice=advice
    )


def _most_exact(entries: list[Entry]) -> Taken | None:
    if not entries:
        return None
    entries = [entry for entry in entries if entry.standard] or entries
    best = min(entries, key=_rank)
    why = "the only one that fits" if len(entries) == 1 else f"the most exact of {len(entries)}"
    return _taken(best, why)


def _rank(entry: Entry) -> tuple[int, str]:
    place = _EXACT.index(entry.encoding) if entry.encoding in _EXACT else len(_EXACT)
    return (place, entry.path)


def _text(entries: Sequence[Entry], model: str, spec: ModelSpec, has_tokenizer: bool) -> dict[str, Taken]:
    """A text encoder and a tokenizer: without one of its own, a text encoder that carries it is worth more."""
    texts = _of(entries, "text", model)
    tokenizer = _tokenizer(entries, spec)
    if tokenizer is None and not has_tokenizer and any(entry.has_tokenizer for entry in texts):
        texts = [entry for entry in texts if entry.has_tokenizer]
    text = _most_exact(texts)
    if text is None:
        return {} if tokenizer is None else {"tokenizer": tokenizer}
    if has_tokenizer or _brings_tokenizer(entries, text):
        return {"text": text}
    return {"text": text} | ({} if tokenizer is None else {"tokenizer": tokenizer})


def _tokenizer(entries: Sequence[Entry], spec: ModelSpec) -> Taken | None:
    """A sentencepiece model of the encoder's vocabulary, which is padded by a few hundred at most."""
    fits: Callable[[Entry], bool] = lambda e: 0.9 * spec.text.vocab <= e.vocabulary <= spec.text.vocab
    found = [entry for entry in entries if entry.kind == "tokenizer" and fits(entry)]
    return _taken(found[0], f"its {found[0].vocabulary:,} pieces fit the text encoder") if found else None


def _brings_tokenizer(entries: Sequence[Entry], text: Taken | None) -> bool:
    return text is not None and any(
        entry.has_tokenizer for entry in entries if entry.kind == "text" and entry.path == text.path
    )


def _taken(entry: Entry, why: str) -> Taken:
    return Taken(
        entry.path, f"{why}, {entry.encoding}, {entry.place}" if entry.encoding else f"{why}, {entry.place}"
    )


def missing_error(chosen: Chosen, entries: Sequence[Entry], where: str) -> FileError:
    """What is not there, what of it was found and is not taken, and what to do."""
    flags = [FLAGS[part] for part in chosen.missing]
    names = _listed([PART_NAMES[part] for part in chosen.missing])
    kinds = {part if part in ("vae", "text", "clip", "tokenizer") else "dit" for part in chosen.missing}
    for entry in entries:
        kind = entry.variant if entry.kind == "broken" else entry.kind
        if entry.problem and kind in kinds and (kind != "dit" or _may_be(entry, chosen.model)):
            found = f"no {names} that can be used: {entry.problem}"
            return FileError(found, where=entry.path, advice=f"give another with {_listed(flags)}")
    for entry in _of(entries, "dit", chosen.model) if "dit" in kinds else ():
        if entry.derived or entry.preset:
            made = f"made for --preset {entry.preset}" if entry.preset else f'called "{entry.derived}"'
            return FileError(
                f"no {names} of plain {chosen.model} was found, only one {made}",
                where=entry.path,
                advice=f"give --preset {entry.preset}" if entry.preset else f"give it with {_listed(flags)}",
            )
    if chosen.missing == ("tokenizer",):
        return FileError(
            f"no tokenizer was found for {chosen.model}",
            where=where,
            expected="spiece.model of google/umt5-xxl, or a text encoder that carries it (ComfyUI's and GGUF ones do)",
            advice=f"give it with --tokenizer FILE, or fetch its 5 MB: lowvram models pull {chosen.model}",
        )
    found = (
        f"no {names} was found for {chosen.model}" if chosen.parts else f"no file of {chosen.model} was found"
    )
    files = " ".join(f"{flag} FILE" for flag in flags if flag != "--tokenizer")
    advice = f"name a folder with --models-dir, the files with {files}, or fetch them: lowvram models pull {chosen.model}"
    return FileError(found, where=where, advice=advice)


def _may_be(entry: Entry, model: str) -> bool:
    """Whether a transformer that cannot be opened may be one of `model`: its name speaks of no other."""
    words = _MODEL_WORDS.findall(PurePath(entry.path).name.lower())
    return _is_version(entry, model) and all(word.replace("_", ".") in model for word in words)


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
