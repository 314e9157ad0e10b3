"""Figures and tokens as text."""

from __future__ import annotations

from afn_ray.text import printable

MAX_CHARS = 40
"""Largest length of a token in a table cell, in characters."""


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
    text = printable(text, keep="\n\t").replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


def figure(value: float) -> str:
    """Format ``value`` with about five digits."""
    return f"{value:,.{max(0, 5 - max(1, len(str(int(abs(value))))))}f}"
