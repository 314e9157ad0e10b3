"""A worker whose shards are composed of columns that the store has, and of
parts that it measures.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from afn_ray.corpus_values import Shard
from afn_ray.errors import CannotCompose, Interrupted, StoreError
from afn_ray.runs import composed_tables, scratch
from afn_ray.runs.composed_tables import PartialResult
from afn_ray.runs.progress import Counters
from afn_ray.runs.task import Donor, Task
from afn_ray.runs.worker import Processor, attempt, shard_tables
from afn_ray.store.checksums import DAMAGES
from afn_ray.store.commits import COMPOSED, Commit
from afn_ray.store.shard_files import Attempt, StoredShard
from afn_ray.store.shard_tables import ShardTable


@dataclass(frozen=True, slots=True)
class _Measured:
    """Tables that an attempt has measured, on scratch."""

    attempt: Attempt

    def open(self, table: str) -> ShardTable:
        """The file of ``table``."""
        return ShardTable(self.attempt.tables[table][0])


class Composer:
    """A worker that composes shards; it loads a model only for parts that no donor has."""

    def __init__(self, task: Task) -> None:
        assert task.composition is not None
        self.task, self._composition = task, task.composition
        scratch.sweep(task.config)
        rest = task.composition.rest
        if rest is not None:  # it was planned before workers were placed and numbered
            config = replace(rest.config, tokenizer_workers=task.config.tokenizer_workers)
            rest = replace(rest, config=config, worker=task.worker)
        self._rest = None if rest is None else Processor(rest)
        self.counters = Counters() if self._rest is None else self._rest.counters
        self._counting = threading.Lock()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Make shards in process end soon with ``Interrupted``."""
        self._stopped.set()
        if self._rest is not None:
            self._rest.stop()

    def close(self) -> None:
        """End the threads and processes that measure."""
        if self._rest is not None:
            self._rest.close()

    def process(self, shard: Shard, oom_retries: int = 0) -> Commit:
        """Compose ``shard`` and commit it; return the commit that counts.

        Raises ``CannotCompose`` where the stored columns do not fit together, are damaged or gone,
        and as ``worker.attempt`` does.
        """

        def compose(folder: Path, name: str) -> Attempt:
            return self._compose(shard, oom_retries, folder, name)

        return attempt(self.task, shard, oom_retries, compose)

    def _compose(self, shard: Shard, oom_retries: int, folder: Path, name: str) -> Attempt:
        store = self.task.config.store
        composition = self._composition
        began = time.monotonic()
        sources: list[PartialResult] = []
        origins: list[dict[str, str]] = []
        with _fitting(shard):
            for donor in composition.donors:
                generation = donor.generations.get(shard.id, 0)
                stored = StoredShard.find(store, donor.measure_id, shard.id, generation)
                sources.append(_source_of(stored, donor))
                composed_tables.check_complete(sources[-1])  # before anything is measured
                origins.append({"measure": donor.measure_id, "attempt": stored.commit.attempt})
        seconds = 0.0
        if self._rest is not None:
            within = folder / "measured"
            within.mkdir()
            made = self._rest.record(shard, oom_retries, within, name)
            seconds = made.seconds
            ours = PartialResult(
                _Measured(made), composition.missing, made.counts, made.made_by, "this attempt"
            )
            sources.insert(0, ours)
        with _fitting(shard), shard_tables(self.task, shard, folder, name) as files:
            composed_tables.check_complete(sources[0])
            composed_tables.write(sources, self.task.measure, files, self._check_stopped)
        counts = dict(sources[0].counts)
        if self._rest is None:
            self._count(counts, time.monotonic() - began)
        return Attempt(
            name, files.tables(), counts, seconds, _made_by(sources, origins), tuple(origins)
        )

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise Interrupted("stopped; the same command resumes")

    def _count(self, counts: Mapping[str, int], seconds: float) -> None:
        """Count a shard that was copied."""
        with self._counting:
            self.counters.documents += counts["documents"]
            self.counters.measured += counts["documents"]
            self.counters.tokens += counts["tokens"]
            self.counters.forward_tokens += counts["tokens"]
            self.counters.write_s += seconds


def _source_of(stored: StoredShard, donor: Donor) -> PartialResult:
    commit = stored.commit
    name = f"measure {donor.measure_id}"
    return PartialResult(stored, donor.parts, commit.counts, commit.made_by, name)


@contextlib.contextmanager
def _fitting(shard: Shard) -> Iterator[None]:
    """Raise ``CannotCompose`` in place of errors of what the store has of ``shard``."""
    try:
        yield
    except (StoreError, OSError, *DAMAGES) as error:
        # Shards that fail alike are reported together.
        raise CannotCompose(str(error).replace(shard.id, "...")) from error


def _made_by(
    sources: Sequence[PartialResult], origins: Sequence[Mapping[str, str]]
) -> dict[str, str]:
    """Makers of the columns of ``sources``; where they differ, all of it, joined by " + "."""
    found: dict[str, list[str]] = {}
    for source in sources:
        for name, value in source.made_by.items():
            values = found.setdefault(name, [])
            if value not in values:
                values.append(value)
    joined = {name: " + ".join(values) for name, values in found.items()}
    return joined | {COMPOSED: " + ".join(origin["measure"] for origin in origins)}
