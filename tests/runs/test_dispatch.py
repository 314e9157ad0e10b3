"""Every rule of the dispatcher, on workers that are a script and a clock that is a number."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from afn_ray.corpus_values import FileSlice, ReadOptions, Shard
from afn_ray.errors import (
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
from afn_ray.runs import deadlines
from afn_ray.runs.deadlines import SLOTS
from afn_ray.runs.dispatch import (
    ATTEMPTS,
    DRAIN_S,
    FAILED_STARTS,
    OOM_RETRIES,
    POLL_S,
    QUARANTINES_IN_ROW,
    Dispatcher,
    Tolerance,
)
from afn_ray.runs.outcome import State
from afn_ray.runs.pool import Cause, Done, Failed, Gone, Leaving, PoolEvent, Ready, Silent
from afn_ray.runs.progress import Counters, Progress
from afn_ray.runs.waiting import NOTICE_AFTER_S
from afn_ray.store.commits import Commit

START_S, WORK_S = 5.0, 10.0


def make_shard(name: str, num_bytes: int = 1000) -> Shard:
    piece = FileSlice(f"/c/{name}", num_bytes, "", "txt", "", 0, num_bytes, num_bytes, 1, "")
    return Shard(name, (piece,), ReadOptions("txt", "text", None, "file", 1 << 20))


SHARDS = [make_shard(f"s{i}") for i in range(20)]
Fate = BaseException | Cause | str | None
"""Outcome of an attempt: an error, a death of its worker, "hang", or done."""


@dataclass
class FakePool:
    """Workers as events of the future; ``fate(shard, attempt, alone, oom_retries)`` says how an
    attempt ends.
    """

    fate: Callable[[str, int, bool, int], Fate] = lambda shard, attempt, alone, oom_retries: None
    num_places: int = 2  # of workers that the cluster has
    wanted: int = 2
    start: Callable[[int], Fate] = lambda nth: None
    can_replace: bool = True
    loading: int = 0  # of the workers that are not ready
    at: Callable[[FakePool], None] = lambda pool: None  # at every look at the clock
    now: float = 0.0
    events: list[tuple[float, PoolEvent]] = field(default_factory=list)
    alive: dict[int, dict[str, int]] = field(
        default_factory=dict
    )  # worker -> shards in flight, and their attempts
    attempts: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    log: list[str] = field(default_factory=list)
    most_in_flight: int = 0
    order: list[tuple[int, str, int]] = field(
        default_factory=list
    )  # worker, shard, others in flight
    closed: bool = False

    def clock(self) -> float:
        return self.now

    def later(self, seconds: float, event: PoolEvent) -> None:
        self.events.append((self.now + seconds, event))

    def grow(self, num_useful: int) -> int:
        while len(self.alive) < min(self.wanted, num_useful):
            worker = max([*self.alive, -1, *self._ever]) + 1
            self._begin(worker)
        return len(self.alive)

    _ever: set[int] = field(default_factory=set)

    def _begin(self, worker: int) -> None:
        self.alive[worker] = {}
        self._ever.add(worker)
        if len(self.alive) > self.num_places:
            return  # it waits for a place
        self.starts += 1
        fate = self.start(self.starts)
        if fate is None:
            self.later(START_S, Ready(worker))
        elif isinstance(fate, Cause):
            self.later(START_S, Gone(worker, fate))
        else:
            assert isinstance(fate, BaseException)
            self.later(START_S, Gone(worker, Cause.START, fate))

    def assign(self, worker: int, shard: Shard, oom_retries: int) -> None:
        flights = self.alive[worker]
        self.attempts[shard.id] += 1
        self.order.append((worker, shard.id, len(flights)))
        alone = not flights
        flights[shard.id] = self.attempts[shard.id]
        self.most_in_flight = max(self.most_in_flight, len(flights))
        fate = self.fate(shard.id, self.attempts[shard.id], alone, oom_retries)
        if fate is None:
            self.later(WORK_S, Done(worker, shard.id, commit(shard.id)))
        elif isinstance(fate, Cause):
            self.later(WORK_S / 2, Silent(worker))
            self.later(WORK_S / 2 + 1, Gone(worker, fate))
            self.later(WORK_S / 2 + START_S, Ready(worker))
        elif isinstance(fate, BaseException):
            self.later(WORK_S / 2, Failed(worker, shard.id, fate))

    def wait(self, timeout_s: float) -> list[PoolEvent]:
        self.at(self)
        end = self.now + timeout_s
        self.events.sort(key=lambda e: e[0])
        ready = [e for e in self.events if e[0] <= end]
        self.events = self.events[len(ready) :]
        self.now = ready[-1][0] if ready else end
        told: list[PoolEvent] = []
        for _, event in ready:
            if isinstance(event, Done | Failed):
                if self.alive.get(event.worker, {}).pop(event.shard, None) is None:
                    continue  # its process is dead
            elif isinstance(event, Silent | Ready | Gone):
                if event.worker not in self.alive:
                    continue
                self.alive[event.worker].clear()
                if isinstance(event, Gone) and event.cause is Cause.START:
                    del self.alive[event.worker]
                elif isinstance(event, Gone) and event.cause is Cause.LOADING:
                    self._begin(event.worker)
            told.append(event)
        return told

    def replace(self, worker: int) -> None:
        self.log.append(f"replace {worker}")
        self._begin(worker)

    def release(self, worker: int) -> None:
        assert not self.alive.pop(worker)
        self.log.append(f"release {worker}")

    def counters(self) -> Counters:
        return Counters()

    def num_tokens(self, worker: int) -> int:
        return self.tokens.get(worker, 0)

    tokens: dict[int, int] = field(default_factory=dict)

    def num_loading(self) -> int:
        return self.loading

    def lack(self) -> str:
        return "2 workers of 1 GPU each were asked for; the cluster has 0 GPU"

    def close(self) -> None:
        self.closed = True


def commit(shard: str) -> Commit:
    return Commit(shard, "a", {}, {}, 1.0, {})


def run(
    pool: FakePool,
    shards: list[Shard] | None = None,
    wait_s: float = 100.0,
    deadline_s: float | None = None,
    allow_quarantined: int = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> State:
    shards = SHARDS if shards is None else shards
    state = Dispatcher(
        pool,
        shards,
        on_progress,
        Tolerance(wait_s, deadline_s, allow_quarantined),
        clock=pool.clock,
    ).run()
    assert pool.closed
    assert set(state.commits) | set(state.failures) <= {s.id for s in shards}
    assert not set(state.commits) & set(state.failures)
    if not state.stopped:
        assert len(state.commits) + len(state.failures) == len(shards)
    return state


# --- work out
# --------------------------------------------------------------------------------------------


def test_each_shard_is_handed_out_once_and_a_bounded_number_is_in_flight() -> None:
    pool = FakePool()
    assert len(run(pool).commits) == 20
    assert set(pool.attempts.values()) == {1}
    assert pool.most_in_flight == SLOTS


def test_work_starts_on_the_first_worker_that_is_ready() -> None:
    pool = FakePool(num_places=1, wanted=4)  # three wait for a place that never comes
    assert len(run(pool).commits) == 20
    assert {worker for worker, _, _ in pool.order} == {0}


def test_workers_with_nothing_left_to_do_are_released_while_others_work() -> None:
    pool = FakePool(
        fate=lambda shard, *_: "hang" if shard == "s3" else None, num_places=4, wanted=4
    )
    state = run(pool, deadline_s=1000.0, allow_quarantined=1)
    assert state.failures.keys() == {"s3"}
    first = next(i for i, line in enumerate(pool.log) if line.startswith("replace"))
    assert sum(line.startswith("release") for line in pool.log[:first]) == 3


def test_no_more_workers_than_shards() -> None:
    pool = FakePool(num_places=50, wanted=50)
    run(pool, SHARDS[:2])
    assert pool.starts == 2


# --- blame
# -----------------------------------------------------------------------------------------------


def test_an_exception_charges_its_shard_alone() -> None:
    pool = FakePool(fate=lambda shard, *_: ShardError("bad") if shard == "s2" else None)
    state = run(pool)
    assert state.failures == {"s2": "ShardError: bad"}
    assert pool.attempts.pop("s2") == ATTEMPTS and set(pool.attempts.values()) == {1}
    assert not any(line.startswith("replace") for line in pool.log)


def test_an_exception_that_passes_is_forgiven() -> None:
    pool = FakePool(
        fate=lambda shard, nth, *_: ShardError("bad") if nth == 1 and shard == "s2" else None
    )
    state = run(pool)
    assert len(state.commits) == 20 and state.retries == 1


def test_an_unknown_exception_replaces_the_process_and_charges_no_neighbour() -> None:
    pool = FakePool(fate=lambda shard, *_: RuntimeError("CUDA error") if shard == "s2" else None)
    state = run(pool)
    assert state.failures == {"s2": "RuntimeError: CUDA error"}
    assert pool.log.count("replace 0") + pool.log.count("replace 1") == ATTEMPTS


def test_where_no_process_can_be_replaced_an_unknown_exception_still_charges_its_shard() -> None:
    pool = FakePool(
        fate=lambda shard, *_: RuntimeError("odd") if shard == "s2" else None,
        can_replace=False,
        wanted=1,
    )
    assert run(pool).failures == {"s2": "RuntimeError: odd"}
    assert not any(line.startswith("replace") for line in pool.log)


@pytest.mark.parametrize("poison", [["s4"], ["s4", "s5"], ["s0", "s19"]])
def test_a_shard_that_kills_its_worker_is_convicted_alone_and_no_innocent_is_lost(
    poison: list[str],
) -> None:
    pool = FakePool(fate=lambda shard, *_: Cause.CRASH if shard in poison else None)
    state = run(pool)
    assert sorted(state.failures) == sorted(poison)
    assert all("with this shard alone on it" in why for why in state.failures.values())
    for shard in poison:  # in company it is not charged, and only its last attempts were alone
        alone = [others == 0 for _, s, others in pool.order if s == shard]
        assert alone[-ATTEMPTS:] == [True] * ATTEMPTS
    assert all(pool.attempts[s.id] <= 1 + len(poison) * 2 for s in SHARDS if s.id not in poison)


def test_the_last_try_of_a_shard_that_crashed_alone_has_half_the_token_budget() -> None:
    """The kernel kills for want of memory and does not say so."""

    def fate(shard: str, nth: int, alone: bool, oom_retries: int) -> Fate:
        return Cause.CRASH if shard == "s3" and not oom_retries else None

    state = run(FakePool(fate=fate))
    assert len(state.commits) == 20 and not state.failures


def test_a_suspect_is_alone_on_its_worker_to_the_end() -> None:
    crashed: set[str] = set()

    def fate(shard: str, nth: int, alone: bool, oom_retries: int) -> Fate:
        if nth == 1 and shard == "s1":
            crashed.update(["s0", "s1", "s2"])
            return Cause.CRASH
        return None

    pool = FakePool(fate=fate, num_places=1, wanted=1)
    run(pool)
    for at, (_, shard, others) in enumerate(pool.order):
        if shard in crashed and at >= SLOTS:
            assert others == 0  # and nothing joins it
            later = pool.order[at + 1 :]
            assert not later or later[0][2] == 0


def test_a_fault_of_the_device_convicts_the_shard_that_causes_it_alone() -> None:
    """A GPU's error may come up in a batch of another shard than the one that caused it."""

    def fate(shard: str, nth: int, alone: bool, oom_retries: int) -> Fate:
        if shard == "s3" or (shard == "s4" and not alone):
            return DeviceFault("CUDA error: device-side assert triggered")
        return None

    pool = FakePool(fate=fate)
    state = run(pool)
    assert list(state.failures) == ["s3"] and "device-side assert" in state.failures["s3"]
    assert pool.attempts["s4"] == 2
    assert sum(line.startswith("replace") for line in pool.log) >= ATTEMPTS


