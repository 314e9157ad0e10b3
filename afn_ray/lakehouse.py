"""Folders that are tables of Delta Lake, Iceberg or Hudi: their log says which files count, and it is not read here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from afn_ray import storage
from afn_ray.errors import CorpusError, StoreError

THREADS = 16
ICEBERG_METADATA = re.compile(r".+\.metadata\.json(\.gz)?|version-hint\.text")
ROOT = re.compile(r"[a-z0-9+.-]+://[^/]*")

GLOB = re.compile(r"(?:(?<=/)|^)[^/]*[*?[]")
"""The first part of a path with a wildcard."""


class _Kind(NamedTuple):
    name: str
    mark: str  # name of a folder right below the table's
    export: str  # command that writes the current version of the table at {0}


DELTA = _Kind("a Delta Lake table", "_delta_log", """duckdb -c "COPY (FROM delta_scan('{0}')) TO 'corpus.parquet'\"""")
HUDI = _Kind(
    "an Apache Hudi table", ".hoodie", """in pyspark spark.read.format("hudi").load("{0}").write.parquet("corpus")"""
)
SINK = _Kind(
    "what a Spark stream writes", "_spark_metadata", """in pyspark spark.read.parquet("{0}").write.parquet("corpus")"""
)
ICEBERG = _Kind("an Iceberg table", "metadata", """duckdb -c "COPY (FROM iceberg_scan('{0}')) TO 'corpus.parquet'\"""")
KINDS = (DELTA, HUDI, SINK, ICEBERG)


def refuse_patterns(patterns: Iterable[str]) -> None:
    """``refuse_tables`` for what globs begin with, and for what is no glob; reads no listing."""
    refuse_tables(storage.absolute(GLOB.split(pattern)[0]) for pattern in patterns)


def refuse_tables(uris: Iterable[str]) -> None:
    """Raise ``CorpusError`` where a file or folder of ``uris`` is a table or part of one."""
    folders = sorted({folder for uri in uris for folder in _above(uri)})
    with ThreadPoolExecutor(THREADS) as pool:
        for folder, kind in zip(folders, pool.map(_kind, folders), strict=True):
            if kind is not None:
                raise CorpusError(
                    f"{folder} is {kind.name} (it has {kind.mark}): its log alone says which of its files count, and "
                    "files of deleted and replaced rows stay beside them. Export its current version and name that, "
                    f"as with: {kind.export.format(folder)}"
                )


def _above(uri: str) -> list[str]:
    """``uri`` and the folders above it, but for partitions (``year=2026``), which are never tables themselves."""
    folders: list[str] = []
    folder = uri.rstrip("/")
    if folder.startswith(("http://", "https://")):  # servers answer what they like for what is not there
        return folders
    while folder:
        if "=" not in folder.rpartition("/")[2]:
            folders.append(folder)
        folder = "" if ROOT.fullmatch(folder) else folder.rpartition("/")[0]
    return folders


def _kind(folder: str) -> _Kind | None:
    for kind in KINDS:
        try:
            place = storage.join(folder, kind.mark)
            if not storage.exists(place):
                continue
            if kind is not ICEBERG or any(map(ICEBERG_METADATA.fullmatch, storage.list_names(place))):
                return kind
        except StoreError:  # it may not be looked at, as what is above a prefix that one may read
            continue
    return None
