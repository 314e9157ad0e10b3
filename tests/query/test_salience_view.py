"""The view ``salience`` of a run, whatever its shards, and that verify counts it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import afn_ray
from afn_ray.analysis import salience_check
from afn_ray.config import RunConfig
from afn_ray.query.views import VIEWS
from afn_ray.reduce.stats import wilson
from afn_ray.store import manifest
from conftest import config_of, edit_checksummed, edit_table, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> RunConfig:
    """A run of verses in several shards, of which some are copies that do not count."""
    folder = tmp_path_factory.mktemp("salience")
    texts = [*verses[:90], *verses[10:14], "", *verses[4000:4020]]
    corpus = write_jsonl(folder / "c.jsonl", [{"text": text} for text in texts])
    config = config_of(
        tiny_bert, corpus, folder / "store", layers="1,2", shard_bytes=3000, duplicates="once"
    )
    afn_ray.run(config).close()
    return config


def rows(store: str, query: str = "FROM salience") -> list[dict[str, Any]]:
    with afn_ray.open_run(store) as run:
        found: list[dict[str, Any]] = run.sql(query).to_arrow_table().to_pylist()
    return found


def test_every_type_has_its_row_and_shares_are_those_of_the_vocabulary(made: RunConfig) -> None:
    found = {(r["layer"], r["token_id"]): r for r in rows(made.store)}
    types = rows(made.store, "FROM vocabulary WHERE class <> 'special'")
    assert len(found) == len(types) > 500
    for of_type in types:
        row = found[of_type["layer"], of_type["token_id"]]
        names = ("text", "class", "n", "n_docs", "share_high", "share_high_low")
        assert [row[name] for name in names] == [of_type[name] for name in names]
        assert row["beyond"] == row["share_high"] - row["expected"]
        assert row["beyond_low"] <= row["beyond"] <= row["beyond_high"]
        assert 0 < row["n_effective"] <= row["n"]


def test_over_all_tokens_as_many_are_expected_as_are_high(made: RunConfig) -> None:
    """The constant sees to that, but for the weights of types and the types that are left out."""
    query = "SELECT sum(n * expected) / sum(n), sum(n * share_high) / sum(n) FROM salience"
    (row,) = rows(made.store, f"{query} WHERE n <= 20")
    expected, observed = row.values()
    assert expected == pytest.approx(observed, abs=0.02)


@pytest.mark.parametrize(("view", "key"), [("salience", "token_id"), ("word_salience", "word")])
def test_ranks_are_orders_by_the_lower_ends(made: RunConfig, view: str, key: str) -> None:
    for layer in (1, 2):
        here = rows(made.store, f"FROM {view} WHERE layer = {layer}")
        assert len(here) > 50
        for rank, low in (("rank", "beyond_low"), ("rank_high", "clustered_low")):
            ordered = sorted(here, key=lambda r: (-r[low], -r["n"], r[key]))
            assert [r[rank] for r in ordered] == list(range(1, len(here) + 1))


@pytest.mark.parametrize("view", ["salience", "word_salience"])
def test_the_interval_of_a_share_is_wilsons_of_its_effective_tokens(
    made: RunConfig, view: str
) -> None:
    names = (
        "n_effective, share_high, share_high_low, share_high_high, clustered_low, clustered_high"
    )
    with afn_ray.open_run(made.store) as run:
        columns = run.sql(f"SELECT {names} FROM {view}").to_arrow_table().columns
    n, share, low, high, clustered_low, clustered_high = (c.to_numpy() for c in columns)
    expected = wilson(share * n, n)
    np.testing.assert_array_equal([clustered_low, clustered_high], expected)  # to the bit
    assert (clustered_low <= low + 1e-12).all() and (high <= clustered_high + 1e-12).all()
    assert (clustered_low[share == 0] == 0).all() and (clustered_high[share == 1] == 1).all()
    assert (clustered_low < low - 0.01).any()


def test_the_table_is_the_same_to_the_bit_in_any_shards(made: RunConfig, tmp_path: Path) -> None:
    found = []
    for config in (made, replace(made, store=str(tmp_path / "store"), shard_bytes=1 << 20)):
        with afn_ray.run(config) as run:
            folder = manifest.find_run(run.uri)
            tables = [manifest.read_table(folder, name) for name in ("salience", "word_vocabulary")]
            found.append((len(run.shards().fetchall()), tables))
    (num_shards, ours), (num_others, theirs) = found
    assert num_shards > 3 and num_others == 1
    assert all(one.equals(other) for one, other in zip(ours, theirs, strict=True))
    words = ours[1]
    assert (
        pc.equal(pc.is_null(words["expected"]), pc.is_null(words["word"])).to_pylist().count(False)
        == 0
    )
    assert 0 < words["word"].null_count < len(words)


def test_verify_counts_the_table_again_from_the_rows(
    made: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_tokens in (salience_check.TOKENS_AT_ONCE, 100):
        monkeypatch.setattr(salience_check, "TOKENS_AT_ONCE", num_tokens)
        with afn_ray.open_run(made.store) as run:
            assert [salience_check.wrong_type(run, layer) for layer in (1, 2)] == ["", ""]
            assert [salience_check.wrong_word(run, layer) for layer in (1, 2)] == ["", ""]
    assert afn_ray.verify_store(made.store).findings == ()


def _times(name: str, factor: float) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.column_names.index(name)
        is_first = pa.array(np.arange(len(table)) == 0)
        column = pc.if_else(is_first, pc.multiply(table[name], factor), table[name])
        return table.set_column(at, table.schema.field(at), column)

    return change


EDITS: list[tuple[Callable[[pa.Table], pa.Table], str]] = [
    (_times("n_effective", 0.9), "n_effective of token_id"),
    (_times("beyond", 0.9), "beyond of token_id"),
    (_times("beyond_low", -9.0), "the interval of token_id"),
    (_times("expected", 1.001), "beyond of token_id"),
    (lambda table: table.slice(1), "types, DuckDB counts"),
]


def test_an_edited_table_is_found_by_the_rows(made: RunConfig, tmp_path: Path) -> None:
    store = copied(made, tmp_path)
    run = manifest.find_run(store)
    for name, key, find in (
        ("salience", "token_id", salience_check.wrong_type),
        ("word_vocabulary", "word", salience_check.wrong_word),
    ):
        whole = manifest.read_table(run, name)
        for change, message in EDITS[: None if key == "token_id" else -1]:
            edited = change(whole)
            edit_table(run.uri, name, lambda _, edited=edited: edited)  # type: ignore[misc]
            with afn_ray.open_run(store) as opened:
                assert message.replace("token_id", key) in find(opened, 1)


def copied(made: RunConfig, tmp_path: Path) -> str:
    import shutil

    shutil.copytree(made.store, tmp_path / "store")
    return str(tmp_path / "store")


def test_a_run_from_before_the_table_is_read_and_verified(made: RunConfig, tmp_path: Path) -> None:
    store = copied(made, tmp_path)
    uri = manifest.find_run(store).uri
    entries: list[dict[str, Any]] = []
    edit_checksummed(f"{uri}/run.json", lambda i: entries.append(i["tables"].pop("salience")))
    (Path(uri) / entries[0]["name"]).unlink()
    with afn_ray.open_run(store) as run:
        assert run.sql("FROM salience").fetchall() == []
        assert f"salience: {VIEWS['salience']}" in run.why_empty("FROM salience")
    assert afn_ray.verify_store(store).findings == ()
