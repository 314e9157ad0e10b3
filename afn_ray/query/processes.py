"""Start query processes: each in a fresh Python, or as a fork of a template process.

A fresh Python needs 0.3 s of CPU time to import DuckDB, Arrow and numpy. A template process imports
them once, opens nothing and forks (``template``). The first query process is a fresh Python, so
that a single query starts no template. Each process belongs to one run and is never used again.
The forks of one template share their address layout, so after a crash its template forks no more.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from afn_ray.query.protocol import PID, STATUS

CODE = """
import importlib, json, sys
sys.path += json.loads(sys.argv[1])
importlib.import_module(sys.argv[2]).main(*map(int, sys.argv[3:]))
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
"""Environment variables that the child process inherits.

Credentials are not among them: the child opens no files itself.
"""
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""Environment variables that keep numpy and Arrow from starting threads at their import."""

LIMITS = tuple(getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))
"""Numbers of the system's limits on a process."""

CAN_FORK = sys.platform == "linux" and hasattr(os, "pidfd_open")
"""True if templates are used. A fork is not safe with the system libraries of macOS."""
IDLE_S = 60.0
"""Time without a fork after which a template ends, in seconds."""
FORK_S = 120.0
"""Longest wait for a fork, in seconds. The first one waits for the imports of the template."""
END_S = 5.0
"""Longest wait for the end of a template or for the exit status of a fork, in seconds."""
MOST_FAILED = 3
"""Number of templates that end before they have forked, after which no other one is started."""
LOST = 256
"""Exit code of a fork whose template ended first; a process has at most 255."""


class Fresh(subprocess.Popen[bytes]):
    """A process in a Python of its own."""

    def close(self) -> None:
        """Close what this process has of the ended one."""
        if self.stderr is not None:
            self.stderr.close()


class Fork:
    """A query process that a template forked, with the methods of ``Fresh`` that are in use.

    The process is signalled by its pidfd, so the signal never reaches another process.
    """

    def __init__(self, pid: int, pidfd: int, reports: socket.socket, stderr: IO[bytes]) -> None:
        """``reports`` is the socket on which the template reports the exit code."""
        self.pid, self.stderr = pid, stderr
        self._pidfd, self._reports = pidfd, reports
        self._was_killed = False
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code once the process has ended.

        Raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds.
        """
        if self._code is None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("a query process", timeout or 0)
            self._code = self._reported()
            if self._code != 0 and not self._was_killed:
                _use_other_templates()
        return self._code

    def kill(self) -> None:
        """Kill the process, unless it has ended."""
        if self.poll() is None:
            self._was_killed = True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Close what this process has of the ended one."""
        self.stderr.close()
        self._reports.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _reported(self) -> int:
        self._reports.settimeout(END_S)
        with contextlib.suppress(OSError):
            if report := self._reports.recv(STATUS.size):
                code: int = STATUS.unpack(report)[0]
                return code
        return LOST


@dataclass(frozen=True)
class _Python:
    """State of this process that a new Python inherits; each such state has its own template."""

    owner: int
    """Pid of this process: a fork of it does not use its templates."""
    crashes: int
    """Number of forks that crashed."""
    user: tuple[int, ...]
    limits: tuple[tuple[int, int], ...]
    environment: tuple[tuple[str, str], ...]
    path: tuple[str, ...]

    @classmethod
    def now(cls) -> _Python:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        environment |= ONE_THREAD
        here = Path(__file__).resolve()
        folders = [Path(folder) for folder in sys.path if folder]
        folders.append(here.parents[2])
        path = tuple(str(folder.resolve()) for folder in folders)
        user = (os.geteuid(), os.getegid(), *os.getgroups())
        limits = tuple(resource.getrlimit(one) for one in LIMITS)
        return cls(os.getpid(), _crashes, user, limits, tuple(environment.items()), path)

    def start(self, module: str, fds: Sequence[int], *numbers: int, stderr: int) -> Fresh:
        """Start ``module`` of this room with ``fds`` and then ``numbers`` as its arguments."""
        arguments = map(str, (*fds, *numbers))
        command = [sys.executable, "-I", "-S", "-c", CODE, json.dumps(self.path)]
        return Fresh(
            [*command, f"afn_ray.query.{module}", *arguments],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd="/",
            start_new_session=True,  # Ctrl-C goes to the parent, which stops the query
            env=dict(self.environment),
        )


