"""A ``dispatch.Pool`` of simulated workers, which fail as real ones do, on a simulated clock."""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from afn_ray.corpus_values import Shard
from afn_ray.errors import OutOfMemory, ShardError, Unavailable
from afn_ray.runs.pool import Cause, Done, Failed, Gone, Leaving, PoolEvent, Ready, Silent
from afn_ray.runs.progress import Counters, sum_of
from afn_ray.store import layout
from afn_ray.store.commits import COUNTS, Commit

SHARD_S, SPREAD = 300.0, 0.25
"""Lognormal time of one shard: median in seconds, and standard deviation of the logarithm."""
SHARD_BYTES, SHARD_TOKENS = 16 << 20, 4_000_000
"""Size of each shard: bytes of text, and tokens."""
FILE_SHARDS = 64
"""Shards in each file of the corpus."""
LOAD_S = 60.0
"""Time from the start of a process until its model is loaded, in seconds."""
VERDICT_S = 5.0
"""Longest time from the death of a process until its cause is known, in seconds."""
WORKERS_A_NODE = 8
NODE_LOST_H = 24.0
"""Mean lifetime of a node, in hours; half of the losses are announced ``NOTICE_S`` before."""
NOTICE_S = 120.0
"""Time from the notice of a node's loss to the loss, in seconds."""
NODE_BACK_S = 300.0
"""Time from the loss of a node until its processes start again, in seconds."""
OUTAGE_EVERY_H, OUTAGE_S = 24.0, 300.0
"""Interval between two outages of the store, in hours, and their length, in seconds.

A call retries for two minutes, so attempts fail only in the last three minutes of an outage.
"""
RATES = {
    "crash": 1e-4,  # one per 833 hours of a worker
    "raise": 1e-4,
    "memory": 1e-4,
    "hang": 1e-5,
    "unavailable": 1e-4,
}
"""Share of the attempts that fail with a transient fault, by kind."""
POISON = {"raise": 1e-5, "crash": 1e-5, "memory": 1e-5, "hang": 2e-6}
"""Share of the shards that fail at every attempt, by kind; at least one shard of each."""
BAD_START = 0.01
"""Share of the processes that die while they load the model."""
COMMITTED = 0.05
"""Share of the attempts that were committed, but not reported, when their process died."""


@dataclass(slots=True)
class _Worker:
    node: int
    life: int = 0  # number of processes that it had before
    alive: bool = False
    hangs: bool = False
    # Each shard with its oom_retries; the first one is running.
    queue: deque[tuple[Shard, int]] = field(default_factory=deque)
    counters: Counters = field(default_factory=Counters)


