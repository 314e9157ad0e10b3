"""The neurons of each token against plain Hugging Face, what their tables say against counting, and
the command.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import afn_ray
from afn_ray.analysis import concepts, explain, verify
from afn_ray.analysis.explanation import Question
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, IncompleteRun, ModelError, StoreError
from afn_ray.model.signals import Neurons, Strength
from afn_ray.reduce import neurons
from afn_ray.schema import neurons_column
from afn_ray.store import manifest
from conftest import edit_checksummed, edit_table, recommit, save_model, write_jsonl
from families import PACKED, PADDED, SMALL
from test_families import documents, family  # noqa: F401
from test_signals import load

TOP = 5
BEHIND = re.compile(
    r"\.(output\.dense|ffn_output|ffn\.lin2|mlp\.Wo|mlp\.c_proj|"
    r"mlp\.dense_4h_to_h|mlp\.down_proj|mlp\.fc2|fc2)$"
)
"""The last product of a block's MLP, by its name in each family; in BERT's kin attention has one
like it.
"""
DENSE = [n for n in [*PACKED, *PADDED] if n != "qwen2-moe"]


def plain_neurons(folder: Path, ids: list[int]) -> list[np.ndarray]:
    """Inputs of the last product of each block's MLP, [n_tokens, n_neurons] each."""
    plain = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[np.ndarray] = []
    for name, module in plain.named_modules():
        if BEHIND.search(name) and "attention.output" not in name:
            module.register_forward_pre_hook(
                lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).numpy())
            )
    with torch.inference_mode():
        plain(input_ids=torch.tensor([ids]))
    return seen


@pytest.mark.parametrize("name", DENSE)
def test_neurons_are_those_of_the_plain_model(name: str, family: Any) -> None:  # noqa: F811
    folder, _ = family(name)
    loaded = load(folder, frozenset({"neurons"}), [1, 3])
    texts = documents(5, [9, 30, 1])
    ids, lengths = np.concatenate([np.array(t) for t in texts]), [len(t) for t in texts]
    values, numbers, _ = loaded.submit(ids, lengths, (Strength(), Neurons(TOP))).result()
    assert len(values) == 2 + 2 * TOP and numbers.dtype == np.int32
    of_neurons = values[2:].reshape(2, TOP, -1), numbers.reshape(2, TOP, -1)
    bounds = np.cumsum(lengths)[:-1]
    parts = zip(*(np.split(x, bounds, axis=2) for x in of_neurons), strict=True)
    for text, part in zip(texts, parts, strict=True):
        expected = plain_neurons(folder, text)
        assert len(expected) == 4
        for layer, got, which in zip((1, 3), *part, strict=True):
            states = expected[layer - 1]
            furthest = -np.sort(-np.abs(states), axis=1)[:, :TOP]
            np.testing.assert_allclose(np.abs(got.T), furthest, rtol=2e-5, atol=1e-8)
            there = np.take_along_axis(states, which.T, axis=1)
            np.testing.assert_allclose(got.T, there, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_half_precision_neurons_stay_near(name: str, family: Any) -> None:  # noqa: F811
    ids = np.array(documents(5, [30])[0])
    loaded = load(family(name)[0], frozenset({"neurons"}), [3], "bfloat16")
    values, which, _ = loaded.submit(ids, [30], (Strength(), Neurons(TOP))).result()
    got = values[1:]
    there = np.take_along_axis(plain_neurons(family(name)[0], ids.tolist())[2], which.T, axis=1)
    assert np.quantile(np.abs(got.T - there) / np.abs(there), 0.9) < 0.05


def test_an_mlp_that_runs_in_pieces_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL, chunk_size_feed_forward=1)
    folder = save_model(tmp_path / "pieces", config)
    with pytest.raises(ModelError, match="runs its MLP in pieces"):
        load(folder, frozenset({"neurons"}), [2]).measure(
            np.arange(5, 14), [9], (Strength(), Neurons(TOP))
        )


