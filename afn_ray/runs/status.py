"""Read the status of a run: a small file in its folder, which its driver rewrites.

No other part depends on it. Two drivers of one run overwrite each other's status. A store that
refuses the file causes one warning.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypedDict, TypeGuard, overload

import pyarrow as pa

from afn_ray import notebook
from afn_ray.errors import StoreError
from afn_ray.run_info import Quarantined, RunInfo
from afn_ray.store import checksums, manifest, probes, storage, uris
from afn_ray.store.layout import PLANNING, STATUS

EVERY_S = 10.0
"""Pause between two writes, in seconds.

A change of phase is written at once, but not too soon after the previous write.
"""
SILENT_S = 60.0
"""Age of the status from which on its driver counts as dead, in seconds."""
MOST_LISTED = 20
"""Largest number of failures, of newest notices and of corpus places in the file."""
COMPLETE, FAILED, USAGE, UNDER_WAY, STOPPED = 0, 1, 2, 3, 75
"""Exit codes of ``afn status``."""
EXIT_CODES = {"complete": COMPLETE, "failed": FAILED, "stopped": STOPPED, "silent": STOPPED}
"""Exit code by state; the states in it are final, except "silent"."""


class StatusBody(TypedDict, total=False):
    """A status as its driver writes it, as JSON; that of a complete run lacks some keys."""

    schema_version: int
    run: str
    phase: str
    doing: str
    began_at: str
    written_at: str
    host: str
    pid: int
    every_s: float
    corpus: list[str]
    model: str
    shards: dict[str, int]  # by ``SHARDS``, or empty
    workers: dict[str, int]  # by ``WORKERS``, or empty
    tokens: int
    documents: int
    documents_quarantined: int
    documents_measured: int
    documents_planned: int | None
    bytes_lost: int
    bytes_read: int
    bytes_written: int
    retries: int
    tokens_per_s: float
    left_s: float | None
    last_commit_at: str | None
    waits_for: str
    failures: list[Quarantined]
    num_failures: int
    notices: list[str]
    exit_code: int | None
    reason: str


NOTHING: StatusBody = {
    "schema_version": 1, "run": "", "phase": "planning", "doing": "", "began_at": "",
    "written_at": "", "host": "",
    "pid": 0, "every_s": EVERY_S, "corpus": [], "model": "", "shards": {}, "workers": {},
    "tokens": 0, "documents": 0,
    "documents_quarantined": 0, "documents_measured": 0, "documents_planned": None,
    "bytes_lost": 0, "bytes_read": 0, "bytes_written": 0, "retries": 0,
    "tokens_per_s": 0.0, "left_s": None, "last_commit_at": None, "waits_for": "", "failures": [],
    "num_failures": 0,
    "notices": [], "exit_code": None, "reason": "",
}  # fmt: skip
"""An empty status: every key, with a value of its type."""
SHARDS = ("planned", "reused", "done", "running", "quarantined")
"""Keys of ``shards`` in a status."""
WORKERS = ("wanted", "ready", "lost")
"""Keys of ``workers`` in a status."""
MOST_BYTES = manifest.MOST_STATUS_BYTES
"""Largest status that is read, in bytes; it lists ``MOST_LISTED`` failures."""


TABLE = pa.schema(
    [
        ("state", pa.string()),
        ("run", pa.string()),
        ("began_at", pa.string()),
        ("written_at", pa.string()),
        ("shards_planned", pa.int64()),
        ("shards_done", pa.int64()),
        ("shards_reused", pa.int64()),
        ("shards_quarantined", pa.int64()),
        ("tokens", pa.int64()),
        ("documents", pa.int64()),
        ("documents_quarantined", pa.int64()),
        ("bytes_lost", pa.int64()),
        ("tokens_per_s", pa.float64()),
        ("left_s", pa.float64()),
        ("uri", pa.string()),
    ]
)
"""Columns of ``Statuses.table``; a figure that the driver did not write is null."""
MOST_INT = 1 << 62
"""Absolute value from which on a number of a status is none: anyone may write to a store."""


@dataclass(frozen=True, slots=True)
class Status:
    """Status of a run as a reader sees it.

    ``state`` is the run's phase ("planning", "pilot", "starting", "working", "reducing",
    "screening", "complete", "failed", "stopped"), or one of two more. "silent": the driver has not
    written for ``SILENT_S``. "begun": no status was ever written, since the driver was killed at
    once, or is of an afn-ray without statuses.
    """

    uri: str
    state: str
    # age of the status by the store's clock; None: the run has ended, or has no status
    age_s: float | None
    body: StatusBody  # as the driver wrote it; for a complete run, from its run.json

    @property
    def run(self) -> str:
        """Name of the run; empty while it has none."""
        return str(self.body.get("run", ""))

    @property
    def last_write(self) -> str:
        """Time of the driver's last write, ISO 8601, UTC; empty where it never wrote."""
        return str(self.body.get("written_at", ""))

    @property
    def num_shards(self) -> int | None:
        """Number of planned shards; None where it is not known yet."""
        return self._number("shards_planned")

    @property
    def num_done(self) -> int | None:
        """Number of shards in the store; None where it is not known yet."""
        return self._number("shards_done")

    @property
    def tokens(self) -> int | None:
        """Number of tokens measured, special ones included; None where it is not known yet."""
        return self._number("tokens")

    @property
    def documents(self) -> int | None:
        """Number of documents read; None where it is not known yet."""
        return self._number("documents")

    @property
    def left_s(self) -> float | None:
        """Time left in seconds by the driver's estimate; None without one."""
        value = self.body.get("left_s")
        return None if value is None else float(value)

    def _number(self, column: str) -> int | None:
        """The value of a column of ``TABLE`` that is a whole number."""
        value: object
        if column.startswith("shards_"):
            value = self.body.get("shards", {}).get(column.removeprefix("shards_"))
        else:
            value = self.body.get(column)
        return value if type(value) is int and abs(value) < MOST_INT else None

    def _row(self) -> dict[str, object]:
        """The row of ``TABLE``."""
        row: dict[str, object] = {"state": self.state, "run": self.run, "uri": self.uri}
        row |= {"began_at": self.body.get("began_at"), "written_at": self.last_write}
        row |= {"tokens_per_s": self.body.get("tokens_per_s"), "left_s": self.left_s}
        for field in TABLE:
            if pa.types.is_integer(field.type):
                row[field.name] = self._number(field.name)
        return row

    @property
    def exit_code(self) -> int:
        """Exit code of ``afn status`` for this run."""
        if self.state == "begun":
            return STOPPED
        return EXIT_CODES.get(self.state, UNDER_WAY)


