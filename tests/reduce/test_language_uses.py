"""Classes of words by the languages of the documents that they occur in."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from afn_ray.reduce import lexicon, shard_summary
from afn_ray.reduce.language_uses import LanguageUses, Uses, describe, without_list, words_of
from afn_ray.reduce.lexicon import Guess
from afn_ray.reduce.shard_summary import Spoken, Summary, whole_words
from afn_ray.reduce.type_tags import ALL_TYPES, TypeTags
from afn_ray.schema import SPECIAL, WORD_START


@pytest.mark.parametrize(
    ("word", "counts", "name"),
    [
        ("die", {"en": 9}, "content"),
        ("die", {"de": 9}, "function"),
        ("die", {"de": 9, "en": 5}, "function"),
        ("die", {"de": 5, "en": 9}, "content"),
        (
            "die",
            {"de": 5, "en": 5},
            "function",
        ),  # at least half: a word without entry may be closed
        ("die", {"de": 5, "unknown": 900}, "function"),  # unknown counts for nothing
        ("die", {"de": 5, "sw": 5}, "function"),
        ("die", {"de": 5, "sw": 6}, "word"),  # there is no list of Swahili
        ("die", {"sw": 6}, "word"),
        ("die", {"unknown": 6}, "word"),
        ("die", {}, "word"),
        ("house", {"en": 5, "de": 5}, "content"),
    ],
)
def test_a_word_has_the_class_of_most_of_its_uses(
    word: str, counts: dict[str, int], name: str
) -> None:
    guess = Uses(counts).guess(word)
    assert guess.name == name and 0 < guess.confidence <= 1
    assert Uses(dict(reversed(counts.items()))).guess(word) == guess


@pytest.mark.parametrize("language", ["en", "de", "zh"])
def test_uses_in_one_language_give_what_the_language_gives(language: str) -> None:
    words = lexicon.find(language)
    assert words is not None
    for word in ("die", "will", "house", "的"):
        assert Uses({language: 7, "unknown": 3}).guess(word) == words.guess(word)


def test_the_confidence_of_several_languages_is_that_of_their_uses() -> None:
    german, english = (lexicon.find(language) for language in ("de", "en"))
    assert german is not None and english is not None
    closed, open_ = german.guess("die"), english.guess("die")
    assert (closed.name, open_.name) == ("function", "content")
    found = Uses({"de": 60, "en": 30, "sw": 10}).guess("die")
    assert found.name == "function" and found.is_ambiguous
    assert found.confidence == pytest.approx(
        (60 * closed.confidence + 30 * (1 - open_.confidence)) / 100
    )
    assert Uses({"sw": 3, "en": 1}).guess("die") == Guess("word", 0.75)


def tokens(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents, types and flags of 400 random tokens."""
    rng = np.random.default_rng(seed)
    docs = np.sort(rng.integers(0, 12, 400)).astype(np.int32)
    flags = rng.choice([0, WORD_START, WORD_START, SPECIAL], 400).astype(np.uint8)
    return docs, rng.integers(0, 30, 400).astype(np.int32), flags


SPOKEN = pa.array(["sv", "en", None, "unknown", "en", "de", "zh", "de", None, "en", "ar", "sv"])


def count_languages(*chunks: int, spoken: pa.Array = SPOKEN) -> TypeTags:
    """Words by language in the summary of ``chunks``, each the seed of its ``tokens``."""
    summary = Summary([], spoken=True)
    for seed in chunks:
        docs, types, flags = tokens(seed)
        summary.add(docs, types, flags, {}, spoken=Spoken.of(docs, spoken))
    (table,) = summary.tables()
    return TypeTags.from_table(table)


@pytest.mark.parametrize("counters", [0, 1 << 20])
def test_words_are_counted_by_the_language_of_their_document(
    counters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_summary, "MOST_COUNTERS", counters)
    expected: Counter[tuple[int, str]] = Counter()
    for seed in (1, 2):
        docs, types, flags = tokens(seed)
        for row in np.flatnonzero(whole_words(docs, flags)).tolist():
            language = SPOKEN[int(docs[row])].as_py()
            if language is not None:
                expected[int(types[row]), language] += 1
        for row in np.flatnonzero(flags & WORD_START).tolist():
            language = SPOKEN[int(docs[row])].as_py()
            if language is not None:
                expected[ALL_TYPES, language] += 1
    rows = count_languages(1, 2).table.to_pylist()
    assert [((r["token_id"], r["tag"]), r["n"]) for r in rows] == sorted(expected.items())