@pytest.mark.parametrize("num_before", [0, 3])
def test_a_fault_of_the_device_of_this_process_stops_the_run_and_charges_nobody(
    num_before: int,
) -> None:
    """The GPU is dead for each later shard, too, so none of them shows who caused it."""
    states: list[Progress] = []

    def fate(shard: str, *_: object) -> Fate:
        return None if int(shard[1:]) < num_before else DeviceFault("CUDA error: an assert")

    pool = FakePool(fate=fate, can_replace=False, num_places=1, wanted=1)
    with pytest.raises(Interrupted, match=r"CUDA error: an assert.*the same command resumes"):
        run(pool, on_progress=states.append)
    assert pool.closed and len(pool.attempts) <= num_before + SLOTS
    assert set(pool.attempts.values()) == {1}
    assert not any(progress.failures or progress.retries for progress in states)


@pytest.mark.parametrize("cause", [Cause.NODE])
def test_the_loss_of_a_node_charges_nobody_however_often(cause: Cause) -> None:
    pool = FakePool(fate=lambda shard, nth, *_: cause if shard == "s7" and nth <= 10 else None)
    state = run(pool)
    assert len(state.commits) == 20 and pool.attempts["s7"] == 11


def test_want_of_memory_halves_the_budget_before_it_charges() -> None:
    seen: list[int] = []

    def fate(shard: str, nth: int, alone: bool, oom_retries: int) -> Fate:
        if shard != "s2":
            return None
        seen.append(oom_retries)
        return OutOfMemory("too little") if oom_retries < 2 else None

    assert len(run(FakePool(fate=fate)).commits) == 20
    assert seen == [0, 1, 2]
    seen.clear()

    def starved(shard: str, nth: int, alone: bool, oom_retries: int) -> Fate:
        if shard != "s2":
            return None
        seen.append(oom_retries)
        return Cause.MEMORY

    pool = FakePool(fate=starved)
    state = run(pool)
    assert state.failures.keys() == {"s2"} and "memory" in state.failures["s2"]
    assert max(seen) >= OOM_RETRIES