@dataclass(frozen=True, slots=True)
class Statuses(Sequence[Status]):
    """Statuses of runs, newest first; a sequence of them."""

    runs: tuple[Status, ...]

    @overload
    def __getitem__(self, at: int) -> Status: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Status, ...]: ...
    def __getitem__(self, at: int | slice) -> Status | tuple[Status, ...]:
        return self.runs[at]

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def table(self) -> pa.Table:
        """One row for each run, with the columns of ``TABLE``; times are ISO 8601, in UTC."""
        return pa.Table.from_pylist([status._row() for status in self.runs], TABLE)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        return notebook.table("Runs", self.table)


def read_status(uri: str, last: int = 20) -> Statuses:
    """Status of the run at ``uri``, or of the ``last`` runs of a store, newest first.

    The driver of a run writes it into the store every ten seconds, so this works from any machine
    that reads the store. A run that has no name yet comes first. Raises ``StoreError`` where
    ``uri`` is neither, and ``Interrupted`` when the store does not answer.
    """
    uri = uris.absolute(uri).rstrip("/")
    store, name = manifest.split_uri(uri)
    if name and {"plan.parquet", "run.json"} & set(storage.list_names(uri)):
        found = _StatusReader(store).status_of_run(name)
        if found is None:
            raise StoreError(f"run {uri} was removed by 'afn gc'")
        return Statuses((found,))
    newest_first = manifest.run_names(uri)[::-1]
    names = newest_first[:last]
    planning = uris.join(uri, PLANNING)
    body = _read(planning)
    if not names and body is None:
        raise StoreError(
            f"{uri} is neither a store nor a run; a store is what was given to 'afn run --store'"
        )
    reader = _StatusReader(uri)
    runs = reader.statuses_of_runs(names)
    if body is not None:
        unnamed = reader.status(planning, planning, body)
        has_ended = unnamed.state in ("silent", *EXIT_CODES)
        is_newest = all(status.last_write <= unnamed.last_write for status in runs)
        # A driver that died before its run had a name is not reported once a run has a newer
        # status.
        if is_newest or not has_ended:
            runs.insert(0, unnamed)
    return Statuses(tuple(runs))


def _read(uri: str) -> StatusBody | None:
    """The status in ``uri``; None where there is none that can be read."""
    try:
        data = storage.read_if_there(uri, MOST_BYTES)
        body = json.loads(data) if data is not None else None
    except (StoreError, ValueError, RecursionError):  # too long, half written, or not a status
        return None
    return body if _is_status(body) else None


