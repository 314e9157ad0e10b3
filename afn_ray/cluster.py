"""The only door to Ray: a connection, workers as actors, tasks; and the choice to do without it."""

from __future__ import annotations

import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from afn_ray import dispatch, model, precision, storage
from afn_ray.config import RunConfig
from afn_ray.dispatch import (
    Cause,
    Dispatcher,
    Done,
    Event,
    Failed,
    Gone,
    Leaving,
    OnState,
    Patience,
    Ready,
    Silent,
    State,
)
from afn_ray.errors import AfnError, ConfigError, Interrupted, ModelError, count
from afn_ray.inline import InlinePool
from afn_ray.manifest import Commit
from afn_ray.pipeline import Processor, Progress, Task, sweep_scratch
from afn_ray.reduce import FAN_IN, Inline, Tasks, call
from afn_ray.schema import Shard

INLINE_BYTES = 1 << 20
"""A run with less to read than this is done in this process: a local Ray takes 5 seconds and 0.5 GB to start."""
POLL_S = 0.5
VERDICT_S = 30.0
"""How long it may take until Ray knows that the node of a dead worker is dead too."""
UNITS_S = 5.0
"""How old a look at the cluster's resources, and at its nodes that leave, may be."""
CLOSE_S = 2.0
"""How long workers may take to end their tokenizers before they are killed."""
PROBE_S = 60.0
"""How long a cluster may take to give one CPU to one task when it is only tried."""
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Large temporaries come from a heap that is kept instead of fresh pages each time: 1.1 times faster.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
OBJECT_STORE_BYTES = 128 << 20
"""Of a local Ray: only shards and commits travel through it."""


def process_shards(config: RunConfig, task: Task, shards: Sequence[Shard], on_state: OnState) -> State:
    """Process ``shards``; returns what was committed and what was quarantined, by the rules of ``Dispatcher``.

    Raises at once for what concerns all of them: a model that does not load, a full disk, no capacity.
    """
    try:
        if runs_inline(config, shards):
            return _dispatch(InlinePool(task), config, shards, on_state)
        with _ray(config):
            return _dispatch(RayPool(task, config), config, shards, on_state)
    finally:
        sweep_scratch(config)  # workers are killed, not asked


def _dispatch(pool: dispatch.Pool, config: RunConfig, shards: Sequence[Shard], on_state: OnState) -> State:
    return Dispatcher(
        pool, shards, on_state, wait_s=config.wait_s, deadline_s=config.shard_deadline_s,
        allow_quarantined=config.allow_quarantined,
    ).run()  # fmt: skip


def runs_inline(config: RunConfig, shards: Sequence[Shard]) -> bool:
    """Whether ``shards`` are processed in this process: when asked for, or when they are not worth a local Ray."""
    if config.executor != "auto":
        return config.executor == "inline"
    if any(map(storage.is_process_memory, (config.store, *config.corpus))):
        return True
    wants_ray = _address(config) is not None or config.workers is not None or config.tokenizer_workers > 0
    started = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return not (wants_ray or started) and sum(s.num_bytes for s in shards) < INLINE_BYTES


def find_device(config: RunConfig) -> str:
    """Device of the workers, "cuda" or "cpu": what the cluster has for a remote Ray, else what is here."""
    if _is_here(config):
        return model.choose_device(config.device)
    if config.device != "auto":
        return config.device
    with _ray(config):
        return "cuda" if _num_units("cuda") else "cpu"


def _is_here(config: RunConfig) -> bool:
    """Whether workers have what this machine has: they are this process, or a local Ray's."""
    return config.executor == "inline" or _address(config) is None


def local_device(device: str) -> str:
    """The device on which to try in this process what workers will do on ``device``."""
    return device if device == "cpu" else model.choose_device("auto")


