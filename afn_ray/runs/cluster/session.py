"""Folder of a local Ray's session: it needs free space, and a path short enough for sockets."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from afn_ray.errors import ConfigError, Interrupted
from afn_ray.store import disk

SOCKET_BYTES = 107
"""Longest path of a Unix socket, in bytes."""
LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Longest path of a socket within Ray's folder."""
LEAST_BYTES = 16 << 20
"""Least free space for a local Ray to start, in bytes: for logs, port files and sockets."""


def folder() -> Path:
    """Ray's folder for sessions, from ``RAY_TMPDIR`` or ``TMPDIR``."""
    named = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
    return Path(named or "/tmp", "ray")  # noqa: S108 - Ray's default


def check() -> None:
    """Raise ``Interrupted`` where ``folder()`` is full or its path is too long for a local Ray.

    Ray itself waits half a minute for a file that it cannot write, without a reason. Raises
    ``ConfigError`` where the folder is not writable.
    """
    there = folder()
    longest = len(os.fsencode(there / LONGEST_SOCKET))
    if longest > SOCKET_BYTES:
        raise Interrupted(
            f"a local Ray cannot have its sockets in {there}: their paths would have {longest} "
            f"bytes, a socket's may have {SOCKET_BYTES}; set RAY_TMPDIR to a folder with a shorter "
            "path and run the same command again"
        )
    probe = there / f"afn-probe-{uuid.uuid4().hex}"
    try:
        there.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(there).free
        probe.touch()  # which a quota, or too few inodes, may refuse
    except OSError as error:
        if error.errno not in disk.FULL:
            raise ConfigError(
                f"a local Ray cannot write its folder {there}: {error.strerror}; set RAY_TMPDIR to "
                "another"
            ) from error
        free = 0
    finally:
        probe.unlink(missing_ok=True)
    if free < LEAST_BYTES:
        raise Interrupted(
            f"no space left for a local Ray in {there}: {free / 2**20:,.1f} MiB free, expected "
            f"{LEAST_BYTES >> 20}; make room, or set RAY_TMPDIR to another folder, and run the "
            "same command again: it resumes"
        )
