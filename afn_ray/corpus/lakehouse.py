"""Detect and refuse tables of Delta Lake, Iceberg or Hudi.

Their log lists which files are valid, and afn-ray does not read it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from afn_ray.errors import CorpusError, StoreError
from afn_ray.store import storage, uris

THREADS = 16
"""Most folders checked at the same time."""
ICEBERG_METADATA = re.compile(r"[^/]+\.metadata\.json(\.gz)?|version-hint\.text")
MARK = re.compile(
    rf"/(?:(?:_delta_log|\.hoodie|_spark_metadata)(?=/|$)"
    rf"|metadata(?:/(?:{ICEBERG_METADATA.pattern}))?$)"
)
"""Path of a file or folder that suggests a table: what follows the table's own path.

A check of the folder then shows whether it is one.
"""
IN_ARCHIVE = re.compile(
    rf"(^|/)((_delta_log|\.hoodie|_spark_metadata)/|metadata/({ICEBERG_METADATA.pattern})$)"
)
"""Path of a member of an archive that is in the log of a table."""
ROOT = re.compile(r"hf://[a-z]+/[^/]+/[^/]+|[a-z0-9+.-]+://[^/]*")
"""The root of a bucket, or of a dataset of the Hub."""
HTTP = ("http://", "https://")
"""Web servers are not checked: their answers for missing files are unreliable."""

GLOB = re.compile(r"(?:(?<=/)|^)[^/]*[*?[]")
"""The first part of a path with a wildcard."""


class _TableKind(NamedTuple):
    name: str
    mark: str
    """Name of a folder directly below the table's."""
    export: str
    """Command that exports the current version of the table at ``{0}``."""
    instead: str = ""
    """Remedy beside an export, if there is one."""


DELTA = _TableKind(
    "a Delta Lake table",
    "_delta_log",
    """duckdb -c "COPY (FROM delta_scan('{0}')) TO 'corpus.parquet'\"""",
)
HUDI = _TableKind(
    "an Apache Hudi table",
    ".hoodie",
    """in pyspark spark.read.format("hudi").load("{0}").write.parquet("corpus")""",
)
SINK = _TableKind(
    "what a Spark stream writes",
    "_spark_metadata",
    """in pyspark spark.read.parquet("{0}").write.parquet("corpus")""",
)
ICEBERG = _TableKind(
    "an Iceberg table",
    "metadata",
    """duckdb -c "COPY (FROM iceberg_scan('{0}')) TO 'corpus.parquet'\"""",
    " Or name its current metadata file, which its catalog knows as metadata_location",
)
KINDS = (DELTA, HUDI, SINK, ICEBERG)


def refuse_tables(patterns: Iterable[str], listed: Iterable[str]) -> None:
    """Raise ``CorpusError`` if ``patterns`` name a table, are in one, or have one below them.

    ``listed`` are all files and folders that the listing returned; on remote filesystems also
    hidden ones. A check of every remote folder would take long, so there the listing selects the
    folders to check. Folders above a pattern were not listed and are always checked.
    """
    local: set[str] = set()
    folders: set[str] = set()
    for uri in listed:
        if (parts := uris.split_member(uri)) is not None:
            if IN_ARCHIVE.search(parts[1]):
                raise CorpusError(
                    f"{parts[0]} has a table of a lakehouse ({parts[1]}), whose log alone says "
                    "which of its files count; export the table's current version and name that"
                )
        elif "://" not in uri:
            local.add(uri.rpartition("/")[0])
        elif not uri.startswith(HTTP):
            folders.update(uri[: mark.start()] for mark in MARK.finditer(uri))
    for folder in local:
        folders.update(_above(folder))
    for pattern in patterns:
        archive, _ = uris.split_member(pattern) or (pattern, "")
        root = uris.absolute(GLOB.split(archive)[0]).rstrip("/")
        if "://" in root and not root.startswith(HTTP) and not ROOT.fullmatch(root):
            folders.update(_above(root.rpartition("/")[0]))
    ordered = sorted(folders)
    with ThreadPoolExecutor(THREADS) as pool:
        for folder, kind in zip(ordered, pool.map(_kind, ordered), strict=True):
            if kind is not None:
                raise CorpusError(
                    f"{folder} is {kind.name} (it has {kind.mark}): its log alone says which of "
                    "its files count, and files of deleted and replaced rows stay beside them. "
                    "Export its current version and name that, as with: "
                    f"{kind.export.format(folder)}{kind.instead and '.'}{kind.instead}"
                )


def _above(folder: str) -> list[str]:
    """``folder`` and its parents, except partitions (``year=2026``) and the root of a bucket.

    A partition is never a table itself. A user who may read only a prefix cannot read the root.
    """
    folders: list[str] = []
    while folder and not ROOT.fullmatch(folder):
        if "=" not in folder.rpartition("/")[2]:
            folders.append(folder)
        folder = folder.rpartition("/")[0]
    return folders


def _kind(folder: str) -> _TableKind | None:
    """The kind of table that ``folder`` is; None if it is none or cannot be read."""
    for kind in KINDS:
        # A user may have no permission, for example above the prefix that the user may read.
        with contextlib.suppress(StoreError):
            if _is_table(folder, kind):
                return kind
    return None


def _is_table(folder: str, kind: _TableKind) -> bool:
    mark = uris.join(folder, kind.mark)
    if not storage.exists(mark):
        return False
    if kind is not ICEBERG:
        return True
    return any(ICEBERG_METADATA.fullmatch(name) for name in storage.list_names(mark))
