"""One difference between a store and what was committed, and the check of one file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afn_ray.errors import StoreError
from afn_ray.store import (
    checksums,
    storage,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference between the store and what was committed.

    ``kind`` is one of:

    - "missing": a file is missing.
    - "damaged": bytes differ from those written.
    - "misplaced": a file of another measure, shard, attempt or run.
    - "plan": a plan reads part of the corpus twice or never.
    - "rows": an error in the rows of a shard.
    - "tables": tables of a run that do not match its shards.
    """

    kind: str
    uri: str
    message: str  # got against expected, and what to do


def without_uri(error: StoreError, uri: str) -> str:
    """The message of ``error`` without its URI and its advice to verify.

    A finding prints the URI first, and this is already 'afn verify'.
    """
    return (
        str(error)
        .removeprefix(f"{uri} ")
        .removeprefix("is damaged: ")
        .removesuffix(checksums.ASK_VERIFY)
    )


def read_listed(uri: str, entry: Mapping[str, Any], advice: str) -> tuple[bytes, Finding | None]:
    """Read the file at ``uri``; compare its size and checksum with ``entry``."""
    try:
        data = storage.read_if_there(uri)
    except StoreError as error:
        return b"", Finding("damaged", uri, f"{error}; {advice}")
    if data is None:
        return b"", Finding("missing", uri, f"there is no such file; {advice}")
    if len(data) != entry.get("bytes"):
        return data, Finding(
            "damaged", uri, f"it has {len(data)} bytes, expected {entry.get('bytes')}; {advice}"
        )
    if (got := hashlib.sha256(data).hexdigest()) != entry.get("sha256"):
        return data, Finding(
            "damaged", uri, f"its SHA-256 is {got}, expected {entry.get('sha256')}; {advice}"
        )
    return data, None
