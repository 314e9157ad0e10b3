"""Match the words of two runs, or of two layers of one, at their places in the same texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.query.database import Run
from afn_ray.reduce.stats import spearman

MAX_DOCUMENTS = 1 << 22
"""Largest number of documents of a run whose texts are compared: those with the lowest hashes."""
MAX_TOKENS = 5_000_000
"""Largest number of tokens of a run whose words are matched, in whole documents."""
LENGTH_BITS = 10
"""Bits of a key of an occurrence that hold the length of the word."""
PLACE_BITS = 32
"""Bits that hold its place; the other bits hold the number of the document."""

UInts = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two sets of HIGH words, among ``n`` that both sides have."""

    n: int
    n_both: int  # words that are HIGH in A and in B
    n_only_a: int
    n_only_b: int

    @classmethod
    def of(cls, a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> Overlap:
        """The overlap of ``a`` and ``b``, which say of each word whether it is HIGH; [n]."""
        both = int((a & b).sum())
        n_a = int(a.sum())
        n_b = int(b.sum())
        return cls(len(a), both, n_a - both, n_b - both)

    @property
    def jaccard(self) -> float | None:
        """Share of the words that are HIGH in both, of those in either; None where none is."""
        n_any = self.n_both + self.n_only_a + self.n_only_b
        return self.n_both / n_any if n_any else None

    @property
    def by_chance(self) -> float | None:
        """Jaccard of two independent sets as large as these; None where it does not exist."""
        if self.jaccard is None:
            return None
        a = (self.n_both + self.n_only_a) / self.n
        b = (self.n_both + self.n_only_b) / self.n
        return a * b / (a + b - a * b)


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents with words whose texts were compared by hash, copies by number."""

    n_a: int
    n_b: int
    n_both: int  # documents of either that are matched with one of the other
    is_cut: bool
    """True if only texts with the lowest hashes were read, as a run has more than fit."""


@dataclass(frozen=True, slots=True)
class MatchedWords:
    """Words of documents that both runs have, matched by their place in the text."""

    num_documents: int
    """Documents whose words were matched: all that both have, or as many as fit."""
    n_a: int
    """Words of A in these documents; some may match no word of B, as tokenizers cut differently."""
    n_b: int
    high: Overlap
    spearman: float | None
    """Rank correlation of the matched words' strengths; None where either is constant."""


class _Documents(NamedTuple):
    """Documents of a run with words, by the hash of their text, then by ``doc``; each [n]."""

    text: UInts  # the first 64 bits of the text's SHA-256
    doc: npt.NDArray[np.int64]
    n_tokens: npt.NDArray[np.int64]

    def among(self, kept: npt.NDArray[Any]) -> _Documents:
        return _Documents(self.text[kept], self.doc[kept], self.n_tokens[kept])


def match_texts(a: Run, b: Run) -> tuple[Texts, pa.Table, pa.Table]:
    """The documents of two runs that have the same text, matched one to one.

    Returns the counts and, for each run, the documents to read: ``doc`` and ``number``, that of
    its match. Copies of a text are matched in their order. Raises ``QueryError`` for a query over
    the limits of a run.
    """
    sides = [_documents(run) for run in (a, b)]
    limits = [side.text[-1] for side in sides if len(side.text) == MAX_DOCUMENTS]
    if limits:  # what is beyond the last text of one side may be in the other
        sides = [side.among(side.text < min(limits)) for side in sides]
    in_a, in_b = sides
    both_a = in_a.among(_has_match(in_a, in_b))
    both_b = in_b.among(_has_match(in_b, in_a))
    texts = Texts(len(in_a.doc), len(in_b.doc), len(both_a.doc), bool(limits))
    fits = np.cumsum(np.maximum(both_a.n_tokens, both_b.n_tokens)) <= MAX_TOKENS
    number = np.arange(int(fits.sum()), dtype=np.uint64)
    of_a = pa.table({"doc": both_a.doc[fits], "number": number})
    of_b = pa.table({"doc": both_b.doc[fits], "number": number})
    return texts, of_a, of_b


def _documents(run: Run) -> _Documents:
    found = run.sql(
        "SELECT ('0x' || left(text_sha256, 16))::UBIGINT AS text, doc, "  # noqa: S608
        "n_tokens::BIGINT AS n_tokens "
        "FROM documents WHERE n_tokens > 0 AND duplicate_of IS NULL AND text_sha256 IS NOT NULL "
        f"ORDER BY text, doc LIMIT {MAX_DOCUMENTS}"
    ).to_arrow_table()
    return _Documents(*(found[name].to_numpy() for name in _Documents._fields))


def _has_match(documents: _Documents, others: _Documents) -> npt.NDArray[np.bool_]:
    """True if ``others`` have as many copies of each text as it has up to this document."""
    text = documents.text
    nth = np.arange(len(text)) - np.searchsorted(text, text)
    copies = np.searchsorted(others.text, text, "right") - np.searchsorted(others.text, text)
    return np.asarray(nth < copies)


class _Occurrences(NamedTuple):
    """Words of documents; each [n]."""

    key: UInts  # ascending, each once
    strength: npt.NDArray[np.float32]
    is_high: npt.NDArray[np.bool_]


def match_words(
    a: tuple[Run, int, pa.Table], b: tuple[Run, int, pa.Table], *, by_number: bool
) -> MatchedWords:
    """Match the words of two layers at their places; each side is a run, a layer and documents.

    The documents are those of ``match_texts``. Words match where they end at the same character and
    are equally long, or ``by_number`` in their document, which is right for two layers of one run.
    Raises ``QueryError`` for a query over the limits of a run.
    """
    place = "word" if by_number else '"end"'
    (of_a, n_a), (of_b, n_b) = (_occurrences(*side, place) for side in (a, b))
    _, at_a, at_b = np.intersect1d(of_a.key, of_b.key, assume_unique=True, return_indices=True)
    return MatchedWords(
        len(a[2]),
        n_a,
        n_b,
        Overlap.of(of_a.is_high[at_a], of_b.is_high[at_b]),
        spearman(of_a.strength[at_a], of_b.strength[at_b]) if len(at_a) else None,
    )


def _occurrences(run: Run, layer: int, documents: pa.Table, place: str) -> tuple[_Occurrences, int]:
    """The words of ``documents`` by their keys, and how many there are.

    Words with equal keys, as several words of one character, are left out.
    """
    length = f"least(length(trim(coalesce(text, ''))), {(1 << LENGTH_BITS) - 1})"
    key = (
        f"(number * {1 << PLACE_BITS}::UBIGINT + {place}) * {1 << LENGTH_BITS}::UBIGINT + {length}"
    )
    found = run.sql(
        f"SELECT ({key})::UBIGINT AS key, max_strength_{layer} AS strength, "  # noqa: S608
        f"high_{layer} AS is_high "
        "FROM words JOIN chosen USING (doc)",
        chosen=documents,
    ).to_arrow_table()
    keys, at, times = np.unique(found["key"].to_numpy(), return_index=True, return_counts=True)
    is_clear = times == 1
    rows = at[is_clear]
    strength = found["strength"].to_numpy()[rows]
    is_high = found["is_high"].to_numpy()[rows]
    return _Occurrences(keys[is_clear], strength, is_high), len(found)