def test_a_changed_file_is_skipped_at_once_and_is_no_sign_of_a_fault_of_all() -> None:
    many = {f"s{i}" for i in range(4, 16)}
    pool = FakePool(fate=lambda shard, *_: CorpusChanged("gone") if shard in many else None)
    state = run(pool)
    assert state.failures.keys() == many and not state.stopped
    assert set(pool.attempts.values()) == {1}


# --- what concerns all
# -----------------------------------------------------------------------------------


def test_quarantines_in_a_row_stop_the_run() -> None:
    pool = FakePool(fate=lambda *_: ShardError("the code is wrong"))
    state = run(pool)
    assert (
        f"{QUARANTINES_IN_ROW} shards in a row" in state.stopped
        and len(state.failures) == QUARANTINES_IN_ROW
    )


def test_as_many_quarantines_as_are_allowed_do_not() -> None:
    bad = {f"s{i}" for i in range(8)}
    pool = FakePool(fate=lambda shard, *_: ShardError("bad") if shard in bad else None, wanted=1)
    assert not run(pool, allow_quarantined=8).stopped


def test_quarantines_with_work_done_between_go_on() -> None:
    bad = {f"s{i}" for i in range(0, 20, 2)}
    state = run(FakePool(fate=lambda shard, *_: ShardError("bad") if shard in bad else None))
    assert state.failures.keys() == bad


