"""Status of a run: a small file in its folder that the driver rewrites and anyone may read.

No other part depends on it. Two drivers of one run overwrite each other's status. A store that
refuses the file causes one warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from afn_ray import logs
from afn_ray.config import RunConfig
from afn_ray.errors import AfnError, Interrupted, StoreError
from afn_ray.reduce import losses
from afn_ray.runs.progress import Progress
from afn_ray.schema import Shard
from afn_ray.store import checksums, manifest, probes, storage, uris
from afn_ray.store.commits import Commits, total_counts
from afn_ray.store.layout import PLANNING, STATUS
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

EVERY_S = 10.0
"""Pause between two writes, in seconds.

A change of phase is written at once, but at least ``LEAST_S`` after the previous write.
"""
LEAST_S = 1.0
"""Shortest pause between two writes, in seconds."""
END_S = 2.0
"""Longest wait for the last write, in seconds: a stopped job is killed soon after."""
SILENT_S = 60.0
"""Age of the status from which on its driver counts as dead, in seconds."""
MOST_LISTED = 20
"""Largest number of failures, of newest notices and of corpus places in the file."""
MOST_CHARS = 2000
"""Longest reason or notice in the file, in characters."""
COMPLETE, FAILED, USAGE, UNDER_WAY, STOPPED = 0, 1, 2, 3, 75
"""Exit codes of ``afn status``."""
EXIT_CODES = {"complete": COMPLETE, "failed": FAILED, "stopped": STOPPED, "silent": STOPPED}
"""Exit code by state; the states in it are final, except "silent"."""

NOTHING: dict[str, Any] = {
    "schema_version": 1, "run": "", "phase": "planning", "doing": "", "began_at": "", "written_at": "", "host": "",
    "pid": 0, "every_s": EVERY_S, "corpus": [], "model": "", "shards": {}, "workers": {}, "tokens": 0, "documents": 0,
    "documents_quarantined": 0, "documents_measured": 0, "documents_planned": None,
    "bytes_lost": 0, "bytes_read": 0, "bytes_written": 0, "retries": 0,
    "tokens_per_s": 0.0, "left_s": None, "last_commit_at": None, "waits_for": "", "failures": [], "num_failures": 0,
    "notices": [], "exit_code": None, "reason": "",
}  # fmt: skip
"""An empty status: every key, with a value of its type."""
SHARDS, WORKERS = (
    ("planned", "reused", "done", "running", "quarantined"),
    ("wanted", "ready", "lost"),
)
"""Keys of ``shards`` and of ``workers`` in a status."""
MOST_BYTES = 1 << 20
"""Largest status that is read, in bytes; it lists ``MOST_LISTED`` failures."""

_log = logging.getLogger(__name__)


# --- writing


class Reporter:
    """Write the status of one call of a run, on a thread of its own.

    A slow store thus does not delay the run.
    """

    def __init__(self, config: RunConfig, *, planning: bool = True) -> None:
        """``planning``: whether to write a status before the run has a name."""
        self._planning = uris.join(config.store, PLANNING)
        self._uri = self._planning if planning else ""
        self._best_effort = logs.Bystander(_log, f"a status in {config.store}")
        self._body: dict[str, Any] = {
            **NOTHING,
            "began_at": _now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "corpus": list(config.corpus[:MOST_LISTED]),
            "model": config.model,
        }
        self._shards: Sequence[Shard] = ()
        self._reused: dict[str, int] = {}
        self._changed, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write_often, name="afn-status", daemon=True)
        self._thread.start()

    def begin(self, run: RunFolder, shards: Sequence[Shard], commits: Commits) -> None:
        """Record the run's name and its plan, ``shards``; the store has ``commits`` of it."""
        self._shards = shards
        totals = total_counts(commits.values())
        self._reused = {
            k: totals.get(k, 0) for k in ("tokens", "documents", "quarantined", "lost_bytes")
        }
        self._uri = uris.join(run.uri, STATUS)
        num_todo = len(shards) - len(commits)
        self._set(
            run=run.id,
            shards=self._shard_counts(Progress(num_todo)),
            **_counts_of(self._reused, {}),
        )

    def phase(self, name: str, doing: str = "") -> None:
        """Record the phase: "planning", "pilot", "starting", "reducing" or "screening"."""
        if (name, doing) != (self._body["phase"], self._body["doing"]):
            now = name != self._body["phase"]
            self._set(phase=name, doing=doing, waits_for="", left_s=None)
            if now:
                self._changed.set()

    def notice(self, text: str) -> None:
        """Record a message for people; the newest ``MOST_LISTED`` are kept."""
        self._set(notices=[*self._body["notices"], f"{_now()}: {text[:MOST_CHARS]}"][-MOST_LISTED:])

    def working(self, progress: Progress) -> None:
        """Record the progress of the dispatcher."""
        self._best_effort.call(self._working, progress)

    def _working(self, progress: Progress) -> None:
        before, num_before = self._body, self._body["shards"].get("done", 0)
        shards = self._shard_counts(progress)
        is_newer = shards["done"] > num_before
        self._set(
            phase="working" if progress.has_begun else "starting",
            doing="",
            shards=shards,
            workers={
                "wanted": progress.num_workers,
                "ready": progress.num_ready,
                "lost": progress.num_lost,
            },
            retries=progress.retries,
            tokens_per_s=round(progress.tokens_per_s, 1),
            left_s=progress.left_s,
            last_commit_at=_now() if is_newer else before["last_commit_at"],
            waits_for=progress.missing_workers or progress.missing or progress.work.bottleneck,
            num_failures=len(progress.failures),
            documents_measured=progress.num_measured,
            documents_planned=progress.num_documents,
            failures=self._failures(progress),
            **_counts_of(self._reused, progress.counts),
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

    def _failures(self, progress: Progress) -> list[dict[str, str]]:
        """The first ``MOST_LISTED`` failures with their files."""
        listed: list[dict[str, str]] = self._body["failures"]
        if len(listed) == min(len(progress.failures), MOST_LISTED):
            return listed
        first = progress.failures[:MOST_LISTED]
        wanted = {shard for shard, _ in first}
        files = {s.id: s.slices[0].uri for s in self._shards if s.id in wanted}
        return [
            {"shard": shard, "uri": files[shard], "reason": reason[:MOST_CHARS]}
            for shard, reason in first
        ]

    def end(self, phase: str, exit_code: int, reason: str) -> None:
        """Record the last phase: "complete", "stopped" (resumable) or "failed".

        Waits until it is written, for at most ``END_S``.
        """
        # Nothing was to do: nothing is written.
        if phase == "complete" and not self._body["run"]:
            self._uri = ""
        self._set(
            phase=phase,
            doing="",
            waits_for="",
            left_s=None,
            exit_code=exit_code,
            reason=reason[:MOST_CHARS],
        )
        self._over.set()
        self._changed.set()
        self._thread.join(END_S)

    def _set(self, **values: Any) -> None:
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
        storage.write_over(uri, (json.dumps(body, indent=1) + "\n").encode())


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
        code = (
            error.exit_code
            if isinstance(error, AfnError)
            else Interrupted.exit_code
            if stopped
            else 1
        )
        reason = "" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        reporter.end("stopped" if stopped else "failed", code, reason)
        raise
    reporter.end("complete", 0, "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _counts_of(reused: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, int]:
    """Counts of committed shards, those of earlier calls (``reused``) included.

    Bytes read and written are those of this call alone.
    """
    total = {k: n + counts.get(k, 0) for k, n in reused.items()}
    total["documents_quarantined"], total["bytes_lost"] = (
        total.pop("quarantined"),
        total.pop("lost_bytes"),
    )
    return total | {k: counts.get(k, 0) for k in ("bytes_read", "bytes_written")}


# --- reading


@dataclass(frozen=True, slots=True)
class Status:
    """Status of a run as a reader sees it.

    ``state`` is the run's phase, or one of two more. "silent": the driver has not written for
    ``SILENT_S``. "begun": no status was ever written, since the driver was killed at once, or is of
    an afn-ray without statuses.
    """

    uri: str
    state: str
    # age of the status by the store's clock; None: the run has ended, or has no status
    age_s: float | None
    body: dict[str, Any]  # as the driver wrote it; for a complete run, from its run.json

    @property
    def last_word(self) -> str:
        """Time of the driver's last write, ISO 8601, UTC; empty where it never wrote."""
        return str(self.body.get("written_at", ""))

    @property
    def exit_code(self) -> int:
        """Exit code of ``afn status`` for this run."""
        return EXIT_CODES.get(self.state, STOPPED if self.state == "begun" else UNDER_WAY)


def read_status(uri: str, last: int = 20) -> tuple[Status, ...]:
    """Status of the run at ``uri``, or of the ``last`` runs of a store, newest first.

    A run that has no name yet comes first. Raises ``StoreError`` where ``uri`` is neither, and
    ``Interrupted`` when the store does not answer.
    """
    uri = uris.absolute(uri).rstrip("/")
    store, _, name = uri.rpartition("/runs/")
    if name and "/" not in name and {"plan.parquet", "run.json"} & {*storage.list_names(uri)}:
        found = _Look(store).run(name)
        return (found,) if found is not None else ()
    names = manifest.run_names(uri)[: -last - 1 : -1]
    planning = uris.join(uri, PLANNING)
    body = _read(planning)
    if not names and body is None:
        raise StoreError(
            f"{uri} is neither a store nor a run; a store is what was given to 'afn run --store'"
        )
    look = _Look(uri)
    with ThreadPoolExecutor(checksums.IO_THREADS) as pool:
        looks = zip(names, pool.map(look.run, names), strict=True)
    runs = [
        s for name, s in looks if s is not None and s.body.get("run", name) == name
    ]  # a status with another run's name was copied there
    if body is not None:
        ahead = look.judge(planning, planning, body)
        # A driver that died before its run had a name is not reported once a run has a newer
        # status.
        if ahead.state not in ("silent", *EXIT_CODES) or all(
            r.last_word <= ahead.last_word for r in runs
        ):
            runs.insert(0, ahead)
    return tuple(runs)


def _read(uri: str) -> dict[str, Any] | None:
    """The status in ``uri``; None where there is none that can be read."""
    try:
        data = storage.read_if_there(uri, MOST_BYTES)
        body = json.loads(data) if data is not None else None
    except (StoreError, ValueError, RecursionError):  # too long, half written, or not a status
        return None
    return body if _is_status(body) else None


def _is_status(body: Any) -> bool:
    """Whether ``body`` has the keys and types of a status: anyone may write to a store."""

    def numbers(value: dict[str, Any], names: Sequence[str]) -> bool:
        return not value or all(type(value.get(name)) is int for name in names)

    def fits(value: Any, like: Any) -> bool:
        if like is None:
            return value is None or isinstance(value, int | float | str)
        return (
            isinstance(value, int | float)
            if isinstance(like, int | float)
            else isinstance(value, type(like))
        )

    return (
        isinstance(body, dict)
        and all(name in body and fits(body[name], like) for name, like in NOTHING.items())
        and body["schema_version"] == NOTHING["schema_version"]
        and numbers(body["shards"], SHARDS)
        and numbers(body["workers"], WORKERS)
        and (body["left_s"] is None or isinstance(body["left_s"], int | float))
        and (body["documents_planned"] is None or type(body["documents_planned"]) is int)
        and all(isinstance(text, str) for text in [*body["corpus"], *body["notices"]])
        and all(
            isinstance(f, dict) and {"shard", "uri", "reason"} <= f.keys() for f in body["failures"]
        )
    )


class _Look:
    """Reads the runs of a store and asks for the store's time at most once."""

    def __init__(self, store: str) -> None:
        self._store, self._now_s, self._asks = store, 0.0, threading.Lock()

    def run(self, name: str) -> Status | None:
        """Status of the run ``name``; None: there is no such run, or a gc has removed it."""
        folder = manifest.open_folder(self._store, name)
        if folder.condemned:
            return None
        if folder.info:
            with checksums.named_damage(uris.join(folder.uri, "run.json")):
                return Status(folder.uri, "complete", None, _body_of(folder.info))
        uri = uris.join(folder.uri, STATUS)
        if (body := _read(uri)) is not None:
            return self.judge(folder.uri, uri, body)
        if storage.modified_s(plan := uris.join(folder.uri, "plan.parquet")) is None:
            return None
        found = self.judge(folder.uri, plan, {**NOTHING, "phase": "starting"})
        return (
            Status(folder.uri, "begun", None, {"run": name})
            if found.state == "silent"
            else replace(found, body={"run": name})
        )

    def judge(self, run_uri: str, uri: str, body: dict[str, Any]) -> Status:
        """Status by the ``body`` in ``uri``, with its age."""
        if body["phase"] in EXIT_CODES:
            return Status(run_uri, body["phase"], None, body)
        modified_s = storage.modified_s(uri)
        # no such file any more: its run has a name now
        age_s = 0.0 if modified_s is None else max(0.0, self._now() - modified_s)
        return Status(run_uri, "silent" if age_s > SILENT_S else body["phase"], age_s, body)

    def _now(self) -> float:
        with self._asks:
            if not self._now_s:
                try:
                    self._now_s = probes.clock_s(self._store)
                except StoreError:  # a reader without write access uses this machine's clock
                    self._now_s = time.time()
            return self._now_s


def _body_of(info: dict[str, Any]) -> dict[str, Any]:
    """The run.json of a complete run, with the keys of a status."""
    counts, quarantined = info["counts"], info.get("quarantined", [])
    return {
        "run": info["id"],
        "phase": "complete",
        "began_at": info["created_at"],
        "written_at": info["finished_at"],
        "corpus": list(info["config"].get("corpus", []))[:MOST_LISTED],
        "model": info["config"].get("model", ""),
        "shards": {
            "planned": counts.get("shards", 0) + len(quarantined),
            "reused": counts.get("shards_reused", 0),
            "done": counts.get("shards", 0),
            "running": 0,
            "quarantined": len(quarantined),
        },
        "tokens": counts.get("tokens", 0),
        "documents": counts.get("documents", 0),
        "documents_quarantined": counts.get("quarantined", 0),
        "bytes_lost": counts.get("lost_bytes", 0),
        "failures": quarantined[:MOST_LISTED],
        "num_failures": len(quarantined),
        "exit_code": 0,
    }


def to_json(status: Status) -> dict[str, Any]:
    """``status`` for machines."""
    age_s = None if status.age_s is None else round(status.age_s, 1)
    return {"uri": status.uri, "state": status.state, "age_s": age_s, **status.body}


# --- for people


def lines(s: Status) -> Iterator[str]:
    """Lines that describe one run, one fact a line."""
    body = s.body
    yield f"run      {s.uri}"
    yield f"state    {_said_state(s)}"
    if "phase" not in body:
        return
    by = f", by {body['host']} (pid {body['pid']})" if "host" in body else ""
    yield f"begun    {body['began_at']}{by}"
    yield f"corpus   {', '.join(body['corpus'])}"
    live = s.state not in EXIT_CODES
    if planned := body["shards"].get("planned"):
        shards = body["shards"]
        parts = [f"{shards['done']:,} of {planned:,} done ({shards['done'] / planned:.1%})"]
        parts += [f"{shards['reused']:,} of them before"] if shards["reused"] else []
        parts += [f"{shards['running']:,} on workers"] if live and shards["running"] else []
        parts += [f"{shards['quarantined']:,} quarantined"] if shards["quarantined"] else []
        parts += [f"{body['retries']:,} tried again"] if body.get("retries") else []
        yield f"shards   {', '.join(parts)}"
        bad = body["documents_quarantined"]
        yield (
            f"tokens   {body['tokens']:,}, from {count(body['documents'], 'document')}"
            + (f", {bad:,} of them quarantined" if bad else "")
        )
    if lost := body["bytes_lost"]:
        yield (
            f"lost     {losses.said_bytes(lost)} of the corpus; 'afn show' of the complete run "
            "names the files"
        )
    if live and body["documents_planned"]:
        planned = count(body["documents_planned"], "document")
        yield f"measured {body['documents_measured']:,} of {planned} of this call"
    if body.get("tokens_per_s"):
        left = f", {said_time(body['left_s'])} left" if live and body["left_s"] is not None else ""
        yield f"rate     {body['tokens_per_s']:,.0f} tokens/s{left}"
    if live and body["workers"]:
        lost = f", {body['workers']['lost']:,} lost so far" if body["workers"]["lost"] else ""
        yield f"workers  {body['workers']['ready']:,} of {body['workers']['wanted']:,} ready{lost}"
    if live and body["waits_for"]:
        yield f"waits    {body['waits_for']}"
    if body.get("last_commit_at"):
        yield f"commit   the last at {body['last_commit_at']}"
    for failure in body.get("failures", []):
        yield f"failed   shard {failure['shard']} ({failure['uri']}): {failure['reason']}"
    if (more := body.get("num_failures", 0) - len(body.get("failures", []))) > 0:
        yield f"failed   and {count(more, 'more shard')}"
    for notice in body.get("notices", [])[-3:]:
        yield f"notice   {notice}"


def _said_state(s: Status) -> str:
    """The state of a run in words."""
    body = s.body
    if s.state == "starting" and "phase" not in body:
        return "begun a moment ago"
    if s.state == "complete":
        return f"complete since {body['written_at']}"
    if s.state == "begun":
        return "begun, and no word since: killed? The same 'afn run' command resumes"
    reason = f": {body['reason'].splitlines()[0]}" if body["reason"] else ""
    if s.state == "failed":
        return f"failed at {body['written_at']}, exit code {body['exit_code']}{reason}"
    if s.state == "stopped":
        return (
            f"stopped at {body['written_at']}, exit code {body['exit_code']}; the same command "
            f"resumes{reason}"
        )
    doing = f" ({body['doing']})" if body["doing"] else ""
    assert s.age_s is not None
    if s.state == "silent":
        since = said_time(s.age_s)
        return (
            f"silent: no word for {since}, while {body['phase']}{doing}: killed? "
            "The same command resumes"
        )
    return f"{body['phase']}{doing}, told {said_time(s.age_s)} ago"


def said_time(seconds: float) -> str:
    """``seconds`` for people: 90 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def table(runs: Sequence[Status]) -> Iterator[str]:
    """Runs of a store as a table: a heading, then one line per run."""
    rows = [("STATE", "BEGUN", "SHARDS", "TOKENS", "RUN", "CORPUS")]
    for s in runs:
        shards = s.body.get("shards") or {}
        rows.append(
            (
                s.state,
                s.body.get("began_at", "")[:16].replace("T", " "),
                f"{shards['done']:,}/{shards['planned']:,}" if shards.get("planned") else "",
                f"{s.body['tokens']:,}" if s.body.get("tokens") else "",
                s.body.get("run", ""),
                ", ".join(s.body.get("corpus", [])),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            c.rjust(w) if i in (2, 3) else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
