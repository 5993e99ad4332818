"""quant: bytes <-> numbers.

In come model files (hostile until parsed); out go checkpoints, encoded weights and the Linear that
multiplies by them. May import torch, numpy and lowvram.triton_kernels; never lowvram.offload or the product.
"""

if __name__ != "lowvram.quant":
    raise ImportError(f"import lowvram.quant, not {__name__}")
