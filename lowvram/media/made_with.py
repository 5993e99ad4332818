"""What made a picture or a video, as the file itself says: the settings that lowvram, ComfyUI and WanGP store.

lowvram and WanGP write one JSON object into the comment, ComfyUI writes its graph as `prompt` and `workflow`, into the
tags of a video or the text chunks of a PNG. All of it comes from strangers: texts are bounded before they are parsed, and
nothing is taken from them but numbers and clipped texts.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowvram.errors import FileError
from lowvram.offload.io import FileReader

MAX_TEXT = 4 << 20
"""Characters of one text that are looked at."""
MAX_CHUNKS = 4096
MAX_NODES = 2000
MAX_DIGITS = 24
"""Of a whole number: seeds have 20."""
MAX_VALUE = 2000
"""Characters of one value that are shown."""
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")

_WANGP = (
    "type", "model_type", "model_filename", "prompt", "negative_prompt", "resolution", "video_length",
    "num_inference_steps", "seed", "guidance_scale", "guidance2_scale", "switch_threshold", "flow_shift", "sample_solver",
    "activated_loras", "loras_multipliers", "image_start", "image_end", "generation_time",
)  # fmt: skip
_COMFY_INPUTS: Mapping[str, str] = {
    "unet_name": "models", "ckpt_name": "models", "model": "models", "gguf_name": "models", "vae_name": "vae",
    "clip_name": "text_encoder", "lora_name": "loras", "lora": "loras", "text": "texts", "positive_prompt": "texts",
    "seed": "seed", "noise_seed": "seed", "steps": "steps", "cfg": "guidance", "sampler_name": "solver",
    "scheduler": "schedule", "shift": "shift", "width": "width", "height": "height", "length": "frames",
    "num_frames": "frames", "fps": "fps", "frame_rate": "fps", "image": "image", "start_at_step": "start_at_step",
    "end_at_step": "end_at_step",
}  # fmt: skip
"""What an input of a node is called here, for the nodes people make Wan videos with."""


def made_with(tags: Mapping[str, str]) -> dict[str, Any]:
    """{"made_with": program, "job": its settings} from a file's tags or texts; empty if no program is recognised."""
    lower = {key.lower(): text for key, text in tags.items() if len(text) <= MAX_TEXT}
    for key in ("comment", "description", "\xa9cmt", "parameters"):
        settings = _object(lower.get(key, ""))
        if "lowvram" in settings:
            return {"made_with": f"lowvram {_clipped(settings['lowvram'])}", "job": _plain(settings)}
        if "model_type" in settings or str(settings.get("type", "")).lower().startswith("wangp"):
            return {"made_with": "WanGP", "job": _plain({k: settings[k] for k in _WANGP if k in settings})}
        # VideoHelperSuite puts ComfyUI's graph into the comment.
        if isinstance(settings.get("prompt"), str | dict) and "workflow" in settings:
            graph = settings["prompt"]
            return _comfy(graph if isinstance(graph, dict) else _object(graph))
    if "prompt" in lower or "workflow" in lower:
        return _comfy(_object(lower.get("prompt", "")))
    return {}


def png_texts(path: Path) -> dict[str, str]:
    """The texts of a PNG file, by keyword. Pixels are passed over. FileError if it is no PNG file."""
    texts: dict[str, str] = {}
    with FileReader(path) as reader:
        if reader.read_at(0, min(8, reader.size)) != _PNG:
            raise FileError("not a PNG file", where=str(path), advice="check the path")
        offset = len(_PNG)
        for _ in range(MAX_CHUNKS):
            if offset + 12 > reader.size:
                break
            head = reader.read_at(offset, 8)
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"IEND" or length > reader.size - offset - 12:
                break
            if kind in _TEXT_CHUNKS and length <= MAX_TEXT:
                texts |= _png_text(kind, reader.read_at(offset + 8, length))
            offset += 12 + length
    return texts


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file, in pixels. FileError if it is no PNG file."""
    with FileReader(path) as reader:
        head = reader.read_at(0, min(24, reader.size))
    if len(head) < 24 or not head.startswith(_PNG):
        raise FileError("not a PNG file", where=str(path), advice="check the path")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _png_text(kind: bytes, data: bytes) -> dict[str, str]:
    keyword, _, rest = data.partition(b"\0")
    name = keyword.decode("latin-1")
    try:
        if kind == b"tEXt":
            return {name: rest.decode("latin-1")}
        if kind == b"zTXt":
            return {name: _inflated(rest[1:]).decode("latin-1")}
        packed, rest = rest[:1] == b"\x01", rest[2:]
        text = rest.split(b"\0", 2)[2]
        return {name: (_inflated(text) if packed else text).decode("utf-8", "replace")}
    except (zlib.error, IndexError):
        return {}


def _inflated(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, MAX_TEXT)


def _float(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _int(text: str) -> int | str:
    return int(text) if len(text) <= MAX_DIGITS else text


_READER = json.JSONDecoder(parse_float=_float, parse_int=_int, parse_constant=str)
"""Numbers that are none, or that no seed and no setting is as large as, stay the text that they are."""


def _object(text: str) -> dict[str, Any]:
    """A text as a JSON object; empty for anything else."""
    try:
        found = _READER.decode(text) if text.lstrip().startswith("{") else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _comfy(graph: Mapping[str, Any]) -> dict[str, Any]:
    """What the nodes of a ComfyUI graph say, each thing in the order of the nodes."""
    job: dict[str, list[Any]] = {}
    for inputs in _inputs(graph):
        for name, value in inputs.items():
            called = _COMFY_INPUTS.get(name)
            if called is None or isinstance(value, bool) or not isinstance(value, str | int | float):
                continue
            shown = _clipped(value)
            if called == "loras" and isinstance(inputs.get("strength_model"), int | float):
                shown = f"{shown}@{inputs['strength_model']:g}"
            if shown not in job.setdefault(called, []):
                job[called].append(shown)
    return {"made_with": "ComfyUI", "job": {name: v[0] if len(v) == 1 else v for name, v in job.items()}}


def _inputs(graph: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for _, node in zip(range(MAX_NODES), graph.values(), strict=False):
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
            yield node["inputs"]


def _clipped(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= MAX_VALUE else value[:MAX_VALUE] + "..."
    return value


def _plain(settings: Mapping[str, Any], depth: int = 3) -> dict[str, Any]:
    """Settings with clipped texts and no deep nesting."""
    return {str(_clipped(k)): _value(v, depth) for k, v in list(settings.items())[:200]}


def _value(value: Any, depth: int) -> Any:
    if isinstance(value, dict):
        return _plain(value, depth - 1) if depth else "..."
    if isinstance(value, list):
        return [_value(each, depth - 1) for each in value[:200]] if depth else "..."
    return _clipped(value)
