"""Every signal against a few lines of plain Hugging Face with eager attention, and what a run keeps
of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import afn_ray
from afn_ray import model
from afn_ray.analysis import verify
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, CorpusError, IncompleteRun, ModelError
from afn_ray.model import attention
from afn_ray.model.signals import (
    Centred,
    Received,
    Shift,
    Signal,
    Strength,
    Trimmed,
    find_signals,
    series,
)
from afn_ray.runs import outliers
from afn_ray.runs.worker import NONE_MEASURED
from afn_ray.store import manifest, storage
from conftest import config_of, edit_table, fenced, find_model, write_jsonl
from families import CONTEXT, PACKED, PADDED
from test_families import LAYERS, documents, family  # noqa: F401

TEXTS = documents(1, [1, CONTEXT, 7, 7, 30, 2])
SIGNALS: list[Signal] = [Strength(), Shift(), Received()]


@pytest.fixture(scope="module")
def attentive(family: Any) -> Callable[[str], model.Model]:  # noqa: F811
    """A family's model that reads attention, made once."""
    return cache(lambda name: load(family(name)[0], Received.needs))


def load(
    folder: Path, needs: frozenset[str], layers: list[int] = LAYERS, dtype: str = "float32"
) -> model.Model:
    files = find_model(folder)
    loaded = model.Model(files, layers, dtype, "cpu", 64)
    model.prepare(loaded, [documents(3, [n])[0] for n in (4, 9, CONTEXT)], needs)
    return loaded


def measure(
    loaded: model.Model, signals: list[Signal], filler: int = 9
) -> list[dict[str, np.ndarray]]:
    """Values of each series by text, out of one batch."""
    lengths = [len(t) for t in TEXTS]
    ids = np.concatenate([*(np.array(t) for t in TEXTS), np.full(filler * loaded.packed, 7)])
    values = loaded.measure(ids, lengths, signals)[:, : sum(lengths)]
    names = [s.name for s in series(loaded.layers, signals)]
    return [
        dict(zip(names, part, strict=True))
        for part in np.split(values, np.cumsum(lengths)[:-1], axis=1)
    ]


