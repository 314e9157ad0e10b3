"""Thresholds and vocabulary are those of all values at once, however the corpus was cut."""

from __future__ import annotations

import math
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

import afn_ray
from afn_ray.config import RunConfig
from afn_ray.corpus_values import FileSlice, ReadOptions, Shard
from afn_ray.errors import Interrupted, StoreError
from afn_ray.reduce import tree
from afn_ray.reduce.histogram import DEFINITION, round_strengths
from afn_ray.reduce.shard_summary import Summary
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.stats import wilson
from afn_ray.reduce.tables import TokenTexts
from afn_ray.reduce.tasks import FAN_IN, Inline, Tasks, call
from afn_ray.reduce.tree import LabelRules, RecordedSeries, reduce_run
from afn_ray.runs import cluster
from afn_ray.runs.cluster import calls
from afn_ray.schema import (
    HISTOGRAM_SCHEMA,
    SHARDS_SCHEMA,
    SPECIAL,
    THRESHOLDS_SCHEMA,
    VOCABULARY_SCHEMA,
    WORD_START,
    Series,
)
from afn_ray.store import layout, shard_files, storage
from afn_ray.store.commits import COUNTS, Commit, CommitEntry
from afn_ray.store.records import ShardFiles
from conftest import write_jsonl

LAYERS = (0, 8)
SERIES = tuple(Series("strength", layer) for layer in LAYERS)
READABLE = ["[CLS]", ".", "the", "lord", "ing", "42", "never"]
PIECES = ["[CLS]", ".", "the", "lord", "##ing", "42", "never"]
CLASSES = ["special", "punctuation", "function", "content", "fragment", "number"]
MEASURE_ID = "m" * 32


@dataclass(frozen=True)
class Tokens:
    """Tokens of ``num_docs`` documents; rows sorted by doc."""

    num_docs: int
    docs: np.ndarray
    ids: np.ndarray
    flags: np.ndarray
    strengths: dict[int, np.ndarray]

    def part(self, begin: int, end: int) -> Tokens:
        """Documents ``begin`` to ``end``, counted from 0 again."""
        keep = (self.docs >= begin) & (self.docs < end)
        return Tokens(
            end - begin,
            self.docs[keep] - begin,
            self.ids[keep],
            self.flags[keep],
            {k: v[keep] for k, v in self.strengths.items()},
        )


def _corpus(seed: int, num_docs: int, sinks: int = 0, special: bool = True) -> Tokens:
    """Random documents, some empty; type 3 is sometimes written as a special token too, and 4
    continues words.
    """
    random = np.random.default_rng(seed)
    docs, ids, flags = [], [], []
    for doc in range(num_docs):
        n = int(random.integers(0, 12)) if doc else 12
        for at in range(n):
            token = 0 if special and at == 0 else int(random.choice([1, 2, 2, 2, 3, 3, 4, 5]))
            docs.append(doc)
            ids.append(token)
            is_special = token == 0 or (special and token == 3 and at == 5)
            flags.append(SPECIAL if is_special else WORD_START if token != 4 or at % 4 == 0 else 0)
    strengths = {}
    for layer in LAYERS:
        values = random.choice([4.0, 5.0, 5.5], len(docs)) + np.round(
            random.normal(0, 1, len(docs)), layer // 4
        )
        values = np.abs(values)
        values[random.permutation(len(docs))[:sinks]] *= 1000
        strengths[layer] = round_strengths(values.astype(np.float32))
    return Tokens(
        num_docs,
        np.array(docs, np.int32),
        np.array(ids, np.int32),
        np.array(flags, np.uint8),
        strengths,
    )


