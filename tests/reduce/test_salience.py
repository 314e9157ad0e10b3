"""Salience beyond frequency against slow references, an independent fit, and planted corpora."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import SplineTransformer

from afn_ray.reduce import smooth
from afn_ray.reduce.controls import (
    NUM_PLACES,
    ControlCounter,
    Controls,
    ControlSums,
    bins_of_places,
    frequency_bins,
    places_of,
)
from afn_ray.reduce.features import add
from afn_ray.reduce.salience import MOST_TOKENS, effective_tokens, salience_table
from afn_ray.reduce.smooth import RIDGE, SEGMENTS, deviance, fit, sigmoid
from afn_ray.reduce.stats import wilson

Floats = npt.NDArray[np.float64]
Q3 = 1.0
TOLERANCE = 0.005
"""Largest difference of an expected share from that of a fit of its own, without the type."""
LEAST_N = 20
"""Least tokens of a type whose interval is judged."""


class Corpus:
    """Tokens of one corpus, in the order of their documents, all arrays [n]."""

    def __init__(self, lengths: Any, types: Any) -> None:
        """``lengths`` are tokens of each document; ``types`` are those of the tokens."""
        self.lengths, self.types = np.asarray(lengths), np.asarray(types, np.int32)
        self.docs = np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)
        begins = np.cumsum(self.lengths) - self.lengths
        self.positions = np.arange(len(self.docs)) - begins[self.docs]
        self.n = np.bincount(self.types)
        self.places = places_of(self.positions, self.lengths[self.docs])

    def vocabulary(self, high: Sequence[npt.NDArray[np.bool_]]) -> pa.Table:
        """The columns of ``VOCABULARY_SCHEMA`` that count; ``high`` by layer."""
        there = np.flatnonzero(self.n)
        pairs = np.unique(self.docs.astype(np.int64) * len(self.n) + self.types)
        n_docs = np.bincount(pairs % len(self.n), minlength=len(self.n))
        tables = []
        for layer, which in enumerate(high):
            n_high = np.bincount(self.types[which], minlength=len(self.n))
            columns = {
                "layer": np.full(len(there), layer, np.int16),
                "token_id": there.astype(np.int32),
                "class": ["content"] * len(there),
                "n": self.n[there],
                "n_docs": n_docs[there],
                "n_high": n_high[there],
            }
            tables.append(pa.table(columns))
        return pa.concat_tables(tables)

    def count(
        self, high: Sequence[npt.NDArray[np.bool_]], first: int = 0, end: int | None = None
    ) -> ControlSums:
        """The sums of the documents from ``first`` to ``end``."""
        counter = ControlCounter(Controls((Q3,) * len(high), frequency_bins(self.n)))
        some = (self.docs >= first) & (self.docs < (len(self.lengths) if end is None else end))
        strengths = [which[some].astype(np.float32) for which in high]
        counter.add(self.docs[some], self.types[some], self.places[some], strengths)
        return counter.sums()

    def salience(self, *high: npt.NDArray[np.bool_]) -> pa.Table:
        bins = frequency_bins(self.n)
        sums = self.count(high).flat()
        return salience_table(range(len(high)), self.vocabulary(high), bins, sums)


def zipf(seed: int, num_types: int, num_docs: int, mean_length: int) -> Corpus:
    """A corpus of types by Zipf's law, in bursts: a document repeats some of its types."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(2, rng.lognormal(math.log(mean_length), 0.6, num_docs).astype(int))
    rate = np.arange(1, num_types + 1) ** -0.9
    types = []
    for length in lengths.tolist():
        of_doc = np.cumsum(rate * rng.gamma(0.7, 1 / 0.7, num_types))
        types.append(np.searchsorted(of_doc, rng.random(length) * of_doc[-1]))
    return Corpus(lengths, np.concatenate(types))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return zipf(0, 600, 1500, 40)


