"""A whole run in this process: what is recorded equals plain Hugging Face, nothing is lost, bad
input is named.
"""

from __future__ import annotations

import bz2
import csv
import errno
import fcntl
import gzip
import json
import lzma
import os
import re
import shutil
import stat
import string
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers

import afn_ray
from afn_ray import model
from afn_ray.analysis import verify
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.corpus import reading
from afn_ray.errors import (
    AfnError,
    ConfigError,
    CorpusError,
    IncompleteRun,
    Interrupted,
    ModelError,
    StoreError,
)
from afn_ray.model import files as model_files
from afn_ray.reduce import lexicon, losses
from afn_ray.runs import cluster, demo, estimate, flow, job, measurer, precision, status, worker
from afn_ray.runs.events import Complete, Event, Planned, Warned, Working
from afn_ray.runs.plan import make_plan
from afn_ray.schema import (
    REPLACED,
    SPECIAL,
    TOKEN_CHARS,
    documents_schema,
    strengths,
    tokens_schema,
)
from afn_ray.show import doctor, salient
from afn_ray.store import disk, garbage, manifest, records, run_claims
from conftest import MakeConfig, interrupted, stop_after, write_jsonl


def shard_tables(run: afn_ray.Run, table: str) -> list[pa.Table]:
    """The run's Parquet files of ``table``, in plan order, read without the product's query
    path.
    """
    store = run.uri.rsplit("/runs/", 1)[0]
    shards = pq.read_table(f"{run.uri}/shards.parquet").to_pylist()
    return [pq.read_table(f"{store}/{s[f'{table}_file']}") for s in shards]


def all_rows(run: afn_ray.Run, table: str) -> list[dict[str, Any]]:
    """Rows of all shards with their run-wide doc and the ends of tokens."""
    rows, first = [], 0
    for tokens, documents in zip(
        shard_tables(run, table), shard_tables(run, "documents"), strict=True
    ):
        for row in tokens.to_pylist():
            row["doc"] = row.pop("doc_in_shard") + first
            if "length" in row:
                row["start"] = TOKEN_CHARS * row["position"] + row.pop("start_ahead")
                row["end"] = row["start"] + row.pop("length")
            rows.append(row)
        first += documents.num_rows
    return rows


