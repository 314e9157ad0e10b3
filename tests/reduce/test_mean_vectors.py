"""Mean states of frequent types: exact sums, and the split of the second moment."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from safetensors.torch import load_file, save_file

import afn_ray
from afn_ray.analysis import remeasure, verify
from afn_ray.analysis.local_model import LocalModel
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, ShardError
from afn_ray.measure import Measure
from afn_ray.model.signals import States
from afn_ray.model.type_sums import Chooser
from afn_ray.reduce import mean_vectors
from afn_ray.reduce import shards as shard_reading
from afn_ray.reduce.mean_vectors import StateSums, StateTotals, flat
from afn_ray.reduce.tasks import Inline
from afn_ray.runs import estimate, precheck, preparation, worker
from afn_ray.runs.measurer import Measurer, find_model_files
from afn_ray.schema import STATE_UNITS
from afn_ray.store import manifest, plans, shard_files, storage
from conftest import config_of, edit_table, recommit, write_jsonl

LAYERS = (0, 2, 3)
NUM_TYPES = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> RunConfig:
    """A run of some shards with mean states, and windows that overlap."""
    folder = tmp_path_factory.mktemp("means")
    corpus = write_jsonl(folder / "c.jsonl", [{"text": text} for text in verses[:40]])
    config = config_of(
        tiny_bert,
        corpus,
        folder / "store",
        layers="0,2,3",
        signals="centred_mean",
        mean_vectors=NUM_TYPES,
        shard_bytes=2048,
        window_tokens=24,
    )
    afn_ray.run(config).close()
    return config


@pytest.fixture(scope="module")
def shard_tables(made: RunConfig) -> list[pa.Table]:
    """The sums of each shard, in plan order."""
    run = manifest.find_run(made.store)
    shards = manifest.read_table(run, "shards")["shard"].to_pylist()
    files = [next(Path(made.store).glob(f"shards/*/{shard}/*-vectors.parquet")) for shard in shards]
    assert len(files) > 2
    return [pq.read_table(file) for file in files]


def _of(run: afn_ray.Run, table: str) -> pa.Table:
    return run.sql(f"FROM {table}").to_arrow_table()


# --- sums of states


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_mpnet"])
def test_sums_are_those_of_the_recorded_states(
    family: str, verses: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Packed and padded batches: integers equal to numpy's over whole states, to the last bit."""
    folder = request.getfixturevalue(family)
    config = config_of(folder, tmp_path / "c", tmp_path / "s", layers="0,2,3", window_tokens=24)
    task = worker.prepare(config, find_model_files(config), "cpu", "float32")
    measurer = Measurer(task)
    texts = verses[:9]
    prepared = measurer.preparer.prepare(texts, [False] * len(texts))
    types = np.unique(prepared.encoded.token_ids)[5:25].tolist()
    chooser = Chooser(types, measurer.model.num_embeddings)
    sums, expected = StateSums(), np.zeros((3, len(types), 32), np.int64)
    for batch in prepared.batches:
        chosen = chooser.choose(batch.ids, batch.kept)
        read = measurer.model.submit(batch.ids, batch.lengths, chosen=chosen).result()
        assert read.sums is not None
        sums.add(*read.sums)
        states = measurer.model.measure(batch.ids, batch.lengths, (States(),))
        for row in batch.kept.tolist():
            if batch.ids[row] in types:
                units = np.rint(states[:, row].astype(np.float64) * STATE_UNITS).astype(np.int64)
                expected[:, types.index(batch.ids[row])] += units
    assert measurer.model.packed == (family == "tiny_bert")
    tables = list(sums.tables(LAYERS, types))
    for table, wanted in zip(tables, expected, strict=True):
        assert table["token_id"].to_pylist() == types
        n = [(prepared.encoded.token_ids == i).sum() for i in types]
        assert table["n"].to_pylist() == n
        np.testing.assert_array_equal(flat(table["totals"]).reshape(wanted.shape), wanted)


def test_strengths_are_the_same_to_the_bit_beside_them(made: RunConfig, tmp_path: Path) -> None:
    alone = replace(made, mean_vectors=0, signals="strength", store=str(tmp_path / "store"))
    sql = (
        "SELECT doc, position, token_id, strength_0, strength_2, strength_3 FROM tokens "
        "ORDER BY ALL"
    )
    with afn_ray.run(alone) as one, afn_ray.open_run(made.store) as other:
        assert one.sql(sql).fetchall() == other.sql(sql).fetchall()
        assert not {"moments", "mean_vectors"} & one.info["tables"].keys()
        assert one.sql("FROM moments").fetchall() == one.sql("FROM mean_vectors").fetchall() == []
    assert not list(Path(alone.store).glob("shards/*/*/*-vectors.parquet"))


