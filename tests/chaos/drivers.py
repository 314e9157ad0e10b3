"""Drivers that are killed: ``afn`` commands in processes of their own that start in a moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import warm_workers
from hosts import PATIENCE_S

PRELOADED = [
    "afn_ray.cli.commands",
    "afn_ray.runs.job",
    "afn_ray.query.database",
    "afn_ray.model",
    "transformers.models.bert.modeling_bert",
]
"""Imports that take seconds; a driver is a fork of a process that has it."""


def _become_afn(arguments: list[str], said: str, environment: dict[str, str]) -> None:
    os.setsid()  # what it starts is killed with it
    # the server, one for all tests of this process, has that of whoever started it
    os.environ.clear()
    os.environ.update(environment)
    sink = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - as long as the process
    sys.executable = warm_workers.choose(has_faults=True)
    from afn_ray.cli import commands

    commands.command(arguments)


class Driver:
    """One ``afn`` command under way."""

    def __init__(self, server: Drivers, arguments: list[str]) -> None:
        self.said = server.folder / f"said-{time.monotonic_ns()}"
        self.said.touch()
        self.process: ForkServerProcess = server.context.Process(
            target=_become_afn, args=(arguments, str(self.said), server.environment), daemon=False
        )
        self.process.start()
        while self.process.is_alive() and not self._leads():  # until then its group is ours
            time.sleep(0.001)

    def _leads(self) -> bool:
        pid = self.process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            return os.getpgid(pid) == pid
        return False

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the driver alone; nothing when it has ended."""
        if self.process.is_alive() and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def kill_all(self) -> None:
        """SIGKILL to the driver and to all that it started."""
        with contextlib.suppress(ProcessLookupError):
            assert self.process.pid, "0 would be our own group"
            os.killpg(self.process.pid, signal.SIGKILL)

    def family(self) -> list[int]:
        """Processes of the driver's group: itself, and on a Ray of its own that and its workers."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(ProcessLookupError, ValueError):
                if os.getpgid(int(entry.name)) == self.process.pid:
                    found.append(int(entry.name))
        return found

    def finish(self, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
        """Exit code (negative: the signal) and what it said, once it has ended."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, (
            f"not done in {timeout_s} s: {self.said.read_text()}"
        )
        return self.process.exitcode, self.said.read_text()


class Drivers:
    """Starts them, each with ``environment``."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        folder.mkdir(parents=True, exist_ok=True)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(environment)
        try:  # the server loads the plugin of faults as it starts
            warm = self.context.Process(target=time.sleep, args=(0,))
            warm.start()
            warm.join()
        finally:
            os.environ.clear()
            os.environ.update(before)

    @contextmanager
    def start(self, *arguments: str) -> Iterator[Driver]:
        """``afn`` with ``arguments``, killed at the end with all that it started if it has not
        ended.
        """
        driver = Driver(self, list(arguments))
        try:
            yield driver
        finally:
            driver.kill_all()
            driver.process.join(30)