def test_experts_are_refused(family: Any) -> None:  # noqa: F811
    with pytest.raises(ModelError, match="mixture of 4 experts"):
        load(family("qwen2-moe")[0], frozenset({"neurons"}))


def test_an_mlp_with_fewer_neurons_gives_all_it_has(family: Any) -> None:  # noqa: F811
    loaded = load(family("bert")[0], frozenset({"neurons"}), [2])
    ids = np.array([7, 8, 9])
    found, which, _ = loaded.submit(ids, [3], (Strength(), Neurons(60))).result()
    values = found[1:]
    assert (
        sorted(which[:48, 0]) == list(range(48)) and not values[48:].any() and not which[48:].any()
    )
    lists = neurons.lists_of(which, values).to_pylist()
    assert [len(items) for items in lists] == [48, 48, 48]


# --- a run
# -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> RunConfig:
    """A run in several shards that recorded neurons of two layers."""
    folder = tmp_path_factory.mktemp("neurons")
    corpus = write_jsonl(
        folder / "c.jsonl", [{"text": t} for t in [*verses[:120], "", "Nebuchadnezzar " * 3]]
    )
    config = RunConfig(
        corpus=(str(corpus),),
        model=str(tiny_bert),
        store=str(folder / "store"),
        executor="inline",
        layers="0,1,3",
        signals="neurons",
        top_neurons=TOP,
        dtype="float32",
        shard_bytes=6000,
        screen=0,
    )
    with afn_ray.run(config) as run:
        assert run.info["counts"]["shards"] > 2
    return config


def rows_of(run: afn_ray.Run, layer: int) -> list[tuple[int, bool, list[dict[str, Any]]]]:
    """Type, whether it is special, and neurons of each token that has a list."""
    rows: list[tuple[int, bool, list[dict[str, Any]]]] = run.sql(
        f"SELECT token_id, is_special, neurons_{layer} FROM token_neurons POSITIONAL JOIN tokens "
        f"WHERE neurons_{layer} IS NOT NULL"
    ).fetchall()
    return rows


def check_tables(
    run: afn_ray.Run, layer: int, rows: list[tuple[int, bool, list[dict[str, Any]]]]
) -> None:
    """``neurons`` and ``neuron_types`` against plain counting."""
    types = Counter(t for t, special, _ in rows if not special)
    met: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for token_id, special, items in rows:
        for item in () if special else items:
            met[item["neuron"]][token_id].append(item["value"])
    found = (
        run.sql("FROM neurons WHERE layer = ? ORDER BY neuron", [layer])
        .to_arrow_table()
        .to_pylist()
    )
    assert [r["neuron"] for r in found] == sorted(met)
    for row in found:
        of = met[row["neuron"]]
        n = sum(map(len, of.values()))
        assert (row["n"], row["n_types"]) == (n, len(of)) and row["share"] == n / types.total()
        assert row["largest"] == max(v for values in of.values() for v in values)
        np.testing.assert_allclose(
            row["mean"], sum(v for values in of.values() for v in values) / n, atol=1e-6
        )
        lift = {t: len(v) / n / (types[t] / types.total()) for t, v in of.items()}
        bits = {t: len(of[t]) / n * math.log2(lift[t]) for t in of}
        np.testing.assert_allclose(row["selectivity"], sum(bits.values()), rtol=1e-9, atol=1e-12)
        assert len(row["types"]) == min(len(of), neurons.TOP_TYPES)
        got = [bits[t["token_id"]] for t in row["types"]]
        np.testing.assert_allclose(
            got, sorted(bits.values(), reverse=True)[: len(got)], rtol=1e-9, atol=1e-12
        )
        for t in row["types"]:
            assert t["n"] == len(of[t["token_id"]]) and math.isclose(t["lift"], lift[t["token_id"]])
    pairs = run.sql(
        "SELECT neuron, token_id, n, mean, share FROM neuron_types WHERE layer = ?", [layer]
    ).fetchall()
    often = {(i, t): v for i, of in met.items() for t, v in of.items() if len(v) >= neurons.MIN_N}
    assert {(i, t) for i, t, *_ in pairs} == often.keys() and often
    for i, t, n, mean, share in pairs:
        assert (n, share) == (len(often[i, t]), n / types[t])
        np.testing.assert_allclose(mean, np.mean(often[i, t]), atol=1e-6)


