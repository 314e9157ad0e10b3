"""End of a command: the exit code of the last log line is the one that the shell sees."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from afn_ray import errors, logs
from afn_ray.cli import audits, commands, progress
from afn_ray.store.disk import FULL


def interrupt() -> int:
    raise KeyboardInterrupt


def terminate() -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("the signal did not come")


def fill_the_disk() -> int:
    raise OSError(next(iter(FULL)), "No space left on device")


def raising(error: Exception) -> Callable[[], int]:
    def end() -> int:
        raise error

    return end


ENDS: dict[str, tuple[Callable[[], int], int, str]] = {
    "Ctrl-C": (interrupt, 75, "stopped"),
    "SIGTERM": (terminate, 75, "stopped"),
    "full disk": (fill_the_disk, 75, "stopped"),
    "a wrong config": (raising(errors.ConfigError("no such key")), 2, "failed"),
    "stopped by us": (raising(errors.Interrupted("stopped")), 75, "stopped"),
    "another OSError": (raising(OSError(errno.EIO, "input/output error")), 1, "failed"),
    "a fault of ours": (raising(ZeroDivisionError("by zero")), 1, "failed"),
    "text of another encoding": (
        raising(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")),
        2,
        "failed",
    ),
}
"""A command's end: what it does, the exit code of ``afn run``, the event."""


@pytest.fixture(autouse=True)
def log_of_its_own() -> Iterator[None]:
    """The program's log without handlers, as at the start of a process."""
    log = logging.getLogger(logs.ROOT)
    before, level = log.handlers[:], log.level
    log.handlers.clear()
    yield
    log.handlers[:] = before
    log.setLevel(level)


@pytest.mark.parametrize("command", ["run", "audit"])
@pytest.mark.parametrize("end", ENDS)
def test_the_last_event_has_the_exit_code_of_the_process(
    end: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    act, of_a_run, event = ENDS[end]

    def call(args: argparse.Namespace) -> int:
        progress.log_as("json", False)
        return act()

    argv = {"run": ["run"], "audit": ["audit", "run.toml", "--policy", "policy.toml"]}[command]
    with pytest.raises(SystemExit) as left:
        commands.main(argv, calls={command: call})
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    expected = of_a_run if command == "run" else audits.AUDIT_FAILED
    assert (left.value.code, last["exit_code"]) == (expected, expected)
    assert last["event"] == event
