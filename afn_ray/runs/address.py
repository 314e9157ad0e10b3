"""Address of the Ray that a run joins, checked without loading Ray."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from afn_ray.errors import ConfigError

FORM = "expected host:6379 of the cluster's head, auto or local"
"""Expected form of an address, for messages."""


def of_cluster(given: str | None) -> str | None:
    """Address of an existing cluster, from ``given`` or ``RAY_ADDRESS``; None: a local Ray."""
    where = (given or os.environ.get("RAY_ADDRESS") or "").strip()
    return None if where in ("", "local") else where


def check(where: str) -> None:
    """Raise ``ConfigError`` unless ``where`` is the address of a cluster's head."""
    scheme, has_scheme, rest = where.partition("://")
    if scheme in ("http", "https") and has_scheme:
        plain = f"{scheme}://{rest.rpartition('@')[2]}"  # without a password
        raise ConfigError(
            f"{plain} is the address of Ray's dashboard, which takes jobs, not connections: submit "
            f"the command there (ray job submit --address {plain} -- afn run ...), or give "
            "host:6379 of the cluster's head"
        )
    if scheme == "ray" and has_scheme:
        raise ConfigError(
            f"{where} is an address of Ray Client, which afn-ray does not use: give host:6379 on a "
            "machine of the cluster, or submit the command as a job"
        )
    if where != "auto":
        host_and_port(where)


def host_and_port(where: str) -> tuple[str, int]:
    """Host and port of ``host:port``. Raises ``ConfigError`` for anything else."""
    try:
        parts = urlsplit(f"//{where}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{where!r} is no address of a Ray cluster: {error}; {FORM}") from error
    if (
        "://" in where
        or not host
        or not port
        or parts.path
        or parts.query
        or parts.username
        or " " in where
    ):
        lacks = "it has no port" if host == where.lower() else "it is not host:port"
        raise ConfigError(f"{where!r} is no address of a Ray cluster: {lacks}; {FORM}")
    return host, port
