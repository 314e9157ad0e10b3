"""A filesystem over another one, every call of which may go wrong: what a bucket does on a bad
night, by a seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec
import pytest
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from afn_ray.store import retry

KINDS = ("fail", "slow", "lie", "stale")
METHODS = ("info", "ls", "find", "cat_file", "pipe_file", "put_file", "rm_file")
SLOW_S = 0.002


def s3_error(code: str, status: int, operation: str = "PutObject") -> BaseException:
    """Error of s3fs when S3 answers ``code`` with the HTTP ``status``."""
    answer = {
        "Error": {"Code": code, "Message": f"said {code}"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    error: BaseException = translate_boto_error(botocore.exceptions.ClientError(answer, operation))
    return error


TRANSIENT: tuple[Callable[[], BaseException], ...] = (
    lambda: s3_error("SlowDown", 503),
    lambda: s3_error("InternalError", 500),
    lambda: s3_error("ConditionalRequestConflict", 409),
    lambda: s3_error("TooManyRequests", 429),
    lambda: botocore.exceptions.EndpointConnectionError(endpoint_url="http://bucket"),
    lambda: botocore.exceptions.ReadTimeoutError(endpoint_url="http://bucket"),
    lambda: aiohttp.ServerDisconnectedError(),
    lambda: aiohttp.ClientPayloadError("Response payload is not completed"),
    lambda: FSTimeoutError(),
    lambda: asyncio.TimeoutError(),  # noqa: UP041
    lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    lambda: socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
)


@dataclass
class Schedule:
    """Faults of calls; a call's fate depends on the seed, its method, its path and
    its turn there.

    So it does not depend on the order of threads. ``injected`` counts what was done, by kind and
    method.
    """

    seed: int
    rate: float
    kinds: tuple[str, ...] = KINDS
    methods: tuple[str, ...] = METHODS
    injected: Counter[tuple[str, str]] = field(default_factory=Counter)
    _turns: Counter[tuple[str, str]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fate(self, method: str, path: str, *, has_older: bool) -> tuple[str, random.Random]:
        """The kind of fault of this call, or "" for none, and what else it may draw from."""
        if method not in self.methods:
            return "", random.Random()
        with self._lock:
            turn = self._turns[method, path]
            self._turns[method, path] += 1
        dice = random.Random(f"{self.seed} {method} {path} {turn}")
        if has_older and "stale" in self.kinds and dice.random() < self.rate:
            return "stale", dice
        acts = [kind for kind in self.kinds if kind != "stale"]
        return (dice.choice(acts) if acts and dice.random() < self.rate else ""), dice

    def count(self, kind: str, method: str) -> None:
        with self._lock:
            self.injected[kind, method] += 1

    def total(self, kind: str) -> int:
        return sum(n for (k, _), n in self.injected.items() if k == kind)


class FaultyFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """``faulty://<protocol>/<path>`` is ``<protocol>://<path>`` on a bad night; without a schedule,
    on a good one.

    A call may fail before it acts, be slow, act and then raise (an unknown answer), or, of
    listings, give what was true when the same folder was listed before.
    """

    protocol = "faulty"
    root_marker = ""
    schedule: Schedule | None = None
    _older: dict[tuple[str, str], Any] = {}  # noqa: RUF012

    def _call(
        self, method: str, path: str, *args: Any, listing: bool = False, **options: Any
    ) -> Any:
        schedule = FaultyFileSystem.schedule
        inner, inner_path = _inner(self._strip_protocol(path))
        call = getattr(inner, method)
        if method == "put_file":
            arguments: tuple[Any, ...] = (args[0], inner_path, *args[1:])
        else:
            arguments = (inner_path, *args)
        if schedule is None:
            return _outer(call(*arguments, **options), inner, method)
        key = (method, f"{path} {options.get('detail')}")
        kind, dice = schedule.fate(method, path, has_older=listing and key in self._older)
        if kind:
            schedule.count(kind, method)
        if kind == "fail":
            raise dice.choice(TRANSIENT)()
        if kind == "slow":
            time.sleep(dice.uniform(0, SLOW_S))
        if kind == "stale":
            return _given(self._older[key])
        try:
            answer = _outer(call(*arguments, **options), inner, method)
        except FileNotFoundError as error:
            answer = error
        if listing:
            self._older[key] = answer
        if kind == "lie":
            raise dice.choice(TRANSIENT)()
        return _given(answer)

    def info(self, path: str, **options: Any) -> Any:
        return self._call("info", path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self._call("ls", path, listing=True, detail=detail, **options)

    def find(
        self,
        path: str,
        maxdepth: Any = None,
        withdirs: bool = False,
        detail: bool = False,
        **options: Any,
    ) -> Any:
        return self._call("find", path, listing=True, detail=detail, withdirs=withdirs, **options)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> Any:
        return self._call("cat_file", path, start=start, end=end)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> Any:
        return self._call("pipe_file", path, value, mode=mode)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> Any:
        return self._call("put_file", rpath, lpath)

    def rm_file(self, path: str) -> Any:
        return self._call("rm_file", path)


def _given(answer: Any) -> Any:
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _inner(path: str) -> tuple[Any, str]:
    protocol, _, rest = path.lstrip("/").partition("/")
    fs = fsspec.filesystem(protocol, use_listings_cache=False)
    return fs, fs._strip_protocol(f"{protocol}://{rest}")


def _outer(answer: Any, fs: Any, method: str) -> Any:
    """``answer`` of the filesystem below with its names as they are here."""

    def name(path: str) -> str:
        return re.sub("^([^:]+):/+", r"\1/", fs.unstrip_protocol(path))

    def renamed(entry: Any) -> Any:
        return {**entry, "name": name(entry["name"])} if isinstance(entry, dict) else name(entry)

    if method == "info":
        return renamed(answer)
    if method == "find" and isinstance(answer, dict):
        return {name(path): renamed(entry) for path, entry in answer.items()}
    return [renamed(entry) for entry in answer] if method in ("ls", "find") else answer


def wrap(uri: str) -> str:
    """The URI of ``uri`` through the faults."""
    protocol, _, path = uri.partition("://")
    return f"faulty://{protocol}/{path}"


def unwrap(uri: str) -> str:
    """The URI below the faults; any other as it is."""
    return re.sub("^faulty://([^/]+)/", r"\1://", uri)


@contextlib.contextmanager
def injected(
    seed: int, rate: float, kinds: tuple[str, ...] = KINDS, methods: tuple[str, ...] = METHODS
) -> Iterator[Schedule]:
    """Faults on ``faulty://`` by a schedule of ``seed``; waits between tries are short
    meanwhile.
    """
    schedule = Schedule(seed, rate, kinds, methods)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "FIRST_WAIT_S", 1e-4)
        patch.setattr(retry, "LONGEST_WAIT_S", 1e-3)
        patch.setattr(FaultyFileSystem, "schedule", schedule)
        patch.setattr(FaultyFileSystem, "_older", {})
        yield schedule


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
