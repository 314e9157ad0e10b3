"""A process of its own for SQL, with hard limits: started, asked, and killed when it passes one of
them.
"""

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
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from afn_ray import cgroup
from afn_ray.errors import QueryError
from afn_ray.query.files import ReadOnlyFiles
from afn_ray.query.session import (
    FRAME,
    LENGTH,
    OUT_OF_MEMORY,
    READ,
    Answer,
    Request,
    Setup,
    receive,
)

CODE = """
import json, sys
sys.path += json.loads(sys.argv[1])
from afn_ray.query.session import main
main(*map(int, sys.argv[2:]))
"""

ENVIRONMENT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TZDIR",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
)
"""What the process gets of ours; credentials stay here, for it opens no file itself."""

START_S = 120.0
"""Longest start, in seconds: it reads the footers of a few files, from a bucket that may be
slow.
"""
POLL_MS = 20
"""Between two looks at the memory and the time of a query."""
GRACE_S = 0.5
"""From asking a query to stop until its process is killed."""

SPARE_BYTES = 256 << 20
"""Memory of the process that DuckDB's own limit does not count: Arrow's buffers, text in work, the
interpreter's.
"""
SPARE_BYTES_PER_THREAD = 16 << 20
"""Stacks and arenas."""
MAX_NAME_BYTES = 4096
MOST_TEXT_BYTES = 64 << 20
"""Longest error, or names and types of a result's columns, that the process may answer with, in
bytes of JSON.
"""

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def memory_bytes(text: str) -> int:
    """``text`` as DuckDB reads it: 500MB, 2GB, 1.5GiB, or 50% of what this process may have. Raises
    ``QueryError``.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?|(%))\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise QueryError(
            f"the memory limit is {text!r}; expected a size such as 500MB, 2GB or 1.5GiB"
        )
    if found[4]:
        everything = cgroup.memory_bytes() or os.sysconf("SC_PHYS_PAGES") * os.sysconf(
            "SC_PAGE_SIZE"
        )
        return int(float(found[1]) / 100 * everything)
    return int(float(found[1]) * (1024 if found[3] else 1000) ** UNITS[(found[2] or "").lower()])


@dataclass(frozen=True)
class Limits:
    """What one query may take."""

    memory: str
    """Of DuckDB, as it was asked for."""
    memory_bytes: int
    threads: int
    timeout_s: float

    @property
    def process_bytes(self) -> int:
        """Memory that the process may take beyond what it begins with."""
        return self.memory_bytes * 9 // 8 + SPARE_BYTES + self.threads * SPARE_BYTES_PER_THREAD

    def memory_error(self) -> QueryError:
        return QueryError(
            f"the query needs more memory than its limit of {self.memory}; ask for less, as in WHERE doc < 1000, "
            "or raise the memory limit"
        )

    def time_error(self) -> QueryError:
        return QueryError(
            f"stopped after {self.timeout_s:g} s; ask for less, as in WHERE doc < 1000, or give it more time"
        )


@dataclass
class Allowance:
    """Time that the requests of one query may still take together."""

    left_s: float


class Process:
    """The process that answers; started at the first question, and again after it was killed or
    died.

    Questions from several threads are answered one after the other. It ends with this object, and
    with this process.
    """

    def __init__(self, files: ReadOnlyFiles, setup: Setup, limits: Limits) -> None:
        self._files, self._setup, self._limits = files, setup, limits
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._forgotten: list[int] = []

    def ask(self, allowance: Allowance, do: str, *arguments: Any) -> tuple[int, Answer]:
        """The number and the answer of a request, which takes its time from ``allowance``.

        Raises ``QueryError`` for SQL that is wrong or over a limit, or that its process died of,
        and what reading a file raised.
        """
        with self._lock:
            if self._closed:
                raise QueryError("the run is closed; open it again")
            self._files.failed = None  # what a query met that was stopped
            child = self._started()
            forget, self._forgotten = tuple(self._forgotten), []
            request = Request(next(self._numbers), do, arguments, forget)
            answer = child.ask(request, allowance)
            if _is_broken(answer):
                self._end()
            self._check(answer)
        return request.number, answer

    def forget(self, reader: int) -> None:
        """Nobody reads the result of this request any more."""
        self._forgotten.append(reader)

    def close(self) -> None:
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
        """Raise what an answer stands for that is an error: of a file that could not be read, or of
        SQL.
        """
        if (error := answer.fields.get("error")) is not None:
            raise self._files.failed or QueryError(readable(error, self._limits))

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


def readable(message: str, limits: Limits | None = None) -> str:
    """An error of DuckDB's as it is told: without what is of no use to who asked."""
    if limits is not None and OUT_OF_MEMORY.search(message):
        return str(limits.memory_error())
    if "Permission Error" in message or "read-only mode" in message:
        return (
            f"{message.strip()}\nA query reads the views of its run, and writes nothing. A table of your own comes "
            "with afn sql --with name=file, or from Python: run.sql(query, name=table), of pandas, polars or Arrow"
        )
    if "Traceback (most recent call last)" in message:  # our filesystem's error, told by DuckDB
        return message.strip().rpartition("\n")[2]
    return message.strip()