def reference(folder: Path, texts: list[str]) -> list[tuple[list[int], list[np.ndarray]]]:
    """Token ids and norms of every one of ``hidden_states`` for each text alone: the Hugging Face
    loop.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    result = []
    for text in texts:
        ids = tokenizer(text, truncation=False)["input_ids"]
        with torch.inference_mode():
            states = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        result.append(
            (ids, [torch.linalg.vector_norm(state[0], dim=-1).numpy() for state in states])
        )
    return result


def test_recorded_strengths_equal_the_hugging_face_loop(
    tmp_path: Path, make_config: MakeConfig, minilm: Path, verses: list[str]
) -> None:
    texts = verses[::400]
    write_jsonl(tmp_path / "c.jsonl", [{"id": i, "text": t} for i, t in enumerate(texts)])
    config = make_config(
        corpus=(str(tmp_path / "c.jsonl"),), model=str(minilm), layers="all", id_column="id"
    )
    with afn_ray.run(config) as run:
        rows = all_rows(run, "tokens")
        documents = all_rows(run, "documents")
    assert [d["doc_id"] for d in documents] == [str(i) for i in range(len(texts))]
    for doc, (ids, by_layer) in enumerate(reference(minilm, texts)):
        mine = [r for r in rows if r["doc"] == doc]
        assert [r["token_id"] for r in mine] == ids
        assert [r["position"] for r in mine] == list(range(len(ids)))
        assert len(by_layer) == 7
        for layer, norms in enumerate(by_layer):
            np.testing.assert_allclose([r[f"strength_{layer}"] for r in mine], norms, rtol=2e-5)
            means = np.mean([r[f"strength_{layer}"] for r in mine if not r["flags"] & SPECIAL])
            assert documents[doc][f"mean_strength_{layer}"] == pytest.approx(means, rel=1e-6)


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_gpt"])
def test_long_documents_are_recorded_once_and_at_the_window_with_most_context(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
) -> None:
    folder = request.getfixturevalue(kind)
    texts = [" ".join(verses[a:b]) for a, b in ((0, 10), (10, 11), (11, 40), (40, 43))]
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in texts])
    config = make_config(
        corpus=(str(corpus),), model=str(folder), layers="2", window_tokens=40, overlap_tokens=9
    )
    with afn_ray.run(config) as run:
        rows = all_rows(run, "tokens")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    causal = kind == "tiny_gpt"
    special = 0 if causal else 1  # one before, one after
    width = 40 - 2 * special
    for doc, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        mine = [r for r in rows if r["doc"] == doc]
        assert [r["token_id"] for r in mine] == ids
        n = len(ids) - 2 * special
        starts = sorted({max(0, min(b, n - width)) for b in range(0, max(1, n), width - 9)})
        norms = {}
        for begin in starts:
            inner = ids[special : special + n][begin : begin + width]
            window = ids[:special] + inner + ids[len(ids) - special :]
            with torch.inference_mode():
                state = plain(
                    input_ids=torch.tensor([window]), output_hidden_states=True
                ).hidden_states[2][0]
            norms[begin] = torch.linalg.vector_norm(state, dim=-1).numpy()
        for token in range(n):
            seen = {}
            for begin in starts:
                if begin <= token < begin + width:
                    left = np.inf if begin == 0 else token - begin
                    right = np.inf if begin + width >= n else begin + width - 1 - token
                    seen[begin] = left if causal else min(left, right)
            best = max(seen.values())
            values = [
                norms[b][special + token - b] for b, context in seen.items() if context == best
            ]
            got = mine[special + token]["strength_2"]
            assert any(abs(got - v) <= 3e-5 * v for v in values), (doc, token)


def test_offsets_point_back_into_the_text(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = ["The LORD  said:\tcafé naïve — 東京 🙂 e\u0301 ﬁn", "x" * 300, "Tail   "]
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in texts])
    with afn_ray.run(make_config(corpus=(str(corpus),))) as run:
        rows = all_rows(run, "tokens")
        words = run.sql("SELECT doc, text FROM words ORDER BY doc, word").fetchall()
    vocabulary = transformers.AutoTokenizer.from_pretrained(run.info["config"]["model"])
    for row in rows:
        written = texts[row["doc"]][row["start"] : row["end"]]
        if row["flags"] & SPECIAL:
            assert written == ""
        else:
            piece = vocabulary.convert_ids_to_tokens(row["token_id"]).removeprefix("##")
            assert (
                piece == "[UNK]"
                or piece == vocabulary.backend_tokenizer.normalizer.normalize_str(written).strip()
            )
    assert [w for d, w in words if d == 0][:7] == ["The", "LORD", "said", ":", "café", "naïve", "—"]
    assert [w for d, w in words if d == 1] == ["x" * 300]


def test_thresholds_equal_numpy_and_duckdb_over_the_recorded_values(
    tmp_path: Path, make_config: MakeConfig, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:300]])
    with afn_ray.run(make_config(corpus=(str(corpus),), layers="0,2")) as run:
        for layer in (0, 2):
            values = np.concatenate(
                [
                    t[f"strength_{layer}"].to_numpy()[(t["flags"].to_numpy() & SPECIAL) == 0]
                    for t in shard_tables(run, "tokens")
                ]
            )
            expected = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf")
            got = run.sql(
                f"SELECT q1, q2, q3, n FROM thresholds WHERE layer = {layer} AND population = "
                "'tokens'"
            )
            assert got.fetchall() == [(*map(float, expected), len(values))]
            query = (
                f"SELECT quantile_disc(strength_{layer}, [0.25, 0.5, 0.75]) FROM tokens WHERE NOT "
                "is_special"
            )
            assert run.sql(query).fetchall() == [(list(map(float, expected)),)]
            high = run.sql(
                f"SELECT sum(n_high) FROM vocabulary WHERE layer = {layer} AND class <> 'special'"
            )
            assert high.fetchall() == [(int((values >= expected[2]).sum()),)]


def test_tables_have_the_promised_schemas_with_and_without_offsets(
    tmp_path: Path, make_config: MakeConfig, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:20]])
    for offsets in (True, False):
        config = make_config(
            corpus=(str(corpus),), offsets=offsets, store=str(tmp_path / f"store-{offsets}")
        )
        with afn_ray.run(config) as run:
            for table, schema in (
                ("tokens", tokens_schema(strengths([2]), offsets)),
                ("documents", documents_schema(strengths([2]), detected=True)),
            ):
                assert all(t.schema.equals(schema) for t in shard_tables(run, table))
            assert ("start" in run.tables()["tokens"]) is offsets


def test_every_format_and_compression_gives_the_same_tokens(
    tmp_path: Path, make_config: MakeConfig, verses: list[str]
) -> None:
    texts = [v for v in verses[:40] if "\n" not in v]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    plain = "".join(t + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(lines))
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(plain))
    with pa.CompressedOutputStream(str(tmp_path / "a.txt.zst"), "zstd") as out:
        out.write(plain)
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerows([["n", "text"], *enumerate(texts)])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7)
    seen = {}
    for name in (
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.bz2",
        "a.txt.xz",
        "a.txt.zst",
        "a.csv",
        "a.parquet",
    ):
        config = make_config(
            corpus=(str(tmp_path / name),),
            store=str(tmp_path / f"store-{name}"),
            txt_documents="line",
        )
        with afn_ray.run(config) as run:
            seen[name] = [(r["doc"], r["position"], r["token_id"]) for r in all_rows(run, "tokens")]
    assert all(rows == seen["a.jsonl"] for rows in seen.values())
    assert {doc for doc, _, _ in seen["a.jsonl"]} == set(range(len(texts)))


def test_bad_documents_are_quarantined_with_their_reason_and_nothing_is_lost(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(
        folder / "a.jsonl",
        [
            {"text": "Good one."},
            {"text": ""},
            {"text": "\u200b\x07"},
            '{"text": "broken',
            "[1]",
            {"other": 1},
            {"text": None},
            '{"text": NaN}',
            {"text": 7},
            {"text": "[SEP] [CLS]"},
            {"text": "x" * 5000},
        ],
    )
    (folder / "b.txt").write_bytes(b"Good \xff\xfe bytes")
    (folder / "c.txt").write_bytes(b"")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "in a stream"}\n' * 2000)[:-20])
    (folder / "e.parquet").write_bytes(b"no parquet")
    config = make_config(max_document_bytes=4000)
    with afn_ray.run(config) as run:
        documents = all_rows(run, "documents")
        tokens = all_rows(run, "tokens")
        counts = run.info["counts"]
    status = [(Path(d["source"]).name, d["status"]) for d in documents]
    expected = [
        "ok",
        "empty",
        "empty",
        "quarantined: not JSON",
        "quarantined: ",
        "quarantined: no column 'text'",
        "quarantined: text is null",
        "quarantined: text is",
        "quarantined: text is",
        "ok",
        "quarantined: document of 5000 bytes",
    ]
    of_a = [s for name, s in status if name == "a.jsonl"]
    assert len(of_a) == len(expected)
    assert all(got.startswith(want) for got, want in zip(of_a, expected, strict=True)), of_a
    assert [s for name, s in status if name == "b.txt"] == ["ok"]
    assert [s for name, s in status if name == "c.txt"] == ["empty"]
    stream = [s for name, s in status if name == "d.jsonl.gz"]
    assert stream[-1].startswith("quarantined: truncated") and set(stream[:-1]) <= {"ok"}
    assert [s[:12] for name, s in status if name == "e.parquet"] == ["quarantined:"]
    by_doc: dict[int, list[int]] = {}
    for row in tokens:
        by_doc.setdefault(row["doc"], []).append(row["position"])
    for document in documents:
        assert by_doc.get(document["doc"], []) == list(range(document["n_tokens"]))
        assert (document["n_tokens"] > 0) is (document["status"] == "ok")
        assert (document["text_sha256"] is None) is document["status"].startswith("quarantined: ")
    assert counts["documents"] == len(documents)
    assert counts["quarantined"] == sum(s.startswith("quarantined") for _, s in status)
    replaced = next(d for d in documents if d["source"].endswith("b.txt"))
    assert replaced["n_replaced"] == counts["replaced"] == 2
    for document in documents:  # what is quarantined may be lost, what is not is whole
        if not document["status"].startswith("quarantined"):
            assert (document["lost_bytes"], document["lost_documents"]) == (0, 0)
    assert counts["lost_bytes"] == sum(d["lost_bytes"] for d in documents)
    assert counts["lost_documents"] == sum(d["lost_documents"] or 0 for d in documents)
    assert counts["lost_unknown"] == sum(d["lost_documents"] is None for d in documents) > 0
    assert sum(bool(r["flags"] & REPLACED) for r in tokens) == sum(
        r["doc"] == replaced["doc"] and bool(r["flags"] & REPLACED) for r in tokens
    )


def test_strengths_that_are_not_finite_quarantine_their_document(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(
        tmp_path / "c.jsonl", [{"text": "fine"}, {"text": "poison here"}, {"text": "fine too"}]
    )
    right = flow.PendingChunk.values

    def overflow(self: Any) -> Any:
        values = right(self)
        values.series[:, self.chunk.prepared.encoded.bounds[1] + 1] = np.inf
        return values

    monkeypatch.setattr(flow.PendingChunk, "values", overflow)
    with afn_ray.run(make_config(corpus=(str(corpus),))) as run:
        assert [d["status"] for d in all_rows(run, "documents")] == [
            "ok",
            "quarantined: the model gave a strength that is not finite in float32",
            "ok",
        ]
        assert {r["doc"] for r in all_rows(run, "tokens")} == {0, 2}
        lost = [(d["lost_bytes"], d["lost_documents"]) for d in all_rows(run, "documents")]
        assert lost == [(0, 0), (len("poison here"), 1), (0, 0)]
        totals = {"lost_bytes": len("poison here"), "lost_documents": 1, "lost_unknown": 0}
        assert {name: run.info["counts"][name] for name in totals} == totals


def fail_on(monkeypatch: pytest.MonkeyPatch, word: str, error: BaseException) -> list[int]:
    """Make the model raise ``error`` for batches with ``word``, a token of its own; returns
    their sizes.
    """
    token = tokenizers.Tokenizer.from_file(str(demo.model_folder() / "tokenizer.json")).token_to_id(
        word
    )
    submit = model.Model.submit
    failed: list[int] = []

    def submit_or_fail(self: Any, ids: Any, lengths: Any, *signals: Any) -> Any:
        pending = submit(self, ids, lengths, *signals)
        if token in ids[: sum(lengths)]:
            failed.append(len(lengths))
            raise error
        return pending

    monkeypatch.setattr(model.Model, "submit", submit_or_fail)
    return failed


def assert_quarantined_alone(
    config: RunConfig, folder: Path, rows: list[dict[str, str]], bad: dict[int, str]
) -> list[dict[str, Any]]:
    """``bad`` documents of a run over ``rows`` have those reasons, and all else is bit for bit what
    it is where their texts are empty; returns the documents.
    """
    seen = []
    for name in ("as-they-are", "emptied"):
        emptied = [
            {**r, "text": ""} if i in bad and name == "emptied" else r for i, r in enumerate(rows)
        ]
        corpus = write_jsonl(folder / f"{name}.jsonl", emptied)
        with afn_ray.run(
            replace(config, corpus=(str(corpus),), store=str(folder / name), shard_bytes=1 << 20)
        ) as run:
            seen.append((all_rows(run, "tokens"), all_rows(run, "documents"), run.info["counts"]))
    (tokens, documents, counts), (expected, plain, _) = seen
    assert tokens == expected and len(tokens) > 0
    for i, (d, p) in enumerate(zip(documents, plain, strict=True)):
        assert d["doc_id"] == rows[i]["id"] == p["doc_id"]
        if i in bad:
            assert d["status"] == f"quarantined: {bad[i]}" and d["n_tokens"] == d["n_windows"] == 0
            assert d["n_chars"] == len(rows[i]["text"])
            assert (d["lost_bytes"], d["lost_documents"]) == (len(rows[i]["text"].encode()), 1)
        else:
            assert {k: v for k, v in d.items() if k not in ("source", "offset")} == {
                k: v for k, v in p.items() if k not in ("source", "offset")
            }
    assert counts["quarantined"] == len(bad)
    return documents


def test_a_document_that_the_tokenizer_cannot_take_is_quarantined_alone(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], tiny_bert: Path
) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "unigram")
    pieces = [
        ("[CLS]", 0.0),
        ("[SEP]", 0.0),
        *((c, -1.0) for c in f" {string.ascii_letters}.,:;?!()'-"),
    ]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=None))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("special_tokens_map.json", "vocab.txt"):
        (folder / name).unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    rows = [{"id": f"d{i}", "text": v} for i, v in enumerate(verses[:60])]
    rows[3]["text"] += " \u05d0"
    rows[50]["text"] = "\u4e2d\u6587 is not in it"
    why = (
        "the tokenizer cannot take it: Exception: Encountered an unknown token but `unk_id` is "
        "missing"
    )
    config = make_config(model=str(folder), id_column="id")
    assert_quarantined_alone(config, tmp_path, rows, {3: why, 50: why})


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_a_document_that_the_model_cannot_take_is_quarantined_alone(
    kind: str,
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_mpnet: Path,
) -> None:
    failed = fail_on(monkeypatch, "abraham", ValueError("no\x1b[31m such\nplace"))
    rows = [{"id": f"d{i}", "text": " ".join(verses[i : i + 2])} for i in range(100)]
    rows[77]["text"] += " Abraham went."
    rows[99]["text"] = f"Abraham {rows[99]['text']}"
    bad = dict.fromkeys((77, 99), r"the model cannot take it: ValueError: no\x1b[31m such")
    config = make_config(id_column="id", **({"model": str(tiny_mpnet)} if kind == "padded" else {}))
    assert_quarantined_alone(config, tmp_path, rows, bad)
    assert (
        2 <= len(failed) <= 2 * 2 * 8
    )  # a hundred documents are halved seven times, for two of them


def test_the_rows_of_documents_beside_one_at_fault_do_not_depend_on_how_often_it_was_tried(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"d{i}", "text": v} for i, v in enumerate(verses[:100])]
    rows[50]["text"] += " Abraham"
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    fail_on(monkeypatch, "abraham", IndexError("index out of range in self"))
    config = make_config(corpus=(str(corpus),), id_column="id")
    tables = []
    measured: list[float] = []

    def look(event: Event) -> None:
        if isinstance(event, Working):
            measured.append(event.progress.work.measured)

    for name in ("whole", "stopped"):
        config = replace(config, store=str(tmp_path / name))
        if name == "stopped":
            with monkeypatch.context() as patch:
                stop_after(patch, 2)
                with pytest.raises((KeyboardInterrupt, Interrupted)):
                    afn_ray.run(config)
        with afn_ray.run(config, look) as run:
            assert run.info["counts"]["shards"] > 3 and run.info["counts"]["quarantined"] == 1
            assert max(measured) < 101  # what is tried again is not said to be done
            tables.append((all_rows(run, "tokens"), all_rows(run, "documents")))
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("error", "ends_in", "num_attempts"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Interrupted, 1),
        (OSError(5, "input/output error"), IncompleteRun, 2),
    ],
)
def test_a_broken_device_or_disk_quarantines_no_document(
    error: Exception,
    ends_in: type[AfnError],
    num_attempts: int,
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dead GPU stops the run of this process, which goes on in a new one with all documents."""
    rows = [{"text": v} for v in [*verses[:20], "Abraham went", *verses[20:30]]]
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    config = make_config(corpus=(str(corpus),), shard_bytes=1 << 20)
    with monkeypatch.context() as patch:
        failed = fail_on(patch, "abraham", error)
        with pytest.raises(ends_in, match=f"{type(error).__name__}: .*{error.args[-1]}"):
            afn_ray.run(config)
    assert len(failed) == num_attempts  # once in each of the shard's attempts
    with afn_ray.run(config) as run:
        assert run.info["counts"]["documents"] == len(rows)
        assert run.info["counts"]["quarantined"] == 0


