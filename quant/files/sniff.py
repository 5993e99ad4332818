"""What a file really is when it is not what its name says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

HEAD_BYTES = 512
"""Bytes from the start of the file that `recognise_content` wants."""

_JSON_START = re.compile(rb'\s*[{[]\s*["{[\]}]')
_AGAIN = "download the file again"


class Content(NamedTuple):
    """A recognised content: what it is, and what to do about it."""

    found: str
    advice: str


def recognise_content(head: bytes) -> Content | None:
    """Names the content from its first bytes; None if it is nothing that is known to be met under a wrong name."""
    if not head:
        return Content("the file is empty (0 bytes)", _AGAIN)
    for matches, content in _CONTENTS:
        if matches(head):
            return content
    return None


def _starts(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


def _is_html(head: bytes) -> bool:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--"))


def _is_json(head: bytes) -> bool:
    return _JSON_START.match(head.removeprefix(b"\xef\xbb\xbf")) is not None


def _is_zeros(head: bytes) -> bool:
    return not any(head)


_CONTENTS: tuple[tuple[Callable[[bytes], bool], Content], ...] = (
    (
        _starts(b"version https://git-lfs"),
        Content(
            "a git LFS pointer: a short text that stands for the real file",
            "fetch the real file with `git lfs pull`, or download it directly",
        ),
    ),
    (_is_html, Content("an HTML page: the download was a web page", _AGAIN + " from the direct file link")),
    (
        _starts(b"PK\x03\x04", b"PK\x05\x06"),
        Content(
            "a zip archive, as torch.save writes it (pickle)",
            "rename the file to end in .pth, or use the .safetensors version of the same model",
        ),
    ),
    (
        _starts(b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        Content("a pickle", "use the .safetensors version of the same model"),
    ),
    (_starts(b"GGUF"), Content("a GGUF file under another name", "rename the file to end in .gguf")),
    (_starts(b"\x1f\x8b"), Content("a gzip archive", "unpack it, and give the file inside")),
    (_starts(b"7z\xbc\xaf\x27\x1c"), Content("a 7z archive", "unpack it, and give the file inside")),
    (_is_json, Content("JSON text: an error message or a configuration, not tensors", _AGAIN)),
    (_is_zeros, Content("zeros at the start: a download that was never finished", _AGAIN)),
)
