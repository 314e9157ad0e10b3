"""The only door to Ray: workers, dispatch, retry, progress; and the same loop in this process, without Ray."""

from __future__ import annotations

import os
import platform
import secrets
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from afn_ray import model, precision, storage
from afn_ray.config import RunConfig
from afn_ray.errors import AfnError, ConfigError, Interrupted, ModelError, ShardError
from afn_ray.manifest import Commit
from afn_ray.pipeline import Processor, Progress, Task, sweep_scratch
from afn_ray.schema import Shard

ATTEMPTS = 2
"""Tries that a shard gets before it is given up."""
START_DEADLINE_S = 300.0
"""The run is given up when for so long workers died while they loaded the model, and none got ready."""
IN_FLIGHT = 2
"""Shards handed to one worker at a time: the one it works on and the next."""
POLL_S = 0.5
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


@dataclass(slots=True)
class State:
    """How far a run is; counts are of this call, not of what the store had before."""

    num_shards: int
    num_workers: int = 0
    num_ready: int = 0  # workers that have loaded their model
    commits: dict[str, Commit] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # shard id -> why it was given up
    retries: int = 0
    live: Progress = field(default_factory=Progress)
    seconds: float = 0.0  # since the first worker was ready


OnState = Callable[[State], None]


def process_shards(config: RunConfig, task: Task, shards: Sequence[Shard], on_state: OnState) -> State:
    """Process ``shards``; returns what was committed and what was given up.

    A shard's exception charges that shard, and the second one gives it up; the others go on. Raises at once
    for what concerns all of them: a model that does not load, a full disk, a corpus that changed.
    """
    try:
        if config.executor == "inline":
            return _process_inline(task, shards, on_state)
        with _ray(config):
            return _Dispatcher(task, config, shards, on_state).run()
    finally:
        sweep_scratch(config)  # workers are killed, not asked


def find_device(config: RunConfig) -> str:
    """Device of the workers, "cuda" or "cpu": what the cluster has for a remote Ray, else what is here."""
    if config.executor == "inline" or _address(config) is None:
        return model.choose_device(config.device)
    if config.device != "auto":
        return config.device
    with _ray(config):
        return "cuda" if _num_units("cuda") else "cpu"


def local_device(device: str) -> str:
    """The device on which to try in this process what workers will do on ``device``."""
    return device if device == "cpu" else model.choose_device("auto")


def count_workers(config: RunConfig, device: str) -> int:
    """Workers that a run would start, from the config or from what this machine or the cluster has."""
    if config.executor == "inline":
        return 1
    if config.workers is not None:
        return config.workers
    if _address(config) is None:
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


def decide_precision(config: RunConfig, task: Task, texts: Sequence[str]) -> precision.Precision:
    """``precision.decide`` where the workers' device is: here for a CPU of this machine, else on a worker's place."""
    if config.executor == "inline" or (_address(config) is None and task.device == "cpu"):
        return precision.decide(task, texts)
    with _ray(config):
        import ray

        gpus = 1 if task.device == "cuda" else 0
        place = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=1, runtime_env={"env_vars": WORKER_ENV})
        try:
            decided: precision.Precision = ray.get(place(precision.decide).remote(task, texts))
        except ray.exceptions.RayError as error:
            raise _original(error) from None
        return decided


def _process_inline(task: Task, shards: Sequence[Shard], on_state: OnState) -> State:
    state = State(len(shards), 1, 1)
    processor = Processor(task)
    began = time.monotonic()
    try:
        _process_all(processor, shards, state, began, on_state)
    finally:
        processor.close()
    return state


def _process_all(processor: Processor, shards: Sequence[Shard], state: State, began: float, on_state: OnState) -> None:
    for shard in shards:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                state.commits[shard.id] = processor.process(shard)
                break
            except (ConfigError, Interrupted):
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this shard's alone
                if attempt == ATTEMPTS:
                    state.failures[shard.id] = _reason(error)
                else:
                    state.retries += 1
        state.live, state.seconds = processor.progress, time.monotonic() - began
        on_state(state)


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[-1] if text else 'no message'}{where}"


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
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        where = f"the cluster at {address}" if address else "a local Ray"
        raise ConfigError(f"{where} cannot be reached: {_reason(error)}; 'afn doctor' tells more") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own aborts with a dump of its stack
    try:
        yield
    finally:
        ray.shutdown()


