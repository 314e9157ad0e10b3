"""Values of Arrow columns as plain Python values, and as the text of a table's cells."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date
from datetime import time as time_of_day
from decimal import Decimal
from typing import Any

import pyarrow as pa

from afn_ray.text import printable

MAX_CELL = 300
"""Largest length of a table cell, in characters; the number left out is shown."""


def listed(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The column's values; dates outside Python's range, such as the year 20000, become text."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ArithmeticError, ValueError):
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ArithmeticError, ValueError):
        pass
    kind = scalar.type
    if pa.types.is_struct(kind):
        return {name: _value(part) for name, part in scalar.items()}
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_value(part) for part in scalar.values]
    most = 2**31 - 1 if pa.types.is_date32(kind) else 2**63 - 1
    if getattr(scalar, "value", None) in (most, -most):
        return "infinity" if scalar.value > 0 else "-infinity"
    try:
        return scalar.cast(pa.string()).as_py()
    except (pa.ArrowException, ArithmeticError, ValueError):
        return str(scalar.value) if hasattr(scalar, "value") else repr(scalar)


def plain(value: Any) -> Any:
    """``value`` as JSON has it: bytes are hex, dates ISO 8601, NaN and infinities None.

    A DECIMAL is a number if that has all its digits, else text.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        if value == value.to_integral_value():
            return int(value)
        number = float(value)
        return number if Decimal(repr(number)) == value else format(value, "f")
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, date | time_of_day):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def as_text(value: Any) -> str | None:
    """A value of ``plain`` as text: text as it is, JSON for any other value; None stays None."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def cell_text(value: Any) -> str:
    """``value``, which is not None, as a table shows it: on one line, at most ``MAX_CELL`` long."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = printable(as_text(plain(value)) or "")
    num_left_out = len(text) - MAX_CELL
    if num_left_out > 0:
        text = f"{text[:MAX_CELL]}… (+{num_left_out:,} characters)"
    return text


def is_number(kind: pa.DataType) -> bool:
    """True if values of the type ``kind`` are aligned as numbers."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )
