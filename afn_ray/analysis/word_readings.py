"""Words of several tokens in a text, compared with the same words in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from afn_ray.reduce.stats import is_high
from afn_ray.reduce.word_sums import WORD_CHARS, normalised
from afn_ray.schema import SPECIAL, WORD_START
from afn_ray.tokens.encode import Encoded


@dataclass(frozen=True, slots=True)
class Usual:
    """Figures of a token's type, or of a word, at one layer, from the run."""

    n: int  # occurrences
    median: float  # of a word's strongest tokens
    share_high: float | None  # null for a special token, which is neither HIGH nor LOW


@dataclass(frozen=True, slots=True)
class WordReading:
    """A word at one layer, by its strongest token, compared with the run."""

    layer: int
    strength: float
    high: bool
    usual: Usual | None  # None: the word is too rare in the run, or not there


@dataclass(frozen=True, slots=True)
class ExplainedWord:
    """A word of several tokens."""

    text: str  # as in the text
    first: int  # index of its first token
    n_tokens: int
    readings: tuple[WordReading, ...]  # in the order of ``Explanation.layers``


class TextWord(NamedTuple):
    """A word of several tokens of a text."""

    text: str  # as in the text
    name: str  # as in ``word_vocabulary``
    first: int  # index of its first token
    n_tokens: int


def words_in(text: str, encoded: Encoded) -> list[TextWord]:
    """The words of several tokens of ``text``."""
    found = []
    for first, size in _spans(encoded):
        if size == 1:
            continue
        begin = int(encoded.start[first])
        last = int(encoded.end[first + size - 1])
        end = max(last, int(encoded.word_end[first]))  # marks that no token covers are the word's
        written = text[begin:end].strip()
        found.append(TextWord(written, normalised(written[:WORD_CHARS]), first, size))
    return found


def explained_words(
    words: Sequence[TextWord],
    strengths: Mapping[int, Any],
    q3: Mapping[int, float],
    table: pa.Table | None,
) -> tuple[ExplainedWord, ...]:
    """``words`` compared with the run.

    ``strengths`` [n_tokens] and ``q3`` are by layer. ``table`` has the rows of ``word_vocabulary``
    of these words; None: the run has no such table, and the words are left out.
    """
    if table is None:
        return ()
    usual = {
        (row["layer"], row["word"]): Usual(row["n"], row["q2"], row["share_high"])
        for row in table.to_pylist()
    }
    found = []
    for written, name, first, size in words:
        readings = []
        for layer, of_layer in strengths.items():
            strongest = float(of_layer[first : first + size].max())
            high = bool(is_high(np.asarray(strongest, np.float32), q3[layer]))
            readings.append(WordReading(layer, strongest, high, usual.get((layer, name))))
        found.append(ExplainedWord(written, first, size, tuple(readings)))
    return tuple(found)


def _spans(encoded: Encoded) -> list[tuple[int, int]]:
    """First token of each word and its number of tokens; special tokens belong to none."""
    spans: list[tuple[int, int]] = []
    for at, flags in enumerate(encoded.flags.tolist()):
        if flags & SPECIAL:
            continue
        if flags & WORD_START or not spans:
            spans.append((at, 1))
        else:
            first, size = spans[-1]
            spans[-1] = (first, size + 1)
    return spans
