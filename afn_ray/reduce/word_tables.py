"""The table ``word_vocabulary``: rows of words, and of rare words folded by their first piece."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.classes import CLASSES, UNTAGGED
from afn_ray.option_rules import AUTO_LANGUAGE
from afn_ray.reduce import lexicon
from afn_ray.reduce.histogram import (
    BIN_BITS,
    BIN_MASK,
    Histogram,
    SeriesSummary,
    starts,
    to_values,
)
from afn_ray.reduce.language_uses import Uses
from afn_ray.reduce.stats import Float64s, Ints, is_high, wilson
from afn_ray.reduce.tables import type_statistics
from afn_ray.reduce.tasks import Cuts, Tasks, merge_and_cut, merged
from afn_ray.reduce.word_salience import COLUMNS, counted_words, with_salience
from afn_ray.reduce.word_sums import (
    EXPONENT_BITS,
    FIRST,
    HIGH_BITS,
    LAST,
    MEAN,
    TOTALS_BITS,
    VALUES_BITS,
    LayerSums,
    WordSums,
    merge,
    total_of,
)
from afn_ray.schema import UNKNOWN_LANGUAGE, WORD_VOCABULARY_SCHEMA

LEAST_N = 5
"""Smallest number of occurrences of a word that has a row of its own; rarer words are folded."""
MOST_ROWS = 2_000_000
"""Largest number of words with rows, times layers; where there are more, rarer ones are folded."""
MOST_FORMS = 3
"""Number of ways of writing a word that its row lists."""
PART_STRENGTHS = 1 << 24
"""Largest number of strengths for each part of the sums, but for frequent words."""
MERGED_AT_ONCE = 4
"""Number of sums that wait to be added: the strengths of a word recur, so a sum is smaller."""
FOLDED_PARTS = 16
"""Largest number of parts of the sums of folded words, whose pieces and classes are limited."""


def cuts(n_strengths: int, num_leaves: int) -> Cuts:
    """Parts into which sums of so many strengths, of all layers, are cut;
    each leaf is of a scan.
    """
    return Cuts.of(1 + n_strengths // PART_STRENGTHS, num_leaves, MERGED_AT_ONCE)


class Described(NamedTuple):
    """Facts that rows of words have beside their own sums."""

    layers: Sequence[int]
    q3: Sequence[float | None]  # of the thresholds that label, by layer
    n_docs: int  # documents of the run
    language: str  # of the closed-class words; ``AUTO_LANGUAGE``: those of the documents
    tagged: bool  # classes are tags
    readable: Sequence[str]  # texts of the tokenizer's types

    @property
    def by_language(self) -> bool:
        """True if forms are counted by the languages of documents, which give the classes."""
        return self.language == AUTO_LANGUAGE and not self.tagged

    @property
    def one_language(self) -> str | None:
        """The language of all words; None: they have several."""
        return None if self.language == AUTO_LANGUAGE else self.language


def merge_words(leaves: Iterable[list[Any]], by: Cuts, tasks: Tasks) -> list[Any]:
    """Handles of the parts of the sum of ``leaves``, which are handles of
    the parts of some sums.
    """
    return merge_and_cut(tasks, leaves, merge, by)


def word_vocabulary(parts: Sequence[Any], described: Described, tasks: Tasks) -> pa.Table:
    """The table, as ``WORD_VOCABULARY_SCHEMA``; ``parts`` are of ``merge_words``."""
    sizes = [tasks.submit(_sizes, part)[0] for part in parts]
    least = _least_n(tasks.result(merged(tasks, _add, sizes)), MOST_ROWS // len(described.layers))
    num_folded = min(FOLDED_PARTS, len(parts))
    made = []
    for part in parts:
        args = (part, least, described, num_folded)
        made.append(tasks.submit(_rows, *args, num_results=2 + num_folded))
    handles = [rows for rows, *_ in made]
    for rest in zip(*(folded for _, _, *folded in made), strict=True):
        folded = merged(tasks, merge, rest, (1, 1))
        handles += tasks.submit(_folded_rows, folded, least, described)
    tables = [tasks.result(handle) for handle in handles]
    order = [(name, "ascending") for name in ("layer", "word", "token_id", "class")]
    rows = pa.concat_tables(tables).sort_by(order).combine_chunks()
    counted = [counted for _, counted, *_ in made]
    (found,) = tasks.submit(with_salience, described.layers, rows, *counted)
    table: pa.Table = tasks.result(found)
    return table


def _sizes(sums: WordSums) -> list[Histogram]:
    """Number of words by number of occurrences."""
    return [Histogram.of(sums.n)]


def _add(*sizes: Histogram) -> list[Histogram]:
    return [Histogram.merge(sizes)]


def _least_n(sizes: Histogram, most: int) -> int:
    """Smallest number of occurrences, ``LEAST_N`` or more, that at most ``most`` words reach."""
    fits = np.cumsum(sizes.counts[::-1])[::-1] <= most  # the words that occur so often or more
    too_many = sizes.keys[~fits]
    return max(LEAST_N, int(too_many.max(initial=0)) + 1)


def _rows(sums: WordSums, least: int, described: Described, num_folded: int) -> list[Any]:
    """Rows of the words that occur ``least`` times, and the ``CountedWords``.

    Then sums of the others by piece and class, in ``num_folded`` parts.
    """
    kinds = _Kinds.of(sums, described)
    is_named = sums.n >= least
    named = sums.where(is_named)
    of_named = kinds.where(is_named)
    columns = {
        "word": named.words,
        "text": pc.list_element(of_named.forms, 0) if len(of_named.forms) else [],
        "token_id": of_named.token_ids,
        "class": of_named.classes,
        "language": of_named.languages,
        "n_docs": named.num_docs,
        "idf": np.log(described.n_docs / named.num_docs),
        "class_confidence": of_named.confidence.astype(np.float32),
        "is_ambiguous": of_named.is_ambiguous,
        "n_folded": np.zeros(len(named.words), np.int64),
        "least_n": pa.nulls(len(named.words), pa.int64()),
        "forms": of_named.forms,
    }
    others = kinds.where(~is_named)
    ids = zip(others.token_ids.tolist(), others.classes.to_pylist(), strict=True)
    names = pa.array([f"{token_id} {name}" for token_id, name in ids], pa.string())
    folded = sums.where(~is_named).joined(names)
    rows = _table(named, columns, described)
    return [rows, counted_words(sums, named), *folded.cut(1, num_folded)]


def _folded_rows(sums: WordSums, least: int, described: Described) -> list[pa.Table]:
    """Rows of folded words; each of ``sums.words`` is a piece and a class, from ``_rows``."""
    names = [name.split(" ", 1) for name in sums.words.to_pylist()]
    token_ids = [int(token_id) for token_id, _ in names]
    num_rows = len(names)
    columns = {
        "word": pa.nulls(num_rows, pa.string()),
        "text": [described.readable[i] for i in token_ids],
        "token_id": token_ids,
        "class": [name for _, name in names],
        "language": pa.array([described.one_language] * num_rows, pa.string()),
        "n_docs": pa.nulls(num_rows, pa.int64()),
        "idf": pa.nulls(num_rows, pa.float64()),
        "class_confidence": pa.nulls(num_rows, pa.float32()),
        "is_ambiguous": pa.nulls(num_rows, pa.bool_()),
        "n_folded": sums.num_docs,
        "least_n": np.full(num_rows, least),
        "forms": [[] for _ in names],
    }
    return [_table(sums, columns, described)]


def _table(sums: WordSums, columns: Mapping[str, Any], described: Described) -> pa.Table:
    """Rows of ``sums`` at each layer, with ``columns`` that are the same at all."""
    n, n_tokens = sums.n, sums.n_tokens
    tables = [WORD_VOCABULARY_SCHEMA.empty_table()]
    for layer, of_layer, q3 in zip(described.layers, sums.by_layer, described.q3, strict=True):
        found = _statistics(sums, of_layer, q3)
        low, upper = wilson(found["n_high"], n)
        everything = {
            **columns,
            **found,
            "layer": np.full(len(n), layer),
            "n": n,
            "n_tokens": n_tokens,
            "pieces": n_tokens / n,
            "share_high": found["n_high"] / n,
            "share_high_low": low,
            "share_high_high": upper,
            **dict.fromkeys(COLUMNS, pa.nulls(len(n), pa.float64())),
        }
        arrays = [pa.array(everything[f.name], f.type) for f in WORD_VOCABULARY_SCHEMA]
        tables.append(pa.Table.from_arrays(arrays, schema=WORD_VOCABULARY_SCHEMA))
    return pa.concat_tables(tables)


def _statistics(sums: WordSums, layer: LayerSums, q3: float | None) -> dict[str, npt.NDArray[Any]]:
    """Statistics of each word's strengths at a layer, by column; Q3 decides what is HIGH."""
    keys = layer.values.keys
    counts = layer.values.counts
    bins = Histogram.of(((keys >> VALUES_BITS) << BIN_BITS) | (keys & BIN_MASK), counts)
    docs = Histogram(np.arange(len(sums.words)) << BIN_BITS, sums.num_docs)
    of_strongest = type_statistics(SeriesSummary(bins, docs, docs, docs), q3)
    names = ("mean", "sd", "min", "q1", "q2", "q3", "max", "n_high")
    found = {name: of_strongest[name].to_numpy() for name in names}
    # Of an occurrence with one token, each of these is the strength of that token.
    of_one = (keys >> BIN_BITS) & 1 == 0
    values = to_values(keys[of_one] & BIN_MASK)
    one = Histogram(keys[of_one], counts[of_one])
    high_counts = np.where(is_high(values, q3), one.counts, 0)
    n_high_one = sums.per_word(Histogram(one.keys, high_counts), VALUES_BITS)
    total_one = _summed(one.keys >> VALUES_BITS, values.astype(np.float64) * one.counts, sums)
    ways = (layer.totals.keys & ((1 << TOTALS_BITS) - 1)) >> EXPONENT_BITS
    words = layer.totals.keys >> TOTALS_BITS
    divisors = {"first_strength": ways == 0, "last_strength": ways == 1, "mean_strength": ways > 1}
    for name, which in divisors.items():
        totals = total_of(layer.totals, which) / np.maximum(ways[which], 1)
        found[name] = (total_one + _summed(words[which], totals, sums)) / sums.n
    high_ways = layer.high.keys & ((1 << HIGH_BITS) - 1)
    for way, name in ((MEAN, "mean"), (FIRST, "first"), (LAST, "last")):
        here = high_ways == way
        several = Histogram(layer.high.keys[here], layer.high.counts[here])
        found[f"n_high_{name}"] = n_high_one + sums.per_word(several, HIGH_BITS)
    return found


