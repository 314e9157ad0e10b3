"""Workers on Ray: restartable actors, and the cause of death of their processes."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from afn_ray import logs, model
from afn_ray.config import RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.errors import AfnError, ConfigError, Interrupted, ModelError
from afn_ray.runs import reasons
from afn_ray.runs.cluster import placement
from afn_ray.runs.cluster.connection import (
    address,
    cause_of,
    lack,
    needs,
    start_error,
)
from afn_ray.runs.composer import Composer
from afn_ray.runs.deadlines import SLOTS
from afn_ray.runs.pool import Cause, Done, Failed, Gone, Leaving, PoolEvent, Ready, Silent
from afn_ray.runs.progress import Counters, sum_of
from afn_ray.runs.task import Task
from afn_ray.runs.worker import Processor
from afn_ray.store.commits import Commit

POLL_S = 0.5
"""Longest wait between two polls of the actors, in seconds."""
VERDICT_S = 30.0
"""Longest time until Ray reports the death of a dead worker's node, in seconds."""
UNITS_S = 5.0
"""Longest age of the known resources and leaving nodes of the cluster, in seconds."""
CLOSE_S = 2.0
"""Longest wait for workers to end their tokenizers before they are killed, in seconds."""


class _Worker:
    """Class of the actors: one ``Processor``, which can be polled while it works."""

    def __init__(self, task: Task) -> None:
        gc.freeze()  # the process is ours, and what it has imported is never garbage
        self._error: Exception | None = None
        logs.to_stderr(task.config.log_format, run=task.run, worker=task.worker)
        try:
            if task.device == "cuda" and task.config.workers_per_gpu > 1:
                model.limit_memory(task.config.workers_per_gpu)
            self._processor = Composer(task) if task.composition else Processor(task)
        # The driver raises it as it is; raised here, Ray would send its text.
        except Exception as error:  # noqa: BLE001
            self._error = error

    def process(self, shard: Shard, oom_retries: int) -> tuple[Commit, Counters]:
        """Commit of ``shard``, and the worker's counters."""
        try:
            return self._processor.process(shard, oom_retries), self._processor.counters
        except AfnError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is
            raise reasons.ReportedError(reasons.reason(error)) from None

    def poll(self) -> tuple[Counters, str, str]:
        """Counters and the ids of this node and process. Raises the error of a failed start."""
        import ray

        if self._error is not None:
            raise self._error
        context = ray.get_runtime_context()
        return self._processor.counters, context.get_node_id(), context.get_worker_id()

    def close(self) -> None:
        self._processor.close()


@dataclass(slots=True)
class _Actor:
    """An actor with the known state of its current process."""

    handle: Any
    ready: bool = False
    poll: Any = None  # reference of the poll in flight
    next_poll: float = 0.0  # time of the next poll, while none is in flight
    node: str = ""
    process: str = ""  # id of its process; while it is not ready, of the previous one
    restarts: int = 0  # restarts that have been handled
    counters: Counters = field(default_factory=Counters)
    nodes: frozenset[str] = frozenset()  # nodes alive at its last poll, while it is not ready
    dead_since: float | None = None  # time of its death, while the cause is unknown


class RayPool:
    """A pool of restartable actors.

    All are requested at once: an autoscaler sees those that wait for resources. Ray restarts
    processes but retries no task (``max_task_retries=0``). Ray does not report why a process died.
    This class finds the cause: the node is gone too, the node had no memory left, or neither.
    """

    can_replace = True

    def __init__(self, task: Task, config: RunConfig) -> None:
        import ray

        self._ray = ray
        self.notices: list[str] = []  # messages for people
        self._check_local(config, task.device)
        self._asked = config
        # All workers have the same resources, also those on nodes that come later.
        self._placed = self._place(task.device)
        config = replace(config, tokenizer_workers=self._placed.tokenizer_workers)
        self._task = replace(task, config=config)
        self._config = config
        self._class = ray.remote(
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=SLOTS,
            concurrency_groups={"poll": 1},
            **needs(config, task.device),
        )(_Worker)
        self._actors: dict[int, _Actor] = {}
        self._last = -1
        self._in_flight: dict[Any, tuple[int, str]] = {}  # task -> worker, shard
        self._released = Counters()  # total of ended workers and processes
        self._num_wanted = 0
        self._next_count = self._next_notices = 0.0

    def _check_local(self, config: RunConfig, device: str) -> None:
        """Raise ``ConfigError`` where a local Ray lacks a worker's resources: it never grows."""
        if address(config) is not None:
            return
        nodes = placement.nodes()
        if device == "cuda":
            nodes = [node for node in nodes if node.num_gpus]
        if not any(node.num_gpus if device == "cuda" else node.num_cpus for node in nodes):
            name = "GPU" if device == "cuda" else "CPU"
            has = self._ray.cluster_resources()
            raise ConfigError(f"a worker needs one {name}, and this Ray has none; it has {has}")
        num_cpus = needs(config, device)["num_cpus"]
        if max(node.num_cpus for node in nodes) < num_cpus:
            raise ConfigError(
                f"a worker needs {num_cpus} CPUs, one and its --tokenizer-workers, and no node of "
                "this Ray has so many"
            )

    def _place(self, device: str, known: placement.Placement | None = None) -> placement.Placement:
        """Place the workers on the nodes that are there; keep new notices."""
        placed = placement.place(self._asked, placement.nodes(), device, known)
        self.notices += [notice for notice in placed.notices if notice not in self.notices]
        return placed

    def grow(self, num_useful: int) -> int:
        if time.monotonic() >= self._next_count:
            self._next_count = time.monotonic() + UNITS_S
            self._num_wanted = self._place(self._task.device, self._placed).num_workers
        while len(self._actors) < min(self._num_wanted, num_useful):
            self._last += 1
            task = replace(self._task, worker=self._last)
            actor = _Actor(self._class.remote(task))
            self._actors[self._last] = actor
            self._send_poll(actor)
        return len(self._actors)

    def _send_poll(self, actor: _Actor) -> None:
        """Poll ``actor``."""
        actor.poll = actor.handle.poll.options(concurrency_group="poll").remote()
        if not actor.ready:
            actor.nodes = self._alive()

    def assign(self, worker: int, shard: Shard, oom_retries: int) -> None:
        ref = self._actors[worker].handle.process.remote(shard, oom_retries)
        self._in_flight[ref] = worker, shard.id

    def wait(self, timeout_s: float) -> list[PoolEvent]:
        end = time.monotonic() + timeout_s
        while True:
            events = [*self._verdicts(), *self._find_leaving()]
            polls: dict[Any, int] = {}  # poll -> worker
            waited = list(self._in_flight)
            for worker, actor in self._actors.items():
                if actor.poll is None:
                    continue
                polls[actor.poll] = worker
                # A ready worker's answer to a poll is no event, and must not end the wait.
                if not actor.ready:
                    waited.append(actor.poll)
            left_s = 0.0
            if not events:
                left_s = max(0.0, min(end - time.monotonic(), POLL_S))
            if waited:
                self._ray.wait(waited, num_returns=1, timeout=left_s)
            else:
                time.sleep(left_s)
            for ref in self._finished([*self._in_flight, *polls]):
                if ref in polls:
                    events += self._handle_poll(polls[ref], ref)
                elif ref in self._in_flight:  # else an earlier ref has shown its worker's death
                    events += self._handle_result(ref)
            if events or time.monotonic() >= end:
                return events

    def _finished(self, refs: list[Any]) -> list[Any]:
        """All of ``refs`` that have finished.

        With ``num_returns=1``, ray.wait returns one of them in no order, and frequent ones would
        starve the others.
        """
        if not refs:
            return []
        done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        finished: list[Any] = done
        return finished

    def _handle_result(self, ref: Any) -> Iterator[PoolEvent]:
        """Events of a task that has ended."""
        worker, shard = self._in_flight.pop(ref)
        try:
            commit, counters = self._ray.get(ref)
            self._update(worker, counters)
            yield Done(worker, shard, commit)
        except self._ray.exceptions.RayActorError as error:
            self._handle_death(worker, error)
            yield Silent(worker)
        except self._ray.exceptions.RayTaskError as error:
            yield Failed(worker, shard, cause_of(error))
        except self._ray.exceptions.RayError as error:
            raise Interrupted(
                f"Ray failed: {reasons.reason(error)}; the same command resumes"
            ) from error

    def _handle_poll(self, worker: int, ref: Any) -> Iterator[PoolEvent]:
        """Events of a poll that has been answered."""
        actor = self._actors.get(worker)
        if actor is None or actor.poll is not ref:  # released or replaced since
            return
        actor.poll = None
        try:
            counters, node, process = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            if not actor.ready:  # else the task in flight reports what happened
                yield from self._handle_failed_start(worker, error)
            return
        if actor.ready:
            self._update(worker, counters)
            return
        # The old process still lives: the poll was sent before its end, or its network was cut.
        if process == actor.process:
            actor.next_poll = time.monotonic() + POLL_S
            if actor.dead_since is not None:
                yield self._verdict(worker, Cause.NODE)
            self._ray.kill(actor.handle, no_restart=False)
            return
        if actor.dead_since is not None:
            cause = Cause.CRASH if actor.node in self._alive() else Cause.NODE
            yield self._verdict(worker, cause)
        actor.ready = True
        actor.node = node
        actor.process = process
        actor.counters = counters
        actor.restarts = _restarts(actor.handle)
        yield Ready(worker)

    def _handle_failed_start(self, worker: int, error: Any) -> Iterator[PoolEvent]:
        """Events of a poll that failed before the worker was ready."""
        actor = self._actors[worker]
        actor.next_poll = time.monotonic() + POLL_S
        if not self._will_restart(error):
            self._ray.kill(self._actors.pop(worker).handle)
            yield Gone(worker, Cause.START, start_error(error))
            return
        num_restarts = _restarts(actor.handle)
        if num_restarts > actor.restarts:
            actor.restarts = num_restarts
            if actor.nodes <= self._alive():  # else its node may be gone
                message = _died_while_loading(self._config, error)
                yield Gone(worker, Cause.LOADING, ModelError(message))

    def _update(self, worker: int, counters: Counters) -> None:
        """Store the counters of a worker's process, unless a newer one is known.

        Answers may arrive out of order.
        """
        actor = self._actors[worker]
        if counters.tokens >= actor.counters.tokens:
            actor.counters = counters

    def _will_restart(self, error: Any) -> bool:
        """True if Ray will restart the process.

        Ray calls a preempted actor dead until its restart.
        """
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.ActorUnavailableError):
            return True
        return isinstance(error, exceptions.RayActorError) and error.preempted

    def _handle_death(self, worker: int, error: Any) -> None:
        """Handle a dead process: drop its tasks, keep its counters, poll its successor."""
        for ref, (owner, _) in list(self._in_flight.items()):
            if owner == worker:
                del self._in_flight[ref]
        actor = self._actors[worker]
        actor.ready = False
        actor.dead_since = time.monotonic()
        actor.restarts += 1
        self._released = sum_of([self._released, actor.counters])
        actor.counters = Counters()  # the next process counts from 0
        if error.preempted:
            actor.node = ""  # counts as a dead node
        self._send_poll(actor)

    def _verdicts(self) -> Iterator[PoolEvent]:
        """Events for dead processes whose cause is known by now.

        After ``VERDICT_S`` Ray would know of a dead node, so the cause is then a crash.
        """
        actors = list(self._actors.items())
        dead = [(worker, actor) for worker, actor in actors if actor.dead_since is not None]
        alive = self._alive() if dead else frozenset()
        for worker, actor in dead:
            assert actor.dead_since is not None
            if actor.node not in alive:
                yield self._verdict(worker, Cause.NODE)
            elif _ran_out_of_memory(actor.process):
                yield self._verdict(worker, Cause.MEMORY)
            elif time.monotonic() - actor.dead_since > VERDICT_S:
                yield self._verdict(worker, Cause.CRASH)

    def _verdict(self, worker: int, cause: Cause) -> Gone:
        self._actors[worker].dead_since = None
        return Gone(worker, cause)

    def _alive(self) -> frozenset[str]:
        """Ids of the nodes that are alive."""
        return frozenset(node["NodeID"] for node in self._ray.nodes() if node["Alive"])

    def _find_leaving(self) -> Iterator[PoolEvent]:
        """Events for workers on nodes that will stop soon."""
        if time.monotonic() < self._next_notices:
            return
        self._next_notices = time.monotonic() + UNITS_S
        leaving = _leaving_nodes() if address(self._config) is not None else frozenset()
        for worker, actor in self._actors.items():
            if actor.ready and actor.node in leaving:
                yield Leaving(worker)

    def replace(self, worker: int) -> None:
        self._ray.kill(self._actors[worker].handle, no_restart=False)
        self._handle_death(worker, self._ray.exceptions.RayActorError())
        self._actors[worker].dead_since = None  # the cause is known

    def release(self, worker: int) -> None:
        actor = self._actors.pop(worker)
        self._released = sum_of([self._released, actor.counters])
        self._close([actor])

    def counters(self) -> Counters:
        """Counters as of the last polls; sends new ones, at most one in flight per worker."""
        now = time.monotonic()
        for actor in self._actors.values():
            if actor.poll is None and now >= actor.next_poll:
                self._send_poll(actor)
        current = [actor.counters for actor in self._actors.values()]
        return sum_of([self._released, *current])

    def num_tokens(self, worker: int) -> int:
        return self._actors[worker].counters.tokens

    def lack(self) -> str:
        num_waiting = sum(not actor.ready for actor in self._actors.values())
        return lack(num_waiting, self._config, self._task.device, self.num_loading())

    def num_loading(self) -> int:
        waiting = [actor for actor in self._actors.values() if not actor.ready]
        return sum(_has_place(actor.handle) for actor in waiting)

    def close(self) -> None:
        self._close(list(self._actors.values()))
        self._actors.clear()

    def _close(self, actors: Sequence[_Actor]) -> None:
        """End ``actors``.

        Tokenizers of a killed worker end too, but leak their semaphores: they are ended first.
        """
        if self._config.tokenizer_workers:
            refs: list[Any] = []
            for actor in actors:
                if actor.ready:
                    close = actor.handle.close.options(concurrency_group="poll")
                    refs.append(close.remote())
            if refs:
                self._ray.wait(refs, num_returns=len(refs), timeout=CLOSE_S)
        for actor in actors:
            self._ray.kill(actor.handle)