def test_a_system_without_another_thread_ends_the_run_resumable(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "In the beginning"}])
    config, start = make_config(corpus=(str(corpus),)), threading.Thread.start

    def start_or_not(thread: threading.Thread) -> None:
        if thread.name == "afn-shard":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_or_not)
        with pytest.raises(IncompleteRun, match="can't start new thread"):
            afn_ray.run(config)
    with afn_ray.run(config) as made:
        assert made.info["counts"]["documents"] == 1


def test_a_model_that_fails_on_everything_quarantines_no_document(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": v} for v in verses[:200]])
    begin = flow.Turns.begin
    broken: list[bool] = []

    def fail(self: Any, chunk: Any, **options: Any) -> Any:
        if not broken:
            broken.append(True)
            monkeypatch.setattr(model.Model, "submit", lambda *args: 1 / 0)
        return begin(self, chunk, **options)

    monkeypatch.setattr(flow.Turns, "begin", fail)
    config = make_config(corpus=(str(corpus),))
    with pytest.raises(IncompleteRun, match="ZeroDivisionError: division by zero") as e:
        afn_ray.run(config)
    assert "in a row" in str(e.value) and not list(Path(config.store).rglob("commit.json"))


def test_a_shard_none_of_whose_documents_can_be_measured_fails_as_one(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on(monkeypatch, "abraham", ValueError("no"))
    enough = worker.NONE_MEASURED
    for n, error, told in (
        (
            enough,
            IncompleteRun,
            f"none of {enough} documents could be measured, so the fault may be none of theirs",
        ),
        (
            enough - 1,
            CorpusError,
            f"no token to measure: {enough} documents, 1 empty, {enough - 1} quarantined",
        ),
    ):
        texts = [*(f"Abraham {v}" for v in verses[:n]), ""]
        corpus = write_jsonl(tmp_path / f"{n}.jsonl", [{"text": t} for t in texts])
        with pytest.raises(error, match=rf"(?s){told}.*the model cannot take it: ValueError: no"):
            afn_ray.run(make_config(corpus=(str(corpus),), shard_bytes=1 << 20))


def test_a_model_whose_parts_do_not_fit_is_refused_by_a_run_a_dry_run_and_the_doctor_alike(
    tmp_path: Path, make_config: MakeConfig, tiny_bert: Path
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "In the beginning"}])
    folder = shutil.copytree(tiny_bert, tmp_path / "bert")
    plain = (folder / "config.json").read_text()

    def more_blocks(on: bool) -> None:
        text = json.dumps(json.loads(plain) | {"num_hidden_layers": 2}) if on else plain
        (folder / "config.json").write_text(text)

    def lacks_tokenizer(on: bool) -> None:
        for name in ("tokenizer.json", "vocab.txt"):
            (folder / name).unlink(missing_ok=True) if on else shutil.copy(tiny_bert / name, folder)

    def with_adapter(on: bool) -> None:
        (folder / "adapter_config.json").write_text("{}") if on else (
            folder / "adapter_config.json"
        ).unlink()

    for spoil, why in (
        (more_blocks, r"hold 16 tensors"),
        (lacks_tokenizer, "has no tokenizer"),
        (with_adapter, "holds an adapter"),
    ):
        spoil(True)
        config = make_config(corpus=(str(corpus),), model=str(folder), layers="1")
        for ask in (
            lambda: afn_ray.run(config),  # noqa: B023
            lambda: estimate.dry_run(config),  # noqa: B023
            lambda: doctor._model(str(folder)),
        ):
            with pytest.raises(ModelError, match=why):
                ask()
        spoil(False)
    assert not list(Path(config.store).rglob("commit.json"))