def _num_units(device: str) -> int:
    """GPUs, or CPUs, of the Ray that this process has joined."""
    import ray

    return int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 0))


class _Worker:
    """What an actor runs: one processor, and a look at its progress while it works."""

    def __init__(self, task: Task) -> None:
        self._processor = Processor(task)

    def process(self, shard: Shard) -> Commit:
        return self._processor.process(shard)

    def progress(self) -> Progress:
        return self._processor.progress

    def close(self) -> None:
        self._processor.close()


class _Dispatcher:
    """Hands shards to whichever worker is free; every retry is decided here and none by Ray."""

    def __init__(self, task: Task, config: RunConfig, shards: Sequence[Shard], on_state: OnState) -> None:
        import ray

        self._ray = ray
        self._waiting = deque(shards)
        self._charges: dict[str, int] = {}
        self._last_ready = time.monotonic()  # when a worker last had its model, or this began
        self._model = config.model
        self._closes = config.tokenizer_workers > 0
        self._on_state = on_state
        gpu = task.device == "cuda"
        units = _num_units(task.device)
        if not units:
            raise ConfigError(
                f"a worker needs one {'GPU' if gpu else 'CPU'}, and this Ray has none; it has {ray.cluster_resources()}"
            )
        needs = 1 + config.tokenizer_workers
        if not any(n["Resources"].get("CPU", 0) >= needs for n in ray.nodes() if n["Alive"]):
            raise ConfigError(
                f"a worker needs {needs} CPUs, one and its --tokenizer-workers, and no node of this Ray has so many"
            )
        wanted = config.workers or _units_for_workers(config, units, task.device)
        self._state = State(len(shards), min(wanted, len(shards)))
        actor = ray.remote(
            num_cpus=1 + config.tokenizer_workers, num_gpus=1 if gpu else 0, max_restarts=-1, max_task_retries=0,
            concurrency_groups={"look": 1}, runtime_env={"env_vars": WORKER_ENV},
        )(_Worker)  # fmt: skip
        self._actors = [actor.remote(task) for _ in range(self._state.num_workers)]
        self._in_flight: dict[Any, tuple[Any, Shard]] = {}  # task -> actor, shard; oldest first
        self._starting = {self._look(a): a for a in self._actors}
        self._ready: list[Any] = []
        self._looks: dict[Any, Any] = {}  # question -> actor
        self._progress: dict[Any, Progress] = {}  # by actor

    def _look(self, actor: Any) -> Any:
        return actor.progress.options(concurrency_group="look").remote()

    def run(self) -> State:
        began = 0.0
        try:
            while self._waiting or self._in_flight:
                self._feed()
                for ref in self._wait([*self._in_flight, *self._starting], POLL_S):
                    if ref in self._starting:
                        began = began or time.monotonic()
                        self._started(ref)
                    elif ref in self._in_flight:  # not if its worker died with the one before it
                        self._finished(ref)
                self._state.num_ready = len(self._ready)
                if began:
                    self._look_at_all()
                    self._state.seconds = time.monotonic() - began
                self._on_state(self._state)
        finally:
            if self._closes:  # a killed worker's tokenizers end too, but leave their semaphores behind
                self._wait_for_all([a.close.options(concurrency_group="look").remote() for a in self._ready], CLOSE_S)
            for actor in self._actors:
                self._ray.kill(actor)
        return self._state

    def _wait(self, refs: list[Any], timeout_s: float) -> list[Any]:
        """All of ``refs`` that are done, after the first is or the time is over."""
        if not refs:
            return []
        # One call would give one ref, in no order: those that end often would starve the others.
        self._ray.wait(refs, num_returns=1, timeout=timeout_s)
        done: list[Any] = self._ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        return done

    def _wait_for_all(self, refs: list[Any], timeout_s: float) -> None:
        if refs:
            self._ray.wait(refs, num_returns=len(refs), timeout=timeout_s)

    def _look_at_all(self) -> None:
        """Progress inside the shards under way, one question to each worker at a time."""
        for ref in self._wait(list(self._looks), 0):
            self._looked(self._looks.pop(ref), ref)
        asked = list(self._looks.values())
        for actor in self._ready:
            if not any(a is actor for a in asked):
                self._looks[self._look(actor)] = actor
        self._state.live = _total(self._progress.values())

    def _restart(self, actor: Any) -> None:
        """Wait for a worker's new process; what was handed to the old one goes back."""
        for other in [r for r, (a, _) in self._in_flight.items() if a is actor]:
            self._waiting.appendleft(self._in_flight.pop(other)[1])
        if any(a is actor for a in self._ready):
            self._ready = [a for a in self._ready if a is not actor]
            self._starting[self._look(actor)] = actor

    def _feed(self) -> None:
        for actor in self._ready:
            busy = sum(a is actor for a, _ in self._in_flight.values())
            while self._waiting and busy < IN_FLIGHT:
                shard = self._waiting.popleft()
                self._in_flight[actor.process.remote(shard)] = (actor, shard)
                busy += 1

    def _started(self, ref: Any) -> None:
        actor = self._starting.pop(ref)
        try:
            self._ray.get(ref)
        except self._ray.exceptions.ActorUnavailableError as error:  # it died, and is started again
            if not self._ready and time.monotonic() - self._last_ready > START_DEADLINE_S:
                raise ModelError(
                    f"no worker could load {self._model} in {START_DEADLINE_S:g} s: each died as it did; is there too "
                    f"little memory for {len(self._actors)} of them? Give fewer --workers ({_reason(error)})"
                ) from None
            time.sleep(POLL_S)
            self._starting[self._look(actor)] = actor
            return
        except self._ray.exceptions.RayError as error:
            raise _original(error) from None
        self._ready.append(actor)
        self._last_ready = time.monotonic()

    def _looked(self, actor: Any, ref: Any) -> None:
        try:
            progress: Progress = self._ray.get(ref)
        except self._ray.exceptions.RayError:
            return  # a look is no work; the task in flight says what happened
        last = self._progress.get(actor)
        if last is None or progress.tokens >= last.tokens:
            self._progress[actor] = progress

    def _finished(self, ref: Any) -> None:
        actor, shard = self._in_flight.pop(ref)
        try:
            self._state.commits[shard.id] = self._ray.get(ref)
            return
        except self._ray.exceptions.RayActorError as error:
            # The worker died: the shard it was working on is charged, the one behind it only goes back.
            failure: BaseException = ShardError(f"its worker died: {_reason(error)}")
            self._restart(actor)
        except self._ray.exceptions.RayTaskError as error:
            failure = _original(error)
            if isinstance(failure, ConfigError | Interrupted):
                raise failure from None
            if not isinstance(failure, ShardError):  # its process or device may be broken: the next try gets a new one
                self._ray.kill(actor, no_restart=False)
                self._restart(actor)
        self._charges[shard.id] = self._charges.get(shard.id, 0) + 1
        if self._charges[shard.id] >= ATTEMPTS:
            self._state.failures[shard.id] = _reason(failure)
        else:
            self._state.retries += 1
            self._waiting.append(shard)


