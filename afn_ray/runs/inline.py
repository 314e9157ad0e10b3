"""A dispatcher's pool without Ray: one worker in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time

from afn_ray.corpus_values import Shard
from afn_ray.runs.composer import Composer
from afn_ray.runs.pool import Done, Failed, PoolEvent, Ready
from afn_ray.runs.progress import Counters
from afn_ray.runs.task import Task
from afn_ray.runs.worker import Processor

STOP_S = 5.0
"""Longest wait for this process's threads to stop, in seconds.

A batch or an upload may take longer; the attempt's files then stay in scratch until the next run
sweeps them.
"""


class InlinePool:
    """One worker in this process, with a thread for each shard in flight."""

    can_replace = False

    def __init__(self, task: Task) -> None:
        self._processor = Composer(task) if task.composition else Processor(task)
        self._events: queue.SimpleQueue[PoolEvent] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._events.put(Ready(0))

    def grow(self, num_useful: int) -> int:
        return 1

    def assign(self, worker: int, shard: Shard, oom_retries: int) -> None:
        thread = threading.Thread(
            target=self._process, args=(shard, oom_retries), name="afn-shard", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more threads or memory
            self._events.put(Failed(worker, shard.id, error))
            return
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]

    def _process(self, shard: Shard, oom_retries: int) -> None:
        """Process ``shard`` on this thread and queue the event."""
        try:
            self._events.put(Done(0, shard.id, self._processor.process(shard, oom_retries)))
        except BaseException as error:  # noqa: BLE001 - the dispatcher says what it means
            self._events.put(Failed(0, shard.id, error))

    def wait(self, timeout_s: float) -> list[PoolEvent]:
        with contextlib.suppress(queue.Empty):
            events = [self._events.get(timeout=timeout_s)]
            while not self._events.empty():
                events.append(self._events.get())
            return events
        return []

    def replace(self, worker: int) -> None:
        """Never called: ``can_replace`` is false."""
        raise NotImplementedError

    def release(self, worker: int) -> None:
        """Do nothing: the worker ends with the run."""

    def counters(self) -> Counters:
        return dataclasses.replace(self._processor.counters)

    def num_tokens(self, worker: int) -> int:
        return self._processor.counters.tokens

    def lack(self) -> str:
        return "this process is its only worker"

    def num_loading(self) -> int:
        return 0  # the constructor has loaded the model

    def close(self) -> None:
        self._processor.stop()
        if not self._join(STOP_S):
            self._processor.close()

    def _join(self, timeout_s: float) -> int:
        """Wait up to ``timeout_s`` for all threads; return how many still run."""
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return sum(t.is_alive() for t in self._threads)
