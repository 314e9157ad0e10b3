"""The summary of one shard: statistics of its tokens, collected chunk by chunk."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.reduce.histogram import (
    BIN_BITS,
    BIN_MASK,
    COMPACT_KEYS,
    SPECIAL_KEY,
    Float32s,
    Histogram,
    Ints,
    SeriesSummary,
    order,
)
from afn_ray.reduce.type_tags import ALL_TYPES, TypeTags
from afn_ray.reduce.typed_bins import BinCounter, TypedBins
from afn_ray.schema import SPECIAL, TAGGED_SUMMARY_SCHEMA, WORD_START, Series

COUNTED_IDS = 1 << 18
"""Number of token ids up to which types are counted in an array, however few the tokens are."""
MOST_COUNTERS = 1 << 20
"""Largest number of pairs of a type and a language that are counted in an array, 8 MB."""


class Spoken(NamedTuple):
    """The language of each token's document."""

    codes: npt.NDArray[np.int32]  # [n_tokens], indices of ``names``; below 0: none
    names: Sequence[str]

    @classmethod
    def of(cls, docs: npt.NDArray[np.int32], languages: pa.Array) -> Spoken:
        """Read from each token's document ``docs``, an index of
        ``languages``: strings with nulls.
        """
        coded = languages.dictionary_encode()
        codes = coded.indices.fill_null(-1).to_numpy()
        return cls(codes[docs], coded.dictionary.to_pylist())

    def filter(self, which: slice | npt.NDArray[np.bool_]) -> Spoken:
        """The same of ``which`` tokens."""
        return Spoken(self.codes[which], self.names)


class Summary:
    """Statistics of one shard, collected chunk by chunk.

    Memory is bounded by the number of types times occupied bins. With ``tagged``, tokens have tags,
    and the summary also counts how often each type has each tag. Without tags of the corpus, the
    languages of words may be counted in their place. Several threads may add chunks.
    """

    def __init__(
        self, series: Sequence[Series], *, tagged: bool = False, spoken: bool = False
    ) -> None:
        self._adding = threading.Lock()
        self._values = {s: BinCounter() for s in series}
        self._docs: list[Histogram] = []
        self._word_starts: list[Histogram] = []
        self._whole_words: list[Histogram] = []
        self._tags = [TypeTags.empty()] if tagged else None
        self._spoken: list[Histogram] | None = [] if spoken else None  # keys: type, language
        self._languages: dict[str, int] = {}  # language -> its number in keys, as they came
        self._num_words = np.zeros(0, np.int64)  # words of each language, by its number

    def add(
        self,
        docs: npt.NDArray[np.int32],
        token_ids: npt.NDArray[np.int32],
        flags: npt.NDArray[np.uint8],
        values: Mapping[Series, Float32s],
        tags: pa.Array | None = None,
        spoken: Spoken | None = None,
    ) -> None:
        """Add the tokens of whole documents.

        ``values`` are [n] for each series; they must be rounded, finite and not negative. ``tags``
        are strings, null for a token without a tag. ``spoken`` has the languages of the tokens, of
        which those of whole words are counted by type, and those of all words together.
        """
        types, ranks = _ranked(token_ids, flags)
        by_type = order(ranks, len(types).bit_length())
        ends = np.cumsum(np.bincount(ranks, minlength=len(types)))
        in_docs = _in_docs(types, ends, docs[by_type])
        word_starts = _counted(types, ranks[(flags & WORD_START) > 0])
        whole = whole_words(docs, flags)
        wholes = _counted(types, ranks[whole])
        of_values = {s: TypedBins.of(types, ends, values[s], by_type) for s in self._values}
        of_tags = None if self._tags is None else TypeTags.of(token_ids, tags)
        of_languages = None
        num_words = np.zeros(0, np.int64)
        if self._spoken is not None and spoken is not None:
            numbers = self._numbers_of(spoken.names)[spoken.codes]
            of_languages = _by_language(types, ranks[whole], numbers[whole])
            of_words = numbers[(flags & WORD_START) > 0]
            num_words = np.bincount(of_words[of_words >= 0])
        with self._adding:
            self._docs.append(in_docs)
            self._word_starts.append(word_starts)
            self._whole_words.append(wholes)
            for series, counter in self._values.items():
                counter.add(of_values[series])
            if self._tags is not None and of_tags is not None:
                self._tags.append(of_tags)
                unmerged = sum(len(part.table) for part in self._tags[1:])
                if unmerged > COMPACT_KEYS:
                    self._tags[:] = [TypeTags.merge(self._tags)]
            if self._spoken is not None and of_languages is not None:
                self._spoken.append(of_languages)
                self._num_words = _added(self._num_words, num_words)
                if sum(len(part.keys) for part in self._spoken[1:]) > COMPACT_KEYS:
                    self._spoken[:] = [Histogram.merge(self._spoken)]

    def _numbers_of(self, names: Sequence[str]) -> Ints:
        """Number of each of ``names`` in keys, then -1, to which a code below 0 leads."""
        with self._adding:
            numbers = [self._languages.setdefault(name, len(self._languages)) for name in names]
        return np.array([*numbers, -1], np.int64)

    def tables(self) -> Iterable[pa.Table]:
        """One table per series, as in ``SUMMARY_SCHEMA``.

        With tags or languages the schema is ``TAGGED_SUMMARY_SCHEMA``, and their table comes last.
        """
        docs = Histogram.merge(self._docs)
        word_starts = Histogram.merge(self._word_starts)
        whole_words = Histogram.merge(self._whole_words)
        for series, counter in self._values.items():
            summary = SeriesSummary(counter.histogram(), docs, word_starts, whole_words)
            table = summary.to_table(series)
            if self._tags is not None or self._spoken is not None:
                no_tags = pa.nulls(len(table), pa.string())
                table = table.append_column(TAGGED_SUMMARY_SCHEMA.field("tag"), no_tags)
            yield table
        if self._tags is not None:
            yield TypeTags.merge(self._tags).to_table()
        elif self._spoken is not None:
            yield self._language_counts().to_table()

    def _language_counts(self) -> TypeTags:
        """Whole words of each type in documents of each language; all words as ``ALL_TYPES``."""
        assert self._spoken is not None
        sums = Histogram.merge(self._spoken)
        spoken = np.flatnonzero(self._num_words)
        of_types = (sums.keys & ~SPECIAL_KEY) >> BIN_BITS
        of_all = np.full(len(spoken), ALL_TYPES)
        token_ids = np.append(of_types, of_all).astype(np.int32)
        names = pa.array(list(self._languages), pa.string())
        languages = names.take(pa.array(np.append(sums.keys & BIN_MASK, spoken)))
        n = np.append(sums.counts, self._num_words[spoken])
        return TypeTags.of_counts(token_ids, languages, n)