def _is_status(body: Any) -> TypeGuard[StatusBody]:
    """True if ``body`` has the keys and types of a status: anyone may write to a store."""
    if not isinstance(body, dict):
        return False
    for name, like in NOTHING.items():
        if name not in body or not _is_like(body[name], like):
            return False
    if body["schema_version"] != NOTHING["schema_version"]:
        return False
    if not _are_counts(body["shards"], SHARDS) or not _are_counts(body["workers"], WORKERS):
        return False
    left_s = body["left_s"]
    if left_s is not None and not isinstance(left_s, int | float):
        return False
    num_planned = body["documents_planned"]
    if num_planned is not None and type(num_planned) is not int:
        return False
    texts = [*body["corpus"], *body["notices"]]
    if not all(isinstance(text, str) for text in texts):
        return False
    return all(_is_failure(failure) for failure in body["failures"])


def _is_like(value: Any, like: Any) -> bool:
    """True if ``value`` has the type of ``like``, a value of ``NOTHING``."""
    if like is None:
        return value is None or isinstance(value, int | float | str)
    if isinstance(like, int | float):
        return isinstance(value, int | float)
    return isinstance(value, type(like))


def _are_counts(value: Mapping[str, object], names: Sequence[str]) -> bool:
    """True if ``value`` is empty or has an integer for each of ``names``."""
    return not value or all(type(value.get(name)) is int for name in names)


def _is_failure(value: Any) -> bool:
    """True if ``value`` describes a quarantined shard."""
    return isinstance(value, dict) and {"shard", "uri", "reason"} <= value.keys()


class _StatusReader:
    """Reads the statuses of a store and asks for the store's time at most once."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._now_s = 0.0
        self._lock = threading.Lock()

    def statuses_of_runs(self, names: Sequence[str]) -> list[Status]:
        """Statuses of the runs ``names``, in that order, without those that ``status_of_run``
        lacks.
        """
        with ThreadPoolExecutor(checksums.IO_THREADS) as pool:
            found = list(pool.map(self.status_of_run, names))
        statuses: list[Status] = []
        for name, status in zip(names, found, strict=True):
            # a status with another run's name was copied there
            if status is not None and status.body.get("run", name) == name:
                statuses.append(status)
        return statuses

    def status_of_run(self, name: str) -> Status | None:
        """Status of the run ``name``; None: there is no such run, or a gc has removed it."""
        folder = manifest.open_folder(self._store, name)
        if folder.condemned:
            return None
        if folder.info:
            with checksums.named_damage(uris.join(folder.uri, "run.json")):
                return Status(folder.uri, "complete", None, _body_of(folder.info))
        uri = uris.join(folder.uri, STATUS)
        body = _read(uri)
        if body is not None:
            return self.status(folder.uri, uri, body)
        plan = uris.join(folder.uri, "plan.parquet")
        if storage.modified_s(plan) is None:
            return None
        found = self.status(folder.uri, plan, {**NOTHING, "phase": "starting"})
        if found.state == "silent":
            return Status(folder.uri, "begun", None, {"run": name})
        return replace(found, body={"run": name})

    def status(self, run_uri: str, uri: str, body: StatusBody) -> Status:
        """Status by the ``body`` in ``uri``, with its age."""
        if body["phase"] in EXIT_CODES:
            return Status(run_uri, body["phase"], None, body)
        modified_s = storage.modified_s(uri)
        age_s = 0.0
        if modified_s is not None:  # else the file is gone, because its run has a name now
            age_s = max(0.0, self._now() - modified_s)
        state = "silent" if age_s > SILENT_S else body["phase"]
        return Status(run_uri, state, age_s, body)

    def _now(self) -> float:
        with self._lock:
            if not self._now_s:
                try:
                    self._now_s = probes.clock_s(self._store)
                except StoreError:  # a reader without write access uses this machine's clock
                    self._now_s = time.time()
            return self._now_s


def _body_of(info: RunInfo) -> StatusBody:
    """The run.json of a complete run, with the keys of a status."""
    counts = info["counts"]
    config = info["config"]
    quarantined = info.get("quarantined", [])
    num_done = counts.get("shards", 0)
    return {
        "run": info["id"],
        "phase": "complete",
        "began_at": info["created_at"],
        "written_at": info["finished_at"],
        "corpus": list(config.get("corpus", []))[:MOST_LISTED],
        "model": config.get("model", ""),
        "shards": {
            "planned": num_done + len(quarantined),
            "reused": counts.get("shards_reused", 0),
            "done": num_done,
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


def to_json(status: Status) -> dict[str, object]:
    """``status`` for machines."""
    age_s = None if status.age_s is None else round(status.age_s, 1)
    return {"uri": status.uri, "state": status.state, "age_s": age_s, **status.body}
