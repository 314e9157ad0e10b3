"""Classes of words by where they occur: uses of each type, by the languages of the documents.

A shard's summary counts how often each type is a whole word in documents of each language
(``TypeTags`` with languages for tags). These counts add up in any order, so the class of a type is
that of its uses in the whole run, however the corpus was cut.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce import lexicon
from afn_ray.reduce.lexicon import MANY, Guess, Words
from afn_ray.reduce.stats import Ints
from afn_ray.reduce.type_tags import ALL_TYPES, TypeTags
from afn_ray.schema import LANGUAGES_SCHEMA, UNKNOWN_LANGUAGE

WordsOf = Callable[[int], Words | None]
"""Words by which a type is classified, by its id; None: those of no list."""


class Uses(NamedTuple):
    """Whole words of one type, counted by the languages of their documents."""

    counts: Mapping[str, int]  # by language; ``UNKNOWN_LANGUAGE`` counts for nothing

    def guess(self, word: str) -> Guess:
        """The class of ``word`` by these uses.

        A use in a language with closed-class words is closed to the share that the language gives
        the word, and open to the rest; a use in another language is neither. The class is word if
        more than half of the uses are neither, or there are none. Otherwise it is function if at
        least half of the uses with a list are closed, else content. Uses in one language give what
        the language gives.
        """
        listed: list[tuple[int, lexicon.Lexicon]] = []
        n_neither = 0
        for language, n in sorted(self.counts.items()):
            words = lexicon.find(language)
            if words is not None:
                listed.append((n, words))
            elif language != UNKNOWN_LANGUAGE:
                n_neither += n
        n_listed = sum(n for n, _ in listed)
        if n_neither > n_listed:
            return Guess("word", n_neither / (n_neither + n_listed))
        if not listed:
            return Guess("word", 1.0)
        if len(listed) == 1 and not n_neither:
            return listed[0][1].guess(word)
        closed = math.fsum(n * words.closed_share(word) for n, words in listed)
        name = "function" if 2 * closed >= n_listed else "content"
        guesses = [(n, words.guess(word)) for n, words in listed]
        right = math.fsum(n * _probability(name, guess) for n, guess in guesses)
        uses: Counter[str] = Counter()
        for n, guess in guesses:
            uses[guess.name] += n
        rarer = min(uses[kind] for kind in _KINDS)
        unsure = sum(n for n, guess in guesses if guess.is_ambiguous)
        is_ambiguous = max(rarer, unsure) >= MANY * n_listed
        return Guess(name, right / (n_listed + n_neither), is_ambiguous)


_KINDS = ("content", "function")


def _probability(name: str, guess: Guess) -> float:
    """Certainty of ``guess`` about the class ``name``, one of two."""
    return guess.confidence if guess.name == name else 1 - guess.confidence


class LanguageUses:
    """Uses of every type of a run, by language."""

    def __init__(self, counts: TypeTags) -> None:
        """``counts`` are the summaries' sum, sorted by type."""
        # Copies that were taken out leave zeros.
        table = counts.table.filter(pc.greater(counts.table["n"], 0)).combine_chunks()
        of_all = pc.equal(table["token_id"], ALL_TYPES)
        words = table.filter(of_all)
        names = words["tag"].to_pylist()
        n = words["n"].to_pylist()
        self._num_words = dict(zip(names, n, strict=True))
        table = table.filter(pc.invert(of_all)).combine_chunks()
        self._ids = table["token_id"].to_numpy()
        self._n = table["n"].to_numpy()
        self._languages = table["tag"].combine_chunks().dictionary_encode()

    def of(self, token_id: int) -> Uses:
        """Uses of one type; a ``WordsOf``."""
        begin, end = np.searchsorted(self._ids, [token_id, token_id + 1]).tolist()
        languages = self._languages.slice(begin, end - begin).to_pylist()
        n = self._n[begin:end].tolist()
        return Uses(dict(zip(languages, n, strict=True)))

    def table(self) -> pa.Table:
        """``LANGUAGES_SCHEMA``: words by language, the most frequent first.

        Shards of older versions count words of one token alone; these are all words then.
        """
        names = self._languages.dictionary.to_pylist()
        codes = self._languages.indices.to_numpy()
        n, n_types = self._sums(codes, len(names))
        of_one: dict[str, tuple[int, int]] = {}
        for name, n_whole, num_types in zip(names, n.tolist(), n_types.tolist(), strict=True):
            of_one[name] = (n_whole, num_types)
        rows = []
        for name in sorted({*of_one, *self._num_words}):
            n_whole, num_types = of_one.get(name, (0, 0))
            row = {
                "language": name,
                "n_words": self._num_words.get(name, n_whole),
                "n_whole": n_whole,
                "n_types": num_types,
                "has_list": lexicon.find(name) is not None,
            }
            rows.append(row)
        rows.sort(key=lambda row: (-row["n_words"], row["language"]))
        return pa.Table.from_pylist(rows, LANGUAGES_SCHEMA)

    def _sums(self, codes: Ints, num: int) -> tuple[Ints, Ints]:
        """Words and types of each of ``num`` languages."""
        n = np.zeros(num, np.int64)
        np.add.at(n, codes, self._n)
        return n, np.bincount(codes, minlength=num)


def words_of(language: str, uses: LanguageUses | None) -> WordsOf:
    """Words by which types are classified: by their ``uses``, or those of ``language`` alone."""
    if uses is not None:
        return uses.of
    words = lexicon.find(language)
    return lambda token_id: words


def describe(languages: pa.Table) -> str:
    """The most frequent of a run's detected ``languages``, with shares of words."""
    total = pc.sum(languages["n_words"]).as_py() or 1
    named = []
    for row in languages.slice(0, MOST_NAMED).to_pylist():
        if row["n_words"] >= LEAST_SHARE * total:
            named.append(f"{row['language']} {row['n_words'] / total:.1%}")
    more = f" and {len(languages) - len(named)} more" if len(languages) > len(named) else ""
    return f"{', '.join(named)}{more} (detected, of words)" if named else ""


def without_list(languages: pa.Table) -> str:
    """Says which of a run's ``languages`` have no closed-class words; empty if all have.

    Rarer ones than ``LEAST_SHARE`` are left out, as most are errors of the detector.
    """
    total = pc.sum(languages["n_words"]).as_py() or 1
    lacking = [
        f"{row['language']} ({row['n_words'] / total:.1%} of words)"
        for row in languages.to_pylist()
        if not row["has_list"]
        and row["language"] != UNKNOWN_LANGUAGE
        and row["n_words"] >= LEAST_SHARE * total
    ]
    if not lacking:
        return ""
    more = f" and {len(lacking) - MOST_NAMED} more" if len(lacking) > MOST_NAMED else ""
    return (
        f"there are no closed-class words of {', '.join(lacking[:MOST_NAMED])}{more}, so words "
        "that occur mostly there have the class word, neither content nor function"
    )


LEAST_SHARE = 0.001
"""Smallest share of words of a language that a notice names."""
MOST_NAMED = 5
"""Largest number of languages that a sentence names."""
