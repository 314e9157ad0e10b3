"""A lean store: summaries are of all tokens whatever rows are kept, and what needs rows says so."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray import samples, token_rows
from afn_ray.analysis import baselines, claims, culprits, some_rows, verify
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, QueryError
from afn_ray.query import no_rows
from afn_ray.reduce.compare import compare
from afn_ray.runs import estimate
from afn_ray.schema import Series
from afn_ray.show import provenance, report
from afn_ray.show.run_facts import facts
from afn_ray.show.summary import summarise
from afn_ray.store import garbage, label_thresholds, manifest, series_runs, verdicts
from afn_ray.store.shard_tables import ShardTable
from afn_ray.store.verdicts import StoredVerdict
from conftest import config_of, recorded, write_jsonl
from nights import Nights

MODES = ("summaries", "high", "sample:20%")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> RunConfig:
    """The config of a run with all rows, which is made."""
    folder = tmp_path_factory.mktemp("record")
    rows = [{"id": f"v{i}", "text": text} for i, text in enumerate(verses[:80])]
    rows.append({"id": "empty", "text": ""})
    corpus = write_jsonl(folder / "c.jsonl", [*rows, "{no json"])
    config = config_of(
        tiny_bert,
        corpus,
        folder / "full",
        layers="0,2",
        id_column="id",
        shard_bytes=4096,
        screen=0,
    )
    afn_ray.run(config).close()
    return config


@pytest.fixture(scope="module")
def lean(full: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunConfig]:
    """The config of a run of each mode in a store of its own, which is made once."""
    made: dict[str, RunConfig] = {}

    def config(record: str) -> RunConfig:
        if record not in made:
            store = tmp_path_factory.mktemp("lean")
            thresholds = full.store if record == "high" else None
            made[record] = replace(full, record=record, store=str(store), thresholds=thresholds)
            afn_ray.run(made[record]).close()
        return made[record]

    return config


def tables_of(config: RunConfig) -> tuple[pa.Table, ...]:
    with afn_ray.open_run(config.store) as run:
        return recorded(run)


@pytest.mark.parametrize("record", MODES)
def test_what_comes_from_summaries_is_that_of_the_whole_run_bit_for_bit(
    record: str, full: RunConfig, lean: Callable[[str], RunConfig]
) -> None:
    all_rows, documents, thresholds, vocabulary = tables_of(full)
    rows, lean_documents, lean_thresholds, lean_vocabulary = tables_of(lean(record))
    assert lean_documents.equals(documents)
    assert lean_thresholds.equals(thresholds)
    assert lean_vocabulary.equals(vocabulary)
    assert 0 <= len(rows) < len(all_rows)
    run = manifest.find_run(lean(record).store)
    assert run.info["measure"] == manifest.find_run(full.store).info["measure"]
    drift = compare(manifest.find_run(full.store), run).drift
    assert set(drift["psi"].to_pylist()) == {0.0}


def test_high_keeps_the_rows_of_high_tokens_alone(
    full: RunConfig, lean: Callable[[str], RunConfig]
) -> None:
    rows = tables_of(full)[0]
    with afn_ray.open_run(full.store) as run:
        q3 = dict(run.sql("SELECT layer, q3 FROM labels WHERE population = 'tokens'").fetchall())
    is_high = pc.or_(*(pc.greater_equal(rows[f"strength_{k}"], pa.scalar(q3[k])) for k in q3))
    is_text = pc.equal(pc.bit_wise_and(rows["flags"], pa.scalar(1, pa.uint8())), 0)
    expected = rows.filter(pc.and_(is_high, is_text))
    assert len(expected) > 0
    assert tables_of(lean("high"))[0].to_pylist() == expected.to_pylist()


def test_a_sample_keeps_whole_documents_and_is_independent_of_the_selection(
    full: RunConfig, lean: Callable[[str], RunConfig]
) -> None:
    config = lean("sample:20%")
    with afn_ray.open_run(config.store) as run, afn_ray.open_run(full.store) as whole:
        query = (
            "SELECT doc_id, list(token ORDER BY position), string_agg(DISTINCT text) FROM tokens "
        )
        query += "JOIN documents USING (doc) GROUP BY ALL ORDER BY ALL"
        query = (
            "SELECT doc_id, list(strength_2 ORDER BY position), document_text(any_value(doc)) "
            "FROM tokens JOIN documents USING (doc) GROUP BY doc_id ORDER BY doc_id"
        )
        some, every = run.sql(query).fetchall(), whole.sql(query).fetchall()
        assert 5 < len(some) < 40 and set(map(str, some)) < set(map(str, every))
    assert {doc_id for doc_id, *_ in some} == drawn(token_rows.SALT) != drawn("")


def drawn(salt: str) -> set[str]:
    names = [f"v{i}" for i in range(80)]
    return {name for name in names if samples.is_drawn(name, Fraction(1, 5), salt)}


REFUSED = {
    "FROM tokens": {"summaries"},
    "SELECT count(*) FROM tokens": {"summaries"},
    "FROM words": {"summaries", "high"},
    "FROM kwic('god')": {"summaries", "high"},
    "SELECT document_text(0)": {"summaries", "high"},
    "FROM classes": {"summaries", "high"},
    "FROM documents": set(),
    "FROM vocabulary": set(),
    "FROM thresholds": set(),
}


@pytest.mark.parametrize("record", MODES)
def test_a_question_for_rows_that_are_not_there_says_so(
    record: str, lean: Callable[[str], RunConfig]
) -> None:
    with afn_ray.open_run(lean(record).store) as run:
        for query, kinds in REFUSED.items():
            if record not in kinds:
                assert run.sql(query).limit(1).fetchall(), query
                continue
            with pytest.raises(QueryError, match=r"the run recorded .* without --record"):
                run.sql(query).fetchall()
        assert run.sql("FROM tokens LIMIT 0").columns
        with pytest.raises(ConfigError, match="the run recorded"):
            claims.claims(run)
        (note,) = run.why_some("SELECT count(*) FROM tokens")
        assert token_rows.describe(record) in note and not run.why_some("FROM documents")
        for view in no_rows.SCREENED:
            assert run.sql(f"FROM {view}").fetchall() == []
            (why, *_) = run.why_empty(f"FROM {view}")
            assert f"{view}: empty, since --record {record} leaves out the screening" in why


@pytest.mark.parametrize("record", MODES)
def test_what_is_there_is_advised_and_the_command_has_no_screen_that_record_implies(
    record: str, lean: Callable[[str], RunConfig]
) -> None:
    asked = token_rows.why_refused(record).partition(": ask its ")[2]
    names = asked.partition(", or give")[0].replace(" and", ",").split(", ")
    with afn_ray.open_run(lean(record).store) as run:
        for name in names:
            assert run.sql(f"FROM {name}").limit(1).fetchall(), name
        assert ("tokens" in names) == (record != "summaries")
        words = provenance.command_line(run.info["config"])
        if record == "sample:20%":
            return
        with pytest.raises(QueryError) as refused:
            run.sql("FROM classes").fetchall()
        queries = re.findall("nearly the same is: (SELECT .* GROUP BY ALL)", str(refused.value))
        assert len(queries) == 1, str(refused.value)
        (query,) = queries
        shown = summarise(manifest.find_run(run.uri)).classes.to_pylist()
        found = run.sql(query).fetchall()
        assert {(c["layer"], c["name"], c["n"]) for c in shown} == {row[:3] for row in found}
    assert f"--record {record}" in words and "--screen" not in words


@pytest.mark.parametrize("record", MODES)
def test_verify_and_gc_and_show_know_it(record: str, lean: Callable[[str], RunConfig]) -> None:
    config = lean(record)
    found = verify.verify_store(config.store)
    assert not found.findings and not found.unproved
    said = [line for line in verify.lines(found) if line.startswith("summaries")]
    assert len(said) == 1 and token_rows.describe(record) in said[0]
    doomed = garbage.collect_garbage(config.store, min_age_h=0.0)
    assert not doomed.runs and not doomed.shards
    shown = dict(facts(summarise(manifest.find_run(config.store))))
    assert shown["recorded"] == token_rows.describe(record)


def test_the_estimate_knows_what_is_kept(full: RunConfig, tmp_path: Path) -> None:
    store = str(tmp_path / "new")
    sizes = [
        estimate.dry_run(replace(full, record=record, store=store)).store_bytes
        for record in ("all", "sample:50%", "summaries")
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"record": "high"}, "without this option, then .*--thresholds RUN"),
        ({"record": "sample:100%"}, "sample: and a share"),
        ({"record": "some"}, "expected all, summaries, high"),
        ({"record": "summaries", "signals": "neurons"}, "signals has neurons"),
        ({"record": "summaries", "duplicates": "once"}, "a copy's tokens"),
        ({"record": "summaries", "near_duplicates": 0.8}, "near-copies"),
        ({"record": "summaries", "group_by": "source", "screen": 1000}, "groups"),
        ({"record": "sample:1%", "screen": 50}, "screen asks for reads the rows of all tokens"),
    ],
)
def test_what_needs_rows_is_refused_at_once(
    changes: dict[str, Any], expected: str, full: RunConfig
) -> None:
    with pytest.raises(ConfigError, match=expected):
        replace(full, **changes)


@pytest.mark.parametrize("record", MODES)
def test_rows_that_the_shard_does_not_keep_are_found(
    record: str, full: RunConfig, lean: Callable[[str], RunConfig]
) -> None:
    (shard, *_) = manifest.read_table(manifest.find_run(lean(record).store), "shards").to_pylist()
    (whole, *_) = manifest.read_table(manifest.find_run(full.store), "shards").to_pylist()
    kept = pq.read_table(f"{lean(record).store}/{shard['tokens_file']}")
    every = pq.read_table(f"{full.store}/{whole['tokens_file']}")
    documents = pq.read_table(f"{lean(record).store}/{shard['documents_file']}")
    least = token_rows.of_shards(record, frozen_of(full), [0, 2])
    series = [Series("strength", 0), Series("strength", 2)]

    def wrong(table: pa.Table) -> str:
        file = io.BytesIO()
        pq.write_table(table, file)
        return some_rows.wrong_rows(ShardTable(file), documents, series, least)

    assert not wrong(kept)
    assert wrong(every)
    if record != "summaries":
        assert wrong(pa.concat_tables([kept, kept.slice(0, 1)]))
        strange = pa.array([2.0e38 / 3] * len(kept), pa.float32())
        assert wrong(kept.set_column(kept.column_names.index("strength_2"), "strength_2", strange))
    if record == "sample:20%":
        assert "expected" in wrong(kept.slice(1))


def frozen_of(config: RunConfig) -> list[token_rows.LabelThresholds]:
    return label_thresholds.frozen_rows(manifest.find_run(config.store))


def test_a_run_of_summaries_uses_shards_with_rows_and_not_the_other_way_round(
    full: RunConfig, lean: Callable[[str], RunConfig]
) -> None:
    shards = manifest.find_run(full.store).info["counts"]["shards"]
    assert shards > 2
    with afn_ray.run(replace(full, record="summaries")) as run:
        assert run.info["counts"]["shards_reused"] == shards
        with pytest.raises(QueryError, match="only summaries and documents"):
            run.sql("FROM tokens").fetchall()
    assert not verify.verify_store(full.store).findings
    config = lean("summaries")
    with afn_ray.run(replace(config, record="all")) as run:
        assert run.info["counts"]["shards_reused"] == 0
        assert run.sql("FROM tokens").limit(1).fetchall()
    assert not verify.verify_store(config.store).findings


def test_a_night_that_is_run_again_for_other_rows_is_the_same_night(
    tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    """Neither is it held against itself, nor is a broken one good the second time."""
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in verses[:6]])
    config = config_of(tiny_bert, corpus, tmp_path / "store", layers="2", screen=0)

    def made(record: str) -> manifest.RunFolder:
        with afn_ray.run(replace(config, record=record)) as run:
            return manifest.find_run(run.uri)

    def before(run: manifest.RunFolder) -> list[str]:
        nights = series_runs.nights_before(run, series_runs.alike(run, run.id))
        return [night.id for night in nights]

    first, again = made("all"), made("sample:50%")
    assert before(again) == []
    verdict = StoredVerdict("broken", "all", 2, None, ("psi",), (), (), {})
    verdicts.write_verdict(first, verdict)
    assert not verdicts.may_be_baseline(again)
    write_jsonl(corpus, [{"text": text} for text in verses[:7]])
    assert before(made("all")) == [again.id, first.id]


def test_an_audit_judges_lean_runs_as_it_judges_runs_with_all_rows(
    tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    """Figures of the limits are of summaries, so they are the same bit for bit."""
    found: dict[str, Any] = {}
    for record in ("all", *MODES):
        nights = Nights(
            tmp_path / record, tiny_bert, verses, "psi = 2\nmax_new_types = 0\nks = 0.9\n"
        )
        with nights.config.open("a") as config:
            config.write(f'record = "{record}"\n')
            if record == "high":
                config.write(f'thresholds = "{tmp_path}/all/store"\n')
        assert nights.begin() == 0
        nights.add(1, 600, 640)
        assert nights.audit() == 1
        assert nights.said["baseline"] is not None
        found[record] = [
            (rule["key"], rule["state"], rule["value"]) for rule in nights.said["rules"]
        ]
    assert {key: state for key, state, _ in found["all"]}["max_new_types"] == "broken"
    for record in MODES:
        assert found[record] == found["all"], record


def test_a_night_with_layers_that_the_model_lacks_has_no_baseline(full: RunConfig) -> None:
    run = manifest.find_run(full.store)
    assert baselines._has_layers(run, replace(full, layers="2"))
    assert not baselines._has_layers(run, replace(full, layers="1"))
    assert not baselines._has_layers(run, replace(full, layers="2,99"))  # deeper than the model


@pytest.mark.parametrize("record", MODES)
def test_a_page_says_that_claims_are_not_known(
    record: str, lean: Callable[[str], RunConfig]
) -> None:
    runs = series_runs.complete_runs(lean(record).store)
    page = report.render(
        next(run for run in runs if token_rows.record_of(run.info["config"]) == record)
    )
    assert f"Left out: the run recorded {token_rows.describe(record)}" in page
    assert "afn claims RUN" not in page


def test_words_are_not_put_together_of_high_tokens(lean: Callable[[str], RunConfig]) -> None:
    run = manifest.find_run(lean("high").store)
    with afn_ray.open_run(run.uri) as opened:
        ((token_id,),) = opened.sql("SELECT token_id FROM tokens LIMIT 1").fetchall()
    assert culprits._in_context(culprits._Asked(run), token_id) is None
