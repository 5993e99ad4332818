"""offload: bytes in motion.

In come tensor references and a budget; out go tensors on a device, in the order the job needs them, never
more than the budget at once. May import lowvram.quant and lowvram.triton_kernels; never the product.
"""

if __name__ != "lowvram.offload":
    raise ImportError(f"import lowvram.offload, not {__name__}")
