"""Fingerprints: a short name for a value, the same on every machine and in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence


def fingerprint(value: object) -> str:
    """First 128 bits of the SHA-256 of ``value`` as canonical JSON, in hex."""
    text = _canonical(value)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fingerprint_of_rows(header: object, groups: Iterable[Sequence[object]]) -> str:
    """``fingerprint([header, rows])`` of all rows in ``groups``, one group in memory at a time.

    No group may be empty.
    """
    digest = hashlib.sha256(f"[{_canonical(header)},[".encode())
    for at, rows in enumerate(groups):
        comma = "," if at else ""
        listed = _canonical(list(rows))
        digest.update(f"{comma}{listed[1:-1]}".encode())
    digest.update(b"]]")
    return digest.hexdigest()[:32]


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
