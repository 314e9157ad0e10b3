"""Views over some shards or documents of a run: together they have the rows of the whole views."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import afn_ray
from afn_ray.query.database import Run
from afn_ray.query.shard_views import SHARD_VIEWS, ShardRange
from afn_ray.runs import job
from conftest import config_of, write_jsonl


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> Iterator[Run]:
    """A run with all that views join: copies left out, labels by group, neurons, kept columns."""
    folder = tmp_path_factory.mktemp("ranges")
    rows = [
        {"text": text, "lang": ("de", "en", None)[i % 3]}
        for i, text in enumerate([*verses[:50], *verses[:10], *verses[50:60]])
    ]
    write_jsonl(folder / "corpus.jsonl", rows)
    config = config_of(
        tiny_bert,
        folder / "corpus.jsonl",
        folder / "store",
        layers="1,3",
        signals="strength,neurons",
        keep_columns="lang",
        group_by="lang",
        thresholds_by="group",
        duplicates="once",
        shard_bytes=1024,
    )
    with job.run(config) as made:
        yield made


@pytest.mark.parametrize("view", SHARD_VIEWS)
def test_ranges_have_the_rows_of_the_view_together(run: Run, view: str) -> None:
    shards = run.shard_views.shards
    assert len(shards) > 4
    begin = shards[2].doc_offset
    end = begin + shards[2].n_documents
    ranges = [
        ShardRange(0, 2),
        ShardRange(2, 3, (begin, begin + 2)),
        ShardRange(2, 3, (begin + 2, end)),
        ShardRange(3, len(shards)),
    ]
    if view != "words":  # copies of other documents are not read
        read = run.shard_views.sql(view, ranges[1])
        assert read.count(f"/duplicates.parquet') WHERE doc >= {begin} AND doc < {begin + 2})") == 1
    parts = [run.sql(run.shard_views.sql(view, one)).to_arrow_table() for one in ranges]
    whole = run.sql(f"FROM {view}").to_arrow_table()
    assert min(map(len, parts)) > 0
    together = pa.concat_tables(parts)
    assert together.schema == whole.schema
    assert sorted(map(str, together.to_pylist())) == sorted(map(str, whole.to_pylist()))


def test_words_of_few_documents_take_little_memory(run: Run) -> None:
    with afn_ray.open_run(run.uri, memory_limit="150MB") as small:
        views = small.shard_views
        parts = [views.sql("words", ShardRange(at, at + 1)) for at in range(len(views.shards))]
        num_words = sum(len(small.sql(part).fetchall()) for part in parts)
    assert [(num_words,)] == run.sql("SELECT count(*) FROM words").fetchall()
