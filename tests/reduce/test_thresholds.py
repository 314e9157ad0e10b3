"""Rounding is close, histograms lose nothing, and quantiles are the exact order statistics."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from afn_ray.reduce import histogram as thresholds
from afn_ray.reduce import typed_bins
from afn_ray.reduce.histogram import (
    BIN_BITS,
    SPECIAL_KEY,
    Histogram,
    SeriesSummary,
    round_strengths,
    to_bins,
    to_values,
)
from afn_ray.reduce.shard_summary import COUNTED_IDS, Summary, whole_words
from afn_ray.schema import SPECIAL, SUMMARY_SCHEMA, WORD_START, Series

Floats = npt.NDArray[np.float32]

LARGEST = to_values(np.array([0x7F7FFF]))[0]  # 15 bits of mantissa, just under infinity
SMALLEST_NORMAL = np.float32(2.0**-126)
ANY = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(width=32, allow_nan=False))


# --- rounding
# --------------------------------------------------------------------------------------------


def _nearest(value: np.float32) -> np.float32:
    """``value`` to 15 bits of mantissa, half to even, by exact arithmetic; ``value`` finite, not
    negative.
    """
    exponent = max(
        -126, int(np.frexp(value)[1]) - 1
    )  # of the leading bit; denormals share the least one
    step = Fraction(2) ** (exponent - 15)
    return np.float32(
        float(round(Fraction(float(value)) / step) * step)
    )  # Fractions round half to even


@given(st.floats(0, float(LARGEST), width=32))
def test_rounding_is_to_the_nearest_half_to_even(value: float) -> None:
    assert round_strengths(np.array([value], np.float32))[0] == _nearest(np.float32(value))


@given(ANY)
def test_the_relative_error_is_at_most_2_to_the_minus_16(values: Floats) -> None:
    kept = values[(np.abs(values) >= SMALLEST_NORMAL) & (np.abs(values) <= LARGEST)].astype(
        np.float64
    )
    error = np.abs(round_strengths(kept.astype(np.float32)).astype(np.float64) - kept)
    assert (error <= np.abs(kept) * 2.0**-16).all()


@given(ANY)
def test_rounding_twice_is_rounding_once_and_keeps_order(values: Floats) -> None:
    rounded = round_strengths(np.sort(values))
    assert np.array_equal(round_strengths(rounded).view(np.uint32), rounded.view(np.uint32))
    assert (rounded[1:] >= rounded[:-1]).all()
    assert (rounded.view(np.uint32) & 0xFF == 0).all()


def test_the_special_cases_of_floats() -> None:
    bits = {
        0x80000000: 0,
        0: 0,  # both zeros
        1: 0,
        0x80: 0,
        0x81: 0x100,
        0x180: 0x200,
        0x007FFFFF: 0x00800000,  # denormals, and out of them
        0x3F800080: 0x3F800000,
        0x3F800180: 0x3F800200,  # halves go to even
        0x3FFFFF80: 0x40000000,  # carries into the exponent
        0x7F7FFF7F: 0x7F7FFF00,
        0x7F7FFF80: 0x7F800000,  # nothing finite is near enough
        0x7F800000: 0x7F800000,
        0xFF800000: 0xFF800000,
        0x7FC00001: 0x7FC00001,  # infinities, not a number
    }
    got = round_strengths(np.array(list(bits), np.uint32).view(np.float32)).view(np.uint32)
    assert got.tolist() == list(bits.values())


@given(ANY)
def test_a_bin_is_the_value_itself_and_sorts_like_it(values: Floats) -> None:
    rounded = np.sort(round_strengths(np.abs(values)))
    bins = to_bins(rounded)
    assert np.array_equal(to_values(bins), rounded)
    assert (np.diff(bins) >= 0).all() and ((bins >= 0) & (bins < 1 << BIN_BITS)).all()


# --- histograms and quantiles
# ----------------------------------------------------------------------------

KEYS = hnp.arrays(np.int64, st.integers(0, 40), elements=st.integers(0, 12) | st.integers(0, 2**56))


def _same(a: Histogram, b: Histogram) -> None:
    assert a.keys.tolist() == b.keys.tolist() and a.counts.tolist() == b.counts.tolist()


@given(
    st.lists(KEYS, max_size=9), st.randoms(use_true_random=False), st.sampled_from([1, 7, 1 << 18])
)
def test_merging_in_any_order_and_grouping_counts_the_whole(
    parts: list[Any], random: Any, at_once: int
) -> None:
    """However many keys are sorted at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "MERGE_KEYS", at_once)
        _merges_count_the_whole(parts, random)


