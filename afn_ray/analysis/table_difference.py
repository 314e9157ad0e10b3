"""The first difference between a stored table and the same table computed anew."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from afn_ray.text import count

RELATIVE = 1e-9
"""Relative tolerance between two computations of a mean, as the order of a sum may differ.

Everything else must be equal.
"""
FITTED = ("expected", "beyond", "beyond_low", "beyond_high")
"""Columns that come from the fit of ``reduce.smooth``."""
ABSOLUTE = 1e-6
"""Absolute tolerance of the ``FITTED``: the fit of older runs ended less exactly."""


def difference(stored: pa.Table, expected: pa.Table) -> str:
    """The first difference between two tables, beyond rounding of floats; empty without one."""
    if stored.column_names != expected.column_names:
        return f"its columns are {stored.column_names}, expected {expected.column_names}"
    if len(stored) != len(expected):
        return f"it has {count(len(stored), 'row')}, expected {len(expected)}"
    for name in expected.column_names:
        ours, theirs = expected[name], stored[name]
        row = _first_difference(theirs, ours, ABSOLUTE if name in FITTED else 1e-12)
        if row is not None:
            return f"row {row}: {name} is {theirs[row]}, but its shards give {ours[row]}"
    return ""


def _first_difference(
    stored: pa.ChunkedArray, expected: pa.ChunkedArray, absolute: float
) -> int | None:
    """The first row in which two columns differ, beyond rounding of floats; None without one."""
    if pa.types.is_floating(expected.type) and expected.null_count == stored.null_count:
        is_equal = np.isclose(
            stored.to_numpy(), expected.to_numpy(), rtol=RELATIVE, atol=absolute, equal_nan=True
        )
        return None if is_equal.all() else int(np.argmin(is_equal))
    if stored.equals(expected):
        return None
    pairs = zip(stored.to_pylist(), expected.to_pylist(), strict=True)
    return next((row for row, (a, b) in enumerate(pairs) if a != b), None)
