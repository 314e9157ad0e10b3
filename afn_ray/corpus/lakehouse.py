"""Folders that are tables of Delta Lake, Iceberg or Hudi: their log says which files count, and it
is not read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from afn_ray.errors import CorpusError, StoreError
from afn_ray.store import storage

THREADS = 16
ICEBERG_METADATA = re.compile(r"[^/]+\.metadata\.json(\.gz)?|version-hint\.text")
MARK = re.compile(
    rf"/(?:(?:_delta_log|\.hoodie|_spark_metadata)(?=/|$)|metadata(?:/(?:{ICEBERG_METADATA.pattern}))?$)"
)
"""What the name of a file or folder in a table has behind the table's own; a look there says
whether it is one.
"""
ROOT = re.compile(r"[a-z0-9+.-]+://[^/]*")
HTTP = ("http://", "https://")
"""Servers that answer what they like for what is not there."""

GLOB = re.compile(r"(?:(?<=/)|^)[^/]*[*?[]")
"""The first part of a path with a wildcard."""


class _Kind(NamedTuple):
    name: str
    mark: str  # name of a folder right below the table's
    export: str  # command that writes the current version of the table at {0}


DELTA = _Kind(
    "a Delta Lake table",
    "_delta_log",
    """duckdb -c "COPY (FROM delta_scan('{0}')) TO 'corpus.parquet'\"""",
)
HUDI = _Kind(
    "an Apache Hudi table",
    ".hoodie",
    """in pyspark spark.read.format("hudi").load("{0}").write.parquet("corpus")""",
)
SINK = _Kind(
    "what a Spark stream writes",
    "_spark_metadata",
    """in pyspark spark.read.parquet("{0}").write.parquet("corpus")""",
)
ICEBERG = _Kind(
    "an Iceberg table",
    "metadata",
    """duckdb -c "COPY (FROM iceberg_scan('{0}')) TO 'corpus.parquet'\"""",
)
KINDS = (DELTA, HUDI, SINK, ICEBERG)


def refuse_tables(patterns: Iterable[str], uris: Iterable[str]) -> None:
    """Raise ``CorpusError`` where what ``patterns`` name is a table, is in one, or has one below
    it.

    ``uris``: all that was seen as they were listed, hidden names too where they are remote. Only
    there may a look at each folder take long, so the listing says which to look at; what is above a
    pattern was not listed.
    """
    local: set[str] = set()
    folders: set[str] = set()
    for uri in uris:
        if "://" not in uri:
            local.add(uri.rpartition("/")[0])
        elif not uri.startswith(HTTP):
            folders.update(uri[: mark.start()] for mark in MARK.finditer(uri))
    for folder in local:
        folders.update(_above(folder))
    for pattern in patterns:
        root = storage.absolute(GLOB.split(pattern)[0]).rstrip("/")
        if "://" in root and not root.startswith(HTTP) and not ROOT.fullmatch(root):
            folders.update(_above(root.rpartition("/")[0]))
    ordered = sorted(folders)
    with ThreadPoolExecutor(THREADS) as pool:
        for folder, kind in zip(ordered, pool.map(_kind, ordered), strict=True):
            if kind is not None:
                raise CorpusError(
                    f"{folder} is {kind.name} (it has {kind.mark}): its log alone says which of its files count, and "
                    "files of deleted and replaced rows stay beside them. Export its current version and name that, "
                    f"as with: {kind.export.format(folder)}"
                )


def _above(folder: str) -> list[str]:
    """``folder`` and those above it, but for partitions (``year=2026``), which are never tables
    themselves.

    Nor the root of a bucket: who may read a prefix alone may not look there.
    """
    folders: list[str] = []
    while folder and not ROOT.fullmatch(folder):
        if "=" not in folder.rpartition("/")[2]:
            folders.append(folder)
        folder = folder.rpartition("/")[0]
    return folders


def _kind(folder: str) -> _Kind | None:
    for kind in KINDS:
        try:
            place = storage.join(folder, kind.mark)
            if not storage.exists(place):
                continue
            if kind is not ICEBERG or any(
                map(ICEBERG_METADATA.fullmatch, storage.list_names(place))
            ):
                return kind
        except StoreError:  # it may not be looked at, as what is above a prefix that one may read
            continue
    return None