def test_counts_are_the_same_however_chunks_name_their_languages() -> None:
    docs, types, flags = tokens(3)
    half = int(np.searchsorted(docs, 6))
    summary = Summary([], spoken=True)
    # The languages of a chunk are numbered as they come: here in another order, and others.
    for part, first in ((slice(half, None), 6), (slice(half), 0)):
        spoken = Spoken.of(docs[part] - first, SPOKEN[first:][:6])
        summary.add(docs[part], types[part], flags[part], {}, spoken=spoken)
    (table,) = summary.tables()
    assert TypeTags.from_table(table).table.equals(count_languages(3).table)


def test_no_words_have_no_counts() -> None:
    nothing = pa.nulls(12, pa.string())
    assert len(count_languages(1, spoken=nothing).table) == 0
    assert len(count_languages().table) == 0
    assert LanguageUses(TypeTags.empty()).of(3) == Uses({})
    assert len(LanguageUses(TypeTags.empty()).table()) == 0


def test_counts_add_up_in_any_order_and_can_be_taken_out() -> None:
    parts = [count_languages(seed) for seed in range(5)]
    assert count_languages(*range(5)).table.equals(TypeTags.merge(parts).table)
    whole = LanguageUses(TypeTags.merge(parts))
    turned = TypeTags.merge([TypeTags.merge(parts[3:]), *parts[2::-1]])
    assert turned.table.equals(TypeTags.merge(parts).table)
    without = TypeTags.merge([*parts, parts[0].negative(), parts[1].negative()])
    rest = LanguageUses(TypeTags.merge(parts[2:]))
    assert LanguageUses(without).table().equals(rest.table())
    for token_id in range(31):
        assert LanguageUses(without).of(token_id) == rest.of(token_id)
    total = sum(n for i in range(31) for n in whole.of(i).counts.values())
    assert total == sum(whole.table()["n_whole"].to_pylist()) > 0


def test_a_language_whose_words_all_have_several_tokens_is_counted_and_named() -> None:
    docs = np.repeat([0, 1], [12, 4]).astype(np.int32)
    flags = np.array([WORD_START, 0] * 6 + [WORD_START] * 4, np.uint8)
    summary = Summary([], spoken=True)
    spoken = Spoken.of(docs, pa.array(["ta", "en"]))
    summary.add(docs, np.arange(16, dtype=np.int32), flags, {}, spoken=spoken)
    (shard,) = summary.tables()
    uses = LanguageUses(TypeTags.merge([TypeTags.from_table(shard)] * 2))
    table = uses.table()
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("ta", 12, 0, 0, False),
        ("en", 8, 8, 4, True),
    ]
    assert "no closed-class words of ta (60.0% of words)" in without_list(table)
    assert describe(table) == "ta 60.0%, en 40.0% (detected, of words)"
    assert uses.of(0) == Uses({}) and uses.of(12) == Uses({"en": 2})


def test_languages_without_a_list_are_named_with_their_share() -> None:
    types = np.arange(8, dtype=np.int32)
    spoken = pa.array(["en", "en", "sw", "unknown", "sw", "en", "ht", "en"])
    table = LanguageUses(TypeTags.of(types, spoken)).table()
    assert [(r["language"], r["n_words"], r["has_list"]) for r in table.to_pylist()] == [
        ("en", 4, True),
        ("sw", 2, False),
        ("ht", 1, False),
        ("unknown", 1, False),
    ]
    said = without_list(table)
    assert "closed-class words of sw (25.0% of words), ht (12.5%" in said
    assert describe(table) == ("en 50.0%, sw 25.0%, ht 12.5%, unknown 12.5% (detected, of words)")
    assert describe(table.slice(0, 0)) == ""
    assert "unknown" not in said and without_list(table.slice(0, 1)) == ""


def test_a_language_of_a_stray_document_is_no_notice() -> None:
    for n, is_said in ((998, True), (1000, False)):
        types = np.arange(n + 1, dtype=np.int32)
        spoken = pa.array(["en"] * n + ["sw"])
        table = LanguageUses(TypeTags.of(types, spoken)).table()
        assert ("sw (0.1%" in without_list(table)) is is_said
        assert ("sw 0.1%" in describe(table)) is is_said
        assert ("en 99.9% and 1 more" in describe(table)) is not is_said


def test_a_language_that_is_named_gives_every_type_its_words() -> None:
    assert words_of("de", None)(5) is lexicon.find("de") and words_of("xx", None)(5) is None