def test_a_measure_is_of_what_changes_a_value(
    tmp_path: Path, make_config: MakeConfig, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_id(folder: Path) -> str:
        config = make_config(model=str(folder))
        return worker.prepare(
            config, measurer.find_model_files(config), "cpu", "float32"
        ).measure.id

    before = measure_id(tiny_bert)
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    for name in ("eval_results.json", "notes.txt", "README.md", "trainer_state.json"):
        (copy / name).write_text("{}")
    assert measure_id(copy) == before
    with monkeypatch.context() as patch:
        patch.setitem(model_files.MAKERS, "transformers", "5.99")
        assert measure_id(copy) != before
    vocabulary = json.loads((copy / "tokenizer.json").read_text())
    vocabulary["normalizer"] = None
    (copy / "tokenizer.json").write_text(json.dumps(vocabulary))
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert measure_id(copy) != before


def test_the_second_run_does_nothing_and_says_so(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:50]])
    config = make_config(corpus=(str(corpus),))
    with afn_ray.run(config) as run:
        first = run.uri
    before = {p: p.stat().st_mtime_ns for p in Path(config.store).rglob("*") if p.is_file()}
    monkeypatch.setattr(
        measurer.Measurer, "__init__", lambda self, task: pytest.fail("a model was loaded")
    )
    events: list[Event] = []
    with afn_ray.run(config, events.append) as run:
        assert run.uri == first
    assert {p: p.stat().st_mtime_ns for p in Path(config.store).rglob("*") if p.is_file()} == before
    assert next(e.message for e in events if isinstance(e, Complete)).startswith("nothing to do")
    again = "is the same, and another run is newer: the tables are computed again"
    assert not any(again in e.message for e in events if isinstance(e, Planned))
    for sink_factor in (config.sink_factor + 1, config.sink_factor):
        events.clear()
        with afn_ray.run(replace(config, sink_factor=sink_factor), events.append) as run:
            assert run.uri != first
        (planned,) = (e.message for e in events if isinstance(e, Planned))
        assert (again in planned) == (sink_factor == config.sink_factor)
    assert first.rpartition("/")[2] in planned


def test_stopped_and_resumed_does_only_the_rest_and_gives_the_same_rows(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:200]])
    straight = make_config(corpus=(str(corpus),), store=str(tmp_path / "straight"))
    with afn_ray.run(straight) as run:
        expected = all_rows(run, "tokens")
    config = make_config(corpus=(str(corpus),))
    process = worker.Processor.process
    done = stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        afn_ray.run(config)
    with pytest.raises(StoreError, match="holds no complete run"):
        afn_ray.open_run(config.store)
    again: list[str] = []

    def watch(self: Any, shard: Any, oom_retries: int) -> Any:
        again.append(shard.id)
        return process(self, shard, oom_retries)

    monkeypatch.setattr(worker.Processor, "process", watch)
    with afn_ray.run(config) as run:
        assert all_rows(run, "tokens") == expected
        assert run.info["counts"]["shards_reused"] == 2
    assert len(again) > 2 and not set(again) & set(done)


def test_a_worker_keeps_the_token_budget_that_fitted(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:200]])
    load = measurer.Measurer.__init__
    walls: list[int] = []
    sizes: set[int] = set()

    def load_on_small_device(self: Any, task: Any) -> None:
        load(self, task)
        submit = self.turns.submit

        def small(batch: Any) -> Any:
            if batch.forward_tokens > 128:
                walls.append(batch.forward_tokens)
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED in cublasCreate")
            sizes.add(batch.forward_tokens)
            return submit(batch)

        self.turns.submit = small

    monkeypatch.setattr(measurer.Measurer, "__init__", load_on_small_device)
    config = make_config(corpus=(str(corpus),), batch_tokens=256)
    with afn_ray.run(config) as run:
        assert run.info["counts"]["shards"] > 6
        assert {d["status"] for d in all_rows(run, "documents")} == {"ok"}
    assert 1 <= len(walls) <= 3  # one for each shard in process at the time
    assert max(sizes) == 128


