"""The signal ``centred_mean``: strength without the layer's mean state,
which a calibration finds.
"""

from __future__ import annotations

import base64
import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray import model
from afn_ray.analysis import remeasure, vector_check, verify
from afn_ray.analysis.local_model import LocalModel
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, ModelError
from afn_ray.mean_texts import from_text, to_text
from afn_ray.measure import Measure
from afn_ray.model.signals import CentredMean, States, Strength
from afn_ray.runs import mean_states, measurer, worker
from afn_ray.runs.measurer import Measurer, find_model_files
from afn_ray.store import manifest
from afn_ray.store.shard_tables import ShardTable
from conftest import config_of, write_jsonl

LAYERS = (0, 1, 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> RunConfig:
    """A run of the signal over shards of two files."""
    folder = tmp_path_factory.mktemp("centred")
    short = [text for text in verses[:60] if len(text) < 160]  # each is one window
    for name, texts in (("a", short[:25]), ("b", short[25:40])):
        write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in texts])
    config = config_of(
        tiny_bert,
        folder / "a.jsonl",
        folder / "store",
        layers="0,1,3",
        signals="centred_mean",
        shard_bytes=2048,
    )
    config = replace(config, corpus=(*config.corpus, str(folder / "b.jsonl")))
    afn_ray.run(config).close()
    return config


