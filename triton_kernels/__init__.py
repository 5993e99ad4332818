"""triton_kernels: the numbers, fast.

In come tensors, out go tensors. One file per kernel family, each beside its torch reference, which is also
the CPU path. Imports torch and triton only; nothing of lowvram but its errors.
"""

if __name__ != "lowvram.triton_kernels":
    raise ImportError(f"import lowvram.triton_kernels, not {__name__}")
