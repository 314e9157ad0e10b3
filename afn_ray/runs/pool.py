"""A pool of workers: what a dispatcher asks of it, and the events that it reports."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from afn_ray.corpus_values import Shard
from afn_ray.runs.progress import Counters
from afn_ray.store.commits import Commit


class Cause(Enum):
    """Reason why a worker lost its process, as far as its pool knows."""

    CRASH = "its worker's process died"
    MEMORY = "its worker's node ran out of memory"
    NODE = "its worker's node is gone"  # or was preempted: no shard caused it
    START = "a worker could not start"
    LOADING = "a worker's process died as it loaded the model"


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has loaded its model, for the first time or after a restart."""

    worker: int


@dataclass(frozen=True, slots=True)
class Silent:
    """A worker has lost its process; a ``Gone`` with the cause follows."""

    worker: int


@dataclass(frozen=True, slots=True)
class Gone:
    """A worker has lost its process and all its shards in flight; a ``Ready`` may follow."""

    worker: int
    cause: Cause
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Leaving:
    """A worker's node will stop soon: the worker may finish its shards and gets no more."""

    worker: int


@dataclass(frozen=True, slots=True)
class Done:
    """A worker has committed a shard."""

    worker: int
    shard: str
    commit: Commit


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt at a shard raised ``error``; its worker continues."""

    worker: int
    shard: str
    error: BaseException


PoolEvent = Ready | Silent | Gone | Leaving | Done | Failed
"""Event that a pool reports to the dispatcher."""


class Pool(Protocol):
    """Workers in any place, identified by numbers."""

    can_replace: bool
    """True if a worker has a process of its own, which can be killed and restarted."""

    def grow(self, num_useful: int) -> int:
        """Start workers up to the number wanted, at most ``num_useful``; return their number.

        Workers that wait for resources count.
        """

    def assign(self, worker: int, shard: Shard, oom_retries: int) -> None:
        """Assign a shard to ``worker``, with its token budget halved ``oom_retries`` times."""

    def wait(self, timeout_s: float) -> list[PoolEvent]:
        """Return the events so far; wait for the first one for at most ``timeout_s``."""

    def replace(self, worker: int) -> None:
        """Restart the process of ``worker`` and forget its shards in flight; ``Ready`` follows."""

    def release(self, worker: int) -> None:
        """End ``worker`` for good: no work is left for it."""

    def counters(self) -> Counters:
        """Counters of all workers, shards in flight included."""

    def num_tokens(self, worker: int) -> int:
        """Tokens that ``worker`` has measured, as last polled; while they grow nothing hangs."""

    def lack(self) -> str:
        """Resources that waiting workers asked for, and those that exist, for people."""

    def num_loading(self) -> int:
        """Number of workers that have resources and are loading the model."""

    def close(self) -> None:
        """End all workers."""