def _means(run: afn_ray.Run) -> list[Any]:
    return [from_text(text, 32).astype(np.float64) for text in run.info["measure"]["means"]]


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_mpnet"])
def test_the_signal_is_the_distance_of_the_recorded_states(
    family: str, verses: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Packed and padded, against numpy over whole states."""
    folder = request.getfixturevalue(family)
    config = config_of(folder, tmp_path / "c", tmp_path / "s", layers="0,1,3")
    measuring = Measurer(worker.prepare(config, find_model_files(config), "cpu", "float32"))
    means = np.random.default_rng(3).normal(size=(3, 32)).astype(np.float32)
    measuring.model.subtract(list(means))
    prepared = measuring.preparer.prepare(verses[:7], [False] * 7)
    for batch in prepared.batches:
        states = measuring.model.measure(batch.ids, batch.lengths, (States(),))
        got = measuring.model.measure(batch.ids, batch.lengths, (CentredMean(),))
        wanted = np.linalg.norm(states.astype(np.float64) - means[:, None], axis=2)
        np.testing.assert_allclose(got[:, batch.kept], wanted[:, batch.kept], rtol=1e-6)


def test_the_mean_is_that_of_the_samples_tokens(made: RunConfig, tiny_bert: Path) -> None:
    """The whole corpus is the sample here; plain transformers is the reference."""
    import torch
    import transformers

    plain = transformers.AutoModel.from_pretrained(tiny_bert).eval()
    with afn_ray.open_run(made.store) as run:
        means = _means(run)
        rows = run.sql(
            "SELECT doc, token_id, is_special, strength_3, strength_centred_mean_3 "
            "FROM tokens ORDER BY doc, position"
        ).to_arrow_table()
    states: list[list[Any]] = [[] for _ in LAYERS]
    docs, ids = rows["doc"].to_numpy(), rows["token_id"].to_numpy()
    for doc in np.unique(docs):
        with torch.inference_mode():
            of_doc = torch.tensor([ids[docs == doc].tolist()])
            hidden = plain(of_doc, output_hidden_states=True).hidden_states
        for at, layer in enumerate(LAYERS):
            states[at].append(hidden[layer][0].double().numpy())
    is_normal = ~rows["is_special"].to_numpy()
    for at, mean in enumerate(means):
        here = np.concatenate(states[at])
        np.testing.assert_allclose(mean, here[is_normal].mean(axis=0), atol=1e-5)
    distances = np.linalg.norm(np.concatenate(states[2]) - means[2], axis=1)
    np.testing.assert_allclose(rows["strength_centred_mean_3"].to_numpy(), distances, rtol=1e-4)
    assert distances[is_normal].mean() < rows["strength_3"].to_numpy()[is_normal].mean()


def test_sinks_are_no_part_of_the_mean(
    made: RunConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = worker.with_signals(
        worker.prepare(made, find_model_files(made), "cpu", "float32"), "strength"
    )
    measuring = Measurer(task)
    right = measuring.model.measure

    def with_sinks(ids: Any, lengths: Any, signals: Any) -> Any:
        """The states, with those after the first token of each sequence 100 times as large."""
        states = right(ids, lengths, signals)
        places = np.cumsum([0, *lengths[:-1]]) + 1
        states[:, places] *= 100
        return states

    texts = verses[:5]
    monkeypatch.setattr(measuring.model, "measure", with_sinks)
    found = measuring.mean_states(texts)
    monkeypatch.setattr(measurer, "SINK_MEDIANS", 1e9)
    pulled = measuring.mean_states(texts)
    lengths = np.linalg.norm(found, axis=1)
    assert (lengths < 10).all() and (np.linalg.norm(pulled, axis=1) > 2 * lengths).all()
    assert measuring.mean_states([""]).shape == (3, 32) and not measuring.mean_states([""]).any()


def test_shards_order_and_later_text_change_no_mean(
    made: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with afn_ray.open_run(made.store) as run:
        kept = run.info["measure"]["means"]
        assert len(kept) == 3 and run.info["counts"]["shards"] > 1
        rows = run.sql("FROM signals").fetchall()
    other = replace(
        made, corpus=made.corpus[::-1], shard_bytes=1 << 20, store=str(tmp_path / "store")
    )
    with afn_ray.run(other) as run:
        assert run.info["measure"]["means"] == kept
        for mine, theirs in zip(run.sql("FROM signals").fetchall(), rows, strict=True):
            assert mine[2] == theirs[2]
            np.testing.assert_allclose(mine[3:10], theirs[3:10], rtol=1e-4)

    def fail(*args: Any) -> None:
        raise AssertionError("a second calibration")

    monkeypatch.setattr(mean_states, "find_means", fail)
    corpus = Path(other.corpus[0])
    before = corpus.read_text()
    try:
        corpus.write_text(before + '{"text": "one more"}\n')
        with afn_ray.run(other) as run:
            assert run.info["measure"]["means"] == kept
    finally:
        corpus.write_text(before)


def test_strengths_are_the_same_to_the_bit_beside_it(made: RunConfig, tmp_path: Path) -> None:
    alone = replace(made, signals="strength", store=str(tmp_path / "store"))
    sql = "SELECT doc, position, strength_0, strength_1, strength_3 FROM tokens ORDER BY ALL"
    with afn_ray.run(alone) as one, afn_ray.open_run(made.store) as other:
        assert one.sql(sql).fetchall() == other.sql(sql).fetchall()
        assert "means" not in one.info["measure"]


def test_verify_proves_it_and_knows_distances_that_no_state_has(made: RunConfig) -> None:
    found = verify.verify_store(made.store)
    assert not found.findings and not found.unproved
    measure = Measure.of_dict(manifest.find_run(made.store).info["measure"])
    file = next(Path(made.store).glob("shards/*/*/*-tokens.parquet"))
    table = pq.read_table(file)
    assert vector_check.impossible(ShardTable(file), measure) == ""
    (at,) = (i for i, name in enumerate(table.column_names) if name == "strength_centred_mean_1")
    mean = float(np.linalg.norm(from_text(measure.means[1], 32)))
    strength = table["strength_1"][4].as_py()
    for wrong in (strength + mean + 0.1, abs(strength - mean) - 0.1):
        values = table.column(at).to_pylist()
        values[4] = wrong
        sink = io.BytesIO()
        pq.write_table(table.set_column(at, table.schema[at], pa.array(values, pa.float32())), sink)
        message = vector_check.impossible(ShardTable(sink), measure)
        assert message.startswith("row 4: strength_centred_mean_1 is"), message


def test_a_text_is_measured_with_the_runs_mean(made: RunConfig, verses: list[str]) -> None:
    run = manifest.find_run(made.store)
    task = remeasure.recorded_task(run, LocalModel())
    measured, _ = remeasure.measure_text(task, verses[0], False)
    with afn_ray.open_run(made.store) as opened:
        rows = opened.sql(
            "SELECT strength_centred_mean_3 FROM tokens WHERE doc = 0 ORDER BY position"
        ).fetchall()
    np.testing.assert_allclose(measured.values[-1], [x for (x,) in rows], rtol=1e-4)


def test_a_mean_is_read_as_it_was_written() -> None:
    values = [random.Random(4).gauss(0, 1e3) for _ in range(5)]
    state = np.array(values, np.float32)
    np.testing.assert_array_equal(from_text(to_text(state), 5), state)
    for text, why in (("*", "is no base64"), (base64.b64encode(b"1234").decode(), "has 4 bytes")):
        with pytest.raises(ModelError, match=why):
            from_text(text, 5)


def test_what_has_no_mean_is_refused(
    made: RunConfig, tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = model.Model(model_files(tiny_bert), LAYERS, "float32", "cpu", 64)
    with pytest.raises(ModelError, match="1 mean states, expected one for each of"):
        loaded.subtract([np.zeros(32, np.float32)])
    monkeypatch.setattr(worker, "MOST_MEANS", 95)
    with pytest.raises(ConfigError, match="3 layers of 32 dimensions make 96 numbers"):
        afn_ray.run(replace(made, store=str(tmp_path / "s")))
    assert Strength.needs == frozenset()  # the default computes none


def model_files(folder: Path) -> model.ModelFiles:
    return model.find_model(str(folder), None, trust_remote_code=False, allow_pickle=False)