def test_tables_are_what_counting_gives(made: RunConfig) -> None:
    with afn_ray.open_run(made.store) as run:
        n = run.info["counts"]["tokens"]
        assert run.sql(
            "SELECT count(*), count(DISTINCT (doc, position)) FROM token_neurons"
        ).fetchall() == [(n, n)]
        assert run.sql(
            "SELECT count(*) FROM token_neurons a POSITIONAL JOIN tokens b "
            "WHERE (a.doc, a.position) <> (b.doc, b.position)"
        ).fetchall() == [(0,)]
        texts = run.sql(
            "SELECT DISTINCT t.token_id, t.text, v.text FROM (SELECT unnest(types) AS t FROM "
            "neurons) "
            "JOIN vocabulary v ON v.token_id = t.token_id"
        ).fetchall()
        assert texts and all(a == b for _, a, b in texts)
        for layer in (1, 3):
            rows = rows_of(run, layer)
            assert len(rows) == n and all(len(items) == TOP for *_, items in rows)
            check_tables(run, layer, rows)
        assert "neurons_0" not in run.sql("FROM token_neurons").columns


def test_sums_over_shards_are_sums_over_the_whole(made: RunConfig) -> None:
    folder = manifest.find_run(made.store)
    summaries: dict[int, list[neurons.Pairs]] = {1: [], 3: []}
    whole = neurons.PairSummary((1, 3))
    for shard in manifest.read_table(folder, "shards").to_pylist():
        tokens = pq.read_table(f"{made.store}/{shard['tokens_file']}")
        path = f"{made.store}/{shard['neurons_file']}"
        whole.add(tokens["token_id"].to_numpy(), tokens["flags"].to_numpy(), pq.read_table(path))
        pairs = pq.read_table(path.replace("-neurons.", "-pairs."))
        for layer, parts in summaries.items():
            parts.append(neurons.Pairs.from_table(pairs.filter(pa.compute.field("layer") == layer)))
    for (layer, parts), expected in zip(summaries.items(), whole.tables(), strict=True):
        assert len(parts) > 2
        for order in (parts, parts[::-1], [neurons.Pairs.merge(parts[:2]), *parts[2:]]):
            assert neurons.Pairs.merge(order).to_table(layer).equals(expected)


def test_neurons_of_high_tokens_alone(made: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"neurons_of is 'high', but what is HIGH.*--thresholds RUN"
    ):
        replace(made, neurons_of="high")
    with pytest.raises(
        ConfigError, match="neurons_of is 'high', but signals does not have neurons"
    ):
        replace(made, neurons_of="high", thresholds=made.store, signals="shift", top_neurons=8)
    with pytest.raises(ConfigError, match="top_neurons is 5, but signals does not have neurons"):
        replace(made, signals="shift")
    with pytest.raises(
        ConfigError, match="ask for 803 numbers of each token, expected at most 640"
    ):
        afn_ray.run(replace(made, top_neurons=200, store=str(tmp_path / "wide")))
    base = afn_ray.run(
        replace(made, signals="strength", top_neurons=8, store=str(tmp_path / "base"))
    )
    config = replace(made, neurons_of="high", thresholds=base.uri, store=str(tmp_path / "store"))
    with afn_ray.run(config) as run, afn_ray.open_run(made.store) as other:
        for layer in (1, 3):
            sql = (
                f"SELECT doc, position, neurons_{layer} FROM {{}} WHERE neurons_{layer} IS NOT "
                "NULL ORDER BY ALL"
            )
            high = (
                f"(FROM token_neurons JOIN (SELECT doc, position, high_{layer} FROM tokens) USING "
                "(doc, position) "
                f"WHERE high_{layer})"
            )
            got = run.sql(sql.format("token_neurons")).fetchall()
            assert got == other.sql(sql.format(high)).fetchall() and len(got) > 100
            rows = run.sql(
                f"SELECT token_id, is_special, neurons_{layer} FROM token_neurons "
                "JOIN (SELECT doc, position, token_id, is_special FROM tokens) USING (doc, "
                "position) "
                f"WHERE neurons_{layer} IS NOT NULL"
            ).fetchall()
            check_tables(run, layer, rows)
        assert concepts.contexts(run, 3, rows[0][2][0]["neuron"])
        assert concepts.neurons_of_word(run, "the", 3, 3)[1] > 100
    assert not verify.verify_store(config.store).findings
    base.close()