def test_the_sum_of_shards_is_exact_in_any_order_and_grouping(shard_tables: list[pa.Table]) -> None:
    """Python's integers and fractions are the reference; totals are near the end of 64 bits."""
    types = sorted({i for table in shard_tables for i in table["token_id"].to_pylist()})
    parts: list[bytes] = []
    exact: dict[int, list[int]] = {}
    n = dict.fromkeys(types, 0)
    for table in shard_tables:
        rows = table.filter(pa.array(table["layer"].to_numpy() == 3))
        totals = flat(rows["totals"]).reshape(len(rows), -1)
        totals = totals + np.sign(totals) * (1 << 61)
        lists = mean_vectors._lists(totals, rows.schema.field("totals").type)
        rows = rows.set_column(3, rows.schema.field("totals"), lists)
        parts.append(StateTotals.of_table(rows, types, totals.shape[1]).encoded())
        for i, total in zip(rows["token_id"].to_pylist(), totals.tolist(), strict=True):
            before = exact.get(i, [0] * len(total))
            exact[i] = [a + b for a, b in zip(before, total, strict=True)]
        for row in rows.select(["token_id", "n"]).to_pylist():
            n[row["token_id"]] += row["n"]
    wanted = np.array(
        [[float(Fraction(x, STATE_UNITS * n[i])) for x in exact[i]] for i in types if n[i]]
    )
    random, found = np.random.default_rng(5), set()
    for _ in range(6):
        order = random.permutation(len(parts)).tolist()
        cut = int(random.integers(1, len(parts)))
        halves = ([parts[i] for i in some] for some in (order[:cut], order[cut:]))
        sums = [mean_vectors._merge(None, *half)[0] for half in halves]
        means = StateTotals.decoded(mean_vectors._merge(None, *sums)[0]).means()
        np.testing.assert_allclose(means, wanted, rtol=1e-15)
        found.add(means.tobytes())
    assert len(found) == 1


def test_a_total_that_would_not_fit_is_refused() -> None:
    sums = StateSums()
    one = np.array([0]), np.array([1])
    sums.add(1, *one, np.full((1, 1, 2), mean_vectors.MOST_TOTAL))
    sums.add(1, *one, np.full((1, 1, 2), -1))
    sums.add(1, *one, np.full((1, 1, 2), 5))
    with pytest.raises(ShardError, match="add up to more than 4,398,046,511,104 in one shard"):
        sums.add(1, *one, np.full((1, 1, 2), 1))
    negative = StateSums()
    for total in (-mean_vectors.MOST_TOTAL, -1):
        negative.add(1, *one, np.full((1, 1, 2), total))
    with pytest.raises(ShardError, match="in one shard"):
        negative.add(1, *one, np.full((1, 1, 2), 1))


def test_a_full_total_of_one_type_does_not_refuse_tokens_of_others() -> None:
    """Only the totals that a batch adds to are checked, so it costs nothing for the others."""
    sums = StateSums()
    counts = np.array([1])
    sums.add(2, np.array([0]), counts, np.full((1, 1, 2), mean_vectors.MOST_TOTAL + 1))
    sums.add(2, np.array([1]), counts, np.full((1, 1, 2), 7))
    (table,) = sums.tables([3], [10, 11])
    assert table["totals"].to_pylist() == [[mean_vectors.MOST_TOTAL + 1] * 2, [7, 7]]


# --- the run's tables


def test_moments_are_those_of_the_rows_and_the_mean_vectors(
    made: RunConfig, shard_tables: list[pa.Table]
) -> None:
    with afn_ray.open_run(made.store) as run:
        types = run.info["measure"]["mean_types"]
        assert len(types) == NUM_TYPES and types == sorted(types)
        tables = ("moments", "mean_vectors")
        moments, vectors = (_of(run, f"{x} ORDER BY layer, token_id") for x in tables)
        assert len(moments) == len(vectors) == len(LAYERS) * NUM_TYPES
        for at, row in enumerate(moments.to_pylist()):
            k, i = row["layer"], row["token_id"]
            found = run.sql(
                f"SELECT count(*), avg(strength_{k}::DOUBLE ** 2) FROM tokens "
                f"WHERE token_id = {i} AND NOT is_special"
            ).fetchall()
            n, q = found[0]
            assert (row["n"], row["second_moment"]) == (n, pytest.approx(q, rel=1e-12))
            assert (vectors["layer"][at].as_py(), vectors["token_id"][at].as_py()) == (k, i)
            mean = np.array(vectors["mean"][at].as_py())
            assert row["squared_mean"] == pytest.approx(mean @ mean, rel=1e-6)
            assert row["variance"] == max(0, row["second_moment"] - row["squared_mean"])
            assert 0 <= row["share_mean"] <= 1
            total = sum(
                np.array(x["totals"]) / STATE_UNITS
                for table in shard_tables
                for x in table.to_pylist()
                if (x["layer"], x["token_id"]) == (k, i)
            )
            np.testing.assert_allclose(mean, total / n, rtol=1e-5, atol=1e-7)


