"""Writing never holds the model while memory allows, and rows come in the documents' order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from afn_ray.config import RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.runs import flow, measurer, worker
from afn_ray.runs.plan import make_plan
from afn_ray.runs.recorder import Part, Recorder
from afn_ray.runs.values import Values
from afn_ray.store import shard_files
from afn_ray.store.commits import Commit
from afn_ray.tokens import feed
from afn_ray.tokens.feed import Chunk
from conftest import MakeConfig, write_jsonl

NUM_CHUNKS = 12


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A corpus of one shard with ``NUM_CHUNKS`` chunks."""
    monkeypatch.setattr(feed, "CHUNK_BYTES", 300)
    texts = [f"document {i} of LORD " + "word " * (60 + i % 7) for i in range(NUM_CHUNKS)]
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "c.jsonl", [{"text": text} for text in texts])
    return make_config(shard_bytes=1 << 20)


def load(config: RunConfig) -> worker.Processor:
    task = worker.prepare(config, measurer.find_model_files(config), "cpu", "float32")
    return worker.Processor(task)


def only_shard(config: RunConfig) -> Shard:
    (shard,) = make_plan(config).shards
    return shard


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No part is written until this is set."""
    opened = threading.Event()
    write = Recorder.write

    def wait_and_write(self: Recorder, part: Part) -> None:
        assert opened.wait(60)
        write(self, part)

    monkeypatch.setattr(Recorder, "write", wait_and_write)
    yield opened
    opened.set()


@pytest.mark.parametrize(
    ("waiting_bytes", "num_measured"), [(1 << 30, NUM_CHUNKS), (0, worker.WRITTEN_BEHIND + 1)]
)
def test_the_model_waits_for_the_writer_only_where_memory_ends(
    config: RunConfig,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    waiting_bytes: int,
    num_measured: int,
) -> None:
    monkeypatch.setattr(worker, "WAITING_BYTES", waiting_bytes)
    processor = load(config)
    measured: list[Chunk] = []
    result = flow.PendingChunk.result

    def count(self: flow.PendingChunk) -> tuple[Chunk, Values]:
        measured.append(self.chunk)
        return result(self)

    monkeypatch.setattr(flow.PendingChunk, "result", count)
    with ThreadPoolExecutor(1) as pool:
        commit = pool.submit(processor.process, only_shard(config))
        end = time.monotonic() + 30
        while len(measured) < num_measured and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)  # a further chunk would be measured by now
        found, done = len(measured), commit.done()
        gate.set()
        assert found == num_measured and not done
        assert commit.result().counts["documents"] == NUM_CHUNKS == len(measured)
    processor.close()


def test_parts_made_in_any_order_give_the_same_tables(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tables(store: str) -> dict[str, pa.Table]:
        one = load(replace(config, store=store))
        commit: Commit = one.process(only_shard(config))
        one.close()
        measure_id = one.task.measure.id
        return {
            name: shard_files.read_shard_table(store, measure_id, commit, name)
            for name in commit.files
        }

    monkeypatch.setattr(worker, "RECORDERS", 1)
    expected = tables(str(tmp_path / "one"))
    assert expected["documents"]["doc_in_shard"].to_pylist() == list(range(NUM_CHUNKS))
    order: list[int] = []
    make = Recorder.make

    def make_late(self: Recorder, chunk: Chunk, values: Values, first: int) -> Part:
        time.sleep(random.Random(first).random() / 20)
        part = make(self, chunk, values, first)
        order.append(first)
        return part

    monkeypatch.setattr(worker, "RECORDERS", 6)
    monkeypatch.setattr(worker, "WAITING_BYTES", 1 << 30)
    monkeypatch.setattr(Recorder, "make", make_late)
    found = tables(str(tmp_path / "six"))
    assert order != sorted(order)
    assert found.keys() == expected.keys()
    for name, table in found.items():
        assert table.equals(expected[name]), name


def test_an_error_while_rows_are_made_fails_the_shard(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Recorder, chunk: Chunk, values: Values, first: int) -> Part:
        raise MemoryError("no room for rows")

    monkeypatch.setattr(Recorder, "make", fail)
    processor = load(config)
    with pytest.raises(MemoryError, match="no room for rows"):
        processor.process(only_shard(config))
    processor.close()
