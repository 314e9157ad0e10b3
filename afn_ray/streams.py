"""The bytes of one file: a part of it, decompressed, in lines; all of it within bounds."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple, Protocol, cast

import pyarrow as pa

from afn_ray import storage
from afn_ray.errors import CorpusError
from afn_ray.schema import ReadOptions

BLOCK_BYTES = 1 << 20
DECOMPRESSED_BLOCK_BYTES = 1 << 16  # decoded in the call that meets damage is lost, so ask for little
LINE_BYTES = 64 << 20
BOM = codecs.BOM_UTF8
EXPANSION = 200
EXPANSION_FROM_BYTES = 64 << 20
"""A stream, or the text of a Parquet row group, that gives more than these and that many times its length is a bomb."""

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What decompressors raise; errors of the disk or network below are ``CorpusError`` and never among them."""


class Damaged(Exception):
    """A stream ends here: what comes before is good, the rest cannot be had."""


class Bomb(Damaged):
    """A stream gives far more than what holds it."""


class Stream(Protocol):
    def read1(self, size: int, /) -> bytes: ...


class Line(NamedTuple):
    offset: int  # bytes from the start of the file
    number: int  # lines from the start of the stream
    length: int  # bytes, without the newline
    data: bytes | None  # without the newline; None when over the limit
    blank: bool


class Source:
    """The bytes ``start`` to ``end`` of a file, hashed as they are read.

    What goes wrong below is a ``CorpusError``, never an ``OSError``: readers would take that for bad content
    and quarantine what a second try can read. With a ``budget``, ``Damaged`` where more bytes are asked for.
    """

    def __init__(self, uri: str, start: int, end: int, budget: int | None = None) -> None:
        self._file = storage.open_read(uri)
        self._uri, self._start, self._budget = uri, start, budget
        self.size = end - start
        self._at = 0
        self.closed = False
        self.rewind()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def close(self) -> None:
        """Nothing: pyarrow closes what it has been lent; ``with`` closes the file."""

    def rewind(self) -> None:
        self.sha256 = hashlib.sha256()
        self.seek(0)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        try:
            self._file.seek(self._start + self._at)
        except OSError as error:
            raise CorpusError(f"reading {self._uri}: {error}") from error
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        if self._budget is not None and self._at >= self._budget:
            raise Damaged("over the budget")
        left = max(self.size - self._at, 0)
        try:
            data = self._file.read(min(size, left) if size >= 0 else left)
        except OSError as error:
            raise CorpusError(f"reading {self._uri}: {error}") from error
        self._at += len(data)
        self.sha256.update(data)
        return data

    read1 = read

    def drain(self) -> None:
        while self.read(BLOCK_BYTES):
            pass


class _Zst:
    """A zstd stream of any number of frames.

    Arrow loses what it decoded in the call that meets damage. Then this starts anew, goes to where it was and
    on byte by byte.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._given = 0
        self._step: int | None = None
        self._open()

    def _open(self) -> None:
        self._source.rewind()
        self._stream = pa.CompressedInputStream(pa.PythonFile(self._source, "r"), "zstd")

    def read1(self, size: int, /) -> bytes:
        try:
            data = bytes(self._stream.read(self._step or size))
        except DAMAGE:
            if self._step:
                raise
            self._step = 1
            self._open()
            skip = self._given
            while skip and (skipped := len(self._stream.read(min(skip, size)))):
                skip -= skipped
            data = bytes(self._stream.read(1))
        self._given += len(data)
        return data


def _decompressed(source: Source, compression: str) -> Stream:
    if compression == "gz":
        return gzip.GzipFile(fileobj=source, mode="rb")
    if compression == "bz2":
        return bz2.BZ2File(source)
    return lzma.LZMAFile(cast(IO[bytes], source)) if compression == "xz" else _Zst(source)


def blocks(source: Source, compression: str) -> Iterator[bytes]:
    """What ``source`` holds, decompressed; raises ``Damaged``. A byte order mark is whole in the first block."""
    if source.size == 0:  # some decompressors take nothing for damage
        return
    stream = _decompressed(source, compression) if compression else source
    size = DECOMPRESSED_BLOCK_BYTES if compression else BLOCK_BYTES
    head = b""
    try:
        while len(head) < len(BOM) and (more := stream.read1(size)):
            head += more
        yield head
        given = 0
        while block := stream.read1(size):
            yield block
            given += len(block)
            if compression and given > max(EXPANSION_FROM_BYTES, EXPANSION * source.tell()):
                raise Bomb(f"{source.tell()} bytes gave {given}, over {EXPANSION} times as many; decompress the file "
                            "if it is meant")  # fmt: skip
    except DAMAGE as error:
        raise Damaged(str(error) or type(error).__name__) from error


def line_limit(options: ReadOptions) -> int:
    """Bytes of the longest line or CSV row that is parsed: other columns and escapes need room beside the text."""
    return max(LINE_BYTES, 8 * options.max_document_bytes)


def lines(blocks: Iterable[bytes], limit: int, start: int = 0) -> Iterator[Line]:
    """Lines of ``blocks``, the first of which is at byte ``start`` of its file; holds ``limit`` bytes at most."""
    offset, number, length, blank = start, 0, 0, True
    pieces: list[bytes] = []
    for i, block in enumerate(blocks):
        if i == 0 and start == 0 and block.startswith(BOM):
            block, offset = block[len(BOM) :], len(BOM)
        parts = block.split(b"\n")
        for j, part in enumerate(parts):
            length += len(part)
            blank = blank and (not part or part.isspace())
            if length <= limit:
                pieces.append(part)
            else:
                pieces.clear()
            if j + 1 < len(parts):
                yield Line(offset, number, length, b"".join(pieces) if length <= limit else None, blank)
                offset, number, length, blank = offset + length + 1, number + 1, 0, True
                pieces.clear()
    if length:
        yield Line(offset, number, length, b"".join(pieces) if length <= limit else None, blank)
