"""Run SQL in a separate process with hard limits, and kill it when it passes one of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from afn_ray import cgroup
from afn_ray.errors import QueryError
from afn_ray.query import processes
from afn_ray.query.files import ReadOnlyFiles
from afn_ray.query.protocol import FRAME, LENGTH, READ, Answer, Request, Setup, receive
from afn_ray.query.session import OUT_OF_MEMORY

START_S = 120.0
"""Longest start of the process, in seconds: the machine may be busy."""
POLL_MS = 20
"""Interval between two checks of a query's memory and time, in milliseconds."""
GRACE_S = 0.5
"""Time between a request to stop a query and the end of its process, in seconds."""

SPARE_BYTES = 256 << 20
"""Memory in bytes that the process may use beyond DuckDB's own limit.

Arrow's buffers, text in work and the interpreter use it.
"""
SPARE_BYTES_PER_THREAD = 16 << 20
"""Memory in bytes for the stack and the arenas of each thread."""
MAX_NAME_BYTES = 4096
"""Longest name of a file in a read request, in bytes."""
MOST_TEXT_BYTES = 64 << 20
"""Longest JSON of an answer, in bytes.

It holds an error, or the names and types of a result's columns.
"""

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
"""Powers of 1000 or 1024 by the prefix of a unit."""


def memory_bytes(text: str) -> int:
    """The number of bytes in ``text``, as DuckDB reads it: 500MB, 2GB, 1.5GiB or 50%.

    A percentage is a share of the memory that this process may have. Raises ``QueryError`` for any
    other text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?|(%))\s*", text, re.IGNORECASE)
    num_bytes = 0
    if found is not None and found[4]:
        machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        num_bytes = int(float(found[1]) / 100 * (cgroup.memory_bytes() or machine_bytes))
    elif found is not None:
        base = 1024 if found[3] else 1000
        prefix = found[2] or ""
        num_bytes = int(float(found[1]) * base ** UNITS[prefix.lower()])
    if num_bytes == 0:
        raise QueryError(
            f"the memory limit is {text!r}; expected a size such as 500MB, 2GB or 1.5GiB"
        )
    return num_bytes


@dataclass(frozen=True)
class QueryLimits:
    """Limits of one query."""

    memory: str
    """DuckDB's memory limit, as the user wrote it."""
    memory_bytes: int
    threads: int
    timeout_s: float

    @property
    def process_bytes(self) -> int:
        """Memory in bytes that the process may use beyond what it has at its start."""
        return self.memory_bytes * 9 // 8 + SPARE_BYTES + self.threads * SPARE_BYTES_PER_THREAD

    def memory_error(self) -> QueryError:
        return QueryError(
            f"the query needs more memory than its limit of {self.memory}; ask for less, as in "
            "WHERE doc < 1000, "
            "or raise the memory limit"
        )

    def time_error(self) -> QueryError:
        return QueryError(
            f"stopped after {self.timeout_s:g} s; ask for less, as in WHERE doc < 1000, or give it "
            "more time"
        )


@dataclass
class Allowance:
    """Time that is left to all requests of one query together, in seconds."""

    left_s: float


class Process:
    """The query process.

    It is started at the first request, and again after it was killed or died. Requests from several
    threads run one after another. The process ends with this object, and with the parent process.
    """

    def __init__(self, files: ReadOnlyFiles, setup: Setup, limits: QueryLimits) -> None:
        self._files = files
        self._setup = setup
        self._limits = limits
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._forgotten: deque[int] = deque()

    def ask(self, allowance: Allowance, do: str, *arguments: Any) -> tuple[int, Answer]:
        """Send a request; return its number and its answer. Its time counts in ``allowance``.

        ``do`` is a method of ``session.Session``. Raises ``QueryError`` for SQL that is wrong, is
        over a limit, or crashed the process. Raises the error of a file that could not be read.
        """
        with self._lock:
            if self._closed:
                raise QueryError("the run is closed; open it again")
            self._files.failed = None  # a stopped query may have left an error
            child = self._started()
            forget = tuple(self._forgotten.popleft() for _ in range(len(self._forgotten)))
            request = Request(next(self._numbers), do, arguments, forget)
            answer = child.ask(request, allowance)
            if _is_broken(answer):
                self._end()
            self._check(answer)
        return request.number, answer

    def forget(self, reader: int) -> None:
        """Release the reader of this request: no more batches are needed."""
        self._forgotten.append(reader)

    def close(self) -> None:
        """End the process; later requests raise ``QueryError``."""
        with self._lock:
            self._closed = True
            self._end()

    def _started(self) -> _Child:
        if self._child is None or not self._child.is_usable():
            self._end()
            self._child = child = _Child(self._files, self._limits)
            weakref.finalize(self, child.end)
            try:
                self._check(child.set_up(self._setup))
            except BaseException:
                self._end()
                raise
        return self._child

    def _check(self, answer: Answer) -> None:
        """Raise the error in ``answer``, if it has one.

        The error is that of a file that could not be read, or a ``QueryError``.
        """
        if (error := answer.fields.get("error")) is not None:
            raise self._files.failed or QueryError(readable(error, self._limits))

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