def _summed(words: Ints, values: Float64s, sums: WordSums) -> Float64s:
    """Sum of ``values`` by word, [n_words]."""
    return np.bincount(words, values, len(sums.words)).astype(np.float64)


# --- what a word is


class _Kinds(NamedTuple):
    """Class, language and spellings of each word, all [n_words]."""

    classes: pa.StringArray
    languages: pa.StringArray
    confidence: Float64s
    is_ambiguous: npt.NDArray[np.bool_]
    token_ids: Ints  # first token of the most frequent form
    forms: pa.ListArray

    def where(self, which: npt.NDArray[np.bool_]) -> _Kinds:
        mask = pa.array(which)
        return _Kinds(
            self.classes.filter(mask),
            self.languages.filter(mask),
            self.confidence[which],
            self.is_ambiguous[which],
            self.token_ids[which],
            self.forms.filter(mask),
        )

    @classmethod
    def of(cls, sums: WordSums, described: Described) -> _Kinds:
        """Built from the forms of each word, and its tags if classes are tags."""
        forms = _by_frequency(sums.forms, "form")
        begins = starts(forms["word"].to_numpy())
        if described.tagged:
            guesses = _by_tag(sums)
        else:
            guesses = _guessed(_classified(sums, described), _words_of(sums, described))
        shown = _by_frequency(_composed(sums.forms), "form")
        nth = np.arange(len(shown)) - _firsts(shown["word"].to_numpy())
        listed = shown.filter(pa.array(nth < MOST_FORMS))
        ends = np.searchsorted(listed["word"].to_numpy(), np.arange(len(sums.words) + 1))
        offsets = pa.array(ends.astype(np.int32))
        first_forms = listed["form"].combine_chunks()
        kind = WORD_VOCABULARY_SCHEMA.field("forms").type
        token_ids = forms["token_id"].to_numpy()[begins]
        return cls(
            classes=pa.array([guess.name for guess in guesses], pa.string()),
            languages=_languages(sums, described),
            confidence=np.array([guess.confidence for guess in guesses], np.float64),
            is_ambiguous=np.array([guess.is_ambiguous for guess in guesses], np.bool_),
            token_ids=token_ids.astype(np.int64),
            forms=pa.ListArray.from_arrays(offsets, first_forms, type=kind),
        )


