"""Text for people: escape terminal control characters, count nouns, suggest similar names."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that act on a terminal: control, bidirectional and surrogate characters."""

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that a page does not show or that reorder their neighbours."""
JOINERS = "\u200c\u200d"
"""Format characters that spelling needs: zero-width non-joiner and joiner."""

_INNER = r"['\x{2019}\x{02bc}\-\x{2010}\x{2011}\x{200c}\x{200d}]"
_HAN = r"\x{3400}-\x{4dbf}\x{4e00}-\x{9fff}\x{f900}-\x{faff}\x{20000}-\x{3fffd}"
_HANGUL, _YI = r"\x{ac00}-\x{d7a3}", r"\x{a000}-\x{a48c}"
_OLDER = r"\p{Tangut}\p{Nushu}\p{Khitan_Small_Script}"
_SYLLABLE = f"[{_HAN}{_HANGUL}{_YI}{_OLDER}]"
"""Characters of the scripts in which one of them writes a whole syllable with a meaning.

They are Han, Hangul, Yi, Tangut, Nushu and Khitan. A single kana, Thai consonant or Latin letter is
mostly an ending, a mark or an initial.
"""
WORD_FORM = rf"^(?:\p{{L}}(?:{_INNER}?[\p{{L}}\p{{M}}])+|{_SYLLABLE})$"
"""Pattern of RE2, for Arrow and DuckDB: a word that rankings of words may show.

It has two letters or marks or more, the first a letter, or is one character that writes a syllable
with a meaning. There may be an apostrophe, a hyphen or one of ``JOINERS`` between two of them.
"""


def printable(text: str, keep: str = "") -> str:
    """``text`` with the characters in ``UNSAFE`` as escapes, except those in ``keep``."""

    def shown(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in keep else ascii(character)[1:-1]

    return UNSAFE.sub(shown, text)


def visible(text: str, keep: str = "") -> str:
    """``text`` with all ``HIDDEN`` characters as escapes, except ``JOINERS`` and those in ``keep``.

    ``printable`` leaves more of them as they are, and writes a line feed as \\n, not as \\x0a.
    """
    keep += JOINERS
    return "".join(
        c if c in keep or unicodedata.category(c) not in HIDDEN else _escape(c) for c in text
    )


def _escape(c: str) -> str:
    return f"\\x{ord(c):02x}" if ord(c) < 32 else ascii(c)[1:-1]


def count(n: int, noun: str) -> str:
    """``n`` and ``noun``, with an s unless n is 1: "1 shard", "1,000 shards"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"  # n may be NumPy's


def nearest(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Known names similar to the ``unknown`` ones, as a hint in brackets, or ""."""
    found: list[str] = []
    for name in unknown:
        found += difflib.get_close_matches(name, known, 1)
    return f" (did you mean {', '.join(found)}?)" if found else ""
