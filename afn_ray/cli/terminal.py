"""Standard streams of a command: closed, full, without a reader, or not
UTF-8; and lines on them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

from afn_ray.errors import ConfigError, Interrupted
from afn_ray.store import disk
from afn_ray.text import printable


class _Steady:
    """A text stream that drops its output after an error, so that the command goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Make all three standard streams usable, and safe for characters outside their encoding.

    A log whose reader has left, or whose disk is full, does not stop the command.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if (
            stream is None
        ):  # closed by the parent process; otherwise the next opened file would get its number
            # The stream stays open until this process ends.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, _Steady(sys.stderr))


def finish(code: int) -> int:
    """Flush standard output and error; return the exit code.

    That is ``code``; after a success whose output cannot be written, the code of that error.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)
    except OSError as error:
        drop(sys.stdout)
        print(f"afn: standard output cannot be written: {error.strerror}", file=sys.stderr)
        code = code or (Interrupted.exit_code if error.errno in disk.FULL else 1)
    sys.stderr.flush()
    return code


def drop(stream: TextIO) -> None:
    """Discard everything written to ``stream`` from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def read_input() -> str:
    """All of standard input, decoded as UTF-8. Raises ``ConfigError`` where it is not UTF-8."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input is not UTF-8: {error.reason} at byte {error.start:,}"
        ) from error


def width() -> int | None:
    """Width of the terminal in characters, or COLUMNS; None where the output is no terminal."""
    return shutil.get_terminal_size((0, 0)).columns or None


def print_lines(lines: Iterable[str]) -> None:
    """Print ``lines``; ignore a reader that ends early, as the exit code has the verdict."""
    try:
        for line in lines:
            print(printable(line))
        sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)
