"""The networks, as functions of tensors: no files, no devices, no flags.

Sizes come from `lowvram.quant.spec`, parameters through `lowvram.quant.linear.Params`. The same functions
train the embedded model, pass the parity tests and run streamed.
"""
