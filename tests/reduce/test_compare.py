"""Two runs compared: figures against scipy on the raw strengths, what must not matter, and what
cannot be compared.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import scipy.spatial
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import afn_ray
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, StoreError
from afn_ray.reduce import compare, distances, drift
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.distances import benjamini_hochberg, two_proportions
from afn_ray.reduce.histogram import Histogram, to_bins
from afn_ray.reduce.word_movers import NO_WORDS, word_movers_table
from afn_ray.reduce.word_tables import LEAST_N
from afn_ray.run_info import Quarantined
from afn_ray.schema import (
    CLASS_DRIFT_SCHEMA,
    DRIFT_SCHEMA,
    MOVERS_SCHEMA,
    SOURCES_SCHEMA,
    WORD_VOCABULARY_SCHEMA,
)
from afn_ray.show import comparison_tables
from afn_ray.store import manifest
from afn_ray.store.manifest import RunFolder
from conftest import config_of, edit_checksummed, write_jsonl

LAYERS = (0, 2)
DISTANCES = ("psi", "ks", "js")


class Raw(NamedTuple):
    """Recorded tokens of a run, special ones left out."""

    strengths: dict[int, np.ndarray[Any, Any]]
    token_ids: np.ndarray[Any, Any]
    sources: np.ndarray[Any, Any]
    q3: dict[int, float]


def raw(uri: str) -> Raw:
    with afn_ray.open_run(uri) as run:
        table = run.sql(
            "SELECT token_id, source, strength_0, strength_2 FROM tokens JOIN documents USING "
            "(doc) "
            "WHERE NOT is_special ORDER BY doc, position"
        ).to_arrow_table()
        q3 = dict(
            run.sql("SELECT layer, q3 FROM thresholds WHERE population = 'tokens'").fetchall()
        )
    strengths = {k: table[f"strength_{k}"].to_numpy() for k in LAYERS}
    return Raw(strengths, table["token_id"].to_numpy(), np.array(table["source"].to_pylist()), q3)


def add_sources(uri: str, granularity: Callable[[str], str] = lambda source: source) -> RunFolder:
    """The complete run at ``uri`` with its table ``sources``, taken from what it recorded."""
    run, found = manifest.find_run(uri), raw(uri)
    names = np.array([granularity(s) for s in found.sources])
    rows = []
    for layer in LAYERS:
        for name in np.unique(names).tolist():
            here = found.strengths[layer][names == name]
            histogram = Histogram.of(to_bins(here))
            rows.append(
                {
                    "layer": layer,
                    "source": name,
                    "n_docs": 1,
                    "n": len(here),
                    "n_high": int((here >= found.q3[layer]).sum()),
                    "bins": histogram.keys.tolist(),
                    "counts": histogram.counts.tolist(),
                }
            )
    nothing = dict.fromkeys(SOURCES_SCHEMA.names, 0)
    table = pa.Table.from_pylist([nothing | row for row in rows], SOURCES_SCHEMA)
    entry = manifest.write_table(run, "sources", table)
    edit_checksummed(f"{run.uri}/run.json", lambda info: info["tables"].update(sources=entry))
    return manifest.find_run(uri)


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> RunConfig:
    """A run over a growing corpus, whose first night is files 0, 1 and 2 and whose second is 1, 2
    (longer) and 3.
    """
    folder = tmp_path_factory.mktemp("compare")
    for night, files in enumerate(
        ({0: (0, 40), 1: (40, 80), 2: (80, 90)}, {1: (40, 80), 2: (80, 110), 3: (600, 660)})
    ):
        (folder / str(night)).mkdir()
        for file, (begin, end) in files.items():
            rows = [{"text": t} for t in verses[begin:end]]
            write_jsonl(folder / str(night) / f"{file}.jsonl", rows)
    return config_of(tiny_bert, folder / "0", folder / "store-0", layers="0,2", shard_bytes=4096)


def by_file(source: str) -> str:
    return source.rsplit("/", 1)[1]


@pytest.fixture(scope="module")
def runs(config: RunConfig) -> tuple[RunFolder, RunFolder]:
    folder = config.store.rsplit("/", 1)[0]
    found = []
    for night in range(2):
        with afn_ray.run(
            replace(config, corpus=(f"{folder}/{night}",), store=f"{folder}/store-{night}")
        ) as run:
            found.append(add_sources(run.uri, by_file))
    return found[0], found[1]


@pytest.fixture(scope="module")
def compared(runs: tuple[RunFolder, RunFolder]) -> Comparison:
    return compare.compare(*runs)


def test_types_that_are_rare_in_one_run_do_not_move_by_chance() -> None:
    """Two runs of one distribution, one a hundredth of the other: almost nothing has moved."""
    dice = np.random.default_rng(0)
    share = dice.uniform(0.02, 0.6, 20_000)
    rate = 1 / np.arange(1, 20_001)
    n_a, n_b = (dice.poisson(total * rate / rate.sum()) for total in (1_000_000, 10_000))
    both = (n_a > 0) & (n_b > 0)
    n_a, n_b, share = n_a[both], n_b[both], share[both]
    z, p = distances.two_proportions(dice.binomial(n_a, share), n_a, dice.binomial(n_b, share), n_b)
    assert (distances.benjamini_hochberg(p) < 0.05).sum() <= 1 and np.abs(z).max() < 6
    one = [np.array([v]) for v in (0, 100, 1, 1)]
    assert abs(distances.two_proportions(*one)[0][0]) < 3  # that of pooled proportions is 10


def test_files_of_one_night_are_held_against_the_folders_of_another() -> None:
    def side(*names: str) -> drift.StrengthsBySource:
        return {
            name: drift.SourceStrengths(Histogram.of(np.array([len(name)])), 1) for name in names
        }

    few, many = (
        side("/c/a/1.txt", "/c/a/2.txt", "/c/b/3.txt", "/d/4.txt"),
        side("/c/a", "/c/b", "/e"),
    )
    a, b = drift.matched_sources(few, many)
    assert a.keys() == {"/c/a", "/c/b", "/d/4.txt"} and b.keys() == many.keys()
    assert a["/c/a"].histogram.n == a["/c/a"].n_high == 2
    assert [side.keys() for side in drift.matched_sources(many, few)] == [b.keys(), a.keys()]


def rows_of(table: pa.Table, **having: Any) -> list[dict[str, Any]]:
    return [r for r in table.to_pylist() if all(r[k] == v for k, v in having.items())]


# --- figures
# ---------------------------------------------------------------------------------------------


def expected_distances(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> dict[str, float]:
    """Computed from raw strengths, as the definitions read."""

    def shares(values: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.bincount(
            np.searchsorted(ends, values, side="left"), minlength=len(ends) + 1
        ) / len(values)

    ends = np.unique([np.quantile(a, i / 10, method="inverted_cdf") for i in range(1, 10)])
    p, q = shares(a, ends), shares(b, ends)
    some = (p > 0) | (q > 0)
    p, q = np.where(p == 0, 0.5 / len(a), p)[some], np.where(q == 0, 0.5 / len(b), q)[some]
    both = np.concatenate([a, b])
    half_each = np.repeat([len(b), len(a)], [len(a), len(b)])
    ends = np.unique(
        np.quantile(both, np.arange(1, 10) / 10, weights=half_each, method="inverted_cdf")
    )
    return {
        "psi": float(np.sum((q - p) * np.log(q / p))),
        "ks": float(
            np.abs(np.subtract(*(scipy.stats.ecdf(v).cdf.evaluate(both) for v in (a, b)))).max()
        ),
        "js": float(scipy.spatial.distance.jensenshannon(shares(a, ends), shares(b, ends), base=2)),
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_quartiles_and_distances_are_those_of_the_raw_strengths(
    layer: int, compared: Comparison, runs: tuple[RunFolder, RunFolder]
) -> None:
    assert compared.drift.schema == DRIFT_SCHEMA
    a, b = (raw(run.uri) for run in runs)
    whole = rows_of(compared.drift, layer=layer, source=None)
    assert len(whole) == 1
    named = {
        r["source"]: r for r in rows_of(compared.drift, layer=layer) if r["source"] is not None
    }
    assert list(named) == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"]
    for source, row in [(None, whole[0]), *named.items()]:
        of = {}
        for run, found in (("a", a), ("b", b)):
            here = [source is None or s.endswith(source) for s in found.sources]
            of[run] = found.strengths[layer][here]
            assert row[f"n_{run}"] == len(of[run])
            if not len(of[run]):
                assert row[f"q1_{run}"] is row[f"share_high_{run}"] is None
                continue
            assert [row[f"q{i}_{run}"] for i in (1, 2, 3)] == [
                np.quantile(of[run], i / 4, method="inverted_cdf") for i in (1, 2, 3)
            ]
            assert row[f"share_high_{run}"] == np.mean(of[run] >= found.q3[layer])
        if len(of["a"]) and len(of["b"]):
            expected = expected_distances(of["a"], of["b"])
            assert expected["ks"] == pytest.approx(scipy.stats.ks_2samp(of["a"], of["b"]).statistic)
            assert {d: row[d] for d in DISTANCES} == pytest.approx(expected, rel=1e-12, abs=1e-15)
        else:
            assert source in ("0.jsonl", "3.jsonl") and all(row[d] is None for d in DISTANCES)
    assert all(named["1.jsonl"][d] == 0.0 for d in DISTANCES)  # untouched
    assert all(whole[0][d] > 0 and named["2.jsonl"][d] > 0 for d in DISTANCES)


@pytest.mark.parametrize("layer", LAYERS)
def test_types_move_as_scipy_says(
    layer: int, compared: Comparison, runs: tuple[RunFolder, RunFolder]
) -> None:
    assert compared.movers.schema == MOVERS_SCHEMA
    movers = rows_of(compared.movers, layer=layer)
    found = [raw(run.uri) for run in runs]
    ids = [set(f.token_ids.tolist()) for f in found]
    assert len(movers) == len(ids[0] | ids[1])
    for status, expected in (
        ("both", ids[0] & ids[1]),
        ("new", ids[1] - ids[0]),
        ("vanished", ids[0] - ids[1]),
    ):
        assert expected and {m["token_id"] for m in movers if m["status"] == status} == expected
    assert sum(m["n_a"] for m in movers) == len(found[0].token_ids)
    assert sum(m["n_b"] for m in movers) == len(found[1].token_ids)
    for m in movers:
        highs = {}
        for run, f in zip("ab", found, strict=True):
            values = f.strengths[layer][f.token_ids == m["token_id"]]
            assert m[f"n_{run}"] == len(values)
            if not len(values):
                assert (
                    m[f"median_{run}"]
                    is m[f"share_high_{run}"]
                    is m["z"]
                    is m["p"]
                    is m["q"]
                    is None
                )
                continue
            highs[run] = int((values >= f.q3[layer]).sum())
            assert m[f"share_high_{run}"] == highs[run] / len(values)
            assert m[f"median_{run}"] == np.quantile(values, 0.5, method="inverted_cdf")
        if m["status"] == "both":
            counts = np.array([[highs[run], m[f"n_{run}"] - highs[run]] for run in "ab"])
            if not counts.sum(0).all():
                assert m["z"] == 0 and m["p"] == 1
                continue
            if scipy.stats.contingency.expected_freq(counts).min() < distances.LEAST_EXPECTED:
                continue  # the next test
            chi2 = scipy.stats.chi2_contingency(counts, correction=False)
            assert m["z"] ** 2 == pytest.approx(chi2.statistic, rel=1e-9, abs=1e-12)
            assert m["p"] == pytest.approx(chi2.pvalue, rel=1e-9)
            assert m["z"] == 0 or (m["z"] > 0) == (m["share_high_b"] > m["share_high_a"])
    both = [m for m in movers if m["status"] == "both"]
    assert [m["q"] for m in both] == pytest.approx(
        scipy.stats.false_discovery_control([m["p"] for m in both])
    )
    assert movers[: len(both)] == sorted(
        both, key=lambda m: (m["q"], -abs(m["z"]), -m["n_a"] - m["n_b"], m["token_id"])
    )


def test_class_shares_are_sums_over_the_vocabulary(
    compared: Comparison, runs: tuple[RunFolder, RunFolder]
) -> None:
    assert compared.classes.schema == CLASS_DRIFT_SCHEMA
    for run, folder in zip("ab", runs, strict=True):
        words = [
            w
            for w in manifest.read_table(folder, "vocabulary").to_pylist()
            if w["class"] != "special"
        ]
        total = sum(w["n"] for w in words if w["layer"] == 2)
        for row in rows_of(compared.classes, layer=2):
            here = [w for w in words if w["layer"] == 2 and w["class"] == row["class"]]
            n, high = sum(w["n"] for w in here), sum(w["n_high"] for w in here)
            assert (row[f"n_{run}"], row[f"n_high_{run}"]) == (n, high)
            assert row[f"share_{run}"] == n / total
            assert row[f"share_high_{run}"] == (high / n if n else 0.0)
            wilson = (
                scipy.stats.binomtest(high, n).proportion_ci(method="wilson") if n else (0.0, 1.0)
            )
            assert (row[f"share_high_low_{run}"], row[f"share_high_high_{run}"]) == pytest.approx(
                tuple(wilson)
            )
    assert len(rows_of(compared.classes, layer=2)) >= 4 and not rows_of(
        compared.classes, **{"class": "special"}
    )


histograms = st.dictionaries(st.integers(1, 40), st.integers(1, 9), min_size=1, max_size=25).map(
    lambda d: Histogram.of(np.array(list(d), np.int64), np.array(list(d.values()), np.int64))
)


@settings(deadline=None)
@given(histograms, histograms)
def test_distances_of_any_histograms(a: Histogram, b: Histogram) -> None:
    expected = expected_distances(*(np.repeat(h.keys, h.counts) for h in (a, b)))
    found = {
        "psi": distances.psi(a, b),
        "ks": distances.kolmogorov_smirnov(a, b),
        "js": distances.jensen_shannon(a, b),
    }
    assert found == pytest.approx(
        expected, rel=1e-9, abs=1e-7
    )  # scipy's root of a sum near 0 is 1e-8 off
    assert (
        distances.kolmogorov_smirnov(b, a) == found["ks"] <= 1
        and distances.jensen_shannon(b, a) == found["js"] <= 1
    )
    assert found["psi"] >= 0
    doubled = Histogram(a.keys, 2 * a.counts)  # every document twice
    assert (
        distances.psi(a, doubled)
        == distances.kolmogorov_smirnov(a, doubled)
        == distances.jensen_shannon(a, doubled)
        == 0
    )


@settings(deadline=None)
@given(histograms, histograms, histograms)
def test_jensen_shannon_is_between_0_and_1_and_1_for_what_has_nothing_in_common(
    a: Histogram, b: Histogram, c: Histogram
) -> None:
    far = Histogram(a.keys + 100, a.counts)
    assert distances.kolmogorov_smirnov(b, far) == 1
    # half the mixture lies on either side of the fifth decile, which ends a bin
    assert distances.jensen_shannon(b, far) == pytest.approx(1)
    assert distances.psi(b, far) > distances.psi(b, b) == 0
    assert 0 <= distances.jensen_shannon(a, c) <= 1


def test_counts_beyond_what_64_bits_multiply_are_exact() -> None:
    large = Histogram(np.array([1, 2, 3]), np.array([4 * 10**9, 4 * 10**9, 2 * 10**9]))
    small = Histogram(np.array([1, 2, 3]), np.array([2, 2, 1]))
    assert distances.jensen_shannon(large, small) == distances.psi(large, small) == 0.0


@settings(deadline=None)
@given(st.lists(st.tuples(*(st.integers(0, 30) for _ in range(4))), min_size=1, max_size=40))
def test_z_p_and_q_of_any_counts(rows: list[tuple[int, int, int, int]]) -> None:
    high_a, low_a, high_b, low_b = np.array(rows).T
    n_a, n_b = high_a + low_a + 1, high_b + low_b + 1
    z, p = distances.two_proportions(high_a, n_a, high_b, n_b)
    for i in range(len(rows)):
        pooled = (high_a[i] + high_b[i]) / (n_a[i] + n_b[i])
        if pooled == 0:
            assert z[i] == 0 and p[i] == 1
            continue
        expected = (high_b[i] / n_b[i] - high_a[i] / n_a[i]) / math.sqrt(
            pooled * (1 - pooled) * (1 / n_a[i] + 1 / n_b[i])
        )
        if min(pooled, 1 - pooled) * min(n_a[i], n_b[i]) < distances.LEAST_EXPECTED:
            cells = [
                (high + pooled, n - high + 1 - pooled)
                for high, n in ((high_a[i], n_a[i]), (high_b[i], n_b[i]))
            ]
            odds = [math.log(cell[0] / cell[1]) for cell in cells]
            expected = (odds[1] - odds[0]) / math.sqrt(
                sum(1 / count for cell in cells for count in cell)
            )
        assert z[i] == pytest.approx(expected)
        assert p[i] == pytest.approx(2 * scipy.stats.norm.sf(abs(expected)))
    assert distances.benjamini_hochberg(p) == pytest.approx(scipy.stats.false_discovery_control(p))
    backwards, p_backwards = distances.two_proportions(high_b, n_b, high_a, n_a)
    assert (backwards == -z).all() and (p_backwards == p).all()


# --- what must not matter
# --------------------------------------------------------------------------------


def test_a_run_against_itself_differs_in_nothing(runs: tuple[RunFolder, RunFolder]) -> None:
    same = compare.compare(runs[0].uri, runs[0].store)
    assert "A and B are one run." in same.notes and any(
        "HIGH means the same" in n for n in same.notes
    )
    check_nothing_differs(same)


def check_nothing_differs(same: Comparison) -> None:
    for row in same.drift.to_pylist():
        assert [row[d] for d in DISTANCES] == [0.0, 0.0, 0.0]
        assert all(row[f"{c}_a"] == row[f"{c}_b"] for c in ("n", "q1", "q2", "q3", "share_high"))
    for row in same.movers.to_pylist():
        assert (row["status"], row["z"], row["p"], row["q"]) == ("both", 0.0, 1.0, 1.0)
        assert row["median_a"] == row["median_b"]
    for row in same.classes.to_pylist():
        assert all(row[f"{c}_a"] == row[f"{c}_b"] for c in ("n", "share", "n_high", "share_high"))


def test_how_the_corpus_is_cut_and_stored_does_not_matter(
    config: RunConfig, runs: tuple[RunFolder, RunFolder], tmp_path: Path, compared: Comparison
) -> None:
    with afn_ray.run(replace(config, store=str(tmp_path / "store"), shard_bytes=1024)) as run:
        other = add_sources(run.uri, by_file)
    assert other.info["counts"]["shards"] > runs[0].info["counts"]["shards"]
    check_nothing_differs(compare.compare(runs[0], other))
    assert compare.compare(other, runs[1]).movers == compared.movers
    assert compare.compare(other, runs[1]).drift == compared.drift


def test_backwards_is_the_mirror_image(
    compared: Comparison, runs: tuple[RunFolder, RunFolder]
) -> None:
    mirror = compare.compare(runs[1], runs[0])
    turned = {"new": "vanished", "vanished": "new", "both": "both"}
    there = {(r["layer"], r["token_id"]): r for r in compared.movers.to_pylist()}
    for row in mirror.movers.to_pylist():
        other = there.pop((row["layer"], row["token_id"]))
        assert turned[row["status"]] == other["status"]
        assert row["z"] == (None if other["z"] is None else -other["z"])
        assert (row["p"], row["q"], row["n_a"]) == (other["p"], other["q"], other["n_b"])
    assert not there
    for row, other in zip(mirror.drift.to_pylist(), compared.drift.to_pylist(), strict=True):
        assert (row["ks"], row["js"], row["q3_a"]) == (other["ks"], other["js"], other["q3_b"])


# --- what cannot be compared
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_another_measure(config: RunConfig, runs: tuple[RunFolder, RunFolder]) -> RunFolder:
    with afn_ray.run(
        replace(config, layers="2,3", window_tokens=32, screen=0, store=f"{config.store}-other")
    ) as run:
        return manifest.find_run(run.uri)


def test_runs_of_different_measures_are_refused_with_what_differs(
    runs: tuple[RunFolder, RunFolder], of_another_measure: RunFolder
) -> None:
    with pytest.raises(ConfigError) as caught:
        compare.compare(runs[0], of_another_measure)
    assert caught.value.exit_code == 2
    for said in ("window_tokens: 64 against 32", "--ranks-only"):
        assert said in str(caught.value)
    assert "schema_version" not in str(caught.value) and "layers: " not in str(caught.value)


def test_ranks_only_keeps_shares_and_nothing_that_depends_on_raw_strengths(
    runs: tuple[RunFolder, RunFolder], of_another_measure: RunFolder
) -> None:
    found = compare.compare(runs[0], of_another_measure, ranks_only=True)
    (row,) = found.drift.to_pylist()
    assert row["layer"] == 2 and row["source"] is None and row["n_a"] == row["n_b"]
    assert row["share_high_a"] == pytest.approx(0.25, abs=0.01)
    gone = [f"q{i}_{run}" for i in (1, 2, 3) for run in "ab"] + list(DISTANCES)
    assert all(row[name] is None for name in gone)
    assert (
        found.movers["median_a"].null_count
        == found.movers["median_b"].null_count
        == len(found.movers)
    )
    assert found.movers["z"].null_count == 0 and set(found.movers["status"].to_pylist()) == {"both"}
    same = compare.compare(*runs, ranks_only=True).movers
    assert same.drop_columns(["median_a", "median_b"]) == compare.compare(
        *runs
    ).movers.drop_columns(["median_a", "median_b"])
    said = " ".join(found.notes)
    for expected in (
        "Ranks only",
        "window_tokens: 64 against 32",
        "Of A layers 0 were not",
        "Of B layers 3 were not",
        "Sources were not compared: B",
    ):
        assert expected in said


def test_types_of_different_measures_are_matched_by_their_piece(
    runs: tuple[RunFolder, RunFolder],
    of_another_measure: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_table = manifest.read_table

    def renumbered(run: RunFolder, name: str, *selected: Any) -> pa.Table:
        table = read_table(run, name, *selected)
        if name == "vocabulary" and run is of_another_measure:
            at = table.schema.get_field_index("token_id")
            ids = pa.array(np.arange(len(table))[::-1].astype(np.int32))
            table = table.set_column(at, table.schema.field(at), ids)
        return table

    plain = compare.compare(runs[0], of_another_measure, ranks_only=True).movers
    monkeypatch.setattr(manifest, "read_table", renumbered)
    found = compare.compare(runs[0], of_another_measure, ranks_only=True).movers
    by_piece = [{r["token"]: {**r, "token_id": 0} for r in t.to_pylist()} for t in (plain, found)]
    assert by_piece[0] == by_piece[1] and plain["token_id"] != found["token_id"]


def test_measures_without_a_common_layer_cannot_be_compared(
    runs: tuple[RunFolder, RunFolder], of_another_measure: RunFolder
) -> None:
    other = replace(of_another_measure, info={**of_another_measure.info, "layers": [3]})
    with pytest.raises(ConfigError, match="no layer in common: layers 0, 2 against layers 3"):
        compare.compare(runs[0], other, ranks_only=True)


def test_a_run_that_is_not_complete_or_not_there_is_refused(
    runs: tuple[RunFolder, RunFolder], tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="is not complete"):
        compare.compare(replace(runs[0], info={}), runs[1])
    with pytest.raises(StoreError, match="neither a store nor a run"):
        compare.compare(runs[0], str(tmp_path))


def test_runs_without_sources_or_shards_are_compared_and_say_so(
    runs: tuple[RunFolder, RunFolder],
) -> None:
    tables = {k: v for k, v in runs[1].info["tables"].items() if k != "sources"}
    lost: list[Quarantined] = [{"shard": "x", "uri": "y", "reason": "z"}]
    other = replace(runs[1], info={**runs[1].info, "tables": tables, "quarantined": lost})
    found = compare.compare(runs[0], other)
    assert found.drift["source"].null_count == len(found.drift) == len(LAYERS)
    assert any(n.startswith("Sources were not compared: B was made without") for n in found.notes)
    assert "B lacks 1 shard of its corpus, quarantined." in found.notes
    assert any("HIGH is a rank within each run" in n for n in found.notes)


# --- JSON
# ------------------------------------------------------------------------------------------------


def test_json_is_plain_versioned_and_bounded(
    compared: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    body: Any = compare.to_json(compared)
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert (
        body["schema_version"] == 2
        and body["a"]["id"] == compared.a.id
        and body["b"]["uri"] == compared.b.uri
    )
    at_2 = rows_of(compared.movers, layer=2)
    assert body["n_new"] == len([m for m in at_2 if m["status"] == "new"]) == len(body["new"])
    assert body["n_vanished"] == len(body["vanished"]) and len(body["sources"]) == 8
    assert body["n_sources"] == len({s["source"] for s in body["sources"]}) == 4
    both = [m for m in at_2 if m["status"] == "both"]
    assert body["n_types"] == len(both) and len(body["movers"]) == len(
        rows_of(compared.movers, status="both")
    )
    words = rows_of(compared.word_movers, layer=2)
    assert body["n_words"] == len([w for w in words if w["status"] == "both"])
    assert body["n_new_words"] == len([w for w in words if w["status"] == "new"])
    assert body["n_words_moved"] == sum(w["q"] is not None and w["q"] < 0.05 for w in words)
    assert body["n_moved"] == sum(m["q"] < 0.05 for m in both)
    unknown = [s["ks"] is None for s in body["sources"]]
    assert unknown == sorted(unknown, reverse=True) and any(
        unknown
    )  # new and vanished ones are the furthest
    monkeypatch.setattr(compare, "JSON_ROWS", 3)
    short: Any = compare.to_json(compared)
    lists = ("movers", "new", "vanished", "sources", "word_movers", "new_words", "vanished_words")
    for name in lists:
        assert body[name] and short[name] == body[name][:3]
    assert [short[f"n_{name}"] for name in ("types", "new", "vanished", "sources")] == [
        body[f"n_{name}"] for name in ("types", "new", "vanished", "sources")
    ]
    assert [m["q"] for m in body["movers"]] == sorted(m["q"] for m in body["movers"])


# --- the terminal
# ----------------------------------------------------------------------------------------


def shown(found: Comparison, width: int) -> str:
    file = io.StringIO()
    comparison_tables.render_comparison(found, Console(file=file, width=width, highlight=False))
    return file.getvalue()


def test_the_terminal_shows_every_figure_whatever_its_width(compared: Comparison) -> None:
    text = shown(compared, 200)
    narrow = shown(compared, 80)
    tables = narrow[narrow.index("Strengths") : narrow.index("Classes at")]
    assert max(map(len, tables.splitlines())) <= 80
    wide_figures, figures = (re.findall(r"\d+\.\d{4}\b", t) for t in (text, narrow))
    assert sorted(wide_figures) == sorted(figures)
    assert {"KS", "PSI", "Q3 B"} <= {*re.split(" {2,}|\n", narrow)}
    whole = rows_of(compared.drift, layer=2, source=None)[0]
    for expected in (
        f"{whole['psi']:.4f}",
        f"{whole['ks']:.4f}",
        f"{whole['js']:.4f}",
        f"{whole['n_a']:,}",
        f"{whole['q3_b'] / whole['q3_a'] - 1:+.2%}",
        "3.jsonl",
        "words are new: ",
        "words have vanished: ",
        *compared.notes,
    ):
        assert expected in text, expected


def test_words_that_moved_are_those_of_the_tables_of_words(compared: Comparison) -> None:
    """Movers by word, from the tables of both runs, in plain Python."""
    tables = [manifest.read_table(run, "word_vocabulary") for run in (compared.a, compared.b)]
    for layer in (0, 2):
        a, b = (
            {row["word"]: row for row in rows_of(table, layer=layer) if row["word"] is not None}
            for table in tables
        )
        rows = rows_of(compared.word_movers, layer=layer)
        of_one = {word: of for of in (a, b) for word in of if not (word in a and word in b)}
        listed = {word for word, of in of_one.items() if of[word]["n"] >= 2 * LEAST_N}
        assert 0 < len(listed) < len(of_one)
        assert {row["word"] for row in rows} == ({*a} & {*b}) | listed and len(rows) == len(
            {row["word"] for row in rows}
        )
        tested = [row for row in rows if row["status"] == "both"]
        assert len(tested) == len({*a} & {*b}) > 20
        for row in rows:
            of_a, of_b = a.get(row["word"]), b.get(row["word"])
            assert row["status"] == ("vanished" if not of_b else "both" if of_a else "new")
            for side, of_run in (("a", of_a), ("b", of_b)):
                assert row[f"n_{side}"] == (of_run["n"] if of_run else 0)
                for name, column in (("share_high", "share_high"), ("median", "q2")):
                    assert row[f"{name}_{side}"] == (of_run[column] if of_run else None)
            of_either = of_b or of_a
            assert of_either is not None
            assert (row["text"], row["class"]) == (of_either["text"], of_either["class"])
            if of_a and of_b:
                counts = (np.array([of[name]]) for of in (of_a, of_b) for name in ("n_high", "n"))
                (z,), (p,) = two_proportions(*counts)
                assert (row["z"], row["p"]) == (z, p)
            else:
                assert row["z"] is row["p"] is row["q"] is None
        order = [(row["q"], -abs(row["z"]), -row["n_a"] - row["n_b"]) for row in tested]
        assert order == sorted(order) and rows[: len(tested)] == tested
        found = benjamini_hochberg(np.array([row["p"] for row in tested]))
        assert [row["q"] for row in tested] == found.tolist()


def words_of(counts: dict[str, int], least_n: int | None) -> pa.Table:
    """Rows of words with ``counts``, and of folded words; None: none are folded."""
    nothing = {"class": "content", "n_high": 1, "share_high": 0.5, "q2": 1.0}
    rows = [{**nothing, "word": word, "text": word, "n": n} for word, n in counts.items()]
    if least_n is not None:
        rows.append({**nothing, "text": "rare", "n": 99, "least_n": least_n})
    return pa.Table.from_pylist(rows, WORD_VOCABULARY_SCHEMA)


@pytest.mark.parametrize(("least_a", "least_b"), [(20, 5), (5, 20), (None, 20)])
def test_a_word_that_may_be_folded_in_the_other_run_is_not_new_or_vanished(
    least_a: int | None, least_b: int
) -> None:
    a = words_of({"both": 25, "rarer": 39, "gone": 40}, least_a)
    b = words_of({"both": 20, "rare": 39, "here": 40}, least_b)
    rows = word_movers_table(1, a, b, ranks_only=False).to_pylist()
    assert {row["word"]: row["status"] for row in rows} == {
        "both": "both",
        "here": "new",
        "gone": "vanished",
    }
    none_folded = words_of({"often": 2 * LEAST_N, "rare": 2 * LEAST_N - 1}, None)
    rows = word_movers_table(1, none_folded, words_of({}, None), ranks_only=False).to_pylist()
    assert [row["word"] for row in rows] == ["often"]


def test_the_note_on_new_words_names_the_larger_limit_of_both_runs(
    compared: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_limit(run: RunFolder, name: str) -> dict[int, pa.Table]:
        tables = drift.table_by_layer(run, name)
        if name != "word_vocabulary" or run.uri != compared.a.uri:
            return tables
        at = WORD_VOCABULARY_SCHEMA.get_field_index("least_n")
        return {
            layer: table.set_column(at, "least_n", pc.add(table["least_n"], 2))
            for layer, table in tables.items()
        }

    assert any("occur 10 times or more" in n and "fewer than 5 times" in n for n in compared.notes)
    monkeypatch.setattr(compare, "table_by_layer", with_limit)
    notes = compare.compare(compared.a, compared.b).notes
    assert any("occur 14 times or more" in n and "fewer than 7 times" in n for n in notes)


def test_classes_of_words_are_sums_over_the_tables_of_words(compared: Comparison) -> None:
    assert compared.classes_to_read is compared.word_classes
    for side, run in (("a", compared.a), ("b", compared.b)):
        table = manifest.read_table(run, "word_vocabulary")
        for layer in (0, 2):
            rows = rows_of(table, layer=layer)
            total = sum(row["n"] for row in rows)
            found = rows_of(compared.word_classes, layer=layer)
            assert {row["class"] for row in found} >= {row["class"] for row in rows}
            for row in found:
                same = [one for one in rows if one["class"] == row["class"]]
                n, n_high = (sum(one[name] for one in same) for name in ("n", "n_high"))
                assert (row[f"n_{side}"], row[f"n_high_{side}"]) == (n, n_high)
                assert row[f"share_{side}"] == n / total
    assert "words A" in shown(compared, 120)
    older = replace(compared, word_movers=NO_WORDS, word_classes=compared.word_classes.slice(0, 0))
    assert older.classes_to_read is older.classes and "tokens A" in shown(older, 120)


def test_the_terminal_lists_movers_only_where_they_moved(compared: Comparison) -> None:
    movers = rows_of(compared.movers, layer=2)
    both = [m for m in movers if m["status"] == "both"]
    assert not [m for m in both if m["q"] < compare.SIGNIFICANT] and "median A" not in shown(
        compared, 200
    )
    table = compared.movers
    q = [1e-9 if m in both[:3] else m["q"] for m in table.to_pylist()]
    classes = ["piece" if m == both[1] else "content" for m in table.to_pylist()]
    for name, values in (("q", q), ("class", classes)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.field(name), pa.array(values, table.field(name).type))
    older = replace(compared, movers=table, word_movers=NO_WORDS)
    text = shown(older, 200)
    assert "Types at layer 2" in text and "types are new" in text
    listed = text[text.index("median A") : text.index("1 part of words")]
    assert f"3 of {len(both):,} in both moved" in text
    assert [f"{m['z']:+.1f}" in listed and m["text"] in listed for m in both[:3]] == [
        True,
        False,
        True,
    ]


def test_the_terminal_shows_what_ranks_leave_and_no_control_characters(
    runs: tuple[RunFolder, RunFolder], of_another_measure: RunFolder
) -> None:
    config = {**runs[0].info["config"], "corpus": ["/data/[b]\x1b[31m"]}
    hostile = replace(runs[0], info={**runs[0].info, "config": config})
    text = shown(compare.compare(hostile, of_another_measure, ranks_only=True), 120)
    assert "\x1b" not in text and "/data/[b]\\x1b[31m" in text and "Ranks only" in text
