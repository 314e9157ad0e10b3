"""Drivers that are killed: ``afn`` commands in processes of their own that start in a moment."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import warm_workers
from hosts import PATIENCE_S


class Driver:
    """One ``afn`` command under way, a fork of the template that has the faults."""

    def __init__(self, said: Path, environment: dict[str, str], arguments: list[str]) -> None:
        self.said = said
        with Path(os.devnull).open() as nothing, said.open("a") as sink:
            self._fork = warm_workers.ask(
                warm_workers.address(has_faults=True),
                ["-m", "afn_ray", *arguments],
                environment,
                [nothing.fileno(), sink.fileno(), sink.fileno()],
            )
        self.pid = warm_workers.answer(self._fork)  # it leads a group
        self._code: int | None = None

    def wait(self, timeout_s: float) -> int | None:
        """Exit code (negative: the signal), or None after ``timeout_s``."""
        if self._code is None and select.select([self._fork], [], [], timeout_s)[0]:
            self._code = warm_workers.answer(self._fork)
        return self._code

    @property
    def is_alive(self) -> bool:
        return self.wait(0) is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the driver alone; nothing when it has ended."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill_all(self) -> None:
        """SIGKILL to the driver and to all that it started."""
        with contextlib.suppress(ProcessLookupError):
            assert self.pid > 1, "the fork did not start"
            os.killpg(self.pid, signal.SIGKILL)

    def family(self) -> list[int]:
        """Processes of the driver's group: itself, and on a Ray of its own that and its workers."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(ProcessLookupError, ValueError):
                if os.getpgid(int(entry.name)) == self.pid:
                    found.append(int(entry.name))
        return found

    def finish(self, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
        """Exit code (negative: the signal) and what it said, once it has ended."""
        code = self.wait(timeout_s)
        assert code is not None, f"not done in {timeout_s} s: {self.said.read_text()}"
        return code, self.said.read_text()

    def close(self) -> None:
        """Kill the driver and all that it started."""
        self.kill_all()
        self.wait(30)
        self._fork.close()


class Drivers:
    """Starts them, each with ``environment``."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def start(self, *arguments: str) -> Iterator[Driver]:
        """``afn`` with ``arguments``, killed at the end with all that it started."""
        said = self.folder / f"said-{time.monotonic_ns()}"
        with contextlib.closing(Driver(said, self.environment, list(arguments))) as driver:
            yield driver
