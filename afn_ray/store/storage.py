"""The only door to fsspec: list, read, write once, upload, delete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import os
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from stat import S_ISREG
from types import SimpleNamespace
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from afn_ray.errors import AfnError, ConfigError, CorpusError, Interrupted, StoreError, Unavailable
from afn_ray.schema import FileInfo
from afn_ray.store import disk, uris
from afn_ray.store.retry import http_status, with_retries

T = TypeVar("T")

READ_AHEAD_BYTES = 4 << 20
"""Largest read-ahead of a remote file, in bytes."""
DELETE_FOR_S = 10.0
"""Longest retry time of a deletion, in seconds.

It is short, because a file that stays is only garbage, and the caller is about to end.
"""

# Class names of errors of botocore, google.auth and azure.core. The packages are optional.
FOREIGN_ERRORS = frozenset(
    {"BotoCoreError", "ClientError", "HttpError", "GoogleAuthError", "AzureError"}
)
NO_CREDENTIALS = frozenset({
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError", "SSOError",
    "ProfileNotFound", "DefaultCredentialsError", "RefreshError", "ClientAuthenticationError",
})  # fmt: skip


UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK})
"""Errors of filesystems that do not support a call."""
NO_BUCKET = "bucket does not exist"
"""Text in the error of a missing bucket."""


class AlreadyWritten(AfnError):
    """The object exists: another writer, or an earlier try, has created it."""


@contextlib.contextmanager
def named_errors(action: str, uri: str, kind: type[AfnError]) -> Iterator[None]:
    """Raise filesystem errors as an ``AfnError`` that says what happened, where, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in disk.FULL:
            raise Interrupted(
                f"no space left while {action} {uri}; make room and run the same command again: it "
                "resumes"
            ) from error
        if isinstance(error, FileNotFoundError):
            what = "bucket" if NO_BUCKET in str(error) else "file or folder"
            raise kind(f"{action} {uri}: no such {what}") from error
        if isinstance(error, PermissionError):
            why = f" ({error})" if error.errno is None and str(error) else ""
            raise kind(
                f"{action} {uri}: permission denied; check owner, mode or credentials{why}"
            ) from error
        if error.errno in UNSUPPORTED:
            raise kind(
                f"{action} {uri}: its filesystem does not support that ({error.strerror}); use a "
                "folder elsewhere"
            ) from error
        raise kind(f"{action} {uri}: {error.strerror or error}") from error
    except Exception as error:
        names = {c.__name__ for c in type(error).__mro__}
        if not names.isdisjoint(NO_CREDENTIALS):
            raise kind(
                f"{action} {uri}: {error}; give credentials in the environment, as for the store's "
                "own tools"
            ) from error
        # botocore raises ValueError for a malformed endpoint in the environment.
        if isinstance(error, ValueError) and "endpoint" in str(error):
            raise ConfigError(
                f"{action} {uri}: {error}; AWS_ENDPOINT_URL wants the form http://host:port"
            ) from error
        if not names.isdisjoint(FOREIGN_ERRORS):
            raise kind(f"{action} {uri}: {error}") from error
        raise


def call_with_retries(
    fs: fsspec.AbstractFileSystem,
    action: str,
    uri: str,
    kind: type[AfnError],
    call: Callable[[], T],
) -> T:
    """Call ``call()`` on ``fs`` and retry transient errors; raise errors as ``AfnError``.

    Raises ``Unavailable`` when the retries are used up, and ``kind`` for other errors.
    """
    with named_errors(action, uri, kind):
        return with_retries(call, f"{action} {uri}", local=isinstance(fs, LocalFileSystem))


# --- reading


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(key):
            return f"etag:{str(info[key]).strip(chr(34))}"
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        if info.get(key) is not None:
            return f"time:{info[key]}"
    return ""


