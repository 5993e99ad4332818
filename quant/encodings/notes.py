"""What the small JSON texts beside quantised weights say, once they are parsed."""

from __future__ import annotations

from lowvram.quant.encodings.base import StoredPart

_DEFAULT_GROUP = 256


def field(note: StoredPart | None, key: str) -> object:
    """A member of a ComfyUI layer note, wherever it stands: at the top or under "params". None if it is not there."""
    if note is None or note.note is None:
        return None
    params = note.note.get("params")
    inner = params.get(key) if isinstance(params, dict) else None
    return note.note.get(key, inner)


def rotation_of(note: StoredPart | None, *, always: bool = False) -> int | None:
    """Columns rotated together in a layer with this ComfyUI note, 0 for none; None if the note cannot be understood.

    always: the format rotates whether or not the note says so.
    """
    if note is None:
        return 0
    if note.note is None:
        return None
    turned = field(note, "convrot")
    if turned not in (None, True, False):
        return None
    if not always and not turned:
        return 0
    group = field(note, "convrot_groupsize")
    if group is None:
        return _DEFAULT_GROUP
    return group if type(group) is int and group > 0 else None
