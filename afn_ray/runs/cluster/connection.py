"""A connection to Ray, local or a cluster's: what it has, what a worker asks of it, and whether it
works.
"""

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
from afn_ray.runs import dispatch
from afn_ray.runs.address import of_cluster
from afn_ray.runs.cluster import access
from afn_ray.store import storage
from afn_ray.text import count

PROBE_S = 60.0
"""How long a cluster may take to give one CPU to one task when it is only tried."""
lost_exit_code = Interrupted.exit_code
"""Of a process whose Ray has lost its head; a command whose codes mean something else sets its
own.
"""
GCS_LOST_S = 20.0
"""Ray itself waits for a minute for a head that is gone."""
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Large temporaries come from a heap that is kept instead of fresh pages each time: 1.1 times
    # faster.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
OBJECT_STORE_BYTES = 128 << 20
"""Of a local Ray: only shards and commits travel through it."""


_log = logging.getLogger(__name__)


def address(config: RunConfig) -> str | None:
    """Where a cluster is that was started by others; None where a Ray of our own is to be."""
    return of_cluster(config.address)


def check_own(config: RunConfig) -> None:
    """Raise ``ConfigError`` where a Ray of our own would be refused by ``joined``; starts none."""
    _check_reachable(config)
    access.choose_token(own=True)
    access.check(None, config.allow_open_cluster)


def _check_reachable(config: RunConfig) -> None:
    if any(map(storage.is_process_memory, (config.store, *config.corpus))):
        raise ConfigError(
            "memory:// lives in one process; use --executor inline, or a store that workers can reach"
        )


@contextmanager
def joined(config: RunConfig) -> Iterator[None]:
    """A connection to Ray: the one this process has, the cluster at the address, or a local one of
    our own.

    Raises ``ConfigError`` where there is none, and where whoever reaches it could run code on it.
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
    except SystemExit as stopped:  # which was in force for a moment
        raise KeyboardInterrupt from stopped
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        if where is not None and access.refuses_us(where):
            raise ConfigError(access.NOT_OURS.format(where)) from error
        which = f"the cluster at {where}" if where else "a local Ray"
        raise ConfigError(
            f"{which} cannot be reached: {dispatch.reason(error)}; 'afn doctor' tells more"
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

    Ray ends it a while later in any case, in the midst of whatever it does and with a code that
    says nothing.
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
                    "Ray's head at %s:%s has not answered for %.0f s (%s); the same command resumes",
                    host,
                    port,
                    time.monotonic() - since,
                    error,
                )
                sys.stderr.flush()
                os._exit(lost_exit_code)


def _local_cpus(config: RunConfig) -> int:
    """CPUs of a local Ray: what Ray itself finds here, or fewer that we may use, or more for the
    workers asked for.
    """
    from ray._private.utils import (
        get_num_cpus,
    )  # what ray.init() counts by; nothing public says it beforehand

    found = min(int(get_num_cpus(override_docker_cpu_warning=True)), model.count_devices("cpu"))
    return max(1, found, (config.workers or 1) * (1 + config.tokenizer_workers))


def num_units(device: str) -> int:
    """GPUs, or CPUs, of the Ray that this process has joined."""
    import ray

    return int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 0))


def units_for_workers(config: RunConfig, units: int, device: str) -> int:
    """Workers that ``units`` GPUs or CPUs are enough for; a worker's tokenizers take CPUs as
    well.
    """
    if device == "cpu":
        return max(1, units // (1 + config.tokenizer_workers))
    if not config.tokenizer_workers:
        return units
    cpus = model.count_devices("cpu") if address(config) is None else num_units("cpu")
    return max(1, min(units, cpus // (1 + config.tokenizer_workers)))


def needs(config: RunConfig, device: str) -> dict[str, Any]:
    """What one worker asks of Ray."""
    return {
        "num_cpus": 1 + config.tokenizer_workers,
        "num_gpus": 1 if device == "cuda" else 0,
        "runtime_env": {"env_vars": WORKER_ENV},
    }


def lack(num_waiting: int, config: RunConfig, device: str, num_loading: int = 0) -> str:
    """What those of ``num_waiting`` workers ask for that have no place yet, and what the cluster
    has.
    """
    import ray

    one = needs(config, device)
    asks = f"{one['num_cpus']} CPU" + (" and 1 GPU" if one["num_gpus"] else "")
    has, free = ray.cluster_resources(), ray.available_resources()
    amounts = ", ".join(f"{has.get(k, 0):g} {k} ({free.get(k, 0):g} free)" for k in ("CPU", "GPU"))
    nodes = count(sum(node["Alive"] for node in ray.nodes()), "node")
    if 0 < num_waiting <= num_loading:
        return "each logs that it is ready with --log-format json"
    asked = count(num_waiting - num_loading, "more worker")
    return f"asked for {asked} of {asks} each; the cluster has {amounts} on {nodes}"


def cause_of(error: BaseException) -> BaseException:
    """What a call on Ray raised, out of a wrapping for each call that waited for it; or Ray's own
    error.
    """
    while isinstance(inner := getattr(error, "cause", None), BaseException):
        error = inner
    return error


def start_error(error: BaseException) -> BaseException:
    """Why a worker could not start: what it raised, or a ``ModelError`` with Ray's words."""
    import ray

    cause = cause_of(error)
    if isinstance(cause, ray.exceptions.RayError):
        return ModelError(f"a worker could not start: {str(cause).strip()[-2000:]}")
    return cause


def probe(address: str | None) -> str:
    """Join the Ray at ``address`` or start a local one, run a task on it, and say what it has.

    Raises ``ConfigError`` when there is none, or when its nodes cannot run a task of ours.
    """
    with joined(RunConfig(corpus=("-",), model="-", store="/", address=address)):
        import ray

        try:
            python = ray.get(ray.remote(num_cpus=1)(_python_version).remote(), timeout=PROBE_S)
        except ray.exceptions.RayError as error:
            why = dispatch.reason(error)
            raise ConfigError(
                f"Ray answers, but a task failed within {PROBE_S:g} s: {why}"
            ) from error
        has = ray.cluster_resources()
        return (
            f"Ray {ray.__version__} ran a task of afn-ray on Python {python}; it has {has.get('CPU', 0):g} CPU and "
            f"{has.get('GPU', 0):g} GPU on {count(len(ray.nodes()), 'node')}"
        )


def _python_version() -> str:
    """Of the node that runs this; a function of ours is pickled by name, so the node has afn-ray if
    it answers.
    """
    return platform.python_version()
