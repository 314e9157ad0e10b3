"""Hands shards to workers and decides every retry; knows nothing of Ray, and of time only what its
clock says.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from afn_ray import logs
from afn_ray.errors import (
    AfnError,
    ConfigError,
    CorpusChanged,
    HelperDied,
    Interrupted,
    ModelError,
    OutOfMemory,
    ShardError,
    Unavailable,
)
from afn_ray.runs.progress import Progress
from afn_ray.schema import Shard
from afn_ray.store.commits import Commit, Commits
from afn_ray.text import count

SLOTS = 3
"""Shards in flight on one worker: one is read and tokenized, one holds the model, one is encoded
and uploaded.
"""
ATTEMPTS = 2
"""Tries that a shard gets: exceptions, or crashes while it was alone on its worker."""
HALVINGS = 2
"""How often the token budget of a shard is halved for want of memory before that counts against the
shard.
"""
FAILED_STARTS = 3
"""The run is given up when so many workers could not load the model and none ever could."""
QUARANTINES_IN_ROW = 5
"""With so many shards given up and none done between, the fault is no shard's."""
UNANSWERED_IN_ROW = 3
"""Per worker: with so many shards that met no answer and none done between, the store is down for
all.
"""
POLL_S = 0.5
LOOK_S = 0.005
"""For each worker, between two looks around: a look is a question to each, so that many are looked
at less often.
"""
DRAIN_S = 1.0
"""For shards that are nearly done when the run is stopped: ``ray job stop`` kills after three
seconds.
"""
SAY_AFTER_S = 20.0
"""Without a worker for so long, the run says what it waits for."""
DEADLINE_S = 600.0
DEADLINE_BYTES_PER_S = 10_000.0
"""Before any shard is done, one of n bytes may take ``DEADLINE_S + n / DEADLINE_BYTES_PER_S``
seconds.
"""
DEADLINE_FACTOR = 10.0
"""Later it may take so many times the seconds per byte of the slowest done, if that is more than
``DEADLINE_S``.
"""
DEADLINE_BYTES = 1 << 20
"""Smaller shards count as this large: what they take is no measure for large ones."""
LONGEST_PAUSE_S = 60.0
"""Between two starts of workers while starts fail."""

PACE_S, PACE_SHARE = 5.0, 0.02
"""What documents must have taken, and which share of all they must be, until they tell the time
left.
"""

_log = logging.getLogger(__name__)


class Cause(Enum):
    """Why a worker is gone, as far as its pool can tell."""

    CRASH = "its worker's process died"
    MEMORY = "its worker's node ran out of memory"
    NODE = "its worker's node is gone"  # or was preempted: no shard's doing
    START = "a worker could not start"
    LOADING = "a worker's process died as it loaded the model"


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has loaded its model, for the first time or anew."""

    worker: int


@dataclass(frozen=True, slots=True)
class Silent:
    """A worker has lost its process; a Gone that says why follows."""

    worker: int


@dataclass(frozen=True, slots=True)
class Gone:
    """A worker has lost its process, and with it all that it had in flight; a Ready may follow."""

    worker: int
    cause: Cause
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Leaving:
    """A worker's node will be gone soon: it may finish what it has, and gets nothing more."""

    worker: int


@dataclass(frozen=True, slots=True)
class Done:
    worker: int
    shard: str
    commit: Commit


@dataclass(frozen=True, slots=True)
class Failed:
    """A shard's attempt raised ``error``; its worker goes on."""

    worker: int
    shard: str
    error: BaseException


Event = Ready | Silent | Gone | Leaving | Done | Failed


class Pool(Protocol):
    """Workers, wherever they live, known by numbers."""

    can_replace: bool
    """Whether a worker has a process of its own, so that it can be ended and started anew."""

    def grow(self, num_useful: int) -> int:
        """Have as many workers as are wanted and useful, started or waiting for a place; returns
        their number.
        """

    def hand(self, worker: int, shard: Shard, oom_retries: int) -> None:
        """Give ``worker`` a shard, its token budget halved so many times."""

    def wait(self, timeout_s: float) -> list[Event]:
        """What happened, after the first thing did or the time is over."""

    def replace(self, worker: int) -> None:
        """End the process of ``worker`` and forget what it has in flight; Ready follows when it has
        a new one.
        """

    def release(self, worker: int) -> None:
        """End ``worker`` for good: there is no more for it to do."""

    def progress(self) -> Progress:
        """What all workers have done, shards under way included."""

    def num_tokens(self, worker: int) -> int:
        """What ``worker`` has measured, as far as is known; while it grows nothing hangs."""

    def lack(self) -> str:
        """What the workers that are not ready wait for: what was asked for, and what there is."""

    def num_loading(self) -> int:
        """Workers that have a place and load the model."""

    def close(self) -> None:
        """End all workers."""


