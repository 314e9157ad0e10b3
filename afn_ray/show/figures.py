"""Figures and tokens as text."""

from __future__ import annotations

from afn_ray.text import printable

MAX_CHARS = 40
"""Largest length of a token in a table cell, in characters."""
MARKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
"""Visible characters in place of white space."""


def number(value: float | None, digits: int | None = None) -> str:
    """Format with five digits, or with ``digits`` decimals; a dash for None."""
    if value is None:
        return "–"
    return figure(value) if digits is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Format as a percentage with one decimal; a dash for None."""
    return "–" if value is None else f"{value:.1%}"


def cut(text: str) -> str:
    """A token as a table cell: visible white space, no control characters, limited length."""
    text = printable(text, keep="\n\t").translate(MARKS)
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


def figure(value: float) -> str:
    """Format ``value`` with about five digits."""
    num_digits = len(str(int(abs(value))))
    num_decimals = max(0, 5 - num_digits)
    return f"{value:,.{num_decimals}f}"