def test_rows_do_not_depend_on_the_order_of_shards(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:150]])
    with afn_ray.run(make_config(corpus=(str(corpus),), store=str(tmp_path / "forward"))) as run:
        expected = all_rows(run, "tokens"), pq.read_table(f"{run.uri}/vocabulary.parquet")
    from afn_ray.runs import cluster

    forward = cluster.process_shards
    monkeypatch.setattr(
        cluster,
        "process_shards",
        lambda config, task, shards, call, composed: forward(
            config, task, shards[::-1], call, composed
        ),
    )
    with afn_ray.run(make_config(corpus=(str(corpus),))) as run:
        assert (all_rows(run, "tokens"), pq.read_table(f"{run.uri}/vocabulary.parquet")) == expected


def test_thresholds_and_vocabulary_do_not_depend_on_how_the_corpus_is_cut(
    tmp_path: Path, make_config: MakeConfig, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:100]])
    tables = []
    for size in (2048, 1 << 20):
        # One window a batch: batches then do not depend on the cut, and neither do the bits.
        config = make_config(
            corpus=(str(corpus),),
            store=str(tmp_path / f"s{size}"),
            shard_bytes=size,
            batch_tokens=16,
        )
        with afn_ray.run(config) as run:
            assert (run.info["counts"]["shards"] == 1) is (size > 2048)
            tables.append(
                [
                    pq.read_table(f"{run.uri}/{t}.parquet")
                    for t in ("thresholds", "vocabulary", "histogram")
                ]
            )
    assert tables[0] == tables[1]


def test_a_failing_shard_is_tried_again_then_given_up_and_the_others_are_kept(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:120]])
    config = make_config(corpus=(str(corpus),))
    process = worker.Processor.process
    tries: dict[str, int] = {}
    poison: list[str] = []

    def fail(self: Any, shard: Any, oom_retries: int) -> Any:
        tries[shard.id] = tries.get(shard.id, 0) + 1
        poison.append(shard.id) if not poison else None
        if shard.id == poison[0]:
            raise RuntimeError("a fault of this shard")
        return process(self, shard, oom_retries)

    monkeypatch.setattr(worker.Processor, "process", fail)
    with pytest.raises(
        IncompleteRun,
        match=r"(?s)1 of \d+ shards are quarantined.*RuntimeError: a fault of this shard",
    ) as e:
        afn_ray.run(config)
    assert poison[0] in str(e.value) and "c.jsonl" in str(e.value)
    assert tries.pop(poison[0]) == 2 and set(tries.values()) == {1}
    monkeypatch.setattr(worker.Processor, "process", process)
    with afn_ray.run(config) as run:
        assert run.info["counts"]["shards_reused"] == len(tries)


def test_a_run_on_a_filesystem_without_links_locks_and_fsync_of_folders(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:60]])
    config = make_config(corpus=(str(corpus),), scratch=str(tmp_path / "scratch"))
    fsync = os.fsync

    def unable(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", unable)
    monkeypatch.setattr(fcntl, "flock", unable)
    monkeypatch.setattr(
        os, "fsync", lambda fd: unable() if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd)
    )
    with afn_ray.run(config) as run:
        assert len(all_rows(run, "documents")) == 60
    assert not list((tmp_path / "scratch").iterdir())
    with afn_ray.run(config) as again:
        assert again.uri == run.uri


@pytest.mark.parametrize("deadline_s", [0.2, None])
def test_a_document_that_hangs_in_this_process_ends_the_run_resumable(
    deadline_s: float | None,
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:6]])
    config = make_config(corpus=(str(corpus),), executor="inline")
    released, read = threading.Event(), reading.read

    def hang(*asked: Any) -> Any:
        released.wait(60)
        return read(*asked)

    monkeypatch.setattr("afn_ray.runs.deadlines.DEADLINE_S", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "read", hang)
        with pytest.raises(
            Interrupted, match=r"\(.*c\.jsonl\) is not done after .*--shard-deadline"
        ) as caught:
            afn_ray.run(replace(config, shard_deadline_s=deadline_s))
        released.set()
    assert caught.value.exit_code == 75
    with afn_ray.run(config) as run:
        assert len(all_rows(run, "documents")) == 6


def test_a_full_tmpdir_is_named_and_resumable(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:6]])
    config = make_config(corpus=(str(corpus),), scratch=None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", full)
        with pytest.raises(
            Interrupted, match=rf"no space left in the scratch folder {tmp_path}/tmp; make room, or"
        ):
            afn_ray.run(config)
    with afn_ray.run(config) as run:
        assert len(all_rows(run, "documents")) == 6
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("where", ["scratch", "store"])
def test_a_full_disk_stops_the_run_resumable_and_leaves_nothing_half_visible(
    where: str,
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:60]])
    config = make_config(corpus=(str(corpus),), scratch=str(tmp_path / "scratch"))
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if where == "scratch":
            real_writer = records._writer

            def full_writer(path: Path, schema: pa.Schema) -> Any:
                writer = real_writer(path, schema)
                writer.write_table = lambda *a: (_ for _ in ()).throw(full)
                return writer

            patch.setattr(records, "_writer", full_writer)
        else:
            real = disk.write_temporary
            patch.setattr(
                disk,
                "write_temporary",
                lambda path, data: (
                    (_ for _ in ()).throw(full) if path.name == "commit.json" else real(path, data)
                ),
            )
        with pytest.raises(
            Interrupted, match=r"no space left.*run the same command again: it resumes"
        ) as error:
            afn_ray.run(config)
        assert error.value.exit_code == 75
    assert not list(Path(config.store).rglob("commit.json"))
    assert not list((tmp_path / "scratch").iterdir())
    with afn_ray.run(config) as run:
        assert len(all_rows(run, "documents")) == 60