def test_workers_and_order_change_no_bit(made: RunConfig, tmp_path: Path) -> None:
    """Two workers in turn, the last shard first, against one worker in order."""
    other = precheck.normalised(replace(made, store=str(tmp_path / "store")))
    asked = preparation.prepare(other, lambda event: None, keep=True)
    workers = [worker.Processor(asked.task) for _ in range(2)]
    for at, shard in enumerate(reversed(asked.plan.shards)):
        workers[at % 2].process(shard)
    for one in workers:
        one.close()
    with afn_ray.run(other) as run, afn_ray.open_run(made.store) as first:
        assert run.info["counts"]["shards_reused"] == run.info["counts"]["shards"] > 2
        assert run.info["measure"] == first.info["measure"]
        tables = [
            "SELECT doc, position, COLUMNS('strength_.*') FROM tokens ORDER BY ALL",
            "FROM moments ORDER BY layer, token_id",
            "FROM mean_vectors ORDER BY layer, token_id",
            "FROM signals",
        ]
        for sql in tables:
            assert run.sql(sql).to_arrow_table().equals(first.sql(sql).to_arrow_table()), sql


def test_types_are_the_most_frequent_ones(made: RunConfig) -> None:
    with afn_ray.open_run(made.store) as run:
        most = run.sql(
            "SELECT token_id FROM tokens WHERE NOT is_special GROUP BY token_id "
            f"ORDER BY count(*) DESC, token_id LIMIT {NUM_TYPES}"
        ).fetchall()
        assert sorted(i for (i,) in most) == run.info["measure"]["mean_types"]


def test_other_shards_give_the_same_types_and_nearly_the_same_means(
    made: RunConfig, tmp_path: Path
) -> None:
    whole = replace(made, shard_bytes=1 << 20, store=str(tmp_path / "store"))
    with afn_ray.run(whole) as one, afn_ray.open_run(made.store) as other:
        assert one.info["counts"]["shards"] == 1 < other.info["counts"]["shards"]
        a, b = (_of(run, "moments") for run in (one, other))
        for name in ("layer", "token_id", "text", "class", "n"):
            assert a[name].equals(b[name])
        for name in ("second_moment", "squared_mean"):  # other batches may move the last bits
            np.testing.assert_allclose(a[name].to_numpy(), b[name].to_numpy(), rtol=1e-4)


def test_a_later_run_of_the_store_keeps_the_types(made: RunConfig, verses: list[str]) -> None:
    corpus = Path(made.corpus[0])
    before = corpus.read_text()
    with afn_ray.open_run(made.store) as run:
        kept = run.info["measure"]["mean_types"]
    write_jsonl(corpus, [{"text": text} for text in verses[30_000:30_010]])
    try:
        with afn_ray.run(made) as run:
            assert run.info["measure"]["mean_types"] == kept
            uri = run.uri
    finally:
        corpus.write_text(before)
    shutil.rmtree(uri)


def test_a_document_without_finite_states_is_in_no_sum(
    tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    folder = tmp_path / "poisoned"
    shutil.copytree(tiny_bert, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    text = "Abraham begat Isaac"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights[name][tokenizer.token_to_id("abraham")] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    texts = [*verses[:3], text, *verses[3:6]]
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in texts])
    config = config_of(folder, corpus, tmp_path / "s", layers="2", mean_vectors=5)
    with afn_ray.run(config) as run:
        status = [s for (s,) in run.sql("SELECT status FROM documents ORDER BY doc").fetchall()]
        assert status[3].startswith("quarantined: the model cannot take it: ValueError: a value")
        assert [*status[:3], *status[4:]] == ["ok"] * 6
        means = flat(_of(run, "mean_vectors")["mean"])
        assert len(means) == 5 * 32 and np.isfinite(means).all()
    found = verify.verify_store(config.store)
    assert not found.findings and not found.unproved


# --- proof, and what is refused


def _verify(config: RunConfig) -> list[tuple[str, str]]:
    return [(f.kind, f"{f.uri} {f.message}") for f in verify.verify_store(config.store).findings]


def _column(table: pa.Table, name: str, values: Any) -> pa.Table:
    at = table.column_names.index(name)
    return table.set_column(at, table.schema.field(name), pa.array(values, table.schema[at].type))


def _more(table: pa.Table, name: str, by: float = 1.0) -> pa.Table:
    return _column(table, name, [value + by for value in table[name].to_pylist()])