def count_workers(config: RunConfig, device: str) -> int:
    """Workers that a run would start, from the config or from what this machine or the cluster has."""
    if config.executor == "inline":
        return 1
    if config.workers is not None:
        return config.workers
    if _is_here(config):
        return _units_for_workers(config, model.count_devices(device), device)
    with _ray(config):
        return _units_for_workers(config, _num_units(device), device)


def _units_for_workers(config: RunConfig, units: int, device: str) -> int:
    """Workers that ``units`` GPUs or CPUs are enough for; a worker's tokenizers take CPUs as well."""
    if device == "cpu":
        return max(1, units // (1 + config.tokenizer_workers))
    if not config.tokenizer_workers:
        return units
    cpus = model.count_devices("cpu") if _address(config) is None else _num_units("cpu")
    return max(1, min(units, cpus // (1 + config.tokenizer_workers)))


def decide_precision(
    config: RunConfig, task: Task, texts: Sequence[str], on_notice: Callable[[str], None]
) -> precision.Precision:
    """``precision.decide`` where the workers' device is: here for a CPU of this machine, else on a worker's place."""
    if _is_here(config) and (config.executor == "inline" or task.device == "cpu"):
        return precision.decide(task, texts)
    with _ray(config):
        import ray

        place = ray.remote(max_retries=3, **_needs(config, task.device))
        ref = place(precision.decide).remote(task, texts)
        patience = Patience(config.wait_s, lambda: _lack(1, config, task.device))
        while not ray.wait([ref], timeout=POLL_S)[0]:
            if (notice := patience.check()) is not None:
                on_notice(notice)
        try:
            decided: precision.Precision = ray.get(ref)
        except ray.exceptions.RayError as error:
            raise _original(error) from None
        return decided


# --- Ray -------------------------------------------------------------------------------------------------


def _address(config: RunConfig) -> str | None:
    address = config.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


@contextmanager
def _ray(config: RunConfig) -> Iterator[None]:
    """A connection to Ray: the one this process has, the cluster at the address, or a local one of our own."""
    if any(map(storage.is_process_memory, (config.store, *config.corpus))):
        raise ConfigError("memory:// lives in one process; use --executor inline, or a store that workers can reach")
    address = _address(config)
    if "ray" not in sys.modules:  # Ray reads these once, as it is imported; who imported it before us has chosen
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # an open Ray runs code for whoever reaches it
        if address is None:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        cpus = max(model.count_devices("cpu"), (config.workers or 1) * (1 + config.tokenizer_workers))
        options |= {"address": "local", "include_dashboard": False, "num_cpus": cpus,
                    "object_store_memory": OBJECT_STORE_BYTES}  # fmt: skip
    else:
        options["address"] = address
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # in place of Ray's own
    except SystemExit as stopped:  # which was in force for a moment
        raise KeyboardInterrupt from stopped
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        where = f"the cluster at {address}" if address else "a local Ray"
        raise ConfigError(f"{where} cannot be reached: {dispatch.reason(error)}; 'afn doctor' tells more") from error
    try:
        yield
    finally:
        ray.shutdown()


def _num_units(device: str) -> int:
    """GPUs, or CPUs, of the Ray that this process has joined."""
    import ray

    return int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 0))


def _needs(config: RunConfig, device: str) -> dict[str, Any]:
    """What one worker asks of Ray."""
    return {
        "num_cpus": 1 + config.tokenizer_workers,
        "num_gpus": 1 if device == "cuda" else 0,
        "runtime_env": {"env_vars": WORKER_ENV},
    }


def _lack(num_waiting: int, config: RunConfig, device: str) -> str:
    """What ``num_waiting`` workers ask for, and what the cluster has."""
    import ray

    needs = _needs(config, device)
    asks = f"{needs['num_cpus']} CPU" + (" and 1 GPU" if needs["num_gpus"] else "")
    has, free = ray.cluster_resources(), ray.available_resources()
    amounts = ", ".join(f"{has.get(k, 0):g} {k} ({free.get(k, 0):g} free)" for k in ("CPU", "GPU"))
    nodes = count(sum(node["Alive"] for node in ray.nodes()), "node")
    return f"asked for {count(num_waiting, 'more worker')} of {asks} each; the cluster has {amounts} on {nodes}"


# --- workers on Ray --------------------------------------------------------------------------------------


class _Worker:
    """What an actor runs: one processor, and a look at it while it works."""

    def __init__(self, task: Task) -> None:
        self._error: Exception | None = None
        try:
            self._processor = Processor(task)
        except Exception as error:  # noqa: BLE001 - raised where it arrives as it is; from here Ray would send its text
            self._error = error

    def process(self, shard: Shard, halvings: int) -> Commit:
        try:
            return self._processor.process(shard, halvings)
        except AfnError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is
            raise dispatch.Told(dispatch.reason(error)) from None

    def look(self) -> tuple[Progress, str, str]:
        """Progress, and the ids of this node and this process."""
        import ray

        if self._error is not None:
            raise self._error
        context = ray.get_runtime_context()
        return self._processor.progress, context.get_node_id(), context.get_worker_id()

    def close(self) -> None:
        self._processor.close()


@dataclass(slots=True)
class _Actor:
    """An actor and what is known of the process that it has now."""

    handle: Any
    ready: bool = False
    look: Any = None  # question under way
    look_again: float = 0.0  # when to ask, while there is none
    node: str = ""
    process: str = ""  # the one it has, or while it is not ready the one it had
    restarts: int = 0  # that are accounted for
    progress: Progress = field(default_factory=Progress)
    nodes: frozenset[str] = frozenset()  # alive when it was looked at first
    dead_since: float | None = None  # while its verdict is open


class RayPool:
    """Restartable actors, all asked for at once: those that wait for a place are what an autoscaler sees.

    Ray retries nothing (``max_task_retries=0``) but restarts processes. Of a dead process it does not say why it died;
    that is found out here: its node is gone as well, or had no memory left, or neither.
    """

    can_replace = True

    def __init__(self, task: Task, config: RunConfig) -> None:
        import ray

        self._ray, self._task, self._config = ray, task, config
        self._check_local()
        self._class = ray.remote(
            max_restarts=-1, max_task_retries=0, max_concurrency=dispatch.SLOTS, concurrency_groups={"look": 1},
            **_needs(config, task.device),
        )(_Worker)  # fmt: skip
        self._actors: dict[int, _Actor] = {}
        self._last = -1
        self._in_flight: dict[Any, tuple[int, str]] = {}  # task -> worker, shard
        self._released = Progress()
        self._num_wanted = 0
        self._next_count = self._next_notices = 0.0

    def _check_local(self) -> None:
        """A local Ray never grows: what it lacks it lacks for good."""
        if _address(self._config) is not None:
            return
        if not _num_units(self._task.device):
            name, has = "GPU" if self._task.device == "cuda" else "CPU", self._ray.cluster_resources()
            raise ConfigError(f"a worker needs one {name}, and this Ray has none; it has {has}")
        needs = 1 + self._config.tokenizer_workers
        if not any(n["Resources"].get("CPU", 0) >= needs for n in self._ray.nodes() if n["Alive"]):
            raise ConfigError(
                f"a worker needs {needs} CPUs, one and its --tokenizer-workers, and no node of this Ray has so many"
            )

    def grow(self, num_useful: int) -> int:
        if time.monotonic() >= self._next_count:
            self._next_count = time.monotonic() + UNITS_S
            self._num_wanted = self._config.workers or max(
                1, _units_for_workers(self._config, _num_units(self._task.device), self._task.device)
            )
        while len(self._actors) < min(self._num_wanted, num_useful):
            self._last += 1
            self._actors[self._last] = actor = _Actor(self._class.remote(self._task))
            self._ask(actor)
        return len(self._actors)

    def _ask(self, actor: _Actor) -> None:
        actor.look = actor.handle.look.options(concurrency_group="look").remote()
        if not actor.ready:
            actor.nodes = self._alive()

    def hand(self, worker: int, shard: Shard, halvings: int) -> None:
        self._in_flight[self._actors[worker].handle.process.remote(shard, halvings)] = (worker, shard.id)

    def wait(self, timeout_s: float) -> list[Event]:
        end = time.monotonic() + timeout_s
        while True:
            events = [*self._verdicts(), *self._leaving()]
            looks = {a.look: n for n, a in self._actors.items() if a.look is not None}
            # A look that a ready worker answers is no event, and must not end the wait.
            waited = [*self._in_flight, *(r for r, n in looks.items() if not self._actors[n].ready)]
            left = 0.0 if events else max(0.0, min(end - time.monotonic(), POLL_S))
            if waited:
                self._ray.wait(waited, num_returns=1, timeout=left)
            else:
                time.sleep(left)
            # One call would give one ref, in no order: those that end often would starve the others.
            refs = [*self._in_flight, *looks]
            done = self._ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []
            for ref in done:
                if ref in looks:
                    events += self._looked(looks[ref], ref)
                elif ref in self._in_flight:  # not if its worker died with the one before it
                    events += self._finished(ref)
            if events or time.monotonic() >= end:
                return events

    def _finished(self, ref: Any) -> Iterator[Event]:
        worker, shard = self._in_flight.pop(ref)
        try:
            yield Done(worker, shard, self._ray.get(ref))
        except self._ray.exceptions.RayActorError as error:
            self._died(worker, error)
            yield Silent(worker)
        except self._ray.exceptions.RayTaskError as error:
            yield Failed(worker, shard, _original(error))
        except self._ray.exceptions.RayError as error:
            raise Interrupted(f"Ray failed: {dispatch.reason(error)}; the same command resumes") from error

    def _looked(self, worker: int, ref: Any) -> Iterator[Event]:
        actor = self._actors.get(worker)
        if actor is None or actor.look is not ref:  # released or replaced since
            return
        actor.look = None
        try:
            progress, node, process = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            if actor.ready:
                return  # a look is no work; the task in flight says what happened
            actor.look_again = time.monotonic() + POLL_S
            if not self._returns(error):
                self._ray.kill(self._actors.pop(worker).handle)
                yield Gone(worker, Cause.START, _original(error))
            elif (restarts := _restarts(actor.handle)) > actor.restarts:
                actor.restarts = restarts
                if actor.nodes <= self._alive():  # else its node went
                    yield Gone(worker, Cause.LOADING, ModelError(_died_loading(self._config, error)))
            return
        if progress.tokens >= actor.progress.tokens:  # a new process counts from nothing
            actor.progress = progress
        if actor.ready:
            return
        if process == actor.process:  # it lives: asked before its end, or only the way to it was cut for a moment
            actor.look_again = time.monotonic() + POLL_S
            if actor.dead_since is not None:
                yield self._verdict(worker, Cause.NODE)
            self._ray.kill(actor.handle, no_restart=False)
            return
        if actor.dead_since is not None:
            yield self._verdict(worker, Cause.CRASH if actor.node in self._alive() else Cause.NODE)
        actor.ready, actor.node, actor.process = True, node, process
        actor.restarts = _restarts(actor.handle)
        yield Ready(worker)

    def _returns(self, error: Any) -> bool:
        """Whether Ray starts the process anew; one that was preempted it calls dead until it has."""
        exceptions = self._ray.exceptions
        return isinstance(error, exceptions.ActorUnavailableError) or (
            isinstance(error, exceptions.RayActorError) and error.preempted
        )

    def _died(self, worker: int, error: Any) -> None:
        for ref in [r for r, (w, _) in self._in_flight.items() if w == worker]:
            del self._in_flight[ref]
        actor = self._actors[worker]
        actor.ready, actor.dead_since = False, time.monotonic()
        actor.restarts += 1
        if error.preempted:
            actor.node = ""  # no node of that name is alive
        self._ask(actor)

    def _verdicts(self) -> Iterator[Event]:
        """Why processes died, once it is known: at the latest when Ray would know that a node is dead."""
        dead = {n: a for n, a in self._actors.items() if a.dead_since is not None}
        alive = self._alive() if dead else frozenset()
        for worker, actor in dead.items():
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
        return frozenset(n["NodeID"] for n in self._ray.nodes() if n["Alive"])

    def _leaving(self) -> Iterator[Event]:
        if time.monotonic() < self._next_notices:
            return
        self._next_notices = time.monotonic() + UNITS_S
        leaving = _leaving_nodes() if _address(self._config) is not None else frozenset()
        for worker, actor in self._actors.items():
            if actor.ready and actor.node in leaving:
                yield Leaving(worker)

    def replace(self, worker: int) -> None:
        self._ray.kill(self._actors[worker].handle, no_restart=False)
        self._died(worker, self._ray.exceptions.RayActorError())
        self._actors[worker].dead_since = None

    def release(self, worker: int) -> None:
        actor = self._actors.pop(worker)
        self._released = dispatch.total([self._released, actor.progress])
        self._close([actor])

    def progress(self) -> Progress:
        """As of the last looks; new ones are sent, one question to each worker at a time."""
        now = time.monotonic()
        for actor in self._actors.values():
            if actor.look is None and now >= actor.look_again:
                self._ask(actor)
        return dispatch.total([self._released, *(a.progress for a in self._actors.values())])

    def num_tokens(self, worker: int) -> int:
        return self._actors[worker].progress.tokens

    def lack(self) -> str:
        return _lack(sum(not a.ready for a in self._actors.values()), self._config, self._task.device)

    def close(self) -> None:
        self._close(list(self._actors.values()))
        self._actors.clear()

    def _close(self, actors: Sequence[_Actor]) -> None:
        if self._config.tokenizer_workers:  # a killed worker's tokenizers end too, but leave their semaphores behind
            refs = [a.handle.close.options(concurrency_group="look").remote() for a in actors if a.ready]
            if refs:
                self._ray.wait(refs, num_returns=len(refs), timeout=CLOSE_S)
        for actor in actors:
            self._ray.kill(actor.handle)


def _died_loading(config: RunConfig, error: Any) -> str:
    return (
        f"a worker died while it loaded {config.model}: is there too little memory for so many? Give fewer --workers "
        f"({dispatch.reason(error)})"
    )


def _ran_out_of_memory(process: str) -> bool:
    """Whether Ray's memory monitor ended the worker process of this id; only its dashboard tells in public."""
    from ray import WorkerID
    from ray._private.state import state
    from ray.core.generated import common_pb2, gcs_pb2

    data = state._connect_and_get_accessor().get_worker_info(WorkerID(bytes.fromhex(process)))
    if data is None:
        return False
    found = gcs_pb2.WorkerTableData.FromString(data)
    return bool(found.exit_type == common_pb2.WorkerExitType.Value("NODE_OUT_OF_MEMORY"))


def _restarts(actor: Any) -> int:
    """How often Ray has started the process of ``actor`` anew."""
    from ray._private.state import state

    return int(state.actor_table(actor._actor_id.hex()).get("NumRestarts", 0))


def _leaving_nodes() -> frozenset[str]:
    """Ids of nodes that are being drained, on a notice of preemption for one."""
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


def _original(error: Any) -> BaseException:
    """Our own error out of Ray's wrapping, or what Ray says as a ``ModelError``: no worker could start."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException) and not isinstance(cause, AfnError):
        return cause
    while cause is not None and not isinstance(cause, AfnError):
        cause = getattr(cause, "cause", None)
    return cause if cause is not None else ModelError(f"a worker could not start: {str(error).strip()[-2000:]}")


def probe(address: str | None) -> str:
    """Join the Ray at ``address`` or start a local one, run a task on it, and say what it has.

    Raises ``ConfigError`` when there is none, or when its nodes cannot run a task of ours.
    """
    with _ray(RunConfig(corpus=("-",), model="-", store="/", address=address)):
        import ray

        try:
            python = ray.get(ray.remote(num_cpus=1)(_python_version).remote(), timeout=PROBE_S)
        except ray.exceptions.RayError as error:
            why = dispatch.reason(error)
            raise ConfigError(f"Ray answers, but a task failed within {PROBE_S:g} s: {why}") from error
        has = ray.cluster_resources()
        return (
            f"Ray {ray.__version__} ran a task of afn-ray on Python {python}; it has {has.get('CPU', 0):g} CPU and "
            f"{has.get('GPU', 0):g} GPU on {count(len(ray.nodes()), 'node')}"
        )


def _python_version() -> str:
    """Of the node that runs this; a function of ours is pickled by name, so the node has afn-ray if it answers."""
    return platform.python_version()


# --- tasks of the reduce ---------------------------------------------------------------------------------

MAX_PENDING = 256
"""Calls under way at a time, so that any number of shards has bounded room in the object store and the driver."""


@contextmanager
def tasks(config: RunConfig, shards: Sequence[Shard], on_notice: Callable[[str], None] = print) -> Iterator[Tasks]:
    """Who runs the calls of a reduce of ``shards``: this process where it did them or one call reads all, else Ray."""
    if len(shards) <= FAN_IN or runs_inline(config, shards):
        yield Inline()
    else:
        with _ray(config):
            yield RayTasks(config, on_notice)


class RayTasks:
    """``reduce.Tasks`` of a Ray that is joined. Calls are pure, so a lost process or result is Ray's to repeat."""

    def __init__(self, config: RunConfig, on_notice: Callable[[str], None]) -> None:
        import ray

        self._patience = Patience(config.wait_s, lambda: _lack(1, config, "cpu"))
        self._on_notice = on_notice

        # A call's error is raised where its result is asked for, not printed by each call that waited for it.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        self._ray = ray
        self._call = ray.remote(num_cpus=1, max_retries=3)(call)
        self._pending: list[Any] = []

    def submit(self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1) -> list[Any]:
        if len(self._pending) >= MAX_PENDING:
            # One reference of each call is held until then, and never its value.
            self._pending = self._wait(self._pending, MAX_PENDING // 2)
        task = self._call.options(num_returns=num_results, name=f"reduce:{function.__name__.strip('_')}")
        refs = task.remote(function, num_results, *args)
        handles = refs if num_results > 1 else [refs]
        self._pending.append(handles[0])
        return list(handles)

    def _wait(self, refs: list[Any], num_done: int) -> list[Any]:
        """Those of ``refs`` that are not done once ``num_done`` are. Raises ``Interrupted`` while there is no place."""
        while True:
            done, left = self._ray.wait(refs, num_returns=num_done, timeout=POLL_S, fetch_local=False)
            if len(done) >= num_done:
                return list(left)
            if _num_units("cpu"):
                self._patience.reset()
            elif (notice := self._patience.check()) is not None:
                self._on_notice(notice)

    def result(self, handle: Any) -> Any:
        self._wait([handle], 1)
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayError as error:
            cause: Any = error
            while getattr(cause, "cause", None) is not None:  # whoever waited for a call that failed wraps it again
                cause = cause.cause
            if isinstance(cause, self._ray.exceptions.RayError):
                raise Interrupted(
                    f"the reduce lost a process or a result on Ray, again when repeated: {dispatch.reason(cause)}; "
                    "the shards are committed, and the same command goes on from there"
                ) from error
            raise cause from None