@pytest.mark.parametrize("how", ["another size", "same size", "same size and time", "gone"])
def test_a_file_that_changes_under_the_run_costs_its_shard_and_the_next_run_plans_anew(
    how: str,
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    files = [
        write_jsonl(folder / f"{i}.jsonl", [{"text": t} for t in verses[20 * i : 20 * i + 20]])
        for i in range(3)
    ]
    for file in files:
        os.utime(file, ns=(0, 10**18))
    shard_bytes = max(f.stat().st_size for f in files)  # a shard each
    config = make_config(shard_bytes=shard_bytes)
    begin = run_claims.begin_run

    def change(*args: Any) -> Any:
        text = files[1].read_text("utf-8")
        files[1].write_text(
            text[: text.rindex("{")] if how == "another size" else text.replace("the", "one"),
            "utf-8",
        )
        if how == "same size and time":
            os.utime(files[1], ns=(0, 10**18))
        if how == "gone":
            files[1].unlink()
        return begin(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_claims, "begin_run", change)
        with pytest.raises(
            IncompleteRun, match=r"(?s)^1 of 3 shards .*\(.*1\.jsonl\): CorpusChanged: "
        ) as error:
            afn_ray.run(config)
    assert error.value.exit_code == 1
    reason = "is gone since it was planned" if how == "gone" else "is not the file that was planned"
    assert reason in str(error.value) and "run the same command again to plan" in str(error.value)
    assert len(list(Path(config.store).rglob("commit.json"))) == 2
    if how == "same size and time":
        with pytest.raises(IncompleteRun, match="touch it and run the same command again"):
            afn_ray.run(config)
        files[1].touch()
    with afn_ray.run(config) as run:
        rows = all_rows(run, "tokens")
        assert run.info["counts"]["shards_reused"] == 2
    with afn_ray.run(make_config(shard_bytes=shard_bytes, store=str(tmp_path / "straight"))) as run:
        assert all_rows(run, "tokens") == rows


def test_a_store_of_another_measure_is_refused_and_the_difference_named(
    tmp_path: Path, make_config: MakeConfig, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:20]])
    afn_ray.run(make_config(corpus=(str(corpus),))).close()
    other = {"corpus": (str(corpus),), "window_tokens": 32}
    with pytest.raises(
        StoreError, match=r"another measure.*window_tokens: the store has 64, this run asks for 32"
    ):
        afn_ray.run(make_config(**other))
    with afn_ray.run(make_config(**other, allow_another_measure=True)) as run:
        assert run.info["measure"]["window_tokens"] == 32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"corpus": ("/no/such/place",)}, CorpusError, "no such file or folder"),
        ({"corpus": ("/no/such/*.jsonl",)}, CorpusError, "no files match|no such file"),
        ({"text_column": "body"}, CorpusError, r"no column 'body'.*it has: id, text"),
        ({"id_column": "key"}, CorpusError, r"no column 'key'.*it has: id, text"),
        (
            {"layers": "4"},
            ConfigError,
            r"layer 4 does not exist; the model has layers 0 \(embeddings\) to 3",
        ),
        ({"model": "/no/model"}, ModelError, "no model at /no/model"),
        ({"window_tokens": 65}, ModelError, "takes at most 64"),
        ({"window_tokens": 8, "overlap_tokens": 6}, ConfigError, "has no room to move"),
        ({"store": "/proc/afn"}, StoreError, "writing /proc/afn"),
        ({"store": "nope://bucket/x"}, ConfigError, "nope"),
    ],
)
def test_a_wrong_request_is_named_before_any_work(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    make_config: MakeConfig,
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": 1, "text": "hello"}])
    with pytest.raises(error, match=message):
        afn_ray.run(make_config(**({"corpus": (str(corpus),)} | changes)))
    assert not (tmp_path / "store" / "shards").exists()


def test_a_language_without_closed_class_words_is_said_once(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """Then words are neither content nor function, and the same text in English has both."""
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": 1, "text": "And the lord said, in 7 days."}])
    classes, warnings = {}, {}
    for language in ("xx", "en"):
        said: list[Event] = []
        config = make_config(
            corpus=(str(corpus),), store=str(tmp_path / language), language=language
        )
        with afn_ray.run(config, said.append) as run:
            found = run.sql("SELECT text, class FROM vocabulary WHERE layer = 2").fetchall()
        classes[language] = {text: name for text, name in found if name != "special"}
        warnings[language] = [e.message for e in said if isinstance(e, Warned)]
    (warning,) = (w for w in warnings["xx"] if "closed-class" in w)
    assert "there are no closed-class words of language 'xx'" in warning
    assert not any("closed-class" in w for w in warnings["en"])
    words = {text for text, name in classes["xx"].items() if name == "word"}
    assert {"the", "lord"} <= words and set(classes["xx"].values()) & {
        "content",
        "function",
    } == set()
    assert {classes["en"][text] for text in words} == {"content", "function"}
    others = classes["en"].keys() - words
    assert others and all(classes["en"][text] == classes["xx"][text] for text in others)


def test_a_corpus_without_any_token_is_an_error(tmp_path: Path, make_config: MakeConfig) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": ""}, {"text": " "}])
    with pytest.raises(
        CorpusError, match="no token to measure: 2 documents, 2 empty, 0 quarantined"
    ):
        afn_ray.run(make_config(corpus=(str(corpus),)))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": 1}, {"text": ""}, {"text": [2]}])
    with pytest.raises(
        CorpusError, match=r"1 empty, 2 quarantined:\n  \S+bad.jsonl: .+\n  \S+bad.jsonl: "
    ):
        afn_ray.run(make_config(corpus=(str(bad),), store=str(tmp_path / "other")))


def test_a_store_in_memory_works_in_this_process_and_is_refused_with_workers(
    tmp_path: Path, make_config: MakeConfig, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:20]])
    with afn_ray.run(make_config(corpus=(str(corpus),), store="memory://in-memory-store")) as run:
        assert run.sql("SELECT count(*) FROM documents").fetchall() == [(20,)]
    with pytest.raises(ConfigError, match="memory:// lives in one process"):
        afn_ray.run(make_config(corpus=(str(corpus),), store="memory://other", executor="ray"))


def test_a_decoder_without_special_tokens_runs(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], tiny_gpt: Path
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:30]])
    with afn_ray.run(
        make_config(corpus=(str(corpus),), model=str(tiny_gpt), sink_factor=1.05)
    ) as run:
        assert run.sql("SELECT count(*) FROM tokens WHERE is_special").fetchall() == [(0,)]
        ((sinks,),) = run.sql(
            "SELECT n_sinks FROM thresholds WHERE population = 'tokens'"
        ).fetchall()
        assert sinks > 0
        assert run.sql("SELECT count(*) FROM tokens WHERE sink_2").fetchall() == [(sinks,)]
        words = run.sql(
            "SELECT string_agg(text, ' ' ORDER BY word) FROM words WHERE doc = 0"
        ).fetchall()
    assert words[0][0] == "In the beginning God created the heaven and the earth ."


def test_the_dry_run_estimates_and_writes_nothing(
    tmp_path: Path, make_config: MakeConfig, verses: list[str]
) -> None:
    corpus = write_jsonl(
        tmp_path / "c.jsonl", [{"text": t, "noise": "x" * 50} for t in verses[:400]]
    )
    config = make_config(corpus=(str(corpus),))
    estimate = afn_ray.dry_run(config)
    assert not Path(config.store).exists()
    with afn_ray.run(config) as run:
        counts = run.info["counts"]
        size = sum(p.stat().st_size for p in Path(config.store).rglob("*tokens.parquet"))
    assert (estimate.num_documents, estimate.documents_exact) == (400, True)
    assert estimate.num_shards == counts["shards"] and estimate.num_shards_done == 0
    assert estimate.num_bytes == corpus.stat().st_size
    assert (
        estimate.tokens_exact and estimate.tokens == counts["tokens"]
    )  # a small corpus is counted
    assert size / 4 < estimate.store_bytes < size * 4
    assert estimate.seconds is not None and estimate.seconds > 0
    again = afn_ray.dry_run(config)
    assert again.num_shards_done == counts["shards"] and again.seconds == 0
    assert (again.tokens, again.tokens_there, again.num_documents) == (
        counts["tokens"],
        counts["tokens"],
        400,
    )


