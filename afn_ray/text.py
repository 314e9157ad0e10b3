"""Text for people: escape terminal control characters, count nouns, suggest similar names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that act on a terminal: control, bidirectional and surrogate characters."""


def printable(text: str, keep: str = "") -> str:
    """``text`` with the characters in ``UNSAFE`` as escapes, except those in ``keep``."""
    return UNSAFE.sub(lambda m: m[0] if m[0] in keep else ascii(m[0])[1:-1], text)


def count(n: int, noun: str) -> str:
    """``n`` and ``noun``, with an s unless n is 1: "1 shard", "1,000 shards"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def nearest(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Known names similar to the ``unknown`` ones, as a hint in brackets, or ""."""
    found = [near for name in unknown for near in difflib.get_close_matches(name, known, 1)]
    return f" (did you mean {', '.join(found)}?)" if found else ""