def _merges_count_the_whole(parts: list[Any], random: Any) -> None:
    keys, counts = np.unique(np.concatenate([np.empty(0, np.int64), *parts]), return_counts=True)
    whole = Histogram(keys, counts)
    histograms = [Histogram.of(p) for p in parts]
    _same(Histogram.merge(histograms), whole)
    while len(histograms) > 1:  # any two, until one is left
        random.shuffle(histograms)
        histograms.append(Histogram.merge([histograms.pop(), histograms.pop()]))
    _same(Histogram.merge(histograms), whole)
    assert whole.n == sum(map(len, parts))


@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 60),
        elements=st.integers(1, 9).map(float) | st.floats(0, 2.0**99, width=32),
    ),
    st.integers(0, 8),
)
@settings(max_examples=200)
def test_a_quantile_is_numpys_inverted_cdf(values: Floats, eighths: int) -> None:
    rounded = round_strengths(values)
    key = Histogram.of(to_bins(rounded)).quantile_key(eighths, 8)
    assert to_values(np.array([key]))[0] == np.quantile(rounded, eighths / 8, method="inverted_cdf")


def test_a_quantile_is_duckdbs_quantile_disc() -> None:
    random = np.random.default_rng(5)
    arrays = [
        np.sort(round_strengths(random.choice([1, 2, 2, 3, 5.5, 8, 1e-9], n).astype(np.float32)))
        for n in range(1, 41)
    ] + [round_strengths(random.normal(5, 1, 4099).astype(np.float32))]
    of = np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])
    connection = duckdb.connect()
    connection.register("strengths", pa.table({"of": of, "value": np.concatenate(arrays)}))
    rows = connection.execute(
        "SELECT quantile_disc(value, [0.25, 0.5, 0.75]), quantile_disc(value, 0.0), "
        "quantile_disc(value, 1.0) "
        "FROM strengths GROUP BY of ORDER BY of"
    ).fetchall()
    for values, (quartiles, least, most) in zip(arrays, rows, strict=True):
        histogram = Histogram.of(to_bins(values))
        keys = [histogram.quantile_key(i, 4) for i in (1, 2, 3, 0, 4)]
        assert to_values(np.array(keys)).tolist() == [*quartiles, least, most]


def test_a_quantile_is_exact_where_floats_are_not() -> None:
    """0.1 * 10 and the like: the rank is found in integers."""
    histogram = Histogram(np.arange(10), np.full(10, 10**17))
    assert histogram.quantile_key(3, 10) == 2
    assert Histogram(np.arange(2), np.array([3 * 10**16, 7 * 10**16 + 1])).quantile_key(3, 10) == 1
    assert Histogram(np.arange(2), np.array([3 * 10**16 + 1, 7 * 10**16])).quantile_key(3, 10) == 0


# --- summaries
# -------------------------------------------------------------------------------------------

SERIES = (Series("strength", 0), Series("shift", 7))
TOKEN = st.tuples(
    st.sampled_from([0, 1, 2, 3, 2**31 - 1]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5).map(float),
    st.floats(0, 9),
)
CORPUS = st.lists(st.lists(TOKEN, max_size=6), max_size=12)  # documents of tokens


