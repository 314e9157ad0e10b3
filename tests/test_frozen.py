"""Thresholds taken from another run: labels go by them everywhere, and the run's own are kept
beside them.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import afn_ray
from afn_ray.analysis import explain, verify
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, StoreError
from afn_ray.runs import estimate
from afn_ray.show.provenance import command_line
from afn_ray.show.summary import summarise
from afn_ray.store import manifest
from afn_ray.store.settings import config_from
from conftest import config_of, write_jsonl

POPULATIONS = ("tokens", "tokens_without_sinks")


@pytest.fixture(scope="module")
def nights(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> tuple[RunConfig, str, str]:
    """The config of a corpus that grew overnight, and the runs of its two nights; the second has
    frozen thresholds.
    """
    folder = tmp_path_factory.mktemp("frozen")
    corpus = write_jsonl(folder / "c.jsonl", [{"text": t} for t in verses[:40]])
    config = config_of(
        tiny_bert, corpus, folder / "store", layers="1,2", shard_bytes=4096, sink_factor=1.2
    )
    with afn_ray.run(config) as first:
        pass
    write_jsonl(corpus, [{"text": t} for t in verses[:40] + verses[9000:9040]])
    with afn_ray.run(replace(config, thresholds=first.uri)) as second:
        pass
    return config, first.uri, second.uri


def test_labels_go_by_the_frozen_thresholds_and_the_runs_own_are_kept(
    nights: tuple[RunConfig, str, str],
) -> None:
    config, first, second = nights
    theirs, mine = manifest.find_run(first), manifest.find_run(second)
    frozen, own = manifest.read_table(mine, "frozen"), manifest.read_table(mine, "thresholds")
    taken = ["layer", "population", "q1", "q2", "q3", "sink_factor"]
    assert frozen.select(taken).equals(manifest.read_table(theirs, "thresholds").select(taken))
    assert not own.select(taken).equals(frozen.select(taken))
    with afn_ray.run(
        replace(config, store=config.store + "-scratch")
    ) as scratch:  # the same corpus by its own
        assert own.equals(manifest.read_table(manifest.find_run(scratch.uri), "thresholds"))
    with afn_ray.run(replace(config, store=config.store + "-frozen", thresholds=first)) as scratch:
        for name in ("frozen", "thresholds", "vocabulary", "sources", "screened"):
            expected = manifest.read_table(manifest.find_run(scratch.uri), name)
            assert manifest.read_table(mine, name).equals(expected), name
    with afn_ray.open_run(second) as run:
        for layer in (1, 2):
            for row in frozen.filter(pc.equal(frozen["layer"], layer)).to_pylist():
                strength, limit = f"strength_{layer}", row["sink_factor"] * rows_q2(frozen, layer)
                which = "NOT is_special" + (
                    f" AND {strength}::DOUBLE <= {limit!r}" if row["population"] != "tokens" else ""
                )
                n, n_high, least, mean = run.sql(
                    f"SELECT count(*), count(*) FILTER ({strength} >= '{row['q3']!r}'::FLOAT), "
                    f"min({strength}), "
                    f"avg({strength}::DOUBLE) FROM tokens WHERE {which}"
                ).fetchall()[0]
                assert (row["n"], row["n_high"], row["min"]) == (n, n_high, least)
                assert row["mean"] == pytest.approx(mean)
            n_sinks, labelled = run.sql(
                f"SELECT count(*) FILTER (sink_{layer}), count(*) FILTER (high_{layer}) FROM tokens"
            ).fetchall()[0]
            main = frozen.filter(
                pc.and_(pc.equal(frozen["layer"], layer), pc.equal(frozen["population"], "tokens"))
            )
            assert [n_sinks] == main["n_sinks"].to_pylist() and [labelled] == main[
                "n_high"
            ].to_pylist()
            assert run.sql(
                f"SELECT sum(n_high)::BIGINT FROM vocabulary WHERE layer = {layer} AND class <> "
                "'special'"
            ).fetchall() == [(labelled,)]
            assert run.sql(f"SELECT count(*) FROM labels WHERE layer = {layer}").fetchall() == [
                (2,)
            ]
    assert {r["population"] for r in frozen.to_pylist()} == set(POPULATIONS)


def rows_q2(frozen: pa.Table, layer: int) -> float:
    (q2,) = (
        r["q2"] for r in frozen.to_pylist() if r["layer"] == layer and r["population"] == "tokens"
    )
    return float(q2)


def test_a_run_that_has_frozen_thresholds_hands_them_on(nights: tuple[RunConfig, str, str]) -> None:
    config, _, second = nights
    with afn_ray.run(replace(config, thresholds=second)) as third:
        assert third.uri == second  # the same shards under the same thresholds are the same run
    with afn_ray.run(replace(config, thresholds=config.store)) as third:
        assert third.uri == second


def test_verify_show_and_explain_know_them(
    nights: tuple[RunConfig, str, str], tiny_bert: Path
) -> None:
    config, first, second = nights
    found = verify.verify_store(config.store)
    assert not found.findings and not found.unproved and found.num_runs >= 2
    summary = summarise(manifest.find_run(second))
    assert all(f.labels != f.thresholds for f in summary.layers)
    assert [t.q3 for t in explain.explain(second, "In the beginning").thresholds] == [
        t.q3 for t in explain.explain(first, "In the beginning").thresholds
    ]


def test_what_cannot_be_taken_is_refused(
    nights: tuple[RunConfig, str, str], tmp_path: Path
) -> None:
    config, first, _ = nights
    other = replace(config, store=str(tmp_path / "other"), layers="2,3", thresholds=first)
    with pytest.raises(
        ConfigError, match=r"another measure.*layers: it has \[1, 2\], this run asks for \[2, 3\]"
    ):
        afn_ray.run(other)
    with pytest.raises(StoreError, match="neither a store nor a run"):
        afn_ray.run(replace(config, thresholds=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match="thresholds is empty"):
        replace(config, thresholds="")


def test_a_store_given_for_thresholds_is_recorded_as_the_run_that_it_meant(
    nights: tuple[RunConfig, str, str], tmp_path: Path
) -> None:
    config, _, _ = nights
    theirs = str(shutil.copytree(config.store, tmp_path / "theirs"))
    asked = replace(config, store=str(tmp_path / "store"), layers="1", thresholds=theirs)
    meant = manifest.find_run(theirs).uri
    assert estimate.dry_run(asked).thresholds == meant
    with afn_ray.run(asked) as run:
        recorded, uri = run.info["config"], run.uri
    assert recorded["thresholds"] == meant and f"--thresholds {meant}" in command_line(recorded)
    with afn_ray.run(replace(config, store=theirs, limit=5)):
        pass  # from now on the store means a first look, which is refused
    with pytest.raises(ConfigError, match="a store, whose latest run"):
        afn_ray.run(asked)
    with afn_ray.run(config_from(recorded, None)) as again:
        assert again.uri == uri