@pytest.mark.parametrize("error", [ConfigError("wrong"), Interrupted("full"), KeyboardInterrupt()])
def test_what_concerns_all_shards_is_raised_at_once(error: BaseException) -> None:
    pool = FakePool(fate=lambda shard, *_: error)
    with pytest.raises(type(error)):
        run(pool)
    assert pool.closed and len(pool.attempts) <= 2 * SLOTS


@pytest.mark.parametrize("num_workers", [1, 2, 8])
def test_a_model_that_does_not_load_fails_fast(num_workers: int) -> None:
    pool = FakePool(
        start=lambda nth: ModelError("no such layer"), num_places=num_workers, wanted=num_workers
    )
    with pytest.raises(ModelError, match="no such layer"):
        run(pool)
    assert pool.starts <= num_workers + FAILED_STARTS and not pool.attempts


def test_workers_that_die_as_they_load_fail_fast_too() -> None:
    pool = FakePool(start=lambda nth: Cause.LOADING, num_places=1, wanted=1)
    with pytest.raises(ModelError, match="as it loaded the model"):
        run(pool)
    assert (
        FAILED_STARTS <= pool.starts <= FAILED_STARTS + 1
    )  # Ray starts it anew before it is asked


def test_one_start_that_fails_is_tried_again() -> None:
    pool = FakePool(start=lambda nth: Cause.LOADING if nth == 1 else None)
    assert len(run(pool).commits) == 20


