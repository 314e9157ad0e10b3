"""Files of a store: list, read, write once, upload, delete."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from afn_ray.errors import AfnError, StoreError, Unavailable
from afn_ray.store import disk, uris
from afn_ray.store.fs_calls import NO_BUCKET, FsEntry, call_with_retries, find_entry, named_errors
from afn_ray.store.retry import http_status, with_retries

DELETE_FOR_S = 10.0
"""Longest retry time of a deletion, in seconds.

It is short, because a file that stays is only garbage, and the caller is about to end.
"""


class AlreadyWritten(AfnError):
    """The object exists: another writer, or an earlier try, has created it."""


# --- reading


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes ``start`` to ``end`` (exclusive) of ``uri``; by default all of it.

    Raises ``StoreError`` if the file does not exist.
    """
    fs, path = uris.open_filesystem(uri)

    def read() -> bytes:
        if isinstance(fs, LocalFileSystem):
            disk.check_ends(Path(path))
        return bytes(fs.cat_file(path, start=start, end=end))

    try:
        return call_with_retries(fs, "reading", uri, StoreError, read)
    except StoreError as error:
        if not start and http_status(error) == 416:  # the range does not exist: the object is empty
            return b""
        raise


def read_if_there(uri: str, most_bytes: int | None = None) -> bytes | None:
    """All of ``uri``; None if there is no such file.

    Raises ``StoreError`` if it is larger than ``most_bytes``.
    """
    end = None if most_bytes is None else most_bytes + 1
    try:
        data = read_bytes(uri, 0, end)
        is_claim = not data and uris.is_local(uri)  # a writer has claimed the name
        if is_claim and disk.wait_for_content(Path(uris.absolute(uri)), disk.READER_S):
            data = read_bytes(uri, 0, end)
        if most_bytes is not None and len(data) > most_bytes:
            raise StoreError(
                f"{uri} has more than {most_bytes:,} bytes, so afn-ray did not write it"
            )
        return data
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise


def exists(uri: str) -> bool:
    """True if there is a file or folder at ``uri`` now."""
    fs, path = uris.open_filesystem(uri)
    info = call_with_retries(fs, "examining", uri, StoreError, lambda: find_entry(fs, path))
    return info is not None


def list_names(uri: str) -> list[str]:
    """Names directly below the folder ``uri``, sorted; empty if there is no such folder."""
    fs, path = uris.open_filesystem(uri)

    def names() -> list[str]:
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError as error:
            if NO_BUCKET in str(error):
                raise
            return []
        paths = [str(name).rstrip("/") for name in found]
        return sorted(map(posixpath.basename, paths))

    return call_with_retries(fs, "listing", uri, StoreError, names)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a store, as the filesystem lists it."""

    uri: str
    size: int
    """Size in bytes."""
    modified_s: float
    """Unix time of the last change; the current time if the filesystem does not report one."""

    @property
    def name(self) -> str:
        """Name of the file in its folder."""
        return self.uri.rpartition("/")[2]


def list_below(uri: str) -> list[StoredFile]:
    """Every file below the folder ``uri``, hidden ones too, sorted by URI; empty if there is none.

    Files that appear or vanish during the listing may be missing or included. Links are left out: a
    store has none.
    """
    fs, path = uris.open_filesystem(uri)

    def files() -> list[StoredFile]:
        try:
            found = fs.find(path, detail=True)
        except FileNotFoundError:
            return []
        stored = []
        for name, info in found.items():
            if info["type"] == "file":
                file_uri = str(fs.unstrip_protocol(name))
                stored.append(StoredFile(file_uri, int(info["size"]), entry_modified_s(info)))
        return stored

    def local_files() -> list[StoredFile]:
        return list(_local_files(path))

    call = local_files if isinstance(fs, LocalFileSystem) else files
    listed = call_with_retries(fs, "listing", uri, StoreError, call)
    return sorted(listed, key=lambda file: file.uri)


def _local_files(folder: str) -> Iterator[StoredFile]:
    """Every regular file below a local folder, as for ``list_below``.

    fsspec's ``walk()`` is not used: it raises for a file that vanishes during the listing.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error  # a folder that cannot be listed must not pass as empty

    for base, _, names in os.walk(folder, onerror=fail):
        for name in names:
            path = Path(base, name)
            with contextlib.suppress(FileNotFoundError):
                info = path.lstat()
                if S_ISREG(info.st_mode):
                    yield StoredFile(str(path), info.st_size, info.st_mtime)


def entry_modified_s(info: FsEntry) -> float:
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if value is not None:
            return float(value)
    return time.time()