class Crowd:
    """A ``dispatch.Pool`` of simulated workers on a simulated clock.

    Attempts fail at ``RATES``; the shards in ``poison`` always fail. ``committed`` holds the shards
    in the store, and ``happened`` counts the faults.
    """

    can_replace = True

    def __init__(self, shards: Sequence[Shard], num_workers: int, seed: int) -> None:
        self.now = 0.0
        self.num_attempts = 0
        self.happened: Counter[str] = Counter()
        self.committed: set[str] = set()
        self._chance = random.Random(seed)
        self._num_wanted = num_workers
        self._workers: dict[int, _Worker] = {}
        self._last = -1
        self._future: list[tuple[float, int, Callable[[], PoolEvent | None]]] = []
        self._order = itertools.count()
        self.faults: Counter[str] = Counter()  # attempts that failed by the shard's own fault
        self.poison = {
            s.id: kind
            for kind, rate in POISON.items()
            for s in self._chance.sample(shards, max(1, round(rate * len(shards))))
        }
        for node in range(-(-num_workers // WORKERS_A_NODE)):
            self._later(
                self._chance.expovariate(1 / (NODE_LOST_H * 3600)), partial(self._lose_node, node)
            )

    # --- the pool

    def clock(self) -> float:
        return self.now

    def grow(self, num_useful: int) -> int:
        while len(self._workers) < min(self._num_wanted, num_useful):
            self._last += 1
            self._workers[self._last] = _Worker(self._last // WORKERS_A_NODE)
            self._start(self._last)
        return len(self._workers)

    def assign(self, worker: int, shard: Shard, oom_retries: int) -> None:
        one = self._workers[worker]
        one.queue.append((shard, oom_retries))
        self.num_attempts += 1
        if len(one.queue) == 1 and one.alive:
            self._begin(worker)

    def wait(self, timeout_s: float) -> list[PoolEvent]:
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

    def counters(self) -> Counters:
        return sum_of(w.counters for w in self._workers.values())

    def num_tokens(self, worker: int) -> int:
        one = self._workers[worker]
        return 0 if one.hangs else int(self.now)

    def lack(self) -> str:
        return "workers are under way"

    def num_loading(self) -> int:
        return 0

    def close(self) -> None:
        pass

    # --- simulated events

    def _later(self, seconds: float, happen: Callable[[], PoolEvent | None]) -> None:
        heapq.heappush(self._future, (self.now + seconds, next(self._order), happen))

    def _start(self, worker: int, after_s: float = 0.0) -> None:
        one = self._workers[worker]
        life = one.life
        dies = self._chance.random() < BAD_START

        def ready() -> PoolEvent | None:
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
        """End the process of ``worker``; the shard that it was running may be committed."""
        one = self._workers[worker]
        if one.queue and one.alive and not one.hangs and self._chance.random() < COMMITTED:
            shard = one.queue[0][0].id
            if shard not in self.poison:
                self.happened["committed, not told"] += 1
                self.committed.add(shard)
        one.life += 1
        one.alive = one.hangs = False
        one.queue.clear()

    def _die(self, worker: int, cause: Cause, back_s: float = 0.0) -> PoolEvent:
        self._end(worker)
        self.happened[cause.name.lower()] += 1
        one = self._workers[worker]
        life = one.life

        def gone() -> PoolEvent | None:
            return (
                Gone(worker, cause)
                if self._workers.get(worker) is one and one.life == life
                else None
            )

        self._later(min(VERDICT_S, back_s + LOAD_S / 2), gone)
        self._start(worker, back_s)
        return Silent(worker)

    def _lose_node(self, node: int) -> None:
        """End all processes of ``node``, in half of the cases after a notice.

        A worker that was replaced after the notice is on another node, and survives.
        """
        there = [(n, w, w.life) for n, w in self._workers.items() if w.node == node and w.alive]
        notice_s = NOTICE_S if self._chance.random() < 0.5 else 0.0
        for worker, one, life in there:
            if notice_s:
                self._later(0.0, partial(self._announce, worker))
            self._later(notice_s, partial(self._taken, worker, one, life))
        self.happened["nodes lost"] += 1
        self._later(
            self._chance.expovariate(1 / (NODE_LOST_H * 3600)), partial(self._lose_node, node)
        )

    def _announce(self, worker: int) -> PoolEvent | None:
        return Leaving(worker) if worker in self._workers else None

    def _taken(self, worker: int, one: _Worker, life: int) -> PoolEvent | None:
        if self._workers.get(worker) is not one or one.life != life:
            return None
        return self._die(worker, Cause.NODE, NODE_BACK_S)

    def _begin(self, worker: int) -> None:
        """Start the first shard in the queue of ``worker``."""
        one = self._workers[worker]
        shard, oom_retries = one.queue[0]
        life = one.life
        if shard.id in self.committed:  # the worker finds the commit
            self._later(1.0, partial(self._tell, worker, one, life, None))
            return
        seconds = self._chance.lognormvariate(0.0, SPREAD) * SHARD_S
        fate = self.poison.get(shard.id) or self._luck()
        if fate == "memory" and oom_retries and shard.id not in self.poison:
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

    def _tell(self, worker: int, one: _Worker, life: int, fate: str | None) -> PoolEvent | None:
        """End the running attempt of ``worker``, and return its event."""
        if self._workers.get(worker) is not one or one.life != life:
            return None
        shard = one.queue[0][0]
        if (
            fate is None
            and self.now % (OUTAGE_EVERY_H * 3600) > OUTAGE_EVERY_H * 3600 - OUTAGE_S + 120
        ):
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
            one.counters.documents += SHARD_TOKENS // 200
            one.counters.tokens += SHARD_TOKENS
            one.counters.forward_tokens += SHARD_TOKENS
        return Done(worker, shard.id, arrived(shard.id))


def arrived(shard: str) -> Commit:
    """A commit of ``shard``; like one received over Ray, it shares no objects with others."""
    attempt = shard[:16]
    files = {
        table: {
            "name": f"{attempt}-{table}.parquet",
            "rows": SHARD_TOKENS,
            "bytes": 4_800_000,
            "sha256": shard * 2,
        }
        for table in layout.TABLES
    }
    counts = {
        **dict.fromkeys(COUNTS, 0),
        "documents": SHARD_TOKENS // 200,
        "tokens": SHARD_TOKENS,
        "special": SHARD_TOKENS // 100,
        "windows": SHARD_TOKENS // 200,
        "forward_tokens": SHARD_TOKENS,
        "chars": SHARD_BYTES,
    }
    made_by = {"device": "cuda", "afn-ray": "0.1.0", "torch": "2.13.0", "transformers": "5.0.0"}
    files, counts, made_by = json.loads(json.dumps([files, counts, made_by]))
    return Commit(shard, attempt, files, counts, 301.25, made_by)
