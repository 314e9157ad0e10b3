"""Screening against a slow reference: features, medians, scores and texts, for any order and
grouping of the calls.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afn_ray
from afn_ray.analysis import verify
from afn_ray.config import RunConfig
from afn_ray.errors import StoreError
from afn_ray.reduce import screen
from afn_ray.reduce.histogram import round_strengths
from afn_ray.reduce.screen import RARE
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.sources import MAX_SOURCES, source_depth, source_of
from afn_ray.reduce.strangest import LEAST_DOCS, MAD_TO_SD
from afn_ray.runs import measurer
from afn_ray.schema import FEATURES
from afn_ray.store import manifest, plans, shard_files
from bench import screen as bench
from conftest import config_of, write_jsonl

JUNK = "qvx zzkw jjpq xxvb qqzz kkwv jpqx vbzz"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> RunConfig:
    """A run over three files: two of many documents, one of few; with junk, copies and an empty
    document.
    """
    folder = tmp_path_factory.mktemp("screen")
    (folder / "corpus").mkdir()
    texts = [verses[:60], [v.upper() for v in verses[4000:4045]], verses[9000:9005]]
    texts[0][7] = JUNK
    texts[1][3] = texts[0][9] = texts[1][30] = verses[100]  # in two files
    texts[2][1] = ""
    for name, part in zip("abc", texts, strict=True):
        write_jsonl(folder / "corpus" / f"{name}.jsonl", [{"text": t} for t in part])
    config = config_of(
        tiny_bert,
        folder / "corpus",
        folder / "store",
        layers="1,2",
        shard_bytes=3000,
        sink_factor=1.05,
    )
    afn_ray.run(config).close()
    return config


def reference(run: afn_ray.Run) -> dict[int, dict[str, Any]]:
    """Each document: its features, its score and which documents share its
    text, in plain Python.
    """
    tokens = run.sql(
        "SELECT doc, token_id, is_special, is_word_start, strength_2 FROM tokens ORDER BY doc, "
        "position"
    )
    documents = {
        d: (s, h)
        for d, s, h in run.sql("SELECT doc, source, text_sha256 FROM documents").fetchall()
    }
    by_doc: dict[int, list[tuple[Any, ...]]] = {}
    for row in tokens.fetchall():
        if not row[2]:
            by_doc.setdefault(row[0], []).append(row)
    ((q3, sink),) = run.sql(
        "SELECT q3, sink_factor * q2 FROM labels WHERE layer = 2 AND population = 'tokens'"
    ).fetchall()
    n_docs: Counter[int] = Counter()
    for rows in by_doc.values():
        n_docs.update({r[1] for r in rows})
    rare = {t for t, n in n_docs.items() if n <= max(1, RARE * len(by_doc))}
    found: dict[int, dict[str, Any]] = {}
    for doc, rows in by_doc.items():
        n = len(rows)
        distinct = len({r[1] for r in rows})
        values = [
            sum(r[4] for r in rows) / n,
            sum(r[4] >= q3 for r in rows) / n,
            sum(r[1] in rare for r in rows) / n,
            sum(r[4] > sink for r in rows) / n,
            sum(not r[3] for r in rows) / n,
            math.log(distinct) / math.log(n) if n > 1 else 1.0,
        ]
        found[doc] = {"n": n, "values": round_strengths(np.array(values, np.float32)).astype(float)}

    def group(docs: Sequence[int]) -> tuple[Any, ...]:
        values = np.array([found[d]["values"] for d in docs])
        median = np.quantile(values, 0.5, axis=0, method="inverted_cdf")
        mad = np.quantile(np.abs(values - median), 0.5, axis=0, method="inverted_cdf")
        return median, mad, np.var([r[4] for d in docs for r in by_doc[d]])

    for doc, row in found.items():
        own = [d for d in found if documents[d][0] == documents[doc][0]]
        median, mad, variance = group(own if len(own) >= LEAST_DOCS else list(found))
        n = row["n"]
        p = (median * n + 1) / (n + 2)
        noise = p * (1 - p) / n
        noise[0] = variance / n
        c = min(max(n ** (median[5] - 1), 1 / (n + 2)), 1 - 1 / (n + 2))
        noise[5] = c * (1 - c) / n / math.log(max(n, 2)) ** 2
        z = (row["values"] - median) / np.sqrt((MAD_TO_SD * mad) ** 2 + noise)
        row["copies"] = [d for d in found if documents[d][1] == documents[doc][1]]
        row["score"] = max(np.abs(z).max(), math.log2(len(row["copies"])) * math.log2(n) / 2)
        row["source"] = documents[doc][0]
    return found


def test_every_document_has_the_features_and_the_score_of_the_reference(made: RunConfig) -> None:
    with afn_ray.open_run(made.store) as run:
        expected = reference(run)
        rows = run.sql("FROM screened ORDER BY rank").to_arrow_table().to_pylist()
        n_empty = run.info["counts"]["empty"]
    assert n_empty == 1 and len(expected) == 109
    assert [r["rank"] for r in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        theirs = expected[row["doc"]]
        np.testing.assert_array_equal([row[name] for name in FEATURES], theirs["values"])
        assert row["score"] == pytest.approx(theirs["score"], rel=1e-9)
        assert (row["n_tokens"], row["n_copies"], row["source"]) == (
            theirs["n"],
            len(theirs["copies"]),
            theirs["source"],
        )
    order = sorted(expected, key=lambda d: (-expected[d]["score"], d))
    listed: list[int] = []
    for doc in order:  # of one text the strangest
        if not any(d in listed for d in expected[doc]["copies"]):
            listed.append(doc)
    assert [r["doc"] for r in rows] == listed and len(listed) == 109 - 2


def test_all_strange_documents_are_counted_by_source(
    made: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few are listed, and with each of several copies."""
    monkeypatch.setattr("afn_ray.reduce.strangest.STRANGE_SCORE", 2.0)
    with afn_ray.run(replace(made, store=str(tmp_path), screen=3)) as opened:
        theirs = reference(opened)
        rows = opened.sql("SELECT source, n_docs, n FROM strange").fetchall()
    expected: dict[str, list[int]] = {}
    for row in theirs.values():
        if row["score"] >= 2.0:
            counts = expected.setdefault(row["source"], [0, 0])
            counts[0] += 1
            counts[1] += row["n"]
    assert {source: [n_docs, n] for source, n_docs, n in rows} == expected
    assert len(expected) == 2 and sum(n_docs for _, n_docs, _ in rows) > 3