def whole_words(docs: npt.NDArray[np.int32], flags: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """True if each token is a whole word, bool [n].

    A whole word starts a word, and the next token of the document does not continue it. ``docs``
    and ``flags`` [n] belong to the tokens of whole documents.
    """
    continues_word = flags & (SPECIAL | WORD_START) == 0
    same_doc = docs[1:] == docs[:-1]
    goes_on = np.zeros(len(flags), np.bool_)
    goes_on[:-1] = continues_word[1:] & same_doc
    starts_word: npt.NDArray[np.bool_] = (flags & WORD_START) != 0
    return starts_word & ~goes_on


def _ranked(token_ids: npt.NDArray[np.int32], flags: npt.NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Keys with bin 0 of the distinct types, in order, and each token's index among them."""
    size = int(token_ids.max(initial=0)) + 1
    types = token_ids + size * (flags & SPECIAL).astype(np.int64)
    if size > max(COUNTED_IDS, len(types)):  # few tokens of large ids: an array would be sparse
        distinct, ranks = np.unique(types, return_inverse=True)
    else:
        occurs = np.zeros(2 * size, np.bool_)
        occurs[types] = True
        distinct = np.flatnonzero(occurs)
        ranks = (np.cumsum(occurs) - 1)[types]
    is_special = distinct >= size
    keys = (distinct - size * is_special << BIN_BITS) + is_special * SPECIAL_KEY
    return keys, ranks


def _counted(types: Ints, ranks: Ints) -> Histogram:
    """The histogram of ``types`` by their ``ranks``; types without any are left out."""
    counts = np.bincount(ranks, minlength=len(types))
    there = np.flatnonzero(counts)
    return Histogram(types[there], counts[there])


def _in_docs(types: Ints, ends: Ints, docs: npt.NDArray[np.int32]) -> Histogram:
    """The number of documents with each of ``types``, whose tokens end at ``ends``.

    ``docs`` are those of the tokens by type, ascending within one.
    """
    if not len(docs):
        return Histogram.empty()
    is_new = np.ones(len(docs), np.bool_)
    is_new[1:] = docs[1:] != docs[:-1]
    begins = np.append(0, ends[:-1])
    is_new[begins] = True
    return Histogram(types, np.add.reduceat(is_new, begins, dtype=np.int64))


def _added(a: Ints, b: Ints) -> Ints:
    """Sum of two arrays, the shorter of which is followed by zeros."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    found = longer.copy()
    found[: len(shorter)] += shorter
    return found


def _by_language(types: Ints, ranks: Ints, numbers: Ints) -> Histogram:
    """The histogram of words by type and language; words without a language are left out.

    ``ranks`` [n] are the types of the words, ``numbers`` [n] those of their languages, or -1.
    """
    if numbers.min(initial=0) < 0:
        ranks = ranks[numbers >= 0]
        numbers = numbers[numbers >= 0]
    bits = int(numbers.max(initial=0)).bit_length()
    pairs = (ranks << bits) + numbers
    if len(types) << bits <= MOST_COUNTERS:
        counts = np.bincount(pairs)
        distinct = np.flatnonzero(counts)
        counts = counts[distinct]
    else:
        distinct, counts = np.unique(pairs, return_counts=True)
    return Histogram(types[distinct >> bits] + (distinct & (1 << bits) - 1), counts)