def by_hand(corpus: Corpus, high: npt.NDArray[np.bool_]) -> dict[str, Counter[int]]:
    """``ControlSums`` of one layer, token by token."""
    bins = frequency_bins(corpus.n)
    found: dict[str, Counter[int]] = {
        name: Counter() for name in ("tokens", "pairs", "high", "mixed_pairs", "high_pairs")
    }
    of_pairs: dict[tuple[int, int], list[bool]] = {}
    rows = (corpus.docs, corpus.types, corpus.positions, corpus.lengths[corpus.docs], high)
    for doc, kind, position, length, is_high in zip(*(r.tolist() for r in rows), strict=True):
        at = min(9, int(math.log2(length)))
        place = at * (at + 1) // 2 + min(9, int(math.log2(position + 1)))
        found["tokens"][kind * NUM_PLACES + place] += 1
        found["high"][int(bins[kind]) * NUM_PLACES + place] += is_high
        of_pairs.setdefault((doc, kind), []).append(is_high)
    for (_, kind), labels in of_pairs.items():
        n, h = len(labels), sum(labels)
        found["pairs"][kind] += n * (n - 1)
        found["mixed_pairs"][kind] += h * (n - 1)
        found["high_pairs"][kind] += h * (h - 1)
    return {name: +counts for name, counts in found.items()}


def as_counter(histogram: Any) -> Counter[int]:
    return +Counter(dict(zip(histogram.keys.tolist(), histogram.counts.tolist(), strict=True)))


