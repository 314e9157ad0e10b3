"""The main program of the query process.

``processes`` starts it. It answers one request at a time and has only sockets: it reads files
through its parent process, opens no file itself, and cannot write. Requests arrive as pickled
objects, from a parent that has full rights anyway. Answers return as JSON and Arrow, which cannot
execute code.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import threading
import traceback
from multiprocessing.connection import Connection
from typing import NoReturn

from afn_ray.query.protocol import FRAME, LENGTH, READ, Answer, Request, Setup, receive
from afn_ray.query.session import Session

MAX_OPEN_FILES = 256
"""Largest number of open file descriptors of the process."""
STACK_BYTES = 8 << 20
"""Stack of the main thread in bytes: a too deeply nested expression ends only the process."""
CPU_SPARE_S = 10
"""CPU time in seconds beyond the time limit, after which the kernel ends the process.

It matters for a process that hangs and whose parent is gone.
"""


class _Reads:
    """Reads files through the parent process, over one connection for each reading thread."""

    def __init__(self, connections: socket.socket) -> None:
        """``connections`` is the socket that sends the other end of each connection."""
        self._connections = connections
        self._lock = threading.Lock()
        self._local = threading.local()

    def __call__(self, name: str, start: int, end: int) -> bytes:
        connection = self._connection()
        encoded = name.encode()
        request = READ.pack(len(encoded), start, end) + encoded
        connection.sendall(request)
        text_bytes, num_bytes = FRAME.unpack(receive(connection, FRAME.size))
        if text_bytes:
            text = receive(connection, text_bytes)
            raise OSError(text.decode())
        return bytes(receive(connection, num_bytes))

    def _connection(self) -> socket.socket:
        """The connection of the calling thread."""
        if not hasattr(self._local, "connection"):
            here, there = socket.socketpair()
            with self._lock, there:
                socket.send_fds(self._connections, [b"."], [there.fileno()])
            self._local.connection = here
        connection: socket.socket = self._local.connection
        return connection


def main(requests_fd: int, stops_fd: int, files_fd: int) -> NoReturn:
    """Answer requests until the parent process is gone, and end this process.

    It ends without Python's cleanup, which could write to standard error after the traceback.
    """
    code = 1
    try:
        _answer_all(requests_fd, stops_fd, files_fd)
        code = 0
    except BaseException:  # noqa: BLE001 - the parent reads the last line of standard error
        traceback.print_exc()
    finally:
        os._exit(code)


def _answer_all(requests_fd: int, stops_fd: int, files_fd: int) -> None:
    """Answer requests until the parent process is gone."""
    requests = socket.socket(fileno=requests_fd)
    stops = socket.socket(fileno=stops_fd)
    files = socket.socket(fileno=files_fd)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write over RLIMIT_FSIZE is an OSError
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    _limit(resource.RLIMIT_STACK, STACK_BYTES)
    try:
        receiver = Connection(os.dup(requests_fd), writable=False)
        setup: Setup = receiver.recv()
        _limit(resource.RLIMIT_DATA, _data_bytes() + setup.memory_bytes)
        try:
            session = Session(setup, _Reads(files))
        except Exception as error:  # noqa: BLE001 - told by the other process
            failure = Answer({"error": str(error), "kind": type(error).__name__})
            return _send(requests, failure)
        threading.Thread(target=_listen, args=(stops, session), daemon=True).start()
        _send(requests, Answer({"ready": True}))
        while True:
            request: Request = receiver.recv()
            _limit_cpu(setup.timeout_s)
            _send(requests, session.answer(request))
    except (EOFError, OSError):
        return None


def _listen(stops: socket.socket, session: Session) -> None:
    """Interrupt requests on the parent's demand; exit when the parent is gone."""
    try:
        while True:
            (number,) = LENGTH.unpack(receive(stops, LENGTH.size))
            session.interrupt(number)
    except (EOFError, OSError):
        os._exit(0)


def _send(connection: socket.socket, answer: Answer) -> None:
    text = json.dumps(answer.fields, default=str).encode()
    frame = FRAME.pack(len(text), len(answer.arrow))
    connection.sendall(frame + text)
    connection.sendall(answer.arrow)


def _limit(what: int, value: int) -> None:
    """Lower a resource limit of this process for good, if the system supports it."""
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(what)
        if most != resource.RLIM_INFINITY:
            value = min(value, most)
        resource.setrlimit(what, (value, value))


def _limit_cpu(timeout_s: float) -> None:
    """Limit the CPU time of the next request.

    So the kernel ends a process that hangs and whose parent is gone, even if no Python thread runs.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_s = usage.ru_utime + usage.ru_stime
    allowed_s = timeout_s * (os.cpu_count() or 1)
    limit_s = int(used_s + allowed_s + CPU_SPARE_S)
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        if most != resource.RLIM_INFINITY:
            limit_s = min(limit_s, most)
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, most))


def _data_bytes() -> int:
    """Private writable memory of this process in bytes, as RLIMIT_DATA counts it.

    It is 0 if the system does not report it.
    """
    # This process does not import pathlib.
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:  # noqa: PTH123
        return int(statm.read().split()[5]) * resource.getpagesize()
    return 0