def _commit(store: str, scratch: Path, number: int, tokens: Tokens) -> Commit:
    """A committed shard with the summary of ``tokens``; its other tables are empty."""
    scratch = scratch / f"{number}-{len(list(scratch.iterdir()))}"
    scratch.mkdir()
    summary = Summary(SERIES)
    middle = tokens.num_docs // 2
    for part in (tokens.part(0, middle), tokens.part(middle, tokens.num_docs)):
        summary.add(part.docs, part.ids, part.flags, {s: part.strengths[s.layer] for s in SERIES})
    with ShardFiles(scratch, SERIES, (), False, {}) as files:
        files.summary.write_each(summary.tables())
    empty = tokens.num_docs - len(np.unique(tokens.docs))
    counts = {
        **dict.fromkeys(COUNTS, 0),
        "documents": tokens.num_docs + 1,
        "empty": empty,
        "quarantined": 1,
        "tokens": len(tokens.docs),
        "special": int((tokens.flags & SPECIAL).sum()),
        "windows": tokens.num_docs,
        "forward_tokens": 2 * len(tokens.docs),
        "chars": 9,
    }
    piece = FileSlice(f"/c/{number}", 1, "", "txt", "", 0, 1, 1, 1, f"{tokens.num_docs}")
    shard = Shard.of([piece], ReadOptions("auto", "text", None, "file", 1))
    attempt = shard_files.Attempt(f"{number:016}", files.tables(), counts, 1.0, {})
    return shard_files.publish(store, MEASURE_ID, shard, attempt)


def _reduced(
    store: str,
    commits: Sequence[Commit],
    tasks: Tasks | None = None,
    series: Sequence[Series] = SERIES,
) -> dict[str, pa.Table]:
    shards = CommittedShards(store, MEASURE_ID, commits, [7] * len(commits))
    texts = TokenTexts(PIECES, READABLE)
    return reduce_run(shards, RecordedSeries(series), texts, LabelRules("en", 10.0), tasks)


def _reduce(
    store: str, scratch: Path, parts: Sequence[Tokens], tasks: Tasks | None = None
) -> dict[str, pa.Table]:
    commits = [_commit(store, scratch, number, part) for number, part in enumerate(parts)]
    return _reduced(store, commits, tasks)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(np.quantile(values, q, method="inverted_cdf")) for q in (0.25, 0.5, 0.75)]


@pytest.mark.parametrize("sinks", [0, 5])
@pytest.mark.parametrize("special", [True, False])
def test_thresholds_are_the_order_statistics_of_all_values(
    store: str, scratch: Path, sinks: int, special: bool
) -> None:
    corpus = _corpus(1, 60, sinks, special)
    table = _reduce(store, scratch, [corpus.part(0, 9), corpus.part(9, 10), corpus.part(10, 60)])[
        "thresholds"
    ]
    assert table.schema == THRESHOLDS_SCHEMA
    rows = iter(table.to_pylist())
    for layer in LAYERS:
        values = corpus.strengths[layer][corpus.flags & SPECIAL == 0].astype(np.float64)
        kept = values[values <= 10 * _quartiles(values)[1]]
        assert bool(len(values) - len(kept)) == bool(sinks)
        for population, of in (("tokens", values), ("tokens_without_sinks", kept)):
            row, (q1, q2, q3) = next(rows), _quartiles(of)
            assert row.pop("mean") == pytest.approx(of.mean(), rel=1e-12)
            assert row.pop("sd") == pytest.approx(of.std(), rel=1e-9)
            assert row == {
                "layer": layer,
                "population": population,
                "n": len(of),
                "min": of.min(),
                "q1": q1,
                "q2": q2,
                "q3": q3,
                "max": of.max(),
                "n_high": (of >= q3).sum(),
                "n_sinks": len(values) - len(kept),
                "n_special": (corpus.flags & SPECIAL > 0).sum(),
                "sink_factor": 10.0,
                "definition": DEFINITION,
            }
    assert next(rows, None) is None


def test_thresholds_and_vocabulary_are_duckdbs(store: str, scratch: Path) -> None:
    corpus = _corpus(2, 80, 3)
    tables = _reduce(store, scratch, [corpus.part(0, 30), corpus.part(30, 80)])
    db = duckdb.connect()
    for layer in LAYERS:
        columns = {
            "doc": corpus.docs,
            "id": corpus.ids,
            "special": corpus.flags & SPECIAL > 0,
            "strength": corpus.strengths[layer],
        }
        db.register("rows_of", pa.table(columns))
        expected = db.execute(
            "SELECT quantile_disc(strength, [0.25, 0.5, 0.75]) FROM rows_of WHERE NOT special"
        )
        quartiles = expected.fetchall()[0][0]
        main = next(r for r in tables["thresholds"].to_pylist() if r["layer"] == layer)
        assert [main["q1"], main["q2"], main["q3"]] == quartiles
        expected = db.execute(
            f"""SELECT id, special, count(*), count(DISTINCT doc), min(strength),
                quantile_disc(strength, 0.25),
                quantile_disc(strength, 0.5), quantile_disc(strength, 0.75), max(strength),
                count(*) FILTER (strength >= {quartiles[2]!r})
                FROM rows_of GROUP BY ALL ORDER BY special, id"""
        )
        names = ["token_id", "n", "n_docs", "min", "q1", "q2", "q3", "max", "n_high"]
        got = [r for r in tables["vocabulary"].to_pylist() if r["layer"] == layer]
        assert [
            (r["token_id"], r["class"] == "special", *(r[c] for c in names[1:])) for r in got
        ] == expected.fetchall()


