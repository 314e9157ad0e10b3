"""JSON files that carry their own checksum, and the entries that list tables with theirs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.errors import StoreError
from afn_ray.run_info import TableEntry
from afn_ray.schema import READABLE_VERSIONS
from afn_ray.store import blocks, parquet, storage

IO_THREADS = 16
"""Most concurrent requests of one call to the store."""
JSON_BYTES = 64 << 20
"""Largest run.json, commit.json or calibration file, in bytes.

These files have at most one line for each file of a shard.
"""
AHEAD = 4096
"""Most rows or reads that a driver prepares at once, so that its memory does not grow with the run.
"""
READABLE = " or ".join(map(str, READABLE_VERSIONS))
"""The versions that are read, for messages."""
ASK_VERIFY = "; 'afn verify' on its store says what else is, and what to do"


def parse_table(
    data: bytes,
    uri: str,
    columns: Sequence[str] | None = None,
    filters: pc.Expression | None = None,
) -> pa.Table:
    """The table in ``data``, the content of ``uri``. Raises ``StoreError`` if it is damaged.

    It has the rows that ``filters`` keep, and those of ``columns`` that there are; an older run may
    lack some.
    """
    try:
        if columns is not None:
            names = parquet.open_file(data).schema_arrow.names
            columns = [name for name in columns if name in names]
        return parquet.read(data, columns, filters=filters)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{uri} is damaged: {error}") from error


def short(value: object) -> str:
    """``value`` as JSON for a message, at most 100 characters."""
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


DAMAGES = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    ArithmeticError,
    pa.ArrowException,
)
"""Errors raised for a JSON file or table with a valid checksum but unexpected content."""


@contextlib.contextmanager
def named_damage(uri: str) -> Iterator[None]:
    """Raise ``StoreError`` in place of errors from unexpected content below ``uri``."""
    try:
        yield
    except DAMAGES as error:
        raise StoreError(
            f"{uri} is damaged: it is not what afn-ray writes: {error!r}{ASK_VERIFY}"
        ) from error


def read_json(uri: str) -> dict[str, Any] | None:
    """The content of the checksummed JSON file ``uri``; None if there is no such file.

    Raises ``StoreError`` if the file is damaged or of a version that is not read.
    """
    data = storage.read_if_there(uri, JSON_BYTES)
    return None if data is None else parse_json(data, uri)


class JsonObject(dict[str, Any]):
    """One object of a JSON file of the store. A missing key raises ``StoreError``."""

    def __init__(self, items: Iterable[Any] = (), uri: str = "a JSON file of the store") -> None:
        """``items`` are those of ``dict``; ``uri`` names the file in errors."""
        super().__init__(items)
        self.uri = uri

    def __missing__(self, key: str) -> Any:
        raise StoreError(f"{self.uri} is damaged: its entry {key!r} is missing{ASK_VERIFY}")


def parse_json(data: bytes, uri: str) -> dict[str, Any]:
    """The object in ``data``, the content of ``uri``, without its checksum.

    Raises ``StoreError`` if the file is damaged or of a version that is not read.
    """
    try:
        value = json.loads(data, object_hook=partial(JsonObject, uri=uri))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{uri} is damaged: {error}") from error
    if not isinstance(value, dict) or value.get("schema_version") not in READABLE_VERSIONS:
        got = value.get("schema_version") if isinstance(value, dict) else type(value).__name__
        raise StoreError(
            f"{uri} has schema version {got}, expected {READABLE}; use the afn-ray that wrote it, "
            "or measure the corpus anew in another --store"
        )
    value.pop("sha256", None)
    if data != checksummed(value):
        raise StoreError(
            f"{uri} is damaged: its bytes do not have the checksum that it carries{ASK_VERIFY}"
        )
    return value


def checksummed(body: Mapping[str, Any]) -> bytes:
    """``body`` as a JSON file whose last entry is the SHA-256 of the same file without that entry.

    The checksum covers every byte. Raises ``StoreError`` if the file would be larger than
    ``JSON_BYTES``, which no reader accepts.
    """
    digest = sha256(json_bytes(body)).hexdigest()
    data = json_bytes({**body, "sha256": digest})
    if len(data) > JSON_BYTES:
        longest = max(body, key=lambda key: len(json_bytes({key: body[key]})))
        raise StoreError(
            f"a JSON file of {len(data):,} bytes was not written: readers accept at most "
            f"{JSON_BYTES:,}; its longest entry is {longest}"
        )
    return data


def entry_of(name: str, data: bytes) -> TableEntry:
    """The entry of a table's file in run.json: name, size in bytes, SHA-256, block checksums."""
    return {
        "name": name,
        "bytes": len(data),
        "sha256": sha256(data).hexdigest(),
        "crc32": blocks.checksums(data),
    }


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """``value`` as an indented JSON file in UTF-8."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