def _summarise(docs: Sequence[Sequence[Any]], cuts: Sequence[int]) -> Summary:
    """``docs`` in chunks of whole documents that end at ``cuts``."""
    summary = Summary(SERIES)
    bounds = sorted({0, *(min(c, len(docs)) for c in cuts), len(docs)})
    for begin, end in pairwise(bounds):
        rows = [(doc, *token) for doc in range(begin, end) for token in docs[doc]]
        column = [np.array([r[i] for r in rows]) for i in range(6)] if rows else [np.empty(0)] * 6
        flags = column[2].astype(np.uint8) * SPECIAL + column[3].astype(np.uint8) * WORD_START
        values = {
            k: round_strengths(column[4 + at].astype(np.float32)) for at, k in enumerate(SERIES)
        }
        summary.add(
            column[0].astype(np.int32), column[1].astype(np.int32), flags.astype(np.uint8), values
        )
    return summary


def _brute_force(docs: Sequence[Sequence[Any]], at: int) -> dict[tuple[bool, int], Any]:
    """(special, type) -> n_docs, n_word_start, n_whole, value -> count."""
    found: dict[tuple[bool, int], Any] = defaultdict(lambda: [set(), 0, 0, Counter()])
    for doc, tokens in enumerate(docs):
        for place, (token_id, special, start, *values) in enumerate(tokens):
            following = tokens[place + 1] if place + 1 < len(tokens) else None
            goes_on = following is not None and not following[1] and not following[2]
            entry = found[special, token_id]
            entry[0].add(doc)
            entry[1] += start
            entry[2] += start and not goes_on
            entry[3][float(round_strengths(np.array(values, np.float32))[at])] += 1
    return {
        key: (len(docs), starts, whole, dict(counts))
        for key, (docs, starts, whole, counts) in found.items()
    }


def _read(summary: SeriesSummary) -> dict[tuple[bool, int], Any]:
    """The same from a ``SeriesSummary``."""
    values: dict[tuple[bool, int], dict[float, int]] = defaultdict(dict)
    for key, n in zip(summary.values.keys.tolist(), summary.values.counts.tolist(), strict=True):
        value = to_values(np.array([key % 2**24]))[0]
        values[bool(key >> 55), (key >> 24) % 2**31][float(value)] = n
    by_type = [
        dict(zip(h.keys.tolist(), h.counts.tolist(), strict=True))
        for h in (summary.docs, summary.word_starts, summary.whole_words)
    ]
    return {
        (s, t): (*(counts[(s << 55) + (t << 24)] for counts in by_type), of_type)
        for (s, t), of_type in values.items()
    }


@given(
    CORPUS,
    st.lists(st.integers(0, 12), max_size=4),
    st.integers(0, 12),
    st.sampled_from([0, 3, 1 << 22]),
    st.sampled_from([1, 8, 1 << 16]),
)
def test_a_summary_is_what_counting_one_by_one_gives(
    docs: list[list[Any]],
    cuts: list[int],
    shard_end: int,
    few_keys: int,
    group_tokens: int,
) -> None:
    """The sums are equal for any chunks, two shards or one, and however chunks are merged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typed_bins, "MOST_WAITING", few_keys)
        patch.setattr(typed_bins, "GROUP_TOKENS", group_tokens)
        patch.setattr(thresholds, "MERGE_KEYS", max(1, few_keys))
        shards = [_summarise(docs[:shard_end], cuts), _summarise(docs[shard_end:], cuts)]
        tables = [list(s.tables()) for s in shards]
        _tables_hold(docs, tables)


def _tables_hold(docs: list[list[Any]], tables: list[list[pa.Table]]) -> None:
    for at, series in enumerate(SERIES):
        for table in tables:
            assert table[at].schema == SUMMARY_SCHEMA
            table[at].validate(full=True)
            assert set(table[at]["layer"].to_pylist()) <= {series.layer}
            assert set(table[at]["signal"].to_pylist()) <= {series.signal}
            assert all(list(bins) == sorted(set(bins)) for bins in table[at]["bins"].to_pylist())
        merged = SeriesSummary.merge(SeriesSummary.from_table(table[at]) for table in tables)
        assert _read(merged) == _brute_force(docs, at)
        again = merged.to_table(series)
        again.validate(full=True)
        assert _read(SeriesSummary.from_table(again)) == _read(merged)


def test_a_summary_keeps_to_its_bound_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the same values do not pile up."""
    monkeypatch.setattr(typed_bins, "MOST_WAITING", 50)
    docs = [[(i, False, True, float(i), 1.0) for i in range(20)] for _ in range(30)]
    summary = _summarise(docs, range(30))
    counter = summary._values[SERIES[0]]
    assert sum(len(chunk.bins) for chunk in counter._waiting) <= 50
    assert len(counter._sum.keys) == 20
    assert sum(t["n_docs"][0].as_py() for t in summary.tables()) == 30 * len(SERIES)


