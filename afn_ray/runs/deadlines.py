"""Deadlines of shards: which shard in flight is late."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from afn_ray.corpus_values import Shard

SLOTS = 3
"""Shards in flight on one worker: one is read, one uses the model, one is written and uploaded."""
DEADLINE_S = 600.0
"""Shortest deadline of a shard, in seconds."""
DEADLINE_BYTES_PER_S = 10_000.0
"""Assumed speed while no shard is done, in bytes per second.

A shard of n bytes then has a deadline of ``DEADLINE_S + n / DEADLINE_BYTES_PER_S`` seconds.
"""
DEADLINE_FACTOR = 10.0
"""Ratio of a shard's deadline to its time at the slowest speed so far.

It applies once a shard is done; the deadline is at least ``DEADLINE_S``.
"""
DEADLINE_BYTES = 1 << 20
"""Smallest size assumed for a finished shard when its speed is computed, in bytes.

The time that a small shard takes says little about large shards.
"""


@dataclass(slots=True)
class Flight:
    """A shard in flight on a worker.

    Shards of one worker wait for each other. ``since`` restarts the deadline whenever another shard
    of the worker ends. A shard that hangs before or after the model does not stop the others, so
    its deadline in all, from ``began``, is ``SLOTS`` deadlines.
    """

    shard: Shard
    since: float
    began: float  # when it was assigned


class Deadlines:
    """The deadline of each shard: configured, or from its size and the slowest shard so far."""

    def __init__(self, configured_s: float | None) -> None:
        self._configured_s = configured_s
        self._slowest = 0.0  # seconds per byte
        # worker -> its tokens, and when their number last grew
        self._growth: dict[int, tuple[int, float]] = {}

    def of(self, shard: Shard) -> float:
        """Deadline of ``shard`` in seconds."""
        if self._configured_s is not None:
            return self._configured_s
        if not self._slowest:
            return DEADLINE_S + shard.num_bytes / DEADLINE_BYTES_PER_S
        return max(DEADLINE_S, DEADLINE_FACTOR * self._slowest * shard.num_bytes)

    def add_done(self, shard: Shard, took_s: float) -> None:
        """Update the slowest speed by a shard that is done."""
        self._slowest = max(self._slowest, took_s / max(DEADLINE_BYTES, shard.num_bytes))

    def find_late(
        self, worker: int, flights: Collection[Flight], num_tokens: int, now: float
    ) -> Flight | None:
        """A late shard of ``worker``, which has measured ``num_tokens``; None: there is none.

        A shard is late when its deadline has passed and its worker has measured no token for
        ``DEADLINE_S``, or when ``SLOTS`` deadlines have passed since its assignment. With a
        configured deadline, tokens do not matter.
        """
        tokens_before, grew_at = self._growth.get(worker, (-1, 0.0))
        if num_tokens != tokens_before:
            self._growth[worker] = num_tokens, now
            grew_at = now
        progresses = self._configured_s is None and now - grew_at < DEADLINE_S
        if not progresses:
            for flight in flights:
                if now - flight.since > self.of(flight.shard):
                    return flight
        if self._configured_s is not None or self._slowest:  # else no speed is known yet
            for flight in flights:
                if now - flight.began > SLOTS * self.of(flight.shard):
                    return flight
        return None
