"""Probes of a filesystem: whether it can hold a store, what it lacks, and what its clock says."""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from afn_ray.errors import StoreError
from afn_ray.store import disk, storage, uris
from afn_ray.store.fs_calls import call_with_retries

TEXT = b"afn-ray tests this filesystem; this file can be deleted\n"
"""Content of a probe file."""


def clock_s(uri: str) -> float:
    """Current Unix time by the clock of the filesystem at ``uri``, which dates its files.

    It writes a probe file to find out, and deletes it.
    """
    probe = uris.join(uri, f"probe-{uuid.uuid4().hex}")
    try:
        with contextlib.suppress(storage.AlreadyWritten):
            storage.write_once(probe, TEXT)
        fs, path = uris.open_filesystem(probe)
        return call_with_retries(
            fs, "examining", probe, StoreError, lambda: storage.entry_modified_s(fs.info(path))
        )
    finally:
        storage.delete([probe])


def check_writable(uri: str) -> None:
    """Check that files can be created and deleted below ``uri``. Raises ``StoreError`` if not.

    Also raises it if the filesystem lets a second writer replace a file.
    """
    probe = uris.join(uri, f"probe-{uuid.uuid4().hex}")
    try:
        # The name is unique, so AlreadyWritten means that the answer to our own first try was lost.
        with contextlib.suppress(storage.AlreadyWritten):
            storage.write_once(probe, TEXT)
        storage.write_once(probe, TEXT)
    except storage.AlreadyWritten:
        return
    finally:
        storage.delete([probe])
    raise StoreError(
        f"{uri}: its filesystem lets a second writer replace a file, so commits there would not be "
        "safe; use a store on another filesystem"
    )


def try_writable(uri: str) -> None:
    """Like ``check_writable``, but remove the folders that it creates on a local disk."""
    missing: list[Path] = []
    if "://" not in uri:
        folders = (Path(uri), *Path(uri).parents)
        missing = list(itertools.takewhile(_is_missing, folders))
    try:
        check_writable(uri)
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # now used by another process, or never created
                folder.rmdir()


def _is_missing(path: Path) -> bool:
    # pathlib's ``exists`` does not report a name that is too long.
    return not os.path.exists(path)  # noqa: PTH110


def find_lacks(uri: str) -> list[str]:
    """Features that the filesystem of the writable folder ``uri`` lacks, and their substitutes."""
    fs, path = uris.open_filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        return []
    return call_with_retries(fs, "examining", uri, StoreError, lambda: disk.find_lacks(Path(path)))