def test_what_a_run_has_is_a_pandas_or_polars_frame_one_call_away(
    tmp_path: Path, make_config: MakeConfig, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:20]])
    with afn_ray.run(make_config(corpus=(str(corpus),))) as run:
        n = run.info["counts"]["tokens"]
        assert len(run.tokens().df()) == n
        assert run.tokens().pl().height == n
        assert run.vocabulary().to_arrow_table().num_rows == len(
            run.sql("FROM vocabulary").fetchall()
        )


def test_a_model_folder_that_moves_keeps_the_measure(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], tiny_bert: Path
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:20]])
    afn_ray.run(make_config(corpus=(str(corpus),))).close()
    moved = shutil.copytree(tiny_bert, tmp_path / "elsewhere")
    events: list[Event] = []
    afn_ray.run(make_config(corpus=(str(corpus),), model=str(moved)), events.append).close()
    assert events[-1].message.startswith("nothing to do")


def test_salient_words_are_those_of_the_tokens_read_one_by_one(
    tmp_path: Path, make_config: MakeConfig, minilm: Path, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:300]])
    with afn_ray.run(make_config(corpus=(str(corpus),), model=str(minilm), layers="0")) as run:
        most, least = salient.salient_words(run, 0)
        ((q3,),) = run.sql("SELECT q3 FROM thresholds WHERE population = 'tokens'").fetchall()
        words: dict[str, list[float]] = {}
        text = ""
        values: list[float] = []
        for row in [*all_rows(run, "tokens"), {"flags": SPECIAL}]:
            if row["flags"] and text:
                words.setdefault(text.lower(), []).append(float(np.mean(values)))
                text, values = "", []
            if not row["flags"] & SPECIAL:
                text += verses[row["doc"]][row["start"] : row["end"]]
                values.append(row["strength_0"])
    english = lexicon.find("en")
    assert english is not None
    shares = {
        w: np.mean(np.array(v) >= q3)
        for w, v in words.items()
        if len(v) >= salient.SALIENT_MIN_N
        and w.isalpha()
        and len(w) > 1
        and english.guess(w).name != "function"
    }
    assert len(most) == len(least) == salient.SALIENT_WORDS <= len(shares)
    for word in (*most, *least):
        assert (word.n, word.n_high / word.n) == (len(words[word.text]), shares[word.text])
        assert word.median == np.quantile(words[word.text], 0.5, method="inverted_cdf")
    assert min(w.low for w in most) > max(w.low for w in least)


def test_single_documents_of_100_megabytes_are_quarantined_and_the_others_measured(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"word " * (20 << 20))
    with (folder / "b.jsonl").open("wb") as out:
        out.write(b'{"text": "' + b"word " * (20 << 20) + b'"}\n{"text": "A small one."}\n')
    with afn_ray.run(make_config()) as run:
        status = [(d["status"], d["n_tokens"]) for d in all_rows(run, "documents")]
    assert status[0] == (
        "quarantined: document of 104857600 bytes is over max_document_bytes = 8388608",
        0,
    )
    assert status[1][0].startswith("quarantined: line of 104857612 bytes is over the limit of")
    assert status[2] == ("ok", 6)


def test_a_token_of_real_text_takes_at_most_6_bytes_and_4_without_offsets(
    tmp_path: Path, make_config: MakeConfig, minilm: Path, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:800]])
    for offsets, limit in ((True, 6), (False, 4)):
        config = make_config(
            corpus=(str(corpus),),
            model=str(minilm),
            offsets=offsets,
            shard_bytes=1 << 20,
            batch_tokens=2048,
            store=str(tmp_path / f"store-{offsets}"),
            layers="1",
        )
        with afn_ray.run(config) as run:
            ((size,),) = run.sql("SELECT sum(token_bytes) / sum(n_tokens) FROM shards").fetchall()
        assert size <= limit


# --- the reduce alone
# ------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on what loads a model, asks for a device or joins Ray fails."""

    def forbid() -> None:
        def fail(*args: Any, **named: Any) -> Any:
            raise AssertionError("the reduce alone needs no model, no device and no workers")

        monkeypatch.setattr(measurer.Measurer, "__init__", fail)
        for name in ("find_device", "calibrate", "process_shards"):
            monkeypatch.setattr(cluster, name, fail)

    return forbid


def files_below(folder: str) -> set[Path]:
    return {f for f in Path(folder).rglob("*") if f.is_file()}


def test_the_reduce_alone_gives_what_the_run_would_have_given(
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
    no_model: Callable[[], None],
) -> None:
    """A reduce uses the precision and the outlier dimensions that the
    store's calibrations found.
    """
    write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:60]])
    asked: dict[str, Any] = {
        "corpus": (str(tmp_path / "c.jsonl"),),
        "dtype": "auto",
        "signals": "trimmed",
    }
    monkeypatch.setattr(model, "has_fast_products", lambda dtype, device: dtype == "bfloat16")
    monkeypatch.setattr(precision, "CALIBRATION_TOKENS", 1000)
    whole, part = make_config(**asked, store=str(tmp_path / "whole")), make_config(**asked)
    with afn_ray.run(whole) as run:
        expected = run.info
    with monkeypatch.context() as patch:
        patch.setattr(job, "reduce_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            afn_ray.run(part)
    with pytest.raises(StoreError, match="no complete run"):
        manifest.find_run(part.store)
    no_model()
    monkeypatch.setattr(model, "has_fast_products", interrupted)  # no matter what is fast here
    events: list[str] = []
    with job.run(
        replace(part, device="cuda"), lambda e: events.append(e.message), reduce_only=True
    ) as run:
        assert run.info["measure"] == expected["measure"] and run.info["measure"]["outliers"]
        assert {k: run.info["precision"][k] for k in ("dtype", "asked")} == {
            k: expected["precision"][k] for k in ("dtype", "asked")
        }
        assert run.info["counts"] == expected["counts"] | {
            "shards_reused": expected["counts"]["shards"]
        }
        ours, theirs = manifest.find_run(part.store), manifest.find_run(whole.store)
        assert set(ours.info["tables"]) == set(theirs.info["tables"])
        for name in set(ours.info["tables"]) - {"plan", "shards"}:  # which name attempts
            assert manifest.read_table(ours, name) == manifest.read_table(theirs, name), name
    assert not any("may be slow" in event or "calibration compares" in event for event in events)


def test_the_reduce_alone_says_what_is_lacking_and_writes_nothing(
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
    no_model: Callable[[], None],
) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:120]])
    config = make_config(corpus=(str(tmp_path / "c.jsonl"),))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            afn_ray.run(config)
    no_model()
    before = files_below(config.store)
    with pytest.raises(
        IncompleteRun, match=r"store lacks 2 of 4 shards, and --reduce-only measures none; the"
    ):
        job.run(config, reduce_only=True)
    with pytest.raises(
        IncompleteRun, match=r"lacks 4 of 4 shards, .* it has none: is the config the one that"
    ):
        job.run(replace(config, layers="0"), reduce_only=True)
    for other in (replace(config, dtype="bfloat16"), replace(config, signals="trimmed")):
        with pytest.raises(
            StoreError, match="has decided the precision, the outlier dimensions, the mean states"
        ):
            job.run(other, reduce_only=True)
    assert files_below(config.store) == before

    with job.run(replace(config, allow_quarantined=2), reduce_only=True) as run:
        assert [q["reason"] for q in run.info["quarantined"]] == [job.LACKING] * 2
        assert run.info["counts"]["shards"] == 2
        ((documents,),) = run.sql("SELECT count(*) FROM documents").fetchall()
        assert documents == run.info["counts"]["documents"] < 120
    monkeypatch.undo()
    with afn_ray.run(config) as run:
        assert run.info["counts"]["shards"] == 4 and run.info["counts"]["shards_reused"] == 2
        assert run.info["counts"]["documents"] == 120


