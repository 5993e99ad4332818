"""Model files: headers only, from hostile bytes to named, checked tensors.

A parser takes an opened `Reader` and gives a `Header`, or raises FileError. It never reads tensor data, never
trusts a length before comparing it with the file, and never runs anything it finds.
"""
