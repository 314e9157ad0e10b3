"""Machines that die, freeze, come, go and are cut off, while a run is under way: every token is recorded once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from conftest import write_jsonl
from hosts import Afn, Chaos, Event, Hosts, Nodes, NotPermitted, wait_until
from test_ray import recorded

import afn_ray
from afn_ray.config import RunConfig

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

NUM_SHARDS = 16
LAST = f"{NUM_SHARDS - 1}.jsonl"
SHARD_BYTES = 2048


@dataclass(frozen=True)
class Ground:
    """A corpus of small shards, a model, and the rows that an undisturbed run recorded."""

    corpus: Path
    model: Path
    expected: tuple[pa.Table, ...]

    def arguments(self, store: str, **changes: str) -> list[str]:
        options = {"model": str(self.model), "store": store, "layers": "2", "shard-bytes": str(SHARD_BYTES),
                   "dtype": "float32", "corpus": str(self.corpus)} | changes  # fmt: skip
        return ["run", options.pop("corpus"), *(f"--{k}={v}" for k, v in options.items())]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> Ground:
    folder = tmp_path_factory.mktemp("machines")
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(NUM_SHARDS):
        write_jsonl(corpus / f"{i:02}.jsonl", [{"text": t} for t in verses[12 * i : 12 * i + 12]])
    config = RunConfig(
        corpus=(str(corpus),), model=str(tiny_bert), store=str(folder / "store"), layers="2", shard_bytes=SHARD_BYTES,
        dtype="float32", executor="inline",
    )  # fmt: skip
    with afn_ray.run(config) as run:
        assert run.info["counts"]["shards"] == NUM_SHARDS
        return Ground(corpus, tiny_bert, recorded(run))


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos.of(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def ray_of_nodes(chaos: Chaos) -> Iterator[Nodes]:
    nodes = Nodes(chaos.environment)
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(ray_of_nodes: Nodes) -> Nodes:
    """A Ray of three nodes, those that the test before left and new ones."""
    while len(ray_of_nodes.alive()) < 3:
        ray_of_nodes.add()
    return ray_of_nodes


@contextmanager
def running(ground: Ground, chaos: Chaos, nodes: Nodes, store: Path, workers: int = 3) -> Iterator[Afn]:
    """A run on ``nodes``, killed at the end if it has not ended."""
    run = Afn(chaos.environment, *ground.arguments(str(store), address=nodes.address, workers=str(workers)))
    try:
        yield run
    finally:
        run.close()


def wait_for(chaos: Chaos, run: Afn, point: str, count: int = 1, **fields: Any) -> list[Event]:
    """The first ``count`` events of ``point``; the run must be under way until then."""

    def seen() -> list[Event]:
        events = chaos.events(point, **fields)
        assert len(events) >= count or run.process.poll() is None, run.finish()
        return events[:count] if len(events) >= count else []

    return wait_until(f"{count} times {point} {fields or ''}", seen, 60)


def check(run: Afn, store: Path, ground: Ground) -> set[str]:
    """The run is complete and has the rows of an undisturbed one; returns files that no commit names."""
    code, said = run.finish()
    assert code == 0, said
    return check_store(store, ground.expected)


def check_store(store: Path, expected: tuple[pa.Table, ...]) -> set[str]:
    with afn_ray.open_run(str(store)) as run:
        for mine, theirs in zip(recorded(run), expected, strict=True):
            assert mine.equals(theirs)
    commits = list(store.glob("shards/*/*/commit.json"))
    assert len(commits) == NUM_SHARDS
    named = set()
    for commit in commits:
        for file in json.loads(commit.read_text())["files"].values():
            assert sha256((commit.parent / file["name"]).read_bytes()).hexdigest() == file["sha256"]
            named.add(str(commit.parent / file["name"]))
    return {str(f) for f in store.glob("shards/*/*/*.parquet")} - named


def test_a_shard_whose_machines_die_is_never_blamed(ground: Ground, chaos: Chaos, nodes: Nodes, tmp_path: Path) -> None:
    chaos.plan({"point": "measured", "shard": "07.jsonl", "times": 2, "do": "hang"})
    with running(ground, chaos, nodes, tmp_path / "store") as run:
        for deaths in (1, 2):
            lost = wait_for(chaos, run, "measured", deaths, fault="hang")
            assert len(chaos.events("process")) > deaths  # the others were under way
            nodes.kill(lost[-1]["node"])
        check(run, tmp_path / "store", ground)
    attempts = chaos.events("process", shard=lost[0]["shard"])
    assert len({a["node"] for a in attempts}) == len(attempts) == 3
    assert NUM_SHARDS + 2 <= len(chaos.events("process")) <= NUM_SHARDS + 6  # what was in flight there, and no more


def test_a_run_outlives_all_its_machines(ground: Ground, chaos: Chaos, nodes: Nodes, tmp_path: Path) -> None:
    again = tmp_path / "again"
    chaos.plan({"point": "process", "skip": 6, "times": NUM_SHARDS, "do": "hang", "until": str(again)})
    with running(ground, chaos, nodes, tmp_path / "store") as run:
        wait_for(chaos, run, "committed", 6)
        for node in nodes.alive():
            nodes.kill(node)
        wait_until("no node is left", lambda: not nodes.alive(), 30)
        assert len(list(tmp_path.rglob("commit.json"))) == 6
        again.touch()
        assert run.process.poll() is None, run.finish()
        new = nodes.add()
        check(run, tmp_path / "store", ground)
    assert chaos.events("committed", node=new)


def test_a_machine_that_comes_is_used(ground: Ground, chaos: Chaos, nodes: Nodes, tmp_path: Path) -> None:
    there = tmp_path / "there"
    chaos.plan({"point": "process", "skip": 2, "times": NUM_SHARDS, "do": "hang", "until": str(there)})
    workers = len(nodes.alive()) + 1
    with running(ground, chaos, nodes, tmp_path / "store", workers) as run:
        wait_for(chaos, run, "process", fault="hang")
        new = nodes.add()
        wait_for(chaos, run, "process", node=new)
        there.touch()
        assert not check(run, tmp_path / "store", ground)
    assert chaos.events("committed", node=new)
    assert len(chaos.events("process")) == NUM_SHARDS


def test_a_machine_given_up_for_dead_commits_nothing_twice(
    ground: Ground, chaos: Chaos, nodes: Nodes, tmp_path: Path
) -> None:
    awake, end = tmp_path / "awake", tmp_path / "end"
    chaos.plan(
        {"point": "measured", "skip": 4, "do": "hang", "until": str(awake)},
        {"point": "process", "shard": LAST, "times": 9, "do": "hang", "until": str(end)},
    )
    with running(ground, chaos, nodes, tmp_path / "store") as run:
        [zombie] = wait_for(chaos, run, "measured", fault="hang")
        nodes.freeze(zombie["node"])  # its worker process lives on
        [rival] = wait_for(chaos, run, "committed", shard=zombie["shard"])
        assert rival["node"] != zombie["node"] and zombie["node"] not in nodes.alive()
        awake.touch()
        [late] = wait_for(chaos, run, "committed", shard=zombie["shard"], pid=zombie["pid"])
        nodes.thaw(zombie["node"])
        end.touch()
        assert not check(run, tmp_path / "store", ground)
    assert chaos.events("uploaded", shard=zombie["shard"], pid=zombie["pid"])  # it tried to commit
    assert late["attempt"] == rival["attempt"] != zombie["attempt"]


def test_a_machine_taken_away_on_notice_costs_no_more_than_its_work(
    ground: Ground, chaos: Chaos, nodes: Nodes, tmp_path: Path
) -> None:
    chaos.plan({"point": "measured", "skip": 4, "do": "hang"})
    with running(ground, chaos, nodes, tmp_path / "store") as run:
        [taken] = wait_for(chaos, run, "measured", fault="hang")
        nodes.preempt(taken["node"], deadline_s=1)
        time.sleep(1)  # until the cloud takes it
        nodes.kill(taken["node"])
        check(run, tmp_path / "store", ground)
    attempts = chaos.events("process", shard=taken["shard"])
    assert len(attempts) == 2 and attempts[1]["node"] != taken["node"]


@pytest.fixture
def hosts(chaos: Chaos) -> Iterator[Hosts]:
    try:
        three = Hosts(chaos.environment)
    except NotPermitted as why:
        pytest.skip(f"hosts in network namespaces: {why}")
    yield three
    three.close()


def test_a_machine_cut_off_from_driver_and_store_commits_nothing_twice_when_it_is_back(
    ground: Ground, chaos: Chaos, hosts: Hosts, tmp_path: Path
) -> None:
    back, end = tmp_path / "back", tmp_path / "end"
    chaos.plan(
        {"point": "measured", "skip": 3, "do": "hang", "until": str(back)},
        {"point": "process", "shard": LAST, "times": 9, "do": "hang", "until": str(end)},
    )
    hosts.copy(str(ground.corpus), "s3://bucket/corpus")
    run = Afn(
        hosts.environment,
        *ground.arguments("s3://bucket/store", corpus="s3://bucket/corpus", address=hosts.address, workers="2"),
        within=hosts.within("a"),
    )
    try:
        [zombie] = wait_for(chaos, run, "measured", fault="hang")
        host = hosts.find(zombie["pid"])
        hosts.cut(host)
        [rival] = wait_for(chaos, run, "committed", shard=zombie["shard"])  # the others took it for dead
        assert rival["node"] != zombie["node"]
        hosts.heal(host)
        back.touch()
        [late] = wait_for(chaos, run, "committed", shard=zombie["shard"], pid=zombie["pid"])
        end.touch()
        code, said = run.finish()
        assert code == 0, said
    finally:
        run.close()
    assert late["attempt"] == rival["attempt"] != zombie["attempt"]
    hosts.copy("s3://bucket/store", str(tmp_path / "store"))
    assert not check_store(tmp_path / "store", moved(ground, "s3://bucket/corpus"))


def moved(ground: Ground, corpus: str) -> tuple[pa.Table, ...]:
    """What is expected of the same corpus elsewhere."""
    tokens, documents, *others = ground.expected
    column = documents.schema.get_field_index("source")
    there = pc.replace_substring(documents["source"].cast(pa.string()), str(ground.corpus), corpus)
    field = documents.schema.field("source")
    return tokens, documents.set_column(column, field, there.dictionary_encode()), *others