def readable(message: str, limits: QueryLimits | None = None) -> str:
    """An error message of DuckDB in a form that helps the user."""
    if limits is not None and OUT_OF_MEMORY.search(message):
        return str(limits.memory_error())
    if "Permission Error" in message or "read-only mode" in message:
        return (
            f"{message.strip()}\n"
            "A query reads the views of its run, and writes nothing. A table of your own comes "
            "with afn sql --with name=file, or from Python: run.sql(query, name=table), of pandas, "
            "polars or Arrow"
        )
    if "Traceback (most recent call last)" in message:  # an error of our filesystem
        return message.strip().rpartition("\n")[2]
    # of a view that refuses, as ``expressions.answerable`` makes it
    return message.strip().removeprefix("Invalid Input Error: ")


def _is_broken(answer: Answer) -> bool:
    """True if DuckDB must be restarted after an internal error or refused memory."""
    error = answer.fields.get("error", "")
    by_system = "alloc" in error and OUT_OF_MEMORY.search(error)
    return answer.fields.get("kind") in (
        "FatalException",
        "InternalException",
        "MemoryError",
    ) or bool(by_system)


class _Child:
    """One query process, and the threads that read files for it."""

    def __init__(self, files: ReadOnlyFiles, limits: QueryLimits) -> None:
        self._owner = os.getpid()
        self._limits = limits
        self._most_resident = 0
        pairs = [socket.socketpair() for _ in range(3)]
        self._requests, self._stops, served = (here for here, _ in pairs)
        theirs = [there for _, there in pairs]
        self._sockets = [self._requests, self._stops, served]
        self._sender = Connection(os.dup(self._requests.fileno()), readable=False)
        try:
            self._process = processes.start([one.fileno() for one in theirs])
        except BaseException as error:
            self._sender.close()
            for one in self._sockets:
                one.close()
            if isinstance(error, OSError):
                raise QueryError(f"the process that runs SQL cannot be started: {error}") from error
            raise
        finally:
            for one in theirs:
                one.close()
        threading.Thread(target=_serve, args=(files, served), daemon=True).start()

    def is_usable(self) -> bool:
        """True if the process is alive and was started by this process, not by its parent."""
        return self._owner == os.getpid() and self._process.poll() is None

    def set_up(self, setup: Setup) -> Answer:
        """Start the session and set the memory limit; return the first answer."""
        self._send(setup)
        answer = self._receive(0, time.monotonic() + START_S)
        self._most_resident = _resident_bytes(self._process.pid) + self._limits.process_bytes
        return answer

    def ask(self, request: Request, allowance: Allowance) -> Answer:
        began = time.monotonic()
        try:
            self._send(request)
            return self._receive(request.number, began + allowance.left_s)
        finally:
            allowance.left_s = max(0.0, allowance.left_s - (time.monotonic() - began))

    def _send(self, what: Setup | Request) -> None:
        try:
            self._sender.send(what)
        except OSError:
            raise self._died() from None
        except Exception as error:  # a caller's object may raise any error when it is pickled
            raise QueryError(
                f"a parameter cannot be sent to the process that runs SQL: {error}"
            ) from error

    def _receive(self, number: int, until: float) -> Answer:
        late = False
        try:
            poll = select.poll()
            poll.register(self._requests, select.POLLIN)
            while not poll.poll(POLL_MS):
                if self._most_resident and _resident_bytes(self._process.pid) > self._most_resident:
                    raise self._killed(self._limits.memory_error())
                if (now := time.monotonic()) > until:
                    late = True
                    if now > until + GRACE_S:
                        raise self._killed(self._limits.time_error())
                    # Repeated, because DuckDB ignores an interrupt before the query begins.
                    self._stop(number)
        except KeyboardInterrupt:
            self._stop_for_good(number, poll)
            raise
        answer = self._read_answer()
        if late and "error" in answer.fields:
            raise self._limits.time_error()
        return answer

    def _read_answer(self) -> Answer:
        try:
            text_bytes, arrow_bytes = FRAME.unpack(receive(self._requests, FRAME.size))
            if arrow_bytes > self._limits.process_bytes:
                raise self._killed(self._limits.memory_error())
            if text_bytes > MOST_TEXT_BYTES:
                raise self._killed(_text_error(text_bytes))
            fields = json.loads(receive(self._requests, text_bytes))
            return Answer(fields, pa.py_buffer(receive(self._requests, arrow_bytes)))
        except (EOFError, OSError):
            raise self._died() from None
        except BaseException:  # a half-read answer makes the rest of the stream useless
            self.end()
            raise

    def _stop(self, number: int) -> None:
        """Ask the process to interrupt the request ``number``."""
        with contextlib.suppress(OSError):
            self._stops.sendall(LENGTH.pack(number))

    def _stop_for_good(self, number: int, poll: select.poll) -> None:
        """Interrupt the request ``number`` and discard its answer; kill the process if needed."""
        until = time.monotonic() + GRACE_S
        try:
            while not poll.poll(POLL_MS):
                if time.monotonic() > until:
                    return self.end()
                self._stop(number)
            self._read_answer()
        except (QueryError, KeyboardInterrupt):
            self.end()

    def _killed(self, error: QueryError) -> QueryError:
        self.end()
        return error

    def _died(self) -> QueryError:
        """The error for a process that ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        code, said = self._process.poll(), ""
        if code is not None and self._process.stderr is not None:
            text = self._process.stderr.read().decode(errors="replace")
            _, _, said = text.strip().rpartition("\n")
        self.end()
        if "bad_alloc" in said or "MemoryError" in said:
            return self._limits.memory_error()
        how = "exit code unknown" if code in (None, processes.LOST) else f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        why = (
            "an expression nested too deeply does that"
            if code in (-signal.SIGSEGV, -signal.SIGBUS)
            else said
        )
        return QueryError(
            f"the process that runs SQL died of this query ({how}{': ' + why if why else ''}); ask "
            "it another way. The next query gets a new process"
        )

    def end(self) -> None:
        """Kill the process and close the sockets; a fork of the parent only closes its copies."""
        if self._owner == os.getpid():
            self._process.kill()
        self._sender.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR) if self._owner == os.getpid() else None
            one.close()
        if self._owner == os.getpid():
            self._process.wait()
        self._process.close()


def _text_error(num_bytes: int) -> QueryError:
    return QueryError(
        f"the error or the names of the columns that the query gives take {num_bytes:,} bytes; "
        f"expected at most {MOST_TEXT_BYTES:,}. Ask for fewer columns, or in fewer words"
    )


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process in bytes; 0 if the system does not report it."""
    with contextlib.suppress(OSError, IndexError):
        statm = Path(f"/proc/{pid}/statm").read_text("ascii")
        return int(statm.split()[1]) * os.sysconf("SC_PAGESIZE")
    return 0


# --- files ---


def _serve(files: ReadOnlyFiles, connections: socket.socket) -> None:
    """Accept connections: one for each reading thread of the child, with one thread here each."""
    while True:
        try:
            _, fds, _, _ = socket.recv_fds(connections, 1, 1)
        except OSError:
            return
        if not fds:
            return
        threading.Thread(
            target=_serve_reads, args=(files, socket.socket(fileno=fds[0])), daemon=True
        ).start()


def _serve_reads(files: ReadOnlyFiles, connection: socket.socket) -> None:
    """Answer read requests on ``connection`` until it is closed."""
    with connection, contextlib.suppress(EOFError, OSError):
        while True:
            name_bytes, start, end = READ.unpack(receive(connection, READ.size))
            if name_bytes > MAX_NAME_BYTES or start > end:
                return
            name = receive(connection, name_bytes).decode(errors="replace")
            data, text = b"", b""
            try:
                file = files.open(name)
                file.seek(start)
                data = file.read(end - start)
            # The caller's side raises it again, ours too.
            except Exception as error:  # noqa: BLE001
                text = (str(error) or type(error).__name__).encode()
            connection.sendall(FRAME.pack(len(text), len(data)) + text)
            connection.sendall(data)