def _doubled(table: pa.Table, name: str) -> pa.Table:
    return _column(table, name, [[2 * x for x in values] for values in table[name].to_pylist()])


def test_verify_proves_the_tables_of_a_run_and_finds_what_was_changed(made: RunConfig) -> None:
    found = verify.verify_store(made.store)
    assert not found.findings and not found.unproved
    uri = manifest.find_run(made.store).uri
    for name, column, edit in (
        ("moments", "second_moment", _more),
        ("moments", "squared_mean", _more),
        ("moments", "variance", _more),
        ("mean_vectors", "mean", _doubled),
    ):
        change = partial(edit, name=column)
        files = [Path(uri, f"{name}.parquet"), Path(uri, "run.json")]
        before = [file.read_bytes() for file in files]
        try:
            edit_table(uri, name, change)
            ((kind, message), *_) = _verify(made)
            assert kind == "tables" and f"{name}.parquet" in message, (column, message)
        finally:
            for file, data in zip(files, before, strict=True):
                file.write_bytes(data)


def test_verify_finds_sums_that_its_tokens_cannot_have(made: RunConfig, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    config = replace(made, store=str(store))
    file = next(store.glob("shards/*/*/*-vectors.parquet"))
    before, commit = file.read_bytes(), file.with_name("commit.json").read_bytes()
    edits: list[tuple[Callable[[pa.Table], pa.Table], str]] = [
        (lambda table: _more(table, "n", 1), "n is not the number of tokens"),
        (lambda table: _doubled(table, "totals"), "its strengths allow at most"),
        (lambda table: table.slice(1), "its types are not those of its tokens"),
    ]
    for edit, why in edits:
        table = edit(pq.read_table(io.BytesIO(before)))
        metadata = pq.read_schema(io.BytesIO(before)).metadata
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, table.schema.with_metadata(metadata)) as writer:
            for layer in LAYERS:
                writer.write_table(table.filter(pa.array(table["layer"].to_numpy() == layer)))
        recommit(str(file.parent), "vectors", sink.getvalue(), rows=len(table))
        assert any(kind == "rows" and why in message for kind, message in _verify(config)), why
        storage.delete([str(file.with_name("commit.json"))])
        file.with_name("commit.json").write_bytes(commit)
        file.write_bytes(before)


def test_a_text_is_measured_as_such_a_run_measured_its_corpus(made: RunConfig) -> None:
    run = manifest.find_run(made.store)
    task = remeasure.recorded_task(run, LocalModel())
    recorded = Measure.of_dict(run.info["measure"])
    assert recorded.mean_types and task.measure == replace(recorded, mean_types=(), languages=None)
    alone = worker.with_signals(replace(task, measure=recorded))
    assert alone.measure.mean_types == () and not alone.config.mean_vectors


def test_what_cannot_be_added_up_is_refused(made: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the states of a copy cannot be taken out of a mean"):
        replace(made, duplicates="once")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr(worker, "MOST_SUMMED", 3 * 32 * 5)
        with pytest.raises(ConfigError, match="3 layers of 32 dimensions allow at most 5"):
            afn_ray.run(replace(made, store=str(tmp_path / "s")))


def test_a_shard_costs_one_put_one_get_and_at_most_the_estimated_bytes(
    made: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = manifest.find_run(made.store)
    measure = Measure.of_dict(run.info["measure"])
    shards, _ = plans.read_shards(run)
    puts, gets = estimate._num_requests(shards, measure)
    without = estimate._num_requests(shards, replace(measure, mean_types=()))
    assert (puts, gets) == (without[0] + len(shards), without[1] + len(shards))
    sizes = manifest.read_table(run, "shards")["vectors_bytes"].to_numpy()
    num_sums = len(LAYERS) * NUM_TYPES * 32
    overhead = 4096  # footer and page headers of a file
    assert (sizes > num_sums).all()
    assert (sizes < estimate.BYTES_PER_SUM * num_sums + overhead).all()
    reads: list[str] = []
    right = shard_reading.CommittedFile.read

    def read(self: shard_reading.CommittedFile) -> bytes:
        reads.append(self.name)
        return right(self)

    monkeypatch.setattr(shard_reading.CommittedFile, "read", read)
    commits = shard_files.find_commits(made.store, measure.id, shards)
    ordered = commits.in_order(shard.id for shard in shards)
    committed = shard_reading.CommittedShards(
        made.store, measure.id, ordered, [shard.num_bytes for shard in shards]
    )
    vocabulary = manifest.read_table(run, "vocabulary")
    tables = mean_vectors.vector_tables(Inline(), committed, LAYERS, measure.mean_types, vocabulary)
    assert len(reads) == len(set(reads)) == len(shards)
    assert tables["moments"].equals(manifest.read_table(run, "moments"))
