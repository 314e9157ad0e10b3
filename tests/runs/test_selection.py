"""A first look: a sample, a condition and a limit select documents, and nothing else changes."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import afn_ray
from afn_ray import token_rows
from afn_ray.analysis import verify
from afn_ray.cli import estimates
from afn_ray.config import RunConfig
from afn_ray.corpus import first, listing
from afn_ray.corpus_values import FileInfo, FileSlice
from afn_ray.errors import ConfigError, CorpusError
from afn_ray.measure import Measure
from afn_ray.reduce import history
from afn_ray.reduce.compare import compare
from afn_ray.runs import estimate, plan
from afn_ray.runs.events import Event
from afn_ray.show.run_facts import facts
from afn_ray.show.summary import summarise
from afn_ray.store import label_thresholds, manifest, series, series_runs
from afn_ray.store.commits import UNSELECTED
from afn_ray.token_rows import LabelThresholds
from conftest import config_of, stop_after, write_jsonl
from nights import complete

LANGUAGES = ("de", "en", None)
NUM_ROWS = 40
"""Documents of each file."""
CONFIG: dict[str, Any] = {
    "layers": "2",
    "shard_bytes": 2048,
    "keep_columns": "lang,year:int64",
    "language": "en",
    "screen": 0,
}


def rows_of(verses: list[str], at: int) -> list[dict[str, Any]]:
    """The documents of file number ``at``."""
    texts = verses[at * NUM_ROWS : (at + 1) * NUM_ROWS]
    return [
        {"text": text, "lang": LANGUAGES[i % 3], "year": 2000 + i} for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, verses: list[str]) -> Path:
    """A corpus of each way to read a file: lines, compressed lines, CSV, Parquet, and bad rows."""
    folder = tmp_path_factory.mktemp("corpus")
    bad = ["{not json", {"text": None, "lang": "de"}, {"text": "", "lang": "de"}, {"text": ""}]
    write_jsonl(folder / "a.jsonl", [*rows_of(verses, 0), *bad, {"text": "odd", "year": "n/a"}])
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(verses, 1))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    with (folder / "c.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "lang", "year"])
        table.writeheader()
        table.writerows(rows_of(verses, 2))
    pq.write_table(pa.Table.from_pylist(rows_of(verses, 3)), folder / "d.parquet", row_group_size=7)
    return folder


Rows = list[dict[str, Any]]


def look(run: afn_ray.Run) -> tuple[Rows, dict[int, Rows]]:
    """The documents of ``run`` and the tokens of each."""
    documents = run.sql("SELECT * FROM documents ORDER BY doc").to_arrow_table().to_pylist()
    tokens: dict[int, Rows] = {}
    columns = (
        'doc, position, token_id, surface, is_special, is_word_start, start, "end", strength_2'
    )
    found = run.sql(f"SELECT {columns} FROM tokens ORDER BY doc, position").to_arrow_table()
    for row in found.to_pylist():
        tokens.setdefault(row.pop("doc"), []).append(row)
    return documents, tokens


Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def make(folder: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A config over the corpus, with a store of its own."""

    def make(**changes: Any) -> RunConfig:
        store = tmp_path_factory.mktemp("store")
        return config_of(tiny_bert, folder, store, **(CONFIG | changes))

    return make


@pytest.fixture(scope="module")
def whole(make: Make) -> tuple[RunConfig, Rows, dict[int, Rows]]:
    """The run over all documents."""
    config = make()
    with afn_ray.run(config) as run:
        return config, *look(run)


def drawn(documents: Rows, percent: float) -> list[int]:
    """The documents that a sample has, by the rule in the guide."""
    found = []
    for row in documents:
        name = row["doc_id"] or f"{row['source']}:{row['offset']}"
        number = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)
        if row["lost_documents"] not in (0, 1) or number < percent / 100 * 2**64:
            found.append(row["doc"])
    return found


def where(documents: Rows, holds: Callable[[Any, Any], bool]) -> list[int]:
    """Documents whose columns are as needed, and the one that cannot be parsed."""
    return [
        row["doc"]
        for row in documents
        if "not JSON" in row["status"] or holds(row["lang"], row["year"])
    ]


def is_german(lang: str | None, year: int | None) -> bool:
    return lang == "de"


