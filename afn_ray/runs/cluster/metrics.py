"""Publish a run's metrics to Prometheus through Ray.

Ray's node agents export each metric with ``ray_`` before its name. The driver alone publishes,
since it knows the work of all workers. Ray labels each series with its process, so workers would
add a new set of series at every restart. A run has each series once, whatever its size.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from afn_ray import logs
from afn_ray.runs.progress import Progress

_log = logging.getLogger(__name__)

COUNTERS = {
    "afn_tokens_total": "Tokens of committed shards",
    "afn_documents_total": "Documents of committed shards, empty and quarantined ones among them",
    "afn_documents_quarantined_total": "Documents of committed shards that could not be measured",
    "afn_shards_total": "Shards committed",
    "afn_bytes_read_total": "Bytes of the corpus in committed shards",
    "afn_bytes_written_total": "Bytes of the files of committed shards",
    "afn_measured_tokens_total": "Tokens that left the model, those of attempts that failed or are "
    "under way too",
    "afn_forward_tokens_total": "Tokens that went through the model, with padding, filler and "
    "overlaps",
    "afn_model_seconds_total": "Seconds in which models worked, over all workers",
    "afn_wait_seconds_total": "Seconds in which models waited for text, over all workers",
    "afn_retries_total": "Attempts at shards that were lost or failed and are made again",
    "afn_workers_lost_total": "Processes of workers that died or were ended before their time",
}
"""Names and descriptions of the counters."""
GAUGES = {
    "afn_shards_queued": "Shards that no worker has yet",
    "afn_shards_running": "Shards on workers",
    "afn_shards_quarantined": "Shards that are given up",
    "afn_workers_wanted": "Workers asked for",
    "afn_workers_ready": "Workers that have loaded the model",
    "afn_last_commit_timestamp_seconds": "Unix time of the last commit; before the first, of the "
    "beginning",
}
"""Names and descriptions of the gauges."""
SHARD_SECONDS = "afn_shard_seconds"
SHARD_SECONDS_HELP = "Seconds for which a committed shard held its model"
BOUNDS_S = (1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0)
"""Bounds of the histogram of shard times, in seconds."""
LASTING = ("afn_shards_quarantined", "afn_last_commit_timestamp_seconds")
"""Gauges that keep their value when the run's workers have ended; the others become 0."""


class Published:
    """The metrics of one run in the Ray that this process has joined."""

    def __init__(self, run: str) -> None:
        from ray.util import metrics

        def make(kind: Any, name: str, description: str, **more: Any) -> Any:
            return kind(name, description=description, tag_keys=("run",), **more).set_default_tags(
                {"run": run}
            )

        self._counters = {
            name: make(metrics.Counter, name, description) for name, description in COUNTERS.items()
        }
        self._gauges = {
            name: make(metrics.Gauge, name, description) for name, description in GAUGES.items()
        }
        self._seconds = make(
            metrics.Histogram, SHARD_SECONDS, SHARD_SECONDS_HELP, boundaries=list(BOUNDS_S)
        )
        self._sums: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._last_commit = time.time()
        self._best_effort = logs.BestEffort(_log, "metrics")

    def publish(self, progress: Progress) -> None:
        """Publish the changes in ``progress``; a failure is logged once and ignored."""
        self._best_effort.call(self._publish, progress)

    def _publish(self, progress: Progress) -> None:
        if progress.shard_s:
            self._last_commit = time.time()
        for seconds in progress.shard_s:
            self._seconds.observe(seconds)
        counts, work = progress.counts, progress.work
        sums = {
            "afn_tokens_total": counts["tokens"],
            "afn_documents_total": counts["documents"],
            "afn_documents_quarantined_total": counts["quarantined"],
            "afn_shards_total": counts["shards"],
            "afn_bytes_read_total": counts["bytes_read"],
            "afn_bytes_written_total": counts["bytes_written"],
            "afn_measured_tokens_total": work.tokens,
            "afn_forward_tokens_total": work.forward_tokens,
            "afn_model_seconds_total": work.model_s,
            "afn_wait_seconds_total": work.wait_s,
            "afn_retries_total": progress.retries,
            "afn_workers_lost_total": progress.num_lost,
        }
        for name, value in sums.items():
            if value > self._sums[name]:  # Ray takes no 0: a series begins with its first event
                self._counters[name].inc(value - self._sums[name])
                self._sums[name] = value
        values = {
            "afn_shards_queued": progress.num_queued,
            "afn_shards_running": progress.num_running,
            "afn_shards_quarantined": len(progress.failures),
            "afn_workers_wanted": progress.num_workers,
            "afn_workers_ready": progress.num_ready,
            "afn_last_commit_timestamp_seconds": self._last_commit,
        }
        for name, value in values.items():
            self._gauges[name].set(value)

    def close(self) -> None:
        """Set the gauges of workers to 0: the run has no workers any more."""
        for name, gauge in self._gauges.items():
            if name not in LASTING:
                self._best_effort.call(gauge.set, 0)
