"""Every order of the storage calls of a few processes, each run with the product's own code on a
store in memory.

A process is a thread that stops before each call. One is let go at a time, so a run of all of them
is a list of choices, and all lists are tried. Two things leave out orders that give nothing new
(both Godefroid, 1996): a "sleep set" leaves out the second order of two calls that do not touch the
same name, and a moment that equals an earlier one is not gone on from again. Two moments are equal
where the store holds the same and each process has seen the same.
"""

from __future__ import annotations

import functools
import itertools
import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from afn_ray.errors import StoreError
from afn_ray.store import manifest, probes, run_claims, shard_files, storage, uris

STORE = "/model"
MOST_CALLS = 80
MOST_CHANGES = 4
NOW_S = 1e6
WAIT_S = 60.0
"""Longest that a process may take between two calls."""


class Still(datetime):
    """A clock that stands still, so that the same moment comes again in another order."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Still:
        return cls.fromtimestamp(NOW_S, tz)


class Ended(BaseException):
    """This order is not tried to its end, or the process was killed."""


@dataclass(frozen=True)
class Call:
    """One call that a process is about to make."""

    # "read", "list", "write", "delete", or "lost delete" where DELETEs are counted to lose one
    kind: str
    # of a file, or of the folder that is listed or in which several files are written or deleted
    name: str

    def commutes(self, other: Call) -> bool:
        """True if the two give the same in either order."""
        if {self.kind, other.kind} <= {"read", "list"} or self.kind == other.kind == "delete":
            return True
        a, b = f"{self.name}/", f"{other.name}/"
        return not a.startswith(b) and not b.startswith(a)


@dataclass
class Process:
    """One process: its body, and where it is."""

    name: str
    body: Callable[[], Any]
    killed_at: int | None = None  # before which of its calls
    result: Any = None
    error: BaseException | None = None
    num_calls: int = 0
    call: Call | None = None
    over: bool = False
    seen: bytes = b""  # digest of its calls and of what they gave
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class World:
    """A store in memory, and the processes that share it."""

    def __init__(self, *, coarse: bool = False) -> None:
        """``coarse``: listing a store is one call, and so are writes and DELETEs of tables in one
        folder in a row.
        """
        self.coarse = coarse
        self.files: dict[str, bytes] = {}
        self.old: frozenset[str] = (
            frozenset()
        )  # names of files that are older than a day; others are of now
        self.processes: list[Process] = []
        self.on_delete: list[Callable[[str], None]] = []  # called ahead of each
        self.deletes = 0  # of shards' files
        self.fault = ("", 0)
        self.echoes: list[str] = []  # names whose DELETE acts late, or again
        self.ended = False
        self._of_thread: dict[int, Process] = {}
        self._stopped = threading.Semaphore(0)
        self._ids = itertools.count()
        self.history: list[str] = []  # what was called, by whom

    # --- processes ---

    def start(self, *processes: Process) -> None:
        self.processes = list(processes)
        for process in processes:
            threading.Thread(target=self._live, args=(process,), daemon=True).start()
            self._wait()

    def _wait(self) -> None:
        assert self._stopped.acquire(timeout=WAIT_S), "a process neither calls nor ends"

    def _live(self, process: Process) -> None:
        self._of_thread[threading.get_ident()] = process
        try:
            process.result = process.body()
        except Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - told to whoever judges
            process.error = error
        process.over, process.call = True, None
        self._stopped.release()

    def step(self, process: Process) -> None:
        """Let ``process`` make the call that it stands before, and go on to its next."""
        if process.call is not None:
            self.history.append(f"{process.name:6} {process.call.kind:6} {process.call.name}")
        process.go.release()
        self._wait()

    def end(self) -> None:
        """Have every process that is not over end."""
        self.ended = True
        for process in self.processes:
            while not process.over:
                self.step(process)

    def about(self, kind: str, name: str) -> None:
        process = self._of_thread.get(threading.get_ident())
        if process is None:  # before the processes start, or behind their end
            return
        if self.coarse and kind in ("write", "delete") and name.endswith(".parquet"):
            name = name.rpartition("/")[0]
            if process.call == Call(kind, name):
                return
        if process.num_calls != process.killed_at and not self.ended:
            process.call = Call(kind, name)
            self._stopped.release()
            process.go.acquire()
        if self.ended or process.num_calls == process.killed_at:
            raise Ended
        process.num_calls += 1

    def gave(self, *values: object) -> None:
        """The call that was let go gave its process these ``values``."""
        process = self._of_thread.get(threading.get_ident())
        if process is not None:
            process.seen = blake2b(
                repr((process.seen, process.call, values)).encode(), digest_size=16
            ).digest()

    @staticmethod
    @functools.cache
    def digest(data: bytes) -> bytes:
        return blake2b(data, digest_size=16).digest()

    def moment(self) -> bytes:
        """Digest of all that what comes depends on: the store, what each process has seen, and
        faults to come.
        """
        files = sorted((name, self.digest(data)) for name, data in self.files.items())
        processes = [(p.seen, p.call, p.over) for p in self.processes]
        return blake2b(
            repr((files, processes, self.deletes, self.echoes)).encode(), digest_size=16
        ).digest()

    # --- the store ---

    def read_if_there(self, uri: str, most_bytes: int | None = None) -> bytes | None:
        self.about("read", uri)
        data = self.files.get(uri)
        self.gave(None if data is None else self.digest(data))
        return data

    def read_bytes(self, uri: str, start: int | None = None, end: int | None = None) -> bytes:
        data = self.read_if_there(uri)
        if data is None:
            raise StoreError(f"reading {uri}: no such file or folder") from FileNotFoundError()
        return data[start:end]

    def exists(self, uri: str) -> bool:
        return self.read_if_there(uri) is not None

    def list_names(self, uri: str) -> list[str]:
        self.about("list", uri)
        below = [name.removeprefix(f"{uri}/") for name in self.files if name.startswith(f"{uri}/")]
        names = sorted({name.split("/")[0] for name in below})
        self.gave(names)
        return names

    def list_below(self, uri: str) -> list[storage.StoredFile]:
        folders = (
            [f"{STORE}/{name}" for name in ("gc", "runs", "shards")] if uri == STORE else [uri]
        )
        found = []
        if self.coarse:
            self.about("list", uri)
        for folder in folders:  # page by page: no listing of a whole store is of one moment
            if not self.coarse:
                self.about("list", folder)
            names = [n for n in sorted(self.files) if n.startswith(f"{folder}/")]
            self.gave(names, [len(self.files[n]) for n in names])
            found += names
        return [
            storage.StoredFile(n, len(self.files.get(n, b"")), 0.0 if n in self.old else NOW_S)
            for n in found
        ]

    def write_once(self, uri: str, data: bytes) -> None:
        self.about("write", uri)
        self.gave(uri in self.files)
        if uri in self.files:
            raise storage.AlreadyWritten(uri)
        self.files[uri] = data

    def write_over(self, uri: str, data: bytes, retry_for_s: float | None = 0) -> None:
        self.about("write", uri)
        self.gave()
        self.files[uri] = data

    def upload(self, local: Path, uri: str) -> None:
        self.write_over(uri, local.read_bytes())

    def remove(self, uri: str, retry_for_s: float | None = None) -> None:
        self.about("lost delete" if self.fault[0] else "delete", uri)
        self.gave()
        if "/shards/" in uri:
            how, at = self.fault
            if how and self.deletes == at:
                self.echoes.append(uri)
            self.deletes += 1
            if how == "late" and self.deletes == at + 1:
                return
        self._delete(uri)

    def lose(self, how: str, at: int) -> None:
        """The ``at``-th DELETE of a shard's file is answered, and acts "late", when it is echoed,
        or "twice".
        """
        self.fault, self.deletes = (how, at), 0

    def echo(self) -> None:
        """Have the DELETE act that was lost."""
        while self.echoes:
            uri = self.echoes[0]
            self.about("lost delete", uri)
            self.gave(uri in self.echoes)
            if uri in self.echoes:
                self.echoes.remove(uri)
                self._delete(uri)

    def _delete(self, uri: str) -> None:
        if uri in self.files:
            for check in self.on_delete:
                check(uri)
            del self.files[uri]

    def put_in_place(self, patch: pytest.MonkeyPatch) -> None:
        """The product's door to stores leads here."""
        for name in (
            "read_if_there",
            "read_bytes",
            "exists",
            "list_names",
            "list_below",
            "write_once",
            "write_over",
            "upload",
            "remove",
        ):
            patch.setattr(storage, name, getattr(self, name))
        patch.setattr(uris, "absolute", lambda uri: uri)
        patch.setattr(storage, "remove_if_empty", lambda uri: None)
        patch.setattr(probes, "clock_s", lambda uri: NOW_S)
        for module in (run_claims, manifest, shard_files):
            patch.setattr(module, "datetime", Still)
        patch.setattr(uuid, "uuid4", self.unlike)

    def unlike(self) -> uuid.UUID:
        """An id that no other call gets, and that the same call of the same process gets in each
        order.
        """
        process = self._of_thread.get(threading.get_ident())
        if process is None:
            return uuid.UUID(int=next(self._ids))
        return uuid.UUID(int=(1 + self.processes.index(process)) << 64 | process.num_calls)