@dataclass(slots=True)
class State:
    """How far a run is; counts are of this call, not of what the store had before."""

    num_shards: int
    num_workers: int = 0
    num_ready: int = 0  # workers that have loaded their model
    commits: Commits = field(default_factory=Commits)
    failures: dict[str, str] = field(default_factory=dict)  # shard id -> why it is quarantined
    stopped: str = ""  # why shards were left undone, where they were
    retries: int = 0
    num_lost: int = 0  # processes of workers that died or were ended in the midst
    num_running: int = 0  # shards on workers
    counts: Counter[str] = field(
        default_factory=Counter
    )  # sums of the commits' counts, shards, bytes in and out
    fresh_s: list[float] = field(
        default_factory=list
    )  # for which each shard held a model, of those done since a look
    live: Progress = field(default_factory=Progress)
    seconds: float = 0.0  # since the first worker was ready
    notices: list[str] = field(default_factory=list)  # what a person should know
    waits_for: str = ""  # the notice that no worker is there, while that is so
    num_documents: int | None = None  # planned; None where a format does not tell before it is read

    @property
    def num_done(self) -> int:
        """Shards of this call that need no more work: committed or quarantined."""
        return len(self.commits) + len(self.failures)

    @property
    def tokens_per_s(self) -> float:
        """Of all workers, since the first was ready."""
        return self.live.tokens / self.seconds if self.seconds else 0.0

    @property
    def num_measured(self) -> int:
        """Documents that have been through a model, within shards under way too; those of a failed
        attempt count.
        """
        measured = max(self.counts["documents"], round(self.live.measured))
        return measured if self.num_documents is None else min(measured, self.num_documents)

    @property
    def left_s(self) -> float | None:
        """Seconds to the last shard at the pace so far; None before each worker has ended about
        one, or documents have shown the pace.
        """
        if self.num_done < max(1, min(self.num_ready, self.num_shards // 2)):
            if (
                not self.num_documents
                or self.seconds < PACE_S
                or self.num_measured < PACE_SHARE * self.num_documents
            ):
                return None
            return self.seconds / self.num_measured * (self.num_documents - self.num_measured)
        return self.seconds / self.num_done * (self.num_shards - self.num_done)


OnState = Callable[[State], None]


@dataclass(slots=True)
class _Flight:
    """A shard on a worker, and since when it may be its turn: shards of one worker wait for each
    other.

    While neighbours end, which a shard that hangs before or behind the model does not hinder, it
    has ``SLOTS`` deadlines.
    """

    shard: Shard
    since: float
    began: float  # when it was handed over


@dataclass(slots=True)
class _Record:
    """What is held against a shard."""

    charges: int = 0  # exceptions of its own, crashes while it was alone
    oom_retries: int = 0


class Patience:
    """Says what is waited for after a while, and gives up after ``wait_s``."""

    def __init__(
        self,
        wait_s: float,
        lack: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
        num_loading: Callable[[], int] = lambda: 0,
    ) -> None:
        self._wait_s, self._lack, self._clock, self._num_loading = wait_s, lack, clock, num_loading
        self.reset()

    def reset(self) -> None:
        """What was waited for is here."""
        self._since, self._said = self._clock(), False

    def check(self) -> str | None:
        """The notice, once. Raises ``Interrupted`` when the time is over."""
        waited = self._clock() - self._since
        if waited >= self._wait_s:
            raise Interrupted(
                f"{self._who()} for {waited:,.0f} s (--wait {self._wait_s:g}): {self._lack()}; the same command resumes"
            )
        if self._said or waited < SAY_AFTER_S:
            return None
        self._said = True
        return f"{self._who()} for {waited:,.0f} s: {self._lack()}; waiting for up to {self._wait_s:,.0f} s (--wait)"

    def _who(self) -> str:
        loading = self._num_loading()
        return f"{count(loading, 'worker')} loading the model" if loading else "no worker"


class Dispatcher:
    """One run's shards on one pool's workers.

    Blame is fair. An exception charges its shard. A crash, or a hang, with several shards in flight
    charges none of them: they are suspects and run again, each alone on a worker, and what crashes
    alone is charged. The loss of a node charges nobody. Want of memory halves the shard's token
    budget first. A shard charged ``ATTEMPTS`` times is quarantined; after a crash alone its last
    try has half the token budget. What concerns all shards is raised: a wrong config, a full disk,
    a store that does not answer.
    """

    def __init__(
        self,
        pool: Pool,
        shards: Sequence[Shard],
        on_state: OnState,
        *,
        wait_s: float,
        deadline_s: float | None = None,
        allow_quarantined: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._on_state, self._clock = pool, on_state, clock
        self._todo = deque(shards)
        self._suspects: deque[Shard] = deque()
        self._records: dict[str, _Record] = {}
        self._tries: Counter[str] = Counter()  # of shards that are not done
        self._running: dict[int, dict[str, _Flight]] = {}  # by worker that is ready; by shard
        self._leaving: set[int] = set()
        self._silent: set[int] = set()
        self._room: dict[int, None] = {}  # workers that may take more, in the order they became so
        self._deadline_s = deadline_s
        self._slowest = 0.0  # seconds per byte
        self._moved: dict[
            int, tuple[int, float]
        ] = {}  # tokens of each worker, and when they last grew
        self._next_check = 0.0
        self._next_start = 0.0
        self._failed_starts = self._quarantines = self._unanswered = 0
        self._max_quarantines = max(QUARANTINES_IN_ROW, allow_quarantined + 1)
        self._patience = Patience(wait_s, pool.lack, clock, pool.num_loading)
        self._began: float | None = None  # when the first worker was ready
        self.state = State(len(shards), num_documents=_num_documents(shards))

    def run(self) -> State:
        """Until every shard is done or quarantined; or ``state.stopped`` says why not."""
        try:
            while (
                self._todo or self._suspects or any(self._running.values())
            ) and not self.state.stopped:
                self._hand_out()
                for event in self._pool.wait(POLL_S):
                    if not self.state.stopped:
                        self._take(event)
                if self._clock() >= self._next_check:  # it looks at every shard in flight
                    self._next_check = self._clock() + POLL_S + LOOK_S * len(self._running)
                    self._look_around()
            self._report()
        except KeyboardInterrupt:
            self._drain()
            raise
        finally:
            self._pool.close()
        return self.state

    # --- work out
    # ----------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        for worker in list(self._room):
            flights = self._running[worker]
            if not flights and self._suspects:
                self._hand(worker, self._suspects.popleft())
                del self._room[worker]  # alone
                continue
            while self._todo and len(flights) < SLOTS:
                self._hand(worker, self._todo.popleft())
            if len(flights) == SLOTS:
                del self._room[worker]
            elif not flights:  # the tail: its place may go
                self._forget(worker)
                self._pool.release(worker)
        if self._clock() >= self._next_start:
            # Of those that are ready none is idle: it would have got something, or been let go.
            self.state.num_workers = self._pool.grow(
                len(self._todo) + len(self._suspects) + len(self._running)
            )

    def _hand(self, worker: int, shard: Shard) -> None:
        self._running[worker][shard.id] = _Flight(shard, self._clock(), self._clock())
        self._tries[shard.id] += 1
        logs.tell(
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
        self._pool.hand(worker, shard, record.oom_retries if record else 0)

    def _forget(self, worker: int) -> list[Shard]:
        """``worker`` has no process now; returns what it had in flight."""
        self._room.pop(worker, None)
        self._leaving.discard(worker)
        self._silent.discard(worker)
        return [flight.shard for flight in self._running.pop(worker, {}).values()]

    def _replace(self, worker: int) -> list[Shard]:
        self.state.num_lost += 1
        logs.tell(_log, "worker_replaced", f"worker {worker} gets a new process", worker=worker)
        shards = self._forget(worker)
        self._pool.replace(worker)
        return shards

    # --- events in
    # ---------------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._running[event.worker] = {}
            self._room[event.worker] = None
            self._failed_starts = 0
            logs.tell(
                _log,
                "worker_ready",
                f"worker {event.worker} has loaded the model",
                worker=event.worker,
            )
            self._began = self._began if self._began is not None else self._clock()
        elif isinstance(event, Silent):
            if event.worker in self._running:  # not of a process that was replaced in the meantime
                self._room.pop(event.worker, None)
                self._silent.add(event.worker)
        elif isinstance(event, Gone):
            self._gone(event)
        elif isinstance(event, Leaving):
            if event.worker in self._running and event.worker not in self._leaving | self._silent:
                self._leaving.add(event.worker)
                self._room.pop(event.worker, None)
                self._leave_if_idle(event.worker)
        elif (flight := self._running.get(event.worker, {}).pop(event.shard, None)) is not None:
            # Not what a worker did before it was replaced: the shard is queued again, and finds its
            # commit.
            for other in self._running[event.worker].values():
                other.since = self._clock()
            if isinstance(event, Done):
                self._done(event.worker, flight, event.commit)
            else:
                self._failed(event.worker, flight.shard, event.error)
            if event.worker in self._leaving:
                self._leave_if_idle(event.worker)
            elif event.worker in self._running:
                self._room[event.worker] = None

    def _leave_if_idle(self, worker: int) -> None:
        if not self._running[worker]:
            self._replace(worker)  # elsewhere, before its node takes it down

    def _done(self, worker: int, flight: _Flight, commit: Commit) -> None:
        self._count(worker, flight.shard, commit)
        took_s = self._clock() - flight.since
        self._slowest = max(self._slowest, took_s / max(DEADLINE_BYTES, flight.shard.num_bytes))
        self._quarantines = self._unanswered = 0

    def _count(self, worker: int, shard: Shard, commit: Commit) -> None:
        state = self.state
        state.commits[shard.id] = commit
        state.fresh_s.append(commit.seconds)
        state.counts.update(commit.counts)
        num_written = sum(file["bytes"] for file in commit.files.values())
        state.counts.update(shards=1, bytes_read=shard.num_bytes, bytes_written=num_written)
        logs.tell(
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

    def _failed(self, worker: int, shard: Shard, error: BaseException) -> None:
        if isinstance(error, Unavailable):
            self._unanswered += 1
            if self._unanswered >= UNANSWERED_IN_ROW * max(1, len(self._running)):
                raise error
            self._again(shard, self._todo, reason(error))
            if self._pool.can_replace:  # perhaps it is only this worker's network
                self._todo.extend(self._replace(worker))
            return
        if isinstance(error, ConfigError | Interrupted) or not isinstance(error, Exception):
            raise error
        if isinstance(error, CorpusChanged):
            self._quarantine(shard, reason(error))  # no sign of a fault that all shards share
            return
        if isinstance(error, OutOfMemory) and self._halve(shard):
            self._again(shard, self._todo, reason(error))
            return
        if isinstance(error, HelperDied):
            others = self._replace(worker) if self._pool.can_replace else []
            self._blame(
                [shard, *others], reason(error), alone=not others and not self._running.get(worker)
            )
            return
        if (
            not isinstance(error, ShardError) and self._pool.can_replace
        ):  # its process or device may be broken: the next try gets a new one
            self._todo.extendleft(reversed(self._replace(worker)))
        self._charge(shard, reason(error), self._todo)

    def _gone(self, event: Gone) -> None:
        shards = self._forget(event.worker)
        self.state.num_lost += 1
        logs.tell(
            _log,
            "worker_gone",
            f"{event.cause.value}: worker {event.worker}",
            level=logging.WARNING,
            worker=event.worker,
            reason=event.cause.value,
            shards=[s.id for s in shards],
        )
        if event.cause in (Cause.START, Cause.LOADING):
            self._todo.extendleft(reversed(shards))  # of a process before, if any
            self._failed_starts += 1
            self._next_start = self._clock() + min(LONGEST_PAUSE_S, 2.0**self._failed_starts - 2)
            # One that says what is wrong would say so again; one that died may have been unlucky.
            enough = (
                min(FAILED_STARTS, self.state.num_workers)
                if event.cause is Cause.START
                else FAILED_STARTS
            )
            if (
                self._began is None and self._failed_starts >= enough
            ):  # later there may be other places, other times
                raise event.error or ModelError(event.cause.value)
        elif event.cause is Cause.NODE:
            for shard in reversed(shards):
                self._again(shard, self._todo, event.cause.value, soon=True)
        else:
            self._blame(shards, event.cause.value, memory=event.cause is Cause.MEMORY)

    # --- blame
    # -------------------------------------------------------------------------------------------

    def _blame(
        self, shards: Sequence[Shard], why: str, *, memory: bool = False, alone: bool | None = None
    ) -> None:
        """``shards`` were in flight on a worker that died or hung; ``alone``: one, with no other
        beside it.
        """
        alone = len(shards) == 1 if alone is None else alone
        for shard in shards:
            if (memory and self._halve(shard)) or not alone:
                self._again(shard, self._suspects, why)
            else:
                self._halve(shard)  # the kernel kills for want of memory too, and does not say so
                self._charge(shard, f"{why}, with this shard alone on it", self._suspects)

    def _halve(self, shard: Shard) -> bool:
        record = self._records.setdefault(shard.id, _Record())
        record.oom_retries += 1
        return record.oom_retries <= HALVINGS

    def _again(self, shard: Shard, queue: deque[Shard], why: str, *, soon: bool = False) -> None:
        self.state.retries += 1
        (queue.appendleft if soon else queue.append)(shard)
        logs.tell(
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
        self.state.failures[shard.id] = why
        self.state.counts["lost_bytes"] += shard.num_bytes
        logs.tell(
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
        record = self._records.setdefault(shard.id, _Record())
        record.charges += 1
        if record.charges < ATTEMPTS:
            self._again(
                shard, queue, why, soon=True
            )  # a fault of all shards shows before all were tried
            return
        self._quarantine(shard, why)
        self._quarantines += 1
        if self._quarantines >= self._max_quarantines:
            self.state.stopped = (
                f"{self._quarantines} shards in a row were quarantined and none was done between"
            )

    # --- time
    # --------------------------------------------------------------------------------------------

    def _look_around(self) -> None:
        """Hung shards, missing workers and progress."""
        self._end_hung()
        if len(self._running) > len(self._silent):
            self._patience.reset()
            self.state.waits_for = ""
        elif (notice := self._patience.check()) is not None:
            self.state.notices.append(notice)
            self.state.waits_for = notice
        self._report()

    def _report(self) -> None:
        state = self.state
        state.num_ready = len(self._running)
        state.num_running = sum(map(len, self._running.values()))
        state.live = self._pool.progress()
        state.seconds = self._clock() - self._began if self._began is not None else 0.0
        self._on_state(state)
        state.fresh_s.clear()

    def _end_hung(self) -> None:
        now = self._clock()
        for worker, flights in list(self._running.items()):
            tokens = self._pool.num_tokens(worker)
            if self._moved.get(worker, (-1, 0.0))[0] != tokens:
                self._moved[worker] = tokens, now
            moves = self._deadline_s is None and now - self._moved[worker][1] < DEADLINE_S
            late = [
                f
                for f in flights.values()
                if not moves and now - f.since > self.deadline_s(f.shard)
            ]
            if self._deadline_s is not None or self._slowest:  # else nobody knows what is slow here
                late += [
                    f for f in flights.values() if now - f.began > SLOTS * self.deadline_s(f.shard)
                ]
            if not late or worker in self._silent:
                continue
            shard, seconds = late[0].shard, now - late[0].began
            if not self._pool.can_replace:
                raise Interrupted(
                    f"shard {shard.id} ({shard.slices[0].uri}) is not done after {seconds:,.0f} s (--shard-deadline), "
                    "and this process cannot be replaced; with --executor ray a hung worker is"
                )
            self.state.notices.append(
                f"a worker was replaced: shard {shard.id} is not done after {seconds:,.0f} s, its deadline is "
                f"{self.deadline_s(shard):g} s (--shard-deadline)"
            )
            self._blame(self._replace(worker), f"it hung: not done after {seconds:,.0f} s")

    def deadline_s(self, shard: Shard) -> float:
        """Seconds after which ``shard`` counts as hung: by its size and the slowest shard so
        far.
        """
        if self._deadline_s is not None:
            return self._deadline_s
        if not self._slowest:
            return DEADLINE_S + shard.num_bytes / DEADLINE_BYTES_PER_S
        return max(DEADLINE_S, DEADLINE_FACTOR * self._slowest * shard.num_bytes)

    def _drain(self) -> None:
        """Nothing new is handed out; what is nearly done may be committed."""
        end = self._clock() + DRAIN_S
        while any(self._running.values()) and (left := end - self._clock()) > 0:
            for event in self._pool.wait(min(left, 0.2)):
                if isinstance(event, Done):
                    if flight := self._running.get(event.worker, {}).pop(event.shard, None):
                        self._count(event.worker, flight.shard, event.commit)
                elif isinstance(event, Silent):
                    self._forget(event.worker)
        self._report()


def _num_documents(shards: Iterable[Shard]) -> int | None:
    total = 0
    for shard in shards:
        for piece in shard.slices:
            if piece.num_documents < 0:
                return None
            total += piece.num_documents
    return total


class Told(Exception):
    """An exception that is not ours, as ``reason`` tells it: its own class may not survive the way
    to the driver.
    """


def reason(error: BaseException) -> str:
    """One line on ``error``: its type, the last line of its message and, if it is not ours, where
    it was raised.
    """
    if isinstance(error, Told):
        return str(error)
    text = str(error).strip().splitlines()
    frames = [] if isinstance(error, AfnError) else traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[-1] if text else 'no message'}{where}"
