"""Seekable readers of files: a remote one is read by byte ranges."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

from fsspec.implementations.local import LocalFileSystem

from afn_ray.corpus_values import FileInfo
from afn_ray.errors import CorpusError
from afn_ray.store import archives, corpus_files, disk, uris
from afn_ray.store.fs_calls import call_with_retries

READ_AHEAD_BYTES = 4 << 20
"""Largest read-ahead of a remote file, in bytes."""


HEADER_BYTES = 64 << 10
"""Least read-ahead of a remote file of which headers are read here and there, in bytes."""
CLOSE_BYTES = 1 << 20
"""Longest way that is read and not skipped, in bytes: a request takes as long as some of them."""


def open_headers(uri: str) -> IO[bytes]:
    """A reader of ``uri`` for headers between what is skipped: it reads little ahead of each."""
    fs, path = uris.open_filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return open_read(uri)
    size = corpus_files.stat(uri).size
    return cast(IO[bytes], SparseFile(_ranged_read(fs, path, uri), size))


def open_read(uri: str) -> IO[bytes]:
    """A seekable binary reader of ``uri``.

    On a remote filesystem it reads ahead and keeps no connection open. That of a member of an
    archive is a ``MemberFile``.
    """
    if (parts := uris.split_member(uri)) is not None:
        return _open_member(*corpus_files.find_member(*parts))
    fs, path = uris.open_filesystem(uri)
    if isinstance(fs, LocalFileSystem):

        def open_local() -> IO[bytes]:
            disk.check_ends(Path(path))
            return cast(IO[bytes], fs.open(path, "rb"))

        return call_with_retries(fs, "opening", uri, CorpusError, open_local)
    size = corpus_files.stat(uri).size
    ranges = RangeFile(_ranged_read(fs, path, uri), size, SimpleNamespace())
    buffer_bytes = max(1, min(READ_AHEAD_BYTES, size))
    return io.BufferedReader(ranges, buffer_bytes)


def _ranged_read(fs: Any, path: str, uri: str) -> Callable[[int, int], bytes]:
    """A function that reads a range of the remote file ``uri``."""
    exact = {"cache_type": "none"} if fs.protocol == "hf" else {}  # it would read ahead once more

    def read(start: int, end: int) -> bytes:
        def read_once() -> bytes:
            return bytes(fs.cat_file(path, start=start, end=end, **exact))

        return call_with_retries(fs, "reading", uri, CorpusError, read_once)

    return read


def read_range(uri: str, start: int, end: int) -> bytes:
    """The bytes ``start`` to ``end`` of ``uri``."""
    with open_read(uri) as file:
        file.seek(start)
        return file.read(end - start)


def _open_member(archive: FileInfo, member: archives.Member) -> IO[bytes]:
    """A reader of the stored bytes of ``member``."""
    file = open_read(archive.uri)
    try:
        first = archives.data_start(archive, member, file)
    except BaseException:
        file.close()
        raise
    return cast(IO[bytes], MemberFile(file, first, member))


class RangeFile(io.RawIOBase):
    """A read-only file that is read by byte ranges.

    Nothing stays open between two reads, so thousands of such files need no descriptors.
    ``position`` holds the read position: a ``threading.local`` gives each thread its own.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, position: Any) -> None:
        self._read = read
        self._size = size
        self._position = position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}
        position = bases[whence] + offset
        self._position.at = position
        return position

    def tell(self) -> int:
        return int(getattr(self._position, "at", 0))

    def read(self, num_bytes: int = -1) -> bytes:
        start = self.tell()
        end = self._size
        if num_bytes >= 0:
            end = min(start + num_bytes, end)
        data = self._read(start, end) if start < end else b""
        self._position.at = start + len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class SparseFile(RangeFile):
    """A file that is read by ranges, and a little ahead of each.

    The read-ahead doubles while reads follow closely, up to ``READ_AHEAD_BYTES``, and begins anew
    with ``HEADER_BYTES`` after a long way.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        super().__init__(self._buffered, size, SimpleNamespace())
        self._fetch = read
        self._first, self._held = 0, b""
        self._ahead = HEADER_BYTES

    def _buffered(self, start: int, end: int) -> bytes:
        last = self._first + len(self._held)
        if not (self._first <= start and end <= last):
            is_close = bool(self._held) and self._first <= start <= last + CLOSE_BYTES
            self._ahead = min(2 * self._ahead, READ_AHEAD_BYTES) if is_close else HEADER_BYTES
            until = min(max(end, start + self._ahead), self._size)
            self._first, self._held = start, self._fetch(start, until)
        at = start - self._first
        return self._held[at : at + end - start]


class MemberFile(RangeFile):
    """The stored bytes of a member of an archive, which is open as ``file``.

    ``crc32`` is the checksum of its content, ``stored_crc32`` that of its stored bytes; the archive
    has one of them, or none. ``size`` is the number of stored bytes.
    """

    def __init__(self, file: IO[bytes], first: int, member: archives.Member) -> None:
        def read(start: int, end: int) -> bytes:
            file.seek(first + start)
            return file.read(end - start)

        super().__init__(read, member.size, SimpleNamespace())
        self._file = file
        self.crc32 = member.crc32 if member.compression else None
        self.stored_crc32 = None if member.compression else member.crc32
        self.size = member.size

    def close(self) -> None:
        self._file.close()
        super().close()