def test_starts_that_fail_beside_workers_that_work_stop_nothing_and_end() -> None:
    pool = FakePool(
        start=lambda nth: ModelError("bad node") if nth > 1 else None, num_places=3, wanted=3
    )
    assert len(run(pool).commits) == 20
    assert pool.starts <= 12  # with longer and longer pauses


def test_a_store_that_answers_no_worker_stops_the_run_resumable() -> None:
    pool = FakePool(fate=lambda *_: Unavailable("no answer"))
    with pytest.raises(Unavailable):
        run(pool)


def test_a_worker_cut_off_from_the_store_is_replaced_and_charges_nobody() -> None:
    cut = {"until": 6}

    def fate(shard: str, nth: int, *_: object) -> Fate:
        cut["until"] -= 1
        return Unavailable("no answer") if cut["until"] % 3 == 0 and cut["until"] > 0 else None

    pool = FakePool(fate=fate)
    assert len(run(pool).commits) == 20
    assert any(line.startswith("replace") for line in pool.log)


# --- time
# ------------------------------------------------------------------------------------------------


def test_a_shard_that_hangs_meets_its_deadline_and_charges_only_itself() -> None:
    pool = FakePool(fate=lambda shard, *_: "hang" if shard == "s6" else None)
    state = run(pool, deadline_s=60.0)
    assert state.failures.keys() == {"s6"} and "hung" in state.failures["s6"]
    assert any("was replaced" in notice for notice in state.notices)
    assert pool.now < 60 * 4 + 100


@pytest.mark.parametrize("deadline_s", [None, 700.0])
def test_a_shard_that_hangs_beside_others_that_end_is_found_before_the_tail(
    deadline_s: float | None,
) -> None:
    def at(pool: FakePool) -> None:
        pool.tokens = dict.fromkeys(
            pool.alive, int(pool.now)
        )  # the worker measures other shards all the time

    shards = [make_shard(f"s{i}") for i in range(1500)]
    pool = FakePool(
        fate=lambda shard, nth, *_: "hang" if shard == "s6" and nth == 1 else None, at=at, wanted=1
    )
    state = run(pool, shards, deadline_s=deadline_s)
    assert len(state.commits) == 1500 and any(line.startswith("replace") for line in pool.log)
    again = [at for at, (_, shard, _) in enumerate(pool.order) if shard == "s6"][1]
    assert again < 1000


def test_a_hang_where_no_process_can_be_replaced_stops_the_run() -> None:
    pool = FakePool(
        fate=lambda shard, *_: "hang" if shard == "s6" else None, can_replace=False, wanted=1
    )
    with pytest.raises(Interrupted, match=r"s6 \(/c/s6\).*--executor ray"):
        run(pool, deadline_s=60.0)


