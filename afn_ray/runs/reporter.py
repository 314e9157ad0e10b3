"""Report the status of a run: write its file in the store on a thread of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from afn_ray import logs
from afn_ray.config import RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.errors import AfnError, Interrupted
from afn_ray.run_info import Quarantined
from afn_ray.runs.progress import Progress
from afn_ray.runs.status import EVERY_S, MOST_LISTED, NOTHING, StatusBody
from afn_ray.store import storage, uris
from afn_ray.store.commits import Commits, total_counts
from afn_ray.store.layout import PLANNING, STATUS
from afn_ray.store.manifest import RunFolder

LEAST_S = 1.0
"""Shortest pause between two writes, in seconds."""
END_S = 2.0
"""Longest wait for the last write, in seconds: a stopped job is killed soon after."""
MOST_CHARS = 2000
"""Longest reason or notice in the file, in characters."""

_log = logging.getLogger(__name__)


class Reporter:
    """Write the status of one call of a run, on a thread of its own.

    A slow store thus does not delay the run.
    """

    def __init__(self, config: RunConfig, *, planning: bool = True) -> None:
        """``planning``: whether to write a status before the run has a name."""
        self._planning = uris.join(config.store, PLANNING)
        self._uri = self._planning if planning else ""
        self._best_effort = logs.BestEffort(_log, f"a status in {config.store}")
        self._body: StatusBody = {
            **NOTHING,
            "began_at": _now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "corpus": list(config.corpus[:MOST_LISTED]),
            "model": config.model,
        }
        self._shards: Sequence[Shard] = ()
        self._reused: dict[str, int] = {}
        self._changed = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write_often, name="afn-status", daemon=True)
        self._thread.start()

    def begin(self, run: RunFolder, shards: Sequence[Shard], commits: Commits) -> None:
        """Record the run's name and its plan, ``shards``; the store has ``commits`` of it."""
        self._shards = shards
        totals = total_counts(commits.values())
        names = ("tokens", "documents", "quarantined", "lost_bytes")
        self._reused = {name: totals.get(name, 0) for name in names}
        self._uri = uris.join(run.uri, STATUS)
        num_todo = len(shards) - len(commits)
        self._set(
            {
                "run": run.id,
                "shards": self._shard_counts(Progress(num_todo)),
                **_counts_of(self._reused, {}),
            }
        )

    def phase(self, name: str, doing: str = "") -> None:
        """Record the phase: "planning", "pilot", "starting", "reducing" or "screening"."""
        before = self._body
        if (name, doing) == (before["phase"], before["doing"]):
            return
        self._set({"phase": name, "doing": doing, "waits_for": "", "left_s": None})
        if name != before["phase"]:
            self._changed.set()

    def notice(self, text: str) -> None:
        """Record a message for people; the newest ``MOST_LISTED`` are kept."""
        notices = [*self._body["notices"], f"{_now()}: {text[:MOST_CHARS]}"]
        self._set({"notices": notices[-MOST_LISTED:]})

    def working(self, progress: Progress) -> None:
        """Record the progress of the dispatcher."""
        self._best_effort.call(self._working, progress)

    def _working(self, progress: Progress) -> None:
        before = self._body
        shards = self._shard_counts(progress)
        workers = {
            "wanted": progress.num_workers,
            "ready": progress.num_ready,
            "lost": progress.num_lost,
        }
        last_commit_at = before["last_commit_at"]
        if shards["done"] > before["shards"].get("done", 0):
            last_commit_at = _now()
        waits_for = progress.capacity_notice or progress.loading_text or progress.work.bottleneck
        self._set(
            {
                "phase": "working" if progress.has_begun else "starting",
                "doing": "",
                "shards": shards,
                "workers": workers,
                "retries": progress.retries,
                "tokens_per_s": round(progress.tokens_per_s, 1),
                "left_s": progress.left_s,
                "last_commit_at": last_commit_at,
                "waits_for": waits_for,
                "num_failures": len(progress.failures),
                "documents_measured": progress.num_measured,
                "documents_planned": progress.num_documents,
                "failures": self._failures(progress),
                **_counts_of(self._reused, progress.counts),
            }
        )
        if self._body["phase"] != before["phase"]:
            self._changed.set()

    def _shard_counts(self, progress: Progress) -> dict[str, int]:
        """Numbers of shards; those that the store had before are ``reused`` and done."""
        num_reused = len(self._shards) - progress.num_shards
        return {
            "planned": len(self._shards),
            "reused": num_reused,
            "done": num_reused + progress.num_committed,
            "running": progress.num_running,
            "quarantined": len(progress.failures),
        }

    def _failures(self, progress: Progress) -> list[Quarantined]:
        """The first ``MOST_LISTED`` failures with their files."""
        listed = self._body["failures"]
        if len(listed) == min(len(progress.failures), MOST_LISTED):
            return listed
        first = dict(progress.failures[:MOST_LISTED])
        files = {}
        for shard in self._shards:
            if shard.id in first:
                files[shard.id] = shard.slices[0].uri
        failures: list[Quarantined] = []
        for name, reason in first.items():
            failures.append({"shard": name, "uri": files[name], "reason": reason[:MOST_CHARS]})
        return failures

    def end(self, phase: str, exit_code: int, reason: str) -> None:
        """Record the last phase: "complete", "stopped" (resumable) or "failed".

        Waits until it is written, for at most ``END_S``.
        """
        # Nothing was to do: nothing is written.
        if phase == "complete" and not self._body["run"]:
            self._uri = ""
        self._set(
            {
                "phase": phase,
                "doing": "",
                "waits_for": "",
                "left_s": None,
                "exit_code": exit_code,
                "reason": reason[:MOST_CHARS],
            }
        )
        self._over.set()
        self._changed.set()
        self._thread.join(END_S)

    def _set(self, values: StatusBody) -> None:
        self._body = {**self._body, **values}  # a new dict: the thread may be writing the old one

    def _write_often(self) -> None:
        """Write the status until ``end``: every ``EVERY_S``, and soon after a change of phase."""
        over = False
        while not over:
            self._over.wait(LEAST_S)
            self._changed.clear()
            over = self._over.is_set()
            if uri := self._uri:
                self._best_effort.call(self._write, uri)
            if uri != self._planning and (uri or self._body["phase"] == "complete"):
                # The status without a run's name, of this call or an earlier one, is outdated.
                self._best_effort.call(storage.delete, [self._planning])
            if not over:
                self._changed.wait(EVERY_S - LEAST_S)

    def _write(self, uri: str) -> None:
        body = {**self._body, "written_at": _now()}
        text = json.dumps(body, indent=1) + "\n"
        storage.write_over(uri, text.encode())


@contextlib.contextmanager
def reported(config: RunConfig, *, planning: bool = True) -> Iterator[Reporter]:
    """Context with a ``Reporter`` of one call; the end of the block is its last phase.

    ``planning`` is that of ``Reporter``.
    """
    reporter = Reporter(config, planning=planning)
    try:
        yield reporter
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        code = Interrupted.exit_code if stopped else 1
        if isinstance(error, AfnError):
            code = error.exit_code
        reason = ""
        if not isinstance(error, KeyboardInterrupt):
            reason = str(error) or type(error).__name__
        reporter.end("stopped" if stopped else "failed", code, reason)
        raise
    reporter.end("complete", 0, "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _counts_of(reused: Mapping[str, int], counts: Mapping[str, int]) -> StatusBody:
    """Counts of committed shards, those of earlier calls (``reused``) included.

    Bytes read and written are those of this call alone.
    """
    total = {name: number + counts.get(name, 0) for name, number in reused.items()}
    return {
        "tokens": total["tokens"],
        "documents": total["documents"],
        "documents_quarantined": total["quarantined"],
        "bytes_lost": total["lost_bytes"],
        "bytes_read": counts.get("bytes_read", 0),
        "bytes_written": counts.get("bytes_written", 0),
    }
