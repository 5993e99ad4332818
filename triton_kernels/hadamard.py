"""The rotation that ConvRot files apply to their weights: groups of columns times a regular Hadamard matrix.

The matrix of size 4^k is the k-fold Kronecker power of the 4x4 matrix with -1 on the anti-diagonal and 1
elsewhere, over sqrt(4^k). It is symmetric and its own inverse (comfy-kitchen `backends/eager/convrot_w4a4.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_rotation(group: int) -> bool:
    """Whether there is such a matrix of this size, of those met in files: 4, 16, 64, 256, 1024, 4096."""
    return group in (4, 16, 64, 256, 1024, 4096)


def root(group: int) -> int:
    """sqrt(group) of a size that `is_rotation`: a power of two, so dividing by it is exact."""
    return 1 << (group.bit_length() - 1) // 2


def factors(group: int) -> tuple[int, ...]:
    """Sizes of at most two smaller such matrices whose Kronecker product the matrix of a size is; () where a kernel cannot
    turn integers of 8 bits by them exactly.

    After the first factor the sums of 16 of them fit the 11 bits of fp16, which the second takes; those of 64 do not.
    """
    return {16: (16,), 64: (64,), 256: (16, 16)}.get(group, ())


def rotate(x: Tensor, group: int) -> Tensor:
    """Groups of `group` columns of x [rows, columns], float32, times the matrix without its factor.

    Sums and differences only, in a fixed order, whatever the number of rows.
    """
    shape, step = x.shape, 1
    while step < group:
        a, b, c, d = x.reshape(-1, 4, step).unbind(1)
        total = (a + b).add_(c + d)
        x = x.new_empty(total.shape[0], 4, step)
        for n, last in enumerate((d, c, b, a)):
            # A row of the 4x4 matrix is all ones but for one -1: the sum less twice that entry.
            torch.sub(total, last, alpha=2, out=x[:, n])
        step *= 4
    return x.view(shape)


def rotate_whole(q: Tensor, group: int) -> Tensor:
    """`rotate` for integers q [rows, columns] of at most 8 bits, as one matrix product: float32, and exact.

    No partial sum leaves the 24 bits of float32, and the factors fit the shortest inputs that a fast product may
    round to (bfloat16, TF32), so neither order nor precision of the product can change a bit.
    """
    small = 1 - 2 * torch.eye(4, device=q.device).flip(1)
    matrix = small
    while matrix.shape[0] < group:
        matrix = torch.kron(matrix, small)
    return (q.reshape(-1, group).to(torch.float32) @ matrix).view(q.shape)