class Inline:
    """An executor in the caller's own thread, so that a process is one thread."""

    def __init__(self, *args: object) -> None: ...

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *args: object) -> None: ...

    def map(self, call: Callable[..., Any], *values: Iterable[Any]) -> Iterator[Any]:
        return map(call, *values)


def sample(make: Callable[[], World], judge: Callable[[World], None], seeds: Iterable[int]) -> int:
    """Does as ``explore``, in one random order for each of ``seeds``; returns how many these were.

    The first process goes on until it has to wait for another: at a few random calls, as faults of
    order need no more (Burckhardt and others, 2010, "probabilistic concurrency testing").
    """
    num = 0
    for num, seed in enumerate(seeds, 1):  # noqa: B007
        dice = random.Random(seed)
        world = make()
        order = dice.sample(world.processes, len(world.processes))
        changes = {dice.randrange(MOST_CALLS) for _ in range(dice.randint(0, MOST_CHANGES))}
        for at in itertools.count():
            ready = [p for p in order if not p.over]
            if not ready:
                break
            if at in changes:
                order.remove(ready[0])
                order.append(ready[0])
                ready = ready[1:] or ready
            world.step(ready[0])
        _judge(world, judge)
    return num


def _judge(world: World, judge: Callable[[World], None]) -> None:
    try:
        judge(world)
    except BaseException as error:
        error.add_note("\n".join(world.history))
        raise