def test_the_deadline_follows_the_size_and_the_slowest_shard() -> None:
    pool = FakePool()
    dispatcher = Dispatcher(pool, SHARDS, lambda state: None, Tolerance(10.0), clock=pool.clock)
    big, small = make_shard("big", 10**9), make_shard("small", 10)
    assert dispatcher.deadlines.of(small) >= deadlines.DEADLINE_S
    assert (
        dispatcher.deadlines.of(big)
        == deadlines.DEADLINE_S + 10**9 / deadlines.DEADLINE_BYTES_PER_S
    )
    dispatcher.run()  # of shards that are small: what they took says little of large ones
    assert dispatcher.deadlines.of(small) == deadlines.DEADLINE_S
    slowest = WORK_S / deadlines.DEADLINE_BYTES
    assert dispatcher.deadlines.of(big) == pytest.approx(
        deadlines.DEADLINE_FACTOR * slowest * 10**9
    )


def test_a_shard_of_a_worker_that_moves_is_not_hung_unless_its_deadline_was_given() -> None:
    def at(pool: FakePool) -> None:
        pool.tokens[0] = int(pool.now)

    slow = FakePool(fate=lambda shard, nth, *_: "hang" if nth == 1 else None, at=at, wanted=1)
    dispatcher = Dispatcher(slow, SHARDS[:1], lambda state: None, Tolerance(10.0), clock=slow.clock)
    slow.later(5_000, Done(0, "s0", commit("s0")))
    assert len(dispatcher.run().commits) == 1 and slow.attempts["s0"] == 1
    hung = FakePool(fate=lambda shard, nth, *_: "hang" if nth == 1 else None, wanted=1)
    assert len(run(hung, SHARDS[:1]).commits) == 1 and hung.attempts["s0"] == 2
    given = FakePool(fate=lambda shard, nth, *_: "hang" if nth == 1 else None, at=at, wanted=1)
    assert len(run(given, SHARDS[:1], deadline_s=60.0).commits) == 1 and given.now < 200


def test_a_worker_replaced_for_one_shard_and_dead_by_another_is_watched_again() -> None:
    def at(pool: FakePool) -> None:
        if pool.now > 6 and "sick" not in pool.log:
            pool.log.append("sick")  # one shard raises, and the process aborts, in one look
            pool.later(0, Failed(0, next(iter(pool.alive[0])), RuntimeError("CUDA error")))
            pool.later(0, Silent(0))

    pool = FakePool(fate=lambda shard, *_: "hang" if shard == "s9" else None, at=at, wanted=1)
    state = run(pool, deadline_s=60.0)
    assert state.failures.keys() == {"s9"}


@pytest.mark.parametrize("can_replace", [True, False])
def test_a_helper_that_dies_charges_no_neighbour(can_replace: bool) -> None:
    pool = FakePool(
        fate=lambda shard, *_: HelperDied("gone") if shard == "s5" else None,
        can_replace=can_replace,
    )
    state = run(pool)
    assert state.failures.keys() == {"s5"}
    assert all(n <= 1 + 2 * can_replace for shard, n in pool.attempts.items() if shard != "s5")


def test_without_capacity_it_says_so_within_thirty_seconds_and_gives_up_in_time() -> None:
    pool = FakePool(num_places=0)
    seen: list[tuple[float, str]] = []

    def on_progress(progress: Progress) -> None:
        seen.extend((pool.now, notice) for notice in progress.notices[len(seen) :])

    with pytest.raises(
        Interrupted, match=r"no worker for .* \(--wait 300\).*asked for.*has 0 GPU.*same command"
    ) as e:
        run(pool, wait_s=300.0, on_progress=on_progress)
    assert e.value.exit_code == 75
    assert len(seen) == 1 and NOTICE_AFTER_S <= seen[0][0] <= 30 and "0 GPU" in seen[0][1]
    assert 300 <= pool.now <= 300 + 2 * POLL_S