def _composed(forms: pa.Table) -> pa.Table:
    """``forms`` in NFC, so that a reader sees different ones only."""
    at = forms.column_names.index("form")
    return forms.set_column(at, "form", pc.utf8_normalize(forms["form"], "NFC"))


def _firsts(words: Ints) -> Ints:
    """First row of each row's word; ``words`` ascend."""
    begins = starts(words)
    return np.repeat(begins, np.diff(begins, append=len(words)))


def _by_frequency(forms: pa.Table, by: str) -> pa.Table:
    """``forms`` with one row for each word and ``by``; a word's most frequent come first."""
    groups = forms.group_by(["word", by], use_threads=False)
    added = groups.aggregate([("n", "sum"), ("token_id", "min")])
    added = added.rename_columns(["word", by, "n", "token_id"])
    order = [("word", "ascending"), ("n", "descending"), (by, "ascending")]
    return added.sort_by(order).combine_chunks()


def _by_tag(sums: WordSums) -> list[lexicon.Guess]:
    """The class of each word in a labelled corpus: its most frequent tag."""
    tagged = sums.forms.filter(pc.is_valid(sums.forms["tag"]))
    tags = _by_frequency(tagged, "tag")
    words = tags["word"].to_numpy()
    begins = starts(words)
    n = tags["n"].to_numpy()
    shares = n[begins] / np.add.reduceat(n, begins) if len(n) else np.empty(0)
    names = tags["tag"].take(pa.array(begins)).to_pylist()
    found = {}
    for word, name, share in zip(words[begins].tolist(), names, shares.tolist(), strict=True):
        found[word] = (name, share)
    guesses = []
    for at in range(len(sums.words)):
        tag, share = found.get(at, (UNTAGGED, 1.0))
        guesses.append(lexicon.Guess(tag, share, share <= 1 - lexicon.MANY))
    return guesses


