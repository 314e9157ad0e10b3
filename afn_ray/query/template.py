"""The main program of the template process: fork a query process for each request.

``processes`` starts it. It has imported what a query process needs, and has one thread, no file and
no DuckDB connection. A fork keeps only the sockets of its own request, so that it reaches neither
the template nor another fork. The template ends with its parent process, or when it is idle.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from afn_ray.query import child
from afn_ray.query.protocol import PID, STATUS

NUM_FDS = 5
"""Descriptors in a request: those of ``child.main``, standard error, and the socket for reports."""


@dataclass
class _Forked:
    """A query process that runs or was not waited for."""

    pid: int
    reports: socket.socket

    def wait(self) -> None:
        """Wait for the end of the process, and report its exit code."""
        _, status = os.waitpid(self.pid, 0)
        with self.reports, contextlib.suppress(OSError):
            self.reports.send(STATUS.pack(os.waitstatus_to_exitcode(status)))


def main(control_fd: int, idle_ms: int) -> None:
    """Serve requests until the parent process is gone, or for ``idle_ms`` without a fork.

    An error, as of a system that refuses a fork, ends the template. Its parent starts another.
    """
    control = socket.socket(fileno=control_fd)
    os.close(os.pidfd_open(os.getpid()))  # an error here comes before any fork
    threads = list(Path("/proc/self/task").iterdir())
    if len(threads) > 1:
        raise RuntimeError("an import has started a thread, and a fork would copy its locks")
    gc.freeze()  # a collection in a fork then copies no pages of the template
    forks: dict[int, _Forked] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while ready := poll.poll(None if forks else idle_ms):
        for fd, _ in ready:
            if fd in forks:
                poll.unregister(fd)
                forks.pop(fd).wait()
                os.close(fd)
                continue
            _, fds, _, _ = socket.recv_fds(control, 1, NUM_FDS)
            if not fds:
                return _end(forks)
            pidfd, forked = _fork(fds)
            forks[pidfd] = forked
            poll.register(pidfd, select.POLLIN)


def _fork(fds: list[int]) -> tuple[int, _Forked]:
    """Fork a query process; report its pid and pidfd, and return its pidfd."""
    *sockets, errors, reports_fd = fds
    if (pid := os.fork()) == 0:
        _run(sockets, errors)
    for fd in (*sockets, errors):
        os.close(fd)
    forked = _Forked(pid, socket.socket(fileno=reports_fd))
    pidfd = os.pidfd_open(pid)
    with contextlib.suppress(OSError):  # the parent no longer waits
        socket.send_fds(forked.reports, [PID.pack(pid)], [pidfd])
    return pidfd, forked


def _run(sockets: list[int], errors: int) -> NoReturn:
    """Be a query process."""
    try:
        os.setsid()
        os.dup2(errors, 2)
        for fd in [int(handle.name) for handle in Path("/proc/self/fd").iterdir()]:
            if fd > 2 and fd not in sockets:
                with contextlib.suppress(OSError):  # that of the folder itself
                    os.close(fd)
        child.main(*sockets)
    finally:
        os._exit(1)  # not the template's work, whatever happens


def _end(forks: dict[int, _Forked]) -> None:
    """Kill and reap all forks: nobody else can end them."""
    for forked in forks.values():
        os.kill(forked.pid, signal.SIGKILL)
    for forked in forks.values():
        forked.wait()