@cache
def plain(folder: Path) -> list[Any]:
    """Hidden states and attention weights of the plain model, for each of ``TEXTS`` alone."""
    kind = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return [
            kind(input_ids=torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
            for ids in TEXTS
        ]


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_shift_is_what_a_block_changed(name: str, family: Any) -> None:  # noqa: F811
    folder, _ = family(name)
    loaded = load(folder, frozenset())
    for out, got in zip(plain(folder), measure(loaded, [Strength(), Shift()]), strict=True):
        states = out.hidden_states
        assert [n for n in got if n.startswith("shift")] == ["shift_1", "shift_2", "shift_3"]
        for k in (1, 2, 3):
            expected = (states[k] - states[k - 1])[0].double().norm(dim=-1).numpy()
            np.testing.assert_allclose(got[f"shift_{k}"], expected, rtol=2e-5)


def received(weights: torch.Tensor, sees: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``weights`` [heads, queries, keys], ``sees`` [queries, keys]: from others, and from itself,
    [heads, keys].
    """
    n = weights.shape[-1]
    others = 1 - torch.eye(n, dtype=torch.float64)
    may = (sees * others).sum(0).clamp(min=1)
    wide = weights.double()
    return ((wide * others).sum(1) / may).numpy(), wide.diagonal(dim1=1, dim2=2).numpy()


def seen_by(loaded: model.Model, weights: torch.Tensor) -> torch.Tensor:
    """Keys that a query may look at, in the plain model: a weight that is 0 in every head is
    none.
    """
    return (weights > 0).any(0).double()


@pytest.mark.parametrize("name", PACKED)
def test_attention_is_that_of_the_eager_model(
    name: str,
    family: Any,  # noqa: F811
    attentive: Callable[[str], model.Model],
) -> None:
    loaded = attentive(name)
    for out, got in zip(plain(family(name)[0]), measure(loaded, SIGNALS), strict=True):
        for k in (1, 2, 3):
            weights = out.attentions[k - 1][0]
            others, own = received(weights, seen_by(loaded, weights))
            np.testing.assert_allclose(got[f"attention_{k}"], others.mean(0), rtol=2e-5, atol=1e-9)
            np.testing.assert_allclose(
                got[f"attention_self_{k}"], own.mean(0), rtol=2e-5, atol=1e-9
            )


VALUES: dict[str, Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "bert": lambda b, h: (b.attention.self.value(h), b.attention.output.dense.weight.t()),
    "distilbert": lambda b, h: (b.attention.v_lin(h), b.attention.out_lin.weight.t()),
    "gpt2": lambda b, h: (b.attn.c_attn(b.ln_1(h)).chunk(3, -1)[2], b.attn.c_proj.weight),
    "llama": lambda b, h: (b.self_attn.v_proj(b.input_layernorm(h)), b.self_attn.o_proj.weight.t()),
    "phi": lambda b, h: (b.self_attn.v_proj(b.input_layernorm(h)), b.self_attn.dense.weight.t()),
}
"""Values of a block's input, and the output projection [heads * size, hidden]."""


@pytest.mark.parametrize("name", VALUES)
def test_norm_weighted_attention_is_kobayashis(
    name: str,
    family: Any,  # noqa: F811
    attentive: Callable[[str], model.Model],
) -> None:
    folder, kind = family(name)
    loaded = attentive(name)
    blocks = next(m for m in kind.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    for out, got in zip(plain(folder), measure(loaded, SIGNALS), strict=True):
        for k in (1, 2, 3):
            weights = out.attentions[k - 1][0]
            with torch.inference_mode():
                value, projection = VALUES[name](blocks[k - 1], out.hidden_states[k - 1][0])
            parts = projection.unflatten(0, (weights.shape[0], -1))  # [heads, size, hidden]
            value = value.unflatten(-1, (-1, parts.shape[1])).transpose(0, 1)
            value = value.repeat_interleave(len(parts) // len(value), 0)
            norms = (value @ parts).detach().double().norm(dim=-1).numpy()
            others, _ = received(weights, seen_by(loaded, weights))
            np.testing.assert_allclose(
                got[f"attention_norm_{k}"], (others * norms).sum(0), rtol=2e-5, atol=1e-9
            )


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "mistral"])
def test_attention_of_long_texts_is_summed_block_by_block(
    name: str, attentive: Callable[[str], model.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = attentive(name)
    whole = measure(loaded, SIGNALS)
    monkeypatch.setattr(
        attention, "SCORES", 4 * CONTEXT * 7
    )  # of the longest text seven queries at a time
    for one, other in zip(whole, measure(loaded, SIGNALS), strict=True):
        for series_name, values in one.items():
            np.testing.assert_allclose(other[series_name], values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_half_precision_signals_stay_near(
    name: str,
    family: Any,  # noqa: F811
    attentive: Callable[[str], model.Model],
) -> None:
    both = [attentive(name), load(family(name)[0], Received.needs, dtype="bfloat16")]
    for full, half in zip(*(measure(one, SIGNALS) for one in both), strict=True):
        for series_name, values in full.items():
            scale = np.maximum(values, np.median(values))
            error = np.abs(half[series_name] - values) / np.where(
                scale > 0, scale, 1
            )  # a lone token gets no attention
            assert np.quantile(error, 0.9) < 0.02, series_name


@pytest.mark.parametrize("name", PADDED)
def test_a_padded_family_has_no_attention_to_read(name: str, family: Any) -> None:  # noqa: F811
    with pytest.raises(
        ModelError, match="gives no attention weights to read: its batches are padded, since"
    ):
        load(family(name)[0], Received.needs)


# --- controls
# --------------------------------------------------------------------------------------------


def test_without_gain_and_bias_every_strength_is_the_root_of_the_width(minilm: Path) -> None:
    files = find_model(minilm)
    loaded = model.Model(files, [1, 4, 6], "float32", "cpu", 64)
    ids = np.arange(1000, 1060, dtype=np.int64)
    model.prepare(loaded, [ids[:5].tolist(), ids.tolist()], Centred.needs)
    strength, centred = np.split(loaded.measure(ids, [60], [Strength(), Centred()]), 2)
    np.testing.assert_allclose(centred, np.sqrt(384), rtol=1e-4)
    assert strength.std() > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_blocks_that_end_in_a_sum_have_no_gain_to_leave_out(
    name: str,
    family: Any,  # noqa: F811
) -> None:
    folder, _ = family(name)
    with pytest.raises(ModelError, match="do not end with a LayerNorm"):
        load(folder, Centred.needs)


@pytest.mark.parametrize("name", ["bert", "albert", "mpnet", "deberta-v2"])
def test_gains_are_found_in_padded_and_in_shared_blocks(
    name: str,
    family: Any,  # noqa: F811
) -> None:
    for got in measure(load(family(name)[0], Centred.needs), [Centred()]):
        for values in got.values():
            np.testing.assert_allclose(values, np.sqrt(32), rtol=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama", "mpnet"])
def test_trimmed_strengths_lack_the_dimensions_given(name: str, family: Any) -> None:  # noqa: F811
    folder, _ = family(name)
    files = find_model(folder)
    loaded = model.Model(files, [0, 2], "float32", "cpu", 64, [[3, 1], [30]])
    model.prepare(loaded, [documents(3, [n])[0] for n in (4, 9, CONTEXT)], Trimmed.needs)
    for out, got in zip(plain(folder), measure(loaded, [Trimmed()]), strict=True):
        for layer, dims in ((0, [3, 1]), (2, [30])):
            states = out.hidden_states[layer][0].double()
            states[:, dims] = 0
            np.testing.assert_allclose(
                got[f"strength_trimmed_{layer}"], states.norm(dim=-1).numpy(), rtol=2e-5
            )


# --- a run
# -----------------------------------------------------------------------------------------------

ALL = "attention,centred,shift,trimmed"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> RunConfig:
    """A run of every signal over some shards, with windows that overlap."""
    folder = tmp_path_factory.mktemp("signals")
    corpus = write_jsonl(folder / "c.jsonl", [{"text": t} for t in verses[:80]])
    config = config_of(
        tiny_bert,
        corpus,
        folder / "store",
        layers="0,1,3",
        signals=ALL,
        shard_bytes=2048,
        window_tokens=24,
    )
    afn_ray.run(config).close()
    return config


def test_each_signal_is_a_column_for_each_layer_it_has(made: RunConfig) -> None:
    with afn_ray.open_run(made.store) as run:
        names = run.sql("FROM tokens LIMIT 0").columns
        labels = ("quartile", "high", "sink")
        others = [n for n in names if n.rpartition("_")[2].isdecimal() and not n.startswith(labels)]
        assert others == [
            *(f"strength_{k}" for k in (0, 1, 3)),
            *(
                f"{c}_{k}"
                for c in (
                    "attention",
                    "attention_self",
                    "attention_norm",
                    "strength_centred",
                    "shift",
                )
                for k in (1, 3)
            ),
            *(f"strength_trimmed_{k}" for k in (0, 1, 3)),
        ]
        assert run.sql(
            "SELECT count(*) FROM documents WHERE mean_attention_norm_3 > 0"
        ).fetchall() == [(80,)]
        (row,) = run.sql(
            "SELECT min(strength_centred_3), max(strength_centred_3) FROM tokens"
        ).fetchall()
        assert row == pytest.approx((np.sqrt(32), np.sqrt(32)), rel=1e-3)


def test_tables_of_signals_are_what_the_rows_give(made: RunConfig) -> None:
    with afn_ray.open_run(made.store) as run:
        rows = run.sql("FROM signals").to_dicts()
        assert len(rows) == 13 and {r["signal"] for r in rows} == {
            "attention",
            "attention_self",
            "attention_norm",
            "strength_centred",
            "strength_trimmed",
            "shift",
        }
        for row in rows:
            column = f"{row['signal']}_{row['layer']}"
            quartiles, n, mean, least, most = run.sql(
                f"SELECT quantile_disc({column}, [0.25, 0.5, 0.75]), count(*), "
                f"avg({column}::DOUBLE), min({column}), "
                f"max({column}) FROM tokens WHERE NOT is_special"
            ).fetchall()[0]
            assert [row["q1"], row["q2"], row["q3"], row["n"], row["min"], row["max"]] == [
                *quartiles,
                n,
                least,
                most,
            ]
            assert row["mean"] == pytest.approx(mean, rel=1e-12)
        n_types = run.sql("SELECT count(*) FROM vocabulary WHERE layer = 3").fetchall()
        per_type = run.sql(
            "SELECT count(*) FROM signal_vocabulary WHERE layer = 3 AND signal = 'shift'"
        ).fetchall()
        assert per_type == n_types
        differ = """
            SELECT count(*) FROM signal_vocabulary v JOIN (
                SELECT token_id, is_special, count(*) AS n, median(shift_3) AS middle,
                    max(shift_3) AS most
                FROM tokens GROUP BY ALL
            ) t ON v.token_id = t.token_id AND (v.class = 'special') = t.is_special
            WHERE v.layer = 3 AND v.signal = 'shift' AND (v.n <> t.n OR v.max <> t.most)"""
        assert run.sql(differ).fetchall() == [(0,)]


def test_strength_is_the_same_with_other_signals_beside_it(made: RunConfig, tmp_path: Path) -> None:
    alone = replace(made, signals="strength", store=str(tmp_path / "store"))
    sql = (
        "SELECT doc, position, token_id, strength_0, strength_1, strength_3 FROM tokens ORDER BY "
        "doc, position"
    )
    with afn_ray.run(alone) as one, afn_ray.open_run(made.store) as other:
        assert one.sql(sql).fetchall() == other.sql(sql).fetchall()
        for table in ("thresholds", "vocabulary", "histogram"):
            assert one.sql(f"FROM {table}").fetchall() == other.sql(f"FROM {table}").fetchall()
        assert (
            one.sql("FROM signals").fetchall() == one.sql("FROM signal_vocabulary").fetchall() == []
        )


def test_shards_and_order_change_no_table_of_signals(made: RunConfig, tmp_path: Path) -> None:
    whole = replace(made, shard_bytes=1 << 20, store=str(tmp_path / "store"))
    with afn_ray.run(whole) as one, afn_ray.open_run(made.store) as other:
        assert one.info["counts"]["shards"] == 1 < other.info["counts"]["shards"]
        assert one.info["measure"]["outliers"] == other.info["measure"]["outliers"]
        for table in ("signals", "signal_vocabulary"):
            a, b = (run.sql(f"FROM {table}").to_arrow_table() for run in (one, other))
            for name in {"n", "n_docs", "token_id", "layer"} & {*a.column_names}:
                assert a[name].equals(b[name])
            for name in ("min", "q1", "q2", "q3", "max"):  # other batches may move the last bits
                np.testing.assert_allclose(a[name].to_numpy(), b[name].to_numpy(), rtol=1e-4)


def test_verify_proves_them_and_finds_what_was_changed(made: RunConfig) -> None:
    found = verify.verify_store(made.store)
    assert not found.findings and not found.unproved
    uri = manifest.find_run(made.store).uri
    for name in ("signals", "signal_vocabulary"):
        kept = [
            (Path(uri, file), Path(uri, file).read_bytes())
            for file in (f"{name}.parquet", "run.json")
        ]

        def change(table: pa.Table) -> pa.Table:
            at = table.column_names.index("q2")
            return table.set_column(
                at, table.schema.field("q2"), pa.array([9.0] * len(table), pa.float32())
            )

        try:
            edit_table(uri, name, change)
            (finding,) = verify.verify_store(made.store).findings
            assert (
                finding.kind == "tables"
                and f"{name}.parquet" in finding.uri
                and "q2 is 9.0" in finding.message
            )
        finally:
            for file, data in kept:
                file.write_bytes(data)


def test_outlier_dimensions_are_found_once_and_kept(
    made: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with afn_ray.open_run(made.store) as run:
        kept = run.info["measure"]["outliers"]
    assert [len(dims) for dims in kept] == [3, 3, 3]

    def fail(*args: Any) -> None:
        raise AssertionError("a second calibration")

    monkeypatch.setattr(outliers, "find_dimensions", fail)
    Path(made.corpus[0]).write_text(Path(made.corpus[0]).read_text() + '{"text": "one more"}\n')
    with afn_ray.run(made) as run:
        assert run.info["measure"]["outliers"] == kept


# --- names
# -----------------------------------------------------------------------------------------------


def test_names_are_sorted_and_strength_is_always_there() -> None:
    config = RunConfig(corpus=("c",), model="m", store="s", signals=" shift,attention, shift")
    assert config.signals == "strength,attention,shift"
    signals, names = find_signals(config.signals)
    assert [s.name for s in signals] == names == ["strength", "attention", "shift"]


@pytest.mark.parametrize("signal", ["shift", "neurons", "attention", "centred"])
def test_a_signal_that_no_layer_has_is_refused(
    signal: str, made: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=f"signals has {signal}, which the embeddings .layer 0. have not"
    ):
        afn_ray.run(replace(made, signals=signal, layers="0", store=str(tmp_path / "store")))


@pytest.mark.parametrize("spec", ["", "shift,,attention", "Shift", "shift;drop", "1"])
def test_what_is_no_list_of_names_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="expected names with commas between"):
        RunConfig(corpus=("c",), model="m", store="s", signals=spec)


def test_a_signal_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(
        ConfigError, match="no signal 'entropy'; there are strength, shift, centred"
    ):
        find_signals("entropy")


GUIDE = (Path(__file__).parents[2] / "infra/guide/signals.md").read_text("utf-8")
PACKAGE = (
    next(b for b in fenced(GUIDE, "py") if "class Largest(Signal):" in b)
    + """

dict = dict

class Wrong(Signal):
    name, columns, unit = "wrong", ("No Name",), ""
    def measure(self, site):
        return []

class Negative(Largest):
    name, columns = "negative", ("negative",)
    def measure(self, site):
        return [-site.hidden.abs().amax(-1).float()]

class Twice(Largest):
    name = "twice"

class High(Largest):
    name, columns = "high", ("high",)

class Apart(Largest):
    name, columns, is_series = "apart", ("apart",), False
"""
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package with signals, as if it were installed."""
    site = tmp_path / "site"
    (site / "their_signals-1.5.dist-info").mkdir(parents=True)
    (site / "their_signals.py").write_text(PACKAGE)
    names = {
        "largest": "Largest",
        "wrong": "Wrong",
        "negative": "Negative",
        "twice": "Twice",
        "gone": "Gone",
        "thing": "dict",
        "high": "High",
        "apart": "Apart",
    }
    entries = "".join(f"{name} = their_signals:{kind}\n" for name, kind in names.items())
    (site / "their_signals-1.5.dist-info" / "entry_points.txt").write_text(
        f"[afn_ray.signals]\n{entries}"
    )
    (site / "their_signals-1.5.dist-info" / "METADATA").write_text(
        "Name: their-signals\nVersion: 1.5\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")


def test_a_signal_of_another_package_is_measured_and_its_version_is_of_the_measure(
    package: None, tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:20]])
    config = RunConfig(
        corpus=(str(corpus),),
        model=str(tiny_bert),
        store=str(tmp_path / "store"),
        executor="inline",
        layers="0,2",
        signals="largest",
        dtype="float32",
    )
    with afn_ray.run(config) as run:
        assert run.info["measure"]["signals"] == ["strength", "largest of their-signals 1.5"]
        (wrong,) = run.sql(
            "SELECT count(*) FROM tokens WHERE largest_2 > strength_2 OR largest_2 <= 0"
        ).fetchall()
        assert wrong == (0,) and run.sql("SELECT count(*) FROM signals").fetchall() == [(2,)]
    assert not verify.verify_store(config.store).findings
    other, why = str(tmp_path / "other"), "the model gave a negative that is negative"
    with pytest.raises(IncompleteRun, match=f"none of 20 documents could be measured, .*: {why}"):
        afn_ray.run(replace(config, signals="negative", store=other))
    write_jsonl(
        corpus, [{"text": t} for t in verses[: NONE_MEASURED - 1]]
    )  # too few to accuse the model
    with pytest.raises(CorpusError, match=f"{NONE_MEASURED - 1} quarantined"):
        afn_ray.run(replace(config, signals="negative", store=other))
    (uri,) = (f.uri for f in storage.list_below(other) if f.uri.endswith("-documents.parquet"))
    assert set(pq.read_table(uri)["status"].to_pylist()) == {f"quarantined: {why}"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrong", "is no signal: columns is .'No Name',., expected names of small letters"),
        ("gone", "cannot be loaded: AttributeError"),
        ("thing", "is no subclass of afn_ray.signals.Signal"),
        ("largest,twice", "two signals measure largest"),
        (
            "high",
            "is no signal: columns is .'high',., expected names .* none of high, neurons, "
            "quartile, sink",
        ),
        ("apart", "is no signal: is_series is False, expected True"),
    ],
)
def test_a_class_that_is_no_signal_is_told(name: str, why: str, package: None) -> None:
    with pytest.raises(ConfigError, match=why):
        find_signals(name)