def test_reasons_and_texts_are_those_of_the_document(made: RunConfig, verses: list[str]) -> None:
    with afn_ray.open_run(made.store) as run:
        rows = run.sql("FROM screened ORDER BY rank").to_arrow_table().to_pylist()
    junk = next(r for r in rows if r["doc"] == 7)
    assert junk["text"] == JUNK and junk["rank"] < 10 and "median of its source" in junk["reason"]
    copied = next(r for r in rows if r["n_copies"] == 3)
    assert "3 documents have this text" in copied["reason"]
    assert (
        copied["text"].replace(" ", "")
        == verses[100].replace(" ", "")[: len(copied["text"].replace(" ", ""))]
    )
    few = next(r for r in rows if r["source"].endswith("c.jsonl"))
    assert "median of the corpus" in few["reason"]


def test_planted_junk_is_found(tmp_path: Path, minilm: Path, verses: list[str]) -> None:
    """A 25th of ``jobs/benchmark.py screen``, on real weights: the same six kinds, and the orders
    that it must beat.
    """
    texts, planted = bench.plant(verses[20_000:21_200], 1)
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in texts])
    config = RunConfig(
        corpus=(str(corpus),),
        model=str(minilm),
        store=str(tmp_path / "store"),
        executor="inline",
        dtype="float32",
        layers="2/3",
    )
    with afn_ray.run(config) as run:
        found = bench.evaluate(run, planted)["orders"]
    print(found)
    assert len(planted) == 12 and len(set(planted.values())) == 6
    assert (
        found["screening"]["precision"] >= 0.8 and found["screening"]["average_precision"] >= 0.85
    )
    for baseline in ("length alone", "idf alone"):
        assert found["screening"]["average_precision"] > found[baseline]["average_precision"] + 0.05


def test_sources_are_the_tokens_by_file(made: RunConfig) -> None:
    with afn_ray.open_run(made.store) as run:
        sources = manifest.read_table(manifest.find_run(made.store), "sources").to_pylist()
        summed = run.sql("FROM sources ORDER BY layer, source").to_arrow_table().to_pylist()
        assert summed == [
            {k: v for k, v in s.items() if k not in ("bins", "counts")} for s in sources
        ]
        assert [(s["layer"], s["source"][-7:]) for s in sources] == [
            (k, f"{name}.jsonl") for k in (1, 2) for name in "abc"
        ]
        for row in sources:
            strength = f"strength_{row['layer']}"
            values, n_high = run.sql(
                f"SELECT list({strength}), count(*) FILTER (high_{row['layer']}) FROM tokens "
                "JOIN documents USING (doc) WHERE NOT is_special AND source = ?",
                [row["source"]],
            ).fetchall()[0]
            recorded = np.repeat(
                (np.array(row["bins"], np.uint32) << 8).view(np.float32), row["counts"]
            )
            np.testing.assert_array_equal(recorded, np.sort(np.array(values, np.float32)))
            assert (row["n"], row["n_high"]) == (len(values), n_high)


