"""Characters of texts as arrays: code points, white space, letters and marks."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Characters = npt.NDArray[np.uint32]
"""Code points of texts, one text after the other."""
Ints = npt.NDArray[np.int64]
Integers = npt.NDArray[np.signedinteger[Any]]
"""Integers of 32 or 64 bits."""
Bools = npt.NDArray[np.bool_]

FIRST_MARK = 0x300
"""Lowest code point of a mark: an accent, a vowel sign or a point."""

# CJK and emoji, which need no joining, start at U+2E80.
_CATEGORIES = [unicodedata.category(chr(c))[0] for c in range(0x2E80)]
"""Major category of each character below U+2E80."""
_MARK = np.array([c == "M" for c in _CATEGORIES])
_LETTER = np.array([c in "LM" for c in _CATEGORIES])
_IS_SPACE = np.array([chr(c).isspace() for c in range(0x3002)])
"""True if each character up to U+3001 is white space; none above is."""


def all_characters(texts: Sequence[str]) -> tuple[Characters, Ints]:
    """Code points of all ``texts``, and the index at which each text begins.

    The last index is the end of the last text.
    """
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    return characters, np.cumsum([0, *map(len, texts)], dtype=np.int64)


def is_space(characters: Characters, at: Ints) -> Bools:
    """True if the characters ``at`` are white space, bool [n_at].

    Indices outside ``characters`` mean its first or last one.
    """
    return _IS_SPACE[_taken(characters, at, len(_IS_SPACE) - 1)]


def is_mark(characters: Characters, at: Ints) -> Bools:
    """True if the characters ``at`` are marks that a word may need joining at, bool [n_at]."""
    return _MARK[_taken(characters, at, len(_MARK) - 1)]


def is_letter(characters: Characters, at: Ints) -> Bools:
    """True if the characters ``at`` are letters or marks, of scripts below U+2E80; bool [n_at]."""
    return _LETTER[_taken(characters, at, len(_LETTER) - 1)]


def _taken(characters: Characters, at: Ints, last: int) -> Characters:
    """The characters ``at``, those above ``last`` as ``last``; without any, zeros."""
    if not len(characters):
        return np.zeros(len(at), np.uint32)
    found: Characters = np.minimum(np.take(characters, at, mode="clip"), np.uint32(last))
    return found


def ranges(begins: Ints, lengths: Ints) -> Ints:
    """The numbers from each of ``begins`` on, as many as its length, one range after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(total)
