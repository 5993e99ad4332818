"""Prompts -> text features. The vocabulary stays on disk: only the rows a prompt needs are read.

What was encoded before comes from the cache, and the encoder is not touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.job import Job
from lowvram.machine import Machine
from lowvram.model import Group, Model
from lowvram.models import umt5
from lowvram.planning.facts import compute_dtype, prompts_of
from lowvram.planning.text import text_groups
from lowvram.planning.visits import layouts_of
from lowvram.quant.rows import gather_rows
from lowvram.stages.run import Run
from lowvram.text_cache import TextCache, text_key
from lowvram.tokenizer import tokenize


def features(run: Run, model: Model, job: Job, cache: TextCache | None) -> list[Tensor]:
    """As `encode` gives them, of every prompt that the job needs; from `cache` if all of them are there."""
    if cache is None:
        return encode(run, model, prompts_of(job))
    keys = _keys(model, job, run.plan.dtype, run.plan.machine)
    found = _load(cache, keys, model, run.plan.dtype)
    if found is not None:
        with run.stage("text"):
            run.tell("text: cached, the text encoder is not loaded")
            run.step("text")
            return [text.to(run.device.torch_device) for text in found]
    texts = encode(run, model, prompts_of(job))
    for (key, _), text in zip(keys, texts, strict=True):
        cache.store(key, text)
    return texts


def is_cached(model: Model, job: Job, cache: TextCache | None, machine: Machine) -> bool:
    """Whether `features` would need no text encoder."""
    if cache is None or model.tokenizer is None:
        return False
    dtype = compute_dtype(machine)
    return _load(cache, _keys(model, job, dtype, machine), model, dtype) is not None


def _keys(model: Model, job: Job, dtype: torch.dtype, machine: Machine) -> list[tuple[str, int]]:
    """Name in the cache and number of tokens of every prompt."""
    return [(text_key(model, ids, dtype, machine), len(ids)) for ids in tokenize(model, prompts_of(job))]


def _load(
    cache: TextCache, keys: list[tuple[str, int]], model: Model, dtype: torch.dtype
) -> list[Tensor] | None:
    """All of them or none: one that is missing brings the whole encoder anyway."""
    found = []
    for key, n in keys:
        text = cache.load(key, (n, model.spec.text.dim), dtype)
        if text is None:
            return None
        found.append(text)
    return found


@torch.inference_mode()
def encode(run: Run, model: Model, prompts: list[str]) -> list[Tensor]:
    """Text features [n, text_dim] of each prompt, on the device, in the compute dtype; n counts its true tokens."""
    ids = tokenize(model, prompts)
    groups = text_groups(model)
    table = next(ref for ref in groups["outer"].refs if ref.name == "token_embedding.weight")
    dtype, device = run.plan.dtype, run.device.torch_device
    with run.stage("text") as (_, traffic):
        rows = [gather_rows(table, i, run.open_reader, dtype).to(device) for i in ids]
        buckets = [umt5.relative_buckets(len(i), device) for i in ids]
        with run.streamed(layouts_of(groups, "text"), traffic) as stream:
            for (_, n), views in stream:
                run.check_ram()
                p = run.params(groups[f"blocks.{n}"], views)
                rows = [umt5.layer(p, model.spec.text, x, b) for x, b in zip(rows, buckets, strict=True)]
                run.step("text")
        norm = Group(tuple(r for r in groups["outer"].refs if r.name == "norm.weight"), {})
        with run.loaded("norm", norm, traffic) as p:
            return [umt5.rms_norm(x, p["norm.weight"]) for x in rows]