def _died_while_loading(config: RunConfig, error: Any) -> str:
    return (
        f"a worker died while it loaded {config.model}: is there too little memory for so many? "
        f"Give fewer --workers ({reasons.reason(error)})"
    )


def _ran_out_of_memory(process: str) -> bool:
    """True if Ray's memory monitor killed the worker process with this id.

    The only public source of this is Ray's dashboard.
    """
    from ray import WorkerID
    from ray._private.state import state
    from ray.core.generated import common_pb2, gcs_pb2

    worker_id = WorkerID(bytes.fromhex(process))
    data = state._connect_and_get_accessor().get_worker_info(worker_id)
    if data is None:
        return False
    found = gcs_pb2.WorkerTableData.FromString(data)
    return bool(found.exit_type == common_pb2.WorkerExitType.Value("NODE_OUT_OF_MEMORY"))


def _has_place(actor: Any) -> bool:
    """True if ``actor`` has resources, and so a process; Ray's pid of a waiting actor is 0.

    The public state API (``ray.util.state``) needs Ray's dashboard, which may not run.
    """
    from ray._private.state import state

    entry = state.actor_table(actor._actor_id.hex())
    return bool(entry.get("Pid"))


def _restarts(actor: Any) -> int:
    """Number of times that Ray has restarted the process of ``actor``; private as above."""
    from ray._private.state import state

    entry = state.actor_table(actor._actor_id.hex())
    return int(entry.get("NumRestarts", 0))


def _leaving_nodes() -> frozenset[str]:
    """Ids of nodes that are being drained, for example on a notice of preemption; private too."""
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())