def test_workers_that_load_their_model_are_no_lack_of_workers() -> None:
    pool = FakePool(num_places=0, loading=2)
    notices: list[str] = []
    with pytest.raises(Interrupted, match=r"^2 workers loading the model for 300 s \(--wait 300\)"):
        run(
            pool,
            wait_s=300.0,
            on_progress=lambda progress: notices.extend(progress.notices[len(notices) :]),
        )
    assert len(notices) == 1 and notices[0].startswith("2 workers loading the model for 20 s: ")
    assert "no worker" not in notices[0]


def test_capacity_that_goes_to_zero_and_comes_back() -> None:
    def at(pool: FakePool) -> None:
        if pool.now > 12 and "lost" not in pool.log:
            pool.log.append("lost")
            pool.events.clear()
            for worker in pool.alive:
                pool.later(0, Silent(worker))
                pool.later(1, Gone(worker, Cause.NODE))
                pool.later(80, Ready(worker))

    pool = FakePool(at=at)
    state = run(pool, wait_s=100.0)
    assert len(state.commits) == 20 and len(state.notices) == 1


def test_a_node_that_leaves_gets_nothing_more_and_its_worker_moves_when_it_is_done() -> None:
    def at(pool: FakePool) -> None:
        if pool.now > 6 and "notice" not in pool.log:
            pool.log.append("notice")
            pool.later(0, Leaving(0))
            pool.later(5, Leaving(0))  # it is said again and again

    pool = FakePool(at=at)
    assert len(run(pool).commits) == 20
    assert set(pool.attempts.values()) == {1}  # nothing was done twice
    begun = pool.log.index("notice")
    assert "replace 0" in pool.log[begun:]


def test_stopping_drains_what_is_nearly_done_and_hands_out_nothing() -> None:
    def at(pool: FakePool) -> None:
        if pool.now >= START_S + WORK_S - 1 and "stop" not in pool.log:
            pool.log.append("stop")
            raise KeyboardInterrupt

    pool = FakePool(at=at)
    dispatcher = Dispatcher(pool, SHARDS, lambda state: None, Tolerance(10.0), clock=pool.clock)
    with pytest.raises(KeyboardInterrupt):
        dispatcher.run()
    assert len(dispatcher.state.commits) == 2 * SLOTS == len(pool.attempts)
    assert pool.closed and pool.now <= START_S + WORK_S + DRAIN_S


@pytest.mark.parametrize("seed", range(30))
def test_whatever_dies_every_shard_is_done_once_or_quarantined_for_its_own_fault(seed: int) -> None:
    chance = random.Random(seed)
    poison = {
        s.id: chance.choice(["crash", "raise", "hang"]) for s in SHARDS if chance.random() < 0.1
    }

    ends: dict[str, Fate] = {"crash": Cause.CRASH, "raise": ShardError("bad"), "hang": "hang"}

    def fate(shard: str, nth: int, alone: bool, oom_retries: int) -> Fate:
        if shard in poison:
            return ends[poison[shard]]
        if nth <= 6 and chance.random() < 0.2:
            return chance.choice(
                [
                    Cause.NODE,
                    Cause.NODE,
                    Unavailable("no answer"),
                    Cause.CRASH if not alone else None,
                ]
            )
        return None

    def start(nth: int) -> Fate:
        return Cause.LOADING if nth > 1 and chance.random() < 0.1 else None

    pool = FakePool(fate=fate, start=start, num_places=3, wanted=3)
    sized = [make_shard(s.id, chance.choice([10, 1000, 50_000_000])) for s in SHARDS]
    state = run(
        pool, sized, deadline_s=chance.choice([100.0, None]), allow_quarantined=20, wait_s=1e6
    )
    assert set(poison) <= set(state.failures)
    assert all("alone" in why for shard, why in state.failures.items() if shard not in poison)
    assert len(state.failures) <= len(poison) + 1
