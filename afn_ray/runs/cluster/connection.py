"""A connection to a local Ray or a cluster: its resources, a worker's needs, and its health."""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from afn_ray import model
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, Interrupted, ModelError
from afn_ray.runs import reasons
from afn_ray.runs.address import of_cluster
from afn_ray.runs.cluster import access, placement
from afn_ray.store import uris
from afn_ray.text import count

PROBE_S = 60.0
"""Longest wait for a cluster to run the one-CPU task of ``probe``, in seconds."""
GCS_LOST_S = 20.0
"""Time without an answer after which Ray's head counts as lost, in seconds.

Ray itself waits a minute.
"""
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Large temporary arrays reuse the heap instead of fresh pages: 1.1 times faster.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""Environment of worker processes."""
OBJECT_STORE_BYTES = 128 << 20
"""Object store of a local Ray, in bytes; it holds only shards and commits."""


_log = logging.getLogger(__name__)


def address(config: RunConfig) -> str | None:
    """Address of an existing cluster; None: a local Ray is to be started."""
    return of_cluster(config.address)


def check_own(config: RunConfig) -> None:
    """Raise ``ConfigError`` where ``joined`` would refuse a local Ray; starts none."""
    _check_reachable(config)
    access.choose_token(own=True)
    access.check(None, config.allow_open_cluster)


def _check_reachable(config: RunConfig) -> None:
    """Raise ``ConfigError`` for a ``memory://`` store or corpus, which workers cannot reach."""
    if any(map(uris.is_process_memory, (config.store, *config.corpus))):
        raise ConfigError(
            "memory:// lives in one process; use --executor inline, or a store that workers can "
            "reach"
        )


