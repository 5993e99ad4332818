"""Whether the weights of a model can be multiplied as int8: what `--matmul` may choose for it."""

from __future__ import annotations

from collections import Counter

from lowvram.model import Model
from lowvram.models.dit import INT8_LINEARS


def unfit_for_int8(model: Model) -> str:
    """What the Linears in the blocks of a transformer are stored as, of one that has none in int8; "" if all have some.

    Files leave some layers in a longer format. Those are multiplied exactly.
    """
    for name, transformer in model.transformers.items():
        stored = [
            ref.encoding
            for key, ref in transformer.refs.items()
            if key.startswith("blocks.")
            and key.endswith(".weight")
            and key.split(".", 2)[2].startswith(INT8_LINEARS)
            and len(ref.shape) == 2
        ]
        if not any(encoding.int8_rows for encoding in stored):
            which = "" if len(model.transformers) == 1 else f" of the {name}-noise transformer"
            usual = Counter(encoding.name for encoding in stored).most_common(1)[0][0]
            return f"the weights{which} are {usual}"
    return ""