def test_a_complete_run_whose_shards_were_deleted_is_not_called_done(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "In the beginning"}])
    config = make_config(corpus=(str(corpus),))
    with afn_ray.run(config) as run:
        expected = run.tokens().fetchall()
    (commit,) = Path(config.store).rglob("commit.json")
    shutil.rmtree(commit.parent)
    with pytest.raises(
        StoreError, match=r"1 of its shards are gone from the store.*delete .*/run\.json"
    ):
        afn_ray.run(config)
    Path(run.uri, "run.json").unlink()
    with afn_ray.run(config) as run:
        assert run.tokens().fetchall() == expected


# --- what lies in a store and is not a run's
# -------------------------------------------------------------


def _lie_about(store: Path, first: str, what: str) -> list[Path]:
    """Put foreign things into ``store``, whose only run is ``first``; returns what must stay as it
    is.
    """
    runs = store / "runs"
    if what == "year 9999":
        (runs / first).rename(runs / f"99991231T235959.999Z-{first.partition('-')[2]}")
        return [runs / f"99991231T235959.999Z-{first.partition('-')[2]}"]
    names = [f"old-{first}", "my copy of a run", f"29990101T000000.000Z-{first.partition('-')[2]}"]
    copies = [shutil.copytree(runs / first, runs / name) for name in names]
    (runs / "latest").symlink_to(first)
    for name in (
        "29980101T000000.000Z-0123456789ab",
        "notes",
        "~20260101T000000.000Z-0123456789ab",
    ):
        (runs / name).write_text("of mine")
    (measure,) = (store / "shards").iterdir()
    (store / "shards" / "notes").write_text("of mine")
    (store / "shards" / "latest").symlink_to(measure.name)
    (measure / "notes").write_text("of mine")
    return [*copies, runs / "notes", store / "shards" / "notes"]


@pytest.mark.parametrize("what", ["year 9999", "copies, files and links"])
def test_foreign_names_in_a_store_are_listed_and_left_alone(
    what: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    config = make_config(corpus=(str(tmp_path / "corpus"),), thresholds=None)
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [{"text": "The LORD is my shepherd."}] * 5)
    with afn_ray.run(config) as run:
        first = run.id
    store = Path(config.store)
    kept = _lie_about(store, first, what)
    held = {
        file: file.read_bytes()
        for top in kept
        for file in ([top] if top.is_file() else top.iterdir())
    }
    write_jsonl(tmp_path / "corpus" / "b.jsonl", [{"text": "I shall not want."}] * 5)
    with afn_ray.run(config) as run:
        assert run.sql("SELECT count(*) FROM documents").fetchall() == [(10,)]
        assert run.id != first and run.id[:4] == str(datetime.now(UTC).year)
    with afn_ray.run(config) as again:
        assert again.id == run.id
    with afn_ray.open_run(config.store) as newest:
        assert newest.id == run.id
    assert {s.body["run"] for s in status.read_status(config.store)} <= {first, run.id}
    found = verify.verify_store(config.store)
    assert not found.findings
    assert {str(file) for file in held} <= set(found.foreign)
    for command in ("status", "show", "verify", "gc"):
        with pytest.raises(SystemExit, match="0"):
            commands.main([command, config.store])
    garbage.collect_garbage(config.store, keep=1, min_age_h=0, delete=True)
    assert {file: file.read_bytes() for file in held} == held
    with afn_ray.open_run(config.store) as newest:
        assert newest.sql("SELECT count(*) FROM tokens").fetchall()[0][0] > 0


def test_a_store_inside_its_corpus_folder_is_left_out_of_the_corpus(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    folder = tmp_path / "corpus"
    (folder / "texts").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    texts = [write_jsonl(folder / "texts" / "a.jsonl", [{"text": "Selah."}])]
    config = make_config(
        store=str(folder / "results"), format="jsonl", screen=0
    )  # whatever the ending
    with afn_ray.run(config) as first:
        pass
    with afn_ray.run(config) as again:
        assert again.id == first.id
    texts.append(write_jsonl(folder / "texts" / "b.jsonl", [{"text": "Amen."}]))
    (folder / "elsewhere" / "afn-scratch-x").mkdir(parents=True)
    (folder / "elsewhere" / "afn-scratch-x" / "tokens.parquet").write_bytes(b"")
    with afn_ray.run(config) as run:
        assert run.sql(
            "SELECT count(*), count(*) FILTER (status = 'ok') FROM documents"
        ).fetchall() == [(2, 2)]
        files = manifest.read_table(manifest.find_run(run.uri), "files")
    assert re.fullmatch(
        r"\d\d files \(.*\) of a store", losses.describe_skipped(losses.skipped_files(files))
    )
    for pattern in (folder, f"{folder}/**", tmp_path / "link", f"{folder}/[er]*/**"):
        for store in (
            folder / "results",
            tmp_path / "another",
        ):  # its own, and then it is another's
            asked = replace(config, corpus=(str(pattern), str(folder / "texts")), store=str(store))
            plan = make_plan(asked)
            assert {os.path.realpath(f.uri) for f in plan.files} == {str(text) for text in texts}, (
                pattern
            )
    with pytest.raises(
        CorpusError, match=r"corpus .*texts is in the store .*corpus; give a --store"
    ):
        afn_ray.run(replace(config, corpus=(str(folder / "texts"),), store=str(folder)))
    with pytest.raises(CorpusError, match="files found are of an afn-ray store"):
        afn_ray.run(
            replace(
                config, corpus=(f"{folder}/results/runs/*/*.parquet",), store=str(tmp_path / "s")
            )
        )
