"""Statistics against scipy, numpy, and every value written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from afn_ray.reduce.stats import auc, mean_and_variance, midranks, quantile_index, spearman

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=9)
VALUES = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


@given(COUNTS, st.integers(0, 4))
def test_a_quantile_of_counts_is_that_of_all_values(counts: list[int], quarter: int) -> None:
    values = np.repeat(np.arange(len(counts)), counts)
    expected = np.quantile(values, quarter / 4, method="inverted_cdf")
    assert quantile_index(np.array(counts), quarter, 4) == expected


@given(COUNTS)
def test_moments_of_counts_are_those_of_all_values(counts: list[int]) -> None:
    values = np.arange(len(counts)) / 3
    every = np.repeat(values, counts)
    mean, variance = mean_and_variance(values, np.array(counts))
    assert mean == pytest.approx(every.mean())
    assert variance == pytest.approx(every.var(), abs=1e-12)


@given(VALUES, VALUES)
def test_auc_is_the_share_of_pairs_won(above: list[int], below: list[int]) -> None:
    wins = sum((a > b) + (a == b) / 2 for a, b in itertools.product(above, below))
    counts = (np.bincount(np.array(values) + 3, minlength=7) for values in (above, below))
    assert float(auc(*counts)) == pytest.approx(wins / len(above) / len(below))


@given(VALUES, st.data())
def test_midranks_are_those_of_all_values(values: list[int], data: st.DataObject) -> None:
    size = len(values)
    counts = np.array(data.draw(st.lists(st.integers(1, 4), min_size=size, max_size=size)))
    every = rankdata(np.repeat(values, counts)) - 0.5
    np.testing.assert_array_equal(np.repeat(midranks(np.array(values), counts), counts), every)
    np.testing.assert_array_equal(midranks(np.array(values)), rankdata(values) - 0.5)


def test_spearman_averages_ties_and_needs_two_values() -> None:
    assert spearman(np.ones(5), np.arange(5)) is None
    assert spearman(np.array([1, 1, 2, 3]), np.array([0, 4, 4, 9])) == pytest.approx(
        spearmanr([1, 1, 2, 3], [0, 4, 4, 9]).statistic
    )
