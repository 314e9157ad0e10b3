"""Sums over the words of a run: counted from rows of tokens, exact, and the same in any order.

A word is what the view ``words`` has, normalised: the first ``WORD_CHARS`` characters in lower case
(NFC). All sums are integers. The mean of several tokens is no recorded value, so there is no
histogram of it; ``totals`` adds up the significands of strengths by exponent, which is exact too.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce import lexicon
from afn_ray.reduce.controls import repeated
from afn_ray.reduce.histogram import (
    BIN_BITS,
    COMPACT_KEYS,
    Histogram,
    starts,
    values_by_type,
)
from afn_ray.reduce.stats import Float64s, Int32s, Ints, is_high
from afn_ray.schema import WORD_START

WORD_CHARS = 200
"""Number of characters of a word that count; further ones are cut off."""
MEAN, FIRST, LAST = 0, 1, 2
"""Ways to measure a word of several tokens, beside its strongest token."""
EXPONENT_BITS = 8
"""Bits of a float's exponent in a key of ``LayerSums.totals``."""
MOST_PIECES = (1 << 24) - 1
"""Number of tokens in a key; a longer word counts as one of so many."""
_ONE = 142
"""Exponent of a float32, as stored, whose significand of 16 bits counts units of 1."""

FORMS = pa.schema(
    [
        pa.field("word", pa.int64()),  # index of the word
        pa.field("form", pa.string()),  # the word as written
        pa.field("tag", pa.string()),  # or the language of the document; null: without
        pa.field("token_id", pa.int32()),  # its first token; the lowest, should it have several
        pa.field("n", pa.int64()),
    ]
)
"""Schema of how often each word is written in which way, and tagged or in which language."""


def normalised(form: str) -> str:
    """The word that ``form``, at most ``WORD_CHARS`` long, is a spelling of: lower case, NFC."""
    return unicodedata.normalize("NFC", lexicon.lower(form))


class LayerSums(NamedTuple):
    """Sums over occurrences of words at one layer; keys begin with the index of the word."""

    values: Histogram  # then whether it has several tokens (1 bit), the bin of the strongest
    # Of those with several tokens only. Then a number: 0 for the first token, 1 for the last, and n
    # for all tokens of occurrences with n of them. Then the exponent: counts are significands.
    totals: Histogram
    high: Histogram  # of several tokens and HIGH; then ``MEAN``, ``FIRST`` or ``LAST``
    high_places: Histogram  # whose strongest token is HIGH; then the place of the first token
    mixed_pairs: Histogram  # as in ``controls.ControlSums``, like the next
    high_pairs: Histogram


VALUES_BITS, TOTALS_BITS, HIGH_BITS = 1 + BIN_BITS, 24 + EXPONENT_BITS, 2
"""Bits of a key below the index of the word, in the first members of ``LayerSums``."""
PLACE_BITS = 6
"""Bits of a place of ``controls`` in a key."""
BITS = (VALUES_BITS, TOTALS_BITS, HIGH_BITS, PLACE_BITS, 0, 0)
"""Bits of a key below the index of the word, in each member of ``LayerSums``."""
PIECES_BITS = 32
"""Bits of the number of tokens in a key of ``WordSums.split``."""


