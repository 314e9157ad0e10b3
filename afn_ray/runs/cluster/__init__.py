"""The only door to Ray: run the work on Ray's workers, or in this process without Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from afn_ray import model
from afn_ray.config import RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.reduce.tasks import FAN_IN, Inline, Tasks
from afn_ray.runs import scratch
from afn_ray.runs.cluster import placement
from afn_ray.runs.cluster.calls import RayTasks, call_on_place
from afn_ray.runs.cluster.connection import address, check_own, joined
from afn_ray.runs.cluster.metrics import Published
from afn_ray.runs.cluster.placement import Placement
from afn_ray.runs.cluster.pool import RayPool
from afn_ray.runs.composition import Group
from afn_ray.runs.dispatch import Dispatcher, OnProgress, Tolerance
from afn_ray.runs.inline import InlinePool
from afn_ray.runs.outcome import State
from afn_ray.runs.pool import Pool
from afn_ray.runs.progress import Progress
from afn_ray.runs.task import Task
from afn_ray.store import uris

T = TypeVar("T")

INLINE_BYTES = 1 << 20
"""Corpus size below which a run stays in this process, in bytes.

A local Ray takes 3 CPU seconds and 0.3 GB to start.
"""


def process_shards(
    config: RunConfig,
    task: Task,
    shards: Sequence[Shard],
    on_progress: OnProgress,
    composed: Sequence[Group] = (),
) -> State:
    """Process the shards ``composed``, then ``shards``, by the rules of ``Dispatcher``.

    Returns the final state, with the commits and the quarantined shards. A shard that cannot be
    composed is processed with ``shards``. Raises at once for an error that concerns all shards: a
    model that does not load, a full disk, no capacity.
    """
    groups = [*composed, Group(task, tuple(shards))]
    todo = [shard for group in groups for shard in group.shards]
    try:
        if runs_inline(config, todo):
            notices = list(placement.place_inline(config).notices)
            return _dispatch(lambda of: (InlinePool(of), notices), config, groups, on_progress)
        with joined(config):
            published = Published(task.run)

            def publish(progress: Progress) -> None:
                published.publish(progress)
                on_progress(progress)

            def start(of: Task) -> tuple[Pool, list[str]]:
                pool = RayPool(of, config)
                return pool, pool.notices

            try:
                return _dispatch(start, config, groups, publish)
            finally:
                published.close()
    finally:
        scratch.sweep(config)  # workers are killed and cannot clean up


def check(config: RunConfig, todo: Sequence[Shard], planned: Sequence[Shard]) -> None:
    """Raise what ``process_shards`` and ``tasks`` would raise for a Ray that must not be joined.

    ``todo``: shards to process; ``planned``: shards to reduce. No local Ray is started.
    """
    works = bool(todo) and not runs_inline(config, todo)
    reduces = len(planned) > FAN_IN and not runs_inline(config, planned)
    if not works and not reduces:
        return
    if address(config) is None:
        check_own(config)
    else:
        with joined(config):
            pass


def _dispatch(
    start: Callable[[Task], tuple[Pool, list[str]]],
    config: RunConfig,
    groups: Sequence[Group],
    on_progress: OnProgress,
) -> State:
    """Run a ``Dispatcher`` for each of ``groups``; the last one takes what cannot be composed.

    ``start`` starts a pool of a task; the pool may append to the notices beside it.
    """
    tolerance = Tolerance(config.wait_s, config.shard_deadline_s, config.allow_quarantined)
    state = State.of([shard for group in groups for shard in group.shards])
    for group in groups:
        last: Sequence[Shard] = ()
        if group is groups[-1]:
            last = state.not_composed.shards
            state.notices += state.not_composed.describe()
        shards = [*group.shards, *last]
        if not shards or state.stopped:
            continue
        pool, notices = start(group.task)
        notices[:] = [*state.notices, *(n for n in notices if n not in state.notices)]
        state.notices = notices
        Dispatcher(pool, shards, on_progress, tolerance, state=state).run()
    return state


def runs_inline(config: RunConfig, shards: Sequence[Shard]) -> bool:
    """True if ``shards`` run in this process: as configured, or too little work for Ray."""
    if config.executor != "auto":
        return config.executor == "inline"
    if any(map(uris.is_process_memory, (config.store, *config.corpus))):
        return True
    wants_ray = (
        address(config) is not None
        or config.workers is not None
        or bool(config.tokenizer_workers)
        or (config.workers_per_gpu > 1 and config.device != "cpu")
    )
    started = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return not (wants_ray or started) and sum(s.num_bytes for s in shards) < INLINE_BYTES


def find_device(config: RunConfig) -> str:
    """Device of the workers, "cuda" or "cpu".

    On a cluster it depends on the cluster's resources, else on this machine.
    """
    if _is_here(config):
        return model.choose_device(config.device)
    if config.device != "auto":
        return config.device
    with joined(config):
        return "cuda" if any(node.num_gpus for node in placement.nodes()) else "cpu"


def _is_here(config: RunConfig) -> bool:
    """True if workers have this machine's resources: inline, or on a local Ray."""
    return config.executor == "inline" or address(config) is None


def local_device(device: str) -> str:
    """Device of this process on which to test work that workers do on ``device``."""
    return device if device == "cpu" else model.choose_device("auto")


def place_workers(config: RunConfig, device: str) -> Placement:
    """The workers that a run would start on this machine or on the cluster."""
    if config.executor == "inline":
        return placement.place_inline(config)
    if _is_here(config):
        return placement.place(config, [placement.this_machine()], device)
    with joined(config):
        return placement.place(config, placement.nodes(), device)


def calibrate(
    calibration: Callable[[Task, Sequence[str]], T],
    task: Task,
    texts: Sequence[str],
    on_notice: Callable[[str], None],
) -> T:
    """Return ``calibration(task, texts)``, run on the workers' device.

    It runs in this process for a CPU of this machine, else on Ray with a worker's resources.
    """
    config = task.config
    if _is_here(config) and (config.executor == "inline" or task.device == "cpu"):
        return calibration(task, texts)
    with joined(config):
        found: T = call_on_place(config, task.device, on_notice, calibration, task, texts)
        return found


@contextmanager
def tasks(
    config: RunConfig, shards: Sequence[Shard], on_notice: Callable[[str], None]
) -> Iterator[Tasks]:
    """Context with the ``Tasks`` that run the calls of a reduce of ``shards``.

    They run in this process where it processed the shards or where one call reads all, else on Ray.
    """
    if len(shards) <= FAN_IN or runs_inline(config, shards):
        yield Inline()
    else:
        with joined(config):
            yield RayTasks(config, on_notice)