def _is_broken(answer: Answer) -> bool:
    """Whether DuckDB is better started again: after an error of its own, or memory that the system
    refused it.
    """
    by_system = "alloc" in answer.fields.get("error", "") and OUT_OF_MEMORY.search(
        answer.fields["error"]
    )
    return answer.fields.get("kind") in (
        "FatalException",
        "InternalException",
        "MemoryError",
    ) or bool(by_system)


class _Child:
    """One such process, and the threads that read files for it."""

    def __init__(self, files: ReadOnlyFiles, limits: Limits) -> None:
        self._owner, self._limits, self._most_resident = os.getpid(), limits, 0
        pairs = [socket.socketpair() for _ in range(3)]
        self._requests, self._stops, served = (here for here, _ in pairs)
        theirs = [there for _, there in pairs]
        package = str(Path(__file__).resolve().parents[2])
        path = [str(Path(p).resolve()) for p in (*sys.path, package) if p]
        self._sockets = [self._requests, self._stops, served]
        self._sender = Connection(os.dup(self._requests.fileno()), readable=False)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this Python and our own code
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-c",
                    CODE,
                    json.dumps(path),
                    *(str(s.fileno()) for s in theirs),
                ],
                pass_fds=[s.fileno() for s in theirs],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                start_new_session=True,  # Ctrl-C is ours: we say what it stops
                env={k: v for k in ENVIRONMENT if (v := os.environ.get(k)) is not None}
                | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            self._sender.close()
            for one in self._sockets:
                one.close()
            raise QueryError(f"the process that runs SQL cannot be started: {error}") from error
        finally:
            for one in theirs:
                one.close()
        threading.Thread(target=_serve, args=(files, served), daemon=True).start()

    def is_usable(self) -> bool:
        return self._owner == os.getpid() and self._process.poll() is None

    def set_up(self, setup: Setup) -> Answer:
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
        except (
            Exception
        ) as error:  # whatever an object of the caller's raises when it is to be copied
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
                    self._stop(
                        number
                    )  # again and again: what comes before the query begins is lost
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
        except BaseException:  # half an answer: what comes next could not be told from its rest
            self.end()
            raise

    def _stop(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._stops.sendall(LENGTH.pack(number))

    def _stop_for_good(self, number: int, poll: select.poll) -> None:
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
        """Why it ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        code, said = self._process.poll(), ""
        if code is not None and self._process.stderr is not None:
            said = self._process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        self.end()
        if "bad_alloc" in said or "MemoryError" in said:
            return self._limits.memory_error()
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        why = (
            "an expression nested too deeply does that"
            if code in (-signal.SIGSEGV, -signal.SIGBUS)
            else said
        )
        return QueryError(
            f"the process that runs SQL died of this query ({how}{': ' + why if why else ''}); ask it another way. "
            "The next query gets a new process"
        )

    def end(self) -> None:
        """Kill it and close what led to it; a process that was forked from ours leaves it alone."""
        self._sender.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR) if self._owner == os.getpid() else None
            one.close()
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()


def _text_error(num_bytes: int) -> QueryError:
    return QueryError(
        f"the error or the names of the columns that the query gives take {num_bytes:,} bytes; expected at most "
        f"{MOST_TEXT_BYTES:,}. Ask for fewer columns, or in fewer words"
    )


def _resident_bytes(pid: int) -> int:
    """Memory that a process has in use; 0 where the system does not say."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/statm") as statm:  # noqa: PTH123
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    return 0


# --- files ---


def _serve(files: ReadOnlyFiles, connections: socket.socket) -> None:
    """Take connections, one for each thread that reads there, and a thread here for each."""
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
            except Exception as error:  # noqa: BLE001 - told where it was asked; ours are raised there too
                text = (str(error) or type(error).__name__).encode()
            connection.sendall(FRAME.pack(len(text), len(data)) + text)
            connection.sendall(data)
