"""What the driver of a huge run takes: the real plan, dispatcher and reduce over workers and a clock that are fake.

    python -m afn_ray.bench.simulate SHARDS WORKERS SEED

is one such run in a process of its own, so that its memory is its own; it prints one line of JSON. Every shard has to
end exactly once, whatever fails: that is asserted as it goes.
"""

from __future__ import annotations

import heapq
import itertools
import json
import pickle
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from afn_ray import dispatch, manifest, reduce, storage
from afn_ray.bench import machine
from afn_ray.config import RunConfig
from afn_ray.dispatch import ATTEMPTS, Cause, Done, Event, Failed, Gone, Leaving, Ready, Silent
from afn_ray.errors import OutOfMemory, ShardError, Unavailable
from afn_ray.pipeline import Progress
from afn_ray.schema import HISTOGRAM_SCHEMA, SCHEMA_VERSION, FileSlice, Series, Shard

SHARD_S, SPREAD = 300.0, 0.25
"""Of a worker for a shard, lognormal: mean, and standard deviation of the logarithm."""
SHARD_BYTES, SHARD_TOKENS = 16 << 20, 4_000_000
FILE_SHARDS = 64
"""Shards that one file of the corpus makes."""
LOAD_S = 60.0
"""From the start of a process until its model is loaded."""
VERDICT_S = 5.0
"""From a death until its reason is known."""
WORKERS_A_NODE = 8
NODE_LOST_H = 24.0
"""Hours that a node lives in the mean; half of the losses are announced ``NOTICE_S`` before."""
NOTICE_S = 120.0
NODE_BACK_S = 300.0
OUTAGE_EVERY_H, OUTAGE_S = 24.0, 300.0
"""The store answers nobody for so long, two minutes of which a call waits by itself."""
RATES = {
    "crash": 1e-4,  # one in 833 hours of a worker
    "raise": 1e-4,
    "memory": 1e-4,
    "hang": 1e-5,
    "unavailable": 1e-4,
}
"""Of attempts, what passes by itself."""
POISON = {"raise": 1e-5, "crash": 1e-5, "memory": 1e-5, "hang": 2e-6}
"""Of shards, what fails at every attempt."""
BAD_START = 0.01
"""Of processes, those that die as they load the model."""
COMMITTED = 0.05
"""Of attempts whose process dies, those that were committed and not yet told of."""
COMMITS_READ = 2_000
"""Commits that are written and found again, on the local disk."""
SERIES = Series("strength", 8)
MEASURE_ID = "0" * 32
RAY_EVENT_MS, RAY_CALL_MS = 8.0, 0.46
"""Of the driver on Ray, for an event with 3,000 tasks in flight, and for a look at a worker or a call of the reduce."""


