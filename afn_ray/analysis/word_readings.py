"""Words of several tokens in a text, compared with the same words in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.word_sums import WORD_CHARS, normalised
from afn_ray.schema import SPECIAL, WORD_START
from afn_ray.tokens.encode import Encoded


@dataclass(frozen=True, slots=True)
class Usual:
    """Figures of a token's type, or of a word, at one layer, from the run."""

    n: int  # occurrences
    median: float  # of a word's strongest tokens
    share_high: float


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


def words_of(
    text: str,
    encoded: Encoded,
    strengths: Mapping[int, Any],
    q3: Mapping[int, float],
    table: pa.Table | None,
) -> tuple[ExplainedWord, ...]:
    """The words of several tokens of ``text``.

    ``strengths`` [n_tokens] and ``q3`` are by layer. ``table`` is the run's ``word_vocabulary``;
    None: the run has none, and there are no words.
    """
    if table is None:
        return ()
    spans = [span for span in _spans(encoded) if span[1] > 1]
    texts = []
    for first, size in spans:
        begin, last = int(encoded.start[first]), int(encoded.end[first + size - 1])
        end = max(last, int(encoded.word_end[first]))  # marks that no token covers are the word's
        texts.append(text[begin:end].strip())
    words = [normalised(written[:WORD_CHARS]) for written in texts]
    usual = _usual(table, words)
    found = []
    for written, word, (first, size) in zip(texts, words, spans, strict=True):
        readings = []
        for layer, of_layer in strengths.items():
            strongest = float(of_layer[first : first + size].max())
            is_high = strongest >= q3[layer]
            readings.append(WordReading(layer, strongest, is_high, usual.get((layer, word))))
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


def _usual(table: pa.Table, words: Sequence[str]) -> dict[tuple[int, str], Usual]:
    """Figures of ``words``, by layer and word."""
    rows = table.filter(pc.is_in(table["word"], pa.array(sorted({*words}), pa.string())))
    return {
        (row["layer"], row["word"]): Usual(row["n"], row["q2"], row["share_high"])
        for row in rows.select(["layer", "word", "n", "q2", "share_high"]).to_pylist()
    }