def test_verify_proves_them_and_finds_what_was_changed(made: RunConfig) -> None:
    found = verify.verify_store(made.store)
    assert not found.findings and not found.unproved and not found.foreign and not found.orphans
    folder = manifest.find_run(made.store)
    (shard, *_) = manifest.read_table(folder, "shards").to_pylist()
    path = Path(made.store, shard["neurons_file"])
    commit = path.parent / "commit.json"
    kept, kept_commit = path.read_bytes(), commit.read_bytes()
    table = pq.read_table(path)
    at = table.column_names.index(neurons_column(3))
    items = table.column(at).combine_chunks()
    for change, why in (
        (table.slice(1), "its commit says"),
        (
            table.take(pa.array([1, 0, *range(2, len(table))])),
            "are not of the tokens that should have neurons",
        ),
        (
            table.set_column(
                at,
                table.schema.field(at),
                pa.array([x[::-1] for x in items.to_pylist()], items.type),
            ),
            "values at layer 3 that are never recorded",
        ),
        (
            table.set_column(
                at,
                table.schema.field(at),
                pa.array(
                    [[{**y, "neuron": y["neuron"] ^ 1} for y in x] for x in items.to_pylist()],
                    items.type,
                ),
            ),
            "not the sum of the neurons beside it",
        ),
    ):
        try:
            pq.write_table(change.replace_schema_metadata(table.schema.metadata), path)
            recommit(str(path.parent), "neurons", path.read_bytes())
            (finding,) = [f for f in verify.verify_store(made.store).findings if f.kind == "rows"]
            assert why in finding.message
        finally:
            path.write_bytes(kept)
            commit.write_bytes(kept_commit)
    assert not verify.verify_store(made.store).findings


@pytest.mark.parametrize(
    ("table", "column"), [("neurons", "n"), ("neurons", "selectivity"), ("neuron_types", "mean")]
)
def test_verify_counts_again_what_lies_behind_a_good_seal(
    table: str, column: str, made: RunConfig
) -> None:
    uri = manifest.find_run(made.store).uri
    kept = [
        (Path(uri, file), Path(uri, file).read_bytes()) for file in (f"{table}.parquet", "run.json")
    ]

    def change(old: pa.Table) -> pa.Table:
        at = old.column_names.index(column)
        values = [x + (i == 7) for i, x in enumerate(old[column].to_pylist())]
        return old.set_column(at, old.schema.field(at), pa.array(values, old.schema.field(at).type))

    try:
        edit_table(uri, table, change)
        (finding,) = verify.verify_store(made.store).findings
        assert finding.kind == "tables" and f"{table}.parquet" in finding.uri
        assert ("DuckDB's count" if column == "n" else f"row 7: {column} is") in finding.message
    finally:
        for file, data in kept:
            file.write_bytes(data)


def test_the_name_of_a_run_is_no_sql(made: RunConfig, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store)
    (run,) = (store / "runs").iterdir()
    sql = "x') ; COPY (SELECT 1) TO 'pwned.csv'; --"

    def is_refused(uri: Path, said: str) -> None:
        with pytest.raises(StoreError, match=said):
            afn_ray.open_run(str(uri))
        with pytest.raises(StoreError, match=said):
            afn_ray.write_catalog(str(uri), tmp_path / "catalog.duckdb")

    edit_checksummed(
        str(run / "run.json"), lambda info: info["tables"]["neuron_types"].update(name=sql)
    )
    is_refused(store, "is not the name of a run's table")
    run = run.rename(run.with_name(sql))
    edit_checksummed(str(run / "run.json"), lambda info: info.update(id=sql))
    is_refused(
        store, "is neither a store nor a run"
    )  # which has no run of a name that afn-ray gives
    is_refused(run, "is not the name of a run's table")
    assert not Path("pwned.csv").exists()