@contextmanager
def joined(config: RunConfig) -> Iterator[None]:
    """Context with a connection to Ray: this process's own, a cluster's, or a local Ray's.

    Raises ``ConfigError`` where there is none, and for one on which anyone could run code.
    """
    _check_reachable(config)
    where = address(config)
    access.choose_token(own=where is None)
    import ray

    if ray.is_initialized():
        access.check(ray.get_runtime_context().gcs_address, config.allow_open_cluster)
        yield
        return
    access.check(where, config.allow_open_cluster)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if where is None:
            access.start_local(num_cpus=_local_cpus(config), object_store_memory=OBJECT_STORE_BYTES)
        else:
            ray.init(address=where, log_to_driver=False, logging_level="ERROR")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # in place of Ray's own
    except SystemExit as stopped:  # by Ray's handler, which was active for a moment
        raise KeyboardInterrupt from stopped
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        if where is not None and access.refuses_us(where):
            raise ConfigError(access.NOT_OURS.format(where)) from error
        which = f"the cluster at {where}" if where else "a local Ray"
        raise ConfigError(
            f"{which} cannot be reached: {reasons.reason(error)}; 'afn doctor' tells more"
        ) from error
    over = threading.Event()
    threading.Thread(target=_watch_gcs, args=(over,), name="afn-gcs", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        ray.shutdown()


def _watch_gcs(over: threading.Event) -> None:
    """End this process, resumable, once Ray's head has not answered for ``GCS_LOST_S``.

    Ray itself would end it later, at any point of its work and with an exit code that has no
    meaning.
    """
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    since = time.monotonic()
    while not over.wait(GCS_LOST_S / 10):
        try:
            socket.create_connection((host.strip("[]"), int(port)), GCS_LOST_S / 4).close()
            since = time.monotonic()
        except OSError as error:
            if time.monotonic() - since > GCS_LOST_S:
                _log.error(
                    "Ray's head at %s:%s has not answered for %.0f s (%s); the same command "
                    "resumes",
                    host,
                    port,
                    time.monotonic() - since,
                    error,
                )
                sys.stderr.flush()
                os._exit(_lost_exit_code)


_lost_exit_code = Interrupted.exit_code


def exit_when_lost_with(code: int) -> None:
    """Set the exit code of this process for a Ray that has lost its head; by default 75."""
    global _lost_exit_code
    _lost_exit_code = code


def _local_cpus(config: RunConfig) -> int:
    """Number of CPUs of a local Ray.

    It is the number that Ray finds, at most the number that this process may use, and at least the
    number that the configured workers need.
    """
    # the function that ray.init() uses to count; no public one does so before a start
    from ray._private.utils import get_num_cpus

    found = min(int(get_num_cpus(override_docker_cpu_warning=True)), model.count_devices("cpu"))
    return max(1, found, (config.workers or 1) * (1 + (config.tokenizer_workers or 0)))


def needs(config: RunConfig, device: str) -> dict[str, Any]:
    """Resources and environment of one worker, as options for Ray."""
    return {
        "num_cpus": 1 + (config.tokenizer_workers or 0),
        "num_gpus": placement.gpu_share(config) if device == "cuda" else 0,
        "runtime_env": {"env_vars": WORKER_ENV},
    }


def lack(num_waiting: int, config: RunConfig, device: str, num_loading: int = 0) -> str:
    """Resources that waiting workers ask for, and those that the cluster has, for people.

    ``num_loading`` of the ``num_waiting`` workers have their resources already.
    """
    import ray

    one = needs(config, device)
    asks = f"{one['num_cpus']} CPU" + (f" and {one['num_gpus']:g} GPU" if one["num_gpus"] else "")
    has = ray.cluster_resources()
    free = ray.available_resources()
    amounts = ", ".join(f"{has.get(k, 0):g} {k} ({free.get(k, 0):g} free)" for k in ("CPU", "GPU"))
    nodes = count(sum(node["Alive"] for node in ray.nodes()), "node")
    if 0 < num_waiting <= num_loading:
        return "each logs that it is ready with --log-format json"
    asked = count(num_waiting - num_loading, "more worker")
    return f"asked for {asked} of {asks} each; the cluster has {amounts} on {nodes}"


def cause_of(error: BaseException) -> BaseException:
    """The error that a call on Ray raised, without Ray's wrappers; or Ray's own error.

    Ray adds a wrapper for each call that waited for the failed one.
    """
    inner = getattr(error, "cause", None)
    while isinstance(inner, BaseException):
        error = inner
        inner = getattr(error, "cause", None)
    return error


def start_error(error: BaseException) -> BaseException:
    """Reason why a worker could not start: its own error, or a
    ``ModelError`` with Ray's message.
    """
    import ray

    cause = cause_of(error)
    if isinstance(cause, ray.exceptions.RayError):
        return ModelError(f"a worker could not start: {str(cause).strip()[-2000:]}")
    return cause


def probe(address: str | None) -> list[str]:
    """Join the Ray at ``address`` or start a local one, run a task on it, and describe it.

    The first line describes it and the workers of a run with the default options. The others are
    notices about nodes. Raises ``ConfigError`` when there is none, or when its nodes cannot run a
    task of afn-ray.
    """
    config = RunConfig(corpus=("-",), model="-", store="/", address=address)
    with joined(config):
        import ray

        try:
            task = ray.remote(num_cpus=1)(_python_version)
            python = ray.get(task.remote(), timeout=PROBE_S)
        except ray.exceptions.RayError as error:
            why = reasons.reason(error)
            raise ConfigError(
                f"Ray answers, but a task failed within {PROBE_S:g} s: {why}"
            ) from error
        has = ray.cluster_resources()
        device = "cuda" if has.get("GPU") else "cpu"
        placed = placement.place(config, placement.nodes(), device)
        return [
            f"Ray {ray.__version__} ran a task of afn-ray on Python {python}; it has "
            f"{has.get('CPU', 0):g} CPU and {has.get('GPU', 0):g} GPU on "
            f"{count(len(ray.nodes()), 'node')}; a run has "
            f"{placement.describe(config, placed, device)}",
            *placed.notices,
        ]


def _python_version() -> str:
    """Python version of the node that runs this.

    Ray pickles the function by name, so a node that answers has afn-ray.
    """
    return platform.python_version()