def test_the_vocabulary_is_that_of_all_values(store: str, scratch: Path) -> None:
    corpus = _corpus(3, 70)
    tables = _reduce(store, scratch, [corpus.part(0, 20), corpus.part(20, 70)])
    vocabulary = tables["vocabulary"]
    assert vocabulary.schema == VOCABULARY_SCHEMA
    num_docs = len(np.unique(corpus.docs))
    rows = vocabulary.to_pylist()
    assert len(rows) == 2 * len(
        set(zip(corpus.ids.tolist(), (corpus.flags & SPECIAL).tolist(), strict=True))
    )
    for row in rows:
        special = row["class"] == "special"
        here = (corpus.ids == row["token_id"]) & ((corpus.flags & SPECIAL > 0) == special)
        values = corpus.strengths[row["layer"]][here].astype(np.float64)
        q3 = next(t["q3"] for t in tables["thresholds"].to_pylist() if t["layer"] == row["layer"])
        assert row["class"] == ("special" if special else CLASSES[row["token_id"]])
        assert (row["token"], row["text"]) == (PIECES[row["token_id"]], READABLE[row["token_id"]])
        assert row["n"] == len(values)
        assert row["n_docs"] == len(np.unique(corpus.docs[here]))
        assert row["n_high"] == (values >= q3).sum()
        assert row["share_high"] == row["n_high"] / row["n"]
        assert row["idf"] == pytest.approx(math.log(num_docs / row["n_docs"]))
        assert row["mean"] == pytest.approx(values.mean()) and row["sd"] == pytest.approx(
            values.std(), abs=1e-12
        )
        assert [row["q1"], row["q2"], row["q3"]] == _quartiles(values)
        assert (row["min"], row["max"]) == (values.min(), values.max())
        low, high = _wilson(row["n_high"], row["n"])
        assert (row["share_high_low"], row["share_high_high"]) == (
            pytest.approx(low),
            pytest.approx(high),
        )


def test_the_histogram_holds_every_value(store: str, scratch: Path) -> None:
    corpus = _corpus(4, 40)
    histogram = _reduce(store, scratch, [corpus.part(0, 11), corpus.part(11, 40)])["histogram"]
    assert histogram.schema == HISTOGRAM_SCHEMA
    for layer in LAYERS:
        for special in (False, True):
            values, counts = np.unique(
                corpus.strengths[layer][(corpus.flags & SPECIAL > 0) == special], return_counts=True
            )
            rows = [
                r for r in histogram.to_pylist() if (r["layer"], r["special"]) == (layer, special)
            ]
            assert [(r["strength"], r["n"]) for r in rows] == list(
                zip(values.tolist(), counts.tolist(), strict=True)
            )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_shards_say_where_the_run_wide_documents_begin(store: str, scratch: Path) -> None:
    corpus = _corpus(6, 30)
    table = _reduce(store, scratch, [corpus.part(0, 5), corpus.part(5, 6), corpus.part(6, 30)])[
        "shards"
    ]
    assert table.schema == SHARDS_SCHEMA
    rows = table.to_pylist()
    assert [r["doc_offset"] for r in rows] == [0, 6, 8]  # each has a document that was quarantined
    assert [r["n_documents"] for r in rows] == [6, 2, 25]
    assert sum(r["n_tokens"] for r in rows) == len(corpus.docs)
    assert all(storage.exists(f"{store}/{r[f'{t}_file']}") for r in rows for t in layout.TABLES)
    assert [r["padding_share"] for r in rows] == [0.5] * 3


