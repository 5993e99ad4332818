"""What a file's name says that its tensors cannot: expert, version, and whether it is a model made from another.

High and low experts have the same keys and shapes, and so have Wan 2.1 and 2.2 text-to-video, base and distilled
(checkpoint-formats 1.4). A name that says nothing gives None: nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

_NOT_NOISE = r"(?![ _.-]?(?:quality|qual|res|resolution|detail|vram|mem|fps|speed|rank|motion|poly))"
_EXPERT = re.compile(
    rf"(?:^|[^a-z])(high|low){_NOT_NOISE}(?![a-z])|(high|low)[ _.-]?noise|(?:^|[^a-z])(high|low)(?=q\d)|(?:^|[^a-z])(h|l)n(?![a-z])"
)
_EXPERTS: Mapping[str, str] = {"high": "high", "h": "high", "low": "low", "l": "low"}
_VERSION = re.compile(r"wan[ _.-]?(?:video)?[ _.-]?v?2[ _.-]?([12])(?!\d)")
_DIFFUSERS_LOW, _DIFFUSERS_FIRST = "transformer_2", "transformer"

_OTHERS = re.compile(
    r"(?:^|[^a-z])(fun|skyreels|phantom|vace|s2v|humo|animate|anisora|moviigen|magref|recammaster|multitalk"
    r"|infinitetalk|standin|pusa|dancer|scail|rapid|aio|merge|mix|smoothmix)(?![a-z])"
)
"""Words of models that were trained further from Wan and kept its shapes."""


_FAMILIES: Mapping[str, re.Pattern[str]] = {
    family: re.compile(rf"(?:^|[^a-z]){word}(?![a-z])")
    for family, word in (
        ("Phantom", "phantom"),
        ("ChronoEdit", "chrono[ _.-]?edit"),
        ("Wan-Move", "wan[ _.-]?move"),
        ("MoCha", "mocha"),
        ("Lucy-Edit", "lucy[ _.-]?edit"),
        ("Kiwi-Edit", "kiwi[ _.-]?edit"),
        ("Bernini", "bernini"),
    )
}
"""Models that are shown more than Wan is, and have no tensors of their own by which they could be told (wan-models 8)."""

_NAMELESS = "diffusion_pytorch_model"
"""How diffusers and the authors call any transformer: the folder has the name."""


def expert_of(path: PurePath) -> str | None:
    """ "high" or "low" as the file's name, or else the folder it lies in, says; None if neither does or both do."""
    for name in (path.name, path.parent.name, path.parent.parent.name):
        said = {_EXPERTS[next(filter(None, match))] for match in _EXPERT.findall(name.lower())}
        if said:
            return said.pop() if len(said) == 1 else None
    return "low" if path.parent.name == _DIFFUSERS_LOW else None


def version_of(path: PurePath) -> str | None:
    """ "2.1" or "2.2" as the name of the file or of a folder near it says."""
    for name in (path.name, path.parent.name, path.parent.parent.name):
        said = set(_VERSION.findall(name.lower()))
        if len(said) == 1:
            return f"2.{said.pop()}"
    return None


def derived_name(name: str, variant: str) -> str:
    """The word in a file's name that says the model was trained further from Wan; empty if there is none.

    variant: what its tensors say it is. A name that says no more than that ("animate") says nothing of this kind.
    """
    words = (word for word in _OTHERS.findall(name.lower()) if word != variant)
    return next(words, _family(name).lower())


def family_of(path: PurePath) -> str:
    """The model derived from Wan that a transformer is, as its name says, and that cannot be run; empty if none.

    Of a file with a name that all have, the folders that it lies in are asked.
    """
    names = [path.name]
    if path.name.startswith(_NAMELESS) or path.suffix not in (".safetensors", ".gguf", ".pth", ".json"):
        names += [folder.name for folder in list(path.parents)[:4]]
    return next(filter(None, map(_family, names)), "")


def _family(name: str) -> str:
    return next((family for family, word in _FAMILIES.items() if word.search(name.lower())), "")


def series(path: PurePath, expert: str | None) -> str:
    """The name of a file without what tells the experts apart: equal for the two files of a pair."""
    if expert is None:
        return path.name.lower()
    return (
        _EXPERT.sub("*", path.name.lower())
        if path.parent.name not in (_DIFFUSERS_LOW, _DIFFUSERS_FIRST)
        else ""
    )
