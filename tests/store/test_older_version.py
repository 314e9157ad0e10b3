"""A store of version 5 of the schema goes on: nothing is measured again, and answers are equal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray.config import RunConfig
from conftest import as_version_5, config_of, edit_checksummed, write_jsonl

KEPT = Path(__file__).parents[1] / "data" / "store"
VIEWS = ("tokens", "documents", "words", "token_neurons")
TABLES = (
    "thresholds",
    "vocabulary",
    "classes",
    "neurons",
    "screened",
    "sources",
    "groups",
    "copied",
    "salience",
)


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> Callable[[str], RunConfig]:
    """A function that gives the config of a run in a store of that name, over one corpus."""
    folder = tmp_path_factory.mktemp("older")
    (folder / "corpus").mkdir()
    lines(folder / "corpus/a.jsonl", verses[:30])

    def config(store: str) -> RunConfig:
        return config_of(
            tiny_bert,
            folder / "corpus",
            folder / store,
            layers="1,2",
            signals="strength,neurons",
            keep_columns="end,shard",
            duplicates="once",
            group_by="shard",
            shard_bytes=2048,
        )

    return config


def lines(path: Path, texts: list[str]) -> None:
    """A file whose kept columns have names of columns of ``tokens``; its last text is a copy."""
    texts = [*texts, texts[0]]
    write_jsonl(
        path, [{"text": text, "end": i, "shard": f"s{i % 2}"} for i, text in enumerate(texts)]
    )


def attempts(store: str) -> dict[str, set[str]]:
    """Names of the files of each shard."""
    folders = Path(store).glob("shards/*/*")
    return {folder.name: {file.name for file in folder.iterdir()} for folder in folders}


def answers(run: afn_ray.Run) -> dict[str, list[Any]]:
    found = {name: run.sql(f"FROM {name} ORDER BY ALL").fetchall() for name in (*VIEWS, *TABLES)}
    found["kwic"] = run.sql("SELECT * FROM kwic('the', 2) ORDER BY ALL").fetchall()
    return found


@pytest.fixture(scope="module")
def older(make: Callable[[str], RunConfig]) -> tuple[RunConfig, dict[str, list[Any]]]:
    """A store of version 5, and what its run answered before it was written so."""
    config = make("older")
    with afn_ray.run(config) as run:
        before = answers(run)
    as_version_5(config.store)
    return config, before


def test_its_files_have_the_columns_that_version_5_wrote(
    older: tuple[RunConfig, dict[str, list[Any]]],
) -> None:
    """Those of the store that an earlier commit wrote: tokens up to the series, neurons whole."""
    for table, most in (("tokens", 7), ("documents", 12), ("neurons", 2)):
        found = []
        for store in (Path(older[0].store), KEPT):
            file = next(store.glob(f"shards/*/*/*-{table}.parquet"))
            found.append([(f.name, f.type) for f in pq.read_schema(file)][:most])
        assert found[0] == found[1], table


def test_it_answers_as_before_and_is_whole(
    older: tuple[RunConfig, dict[str, list[Any]]],
) -> None:
    config, before = older
    with afn_ray.open_run(config.store) as run:
        assert answers(run) == before
    assert not afn_ray.verify_store(config.store).findings


def test_files_of_another_version_than_their_commit_says_are_found(
    older: tuple[RunConfig, dict[str, list[Any]]], tmp_path: Path
) -> None:
    store = shutil.copytree(older[0].store, tmp_path / "store")
    commit = next(store.glob("shards/*/*/commit.json"))
    edit_checksummed(str(commit), lambda body: body.update(schema_version=6))
    found = [f.message for f in afn_ray.verify_store(str(store)).findings if f.kind == "rows"]
    assert any("schema version 5, but its commit says 6" in message for message in found), found


def test_a_run_goes_on_with_its_shards_and_has_the_bits_of_one_from_scratch(
    older: tuple[RunConfig, dict[str, list[Any]]],
    make: Callable[[str], RunConfig],
    verses: list[str],
    tmp_path: Path,
) -> None:
    config, _ = older
    kept = attempts(config.store)
    lines(Path(config.corpus[0]) / "b.jsonl", [*verses[30:50], *verses[:2]])
    with afn_ray.run(config) as run, afn_ray.run(make("todays")) as scratch:
        versions = run.sql("SELECT DISTINCT schema_version FROM shards ORDER BY ALL").fetchall()
        assert versions == [(5,), (6,)]
        assert answers(run) == answers(scratch)
        done = [afn_ray.export(one, str(tmp_path / one.id)) for one in (run, scratch)]
        exported, expected = (pq.read_table(f"{tmp_path / one.id}/data") for one in (run, scratch))
        assert done[0].num_rows == done[1].num_rows
        order = [("doc", "ascending"), ("position", "ascending")]
        assert exported.sort_by(order).to_pylist() == expected.sort_by(order).to_pylist()
    now = attempts(config.store)
    assert {shard: now[shard] for shard in kept} == kept and len(now) > len(kept)
    assert not afn_ray.verify_store(config.store).findings
    garbage = afn_ray.collect_garbage(config.store, keep=2, min_age_h=0)
    assert not garbage.runs and not garbage.shards


def test_files_of_shards_join_by_their_folder_and_their_document(
    make: Callable[[str], RunConfig],
) -> None:
    """A reader as the guide writes it, without afn-ray."""
    config = make("raw")
    with afn_ray.run(config) as run:
        of_shards = "SELECT sum(n_documents - n_empty), sum(n_tokens), 0 FROM shards"
        expected = run.sql(of_shards).fetchall()
    folder = "parse_dirpath(filename) AS folder"
    tokens, documents = (
        f"(SELECT *, {folder} FROM read_parquet('{config.store}/shards/*/*/*-{table}.parquet'))"
        for table in ("tokens", "documents")
    )
    joined = f"""
        SELECT count(*) AS n, any_value(n_tokens) AS n_tokens
        FROM {tokens} JOIN {documents} USING (folder, doc_in_shard) GROUP BY folder, doc_in_shard"""
    found = duckdb.sql(f"SELECT count(*), sum(n), count(*) FILTER (n <> n_tokens) FROM ({joined})")
    assert found is not None
    assert found.fetchall() == expected