class Meter:
    """CPU seconds by part, each without the parts within it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._at = time.thread_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._parts.append(name)
        try:
            yield
        finally:
            self._switch()
            self._parts.pop()

    def _switch(self) -> None:
        now = time.thread_time()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._at
        self._at = now

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any) -> Any:
            with self.part(name):
                return call(*args)

        return measured


@dataclass(slots=True)
class _Worker:
    node: int
    life: int = 0  # number of its process
    alive: bool = False
    hangs: bool = False
    queue: deque[tuple[Shard, int]] = field(default_factory=deque)  # shard, halvings; the first is at work
    progress: Progress = field(default_factory=Progress)


class Cluster:
    """A ``dispatch.Pool`` of workers that take their time on a fake clock, and fail at ``RATES``."""

    can_replace = True

    def __init__(self, shards: Sequence[Shard], num_workers: int, seed: int) -> None:
        self.now = 0.0
        self.num_attempts = 0
        self.happened: Counter[str] = Counter()
        self.committed: set[str] = set()
        self._chance = random.Random(seed)  # noqa: S311 - a simulation
        self._num_wanted = num_workers
        self._workers: dict[int, _Worker] = {}
        self._last = -1
        self._future: list[tuple[float, int, Callable[[], Event | None]]] = []
        self._order = itertools.count()
        self.faults: Counter[str] = Counter()  # shard -> attempts that failed by its own fault
        self.poison = {
            s.id: kind
            for kind, rate in POISON.items()
            for s in self._chance.sample(shards, max(1, round(rate * len(shards))))
        }
        for node in range(-(-num_workers // WORKERS_A_NODE)):
            self._later(self._chance.expovariate(1 / (NODE_LOST_H * 3600)), partial(self._lose_node, node))

    # --- what the dispatcher asks ------------------------------------------------------------------------

    def clock(self) -> float:
        return self.now

    def grow(self, num_useful: int) -> int:
        while len(self._workers) < min(self._num_wanted, num_useful):
            self._last += 1
            self._workers[self._last] = _Worker(self._last // WORKERS_A_NODE)
            self._start(self._last)
        return len(self._workers)

    def hand(self, worker: int, shard: Shard, halvings: int) -> None:
        one = self._workers[worker]
        one.queue.append((shard, halvings))
        self.num_attempts += 1
        if len(one.queue) == 1 and one.alive:
            self._begin(worker)

    def wait(self, timeout_s: float) -> list[Event]:
        end = self.now + timeout_s
        while self._future and self._future[0][0] <= end:
            self.now, _, happen = heapq.heappop(self._future)
            if (event := happen()) is not None:
                return [event]
        self.now = end
        return []

    def replace(self, worker: int) -> None:
        self._end(worker)
        self._start(worker)

    def release(self, worker: int) -> None:
        assert not self._workers.pop(worker).queue

    def progress(self) -> Progress:
        return dispatch.total(w.progress for w in self._workers.values())

    def num_tokens(self, worker: int) -> int:
        one = self._workers[worker]
        return 0 if one.hangs else int(self.now)

    def lack(self) -> str:
        return "workers are under way"

    def close(self) -> None:
        pass

    # --- what happens ------------------------------------------------------------------------------------

    def _later(self, seconds: float, happen: Callable[[], Event | None]) -> None:
        heapq.heappush(self._future, (self.now + seconds, next(self._order), happen))

    def _start(self, worker: int, after_s: float = 0.0) -> None:
        one = self._workers[worker]
        life = one.life
        dies = self._chance.random() < BAD_START

        def ready() -> Event | None:
            if self._workers.get(worker) is not one or one.life != life:
                return None
            if dies:
                self.happened["died as it loaded"] += 1
                self._start(worker)
                return Gone(worker, Cause.LOADING)
            one.alive = True
            return Ready(worker)

        self._later(after_s + LOAD_S, ready)

    def _end(self, worker: int) -> None:
        """The process of ``worker`` is no more; what it was about to tell may be committed."""
        one = self._workers[worker]
        if one.queue and one.alive and not one.hangs and self._chance.random() < COMMITTED:
            self.happened["committed, not told"] += 1
            self.committed.add(one.queue[0][0].id)
        one.life += 1
        one.alive = one.hangs = False
        one.queue.clear()

    def _die(self, worker: int, cause: Cause, back_s: float = 0.0) -> Event:
        self._end(worker)
        self.happened[cause.name.lower()] += 1
        one = self._workers[worker]
        life = one.life

        def gone() -> Event | None:
            return Gone(worker, cause) if self._workers.get(worker) is one and one.life == life else None

        self._later(min(VERDICT_S, back_s + LOAD_S / 2), gone)
        self._start(worker, back_s)
        return Silent(worker)

    def _lose_node(self, node: int) -> None:
        """Its processes die together, half of the time after a notice; those that left meanwhile are elsewhere."""
        there = [(n, w, w.life) for n, w in self._workers.items() if w.node == node and w.alive]
        notice_s = NOTICE_S if self._chance.random() < 0.5 else 0.0
        for worker, one, life in there:
            if notice_s:
                self._later(0.0, partial(self._announce, worker))
            self._later(notice_s, partial(self._taken, worker, one, life))
        self.happened["nodes lost"] += 1
        self._later(self._chance.expovariate(1 / (NODE_LOST_H * 3600)), partial(self._lose_node, node))

    def _announce(self, worker: int) -> Event | None:
        return Leaving(worker) if worker in self._workers else None

    def _taken(self, worker: int, one: _Worker, life: int) -> Event | None:
        if self._workers.get(worker) is not one or one.life != life:
            return None
        return self._die(worker, Cause.NODE, NODE_BACK_S)

    def _begin(self, worker: int) -> None:
        """The first shard in the queue of ``worker`` is its turn."""
        one = self._workers[worker]
        shard, halvings = one.queue[0]
        life = one.life
        if shard.id in self.committed:  # it finds its commit
            self._later(1.0, partial(self._tell, worker, one, life, None))
            return
        seconds = self._chance.lognormvariate(0.0, SPREAD) * SHARD_S
        fate = self.poison.get(shard.id) or self._luck()
        if fate == "memory" and halvings and shard.id not in self.poison:
            fate = None
        if fate == "hang":
            self.happened["hang"] += 1
            self.faults[shard.id] += 1
            one.hangs = True
            return
        self._later(seconds / 2 if fate else seconds, partial(self._tell, worker, one, life, fate))

    def _luck(self) -> str | None:
        at = self._chance.random()
        for kind, rate in RATES.items():
            at -= rate
            if at < 0:
                return kind
        return None

    def _tell(self, worker: int, one: _Worker, life: int, fate: str | None) -> Event | None:
        """How the attempt that is at work on ``worker`` ended."""
        if self._workers.get(worker) is not one or one.life != life:
            return None
        shard = one.queue[0][0]
        if fate is None and self.now % (OUTAGE_EVERY_H * 3600) > OUTAGE_EVERY_H * 3600 - OUTAGE_S + 120:
            fate = "unavailable"
        if fate is not None:
            self.faults[shard.id] += fate != "unavailable"
        if fate == "crash":
            return self._die(worker, Cause.CRASH)
        one.queue.popleft()
        if one.queue:
            self._begin(worker)
        if fate is not None:
            self.happened[fate] += 1
            errors = {"raise": ShardError, "memory": OutOfMemory, "unavailable": Unavailable}
            return Failed(worker, shard.id, errors[fate]("simulated"))
        if shard.id not in self.committed:
            self.committed.add(shard.id)
            one.progress.documents += SHARD_TOKENS // 200
            one.progress.tokens += SHARD_TOKENS
            one.progress.forward_tokens += SHARD_TOKENS
        return Done(worker, shard.id, arrived(shard.id))


def arrived(shard: str) -> manifest.Commit:
    """A commit as it comes over the wire, with nothing that others share."""
    attempt = shard[:16]
    files = {
        table: {"name": f"{attempt}-{table}.parquet", "rows": SHARD_TOKENS, "bytes": 2_400_000, "sha256": shard * 2}
        for table in manifest.TABLES
    }
    counts = {"documents": SHARD_TOKENS // 200, "empty": 0, "quarantined": 0, "tokens": SHARD_TOKENS,
              "special": SHARD_TOKENS // 100, "windows": SHARD_TOKENS // 200, "forward_tokens": SHARD_TOKENS,
              "chars": SHARD_BYTES}  # fmt: skip
    made_by = {"device": "cuda", "afn-ray": "0.1.0", "torch": "2.13.0", "transformers": "5.0.0"}
    commit: manifest.Commit = pickle.loads(  # noqa: S301 - our own, a line above
        pickle.dumps(manifest.Commit(shard, attempt, files, counts, 301.25, made_by))
    )
    return commit


class Tree:
    """``reduce.Tasks`` that does no work: every summary has to come once into the sum of every part."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.most_args = 0

    def submit(self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1) -> list[Any]:
        name = function.__name__.strip("_")
        self.calls[name] += 1
        self.most_args = max(self.most_args, len(args))
        if name == "read":
            assert len(args[2]) <= reduce.FAN_IN
            return [len(args[2])] * num_results
        if name == "merge":
            return [sum(args[1:])]
        if name == "count":
            return [args[0]]
        if name == "total":
            (num_shards,) = set(args[3:])  # every part has all shards
            row = {"n": num_shards * SHARD_TOKENS, "n_special": 0, "layer": SERIES.layer, "q3": 1.0}
            return [[row], [row], HISTOGRAM_SCHEMA.empty_table()]
        return [reduce.STATISTICS_SCHEMA.empty_table()]

    def result(self, handle: Any) -> Any:
        return handle