def test_a_neuron_without_bounds_quarantines_its_document(
    made: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, why = (
        Neurons.measure,
        "the model gave a neuron of 16,777,216 or more, or one that is not finite",
    )
    everywhere = False

    def endless(self: Neurons, site: Any) -> Any:
        found = plain(self, site)
        for values in found[:TOP]:
            (values if everywhere else values[..., :1]).mul_(
                1e12
            )  # of all tokens, or of the first of a batch
        return found

    monkeypatch.setattr(Neurons, "measure", endless)
    with afn_ray.run(replace(made, store=str(tmp_path / "store"))) as run:
        status = Counter(status for (status,) in run.sql("SELECT status FROM documents").fetchall())
        assert 3 <= status[f"quarantined: {why}"] < 20 and status["ok"] > 100
        assert set(status) == {"ok", "empty", f"quarantined: {why}"}
    everywhere = True
    with pytest.raises(IncompleteRun, match=f"none of 42 documents could be measured, .*: {why}"):
        afn_ray.run(replace(made, store=str(tmp_path / "other")))


def test_a_catalog_has_them(made: RunConfig, tmp_path: Path) -> None:
    import duckdb

    afn_ray.write_catalog(made.store, tmp_path / "c.duckdb")
    with (
        duckdb.connect(tmp_path / "c.duckdb", read_only=True) as catalog,
        afn_ray.open_run(made.store) as run,
    ):
        for view in ("token_neurons", "neurons", "neuron_types"):
            assert (
                catalog.sql(f"FROM {view}").fetchall() == run.sql(f"FROM {view}").fetchall() != []
            )


# --- the command
# -----------------------------------------------------------------------------------------


def test_neurons_of_a_word_are_those_that_counting_ranks_first(made: RunConfig) -> None:
    word = "Nebuchadnezzar"  # of several pieces
    with afn_ray.open_run(made.store) as run:
        rows = run.sql(
            "SELECT w.n_tokens IS NOT NULL, t.neurons_3 FROM token_neurons t POSITIONAL JOIN "
            "tokens k "
            "LEFT JOIN words w ON w.doc = t.doc AND t.position >= w.position AND t.position < "
            "w.position + w.n_tokens "
            f"AND lower(w.text) = lower('{word}') WHERE NOT k.is_special"
        ).fetchall()
        found, occurrences = concepts.neurons_of_word(run, word, 3, 1000)
        assert occurrences == 3
    inside = Counter(i["neuron"] for is_in, items in rows if is_in for i in items)
    outside = Counter(i["neuron"] for is_in, items in rows if not is_in for i in items)
    n_in = sum(is_in for is_in, _ in rows)
    assert n_in > 3
    expected = {i: (n / n_in, outside[i] / (len(rows) - n_in)) for i, n in inside.items()}
    got = {c.neuron.neuron: (c.share, c.elsewhere) for c in found}
    assert got == {i: pytest.approx(x) for i, x in expected.items() if x[0] > x[1]}
    score = [c.share * math.log(c.share / max(c.elsewhere, 0.5 / len(rows))) for c in found]
    assert score == sorted(score, reverse=True)


def test_a_word_that_is_met_too_often_is_nowhere_elsewhere(
    made: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with afn_ray.open_run(made.store) as run:
        whole, occurrences = concepts.neurons_of_word(run, "the", 3, 1000)
        monkeypatch.setattr(concepts, "MOST_OCCURRENCES", occurrences // 2)
        part, looked_at = concepts.neurons_of_word(run, "the", 3, 1000)
    assert looked_at == occurrences // 2 > 50
    exact = {c.neuron.neuron: c for c in whole}
    common = [c for c in part if c.neuron.neuron in exact and c.share > 0.2]
    assert common
    for c in common:
        assert c.elsewhere == pytest.approx(exact[c.neuron.neuron].elsewhere, abs=0.05)


def test_contexts_are_the_tokens_with_most_of_the_neuron(made: RunConfig) -> None:
    with afn_ray.open_run(made.store) as run:
        number = concepts.selective_neurons(run, 3, 1)[0].neuron
        rows = run.sql(
            "SELECT t.doc, t.position, t.neurons_3 FROM token_neurons t POSITIONAL JOIN tokens k "
            "WHERE NOT k.is_special"
        ).fetchall()
        values = sorted(
            (-abs(i["value"]), d, p) for d, p, items in rows for i in items if i["neuron"] == number
        )
        found = concepts.contexts(run, 3, number)
        assert [(-abs(c.value), c.doc, c.position) for c in found] == values[: concepts.CONTEXTS]
        for c in found:
            words = run.sql(
                "SELECT text, position, n_tokens FROM words WHERE doc = ? ORDER BY position",
                [c.doc],
            )
            texts = words.fetchall()
            (at,) = (i for i, (_, p, n) in enumerate(texts) if p <= c.position < p + n)
            assert c.word == texts[at][0]
            assert c.left == " ".join(t for t, *_ in texts[max(0, at - concepts.WORDS_BESIDE) : at])


def command(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        commands.main(["neurons", *args])
    return int(ended.value.code or 0)


def test_the_command_prints_tables_and_json(
    made: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, has in (
        ([], "answers to"),
        (["--word", "earth", "--layer", "1", "--top", "4"], "in the word"),
        (["--neuron", "3"], "Layer 3, neuron 3"),
    ):
        assert command(made.store, *args) == 0
        assert has in capsys.readouterr().out
        assert command(made.store, *args, "--json") == 0
        value = json.loads(capsys.readouterr().out)
        assert value["layer"] == (1 if "--layer" in args else 3)
        assert len(value.get("neurons", [])) == (4 if "--top" in args else 15 if not args else 0)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--word", "xyzzy"], "'xyzzy' does not occur"),
        (["--word", "the Lord"], "it is more than one word, ask for one"),
        (["--layer", "2"], "neurons of layer 2 were not recorded; those of 1, 3 were"),
        (["--neuron", "4000"], "no token of the run has neuron 4000"),
        (["--neuron", "-1"], "less than 0"),
        (["--neuron", "1", "--word", "a"], "not allowed with"),
    ],
)
def test_what_is_not_there_is_told(
    args: list[str], why: str, made: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(made.store, *args) == 2
    assert why in capsys.readouterr().err


def test_a_run_without_neurons_says_how_to_have_them(
    made: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with afn_ray.run(
        replace(made, signals="strength", top_neurons=8, store=str(tmp_path / "s"))
    ) as run:
        assert (
            run.sql("FROM token_neurons").fetchall()
            == run.sql("FROM neuron_types").fetchall()
            == []
        )
    assert command(str(tmp_path / "s")) == 2
    assert "recorded no neurons; 'afn run --signals neurons' does" in capsys.readouterr().err


def test_a_text_is_explained_against_a_run_with_neurons(made: RunConfig, tmp_path: Path) -> None:
    with afn_ray.run(
        replace(made, signals="strength", top_neurons=8, store=str(tmp_path / "base"))
    ) as base:
        high = replace(made, neurons_of="high", thresholds=base.uri, store=str(tmp_path / "high"))
        afn_ray.run(high).close()
        plain = explain.explain(base.uri, "In the beginning", Question(signals="shift"))
        for store in (made.store, high.store):
            assert (
                explain.explain(store, "In the beginning", Question(signals="shift")).tokens
                == plain.tokens
            )
    with pytest.raises(ConfigError, match="neurons, which is no number a token"):
        explain.explain(made.store, "In the beginning", Question(signals="neurons"))
