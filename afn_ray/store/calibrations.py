"""Calibrations that a store keeps for later runs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from afn_ray.schema import SCHEMA_VERSION
from afn_ray.store import storage, uris
from afn_ray.store.checksums import checksummed, parse_json, read_json


def read_calibration(store: str, key: str) -> dict[str, Any] | None:
    """The calibration that an earlier run stored under ``key``; None if there is none."""
    return read_json(uris.join(store, "pilots", f"{key}.json"))


def write_calibration(store: str, key: str, value: Mapping[str, object]) -> dict[str, Any]:
    """Store the calibration ``value`` under ``key``; return the stored one, ours or a rival's."""
    uri = uris.join(store, "pilots", f"{key}.json")
    body = {"schema_version": SCHEMA_VERSION, **value}
    with contextlib.suppress(storage.AlreadyWritten):
        storage.write_once(uri, checksummed(body))
    return parse_json(storage.read_bytes(uri), uri)
