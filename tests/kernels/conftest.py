"""Triton's interpreter, for the tests of kernels: they run on a CPU, tensor by tensor, in NumPy.

Triton chooses it when it is imported, and a process that has chosen it cannot compile. So the files here named
`interpreted_*.py` run in a child process each, started by `test_interpreter.py`. To run one by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_attention.py

What it does wrong, and what is done about that, is in `lowvram/bench/interpreter.py`.
"""

from __future__ import annotations

import os

from lowvram.bench import interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.mend()