SELECTIONS: dict[str, tuple[dict[str, Any], Callable[[Rows], list[int]]]] = {
    "sample": ({"sample": "20%"}, lambda rows: drawn(rows, 20)),
    "where": ({"where": "lang = 'de'"}, lambda rows: where(rows, is_german)),
    "limit in lines": ({"limit": 33}, lambda rows: list(range(33))),
    "limit in gzip": ({"limit": 60}, lambda rows: list(range(60))),
    "limit in CSV": ({"limit": 100}, lambda rows: list(range(100))),
    "limit in Parquet": ({"limit": 139}, lambda rows: list(range(139))),
    "all three": (
        {"where": "lang = 'de'", "sample": "50%", "limit": 17},
        lambda rows: sorted({*where(rows, is_german)} & {*drawn(rows, 50)})[:17],
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_has_rows_of_the_whole_run_bit_for_bit(
    name: str, make: Make, whole: tuple[RunConfig, Rows, dict[int, Rows]]
) -> None:
    _, documents, tokens = whole
    changes, expected = SELECTIONS[name]
    chosen = expected(documents)
    assert 0 < len(chosen) < len(documents)
    config = make(**changes)
    with afn_ray.run(config) as run:
        counts, corpus = run.info["counts"], run.info["corpus"]
        assert counts["documents"] == len(chosen)
        some, their_tokens = look(run)
        measure = run.info["measure"]["id"]
    for new, doc in enumerate(chosen):
        assert some[new] | {"doc": doc} == documents[doc]
        assert their_tokens.get(new) == tokens.get(doc)
    assert len(some) == len(chosen)
    assert not verify.verify_store(config.store).findings
    if "limit" not in changes:
        assert not corpus["unread_bytes"] and counts["unselected"] + len(chosen) == len(documents)
    else:
        assert corpus["unread_bytes"] > 0 and ("unselected" in counts) == ("where" in changes)
    with afn_ray.open_run(whole[0].store) as full:
        assert full.info["measure"]["id"] == measure


def test_what_is_left_out_is_counted_and_named(make: Make) -> None:
    ended: list[str] = []

    def keep(event: Event) -> None:
        ended.append(getattr(event, "message", ""))

    config = make(where="year < 2001", limit=4)
    with afn_ray.run(config, keep) as run:
        shown = dict(facts(summarise(manifest.find_run(run.uri))))
        counts = run.info["counts"]
    selected = next(line for line in ended if line.startswith("selected: "))
    assert "the first 4, where year < 2001; left out " in selected
    # of a.jsonl a row has null and one has no year, which a null makes unknown
    assert f"{counts['unselected_unknown']:,} of them because a null" in selected
    assert "after the limit were not read, with 1 file from " in selected
    assert shown["selected"] == selected.removeprefix("selected: ")


def test_rows_that_cannot_be_read_are_not_left_out(make: Make) -> None:
    with afn_ray.run(make(where="lang = 'de'")) as run:
        (status,) = run.sql("SELECT status FROM documents WHERE status LIKE '%JSON%'").fetchall()
        counts = run.info["counts"]
    assert "quarantined" in status[0]
    assert counts["quarantined"] == 2 and counts["lost_bytes"] > 0


def test_a_sample_is_the_same_for_any_cut_and_order_of_files(
    make: Make, folder: Path, whole: tuple[RunConfig, Rows, dict[int, Rows]]
) -> None:
    expected = {row["doc_id"] for row in whole[1] if row["doc"] in drawn(whole[1], 20)}
    files = sorted(map(str, folder.iterdir()), reverse=True)
    config = make(sample="0.20", shard_bytes=100_000, corpus=tuple(files))
    with afn_ray.run(config) as run:
        found = {row["doc_id"] for row in look(run)[0]}
    assert found == expected
    larger = {row["doc_id"] for row in whole[1] if row["doc"] in drawn(whole[1], 30)}
    assert found < larger


def test_a_whole_run_after_a_first_look_is_as_in_a_new_store(
    make: Make, whole: tuple[RunConfig, Rows, dict[int, Rows]]
) -> None:
    config = make(sample="20%")
    afn_ray.run(config).close()
    limited = RunConfig(**(config_values(config) | {"sample": None, "limit": 20}))
    with afn_ray.run(limited) as run:
        assert run.info["counts"]["shards_reused"] == 0  # a sample's shards are of no other run
        whole_shards = run.info["counts"]["shards"] - 1  # the last one is cut
    full = RunConfig(**(config_values(config) | {"sample": None}))
    with afn_ray.run(full) as run:
        assert run.info["counts"]["shards_reused"] == whole_shards > 0
        assert look(run) == whole[1:]
    assert not verify.verify_store(config.store).findings


def config_values(config: RunConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in RunConfig.__dataclass_fields__}


def test_a_stopped_first_look_resumes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(limit=70, where="year >= 2010")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(patched, 1)
        afn_ray.run(config)
    with afn_ray.run(config) as run:
        assert run.info["counts"]["documents"] == 70
        assert run.info["counts"]["shards_reused"] == 1


def test_a_limit_reads_no_more_than_it_needs(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"text": f"word {i} " * 40} for i in range(2000)]
    large = write_jsonl(tmp_path / "a.jsonl", lines)
    (tmp_path / "b.jsonl").write_text("never read: no such column\n")
    config = config_of(
        tiny_bert, tmp_path / "*.jsonl", tmp_path / "store", limit=7, shard_bytes=4096
    )
    found = plan.make_plan(config)
    (shard,) = found.shards
    assert shard.num_bytes < 8192 and [piece.limit for piece in shard.slices] == [-1] * len(
        shard.slices
    )
    assert sum(piece.num_documents for piece in shard.slices) == 7
    rest = large.stat().st_size - shard.slices[-1].end + (tmp_path / "b.jsonl").stat().st_size
    assert found.unread.num_bytes == rest and found.unread.num_files == 1


def test_a_limit_cuts_a_compressed_file_where_its_documents_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afn_ray.corpus.streams.BLOCK_BYTES", 4096)
    data = b"".join(b'{"text": "%x"}\n' % (i * 7919**9 % 10**40) for i in range(20_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    config = config_of(tmp_path, tmp_path / "a.jsonl.gz", tmp_path / "store", limit=100)
    (shard,) = plan.make_plan(config).shards
    (piece,) = shard.slices
    assert piece.limit == piece.num_documents == 100
    assert piece.end == 4096 < piece.size  # what a decoder asked for, in blocks


def test_a_limit_reports_the_files_that_it_reads(make: Make) -> None:
    reported: list[tuple[int, int]] = []
    config = make(limit=10)
    found = plan.make_plan(config, lambda done, total: reported.append((done, total)))
    num_read = len(found.files) - found.unread.num_files
    assert reported == [(i, len(found.files)) for i in range(num_read)]


def test_a_limit_over_the_corpus_is_the_whole_corpus(make: Make) -> None:
    config = make(limit=10**9)
    of_all = plan.make_plan(RunConfig(**(config_values(config) | {"limit": None})))
    found = plan.make_plan(config)
    assert found.shards == of_all.shards and not found.unread.num_bytes


def test_a_plan_with_a_limit_is_remembered_by_no_other(make: Make) -> None:
    config = make(limit=10)
    afn_ray.run(config).close()
    full = RunConfig(**(config_values(config) | {"limit": None}))
    new = make()
    assert plan.make_plan(full).shards == plan.make_plan(new).shards


def test_a_limited_plan_is_the_same_after_a_whole_run(make: Make) -> None:
    config = make()
    changes = {"limit": 60}
    before = plan.make_plan(RunConfig(**(config_values(config) | changes)))
    afn_ray.run(config).close()
    after = plan.make_plan(RunConfig(**(config_values(config) | changes)))
    assert after.shards == before.shards


def test_a_dry_run_counts_what_is_selected_and_lost_as_its_run_does(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(where="lang = 'de'", sample="99%", record="summaries")
    found = estimate.dry_run(config)
    with afn_ray.run(config) as run:
        counts = run.info["counts"]
    for name in ("documents", "empty", "quarantined", "replaced", *UNSELECTED):
        assert found.counts.get(name, 0) == counts[name], name
    assert counts["unselected"]
    estimates.print_estimate(found, Console(highlight=False, soft_wrap=True, width=1000))
    text = capsys.readouterr().out
    assert f"; left out {counts['unselected']} documents (" in text
    assert ("quarantined, as in" in text) == bool(counts["quarantined"])  # by chance of the paths
    assert f"recorded {token_rows.describe(config.record)}\n" in text
    assert found.tokens_exact and found.tokens == counts["tokens"]
    assert found.num_documents == counts["documents"]
    assert found.selection == "a sample of 99%, where lang = 'de'"


@pytest.mark.parametrize(("encoding", "asked"), [("utf-16", None), ("cp1252", "cp1252")])
def test_the_estimate_of_the_first_documents_of_a_large_file_ends_with_them(
    encoding: str,
    asked: str | None,
    make: Make,
    tmp_path: Path,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("afn_ray.tokens.counting.EXACT_BYTES", 1)
    corpus = tmp_path / "a.txt"
    corpus.write_text("".join(f"{verse}\n" for verse in verses[:6000]), encoding, "replace")
    look = {"txt_documents": "line", "keep_columns": None, "limit": 1000, "encoding": asked}
    config = make(corpus=(str(corpus),), shard_bytes=1 << 20, **look)
    found = estimate.dry_run(config)
    monkeypatch.undo()
    exact = estimate.dry_run(config)
    assert exact.tokens_exact and not found.tokens_exact
    assert abs(found.tokens / exact.tokens - 1) < 0.1


@pytest.mark.parametrize("changes", [{"sample": "10%"}, {"where": "lang = 'de'"}])
def test_the_estimate_of_a_large_corpus_has_what_is_selected(
    changes: dict[str, Any],
    make: Make,
    tmp_path: Path,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its draws are fixed: the folder's name, which seeds them and is another in each run, would
    leave an interval in twenty without the number.
    """
    monkeypatch.setattr("afn_ray.tokens.counting.EXACT_BYTES", 1)
    monkeypatch.setattr("afn_ray.tokens.counting.fingerprint", lambda _: "7")
    rows = [
        {"id": f"{i}", "text": t, "lang": LANGUAGES[i % 3]} for i, t in enumerate(verses[:6000])
    ]
    corpus = str(write_jsonl(tmp_path / "a.jsonl", rows))
    columns = {"keep_columns": "lang", "id_column": "id"}
    config = make(corpus=(corpus,), shard_bytes=1 << 20, **columns, **changes)
    found = estimate.dry_run(config)
    monkeypatch.undo()
    exact = estimate.dry_run(config)
    assert exact.tokens_exact and not found.tokens_exact
    assert found.tokens_low <= exact.tokens <= found.tokens_high < 2 * exact.tokens
    assert not found.documents_exact
    assert abs(found.num_documents / exact.num_documents - 1) < 0.25
    read, of_all = found.counts, exact.counts
    num_read = read["documents"] + read["unselected"]
    share = of_all["unselected"] / (of_all["documents"] + of_all["unselected"])
    assert num_read and abs(read["unselected"] / num_read - share) < 0.1
    estimates.print_estimate(found, Console(highlight=False, soft_wrap=True, width=1000))
    assert f" among {num_read:,} documents that were read" in capsys.readouterr().out


def test_a_selection_is_a_series_of_its_own() -> None:
    config = {"corpus": ["c"], "series": None}
    name = series.name_of("/s", config)
    for more in ({"limit": 5}, {"sample": "1%"}, {"where": "lang = 'de'"}):
        assert series.name_of("/s", config | more) != name
    assert series.name_of("/s", config | {"series": "n", "limit": 5}) == "n"


def test_a_first_look_does_not_stand_in_for_a_whole_corpus(make: Make) -> None:
    """Series where a store is named, or a series has a name."""
    config = make()
    with afn_ray.run(config) as run:
        whole = manifest.find_run(run.uri)
    with afn_ray.run(RunConfig(**(config_values(config) | {"limit": 20}))) as run:
        look = manifest.find_run(run.uri)
    assert history.of_store(config.store).series == series_runs.series_of(whole)
    assert history.of_store(look.uri).series == series_runs.series_of(look)
    notes = compare(look, whole).notes
    assert "Other documents were selected: of A the first 20, of B all." in notes
    measure = Measure.of_dict(look.info["measure"])

    def frozen(**changes: Any) -> list[LabelThresholds]:
        asked = RunConfig(**(config_values(config) | changes))
        return label_thresholds.find_frozen(asked, measure)

    with pytest.raises(ConfigError, match=r'latest run .* measured "the first 20" alone: name'):
        frozen(thresholds=config.store)
    for found in (frozen(thresholds=look.uri), frozen(thresholds=config.store, limit=20)):
        assert found == label_thresholds.frozen_rows(look)


def test_a_limit_that_is_not_reached_is_no_first_look(make: Make) -> None:
    config = make()
    runs = []
    for limit in (None, 1_000_000):
        with afn_ray.run(RunConfig(**(config_values(config) | {"limit": limit}))) as run:
            runs.append(manifest.find_run(run.uri))
    whole, limited = runs
    assert not any("Other documents" in note for note in compare(limited, whole).notes)
    assert history.of_store(config.store).series == series_runs.series_of(limited)
    asked = RunConfig(**(config_values(config) | {"thresholds": config.store}))
    found = label_thresholds.find_frozen(asked, Measure.of_dict(limited.info["measure"]))
    assert found == label_thresholds.frozen_rows(limited)


def test_a_named_series_compares_runs_of_one_selection(tmp_path: Path) -> None:
    """The day in a condition is no other selection."""
    selections: tuple[dict[str, Any], ...]
    selections = ({}, {"limit": 5}, {"where": "d = '2026-11-01'"}, {"where": "d = '2026-11-02'"})
    first = datetime(2026, 11, 22, tzinfo=UTC)
    runs = [
        complete(tmp_path, first + timedelta(hours=i), series="n", **selections[i % 4])
        for i in range(8)
    ]
    for at, expected in ((4, [0]), (5, [1]), (6, [3, 2]), (7, [6, 3, 2])):
        found = series_runs.alike(runs[at], runs[at].id)
        assert list(found) == [runs[i] for i in expected]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"where": "lang = 'xx'"}, r"no document meets lang = 'xx' \(40 do not"),
        ({"sample": "0.0001%"}, r"no document is in the sample of 0.0001% \(40 are not\)"),
        ({"where": "lang = 'xx'", "sample": "50%"}, "and is in the sample of 50%"),
    ],
)
def test_a_selection_of_nothing_says_what_was_asked(
    changes: dict[str, Any], expected: str, make: Make
) -> None:
    config = make(**changes, corpus=(make().corpus[0] + "/c.csv",))
    for do in (afn_ray.dry_run, afn_ray.run):
        with pytest.raises(CorpusError, match=expected):
            do(config)


def test_first_documents_without_text_are_counted_as_what_they_are(
    make: Make, tmp_path: Path
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": ""}, {"text": None}, {"text": "a word"}])
    config = make(corpus=(str(corpus),), keep_columns=None, limit=2)
    expected = r"(?s)2 documents, 1 empty, 1 quarantined:.*text is null"
    for do in (afn_ray.dry_run, afn_ray.run):
        with pytest.raises(CorpusError, match=expected):
            do(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sample": "0%"}, "above 0 and below 1"),
        ({"sample": "100%"}, "above 0 and below 1"),
        ({"limit": 0}, "at least 1"),
        ({"where": "licence = 'mit'"}, "not in keep_columns"),
        ({"where": "lang = 'de'", "keep_columns": None}, "none is kept"),
    ],
)
def test_a_wrong_selection_is_refused(changes: dict[str, Any], expected: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=expected):
        make(**changes)


def test_a_column_that_no_file_has_is_refused_before_the_run(make: Make) -> None:
    config = make(keep_columns="language_code", where="language_code = 'de'")
    with pytest.raises(CorpusError, match=r"no column 'language_code' .* they have: .*lang"):
        afn_ray.run(config)


def test_cutting_goes_file_by_file(folder: Path, make: Make) -> None:
    """A file beyond the limit is not opened."""
    options = make().read_options
    files, _ = listing.list_files([str(folder)], options)
    opened: list[str] = []

    def cut(file: FileInfo) -> Any:
        opened.append(file.uri)
        return listing.parts(file, options, 2048)

    found = first.cut_first(files, 45, options, cut)
    assert opened == [files[0].uri]
    assert isinstance(found.slices[0], FileSlice) and len(found.unread.first) > 0