class WordSums(NamedTuple):
    """Sums over the occurrences of some words, ordered by word."""

    words: pa.StringArray  # distinct, ascending
    num_docs: Ints  # [n_words], documents with the word
    split: Histogram  # occurrences of several tokens; keys: word, number of tokens
    places: Histogram  # occurrences; keys: word, place of the first token
    pairs: Histogram  # as in ``controls.ControlSums``
    by_layer: tuple[LayerSums, ...]
    forms: pa.Table  # as ``FORMS``, ordered by word

    @property
    def n(self) -> Ints:
        """Occurrences of each word, [n_words]."""
        return self.per_word(self.by_layer[0].values, VALUES_BITS)

    @property
    def n_tokens(self) -> Ints:
        """Tokens of all occurrences of each word, [n_words]."""
        more = self.split.counts * ((self.split.keys & ((1 << PIECES_BITS) - 1)) - 1)
        return self.n + self.per_word(Histogram(self.split.keys, more), PIECES_BITS)

    def per_word(self, histogram: Histogram, bits: int) -> Ints:
        """Sum of the counts of each word, [n_words]; keys have ``bits`` bits below the word."""
        sums = np.zeros(len(self.words), np.int64)
        words = histogram.keys >> bits
        first = starts(words)
        if len(first):
            sums[words[first]] = np.add.reduceat(histogram.counts, first)
        return sums

    def renumbered(self, index: Ints, words: pa.StringArray, num_docs: Ints) -> WordSums:
        """The sums of ``words``, where word i is now ``index[i]``; those below 0 are left out."""
        of_words = index[self.forms["word"].to_numpy()]
        forms = self.forms.set_column(0, "word", pa.array(of_words))
        return WordSums(
            words,
            num_docs,
            _renumbered(self.split, index, PIECES_BITS),
            _renumbered(self.places, index, PLACE_BITS),
            _renumbered(self.pairs, index, 0),
            tuple(_layer_renumbered(layer, index) for layer in self.by_layer),
            forms.filter(pc.greater_equal(forms["word"], 0)),
        )

    def where(self, which: npt.NDArray[np.bool_]) -> WordSums:
        """The sums of the words ``which``."""
        index = np.where(which, np.cumsum(which) - 1, -1)
        return self.renumbered(index, self.words.filter(pa.array(which)), self.num_docs[which])

    def cut(self, before: int, after: int) -> list[WordSums]:
        """The parts of ``after`` that a part of ``before`` consists of, by a hash of the word.

        Both are powers of two; of part p, these are the parts p, p + before, p + 2 before ...
        """
        if before == after:
            return [self]
        part_of = parts_of(self.words.to_pylist(), after) // before
        return [self.where(part_of == part) for part in range(after // before)]

    def joined(self, names: pa.Array) -> WordSums:
        """Sums of all words with the same of ``names`` [n_words], which are the words then.

        ``num_docs`` is how many words each has. There are no forms, places and pairs.
        """
        distinct = pc.unique(names)
        distinct = distinct.take(pc.sort_indices(distinct))
        index = pc.index_in(names, distinct).to_numpy().astype(np.int64)
        num_words = np.bincount(index, minlength=len(distinct)).astype(np.int64)
        none = Histogram.empty()
        by_layer = tuple(
            layer._replace(high_places=none, mixed_pairs=none, high_pairs=none)
            for layer in self.by_layer
        )
        sums = self._replace(places=none, pairs=none, by_layer=by_layer, forms=FORMS.empty_table())
        return sums.renumbered(index, distinct, num_words)


def parts_of(words: Iterable[str], num_parts: int) -> Ints:
    """The part of ``num_parts`` that each of ``words`` is in."""
    return np.array([zlib.crc32(word.encode()) % num_parts for word in words], np.int64)


def _layer_renumbered(layer: LayerSums, index: Ints) -> LayerSums:
    sums = [_renumbered(one, index, bits) for one, bits in zip(layer, BITS, strict=True)]
    return LayerSums(*sums)


def _renumbered(histogram: Histogram, index: Ints, bits: int) -> Histogram:
    """``histogram`` with ``index`` of each word in its keys; words below 0 are left out."""
    words = index[histogram.keys >> bits]
    keys = (words << bits) | (histogram.keys & ((1 << bits) - 1))
    counts = histogram.counts
    if len(words) and words.min() < 0:
        keys, counts = keys[words >= 0], counts[words >= 0]
    if (keys[1:] > keys[:-1]).all():
        return Histogram(keys, counts)
    return Histogram.of(keys, counts)


def merge(cut: tuple[int, int], *parts: WordSums) -> list[WordSums]:
    """The sum of ``parts``, which are of one part of ``cut[0]``, as parts of ``cut[1]``."""
    return _merged(parts).cut(*cut)


def _merged(parts: Sequence[WordSums]) -> WordSums:
    if len(parts) == 1:
        return parts[0]
    words = pc.unique(pa.chunked_array([part.words for part in parts], pa.string()))
    words = words.take(pc.sort_indices(words))
    num_docs = np.zeros(len(words), np.int64)
    moved: list[WordSums] = []
    for part in parts:
        index = pc.index_in(part.words, words).to_numpy().astype(np.int64)
        num_docs[index] += part.num_docs
        moved.append(part.renumbered(index, words, num_docs))
    by_layer = []
    for layers in zip(*(part.by_layer for part in moved), strict=True):
        sums = [Histogram.merge(of_kind) for of_kind in zip(*layers, strict=True)]
        by_layer.append(LayerSums(*sums))
    split = Histogram.merge(part.split for part in moved)
    places = Histogram.merge(part.places for part in moved)
    pairs = Histogram.merge(part.pairs for part in moved)
    forms = _added_forms(pa.concat_tables([part.forms for part in moved]))
    return WordSums(words, num_docs, split, places, pairs, tuple(by_layer), forms)


def _added_forms(forms: pa.Table) -> pa.Table:
    """``forms`` with one row for each word, form and tag, in their order."""
    groups = forms.group_by(["word", "form", "tag"], use_threads=False)
    added = groups.aggregate([("token_id", "min"), ("n", "sum")])
    added = added.rename_columns(FORMS.names).cast(FORMS)
    return added.sort_by([(name, "ascending") for name in ("word", "form", "tag")])


class WordRules(NamedTuple):
    """Rules by which words are counted."""

    readable: Sequence[str]  # texts of the tokenizer's types
    q3: Sequence[float | None]  # of the thresholds that label, by layer
    tagged: bool  # tokens have tags
    num_parts: int  # parts into which the sums are cut, by a hash of the word
    by_language: bool = False  # without tags, words are counted by the language of their document


class WordTokens(NamedTuple):
    """Tokens of some whole documents, special ones left out; all [n]."""

    docs: Int32s
    types: Int32s
    flags: npt.NDArray[np.uint8]
    by_layer: Sequence[npt.NDArray[np.float32]]  # strengths
    surface: pa.DictionaryArray  # of words that their tokens do not spell, where they begin
    tag: pa.DictionaryArray | None  # or language; None: the corpus has neither
    places: Ints  # of ``controls``


class WordCounter:
    """Counts of words, chunk by chunk."""

    def __init__(self, rules: WordRules) -> None:
        self._rules = rules
        self._lengths = np.array([len(text) for text in rules.readable], np.int64)
        self._form_of_type = np.full(len(rules.readable), -1, np.int64)  # as a word of one token
        self._forms: dict[str, int] = {}
        self._words: dict[str, int] = {}
        self._word_of: list[int] = []  # by form
        self._first = np.empty(0, np.int32)  # first token, by form
        self._tags: dict[str | None, int] = {None: 0}
        self._sums: list[list[Histogram]] = []  # as in ``_of_documents``
        self._form_counts: list[Histogram] = [Histogram.empty()]  # keys: form, tag

    @property
    def tagged(self) -> bool:
        """True if tokens need their tags."""
        return self._rules.tagged

    @property
    def by_language(self) -> bool:
        """True if languages of documents stand for tags."""
        return self._rules.by_language

    def add(self, tokens: WordTokens) -> None:
        """Count the words of ``tokens``."""
        is_head = tokens.flags & WORD_START != 0
        is_head[:1] = True
        is_head[1:] |= tokens.docs[1:] != tokens.docs[:-1]
        heads = np.flatnonzero(is_head)
        if not len(heads):
            return
        sizes = np.diff(heads, append=len(tokens.docs))
        forms = self._number_forms(tokens, heads, sizes)
        self._add_forms(tokens, heads, forms)
        words = np.array(self._word_of, np.int64)[forms]
        found = _of_documents(tokens, words, heads, sizes, self._rules.q3)
        self._sums = self._sums or [[Histogram.empty()] for _ in found]
        for parts, one in zip(self._sums, found, strict=True):
            parts.append(one)
        for parts in (*self._sums, self._form_counts):
            if sum(len(part.keys) for part in parts[1:]) > COMPACT_KEYS:
                parts[:] = [Histogram.merge(parts)]

    def sums(self) -> list[WordSums]:
        """The sums in parts."""
        num_parts = self._rules.num_parts
        num_layers = len(self._rules.q3)
        num = len(LayerSums._fields)
        sums = self._sums or [[] for _ in range(4 + num * num_layers)]
        docs, split, places, pairs, *rest = (Histogram.merge(parts) for parts in sums)
        names = pa.array(list(self._words), pa.string())
        num_words = len(names)
        by_layer = (rest[at : at + num] for at in range(0, len(rest), num))
        whole = WordSums(
            names,
            docs.counts_of(np.arange(num_words)),
            split,
            places,
            pairs,
            tuple(LayerSums(*of_layer) for of_layer in by_layer),
            self._forms_table(),
        )
        part_of = parts_of(self._words, num_parts)
        order = pc.sort_indices(names).to_numpy().astype(np.int64)
        parts = []
        for part in range(num_parts):
            here = order[part_of[order] == part]
            index = np.full(num_words, -1, np.int64)
            index[here] = np.arange(len(here))
            parts.append(whole.renumbered(index, names.take(here), whole.num_docs[here]))
        return [part._replace(forms=_added_forms(part.forms)) for part in parts]

    def _forms_table(self) -> pa.Table:
        counts = Histogram.merge(self._form_counts)
        forms, tags = np.divmod(counts.keys, 1 << PIECES_BITS)
        columns = [
            pa.array(np.array(self._word_of, np.int64)[forms]),
            pa.array(list(self._forms), pa.string()).take(pa.array(forms)),
            pa.array(list(self._tags), pa.string()).take(pa.array(tags)),
            pa.array(self._first[forms]),
            pa.array(counts.counts),
        ]
        return pa.Table.from_arrays(columns, schema=FORMS)

    # --- forms

    def _number_forms(self, tokens: WordTokens, heads: Ints, sizes: Ints) -> Ints:
        """Number of the form of each word, [n_words]."""
        forms = np.empty(len(heads), np.int64)
        written = tokens.surface.indices.take(pa.array(heads))
        is_written = pc.is_valid(written).to_numpy(zero_copy_only=False)
        codes = pc.fill_null(written, 0).to_numpy()[is_written]
        distinct, which = np.unique(codes, return_inverse=True)
        strings = tokens.surface.dictionary.take(pa.array(distinct)).to_pylist()
        forms[is_written] = self._numbers(strings)[which]
        is_single = ~is_written & (sizes == 1)
        types = tokens.types[heads[is_single]]
        unknown = np.unique(types[self._form_of_type[types] < 0])
        self._form_of_type[unknown] = self._numbers([self._rules.readable[i] for i in unknown])
        forms[is_single] = self._form_of_type[types]
        others = np.flatnonzero(~is_written & (sizes > 1))
        which, examples, used = sequences(tokens.types, heads[others], sizes[others], self._lengths)
        texts = []
        for begin, size in zip(heads[others][examples].tolist(), used.tolist(), strict=True):
            ids = tokens.types[begin : begin + size].tolist()
            texts.append("".join([self._rules.readable[i] for i in ids]))
        forms[others] = self._numbers(texts)[which]
        return forms

    def _numbers(self, texts: Sequence[str]) -> Ints:
        """Numbers of the forms that ``texts`` have when they are cut."""
        numbers = []
        for text in texts:
            form = text.strip(" ")[:WORD_CHARS]
            number = self._forms.setdefault(form, len(self._forms))
            if number == len(self._word_of):
                word = normalised(form)
                self._word_of.append(self._words.setdefault(word, len(self._words)))
            numbers.append(number)
        return np.array(numbers, np.int64)

    def _add_forms(self, tokens: WordTokens, heads: Ints, forms: Ints) -> None:
        """Count ``forms`` with their tags, and note their first tokens."""
        if len(self._first) < len(self._forms):
            more = np.full(len(self._forms) - len(self._first), np.iinfo(np.int32).max, np.int32)
            self._first = np.concatenate([self._first, more])
        np.minimum.at(self._first, forms, tokens.types[heads])
        tags: Any = 0
        if tokens.tag is not None:
            names = [*tokens.tag.dictionary.to_pylist(), None]
            numbers = np.array([self._tags.setdefault(name, len(self._tags)) for name in names])
            tags = numbers[pc.fill_null(tokens.tag.indices, len(names) - 1).to_numpy()[heads]]
        self._form_counts.append(Histogram.of((forms << PIECES_BITS) + tags))


def sequences(types: Int32s, heads: Ints, sizes: Ints, lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """Words that have the same tokens, up to those that reach ``WORD_CHARS`` characters.

    The words begin at ``heads`` [n_words] of ``types`` and have ``sizes`` tokens; ``lengths`` are
    those of the texts of all types. Returns for each word the index of its sequence, and for each
    sequence one word that has it and its number of tokens.
    """
    keys = types[heads].astype(np.int64)
    used = np.ones(len(heads), np.int64)
    num_chars = lengths[types[heads]]
    going, next_key = np.arange(len(heads)), len(lengths)
    while True:
        going = going[(sizes[going] > used[going]) & (num_chars[going] < WORD_CHARS)]
        if not len(going):
            break
        following = types[heads[going] + used[going]]
        pairs, which = np.unique((keys[going] << 32) | following, return_inverse=True)
        keys[going] = next_key + which
        next_key += len(pairs)
        num_chars[going] += lengths[following]
        used[going] += 1
    _, examples, which = np.unique(keys, return_index=True, return_inverse=True)
    return which.astype(np.int64), examples, used[examples]


# --- sums of some whole documents


def _of_documents(
    tokens: WordTokens, words: Ints, heads: Ints, sizes: Ints, q3: Sequence[float | None]
) -> list[Histogram]:
    """Documents of each of ``words``, what ``WordSums`` has of words alone, and sums of each layer.

    The words begin at ``heads`` of ``tokens`` and have ``sizes`` tokens.
    """
    docs, places = tokens.docs[heads], tokens.places[heads]
    several = np.flatnonzero(sizes > 1)
    strongest = []
    for strengths in tokens.by_layer:
        of_words = strengths[heads]
        of_words[several] = np.maximum.reduceat(strengths, heads)[several]
        strongest.append(of_words)
    high = [is_high(s, limit) for s, limit in zip(strongest, q3, strict=True)]
    again = repeated(docs, words, high)
    keys = (words << PLACE_BITS) | places
    found = [_in_docs(words, docs), _split(words, sizes), Histogram.of(keys)]
    found.append(Histogram.of(again.units, again.n * (again.n - 1)))
    for at, strengths in enumerate(tokens.by_layer):
        h = again.high[at]
        found += [
            *_at_layer(words, heads, sizes, (strengths, strongest[at]), q3[at]),
            Histogram.of(keys[high[at]]),
            Histogram.of(again.units, h * (again.n - 1)),
            Histogram.of(again.units, h * (h - 1)),
        ]
    return found


def _in_docs(words: Ints, docs: Int32s) -> Histogram:
    """Number of documents with each word."""
    pairs = np.sort((words << 32) | docs)
    return Histogram.of(pairs[starts(pairs)] >> 32)


def _split(words: Ints, sizes: Ints) -> Histogram:
    """Occurrences of several tokens, by word and number of tokens."""
    several = sizes > 1
    return Histogram.of((words[several] << PIECES_BITS) | sizes[several])


def _at_layer(
    words: Ints,
    heads: Ints,
    sizes: Ints,
    by_token: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
    q3: float | None,
) -> tuple[Histogram, Histogram, Histogram]:
    """The first sums of ``LayerSums`` over the words that begin at ``heads`` and have ``sizes``
    tokens.

    ``by_token`` are the strengths of all tokens, and those of the strongest token of each word.
    """
    strengths, strongest = by_token
    several = np.flatnonzero(sizes > 1)
    kinds = (words << 1) | (sizes > 1)
    occurs = np.zeros(int(kinds.max()) + 1, np.bool_)
    occurs[kinds] = True
    ranks = (np.cumsum(occurs) - 1)[kinds]
    values = values_by_type(np.flatnonzero(occurs) << BIN_BITS, ranks, strongest)
    words = words[several]
    heads = heads[several]
    sizes = sizes[several]
    first, last = strengths[heads], strengths[heads + sizes - 1]
    rows = np.repeat(heads - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    pieces = strengths[rows]
    pieces_of = np.repeat(np.arange(len(words)), sizes)
    mean = np.bincount(pieces_of, pieces.astype(np.float64), len(words)) / sizes
    way = np.minimum(sizes, MOST_PIECES)
    totals = _totals(
        np.concatenate([words, words, words[pieces_of]]),
        np.concatenate([np.zeros_like(way), np.ones_like(way), way[pieces_of]]),
        np.concatenate([first, last, pieces]),
    )
    high = [
        (words[is_high(by_way, q3)] << HIGH_BITS) | way
        for way, by_way in ((MEAN, mean), (FIRST, first), (LAST, last))
    ]
    return values, totals, Histogram.of(np.concatenate(high))


def _totals(words: Ints, ways: Ints, strengths: npt.NDArray[np.float32]) -> Histogram:
    """Sums of the significands of ``strengths``, by word, way and exponent."""
    bits = np.ascontiguousarray(strengths, np.float32).view(np.uint32).astype(np.int64) >> 8
    exponents = bits >> 15
    significands = (bits & 0x7FFF) | ((exponents > 0).astype(np.int64) << 15)
    keys = (words << TOTALS_BITS) | (ways << EXPONENT_BITS) | np.maximum(exponents, 1)
    return Histogram.of(keys, significands)


def total_of(totals: Histogram, which: npt.NDArray[np.bool_]) -> Float64s:
    """Sum that each key ``which`` of ``LayerSums.totals`` stands for."""
    exponents = (totals.keys[which] & ((1 << EXPONENT_BITS) - 1)) - _ONE
    return np.ldexp(totals.counts[which].astype(np.float64), exponents.astype(np.int32))
