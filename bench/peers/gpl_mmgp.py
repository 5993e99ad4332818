"""mmgp, asked to move the weights of one transformer.

mmgp is GPL-3.0. This file is read only by a process of mmgp's own environment (environments.py), in which nothing of
lowvram is imported; nothing of mmgp's is copied here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from programs import Forward, Mode, forward_of, model, on_gpu
from sizes import Work


def budgeted(work: Work, stack: ExitStack) -> Forward:
    from mmgp import offload

    net = model(work)
    # Its budgets are in MiB and it keeps two of them; the rest of the cap is left to what the forward needs.
    budget = max(400, work.cap // 4 >> 20) if work.cap else 1200
    on_gpu(
        work, offload.all, {"transformer": net}, pinnedMemory=True, quantizeTransformer=False, budgets=budget,
        asyncTransfers=True, convertWeightsFloatTo=torch.bfloat16,
    )  # fmt: skip
    return forward_of(net, work)


MODES: Mapping[str, Mode] = {"mmgp budget": budgeted}
