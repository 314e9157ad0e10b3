"""Assign shards to workers and decide every retry.

The module knows nothing of Ray. It reads the time only from its ``clock``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from afn_ray import logs
from afn_ray.corpus_values import Shard
from afn_ray.errors import (
    CannotCompose,
    ConfigError,
    CorpusChanged,
    DeviceFault,
    HelperDied,
    Interrupted,
    ModelError,
    OutOfMemory,
    ShardError,
    Unavailable,
)
from afn_ray.runs.deadlines import SLOTS, Deadlines, Flight
from afn_ray.runs.outcome import State
from afn_ray.runs.pool import Cause, Done, Failed, Gone, Leaving, Pool, PoolEvent, Ready, Silent
from afn_ray.runs.progress import Counters, Progress, sum_of
from afn_ray.runs.reasons import reason
from afn_ray.runs.waiting import WaitLimit
from afn_ray.store.commits import Commit

ATTEMPTS = 2
"""Charged attempts after which a shard is quarantined.

A charged attempt raised an exception, or crashed its worker with no other shard in flight.
"""
OOM_RETRIES = 2
"""Memory failures of a shard that only halve its token budget; later ones charge the shard."""
FAILED_STARTS = 3
"""Failed worker starts that end the run while no worker has ever loaded the model."""
QUARANTINES_IN_ROW = 5
"""Consecutive quarantines that stop the run: the cause is systemic."""
UNANSWERED_IN_ROW = 3
"""Consecutive unanswered attempts per ready worker that end the run: the store is down."""
POLL_S = 0.5
"""Longest wait for events, and shortest pause between two polls of all workers, in seconds."""
POLL_PER_WORKER_S = 0.005
"""Additional pause between two polls for each worker, in seconds.

A poll sends a call to each worker, so many workers are polled less often.
"""
DRAIN_S = 1.0
"""Longest wait for nearly finished shards when the run is stopped, in seconds.

``ray job stop`` kills the process after three seconds.
"""
LONGEST_PAUSE_S = 60.0
"""Longest pause between two worker starts while starts fail, in seconds."""

_log = logging.getLogger(__name__)


OnProgress = Callable[[Progress], None]
"""Callback for the progress after each poll."""


@dataclass(slots=True)
class _Record:
    """Failures of a shard so far."""

    charges: int = 0  # its exceptions, and crashes while it was alone on its worker
    oom_retries: int = 0


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits of failure that a run accepts before it stops."""

    wait_s: float  # longest wait without any ready worker, in seconds
    deadline_s: float | None = None  # of each shard, in seconds; None: from the speed so far
    allow_quarantined: int = 0  # shards that a complete run may lack