@pytest.mark.parametrize("parts", [[0, 0], [0, 20, 20, 40]])
def test_shards_and_layers_without_tokens(store: str, scratch: Path, parts: list[int]) -> None:
    corpus = _corpus(7, 40)
    cut = [corpus.part(a, b) for a, b in pairwise(parts)]
    tables = _reduce(store, scratch, cut)
    assert [r["n"] for r in tables["thresholds"].to_pylist()[:1]] == [
        (corpus.flags & SPECIAL == 0).sum() if parts[-1] else 0
    ]
    if not parts[-1]:
        assert all(r["q3"] is None and r["n_high"] == 0 for r in tables["thresholds"].to_pylist())
        assert tables["vocabulary"].num_rows == tables["histogram"].num_rows == 0
        assert tables["vocabulary"].schema == VOCABULARY_SCHEMA


def _one_document(
    store: str, scratch: Path, ids: list[int], flags: list[int], strengths: list[float]
) -> Any:
    values = dict.fromkeys(LAYERS, np.array(strengths, np.float32))
    tokens = Tokens(
        1, np.zeros(len(ids), np.int32), np.array(ids, np.int32), np.array(flags, np.uint8), values
    )
    return _reduce(store, scratch, [tokens])


def test_a_sink_is_over_and_not_at_so_many_medians(store: str, scratch: Path) -> None:
    strengths = [1.0, 2.0, 2.0, 20.0, float(round_strengths(np.array([20.001], np.float32))[0])]
    rows = _one_document(store, scratch, [1] * 5, [WORD_START] * 5, strengths)[
        "thresholds"
    ].to_pylist()
    assert [(r["population"], r["n"], r["max"], r["n_sinks"]) for r in rows[:2]] == [
        ("tokens", 5, strengths[4], 1),
        ("tokens_without_sinks", 4, 20.0, 1),
    ]


@pytest.mark.parametrize(("starts", "name"), [(2, "content"), (3, "content"), (1, "fragment")])
def test_a_piece_is_a_fragment_where_it_mostly_continues_words(
    store: str, scratch: Path, starts: int, name: str
) -> None:
    flags = [WORD_START] * starts + [0] * (4 - starts)
    assert (
        _one_document(store, scratch, [3] * 4, flags, [1.0] * 4)["vocabulary"]["class"].to_pylist()
        == [name] * 2
    )


@pytest.mark.parametrize(
    ("whole", "split", "name"),
    [(2, 2, "content"), (3, 1, "content"), (1, 2, "piece"), (0, 1, "piece")],
)
def test_a_type_is_a_piece_where_it_mostly_begins_longer_words(
    store: str, scratch: Path, whole: int, split: int, name: str
) -> None:
    ids, flags = [3] * whole + [3, 4] * split, [WORD_START] * whole + [WORD_START, 0] * split
    vocabulary = _one_document(store, scratch, ids, flags, [1.0] * len(ids))["vocabulary"]
    assert vocabulary.filter(pc.equal(vocabulary["token_id"], 3))["class"].to_pylist() == [name] * 2


def test_special_tokens_alone_have_no_threshold(store: str, scratch: Path) -> None:
    corpus = _corpus(8, 5)
    only = replace(corpus, flags=np.full(len(corpus.docs), SPECIAL, np.uint8))
    tables = _reduce(store, scratch, [only])
    assert [(r["n"], r["q3"], r["n_special"]) for r in tables["thresholds"].to_pylist()] == [
        (0, None, len(only.docs))
    ] * 4
    assert {(r["class"], r["n_high"]) for r in tables["vocabulary"].to_pylist()} == {("special", 0)}


