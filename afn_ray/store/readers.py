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
    exact = {"cache_type": "none"} if fs.protocol == "hf" else {}  # it would read ahead once more

    def read(start: int, end: int) -> bytes:
        def read_once() -> bytes:
            return bytes(fs.cat_file(path, start=start, end=end, **exact))

        return call_with_retries(fs, "reading", uri, CorpusError, read_once)

    ranges = RangeFile(read, size, SimpleNamespace())
    buffer_bytes = max(1, min(READ_AHEAD_BYTES, size))
    return io.BufferedReader(ranges, buffer_bytes)


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
        self._read, self._size, self._position = read, size, position

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
