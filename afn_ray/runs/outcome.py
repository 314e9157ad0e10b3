"""Outcome of a call for its shards: committed, given up, or impossible to compose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from afn_ray.corpus_values import Shard
from afn_ray.errors import CannotCompose
from afn_ray.runs.progress import Counters
from afn_ray.runs.reasons import reason
from afn_ray.store.commits import Commits
from afn_ray.text import count

MOST_REASONS = 3
"""Largest number of reasons that are reported for shards that cannot be composed."""


@dataclass(slots=True)
class NotComposed:
    """Shards whose stored columns do not fit together, to be measured as a whole, and reasons."""

    shards: list[Shard] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)  # number of shards by reason

    def add(self, shard: Shard, error: CannotCompose) -> None:
        """Add ``shard``, which cannot be composed because of ``error``."""
        self.shards.append(shard)
        self.reasons[reason(error).removeprefix("CannotCompose: ")] += 1

    def describe(self) -> Iterator[str]:
        """Sentences on the shards, one for each of the main reasons."""
        main = self.reasons.most_common(MOST_REASONS)
        for why, num in main:
            yield f"{count(num, 'shard')} measured as a whole: {why}"
        if num_others := len(self.shards) - sum(num for _, num in main):
            yield f"{count(num_others, 'more shard')} measured as a whole, for other reasons"


@dataclass(slots=True)
class State:
    """Outcome of a call so far for its shards; shards that the store had before do not count."""

    num_shards: int
    num_documents: int | None = None  # None: unknown before the files are read
    num_workers: int = 0
    commits: Commits = field(default_factory=Commits)
    failures: dict[str, str] = field(default_factory=dict)  # shard id -> why it is quarantined
    stopped: str = ""  # why the run stopped with shards undone; empty: it did not
    retries: int = 0
    num_lost: int = 0  # worker processes that died or were killed early
    # sums of the commits' counts, of shards, and of bytes read and written
    counts: Counter[str] = field(default_factory=Counter)
    notices: list[str] = field(default_factory=list)  # messages for people
    not_composed: NotComposed = field(default_factory=NotComposed)
    # of pools that have ended
    work: Counters = field(default_factory=Counters)
    seconds: float = 0.0

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> State:
        """State before any of ``shards`` is assigned."""
        return cls(len(shards), _num_documents(shards))


def _num_documents(shards: Iterable[Shard]) -> int | None:
    """Documents of ``shards``; None where a slice does not state their number, or not all count."""
    total = 0
    for shard in shards:
        if shard.options.selects:
            return None
        for piece in shard.slices:
            if piece.num_documents < 0:
                return None
            total += piece.num_documents
    return total
