"""Losses of a run are added up by file, whatever the order of the sums, and said in words."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

import afn_ray
from afn_ray.analysis import verify
from afn_ray.config import RunConfig
from afn_ray.corpus_values import FileInfo, FileSlice, ReadOptions, Shard
from afn_ray.errors import ShardError
from afn_ray.reduce import compare, losses
from afn_ray.reduce.shards import CommittedShards
from afn_ray.run_info import RunInfo
from afn_ray.runs import results, status, worker
from afn_ray.runs.events import Complete, Event, Warned
from afn_ray.schema import FILES_SCHEMA
from afn_ray.show import run_facts, summary
from afn_ray.store import checksums, manifest, plans, shard_files
from conftest import MakeConfig, config_of, write_jsonl

COLUMNS = ("lost_bytes", "n_quarantined", "lost_documents", "lost_unknown", "n_replaced")


def corpus_of_losses(folder: Path, verses: Sequence[str]) -> Path:
    """Files that are whole, hurt a little, cut, and lost, and one that is no corpus."""
    folder.mkdir()
    texts = [{"text": verse} for verse in verses]
    write_jsonl(folder / "a.jsonl", texts[:40])
    write_jsonl(folder / "b.jsonl", [*texts[40:60], "{broken", {"no": "text"}, *texts[60:80]])
    whole = gzip.compress(write_jsonl(folder / "c", texts[:300]).read_bytes())
    (folder / "c").rename(folder / "c.pdf")
    (folder / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "d.parquet").write_bytes(b"this is not parquet, and never was")
    (folder / "e.txt").write_bytes(b"one line of text that is good, and ends badly \xff\xfe")
    return folder


@pytest.fixture(scope="module")
def lossy(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> tuple[RunConfig, list[str]]:
    """A run over such a corpus, and what its end says."""
    folder = tmp_path_factory.mktemp("losses")
    corpus = corpus_of_losses(folder / "corpus", verses)
    config = config_of(tiny_bert, corpus, folder / "store", layers="2", shard_bytes=3000)
    return config, said_by_a_run(config)


def said_by_a_run(config: RunConfig) -> list[str]:
    events: list[Event] = []
    afn_ray.run(config, events.append).close()
    return [e.message for e in events if isinstance(e, Warned | Complete)]


def by_name(table: pa.Table) -> dict[str, dict[str, Any]]:
    return {Path(row["source"]).name: row for row in table.to_pylist()}


def test_files_sources_shards_commits_and_run_agree_on_what_was_lost(
    lossy: tuple[RunConfig, list[str]],
) -> None:
    config, _ = lossy
    with afn_ray.open_run(config.store) as run:
        documents = run.sql("FROM documents").to_dicts()
        files = by_name(run.sql("FROM files").to_arrow_table())
        sources = by_name(run.sql("FROM sources WHERE layer = 2").to_arrow_table())
        shards = run.sql("FROM shards").to_dicts()
        counts = run.info["counts"]
    expected: dict[str, Counter[str]] = {
        name: Counter() for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz", "d.parquet", "e.txt")
    }
    for row in documents:
        bad = row["status"].startswith("quarantined")
        expected[Path(row["source"]).name].update(
            n_documents=1,
            n_quarantined=bad,
            lost_bytes=row["lost_bytes"],
            n_replaced=row["n_replaced"],
            lost_documents=row["lost_documents"] or 0,
            lost_unknown=row["lost_documents"] is None,
        )
    assert files.keys() - {"c.pdf"} == sources.keys() == expected.keys()
    for name, sums in expected.items():
        size = Path(files[name]["source"]).stat().st_size
        of_file = {column: sums[column] for column in COLUMNS}
        for got in (files[name], sources[name]):
            assert {column: got[column] for column in COLUMNS} == of_file
        assert files[name]["bytes"] == sources[name]["bytes"] == files[name]["num_bytes"] == size
        assert sources[name]["n_documents"] == sums["n_documents"]
        assert (
            files[name]["share_read"]
            == sources[name]["share_read"]
            == max(0, 1 - sums["lost_bytes"] / size)
        )
        assert not files[name]["is_skipped"]
    for name in ("lost_bytes", "lost_documents", "lost_unknown"):
        assert (
            counts[name] == sum(s[name] for s in expected.values()) == sum(s[name] for s in shards)
        )
    assert (
        counts["replaced"]
        == sum(s["n_replaced"] for s in expected.values())
        == sum(s["n_replaced"] for s in shards)
    )
    assert files["a.jsonl"]["share_read"] == 1 and expected["b.jsonl"]["n_quarantined"] == 2
    assert expected["e.txt"]["n_replaced"] == 2
    skipped = files["c.pdf"]
    assert skipped["is_skipped"] and skipped["share_read"] == 0
    assert (
        skipped["bytes"] == run.info["corpus"]["skipped_bytes"] > 0
        and run.info["corpus"]["skipped"] == 1
    )
    assert not verify.verify_store(config.store).findings


def test_the_sums_are_the_same_for_any_grouping(
    lossy: tuple[RunConfig, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = lossy[0].store
    run = manifest.find_run(store)
    shards, _ = plans.read_shards(run)
    measure_id = run.info["measure"]["id"]
    found = shard_files.find_commits(store, measure_id, shards)
    stored = manifest.read_table(run, "files")
    monkeypatch.setattr("afn_ray.reduce.tasks.FAN_IN", 2)
    committed = CommittedShards(
        store, measure_id, [found[s.id] for s in shards], [s.num_bytes for s in shards]
    )
    again = losses.files_table(committed, shards, losses.skipped_files(stored))
    assert len(shards) > 4 and again.equals(stored)


def test_the_end_of_a_run_says_what_was_lost_each_time(lossy: tuple[RunConfig, list[str]]) -> None:
    config, said = lossy
    for messages in (said, said_by_a_run(config)):  # the second time there is nothing to do
        lost, encoding = messages[-2:]
        assert lost.startswith("warning: lost: ") and " in 3 files: " in lost
        assert "d.parquet (0% read)" in lost and lost.endswith("; 2 documents or more")
        assert encoding.startswith("warning: encoding: ")
        assert "replaced: 2 characters in 1 file: e.txt" in messages
        assert any(
            text.startswith("skipped: 1 file (") and text.endswith(": c.pdf") for text in messages
        )


def test_text_that_the_tokenizer_does_not_know_is_a_warning_each_time_and_in_show(
    tmp_path: Path, make_config: MakeConfig, verses: list[str]
) -> None:
    thai = "\u0e44\u0e17\u0e22 " * 9
    texts = [*verses[:5], *[thai] * 30]
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    config = make_config(corpus=(str(corpus),))
    for _ in range(2):
        (unknown,) = (
            text for text in said_by_a_run(config) if text.startswith("warning: unknown: ")
        )
        assert unknown.startswith("warning: unknown: 270 of ") and " are [UNK], which" in unknown
    run = manifest.find_run(config.store)
    assert run.info["unknown"] == {"token": "[UNK]", "tokens": 270}
    assert dict(run_facts.facts(summary.summarise(run)))["unknown"] == unknown.removeprefix(
        "warning: unknown: "
    )
    for altered in (
        {},
        {"unknown": 1},
        {"unknown": {"tokens": "x"}},
        {"unknown": {"tokens": 10**9}},
    ):
        info = {key: value for key, value in run.info.items() if key != "unknown"} | altered
        assert losses.describe_unknown(cast(RunInfo, info)) == ""


def test_a_shard_that_was_given_up_is_lost_with_all_its_bytes(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    for name in "ab":
        write_jsonl(
            tmp_path / "corpus" / f"{name}.jsonl", [{"text": verse} for verse in verses[:20]]
        )
    process = worker.Processor.process

    def fail(self: Any, shard: Any, oom_retries: int = 0) -> Any:
        if any(piece.uri.endswith("b.jsonl") for piece in shard.slices):
            raise ShardError("no")
        return process(self, shard, oom_retries)

    monkeypatch.setattr(worker.Processor, "process", fail)
    with afn_ray.run(make_config(shard_bytes=2000, allow_quarantined=9)) as run:
        files = by_name(run.sql("FROM files").to_arrow_table())
    size = (tmp_path / "corpus" / "b.jsonl").stat().st_size
    assert (files["b.jsonl"]["lost_bytes"], files["b.jsonl"]["lost_documents"]) == (size, 20)
    assert files["b.jsonl"]["share_read"] == 0 and files["a.jsonl"]["lost_bytes"] == 0
    counts, found = run.info["counts"], losses.of_run(manifest.find_run(run.uri))
    assert (counts["lost_bytes"], counts["lost_documents"], counts["lost_unknown"]) == (
        found.lost_bytes,
        found.lost_documents,
        found.lost_unknown,
    )
    (shown,) = status.read_status(run.uri)
    assert shown.body["bytes_lost"] == found.lost_bytes > 0
    written = json.loads(Path(run.uri, "status.json").read_text())
    assert written["bytes_lost"] == found.lost_bytes  # as it was counted while it ran
    assert not verify.verify_store(run.uri.rpartition("/runs/")[0]).findings


def test_a_run_json_holds_whatever_number_of_shards_was_given_up() -> None:
    piece = FileSlice("/c/" + "x" * 200, 1, "time:1", "jsonl", "", 0, 1, 1, 1, "0" * 64)
    options = ReadOptions("jsonl", "text", None, "file", 1000)
    shards = [Shard(f"{i:032x}", (piece,), options) for i in range(100_000)]
    found = results.given_up(shards, {s.id: "\U0001f600" * 5000 for s in shards})
    assert [f["shard"] for f in found] == [s.id for s in shards]
    assert all(f["uri"] == piece.uri and f["reason"] for f in found[: results.MOST_REASONS])
    assert len(checksums.checksummed({"quarantined": found})) < checksums.JSON_BYTES // 2


def test_a_comparison_says_which_run_lost_what(lossy: tuple[RunConfig, list[str]]) -> None:
    notes = compare.compare(lossy[0].store, lossy[0].store).notes
    said = losses.describe(losses.of_run(manifest.find_run(lossy[0].store)))
    assert f"A lost {said}." in notes and f"B lost {said}." in notes


# --- in words
# --------------------------------------------------------------------------------------------


def made(*rows: dict[str, Any]) -> pa.Table:
    nothing = dict.fromkeys(FILES_SCHEMA.names, 0) | {"share_read": 1.0, "is_skipped": False}
    return pa.Table.from_pylist([nothing | row for row in rows], FILES_SCHEMA)


def test_the_worst_are_named_and_the_others_counted() -> None:
    rows = [
        {
            "source": f"/c/{i}.gz",
            "num_bytes": 1_000_000,
            "lost_bytes": 10**i,
            "share_read": 1 - 10**i / 10**6,
            "n_quarantined": 1,
            "lost_documents": i,
        }
        for i in range(7)
    ]
    found = losses.total(made(*rows))
    assert losses.describe(found) == (
        "1.1 MB of 7.0 MB (15.9%) in 7 files: 6.gz (0% read), 5.gz (90% read), 4.gz (99% read), "
        "3.gz (99.9% read), 2.gz (99.9% read), and 2 more; 21 documents"
    )
    unknown = losses.total(
        made(*rows, {"source": "/d/1.gz", "lost_unknown": 1, "n_quarantined": 1})
    )
    assert losses.describe(unknown).endswith("; 21 documents or more")


def test_nothing_lost_is_nothing_said() -> None:
    found = losses.total(made({"source": "/c/a.txt", "num_bytes": 9}))
    assert not found.any and found.share == 0
    assert (
        losses.describe(found)
        == losses.describe_replaced(found)
        == losses.describe_skipped([])
        == ""
    )


def test_files_of_one_name_are_told_apart() -> None:
    rows = [
        {"source": f"/c/{i}/a.gz", "num_bytes": 9, "lost_bytes": 9, "lost_unknown": 1}
        for i in range(2)
    ]
    assert losses.describe(losses.total(made(*rows))) == (
        "18 bytes of 18 bytes (100%) in 2 files: /c/0/a.gz (100% read), /c/1/a.gz (100% read); "
        "nobody can tell how many documents"
    )
    files = [FileInfo(f"/c/{i}.pdf", 10**i, "") for i in range(7)]
    assert losses.describe_skipped(files) == (
        "7 files (1.1 MB) with an ending that is no known format: 0.pdf, 1.pdf, 2.pdf, 3.pdf, "
        "4.pdf, and 2 more"
    )
    own = FileInfo("/c/store/runs/20261122T010203.004Z-abcdef012345/run.json", 5, "")
    assert losses.describe_skipped([own]) == "1 file (5 bytes) of a store"
    assert losses.describe_skipped([own, *files[:1]]) == (
        "1 file (1 byte) with an ending that is no known format: 0.pdf; 1 file (5 bytes) of a store"
    )


@pytest.mark.parametrize(
    ("n", "said"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (43_210, "43 kB"),
     (9_990_000, "10 MB"),
     (1_234_567, "1.2 MB"), (5 * 10**15, "5.0 PB"), (5 * 10**19, "50,000 PB")],
)  # fmt: skip
def test_numbers_of_bytes_are_short_and_have_a_unit(n: int, said: str) -> None:
    assert losses.bytes_text(n) == said
