"""Ray workers that begin as forks of a process that has already imported what a worker imports.

A worker spends 8 of its 9 CPU seconds before its first shard on the imports of torch and
transformers, and the tests start about a hundred workers. ``WarmPython`` makes an executable that
replaces ``sys.executable`` where a Ray starts. When raylet runs Ray's ``setup_worker.py`` with it,
a template process forks, and the fork runs Ray's own scripts; raylet's child, a small process,
waits for the fork's end. So do the scripts of jobs/, a test's ``script.py``, ``-m afn_ray``, a
notebook's kernel, the processes of benchmarks, and the workers of a Ray that a fork starts. Every
other program runs in the real Python, and so does a worker that loads the faults of
tests/chaos/plugin where the template does not, or the reverse. Drivers of the chaos run ask the
template themselves.

A fork has a process group of its own, as raylet's children have, but the session of the template,
which is its parent; the kernel kills it when raylet's child dies. What the C library reads as a
program starts (``MALLOC_...``) is the template's. A fork enters the network of the process that
asks for it, and ends without freeing its modules, so that errors of that are not seen. The commands
of ``test_jobs`` and ``test_readme`` start workers from nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

IMPORTS = (
    "afn_ray.cli.commands",
    "afn_ray.runs.job",
    "afn_ray.runs.worker",
    "afn_ray.model",
    "afn_ray.reduce.shards",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "pyarrow.dataset",
    "s3fs",
    "google.protobuf.reflection",
    "jsonschema",
    "pydantic.main",
    "requests",
    "wcwidth",
)
"""Modules that take seconds to import, and those that Ray imports. Ray is not among them: it reads
its settings from the environment as it is imported.
"""
FORKED = (
    r'*/setup_worker.py\ * | */jobs/*.py\ * | */script.py\ * | "-m afn_ray.bench.worker" | '
    r'"-m afn_ray" | "-m ipykernel_launcher"'
)
"""Programs that run in forks, by the first two arguments, as a pattern of the shell."""
FAULTS = "AFN_CHAOS"
"""Environment variable of processes that load the faults of tests/chaos/plugin."""
PYTHON_PATH = os.pathsep.join(
    map(str, (Path(__file__).parent / "plugin", Path(__file__).parents[2]))
)
"""PYTHONPATH of these processes."""
VARIABLES = {False: "AFN_WARM_PYTHON", True: "AFN_WARM_PYTHON_WITH_FAULTS"}
"""Environment variables with the executables of a test run: without and with the faults."""
TEMPLATE = "template"
"""Name of a template's socket, which is beside the executable."""
NETWORK = Path("/proc/self/ns/net")
"""Namespace of the network that a process is in."""
REQUEST_BYTES = 1 << 17
"""Longest request, in bytes: arguments, environment and folder of one worker."""


class WarmPython:
    """An executable that asks a template process, which has ``environment``, for forks.

    The template imports nothing before the first fork.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="afn-", dir="/tmp"))  # short paths of sockets
        self.executable, place = self._folder / "python", str(self._folder / TEMPLATE)
        python = shlex.quote(sys.executable)
        asking = shlex.join([sys.executable, "-I", "-S", __file__, place])
        self.executable.write_text(
            f'#!/bin/sh\ncase "$1 $2" in {FORKED}) exec {asking} "$@";; esac\nexec {python} "$@"\n'
        )
        self.executable.chmod(0o700)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(place)
            listener.listen(64)
            self._template = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                env=environment,
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
            )

    def close(self) -> None:
        """End the template and the forks that it still has."""
        self._template.communicate()
        shutil.rmtree(self._folder)


def start() -> list[WarmPython]:
    """The executables of a test run; processes that it starts find them in ``VARIABLES``."""
    with_faults = {FAULTS: os.devnull, "PYTHONPATH": PYTHON_PATH}
    started = []
    for has_faults, variable in VARIABLES.items():
        environment = dict(os.environ) | (with_faults if has_faults else {})
        started.append(WarmPython(environment))
        os.environ[variable] = str(started[-1].executable)
    return started


def choose(has_faults: bool) -> str:
    """The executable for workers of a Ray; without a test run, the real Python."""
    return os.environ.get(VARIABLES[has_faults], sys.executable)


def address(has_faults: bool) -> str:
    """The socket of a template of a test run."""
    return str(Path(choose(has_faults)).with_name(TEMPLATE))


def ask(
    place: str, arguments: list[str], environment: Mapping[str, str], files: Sequence[int]
) -> socket.socket:
    """A connection that gives the pid of a fork that runs ``arguments``, and then its exit code
    (negative: the signal that ended it); the fork dies when it is closed.

    ``files``: standard input, output and error of the fork.
    """
    request = json.dumps([arguments, dict(environment), str(Path.cwd())]).encode()
    template = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    template.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * REQUEST_BYTES)
    template.connect(place)
    with NETWORK.open() as network:
        socket.send_fds(template, [request], [*files, network.fileno()])
    return template


def answer(template: socket.socket) -> int:
    """The next number that a connection gives; 1 where the template or the fork's start failed."""
    return int(template.recv(16) or 1)


