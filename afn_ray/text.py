"""Text for people: what acts on a terminal escaped, counts with their noun, names that may have
been meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves the cursor, rings, recolours or reorders a terminal: control characters and those of
direction.
"""


def printable(text: str, keep: str = "") -> str:
    """``text`` with characters that act on a terminal shown as escapes, those in ``keep`` left as
    they are.
    """
    return UNSAFE.sub(lambda m: m[0] if m[0] in keep else ascii(m[0])[1:-1], text)


def count(n: int, noun: str) -> str:
    """``n`` of ``noun``, which takes an s for more than one: "1 shard", "1,000 shards"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def nearest(unknown: Sequence[str], known: Sequence[str]) -> str:
    """What may have been meant by ``unknown`` names, in brackets; empty where no known one is
    near.
    """
    found = [near for name in unknown for near in difflib.get_close_matches(name, known, 1)]
    return f" (did you mean {', '.join(found)}?)" if found else ""