def _file_info(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> FileInfo:
    name = str(info["name"])
    if isinstance(fs, LocalFileSystem):
        now = Path(name).stat()
        return FileInfo(name, now.st_size, f"time:{now.st_mtime_ns}")
    if info.get("size") is None:
        raise CorpusError(
            f"{name}: its size is unknown, so it cannot be read in parts; copy it to a store that "
            "tells"
        )
    return FileInfo(str(fs.unstrip_protocol(name)), int(info["size"]), _version(info))


def stat(uri: str) -> FileInfo:
    """Current size and version of one file. Raises ``CorpusError`` if it is gone or unreadable."""
    fs, path = uris.open_filesystem(uri)
    return call_with_retries(
        fs, "looking at", uri, CorpusError, lambda: _file_info(fs, fs.info(path))
    )


def find_files(pattern: str, left_out: set[str] | None = None) -> list[FileInfo]:
    """Files that ``pattern`` names, sorted by URI: a file, all files below a folder, or a glob.

    Hidden files and folders (``.x``, ``_x``) below a folder are left out, as in Spark and Hive.
    Links are followed. Raises ``CorpusError`` if no file matches, or if something cannot be listed.
    ``left_out`` collects the other files and folders of a remote listing.
    """
    fs, path = uris.open_filesystem(pattern)
    others: list[str] = []
    found = call_with_retries(
        fs, "listing", pattern, CorpusError, lambda: _match(fs, path, pattern, others)
    )
    if left_out is not None:
        left_out.update(str(fs.unstrip_protocol(name)).rstrip("/") for name in others)
    if not found:
        raise CorpusError(f"{pattern}: no files match")
    for file in found:
        if not file.uri.isascii() and any("\ud800" <= c <= "\udfff" for c in file.uri):
            raise CorpusError(
                f"listing {pattern}: the name of {file.uri!r} is not UTF-8; rename or move the file"
            )
    return sorted(found, key=lambda f: f.uri)


def _match(
    fs: fsspec.AbstractFileSystem, path: str, pattern: str, left_out: list[str]
) -> list[FileInfo]:
    local = isinstance(fs, LocalFileSystem)
    info = _info(fs, path)
    # A pattern that is the exact name of a file or folder is no glob, even if it contains * or [.
    if info is not None and info["type"] == "file":
        return [_file_info(fs, info)]
    if info is not None and info["type"] == "directory":
        if local:
            return [_file_info(fs, {"name": name}) for name in _walk(path)]

        def is_plain(name: str) -> bool:
            return not any(_is_hidden(part) for part in posixpath.relpath(name, path).split("/"))

        return [_file_info(fs, info) for info in _sifted(_below(fs, path), is_plain, left_out)]
    if not any(c in path for c in "*?["):
        raise FileNotFoundError(pattern)
    if local:
        return [_file_info(fs, {"name": name}) for name in fs.glob(path) if Path(name).is_file()]
    return [_file_info(fs, info) for info in _glob(fs, path, left_out)]


def _sifted(
    entries: Iterable[dict[str, Any]], is_wanted: Callable[[str], Any], left_out: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the ``entries`` whose names are wanted; append the other names to ``left_out``."""
    for info in entries:
        if is_wanted(info["name"]):
            yield info
        else:
            left_out.append(info["name"])


def _info(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any] | None:
    """The entry of ``path`` in ``fs``; None if there is none.

    fsspec's ``exists()`` is not used: it reports any failure as absence.
    """
    try:
        return cast(dict[str, Any], fs.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _below(fs: fsspec.AbstractFileSystem, folder: str) -> Iterator[dict[str, Any]]:
    """All files below ``folder``.

    fsspec's generic ``find()`` skips folders that it cannot list; the ``find()`` of object stores
    does not.
    """
    own = getattr(type(fs), "_find", None) not in (None, AsyncFileSystem._find) or (
        not isinstance(fs, AsyncFileSystem) and type(fs).find is not fsspec.AbstractFileSystem.find
    )
    found = fs.find(folder, detail=True, **({} if own else {"on_error": "raise"}))
    return (
        info for name, info in found.items() if info["type"] == "file" and not name.endswith("/")
    )


def _glob(
    fs: fsspec.AbstractFileSystem, pattern: str, left_out: list[str]
) -> Iterator[dict[str, Any]]:
    """Files that match ``pattern``, found level by level.

    fsspec's ``glob()`` is not used: like its ``find()``, it skips folders that it cannot list.
    """
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    folders = ["/".join(parts[:fixed])]
    for depth, part in enumerate(parts[fixed:], fixed + 1):
        matches = re.compile(
            glob_translate("/".join(parts[:depth] if "**" not in part else parts))
        ).match
        if "**" in part:
            for folder in folders:
                yield from _sifted(_below(fs, folder), matches, left_out)
            return
        entries = [
            i for folder in folders for i in _sifted(fs.ls(folder, detail=True), matches, left_out)
        ]
        folders = [info["name"] for info in entries if info["type"] == "directory"]
        if depth == len(parts):
            yield from (info for info in entries if info["type"] == "file")
            left_out += folders


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _walk(folder: str) -> Iterator[str]:
    """Regular files below the local ``folder``, following links, without hidden ones.

    fsspec's ``walk()`` is not used: it skips folders that it cannot list and does not follow links.
    """

    def fail(error: OSError) -> None:
        raise CorpusError(
            f"listing {error.filename}: {error.strerror}; a corpus is listed whole or not at all"
        )

    seen: set[str] = set()  # a link may lead back to a parent folder
    for base, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for path in (posixpath.join(base, name) for name in names if not _is_hidden(name)):
            with named_errors("looking at", path, CorpusError):
                if S_ISREG(Path(path).stat().st_mode):  # a pipe would block its reader forever
                    yield path


def open_read(uri: str) -> IO[bytes]:
    """A seekable binary reader of ``uri``.

    On a remote filesystem it reads ahead and keeps no connection open.
    """
    fs, path = uris.open_filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return cast(
            IO[bytes],
            call_with_retries(fs, "opening", uri, CorpusError, lambda: fs.open(path, "rb")),
        )
    size = stat(uri).size

    def read(start: int, end: int) -> bytes:
        return call_with_retries(
            fs, "reading", uri, CorpusError, lambda: bytes(fs.cat_file(path, start=start, end=end))
        )

    return io.BufferedReader(
        RangeFile(read, size, SimpleNamespace()), max(1, min(READ_AHEAD_BYTES, size))
    )


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes ``start`` to ``end`` (exclusive) of ``uri``; by default all of it.

    Raises ``StoreError`` if the file does not exist.
    """
    fs, path = uris.open_filesystem(uri)
    try:
        return call_with_retries(
            fs, "reading", uri, StoreError, lambda: bytes(fs.cat_file(path, start=start, end=end))
        )
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
        if (
            not data
            and uris.is_local(uri)
            and disk.wait_for_content(Path(uris.absolute(uri)), disk.READER_S)
        ):
            data = read_bytes(uri, 0, end)
        if most_bytes is not None and len(data) > most_bytes:
            raise StoreError(
                f"{uri} has more than {most_bytes:,} bytes: it is none that afn-ray wrote"
            )
        return data
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise


def exists(uri: str) -> bool:
    """Whether there is a file or folder at ``uri`` now."""
    fs, path = uris.open_filesystem(uri)
    return call_with_retries(fs, "looking at", uri, StoreError, lambda: _info(fs, path)) is not None


def list_names(uri: str) -> list[str]:
    """Names directly below the folder ``uri``, sorted; empty if there is no such folder."""
    fs, path = uris.open_filesystem(uri)

    def names() -> list[str]:
        try:
            return sorted(posixpath.basename(str(p).rstrip("/")) for p in fs.ls(path, detail=False))
        except FileNotFoundError as error:
            if NO_BUCKET in str(error):
                raise
            return []

    return call_with_retries(fs, "listing", uri, StoreError, names)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a store, as the filesystem lists it."""

    uri: str
    size: int
    """Size in bytes."""
    modified_s: float
    """Unix time of the last change; the current time if the filesystem does not report one."""


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
        return [
            StoredFile(str(fs.unstrip_protocol(name)), int(info["size"]), _modified_s(info))
            for name, info in found.items()
            if info["type"] == "file"
        ]

    local = isinstance(fs, LocalFileSystem)
    ask = (lambda: list(_local_files(path))) if local else files
    return sorted(call_with_retries(fs, "listing", uri, StoreError, ask), key=lambda f: f.uri)


def _local_files(folder: str) -> Iterator[StoredFile]:
    """Every regular file below a local folder, as for ``list_below``.

    fsspec's ``walk()`` is not used: it raises for a file that vanishes during the listing.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error  # a folder that cannot be listed must not pass as empty

    for base, _, names in os.walk(folder, onerror=fail):
        for path in (Path(base, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                info = path.lstat()
                if S_ISREG(info.st_mode):
                    yield StoredFile(str(path), info.st_size, info.st_mtime)


def _modified_s(info: dict[str, Any]) -> float:
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
    write = (
        (lambda: disk.replace(Path(path), data)) if local else (lambda: fs.pipe_file(path, data))
    )
    with named_errors("writing", uri, StoreError):
        with_retries(write, f"writing {uri}", local=local, retry_for_s=retry_for_s)


def upload(local: Path, uri: str) -> None:
    """Copy the finished file ``local`` to ``uri``, an attempt-unique name.

    Nothing reads that name before its commit.
    """
    fs, path = uris.open_filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        call_with_retries(fs, "writing", uri, StoreError, lambda: disk.copy(local, Path(path)))
    else:
        call_with_retries(fs, "writing", uri, StoreError, lambda: fs.put_file(str(local), path))


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
    info = call_with_retries(fs, "looking at", uri, StoreError, lambda: _info(fs, path))
    return None if info is None else _modified_s(info)


def clock_s(uri: str) -> float:
    """Current Unix time by the clock of the filesystem at ``uri``, which dates its files.

    It writes a probe file to find out, and deletes it.
    """
    probe = uris.join(uri, f"probe-{uuid.uuid4().hex}")
    try:
        with contextlib.suppress(AlreadyWritten):
            write_once(probe, b"afn-ray asks what time it is here; this file can be deleted\n")
        fs, path = uris.open_filesystem(probe)
        return call_with_retries(
            fs, "looking at", probe, StoreError, lambda: _modified_s(fs.info(path))
        )
    finally:
        delete([probe])


def check_writable(uri: str) -> None:
    """Check that files can be created and deleted below ``uri``. Raises ``StoreError`` if not.

    Also raises it if the filesystem lets a second writer replace a file.
    """
    _probe(uri)


def try_writable(uri: str) -> None:
    """Like ``check_writable``, but remove the folders that it creates on a local disk."""
    local = None if "://" in uri else Path(uri)
    missing = (
        [] if local is None else list(itertools.takewhile(_is_missing, (local, *local.parents)))
    )
    try:
        _probe(uri)
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # now used by another process, or never created
                folder.rmdir()


def _is_missing(path: Path) -> bool:
    return not os.path.exists(path)  # noqa: PTH110 - which pathlib's does not say of a name that is too long


def _probe(uri: str) -> None:
    probe = uris.join(uri, f"probe-{uuid.uuid4().hex}")
    text = b"afn-ray asks whether this store can be written; this file can be deleted\n"
    try:
        # The name is unique, so AlreadyWritten means that the answer to our own first try was lost.
        with contextlib.suppress(AlreadyWritten):
            write_once(probe, text)
        write_once(probe, text)
    except AlreadyWritten:
        return
    finally:
        delete([probe])
    raise StoreError(
        f"{uri}: its filesystem lets a second writer replace a file, so commits there would not be "
        "safe"
    )


def find_lacks(uri: str) -> list[str]:
    """What the filesystem of the writable folder ``uri`` lacks, and what is done instead."""
    fs, path = uris.open_filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        return []
    return call_with_retries(fs, "looking at", uri, StoreError, lambda: disk.find_lacks(Path(path)))


@contextlib.contextmanager
def write_local(path: Path) -> Iterator[IO[bytes]]:
    """A local file, open for writing, that appears whole on success or not at all.

    Raises ``ConfigError`` if it cannot be written.
    """
    if path.exists() and not path.is_file():  # a pipe, /dev/stdout
        with path.open("wb") as file:
            yield file
        return
    try:
        with disk.unfinished(path) as unfinished:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                # After a power cut, the file has its old content or all of the new, never none.
                os.fsync(file.fileno())
            unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a local file, in hex."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


# --- reading by ranges


class RangeFile(io.RawIOBase):
    """A read-only file that is read by byte ranges.

    Nothing stays open between two reads, so thousands of such files need no descriptors.
    ``position`` holds the read position: a ``threading.local`` gives each thread its own.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, position: Any) -> None:
        self._read, self._size, self._position = read, size, position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        self._position.at = base + offset
        return base + offset

    def tell(self) -> int:
        return int(getattr(self._position, "at", 0))

    def read(self, num_bytes: int = -1) -> bytes:
        start = self.tell()
        end = self._size if num_bytes < 0 else min(start + num_bytes, self._size)
        data = self._read(start, end) if start < end else b""
        self._position.at = start + len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
