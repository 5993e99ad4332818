"""The story of one request: text, denoise, decode, write, in this order.

A stage takes the device, its part of the plan and the tensors of the stage before it, works inside the claims
the plan gave it, and leaves nothing on the device.
"""