def start(fds: Sequence[int]) -> Fresh | Fork:
    """Start a query process with these sockets, the arguments of ``child.main``.

    Raises ``OSError`` if the system refuses another process.
    """
    python = _Python.now()
    while (template := _template(python)) is not None:
        if (fork := template.fork(fds)) is not None:
            return fork
        _drop(python, template)
        if not template.has_forked:
            break
    return python.start("child", fds, stderr=subprocess.PIPE)


class _Template:
    """A template process."""

    def __init__(self, python: _Python) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(FORK_S)
        self.has_forked = False
        try:
            self._process = python.start(
                "template", [theirs.fileno()], int(IDLE_S * 1000), stderr=subprocess.DEVNULL
            )
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        # A template that ends leaves no zombie.
        threading.Thread(target=self._process.wait, daemon=True).start()

    def fork(self, fds: Sequence[int]) -> Fork | None:
        """Start a query process with ``fds``; None if the template cannot fork, or has ended."""
        with contextlib.ExitStack() as stack:
            reports, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(reports)
            with theirs:
                read, write = os.pipe()
                stderr = stack.enter_context(os.fdopen(read, "rb"))
                try:
                    with self._lock:
                        socket.send_fds(self._control, [b"."], [*fds, write, theirs.fileno()])
                except OSError:
                    return None
                finally:
                    os.close(write)
            reports.settimeout(FORK_S)
            try:
                flags = socket.MSG_CMSG_CLOEXEC
                pid, pidfds, _, _ = socket.recv_fds(reports, PID.size, 1, flags)
            except OSError:
                return None
            if not pidfds:
                return None
            stack.pop_all()
        self.has_forked = True
        return Fork(PID.unpack(pid)[0], pidfds[0], reports, stderr)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """End the template, but not its forks."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """Close this process's end of the socket: a living template then ends with its forks."""
        with self._lock:
            self._control.close()

    def wait(self) -> None:
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


_crashes = 0
"""Number of forks that crashed."""
_lock = threading.Lock()
_once: set[_Python] = set()
"""Those that were needed once: the next need starts a template."""
_failed: Counter[_Python] = Counter()
"""Number of their templates that ended before they had forked."""
_templates: dict[_Python, _Template] = {}


def _template(python: _Python) -> _Template | None:
    """The template for ``python``; None where the process is to be a fresh Python."""
    for old, template in _own():
        if template.has_ended():
            _drop(old, template)
    with _lock:
        if not CAN_FORK or _failed[python] == MOST_FAILED:
            return None
        if python not in _once:
            _once.add(python)
            return None
        if python not in _templates:
            _templates[python] = _Template(python)
        return _templates[python]


def _own() -> list[tuple[_Python, _Template]]:
    """The templates that this process started, and not a process that it is a fork of."""
    with _lock:
        return [(python, t) for python, t in _templates.items() if python.owner == os.getpid()]


def _drop(python: _Python, template: _Template) -> None:
    """Kill a template that has ended or did not fork."""
    with _lock:
        if _templates.get(python) is template:
            del _templates[python]
            _failed[python] += not template.has_forked
    template.kill()


def _use_other_templates() -> None:
    """Use no present template again.

    An attacker who guesses an address and crashes a process with it then meets another layout.
    """
    global _crashes
    _crashes += 1


def _leave_to_parent() -> None:
    """Close the copies that a fork of this process has of its templates' sockets.

    A template ends when all copies are closed, and it is to end with the process that started it.
    """
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    for template in _templates.values():
        template._lock = threading.Lock()
        template.close()


@atexit.register
def _end() -> None:
    """End the templates, and wait for them."""
    templates = _own()
    for _, template in templates:
        template.close()
    for _, template in templates:
        template.wait()


os.register_at_fork(after_in_child=_leave_to_parent)
