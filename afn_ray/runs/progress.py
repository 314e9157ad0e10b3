"""Progress: counters of a worker, and the one snapshot of a run that everything shown formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from operator import attrgetter

ESTIMATE_AFTER_S, ESTIMATE_AFTER_SHARE = 5.0, 0.02
"""Least time in seconds and least share of documents measured for an estimate of the time left."""


@dataclass(slots=True)
class Counters:
    """Work of a worker so far; counts and seconds only grow."""

    documents: int = 0
    tokens: int = 0
    forward_tokens: int = 0  # with padding, filler and overlaps
    read_s: float = 0.0  # seconds of the reading thread
    tokenize_s: float = 0.0  # seconds of the tokenizing thread, or of all tokenizer processes
    wait_s: float = 0.0  # seconds in which the model waited for text
    model_s: float = 0.0  # seconds in which the model worked
    write_s: float = 0.0  # seconds of the threads that make rows and write them
    why_padded: str = ""  # empty: sequences are packed without padding
    why_slow: str = ""  # empty: attention is the fastest that the device has
    measured: float = 0.0  # documents; a chunk in the model counts by its share of tokens

    @property
    def bottleneck(self) -> str:
        """Cause of the models' wait, if they wait for a fifth of their time; else ""."""
        total_s = self.model_s + self.wait_s
        if total_s < 5 or self.wait_s < 0.2 * total_s:
            return ""
        waiting = f"{self.wait_s / total_s:.0%} of the time waiting for"
        if self.tokenize_s > self.read_s:
            return f"{waiting} the tokenizer: try more --tokenizer-workers"
        return f"{waiting} the corpus"


def sum_of(parts: Iterable[Counters]) -> Counters:
    """The sum of the counters of several workers."""
    parts = list(parts)
    reasons = ("why_padded", "why_slow")
    names = (f.name for f in fields(Counters) if f.name not in reasons)
    # map and attrgetter are fast enough for a thousand workers, a few times a minute
    sums = {name: sum(map(attrgetter(name), parts)) for name in names}
    return Counters(
        **sums,
        why_padded=next((p.why_padded for p in parts if p.why_padded), ""),
        why_slow=next((p.why_slow for p in parts if p.why_slow), ""),
    )


@dataclass(frozen=True, slots=True)
class Progress:
    """Snapshot of a run in this call; it does not count what the store had before.

    The bar, the log lines, the JSON lines, the status file and the metrics all format it.
    """

    num_shards: int
    num_workers: int = 0  # workers that were asked for
    num_ready: int = 0  # workers that have loaded their model
    num_lost: int = 0  # worker processes that died or were killed early
    num_running: int = 0  # shards on workers
    num_committed: int = 0  # shards
    failures: tuple[tuple[str, str], ...] = ()  # quarantined shards: id and reason
    retries: int = 0
    # sums of the commits' counts, of shards, and of bytes read and written
    counts: Counter[str] = field(default_factory=Counter)
    # seconds that each shard committed since the last snapshot held its model
    shard_s: tuple[float, ...] = ()
    work: Counters = field(default_factory=Counters)  # of all workers, shards in flight included
    seconds: float = 0.0  # since the first worker was ready
    notices: tuple[str, ...] = ()  # messages for people, all so far
    capacity_notice: str = ""  # the notice of missing workers, while no worker is ready
    num_documents: int | None = None  # planned documents; None: unknown before the files are read

    @property
    def num_done(self) -> int:
        """Shards that need no more work: committed or quarantined."""
        return self.num_committed + len(self.failures)

    @property
    def num_queued(self) -> int:
        """Shards that no worker has yet."""
        return self.num_shards - self.num_done - self.num_running

    @property
    def has_begun(self) -> bool:
        """True if a worker has loaded the model."""
        return self.num_ready > 0 or self.num_done > 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all workers, since the first one was ready."""
        return self.work.tokens / self.seconds if self.seconds else 0.0

    @property
    def share_padded(self) -> float | None:
        """Share of the forward passes' tokens that are not recorded; None before the first one."""
        if not self.work.tokens:
            return None
        return max(0.0, 1 - self.work.tokens / self.work.forward_tokens)

    @property
    def num_measured(self) -> int:
        """Documents that a model has processed, also in shards in flight and failed attempts."""
        measured = max(self.counts["documents"], round(self.work.measured))
        return measured if self.num_documents is None else min(measured, self.num_documents)

    @property
    def left_s(self) -> float | None:
        """Estimated seconds until the last shard is done; None while there is too little data.

        There is enough data when each worker has finished about one shard, or when documents have
        taken ``ESTIMATE_AFTER_S`` and reached ``ESTIMATE_AFTER_SHARE``.
        """
        if self.num_done >= max(1, min(self.num_ready, self.num_shards // 2)):
            return self.seconds / self.num_done * (self.num_shards - self.num_done)
        if not self.num_documents or self.seconds < ESTIMATE_AFTER_S:
            return None
        if self.num_measured < ESTIMATE_AFTER_SHARE * self.num_documents:
            return None
        return self.seconds / self.num_measured * (self.num_documents - self.num_measured)

    @property
    def loading_text(self) -> str:
        """Number of workers with a loaded model, in words;
        empty once one has or a shard is done.
        """
        if self.num_ready > 0 or self.num_committed > 0:
            return ""
        return f"workers: 0 of {self.num_workers} have loaded the model"