def _original(error: Any) -> BaseException:
    """Our own error out of Ray's wrapping, or what Ray says as a ``ModelError``: no worker could start."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException) and not isinstance(cause, AfnError):
        return cause
    while cause is not None and not isinstance(cause, AfnError):
        cause = getattr(cause, "cause", None)
    return cause if cause is not None else ModelError(f"a worker could not start: {str(error).strip()[-2000:]}")


def _total(parts: Iterable[Progress]) -> Progress:
    parts = list(parts)
    sums = {f.name: sum(getattr(p, f.name) for p in parts) for f in fields(Progress) if f.name != "why_padded"}
    return Progress(**sums, why_padded=next((p.why_padded for p in parts if p.why_padded), ""))


def probe(address: str | None) -> str:
    """Join the Ray at ``address`` or start a local one, run a task on it, and say what it has.

    Raises ``ConfigError`` when there is none, or when its nodes cannot run a task of ours.
    """
    with _ray(RunConfig(corpus=("-",), model="-", store="/", address=address)):
        import ray

        try:
            python = ray.get(ray.remote(num_cpus=1)(_python_version).remote(), timeout=PROBE_S)
        except ray.exceptions.RayError as error:
            raise ConfigError(f"Ray answers, but a task failed within {PROBE_S:g} s: {_reason(error)}") from error
        has = ray.cluster_resources()
        return (
            f"Ray {ray.__version__} ran a task of afn-ray on Python {python}; it has {has.get('CPU', 0):g} CPUs and "
            f"{has.get('GPU', 0):g} GPUs on {len(ray.nodes())} node(s)"
        )


def _python_version() -> str:
    """Of the node that runs this; a function of ours is pickled by name, so the node has afn-ray if it answers."""
    return platform.python_version()
