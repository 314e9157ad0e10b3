"""The bytes of a range of one file, hashed as they are read."""

from __future__ import annotations

import hashlib
import zlib

from afn_ray.errors import CorpusError
from afn_ray.store import readers

BLOCK_BYTES = 1 << 20
"""Bytes read from a file at a time."""
OTHER_CHECKSUM = "its checksum is another; what came of it may be altered"


class DamagedStream(Exception):
    """A stream ends here: what came before is good, the rest is lost."""


class Source:
    """The bytes ``start`` to ``end`` of a file, hashed as they are read.

    Errors of the disk or network are raised as ``CorpusError``, never ``OSError``: readers would
    take that for bad content and quarantine what another try can read. With a ``budget``, reading
    more bytes raises ``DamagedStream``.
    """

    def __init__(self, uri: str, start: int, end: int, budget: int | None = None) -> None:
        self._file = readers.open_read(uri)
        self.crc32: int | None = getattr(self._file, "crc32", None)
        self._stored_crc32: int | None = getattr(self._file, "stored_crc32", None)
        self._uri, self._budget = uri, budget
        self.start, self.size = start, end - start
        self._at = 0
        self.closed = False
        self.rewind()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def close(self) -> None:
        """Do nothing: pyarrow closes files that it is given; ``with`` closes the file."""

    def rewind(self) -> None:
        """Go back to ``start`` and hash anew."""
        self.sha256 = hashlib.sha256()
        self._sum, self._summed_bytes = 0, 0
        self.seek(0)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        try:
            self._file.seek(self.start + self._at)
        except OSError as error:
            raise CorpusError(f"reading {self._uri}: {error}") from error
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        if self._budget is not None and self._at >= self._budget:
            raise DamagedStream("over the budget")
        left = max(self.size - self._at, 0)
        try:
            data = self._file.read(min(size, left) if size >= 0 else left)
        except OSError as error:
            raise CorpusError(f"reading {self._uri}: {error}") from error
        if self._stored_crc32 is not None and self._at == self._summed_bytes:
            self._sum = zlib.crc32(data, self._sum)
            self._summed_bytes += len(data)
        self._at += len(data)
        self.sha256.update(data)
        return data

    read1 = read

    def drain(self) -> None:
        """Read and hash the rest."""
        while self.read(BLOCK_BYTES):
            pass

    def check(self) -> None:
        """Raise ``DamagedStream`` if it ``is_altered``."""
        if self.is_altered:
            raise DamagedStream(OTHER_CHECKSUM)

    @property
    def is_altered(self) -> bool:
        """True if it is a whole member of an archive, read in order, with
        another checksum there.
        """
        is_whole = self.start == 0 and self._summed_bytes == getattr(self._file, "size", -1)
        return is_whole and self._stored_crc32 not in (None, self._sum)

    def check_whole(self) -> None:
        """Read all bytes of a member of an archive, and raise
        ``DamagedStream`` as ``check`` does.
        """
        if self._stored_crc32 is not None:
            self.rewind()
            self.drain()
            self.check()