def plan_of(num_shards: int) -> manifest.Plan:
    """A corpus of large files, cut into ``num_shards``."""
    config = RunConfig(corpus=("-",), model="-", store="-")
    slices: list[FileSlice] = []
    for file in range(-(-num_shards // FILE_SHARDS)):
        uri, version = f"s3://bucket/corpus/part-{file:06d}.jsonl", f"etag:{file:032x}"
        for at in range(min(FILE_SHARDS, num_shards - len(slices))):
            start = at * SHARD_BYTES
            slices.append(FileSlice(uri, FILE_SHARDS * SHARD_BYTES, version, "jsonl", "", start, start + SHARD_BYTES,
                                    SHARD_BYTES, SHARD_TOKENS // 200, f"{len(slices):064x}"))  # fmt: skip
    groups = manifest.group_slices(slices, SHARD_BYTES)
    shards = tuple(Shard.of(group, config.read_options) for group in groups)
    assert len(shards) == num_shards
    return manifest.Plan(shards, (), (), 0)


def simulate(num_shards: int, num_workers: int, seed: int) -> dict[str, Any]:
    """One run from its plan to its reduced tables, as ``--json`` has it. Asserts that every shard ends once."""
    meter, began = Meter(), time.process_time()
    resident = [("at the start", machine.own_memory_bytes("VmRSS"))]

    def remember(name: str) -> None:
        resident.append((name, machine.own_memory_bytes("VmRSS")))

    with meter.part("plan"):
        plan = plan_of(num_shards)
    remember("with the plan")
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as store:
        with meter.part("begin the run"):
            config = RunConfig(corpus=("-",), model="-", store=store)
            manifest.begin_run(config, {"simulated": True}, plan, time.time_ns())
        remember("with the run begun")
        commit_us = _find_some(store, plan.shards[:COMMITS_READ])
    cluster = Cluster(plan.shards, num_workers, seed)
    for name in ("grow", "hand", "wait", "replace", "release"):
        setattr(cluster, name, meter.wrap("(the fake cluster)", getattr(cluster, name)))
    looks = Counter[str]()
    dispatcher = dispatch.Dispatcher(
        cluster, plan.shards, lambda state: looks.update(["looks"]), wait_s=1e9, allow_quarantined=num_shards,
        clock=cluster.clock,
    )  # fmt: skip
    for method, name in (("_hand_out", "hand out"), ("_take", "events"), ("_look_around", "look around")):
        setattr(dispatcher, method, meter.wrap(name, getattr(dispatcher, method)))
    with meter.part("loop"):
        state = dispatcher.run()
    remember("with all commits")
    _check(plan, cluster, state)
    done = [s for s in plan.shards if s.id in state.commits]
    ordered = state.commits.in_order(s.id for s in done)
    tree = Tree()
    with meter.part("reduce"):
        tables = reduce.reduce_run(
            "-", MEASURE_ID, ordered, (SERIES,), pieces=(), readable=(), language="en", sink_factor=10.0,
            num_bytes=[s.num_bytes for s in done], tasks=tree,
        )  # fmt: skip
    assert tables["shards"].num_rows == len(done)
    remember("with the reduce planned")
    fake_s = meter.seconds.pop("(the fake cluster)")
    return {
        "shards": num_shards, "workers": num_workers, "seed": seed, "hours": cluster.now / 3600,
        "cpu_s": time.process_time() - began - fake_s, "fake_s": fake_s,
        "parts_s": dict(meter.seconds), "find_commits_us": commit_us,
        "resident_bytes": dict(resident), "peak_bytes": machine.own_memory_bytes("VmHWM"),
        "attempts": cluster.num_attempts, "retries": state.retries, "quarantined": len(state.failures),
        "happened": dict(cluster.happened), "looks": looks["looks"], "calls": dict(tree.calls),
        "most_args": tree.most_args,
    }  # fmt: skip


def _check(plan: manifest.Plan, cluster: Cluster, state: dispatch.State) -> None:
    """Every shard ended once: committed, or quarantined by its own fault."""
    assert not state.stopped, state.stopped
    planned = {s.id for s in plan.shards}
    assert len(state.commits) + len(state.failures) == len(planned) == len(plan.shards)
    assert set(state.commits) | state.failures.keys() == planned
    assert set(state.commits) <= cluster.committed, "a commit that the store does not have"
    assert all(cluster.faults[shard] >= ATTEMPTS for shard in state.failures), "quarantined without its own fault"
    assert cluster.poison.keys() <= state.failures.keys(), "a poison was committed"


def _find_some(store: str, shards: Sequence[Shard]) -> float:
    """Microseconds of the driver to find one of the commits of ``shards`` in ``store``."""
    for shard in shards:
        commit = arrived(shard.id)
        body = {"schema_version": SCHEMA_VERSION, "measure": MEASURE_ID, **asdict(commit),
                "slices": [asdict(s) for s in shard.slices], "options": asdict(shard.options)}  # fmt: skip
        folder = manifest.shard_uri(store, MEASURE_ID, shard.id)
        storage.write_once(storage.join(folder, "commit.json"), manifest.sealed(body))
    began = time.process_time()
    assert len(manifest.find_commits(store, MEASURE_ID, shards)) == len(shards)
    return (time.process_time() - began) / len(shards) * 1e6


if __name__ == "__main__":
    print(json.dumps(simulate(*map(int, sys.argv[1:4]))))