def test_a_damaged_summary_is_named(store: str, scratch: Path) -> None:
    commit = _commit(store, scratch, 0, _corpus(9, 10))
    folder = shard_files.shard_uri(store, MEASURE_ID, commit.shard)
    uri = f"{folder}/{commit.files['summary']['name']}"
    data = bytearray(storage.read_bytes(uri))
    data[len(data) // 2] ^= 1
    storage.delete([uri])
    storage.write_once(uri, bytes(data))
    with pytest.raises(StoreError, match=r"summary\.parquet is damaged: its checksum"):
        _reduced(store, [commit])
    storage.delete([uri])
    with pytest.raises(StoreError, match=r"summary\.parquet: no such file"):
        _reduced(store, [commit])


def test_a_summary_of_other_layers_is_refused(store: str, scratch: Path) -> None:
    commit = _commit(store, scratch, 0, _corpus(9, 10))
    with pytest.raises(StoreError, match="holds strength_0, expected strength_7"):
        _reduced(store, [commit], series=[Series("strength", 7), SERIES[1]])


# --- the tree
# --------------------------------------------------------------------------------------------


class Twice:
    """Tasks that reach their values as other processes do, by pickle, and whose every call is
    repeated.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def submit(self, function: Any, *args: Any, num_results: int = 1) -> list[Any]:
        self.calls.append(function.__name__)
        arguments = pickle.dumps([pickle.loads(a) if isinstance(a, bytes) else a for a in args])
        first, again = (call(function, num_results, *pickle.loads(arguments)) for _ in range(2))
        values = [first] if num_results == 1 else first
        assert len(values) == num_results
        assert pickle.dumps(first) == pickle.dumps(again)
        return [pickle.dumps(v) for v in values]

    def result(self, handle: Any) -> Any:
        return pickle.loads(handle)


def _expected(corpus: Tokens, layer: int) -> tuple[Any, list[Any]]:
    """The layer's thresholds and, of each type, what a histogram could get wrong; from the rows
    themselves.
    """
    values, special = corpus.strengths[layer].astype(np.float64), corpus.flags & SPECIAL > 0
    q = _quartiles(values[~special])
    types = []
    for is_special, token in sorted(set(zip(special.tolist(), corpus.ids.tolist(), strict=True))):
        here = (special == is_special) & (corpus.ids == token)
        n_docs = len(np.unique(corpus.docs[here]))
        types.append(
            (token, here.sum(), n_docs, *_quartiles(values[here]), (values[here] >= q[2]).sum())
        )
    return (len(values) - special.sum(), *q, (values[~special] >= q[2]).sum()), types


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokens, dict[str, pa.Table]]:
    """A corpus, and its tables as one shard."""
    folder, corpus = tmp_path_factory.mktemp("whole"), _corpus(5, 40, 3)
    return corpus, _reduce(str(folder / "store"), _made(folder / "scratch"), [corpus])


@given(
    cuts=st.lists(st.integers(0, 40), max_size=9),
    order=st.randoms(use_true_random=False),
    fan_in=st.integers(2, 5),
    parts=st.integers(1, 9),
    read_bytes=st.sampled_from([1, 1 << 13, 1 << 24]),
    elsewhere=st.booleans(),
    slice_pairs=st.sampled_from([1, 9, 1 << 20]),
)
@settings(max_examples=25, deadline=None)
def test_any_tree_over_any_cut_in_any_order_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory,
    whole: tuple[Tokens, dict[str, pa.Table]],
    cuts: list[int],
    order: Any,
    fan_in: int,
    parts: int,
    read_bytes: int,
    elsewhere: bool,
    slice_pairs: int,
) -> None:
    folder, bounds, (corpus, expected) = (
        tmp_path_factory.mktemp("tree"),
        sorted([0, 40, *cuts]),
        whole,
    )
    shards = [corpus.part(a, b) for a, b in pairwise(bounds)]  # some without documents
    order.shuffle(shards)
    tasks = Twice() if elsewhere else Inline()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "MAX_PARTS": parts,
            "READ_BYTES": read_bytes,
            "PART_BYTES": 1,
            "SLICE_PAIRS": slice_pairs,
        }.items():
            patch.setattr(tree, name, value)
        patch.setattr("afn_ray.reduce.tasks.FAN_IN", fan_in)
        tables = _reduce(str(folder / "store"), _made(folder / "scratch"), shards, tasks)
    for name in ("thresholds", "histogram", "vocabulary"):
        assert tables[name].combine_chunks().equals(expected[name].combine_chunks()), (
            name
        )  # bit by bit
    if isinstance(tasks, Twice):
        assert tasks.calls.count("_types") == parts * len(LAYERS)
        assert tasks.calls.count("_read") >= len(LAYERS) * -(-len(shards) // fan_in)
    for layer in LAYERS:
        row = next(r for r in tables["thresholds"].to_pylist() if r["layer"] == layer)
        rows = [r for r in tables["vocabulary"].to_pylist() if r["layer"] == layer]
        columns = ("token_id", "n", "n_docs", "q1", "q2", "q3", "n_high")
        found = (
            tuple(row[c] for c in ("n", "q1", "q2", "q3", "n_high")),
            [tuple(r[c] for c in columns) for r in rows],
        )
        assert found == _expected(corpus, layer)


def test_few_sums_are_held_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree of fan-in 4 over 4^5 groups has never more than 4 sums at a height, and at most 3
    groups wait.
    """
    held: set[int] = set()
    most, made = 0, 0

    class Handle:
        def __init__(self) -> None:
            nonlocal most, made
            made += 1
            held.add(id(self))
            most = max(most, len(held))

        def __del__(self) -> None:
            held.discard(id(self))

    class Counting:
        def submit(self, function: Any, *args: Any, num_results: int = 1) -> list[Any]:
            return [Handle() for _ in range(num_results)]

        def result(self, handle: Any) -> Any:
            raise AssertionError("no value is asked for while the tree grows")

    monkeypatch.setattr("afn_ray.reduce.tasks.FAN_IN", 4)
    files = {"summary": CommitEntry(name="", rows=1, bytes=1, sha256="")}
    commits = [Commit(str(i), "", files, {}, 0.0, {}) for i in range(4**6)]
    shards = CommittedShards("/store", MEASURE_ID, commits, [1] * len(commits))
    recorded = RecordedSeries(SERIES[1:])
    total, types, _ = tree._submit_series(Counting(), shards, 0, recorded, LabelRules("en", 10.0))
    assert (
        made == 4**5 + (4**5 - 1) // 3 + 5
    )  # groups, merges, then the ends: count, total's three, types
    assert most <= 4 * 6 and len(held) == len([*total, *types])


def test_summaries_that_hold_other_tokens_than_commits_count_are_refused(
    store: str, scratch: Path
) -> None:
    commit = _commit(store, scratch, 0, _corpus(9, 10))
    lying = replace(commit, counts={**commit.counts, "tokens": commit.counts["tokens"] + 1})
    with pytest.raises(
        StoreError, match=r"strength_0 hold \d+ tokens, expected \d+ as the 1 commits"
    ):
        _reduced(store, [lying])


# --- on Ray
# ----------------------------------------------------------------------------------------------


def _on_ray(num_shards: int) -> Any:
    shards = [
        Shard(str(i), (), ReadOptions("auto", "text", None, "file", 1)) for i in range(num_shards)
    ]
    return cluster.tasks(
        RunConfig(corpus=("-",), model="-", store="/", executor="ray"), shards, print
    )


@pytest.mark.ray
def test_ray_gives_the_bits_of_this_process(local_ray: None, store: str, scratch: Path) -> None:
    corpus = _corpus(10, 300, 3)
    commits = [_commit(store, scratch, i, corpus.part(i, i + 2)) for i in range(0, 300, 2)]
    inline = _reduced(store, commits)
    with pytest.MonkeyPatch.context() as patch, _on_ray(len(commits)) as tasks:
        assert isinstance(tasks, calls.RayTasks)
        patch.setattr(calls, "MAX_PENDING", 4)
        patch.setattr(tree, "PART_BYTES", 1 << 12)
        patch.setattr("afn_ray.reduce.tasks.FAN_IN", 8)
        on_ray = _reduced(store, commits[::-1], tasks)
        assert len(tasks._pending) <= 4
    assert inline["shards"].num_rows == 150
    for name in ("thresholds", "histogram", "vocabulary"):
        assert on_ray[name].combine_chunks().equals(inline[name].combine_chunks()), name
    with _on_ray(FAN_IN) as tasks:
        assert isinstance(
            tasks, Inline
        )  # one call would read them all: no second process is worth it


@pytest.mark.ray
def test_a_damaged_summary_is_named_from_the_leaves_of_a_tree_on_ray(
    local_ray: None, store: str, scratch: Path
) -> None:
    corpus = _corpus(11, 70)
    commits = [_commit(store, scratch, i, corpus.part(i, i + 1)) for i in range(70)]
    folder = shard_files.shard_uri(store, MEASURE_ID, commits[3].shard)
    uri = f"{folder}/{commits[3].files['summary']['name']}"
    storage.delete([uri])
    storage.write_once(uri, b"something else")
    with (
        _on_ray(70) as tasks,
        pytest.raises(StoreError, match=r"summary\.parquet is damaged: its checksum"),
    ):
        _reduced(store, commits, tasks)


def _die(mark: str, times: int) -> list[int]:
    """Kills its process the first ``times`` times."""
    path = Path(mark)
    tried = len(path.read_text()) if path.exists() else 0
    path.write_text("x" * (tried + 1))
    if tried < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return [tried]


def _add_one(number: int) -> list[int]:
    return [number + 1]


def _divide(number: int) -> list[float]:
    return [number / 0]


@pytest.mark.ray
def test_a_call_is_repeated_when_its_process_dies_and_not_for_ever(
    local_ray: None, tmp_path: Path
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with _on_ray(100) as tasks:
        (twice,) = tasks.submit(_die, str(tmp_path / "twice"), 2)
        assert tasks.result(tasks.submit(_add_one, twice)[0]) == 3
        (always,) = tasks.submit(_die, str(tmp_path / "always"), 99)
        with pytest.raises(Interrupted, match="the reduce lost a process or a result on Ray"):
            tasks.result(tasks.submit(_add_one, always)[0])
        (wrong,) = tasks.submit(_divide, 1)  # our own fault is shown as it is
        with pytest.raises(ZeroDivisionError):
            tasks.result(tasks.submit(_add_one, wrong)[0])


@pytest.mark.ray
def test_a_run_on_ray_reduces_there_and_has_the_tables_of_one_in_this_process(
    local_ray: None,
    tmp_path: Path,
    make_config: Any,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "FAN_IN", 2)
    monkeypatch.setattr("afn_ray.reduce.tasks.FAN_IN", 2)
    submitted: list[str] = []
    submit = calls.RayTasks.submit

    def submit_noted(tasks: calls.RayTasks, function: Callable[..., Any], *a: Any, **k: Any) -> Any:
        submitted.append(function.__name__)
        return submit(tasks, function, *a, **k)

    monkeypatch.setattr(calls.RayTasks, "submit", submit_noted)
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:200]])
    tables = []
    for executor in ("inline", "ray"):
        config = make_config(
            corpus=(str(corpus),), executor=executor, workers=2, store=str(tmp_path / executor)
        )
        with afn_ray.run(config) as run:
            names = ("thresholds", "histogram", "vocabulary")
            tables.append([pq.read_table(f"{run.uri}/{name}.parquet") for name in names])
        assert bool(submitted) == (executor == "ray")
    assert submitted.count("_read") >= 2 and submitted.count("_total") == 1
    assert all(here.equals(there) for here, there in zip(*tables, strict=True))