class Shuffled:
    """Calls when a result is asked for, in an order of its own."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.waiting: list[tuple[Callable[..., Sequence[Any]], tuple[Any, ...], list[Any]]] = []
        self.values: dict[Any, Any] = {}

    def submit(
        self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1
    ) -> list[Any]:
        handles = [object() for _ in range(num_results)]
        self.waiting.append((function, args, handles))
        return handles

    def result(self, handle: Any) -> Any:
        while handle not in self.values:
            ready = [call for call in self.waiting if self._is_ready(call)]
            call = self.dice.choice(ready)
            self.waiting.remove(call)
            function, args, handles = call
            values = function(*(self.values[a] if type(a) is object else a for a in args))
            self.values.update(zip(handles, values, strict=True))
        return self.values[handle]

    def _is_ready(
        self, call: tuple[Callable[..., Sequence[Any]], tuple[Any, ...], list[Any]]
    ) -> bool:
        """True if the handles among the arguments have values."""
        wanted = [argument for argument in call[1] if type(argument) is object]
        return all(handle in self.values for handle in wanted)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_bits_for_any_order_grouping_and_number_of_parts(
    made: RunConfig, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = manifest.find_run(made.store)
    shards, header = plans.read_shards(run)
    measure_id = run.info["measure"]["id"]
    found = shard_files.find_commits(made.store, measure_id, shards)
    monkeypatch.setattr("afn_ray.reduce.tasks.FAN_IN", 2)
    monkeypatch.setattr(screen, "READ_BYTES", 1 + 20_000 * seed)
    monkeypatch.setattr(screen, "PART_DOCS", 40)
    committed = CommittedShards(
        made.store, measure_id, [found[s.id] for s in shards], [s.num_bytes for s in shards]
    )
    tables = screen.scan_run(
        committed,
        header["measure"]["layers"],
        {t: manifest.read_table(run, t) for t in ("thresholds", "files", "vocabulary")},
        measurer.text_encoder(measurer.find_model_files(made)).texts()[1],
        screen.Asked(1000, language=made.language),
        Shuffled(seed),
    )
    assert len(shards) > 3
    for name, table in tables.items():
        assert table.equals(manifest.read_table(run, name)), name


def test_only_the_worst_are_kept_and_none_on_demand(made: RunConfig, tmp_path: Path) -> None:
    with afn_ray.run(replace(made, screen=5)) as few, afn_ray.open_run(few.uri) as run:
        assert [r for (r,) in run.sql("SELECT rank FROM screened ORDER BY rank").fetchall()] == [
            1,
            2,
            3,
            4,
            5,
        ]
    with afn_ray.run(replace(made, screen=0)) as none:
        assert "screened" not in none.info["tables"] and "sources" not in none.info["tables"]
        assert none.sql("FROM screened").fetchall() == none.sql("FROM sources").fetchall() == []
    found = verify.verify_store(made.store)
    assert not found.findings and found.num_runs == 3


def test_a_file_that_is_not_as_committed_is_named(made: RunConfig, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "In the beginning was the Word."}] * 3)
    config = replace(made, corpus=(str(corpus),), store=str(tmp_path / "store"))
    run = afn_ray.run(config)
    run.close()
    (tokens,) = (tmp_path / "store").rglob("*-tokens.parquet")
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"x")
    Path(f"{run.uri}/run.json").unlink()
    with pytest.raises(
        StoreError,
        match=r"tokens.parquet is damaged: its checksum is not the one in commit.json; delete",
    ):
        afn_ray.run(config)


def test_many_files_are_grouped_by_the_deepest_folders_that_are_few() -> None:
    few = [f"s3://b/x/{i}.txt" for i in range(MAX_SOURCES)]
    assert source_depth(few) is None and source_of(few[3], None) == few[3]
    many = [f"s3://b/lang{i % 3}/year{i % 700}/{i}.txt" for i in range(5000)]
    depth = source_depth(many)
    assert {source_of(u, depth) for u in many} == {f"s3://b/lang{i}" for i in range(3)}
    flat = [f"/c/{i}.txt" for i in range(5000)]
    depth_of_flat = source_depth(flat)
    assert {source_of(u, depth_of_flat) for u in flat} == {"/c"}
    assert source_of("/elsewhere/x.txt", depth) == "/elsewhere"


def test_documents_without_tokens_alone_are_no_trouble(made: RunConfig, tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(json.dumps({"text": ""}) + "\n" + json.dumps({"text": "Word"}) + "\n")
    with afn_ray.run(replace(made, corpus=(str(corpus),), store=str(tmp_path / "store"))) as run:
        (row,) = run.sql("FROM screened").to_arrow_table().to_pylist()
        assert row["n_tokens"] == 1 and math.isfinite(row["score"]) and row["text"] == "Word"
