"""Messages between the query process, its parent process and a template process."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import pyarrow as pa

FRAME = struct.Struct("<IQ")
"""Header of an answer: bytes of its JSON, and bytes of its Arrow stream.

The answer to a read has the same header: bytes of the error, and bytes of the data.
"""
LENGTH = struct.Struct("<Q")
"""Message of the parent to stop a request: the request's number."""
READ = struct.Struct("<IQQ")
"""Header of a read request: bytes of the file's name, start and end of the range."""
PID = struct.Struct("<i")
"""First report of a template on a fork: its pid; its pidfd comes with it."""
STATUS = struct.Struct("<i")
"""Last report of a template on a fork: its exit code, or the number of its signal below 0."""
Steps = tuple[tuple[Any, ...], ...]
"""Steps that make a relation.

The first is (query, parameters, tables). Each other step is a method call: (name, arguments,
options).
"""


Settings = dict[str, str | bool | int | float | list[str]]
"""Settings of DuckDB, by name."""


@dataclass(frozen=True)
class Setup:
    """Content and limits of a session."""

    settings: Settings
    """DuckDB settings."""
    tables: Mapping[str, pa.Buffer]
    """Small tables of the run as Arrow streams, by name."""
    statements: Mapping[str, Sequence[str]]
    """SQL that makes the views and macros over the tables, by name, each after what it needs."""
    sizes: Mapping[str, int]
    """Sizes in bytes of the files that may be read, by name."""
    memory_bytes: int
    """Memory in bytes that the process may allocate beyond what it has before DuckDB starts."""
    timeout_s: float
    """Time limit of a query, in seconds."""


@dataclass(frozen=True)
class Request:
    """One call of a ``Session`` method."""

    number: int
    do: str  # name of a method of Session
    arguments: tuple[Any, ...] = ()
    forget: tuple[int, ...] = ()
    """Numbers of readers to release first."""


@dataclass(frozen=True)
class Made:
    """A relation that is an argument of another relation's method."""

    steps: Steps


class AnswerFields(TypedDict, total=False):
    """Fields of an answer, as JSON; each answer has some of them."""

    ready: bool
    unknown: bool  # the relation is no longer kept
    error: str
    kind: str  # type of the error
    columns: list[str]
    types: list[str]
    value: Any  # result of steps that end in no relation, or a text
    last: bool  # no batch follows


@dataclass
class Answer:
    """The answer to a request: JSON fields, and an Arrow stream or nothing."""

    fields: AnswerFields = field(default_factory=AnswerFields)
    arrow: bytes | pa.Buffer = b""


def receive(connection: socket.socket, num_bytes: int) -> bytearray:
    """Receive the next ``num_bytes``. Raises ``EOFError`` if the other side is gone."""
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        if (got := connection.recv_into(view)) == 0:
            raise EOFError
        view = view[got:]
    return data
