"""Rotations inside kernels, that of `hadamard` and that of `norm_rope`: products with matrices of 1 and -1 that are made in
registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hadamard(SIZE: tl.constexpr):
    """[SIZE, SIZE] of 1 and -1, SIZE 16 or 64: that of 4, all ones but for the anti-diagonal, two or three times."""
    i = tl.arange(0, SIZE)
    matrix = tl.where((i % 4)[:, None] + (i % 4)[None, :] == 3, -1.0, 1.0)
    matrix *= tl.where((i // 4 % 4)[:, None] + (i // 4 % 4)[None, :] == 3, -1.0, 1.0)
    if SIZE == 64:
        matrix *= tl.where((i // 16)[:, None] + (i // 16)[None, :] == 3, -1.0, 1.0)
    return matrix


@triton.jit
def sylvester(SIZE: tl.constexpr):
    """[SIZE, SIZE] of 1 and -1, SIZE at most 256: -1 where the numbers of row and column share an odd number of bits."""
    n = tl.arange(0, SIZE)
    shared = n[:, None] & n[None, :]
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    return tl.where((shared & 1) == 1, -1.0, 1.0)


@triton.jit
def rotated_integers(q, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Whole numbers q [BLOCK] of at most 8 bits -> float32, groups of GROUP (16, 64 or 256) rotated but for the factor.

    Exact: 16 or 64 of them fit float32 where they are summed, and 16 of them the fp16 that the second product takes.
    """
    SIZE: tl.constexpr = 64 if GROUP == 64 else 16
    matrix = hadamard(SIZE).to(tl.float16)
    y = tl.dot(tl.reshape(q.to(tl.float16), [BLOCK // SIZE, SIZE]), matrix, out_dtype=tl.float32)
    if GROUP == 256:
        y = tl.permute(tl.reshape(y, [BLOCK // 256, 16, 16]), [0, 2, 1])
        y = tl.dot(tl.reshape(y, [BLOCK // 16, 16]).to(tl.float16), matrix, out_dtype=tl.float32)
        y = tl.permute(tl.reshape(y, [BLOCK // 256, 16, 16]), [0, 2, 1])
    return tl.reshape(y, [BLOCK])