# --- writing


def write_once(uri: str, data: bytes) -> None:
    """Create ``uri`` with ``data``, whole or not at all. Raises ``AlreadyWritten`` if it exists.

    On a remote filesystem, that file may be our own: an earlier try may have written it although
    its answer was lost. After ``Unavailable`` it is unknown whether the file exists or will exist.
    """
    fs, path = uris.open_filesystem(uri)
    local = isinstance(fs, LocalFileSystem)

    def create() -> None:
        if local:
            try:
                disk.create_once(Path(path), data)
            except disk.NameTaken:
                raise AlreadyWritten(uri) from None
            return
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            raise AlreadyWritten(uri) from None
        except OSError as error:
            # Not every store says which precondition failed; we set only one.
            if http_status(error) == 412:
                raise AlreadyWritten(uri) from None
            raise

    call_with_retries(fs, "writing", uri, StoreError, create)


def write_over(uri: str, data: bytes, retry_for_s: float | None = 0) -> None:
    """Write ``data`` to ``uri``, whole or not at all, replacing what is there. Not for results.

    Transient errors are retried for ``retry_for_s``: by default not at all, None for as long as
    those of other calls. Raises ``StoreError`` or ``Unavailable``; then it is unknown whether the
    old or the new content is there.
    """
    fs, path = uris.open_filesystem(uri)
    local = isinstance(fs, LocalFileSystem)

    def write() -> None:
        if local:
            disk.replace(Path(path), data)
        else:
            fs.pipe_file(path, data)

    with named_errors("writing", uri, StoreError):
        with_retries(write, f"writing {uri}", local=local, retry_for_s=retry_for_s)


def make_folder(uri: str) -> None:
    """Make the local folder ``uri`` with its parents. Object stores have no folders."""
    fs, path = uris.open_filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with named_errors("making", uri, StoreError):
            Path(path).mkdir(parents=True, exist_ok=True)


def upload(local: Path, uri: str) -> None:
    """Copy the finished file ``local`` to ``uri``, which appears whole or not at all."""
    fs, path = uris.open_filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        call_with_retries(fs, "writing", uri, StoreError, lambda: disk.copy(local, Path(path)))
    else:
        call_with_retries(fs, "writing", uri, StoreError, lambda: fs.put_file(str(local), path))


@contextlib.contextmanager
def write_whole(target: str) -> Iterator[IO[bytes]]:
    """The file or object ``target``, a path or URL, open for writing; it appears whole or not at
    all.

    An object is gathered in the system's temporary folder, and uploaded on success; it replaces one
    of its name. Raises ``ConfigError`` if ``target`` cannot be opened or written, ``StoreError`` or
    ``Unavailable`` if the upload fails.
    """
    if uris.is_local(target):
        with disk.write_local(Path(uris.path_in(target))) as file:
            yield file
        return
    with tempfile.TemporaryDirectory(prefix="afn-", dir=disk.scratch_folder(None)) as folder:
        gathered = Path(folder) / "file"
        with disk.write_local(gathered) as file:
            yield file
        upload(gathered, target)


def delete(files: list[str]) -> None:
    """Remove files that nothing refers to; one that cannot be removed stays, without an error."""
    for uri in files:
        try:
            remove(uri, DELETE_FOR_S)
        except StoreError:
            continue
        except Unavailable:
            return  # the store would not answer for the other files either


def remove(uri: str, retry_for_s: float | None = None) -> None:
    """Remove the file ``uri``; a missing file is no error.

    Raises ``StoreError`` if the file must not be removed, ``Unavailable`` if the store does not
    answer for ``retry_for_s``.
    """
    fs, path = uris.open_filesystem(uri)
    with named_errors("deleting", uri, StoreError), contextlib.suppress(FileNotFoundError):
        with_retries(
            partial(fs.rm_file, path),
            f"deleting {uri}",
            local=isinstance(fs, LocalFileSystem),
            retry_for_s=retry_for_s,
        )


def remove_if_empty(uri: str) -> None:
    """Remove the folder ``uri`` if it is empty. Object stores have no folders."""
    fs, path = uris.open_filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with named_errors("deleting", uri, StoreError), contextlib.suppress(FileNotFoundError):
            try:
                Path(path).rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise


def modified_s(uri: str) -> float | None:
    """Unix time when ``uri`` was written, by its filesystem's clock; None if there is no file."""
    fs, path = uris.open_filesystem(uri)
    info = call_with_retries(fs, "examining", uri, StoreError, lambda: find_entry(fs, path))
    return None if info is None else entry_modified_s(info)