@pytest.mark.parametrize("limits", [{}, {"counters.DENSE_COUNTS": 0}, {"controls.KEY_BITS": 12}])
def test_counts_are_those_of_tokens_one_by_one_for_any_parts_of_the_corpus(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(f"afn_ray.reduce.{name}", value)
    corpus = zipf(1, 50, 60, 30)
    rng = np.random.default_rng(1)
    high = [rng.random(len(corpus.docs)) < share for share in (0.3, 0.9, 0.5)]
    whole = corpus.count(high)
    for at, which in enumerate(high):
        expected = by_hand(corpus, which)
        for name in ("tokens", "pairs"):
            assert as_counter(getattr(whole, name)) == expected[name]
        for name in ("high", "mixed_pairs", "high_pairs"):
            assert as_counter(getattr(whole, name)[at]) == expected[name]
    parts = [corpus.count(high, a, b).flat() for a, b in ((17, 18), (18, None), (0, 17))]
    (merged,) = add(*parts)
    for one, other in zip(merged, whole.flat(), strict=True):
        np.testing.assert_array_equal(one.keys, other.keys)
        np.testing.assert_array_equal(one.counts, other.counts)


def test_bins_are_cut_at_powers_of_two_and_every_place_has_one_index() -> None:
    longs = np.array([1, 2, 3, 4, 7, 8, 511, 512, 513, 10**9])
    position, length = bins_of_places()
    expected = [0, 1, 1, 2, 2, 3, 8, 9, 9, 9]
    assert length[places_of(longs - 1, longs)].tolist() == expected
    assert position[places_of(longs - 1, longs)].tolist() == expected
    assert position[places_of(longs * 0, longs)].tolist() == [0] * 10
    n = np.array([0, 1, 2, 3, 1000, 1001, 1 << 40])
    bins = frequency_bins(n)
    assert bins[0] == bins[1] == 0 and (np.diff(bins[1:]) >= 0).all()
    for k in (1, 5, 40):
        low = frequency_bins(np.array([(1 << k) - 1, 1 << k]))
        assert low[0] < low[1]


def planted(corpus: Corpus, seed: int, log_odds: Floats, spread: float) -> npt.NDArray[np.bool_]:
    """HIGH tokens by ``log_odds`` [n_types] and two effects, of documents and of types in them."""
    rng = np.random.default_rng(seed)
    pairs = corpus.docs.astype(np.int64) * len(log_odds) + corpus.types
    distinct, at = np.unique(pairs, return_inverse=True)
    effect = rng.normal(0, spread, len(corpus.lengths))[corpus.docs]
    effect += rng.normal(0, spread, len(distinct))[at]
    effect += 0.2 * np.log2(corpus.positions + 1) - 0.15 * np.log2(corpus.lengths)[corpus.docs]
    return np.asarray(rng.random(len(at)) < sigmoid(log_odds[corpus.types] + effect))


def of_frequency(n: Any) -> Floats:
    """Log-odds that fall with the frequency, in a curve."""
    x = np.log2(np.maximum(n, 1))
    return np.asarray(2.5 - 0.45 * x - 0.6 * np.sin(x / 3))


def test_expected_shares_are_those_of_scikit_learn_without_the_type(corpus: Corpus) -> None:
    """Its splines and its optimiser, over cells of each type, fitted anew without that type."""
    high = planted(corpus, 2, of_frequency(corpus.n), 0.5)
    found = corpus.salience(high)["expected"].to_numpy()
    keys, at = np.unique(corpus.types * NUM_PLACES + corpus.places, return_inverse=True)
    n, n_high = np.bincount(at), np.bincount(at, high)
    kind, place = np.divmod(keys, NUM_PLACES)
    position, length = bins_of_places()
    x = np.stack([np.log2(corpus.n[kind]), position[place], length[place]], axis=1)
    splines = SplineTransformer(n_knots=SEGMENTS + 1, degree=3, knots="uniform")
    design = splines.fit_transform(x)
    weight = np.minimum(1, MOST_TOKENS / corpus.n[kind])
    model = LogisticRegression(C=1 / RIDGE, max_iter=5000, tol=1e-9)
    types = np.flatnonzero(corpus.n)
    by_frequency = np.argsort(-corpus.n[types])
    judged = [*range(3), *range(3, len(types), len(types) // 5)]
    for row in by_frequency[judged].tolist():
        others = kind != types[row]
        labels = np.repeat([1, 0], others.sum())
        weights = np.concatenate([n_high * weight, (n - n_high) * weight])
        cells = np.concatenate([design[others], design[others]])
        model.fit(cells, labels, sample_weight=weights[np.concatenate([others, others])])
        per_cell = model.predict_proba(design[~others])[:, 1]
        expected = (n[~others] * per_cell).sum() / n[~others].sum()
        assert found[row] == pytest.approx(expected, abs=TOLERANCE)
    assert np.ptp(found) > 0.3


def test_a_fit_of_the_same_cells_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    x = np.stack([rng.uniform(0, 9, 300), rng.integers(0, 5, 300), np.full(300, 2.0)], axis=1)
    n = rng.integers(1, 50, 300).astype(float)
    n_high = rng.binomial(n.astype(int), sigmoid(np.sin(x[:, 0]) - x[:, 1] / 3)).astype(float)
    design = SplineTransformer(n_knots=SEGMENTS + 1).fit_transform(x[:, :2])
    model = LogisticRegression(C=1 / RIDGE, max_iter=5000, tol=1e-10)
    weights = np.concatenate([n_high, n - n_high])
    model.fit(np.concatenate([design, design]), np.repeat([1, 0], 300), sample_weight=weights)
    found = fit(x, n, n_high).log_odds(x)
    np.testing.assert_allclose(found, model.decision_function(design), atol=1e-4)
    share = sigmoid(found)
    by_hand = -2 * (n_high * np.log(share) + (n - n_high) * np.log(1 - share))
    np.testing.assert_allclose(deviance(found, n, n_high), by_hand)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("most", [50, 100_000])
def test_a_fit_ends_within_50_steps_where_its_gradient_is_0(
    monkeypatch: pytest.MonkeyPatch, share: float, most: int
) -> None:
    """Also where nothing or all is HIGH, and where sums over many tokens are rounded."""
    rng = np.random.default_rng(10)
    x = np.stack([rng.uniform(0, 9, 300), rng.integers(0, 5, 300)], axis=1)
    n = rng.integers(1, most, 300).astype(float)
    n_high = n * share
    if 0 < share < 1:
        n_high = rng.binomial(n.astype(int), sigmoid(x[:, 0] - 6)).astype(float)
    found = fit(x, n, n_high)
    monkeypatch.setattr(smooth, "MOST_STEPS", 50)
    np.testing.assert_array_equal(fit(x, n, n_high).log_odds(x), found.log_odds(x))
    residuals = n * sigmoid(found.log_odds(x)) - n_high
    assert abs(residuals.sum()) < 1e-6


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_run_where_nothing_or_all_is_high_has_finite_figures(share: float) -> None:
    corpus = zipf(4, 20, 5, 10)
    found = corpus.salience(np.full(len(corpus.docs), bool(share)))
    for name in found.column_names:
        assert np.isfinite(found[name].to_numpy()).all()
    np.testing.assert_allclose(found["expected"].to_numpy(), share, atol=1e-3)


@pytest.mark.parametrize("num_types", [1, 2, 3])
def test_a_corpus_of_few_types_has_finite_figures(num_types: int) -> None:
    """The types are nearly all of the text, so there are hardly others to expect anything by."""
    lengths = [600, 1, 9, 300]
    types = np.arange(sum(lengths)) % 100
    corpus = Corpus(lengths, np.where(types < num_types, types, 0))
    found = corpus.salience(corpus.types == 0, corpus.positions < 300)
    assert len(found) == 2 * num_types
    for name in found.column_names:
        assert np.isfinite(found[name].to_numpy()).all()
    expected = found["expected"].to_numpy()
    assert (expected >= 0).all() and (expected <= 1).all()
    assert (found["beyond_low"].to_numpy() <= found["beyond_high"].to_numpy()).all()


def test_an_interval_is_that_of_sums_by_document(corpus: Corpus) -> None:
    """``n_effective`` against its definition: variances of residuals, document by document."""
    rng = np.random.default_rng(5)
    high = planted(corpus, 5, rng.normal(-1, 1, len(corpus.n)), 1.0)
    table = corpus.vocabulary([high])
    types = {name: table[name].to_numpy() for name in ("n", "n_docs", "n_high")}
    types["number"] = table["token_id"].to_numpy()
    found = effective_tokens(types, corpus.count([high]), 0)
    rows, pq_pairs, excess = [], 0.0, 0.0
    for kind in types["number"].tolist():
        of_type = corpus.types == kind
        docs, label = corpus.docs[of_type], high[of_type]
        sizes = np.bincount(docs)
        sizes = sizes[sizes > 0]
        p = label.mean()
        residuals = np.bincount(docs, label - p)
        squares, n = float((residuals**2).sum()), len(docs)
        rows.append((n, p, sizes, squares))
        pq_pairs += p * (1 - p) * float((sizes * (sizes - 1)).sum())
        excess += squares - n * p * (1 - p)
    correlation = min(1, max(0, excess / pq_pairs))
    assert 0.1 < correlation < 0.9
    for (n, p, sizes, squares), got in zip(rows, found.tolist(), strict=True):
        squared_sizes = float((sizes**2).sum())
        usual_ratio = 1 + correlation * (squared_sizes / n - 1)
        expected = n / usual_ratio
        if 0 < p < 1:
            own = squares / n**2 * len(sizes) / max(len(sizes) - 1, 1)
            known = n**2 / squared_sizes - 1
            variance = (known * own + 20 * p * (1 - p) / n * usual_ratio) / (known + 20)
            expected = min(n, p * (1 - p) / variance)
        expected *= (1.959964 / stats.t.ppf(0.975, n**2 / squared_sizes - 1 + 20)) ** 2
        assert got == pytest.approx(expected, rel=0.02)  # t to first order


def test_where_salience_is_frequency_alone_no_word_is_salient_beyond_it(corpus: Corpus) -> None:
    high = planted(corpus, 6, of_frequency(corpus.n), 0.5)
    found = corpus.salience(high)
    n = corpus.n[found["token_id"].to_numpy()]
    judged = n >= LEAST_N
    share = np.bincount(corpus.types, high)[found["token_id"].to_numpy()] / n
    assert judged.sum() > 300 and np.ptp(share[judged]) > 0.4
    assert (found["beyond_low"].to_numpy()[judged] > 0).mean() <= 0.05
    assert (found["beyond_high"].to_numpy()[judged] < 0).mean() <= 0.05


def test_words_that_are_high_whatever_their_frequency_are_salient_beyond_it(
    corpus: Corpus,
) -> None:
    """One in ten, of all frequencies; what is expected of the others is not raised much."""
    log_odds = of_frequency(corpus.n) - 1
    rng = np.random.default_rng(7)
    is_planted = rng.random(len(corpus.n)) < 0.1
    is_planted[[0, 3]] = True  # among the most frequent, whose own tokens are a large share
    log_odds[is_planted] = 3
    found = corpus.salience(planted(corpus, 7, log_odds, 0.5))
    types = found["token_id"].to_numpy()
    judged = corpus.n[types] >= LEAST_N
    planted_here = is_planted[types] & judged
    is_salient = found["beyond_low"].to_numpy() > 0
    assert planted_here.sum() >= 20
    assert is_salient[planted_here].mean() >= 0.95
    assert is_salient[~is_planted[types] & judged].mean() <= 0.05
    assert is_salient[np.isin(types, [0, 3])].all()


NUM_TYPES = 300


def test_intervals_cover_the_truth_over_clustered_corpora() -> None:
    """500 corpora of one population of documents; documents, and types in
    them, are HIGH together.
    """
    rng = np.random.default_rng(8)
    log_odds = rng.normal(-0.5, 1.0, NUM_TYPES)
    shares, expected, lows, highs, counts = [], [], [], [], []
    for seed in range(500):
        one = zipf(seed, NUM_TYPES, 120, 30)
        high = planted(one, seed, log_odds, 0.7)
        table = one.vocabulary([high])
        bins = frequency_bins(one.n)
        sums = one.count([high])
        found = salience_table([0], table, bins, sums.flat())
        columns = {
            name: np.full(NUM_TYPES, np.nan) for name in ("n", "n_high", *found.column_names)
        }
        types = found["token_id"].to_numpy()
        for source in (found, table):
            for name in columns.keys() & set(source.column_names):
                columns[name][types] = source[name].to_numpy()
        counts.append(columns["n"])
        shares.append(columns["n_high"])
        expected.append(columns["expected"])
        lows.append(columns["beyond_low"])
        highs.append(columns["beyond_high"])
    n = np.array(counts)
    truth = np.nansum(shares, axis=0) / np.nansum(n, axis=0) - np.nanmean(expected, axis=0)
    assert np.ptp(truth) > 0.3
    covers = (np.array(lows) <= truth) & (truth <= np.array(highs))
    for least, most in ((LEAST_N, np.inf), (LEAST_N, 60), (60, np.inf)):
        judged = (n >= least) & (n < most)
        assert judged.sum() > 2000
        assert 0.93 <= covers[judged].mean() <= 0.97
    most_frequent = covers[n >= 200]  # few types are as frequent, so what is expected is less sure
    assert len(most_frequent) > 1000 and 0.89 <= most_frequent.mean() <= 0.97
    assert _naive_coverage(n, np.array(shares), np.array(expected), truth) < 0.92


def _naive_coverage(n: Floats, n_high: Floats, expected: Floats, truth: Floats) -> float:
    """Coverage of intervals that take tokens for independent, which the corpora must break."""
    judged = n >= LEAST_N
    low, high = wilson(n_high[judged], n[judged])
    of_truth = np.broadcast_to(truth, n.shape)[judged] + expected[judged]
    return float(((low <= of_truth) & (of_truth <= high)).mean())


def test_a_type_does_not_set_what_is_expected_of_itself(corpus: Corpus) -> None:
    expected = []
    log_odds = of_frequency(corpus.n)
    top = int(np.argmax(corpus.n))
    for odds in (-3.0, 3.0):
        log_odds[top] = odds
        found = corpus.salience(planted(corpus, 9, log_odds, 0.0))
        expected.append(found["expected"].to_numpy()[top])
    assert abs(expected[1] - expected[0]) < 0.05  # its own tokens would move it by 0.4