def _run_in_fork(place: str, arguments: list[str]) -> int:
    """Exit code of a fork that runs ``arguments``, once it has ended."""
    with ask(place, arguments, os.environ, [0, 1, 2]) as template:
        answer(template)
        code = answer(template)
    return code if code >= 0 else 128 - code


def _serve(listener: socket.socket) -> tuple[socket.socket, list[Any], list[int]]:
    """Answer requests with forks; return only in a fork: its connection, request and files.

    The files are 0 to 2 and the namespace of the asker's network. The template itself ends
    when its standard input does.
    """
    workers: dict[int, tuple[int, socket.socket]] = {}
    waiting = selectors.PollSelector()
    waiting.register(0, selectors.EVENT_READ)
    waiting.register(listener, selectors.EVENT_READ)
    is_warm = False
    while True:
        for key, _ in waiting.select():
            if key.fd == 0:
                for pid, _ in workers.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fd in workers:
                pid, asker = workers.pop(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(ConnectionError), asker:
                    asker.send(str(code).encode())
                waiting.unregister(key.fd)
                os.close(key.fd)
            else:
                if not is_warm:
                    _warm()
                    is_warm = True
                asker, _ = listener.accept()
                request, files, _, _ = socket.recv_fds(asker, REQUEST_BYTES, 4)
                if not request:  # it has gone
                    continue
                if (pid := os.fork()) == 0:
                    listener.close()
                    return asker, json.loads(request), files
                for file in files:
                    os.close(file)
                fd = os.pidfd_open(pid)
                workers[fd] = pid, asker
                waiting.register(fd, selectors.EVENT_READ)


def _warm() -> None:
    for module in IMPORTS:
        importlib.import_module(module)
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("bert")  # made at a model's first load
    gc.collect()
    gc.freeze()


def _become(asker: socket.socket, request: list[Any], files: list[int]) -> None:
    """Run what was asked for as a program of its own."""
    os.setpgid(0, 0)  # raylet kills the groups of its workers
    with contextlib.suppress(ConnectionError):
        asker.send(str(os.getpid()).encode())
    fcntl.fcntl(asker, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(asker, fcntl.F_SETSIG, signal.SIGKILL)  # as soon as the other end is closed
    fcntl.fcntl(asker, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    if not _is_open(asker):
        os._exit(1)
    atexit.register(gc.unfreeze)  # extensions that count what they have freed see it freed
    arguments, environment, folder = request
    _join(files.pop())
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # Python's own streams remember what kind of files the template had: seekable ones, if it began
    # so.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering, closefd=False)  # noqa: SIM115 - as long as the process
        for number, mode, buffering in ((0, "r", -1), (1, "w", -1), (2, "w", 1))
    )
    os.chdir(folder)
    has_faults = FAULTS in os.environ
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = choose(has_faults)
    execute = os.execvp

    def go_on(program: str, args: list[str]) -> NoReturn:
        """Run ``exec PYTHON SCRIPT ...``, a command for a shell, in this process."""
        os.execvp = execute
        if (FAULTS in os.environ) != has_faults:
            execute(program, args)
        for path in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
            if path and path not in sys.path:
                sys.path.insert(1, path)
        _run(shlex.split(args[-1])[2:])
        sys.exit()

    os.execvp = go_on  # type: ignore[assignment]
    try:
        _run(arguments)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        _end(end.code or 0)
    _end(0)


def _is_open(asker: socket.socket) -> bool:
    """False if the process that asked has closed its end."""
    try:
        asker.recv(1)
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    return False


def _end(code: int) -> NoReturn:
    """End as a program does, but free nothing: what the template imported takes 1.9 CPU s to free.

    The two functions are the interpreter's own, which has no public ones for this.
    """
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(code)


def _join(network: int) -> None:
    """Enter the network of the process that asked, where it is another."""
    if os.fstat(network).st_ino != NETWORK.stat().st_ino:
        c = ctypes.CDLL(None, use_errno=True)
        if c.setns(network, 0):
            raise OSError(ctypes.get_errno(), "the fork cannot enter the network of its host")
    os.close(network)


def _run(arguments: list[str]) -> None:
    """Run a script or ``-m MODULE`` as ``__main__``, with its arguments."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = str(Path.cwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(_run_in_fork(sys.argv[1], sys.argv[2:]))
    _become(*_serve(socket.socket(fileno=int(sys.argv[1]))))