# --- Wilson's interval
# -----------------------------------------------------------------------------------


def _wilson(k: int, n: int) -> tuple[float, float]:
    """The two shares p at which k is 1.96 standard errors away: roots of (p - k/n)^2 = z^2 p (1 -
    p) / n.
    """
    z2 = 1.959963984540054**2
    low, high = np.sort(np.roots([1 + z2 / n, -(2 * k / n + z2 / n), (k / n) ** 2]).real)
    return float(low), float(high)


@given(st.integers(1, 10**6), st.data())
def test_wilson_solves_its_equation(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    assert wilson(k, n) == pytest.approx(_wilson(k, n), rel=1e-6, abs=1e-7)


def test_wilson_at_its_ends_and_in_a_published_table() -> None:
    low, high = wilson(np.array([0, 10, 0, 1, 81]), np.array([10, 10, 1, 1, 263]))
    assert low[0] == low[2] == 0 and high[1] == high[3] == 1
    assert high[0] == pytest.approx(0.2775, abs=1e-4) and low[1] == pytest.approx(0.7225, abs=1e-4)
    assert (low[4], high[4]) == (
        pytest.approx(0.2553, abs=1e-4),
        pytest.approx(0.3662, abs=1e-4),
    )  # Newcombe, 1998
    assert (low <= high).all()
