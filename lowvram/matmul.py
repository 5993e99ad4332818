"""How the Linears of a model multiply: whether they can as they are stored, and a block that does."""

from __future__ import annotations

from collections import Counter

import torch

from lowvram.model import Model
from lowvram.models.dit import W8A8_LINEARS
from lowvram.quant.linear import Params
from lowvram.triton_kernels.modes import Matmul
from lowvram.triton_kernels.ops import Ops


def unfit_for(form: str, model: Model) -> str:
    """Why the weights of `model` cannot be multiplied in the 8-bit `form` ("int8", "fp8"): what those of its first
    transformer without any in that form usually are; "" if every transformer has some.

    Some are enough: files leave a few layers in a longer format, and those are multiplied exactly.
    """
    for name, transformer in model.transformers.items():
        stored = [
            ref.encoding
            for key, ref in transformer.refs.items()
            if key.startswith("blocks.")
            and key.endswith(".weight")
            and key.split(".", 2)[2].startswith(W8A8_LINEARS)
            and len(ref.shape) == 2
        ]
        if not any(encoding.w8a8 == form for encoding in stored):
            which = "" if len(model.transformers) == 1 else f" of the {name}-noise transformer"
            usual = Counter(encoding.name for encoding in stored).most_common(1)[0][0]
            return f"the weights{which} are {usual}"
    return ""


def as_multiplied(block: Params, how: Matmul, ops: Ops, dtype: torch.dtype) -> Params:
    """The block with its 8-bit weights multiplied as they are stored, by activations that are quantised from `dtype`;
    the block itself if `how` is exact."""
    return block if how.exact else block.multiplied(W8A8_LINEARS, ops.w8a8(how.mode), dtype)
