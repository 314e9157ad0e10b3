"""The kernel, in Triton, that adds, normalises and casts in one pass over memory.

Importing this module needs triton, which torch's CUDA wheels bring along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS_PER_WARP, MOST_WARPS = 256, 16
"""Columns of a row for which a program has one warp, and its largest number of warps."""


@triton.jit  # type: ignore[untyped-decorator]
def add_norm_cast_row(
    added: tl.tensor,
    residual: tl.tensor,
    gain: tl.tensor,
    bias: tl.tensor,
    full: tl.tensor,
    cast: tl.tensor,
    eps: tl.tensor,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Normalise one row of ``added + residual``; every argument up to ``cast`` is a pointer.

    The order of the sums depends on ``BLOCK`` and the number of warps: not on the other rows.
    """
    column = tl.arange(0, BLOCK)
    inside = column < NUM_COLUMNS
    at = tl.program_id(0).to(tl.int64) * NUM_COLUMNS + column
    x = tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / NUM_COLUMNS
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / NUM_COLUMNS
    y = centred * tl.rsqrt(variance + eps)
    y = y * tl.load(gain + column, mask=inside, other=0.0)
    y += tl.load(bias + column, mask=inside, other=0.0)
    tl.store(full + at, y, mask=inside)
    tl.store(cast + at, y.to(cast.dtype.element_ty), mask=inside)


def block_of(num_columns: int) -> tuple[int, int]:
    """Columns that a program for rows of ``num_columns`` holds, and its number of warps."""
    block = triton.next_power_of_2(num_columns)
    return block, min(MOST_WARPS, max(1, block // COLUMNS_PER_WARP))


def add_norm_cast(
    added: torch.Tensor, residual: torch.Tensor, norm: torch.nn.LayerNorm, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``norm(added + residual)`` in float32, and the same in ``dtype``.

    Both inputs and both results have one shape, [..., columns]. The inputs may be of any floating
    dtype; the sum and the norm are float32.
    """
    assert added.shape == residual.shape, (added.shape, residual.shape)
    added = added.contiguous()
    residual = residual.contiguous()
    full = torch.empty_like(added, dtype=torch.float32)
    cast = torch.empty_like(added, dtype=dtype)
    num_columns = added.shape[-1]
    if num_rows := added.numel() // num_columns:
        block, num_warps = block_of(num_columns)
        add_norm_cast_row[(num_rows,)](
            added,
            residual,
            norm.weight,
            norm.bias,
            full,
            cast,
            norm.eps,
            num_columns,
            block,
            num_warps=num_warps,
        )
    return full, cast