def test_a_merge_holds_few_parts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the same values are added before they pile up, and each value is counted."""
    monkeypatch.setattr(thresholds, "MERGE_KEYS", 50)
    (table, _) = _summarise([[(i, False, True, float(i), 1.0) for i in range(20)]], []).tables()
    alive: list[weakref.ref[Any]] = []
    most = 0

    def parts() -> Any:
        nonlocal most
        for _ in range(200):
            part = SeriesSummary.from_table(table)
            alive.append(weakref.ref(part.values.keys))
            yield part
            del part
            most = max(most, sum(r() is not None for r in alive))

    merged = SeriesSummary.merge(parts())
    assert merged.values.counts.tolist() == [200] * 20
    assert most <= 4  # over 50 keys, and the one that is made


def test_a_summary_of_nothing_has_tables_without_rows() -> None:
    summary = _summarise([], [])
    none = np.empty(0, np.int32)
    summary.add(none, none, none.astype(np.uint8), dict.fromkeys(SERIES, none.astype(np.float32)))
    tables = list(summary.tables())
    assert [t.num_rows for t in tables] == [0, 0]
    assert SeriesSummary.merge([]).values.n == SeriesSummary.from_table(tables[0]).values.n == 0


@pytest.mark.parametrize("size", [1, 7, COUNTED_IDS, COUNTED_IDS + 1, 1 << 31])
@pytest.mark.parametrize("n", [0, 1, 500])
def test_a_summary_counts_what_numpys_unique_counts(size: int, n: int) -> None:
    chance = np.random.default_rng(size + n)
    ids = chance.integers(max(0, size - 20), size, n).astype(np.int32)
    docs = np.sort(chance.integers(0, 30, n)).astype(np.int32)
    flags = chance.choice(np.array([SPECIAL, 0, WORD_START], np.uint8), n)
    by_series: dict[Series, Floats] = {}
    for series, widest in zip(SERIES, (4, 1 << 20), strict=True):  # few bins, and many
        bins = chance.integers(1 << 20, (1 << 20) + widest, n)
        by_series[series] = to_values(bins)
    summary = Summary(SERIES)
    summary.add(docs, ids, flags, by_series)
    types = (flags & SPECIAL).astype(np.int64) * SPECIAL_KEY + (ids.astype(np.int64) << BIN_BITS)
    whole = whole_words(docs, flags)
    pairs = np.unique(np.stack([types, docs]), axis=1)
    expected = {
        "_docs": pairs[0],
        "_word_starts": types[flags == WORD_START],
        "_whole_words": types[whole],
    }
    for name, keys in expected.items():
        _same(getattr(summary, name)[0], Histogram(*np.unique(keys, return_counts=True)))
    for series, values in by_series.items():
        keys = types + to_bins(values)
        _same(summary._values[series].histogram(), Histogram(*np.unique(keys, return_counts=True)))