def _languages(sums: WordSums, described: Described) -> pa.StringArray:
    """The language of most occurrences of each word; null: unknown, or words have tags."""
    if not described.by_language:
        return pa.array([described.one_language] * len(sums.words), pa.string())
    is_known = pc.not_equal(sums.forms["tag"], UNKNOWN_LANGUAGE)
    spoken = _by_frequency(sums.forms.filter(is_known), "tag")
    words = spoken["word"].to_numpy()
    begins = starts(words)
    languages = spoken["tag"].take(pa.array(begins))
    every_word = pa.array(np.arange(len(sums.words)))
    rows = pc.index_in(every_word, pa.array(words[begins]))
    return languages.take(rows).combine_chunks()


def _classified(sums: WordSums, described: Described) -> pa.Table:
    """Forms that give words their classes, as ``_by_frequency`` has them.

    Uses in documents of unknown language do not count, unless a word has no others in any form.
    """
    forms = sums.forms
    if described.by_language:
        is_known = pc.fill_null(pc.not_equal(forms["tag"], UNKNOWN_LANGUAGE), False)
        has_known = pc.is_in(forms["word"], pc.unique(forms["word"].filter(is_known)))
        forms = forms.filter(pc.or_(is_known, pc.invert(has_known)))
    return _by_frequency(forms, "form")


def _words_of(sums: WordSums, described: Described) -> Callable[[int, str], lexicon.Words | None]:
    """Words by which a form of a word is classified."""
    if not described.by_language:
        words = lexicon.find(described.language)
        return lambda word, form: words
    counts: dict[tuple[int, str], dict[str, int]] = {}
    columns = (sums.forms[name].to_pylist() for name in ("word", "form", "tag", "n"))
    for word, form, spoken, n in zip(*columns, strict=True):
        if spoken is not None:
            counts.setdefault((word, form), {})[spoken] = n
    return lambda word, form: Uses(counts.get((word, form), {}))


def _guessed(
    forms: pa.Table, words_of: Callable[[int, str], lexicon.Words | None]
) -> list[lexicon.Guess]:
    """The class of each word, from how it is written."""
    columns = (forms[name].to_pylist() for name in ("word", "form", "n"))
    guesses: list[lexicon.Guess] = []
    for _, rows in itertools.groupby(zip(*columns, strict=True), key=lambda row: row[0]):
        found = []
        for word, form, n in rows:
            words = words_of(word, form)
            guess = lexicon.classify(form, special=False, starts=1.0, whole=1.0, words=words)
            found.append((guess, n))
        guesses.append(_most_of(found))
    return guesses


def _most_of(guesses: Sequence[tuple[lexicon.Guess, int]]) -> lexicon.Guess:
    """The class that most uses have, of forms with their classes and numbers of uses."""
    if len(guesses) == 1:
        return guesses[0][0]
    other = {"content": "function", "function": "content"}
    uses: defaultdict[str, float] = defaultdict(float)
    for guess, n in guesses:
        uses[guess.name] += guess.confidence * n
        if guess.name in other:
            uses[other[guess.name]] += (1 - guess.confidence) * n
    name = max(uses, key=lambda name: (uses[name], -CLASSES.index(name)))
    total = sum(n for _, n in guesses)
    differ = len({guess.name for guess, _ in guesses}) > 1
    is_ambiguous = differ or any(guess.is_ambiguous for guess, _ in guesses)
    return lexicon.Guess(name, uses[name] / total, is_ambiguous)
