"""Machines that die, freeze, come, go, lack memory and are cut off, under a run: every token is
recorded once.

Each is met with the corpus and the store on a local disk, which all nodes share, and on S3.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from afn_ray.analysis import verify
from afn_ray.store import storage
from drivers import Driver, Drivers
from ground import NUM_SHARDS, Ground
from hosts import Afn, Chaos, Event, Hosts, Nodes, NotPermitted, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

LAST = f"{NUM_SHARDS - 1}.jsonl"
ROOM_KIB = 3 << 20
"""More than a worker with its model and what runs beside it take, less than one that eats."""


@pytest.fixture(scope="module")
def ray_of_nodes(chaos: Chaos) -> Iterator[Nodes]:
    nodes = Nodes(chaos.environment)
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(ray_of_nodes: Nodes) -> Nodes:
    """A Ray of three nodes: those that the test before left, and new ones for those that it
    lost.
    """
    there = sorted(ray_of_nodes.alive())
    for surplus in there[3:]:
        ray_of_nodes.kill(surplus)
    for _ in range(3 - len(there)):
        ray_of_nodes.add()
    wait_until("three nodes are there", lambda: len(ray_of_nodes.alive()) == 3)
    return ray_of_nodes


def arguments(ground: Ground, store: str, address: str, workers: int = 3) -> list[str]:
    return ground.arguments(store, executor="ray", address=address, workers=str(workers))


def wait_for(
    chaos: Chaos, run: Driver | Afn, point: str, count: int = 1, **fields: Any
) -> list[Event]:
    """The first ``count`` events of ``point``, once there are so many; the run must be under way
    until then.
    """

    def seen() -> list[Event]:
        is_alive = run.is_alive
        events = chaos.events(point, **fields)
        assert is_alive or len(events) >= count, run.finish()
        return events[:count] if len(events) >= count else []

    events: list[Event] = wait_until(f"{count} times {point} {fields or ''}", seen)
    return events


def check(run: Driver | Afn) -> None:
    code, said = run.finish()
    assert code == 0, said


def orphans(store: str) -> list[str]:
    return [o.uri for o in verify.verify_store(store).orphans]


def test_a_shard_whose_machines_die_is_never_blamed(
    ground: Ground, chaos: Chaos, drivers: Drivers, nodes: Nodes, tmp_path: Path
) -> None:
    chaos.plan({"point": "measured", "shard": "07.jsonl", "times": 2, "do": "hang"})
    store = ground.store()
    with drivers.start(*arguments(ground, store, nodes.address)) as run:
        for deaths in (1, 2):
            lost = wait_for(chaos, run, "measured", deaths, fault="hang")
            assert len(chaos.events("process")) > deaths  # the others were under way
            nodes.kill(lost[-1]["node"])
        check(run)
    ground.check(store)
    attempts = chaos.events("process", shard=lost[0]["shard"])
    assert len({a["node"] for a in attempts}) == len(attempts) == 3
    assert (
        NUM_SHARDS + 2 <= len(chaos.events("process")) <= NUM_SHARDS + 6
    )  # what was in flight there, and no more


def test_a_run_outlives_all_its_machines(
    ground: Ground, chaos: Chaos, drivers: Drivers, nodes: Nodes, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    chaos.plan(
        {"point": "process", "skip": 6, "times": NUM_SHARDS, "do": "hang", "until": str(again)}
    )
    store = ground.store()
    with drivers.start(*arguments(ground, store, nodes.address)) as run:
        wait_for(chaos, run, "committed", 6)
        for node in nodes.alive():
            nodes.kill(node)
        wait_until("no node is left", lambda: not nodes.alive())
        assert sum(f.uri.endswith("/commit.json") for f in storage.list_below(store)) == 6
        again.touch()
        assert run.is_alive
        new = nodes.add()
        check(run)
    ground.check(store)
    assert chaos.events("committed", node=new)


def test_a_driver_killed_alone_leaves_a_cluster_that_the_next_one_uses(
    ground: Ground, chaos: Chaos, drivers: Drivers, nodes: Nodes
) -> None:
    chaos.plan(slow_s=0.3)
    store = ground.store()
    for at_least in (2, 5):
        with drivers.start(*arguments(ground, store, nodes.address)) as run:
            wait_for(chaos, run, "committed", at_least)
            run.signal(signal.SIGKILL)
            assert run.finish()[0] == -signal.SIGKILL
    chaos.plan()
    with drivers.start(*arguments(ground, store, nodes.address)) as run:
        check(run)
    ground.check(store)
    assert len(nodes.alive()) == 3


def test_a_machine_that_comes_is_used(
    ground: Ground, chaos: Chaos, drivers: Drivers, nodes: Nodes, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    chaos.plan(
        {"point": "process", "skip": 2, "times": NUM_SHARDS, "do": "hang", "until": str(there)}
    )
    store = ground.store()
    with drivers.start(*arguments(ground, store, nodes.address, 4)) as run:
        wait_for(chaos, run, "process", fault="hang")
        new = nodes.add()
        wait_for(chaos, run, "process", node=new)
        there.touch()
        check(run)
    ground.check(store)
    assert chaos.events("committed", node=new)
    assert len(chaos.events("process")) == NUM_SHARDS


def test_a_machine_given_up_for_dead_commits_nothing_twice(
    ground: Ground, chaos: Chaos, drivers: Drivers, nodes: Nodes, tmp_path: Path
) -> None:
    awake, end = tmp_path / "awake", tmp_path / "end"
    chaos.plan(
        {"point": "measured", "skip": 4, "do": "hang", "until": str(awake)},
        {"point": "process", "shard": LAST, "times": 9, "do": "hang", "until": str(end)},
    )
    store = ground.store()
    with drivers.start(*arguments(ground, store, nodes.address)) as run:
        [zombie] = wait_for(chaos, run, "measured", fault="hang")
        nodes.freeze(zombie["node"])  # its worker process lives on
        [rival] = wait_for(chaos, run, "committed", shard=zombie["shard"])
        assert rival["node"] != zombie["node"] and zombie["node"] not in nodes.alive()
        awake.touch()
        [late] = wait_for(chaos, run, "committed", shard=zombie["shard"], pid=zombie["pid"])
        nodes.thaw(zombie["node"])
        end.touch()
        check(run)
    ground.check(store)
    assert chaos.events("uploaded", shard=zombie["shard"], pid=zombie["pid"])  # it tried to commit
    assert late["attempt"] == rival["attempt"] != zombie["attempt"]
    assert not any(zombie["attempt"] in uri for uri in orphans(store))


def test_a_machine_taken_away_on_notice_costs_no_more_than_its_work(
    ground: Ground, chaos: Chaos, drivers: Drivers, nodes: Nodes, tmp_path: Path
) -> None:
    chaos.plan({"point": "measured", "skip": 4, "do": "hang"})
    store = ground.store()
    with drivers.start(*arguments(ground, store, nodes.address)) as run:
        [taken] = wait_for(chaos, run, "measured", fault="hang")
        nodes.preempt(taken["node"], deadline_s=1)
        time.sleep(1)  # until the cloud takes it
        nodes.kill(taken["node"])
        check(run)
    ground.check(store)
    attempts = chaos.events("process", shard=taken["shard"])
    assert len(attempts) == 2 and attempts[1]["node"] != taken["node"]


def test_a_shard_that_meets_too_little_memory_is_tried_with_half_the_budget(
    ground: Ground, chaos: Chaos, drivers: Drivers
) -> None:
    """Ray's memory monitor ends the worker; the limit is a little above what this machine uses
    now.
    """
    kib = {
        k: int(v) for k, v in re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text())
    }
    assert kib["MemAvailable"] > 8 << 20, "this test fills up to 6 GB of memory"
    share = 1 - (kib["MemAvailable"] - ROOM_KIB) / kib["MemTotal"]
    monitor = {"RAY_memory_usage_threshold": f"{share:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    nodes = Nodes(chaos.environment | monitor)
    try:
        nodes.add()
        chaos.plan({"point": "measured", "shard": "04.jsonl", "do": "eat"})
        store = ground.store()
        with drivers.start(*arguments(ground, store, nodes.address, 1)) as run:
            check(run)
    finally:
        nodes.close()
    ground.check(store)
    [victim] = chaos.events("measured", fault="eat")
    assert [e["oom_retries"] for e in chaos.events("process", shard=victim["shard"])] == [0, 1]


@pytest.mark.only("local", "without a worker nothing is asked of the store")
def test_without_capacity_the_run_says_what_it_lacks_and_gives_up_resumable(
    ground: Ground, chaos: Chaos, drivers: Drivers, nodes: Nodes
) -> None:
    chaos.plan()
    store = ground.store()
    too_much = ["--tokenizer-workers=3", "--wait=30"]  # no node has four CPUs
    began = time.monotonic()
    with drivers.start(*arguments(ground, store, nodes.address, 1), *too_much) as run:
        code, said = run.finish()
    lack = "asked for 1 more worker of 4 CPU each; the cluster has 3 CPU"
    assert re.search(rf"no worker for \d+ s: {lack}.*; waiting for up to 30 s", said), said
    assert code == 75 and "the same command resumes" in said and time.monotonic() - began < 120
    with drivers.start(*arguments(ground, store, nodes.address)) as run:
        check(run)
    ground.check(store)


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
    there, store = ground, ground.store()
    if (
        ground.kind == "s3"
    ):  # of the hosts' own; a disk they share, so that one of them is cut off from the driver alone
        hosts.copy(str(ground.folder / "corpus"), "s3://bucket/corpus")
        there, store = moved(ground, "s3://bucket/corpus"), "s3://bucket/store"
    run = Afn(
        hosts.environment, *arguments(there, store, hosts.address, 2), within=hosts.within("a")
    )
    try:
        [zombie] = wait_for(chaos, run, "measured", fault="hang")
        host = hosts.find(zombie["pid"])
        hosts.cut(host)
        [rival] = wait_for(
            chaos, run, "committed", shard=zombie["shard"]
        )  # to the others it is dead
        assert rival["node"] != zombie["node"]
        hosts.freeze(host)  # the worker comes back before anyone tells it to end
        hosts.heal(host)
        back.touch()
        [late] = wait_for(chaos, run, "committed", shard=zombie["shard"], pid=zombie["pid"])
        end.touch()
        check(run)
    finally:
        run.close()
    if ground.kind == "s3":
        hosts.copy(store, str(tmp_path / "store"))
        store = str(tmp_path / "store")
    there.check(store)
    assert chaos.events("uploaded", shard=zombie["shard"], pid=zombie["pid"])  # it tried to commit
    assert late["attempt"] == rival["attempt"] != zombie["attempt"]
    assert not any(zombie["attempt"] in uri for uri in orphans(store))


def moved(ground: Ground, corpus: str) -> Ground:
    """The same corpus elsewhere, where only the names of its files differ."""
    tokens, documents, *others = ground.expected
    column = documents.schema.get_field_index("source")
    names = pc.replace_substring(documents["source"].cast(pa.string()), ground.corpus, corpus)
    documents = documents.set_column(
        column, documents.schema.field("source"), names.dictionary_encode()
    )
    return replace(ground, corpus=corpus, expected=(tokens, documents, *others))