@dataclass
class _Node:
    """A moment at which several processes could go on."""

    calls: dict[int, Call]  # by process, of those that are not over
    asleep: set[int]  # whose call, made now, gives nothing new
    tried: set[int] = field(default_factory=set)
    chosen: int = -1


def explore(
    make: Callable[[], World], judge: Callable[[World], None], most: int | None = None
) -> tuple[int, bool]:
    """Run ``make``'s world in every order and call ``judge`` with each at its end.

    Returns how many orders were judged, and whether these were all; ``most``: stop behind so many
    tries, some of which only repeat others.
    """
    path: list[_Node] = []
    been: dict[
        bytes, list[set[int]]
    ] = {}  # moments, each with the sleep sets that it was gone on from with
    judged = tried = 0
    while True:
        world = make()
        tried += 1
        depth, redundant = 0, False
        while calls := {i: p.call for i, p in enumerate(world.processes) if p.call is not None}:
            if depth == len(path):
                asleep: set[int] = set()
                if path:
                    last = path[-1]
                    made = last.calls[last.chosen]
                    asleep = {
                        i
                        for i in last.asleep | (last.tried - {last.chosen})
                        if i in calls and last.calls[i].commutes(made)
                    }
                free = [i for i in calls if i not in asleep]
                before = been.setdefault(world.moment(), [])
                if not free or any(slept <= asleep for slept in before):
                    redundant = True
                    break
                before.append(asleep)
                path.append(_Node(calls, asleep))
                path[-1].chosen = free[0]
                path[-1].tried.add(free[0])
            world.step(world.processes[path[depth].chosen])
            depth += 1
        if redundant:
            world.end()
        else:
            judged += 1
            _judge(world, judge)
        if most is not None and tried >= most:
            return judged, False
        while path:
            node = path[-1]
            if left := [i for i in node.calls if i not in node.tried and i not in node.asleep]:
                node.chosen = left[0]
                node.tried.add(left[0])
                break
            path.pop()
        if not path:
            return judged, True


def explore_switches(
    make: Callable[[], World], judge: Callable[[World], None], switches: int
) -> int:
    """Run ``make``'s world in every order in which a process is interrupted at most ``switches``
    times, and call ``judge`` with each at its end.

    Returns the number of orders judged. A switch to another process after one has ended is free
    (Musuvathi and Qadeer, 2007, "iterative context bounding").
    """
    judged = 0
    been: dict[tuple[bytes, int | None], int] = {}  # moments, with the switches that were left
    stack: list[tuple[list[int], int]] = [([], switches)]
    while stack:
        order, left = stack.pop()
        world = make()
        for i in order:
            world.step(world.processes[i])
        while ready := [i for i, p in enumerate(world.processes) if not p.over]:
            running = order[-1] if order and order[-1] in ready else None
            moment = world.moment(), running
            if been.get(moment, -1) >= left:
                world.end()
                break
            been[moment] = left
            chosen = ready[0] if running is None else running
            cost = 0 if running is None else 1
            if cost <= left:
                stack += [([*order, i], left - cost) for i in ready if i != chosen]
            world.step(world.processes[chosen])
            order = [*order, chosen]
        else:
            judged += 1
            _judge(world, judge)
    return judged