class Dispatcher:
    """Process one run's shards on one pool's workers.

    The rules of blame:

    - An exception charges its shard.
    - A crash or a hang with several shards in flight charges none of them. They are suspects and
      run again, each alone on a worker. A shard that crashes alone is charged.
    - The loss of a node charges no shard.
    - A GPU that fails does so for the whole process. Where that cannot be replaced, the run stops,
      resumable, and charges no shard.
    - A memory failure halves the shard's token budget first.
    - A shard charged ``ATTEMPTS`` times is quarantined. After a crash alone, its last attempt has
      half the token budget.
    - An error that concerns all shards is raised: a wrong config, a full disk, a store that does
      not answer.
    """

    def __init__(
        self,
        pool: Pool,
        shards: Sequence[Shard],
        on_progress: OnProgress,
        tolerance: Tolerance,
        clock: Callable[[], float] = time.monotonic,
        state: State | None = None,
    ) -> None:
        """``state`` is that of the pools before, whose shards count too."""
        self._pool, self._on_progress, self._clock = pool, on_progress, clock
        self._todo = deque(shards)
        self._suspects: deque[Shard] = deque()
        self._records: dict[str, _Record] = {}
        self._tries: Counter[str] = Counter()  # attempts at shards that are not done
        self._running: dict[int, dict[str, Flight]] = {}  # ready worker -> shard -> flight
        self._leaving: set[int] = set()
        self._silent: set[int] = set()
        self._room: dict[int, None] = {}  # workers with a free slot, the longest free first
        self.deadlines = Deadlines(tolerance.deadline_s)
        self._next_check = 0.0
        self._next_start = 0.0
        self._failed_starts = self._quarantines = self._unanswered = 0
        self._max_quarantines = max(QUARANTINES_IN_ROW, tolerance.allow_quarantined + 1)
        self._wait_limit = WaitLimit(tolerance.wait_s, pool.lack, clock, pool.num_loading)
        self._began: float | None = None  # when the first worker was ready
        self._capacity_notice = ""  # the notice of missing workers, while no worker is ready
        self._shard_s: list[float] = []  # model seconds of the shards committed since the report
        self.state = State.of(shards) if state is None else state

    def run(self) -> State:
        """Run until all shards are done or quarantined; ``state.stopped`` explains a stop."""
        try:
            while self._has_work() and not self.state.stopped:
                self._assign_shards()
                for event in self._pool.wait(POLL_S):
                    if not self.state.stopped:
                        self._handle(event)
                if self._clock() >= self._next_check:  # a check visits every shard in flight
                    self._next_check = (
                        self._clock() + POLL_S + POLL_PER_WORKER_S * len(self._running)
                    )
                    self._check_workers()
            self._report()
            self.state.work = self._work()
            self.state.seconds = self._seconds()
        except KeyboardInterrupt:
            self._drain()
            raise
        finally:
            self._pool.close()
        return self.state

    def _has_work(self) -> bool:
        """True if a shard is queued or in flight."""
        return bool(self._todo or self._suspects) or any(self._running.values())

    # --- assignment

    def _assign_shards(self) -> None:
        """Assign shards to workers with free slots, release idle workers, and grow the pool."""
        for worker in list(self._room):
            flights = self._running[worker]
            if not flights and self._suspects:
                self._assign(worker, self._suspects.popleft())
                del self._room[worker]  # a suspect runs alone
                continue
            while self._todo and len(flights) < SLOTS:
                self._assign(worker, self._todo.popleft())
            if len(flights) == SLOTS:
                del self._room[worker]
            elif not flights:  # no shard is left for it: free its resources
                self._forget(worker)
                self._pool.release(worker)
        if self._clock() >= self._next_start:
            # No ready worker is idle: it would have been given a shard or released above.
            self.state.num_workers = self._pool.grow(
                len(self._todo) + len(self._suspects) + len(self._running)
            )

    def _assign(self, worker: int, shard: Shard) -> None:
        """Assign ``shard`` to ``worker``."""
        self._running[worker][shard.id] = Flight(shard, self._clock(), self._clock())
        self._tries[shard.id] += 1
        logs.report(
            _log,
            "shard_handed",
            f"shard {shard.id} goes to worker {worker}",
            shard=shard.id,
            worker=worker,
            tries=self._tries[shard.id],
            uri=shard.slices[0].uri,
            bytes=shard.num_bytes,
        )
        record = self._records.get(shard.id)
        self._pool.assign(worker, shard, record.oom_retries if record else 0)

    def _forget(self, worker: int) -> list[Shard]:
        """Drop the state of ``worker``, which has no process now; return its shards in flight."""
        self._room.pop(worker, None)
        self._leaving.discard(worker)
        self._silent.discard(worker)
        return [flight.shard for flight in self._running.pop(worker, {}).values()]

    def _replace(self, worker: int) -> list[Shard]:
        """Restart the process of ``worker``; return its shards in flight."""
        self.state.num_lost += 1
        logs.report(_log, "worker_replaced", f"worker {worker} gets a new process", worker=worker)
        shards = self._forget(worker)
        self._pool.replace(worker)
        return shards

    # --- events

    def _handle(self, event: PoolEvent) -> None:
        """Handle ``event``."""
        match event:
            case Ready(worker):
                self._handle_ready(worker)
            case Silent(worker):
                if worker in self._running:  # else its process has been replaced already
                    self._room.pop(worker, None)
                    self._silent.add(worker)
            case Gone():
                self._handle_gone(event)
            case Leaving(worker):
                if worker in self._running and worker not in self._leaving | self._silent:
                    self._leaving.add(worker)
                    self._room.pop(worker, None)
                    self._leave_if_idle(worker)
            case Done() | Failed():
                self._handle_end(event)

    def _handle_ready(self, worker: int) -> None:
        """Add a worker that has loaded the model."""
        self._running[worker] = {}
        self._room[worker] = None
        self._failed_starts = 0
        logs.report(_log, "worker_ready", f"worker {worker} has loaded the model", worker=worker)
        if self._began is None:
            self._began = self._clock()

    def _handle_end(self, event: Done | Failed) -> None:
        """Handle the end of an attempt.

        Results from before a replacement are ignored: the shard is queued again and finds its
        commit.
        """
        worker = event.worker
        flight = self._running.get(worker, {}).pop(event.shard, None)
        if flight is None:
            return
        for other in self._running[worker].values():
            other.since = self._clock()
        if isinstance(event, Done):
            self._handle_done(worker, flight, event.commit)
        else:
            self._handle_failure(worker, flight.shard, event.error)
        if worker in self._leaving:
            self._leave_if_idle(worker)
        elif worker in self._running:
            self._room[worker] = None

    def _leave_if_idle(self, worker: int) -> None:
        """Replace ``worker`` if it has no shard in flight."""
        if not self._running[worker]:
            self._replace(worker)  # on another node, before this one stops

    def _handle_done(self, worker: int, flight: Flight, commit: Commit) -> None:
        """Count the commit of a shard, and update the slowest speed."""
        self._count(worker, flight.shard, commit)
        self.deadlines.add_done(flight.shard, self._clock() - flight.since)
        self._quarantines = self._unanswered = 0

    def _count(self, worker: int, shard: Shard, commit: Commit) -> None:
        """Add ``commit`` to the state."""
        state = self.state
        state.commits[shard.id] = commit
        self._shard_s.append(commit.seconds)
        state.counts.update(commit.counts)
        num_written = sum(file["bytes"] for file in commit.files.values())
        state.counts.update(shards=1, bytes_read=shard.num_bytes, bytes_written=num_written)
        logs.report(
            _log,
            "shard_done",
            f"shard {shard.id} is committed",
            shard=shard.id,
            attempt=commit.attempt,
            worker=worker,
            tries=self._tries.pop(shard.id, 1),
            counts=commit.counts,
            seconds=commit.seconds,
            bytes=num_written,
        )

    def _handle_failure(self, worker: int, shard: Shard, error: BaseException) -> None:
        """Retry or quarantine ``shard`` after ``error``; raise errors that concern all shards."""
        if isinstance(error, Unavailable):
            self._unanswered += 1
            if self._unanswered >= UNANSWERED_IN_ROW * max(1, len(self._running)):
                raise error
            self._retry(shard, self._todo, reason(error))
            if self._pool.can_replace:  # the fault may be this worker's network alone
                self._todo.extend(self._replace(worker))
            return
        if isinstance(error, ConfigError | Interrupted) or not isinstance(error, Exception):
            raise error
        if isinstance(error, CorpusChanged):
            self._quarantine(shard, reason(error))  # a changed file is no sign of a systemic fault
            return
        if isinstance(error, CannotCompose):
            self.state.not_composed.add(shard, error)
            return
        if isinstance(error, OutOfMemory) and self._halve(shard):
            self._retry(shard, self._todo, reason(error))
            return
        if isinstance(error, DeviceFault) and not self._pool.can_replace:
            raise Interrupted(
                f"the GPU failed: {reason(error)}. It is unusable for this process, which cannot "
                "be replaced; the same command resumes in a new one. With --executor ray a worker "
                "whose GPU fails is replaced"
            ) from error
        if isinstance(error, HelperDied | DeviceFault):
            others = self._replace(worker) if self._pool.can_replace else []
            self._blame(
                [shard, *others], reason(error), alone=not others and not self._running.get(worker)
            )
            return
        # The process or its device may be broken: the next attempt gets a new process.
        if not isinstance(error, ShardError) and self._pool.can_replace:
            self._todo.extendleft(reversed(self._replace(worker)))
        self._charge(shard, reason(error), self._todo)

    def _handle_gone(self, event: Gone) -> None:
        """Decide on the shards of a worker that lost its process, by the cause."""
        shards = self._forget(event.worker)
        self.state.num_lost += 1
        logs.report(
            _log,
            "worker_gone",
            f"{event.cause.value}: worker {event.worker}",
            level=logging.WARNING,
            worker=event.worker,
            reason=event.cause.value,
            shards=[s.id for s in shards],
        )
        if event.cause in (Cause.START, Cause.LOADING):
            self._todo.extendleft(reversed(shards))  # shards of the previous process, if any
            self._failed_starts += 1
            self._next_start = self._clock() + min(LONGEST_PAUSE_S, 2.0**self._failed_starts - 2)
            # An error at start would occur again; a death at load may be bad luck.
            enough = (
                min(FAILED_STARTS, self.state.num_workers)
                if event.cause is Cause.START
                else FAILED_STARTS
            )
            # After a first success, starts may succeed again later or on other nodes.
            if self._began is None and self._failed_starts >= enough:
                raise event.error or ModelError(event.cause.value)
        elif event.cause is Cause.NODE:
            for shard in reversed(shards):
                self._retry(shard, self._todo, event.cause.value, soon=True)
        else:
            self._blame(shards, event.cause.value, memory=event.cause is Cause.MEMORY)

    # --- blame

    def _blame(
        self, shards: Sequence[Shard], why: str, *, memory: bool = False, alone: bool | None = None
    ) -> None:
        """Retry or charge ``shards``, which were in flight on a worker that died or hung.

        ``alone``: there was one shard, with no other beside it.
        """
        alone = len(shards) == 1 if alone is None else alone
        for shard in shards:
            if (memory and self._halve(shard)) or not alone:
                self._retry(shard, self._suspects, why)
            else:
                self._halve(shard)  # the kernel may have killed it for memory, without a message
                self._charge(shard, f"{why}, with this shard alone on it", self._suspects)

    def _halve(self, shard: Shard) -> bool:
        """Halve the token budget of ``shard``; return whether that is still allowed."""
        record = self._records.setdefault(shard.id, _Record())
        record.oom_retries += 1
        return record.oom_retries <= OOM_RETRIES

    def _retry(self, shard: Shard, queue: deque[Shard], why: str, *, soon: bool = False) -> None:
        """Queue ``shard`` for a retry; ``soon``: before the others."""
        self.state.retries += 1
        (queue.appendleft if soon else queue.append)(shard)
        logs.report(
            _log,
            "shard_retried",
            f"shard {shard.id} is tried again: {why}",
            level=logging.WARNING,
            shard=shard.id,
            tries=self._tries[shard.id],
            uri=shard.slices[0].uri,
            reason=why,
        )

    def _quarantine(self, shard: Shard, why: str) -> None:
        """Give up ``shard``."""
        self.state.failures[shard.id] = why
        self.state.counts["lost_bytes"] += shard.num_bytes
        logs.report(
            _log,
            "shard_quarantined",
            f"shard {shard.id} is quarantined: {why}",
            level=logging.ERROR,
            shard=shard.id,
            tries=self._tries.pop(shard.id, 1),
            uri=shard.slices[0].uri,
            reason=why,
        )

    def _charge(self, shard: Shard, why: str, queue: deque[Shard]) -> None:
        """Charge ``shard``: retry it, or quarantine it after ``ATTEMPTS`` charges."""
        record = self._records.setdefault(shard.id, _Record())
        record.charges += 1
        if record.charges < ATTEMPTS:
            # An early retry reveals a systemic fault before all shards have been tried.
            self._retry(shard, queue, why, soon=True)
            return
        self._quarantine(shard, why)
        self._quarantines += 1
        if self._quarantines >= self._max_quarantines:
            self.state.stopped = (
                f"{self._quarantines} shards in a row were quarantined and none was done between"
            )

    # --- time

    def _check_workers(self) -> None:
        """Replace hung workers, check the wait for workers, and report progress."""
        self._replace_hung()
        if len(self._running) > len(self._silent):
            self._wait_limit.reset()
            self._capacity_notice = ""
        elif (notice := self._wait_limit.check()) is not None:
            self.state.notices.append(notice)
            self._capacity_notice = notice
        self._report()

    def _report(self) -> None:
        """Pass a snapshot of the run to ``on_progress``."""
        state = self.state
        progress = Progress(
            num_shards=state.num_shards,
            num_workers=state.num_workers,
            num_ready=len(self._running),
            num_lost=state.num_lost,
            num_running=sum(map(len, self._running.values())),
            num_committed=len(state.commits),
            failures=tuple(state.failures.items()),
            retries=state.retries,
            counts=state.counts.copy(),
            shard_s=tuple(self._shard_s),
            work=self._work(),
            seconds=self._seconds(),
            notices=tuple(state.notices),
            capacity_notice=self._capacity_notice,
            num_documents=state.num_documents,
        )
        self._shard_s.clear()
        self._on_progress(progress)

    def _work(self) -> Counters:
        """Counters of all workers, those of earlier pools included."""
        return sum_of([self.state.work, self._pool.counters()])

    def _seconds(self) -> float:
        """Seconds since the first worker was ready, those of earlier pools included."""
        since = 0.0 if self._began is None else self._clock() - self._began
        return self.state.seconds + since

    def _replace_hung(self) -> None:
        """Replace workers that have a late shard."""
        now = self._clock()
        for worker, flights in list(self._running.items()):
            tokens = self._pool.num_tokens(worker)
            late = self.deadlines.find_late(worker, flights.values(), tokens, now)
            if late is None or worker in self._silent:
                continue
            shard, seconds = late.shard, now - late.began
            if not self._pool.can_replace:
                raise Interrupted(
                    f"shard {shard.id} ({shard.slices[0].uri}) is not done after {seconds:,.0f} s "
                    "(--shard-deadline), and this process cannot be replaced; with --executor ray "
                    "a hung worker is"
                )
            self.state.notices.append(
                f"a worker was replaced: shard {shard.id} is not done after {seconds:,.0f} s, its "
                f"deadline is {self.deadlines.of(shard):g} s (--shard-deadline)"
            )
            self._blame(self._replace(worker), f"it hung: not done after {seconds:,.0f} s")

    def _drain(self) -> None:
        """Count commits that arrive within ``DRAIN_S``; assign nothing new."""
        end = self._clock() + DRAIN_S
        while any(self._running.values()) and (left := end - self._clock()) > 0:
            for event in self._pool.wait(min(left, 0.2)):
                if isinstance(event, Done):
                    if flight := self._running.get(event.worker, {}).pop(event.shard, None):
                        self._count(event.worker, flight.shard, event.commit)
                elif isinstance(event, Silent):
                    self._forget(event.worker)
        self._report()
