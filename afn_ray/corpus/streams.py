"""The bytes of a source, within limits: decompressed, as UTF-8, in lines."""

from __future__ import annotations

import bz2
import codecs
import itertools
import lzma
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import pyarrow as pa

from afn_ray.corpus.sources import BLOCK_BYTES, OTHER_CHECKSUM, DamagedStream, Source
from afn_ray.corpus_values import ReadOptions
from afn_ray.text_encodings import encoding_of

PIECE_BYTES = 1 << 10
"""Compressed bytes decoded at a time. It is the resolution at which damage is located."""
DECOMPRESSED_BLOCK_BYTES = 1 << 16
"""Decompressed bytes requested at a time.

It is low, because the bytes decoded in the call that meets damage are lost.
"""
LINE_BYTES = 64 << 20
"""Smallest limit on the length of a line, in bytes."""
BOM = codecs.BOM_UTF8
LONGEST_BOM = 4
EXPANSION = 200
"""Largest ratio of decompressed to compressed bytes."""
EXPANSION_FROM_BYTES = 64 << 20
"""Decompressed bytes above which ``EXPANSION`` applies to a stream or a Parquet column chunk."""

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""Errors that decompressors raise for damaged data.

Errors of the disk or network below them are ``CorpusError``, which is none of these.
"""

MARK = "afn_ray.mark"
"""Name of the error handler that decodes an invalid sequence to a lone surrogate."""


# UTF-8 cannot encode a lone surrogate. An invalid sequence thus stays distinct from a U+FFFD in the
# source until the text has been extracted from its line.
def _mark(error: UnicodeError) -> tuple[str, int]:
    """A lone surrogate in place of the invalid bytes, and the place where decoding goes on."""
    return "\udcff", error.end if isinstance(error, UnicodeDecodeError) else 0


codecs.register_error(MARK, _mark)


class Bomb(DamagedStream):
    """A stream decompresses to far more bytes than its file has."""


class Line(NamedTuple):
    offset: int
    """Bytes from the start of the file."""
    number: int
    """Lines from the start of the stream."""
    length: int
    """Bytes, without the newline."""
    data: bytes | None
    """Content without the newline; None if the line is over the limit."""
    blank: bool


# --- decompression


class _Pieces:
    """A source in pieces of at most ``PIECE_BYTES``, read a block at a time.

    To pyarrow it is a file.
    """

    closed = False

    def __init__(self, source: Source) -> None:
        self._source = source
        self.rewind()

    def rewind(self) -> None:
        self._source.rewind()
        self._block, self._i = b"", 0
        self.at = 0  # bytes returned
        self.before = 0  # bytes returned before the last piece
        self.used = 0  # bytes decoded, a lower bound
        self.start = 0  # first byte of the current stream

    def read(self, size: int = -1, /) -> bytes:
        if self._i == len(self._block):
            self._block = self._source.read(BLOCK_BYTES)
            self._i = 0
        num_bytes = PIECE_BYTES if size < 0 else min(size, PIECE_BYTES)
        piece = self._block[self._i : self._i + num_bytes]
        if piece:
            self.before = self.at
            self._i += len(piece)
            self.at += len(piece)
        return piece

    def put_back(self, num_bytes: int) -> None:
        """Return the last ``num_bytes`` of the last piece again."""
        self._i -= num_bytes
        self.at -= num_bytes
        self.before = self.at

    def skip_zeros(self) -> int:
        """Skip zeros up to the next other byte or the end, and return their number."""
        num_zeros = 0
        while piece := self.read():
            rest = piece.lstrip(b"\0")
            num_zeros += len(piece) - len(rest)
            if rest:
                self.put_back(len(rest))
                break
        return num_zeros

    def is_over(self) -> bool:
        if not self.read(1):
            return True
        self.put_back(1)
        return False

    def close(self) -> None:
        """Do nothing: pyarrow closes files that it is given."""

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self.at


class _Decoder(Protocol):
    """A decoder of one compressed stream, with the interface of ``bz2.BZ2Decompressor``."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Zlib:
    """A decoder of one stream of zlib: a gzip member, or deflate without header."""

    def __init__(self, wbits: int) -> None:
        self._zlib = zlib.decompressobj(wbits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        given = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.needs_input = not self._zlib.unconsumed_tail and len(given) < max_length
        return given


def _decoder(compression: str) -> _Decoder:
    if compression == "gz":
        return _Zlib(31)
    if compression == "deflate":
        return _Zlib(-15)
    if compression == "bz2":
        return bz2.BZ2Decompressor()
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)


def _streams(pieces: _Pieces, compression: str) -> Iterator[bytes]:
    """Yield the decompressed bytes of all streams of a file, one after another.

    All bytes of the file are decoded. Python's own readers take invalid bytes after the first
    stream for the end of the file.
    """
    number = 0
    while not pieces.is_over():
        number += 1
        start = pieces.start = pieces.used = pieces.at
        decoder = _decoder(compression)
        try:
            while not decoder.eof:
                piece = pieces.read() if decoder.needs_input else b""
                if decoder.needs_input and not piece:
                    raise EOFError(
                        "the end of the file is missing, and what was in it is lost too, uncounted"
                    )
                given = decoder.decompress(piece, DECOMPRESSED_BLOCK_BYTES)
                if decoder.eof:
                    pieces.put_back(len(decoder.unused_data))
                    pieces.used = pieces.at
                elif given:
                    pieces.used = max(start, pieces.before)
                if given:
                    yield given
        except DAMAGE as error:
            what = f"stream {number}, which begins at byte {start}: {_words(error)}"
            raise DamagedStream(f"{what}; what came of that stream may be altered") from error
        padding = pieces.skip_zeros() if compression in ("gz", "xz") else 0
        if compression == "xz" and padding % 4:
            raise DamagedStream(
                f"stream {number} is followed by {padding} zeros, expected a multiple of 4"
            )


class _Zst:
    """A zstd stream of any number of frames.

    Arrow loses what it decoded in the call that meets damage. The stream is then read again from
    the start up to the same place, and from there byte by byte.
    """

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces
        self._given = 0
        self._step: int | None = None
        self._open()

    def _open(self) -> None:
        self._pieces.rewind()
        self._stream = pa.CompressedInputStream(pa.PythonFile(self._pieces, "r"), "zstd")

    def __iter__(self) -> Iterator[bytes]:
        try:
            while data := self._read():
                self._pieces.used = self._pieces.before
                yield data
        except DAMAGE as error:
            raise DamagedStream(_words(error)) from error

    def _read(self) -> bytes:
        size = DECOMPRESSED_BLOCK_BYTES
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


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


# --- text


class Stream:
    """The bytes of a source, decompressed and in UTF-8, in blocks.

    It also records how many bytes of the file they took. UTF-16 and UTF-32 with a byte order mark
    become UTF-8 with one, and so does text of another ``encoding``; invalid sequences become the
    byte FF, which is invalid in UTF-8 too. The first block contains the whole mark. A mark counts
    more than the ``encoding``. Iteration raises ``DamagedStream``.

    ``by_line`` leaves text of the ``encoding`` as it is, for ``line_text``: each byte of a newline
    ends a line in it, and places are bytes of the file.
    """

    def __init__(
        self, source: Source, compression: str, encoding: str = "", by_line: bool = False
    ) -> None:
        self._source = source
        self._compression = compression
        self._given = encoding
        self._by_line = by_line
        self._line_encoding = ""  # known from the first block on
        self._pieces = _Pieces(source)
        self._blocks = self._utf8()
        self.encoding = ""  # known from the first block on
        self.num_bytes = 0  # bytes yielded
        self.done = 0  # bytes in lines that were yielded
        # Bytes of the file, and bytes yielded, before the current compressed stream.
        self._start = (0, 0)

    @property
    def is_plain(self) -> bool:
        """True if its bytes are those of the file."""
        return not self._compression and not self.encoding

    def stored(self, num_bytes: int) -> int:
        """Bytes of the file that ``num_bytes`` of the stream took, estimated; at least 1.

        The estimate uses the ratio of compressed to decompressed bytes so far.
        """
        if self.is_plain:
            return max(num_bytes, 1)
        taken = self._pieces.at if self._compression else self._source.tell()
        return max(1, round(num_bytes * taken / max(self.num_bytes, 1)))

    def lost_from(self, start: int) -> int:
        """Bytes of the file after those of the first ``start`` bytes of the stream; at least 1.

        In a compressed file it is an estimate.
        """
        if self.is_plain:
            return max(1, self._source.size - start)
        used = self._pieces.used if self._compression else self._source.tell()
        (used_0, given_0), (used_1, given_1) = self._start, (used, self.num_bytes)
        if start < given_0:
            (used_0, given_0), (used_1, given_1) = (0, 0), self._start
        kept = used_0 + (start - given_0) * (used_1 - used_0) // max(given_1 - given_0, 1)
        return max(1, self._source.size - kept)

    def line_text(self, data: bytes) -> str:
        """A line of the stream as text, with a lone surrogate for each invalid sequence."""
        return data.decode(self._line_encoding or "utf-8", MARK)

    def __iter__(self) -> Iterator[bytes]:
        return self._blocks

    def _utf8(self) -> Iterator[bytes]:
        head = b""
        blocks = self._decompressed()
        try:
            for block in blocks:
                head += block
                if len(head) >= LONGEST_BOM:
                    break
        except DamagedStream as damage:  # a few bytes came before it
            blocks = _raising(damage)
        if self._source.start == 0:
            self.encoding = encoding_of(head)
        if not self.encoding and not (self._source.start == 0 and head.startswith(BOM)):
            if self._by_line:
                self._line_encoding = self._given
            else:
                self.encoding = self._given
        if not self.encoding:
            for block in itertools.chain([head], blocks):
                self.num_bytes += len(block)
                yield block
            return
        decoder = codecs.getincrementaldecoder(self.encoding)(MARK)
        for block in itertools.chain([head], blocks, [b""]):
            text = decoder.decode(block, final=not block)
            data = text.encode("utf-8", "surrogateescape")
            self.num_bytes += len(data)
            yield data

    def _decompressed(self) -> Iterator[bytes]:
        # Some decompressors accept an empty file.
        if self._compression and self._source.size == 0:
            raise DamagedStream(
                f"the file has 0 bytes; even an empty {self._compression} file has more"
            )
        if not self._compression:
            while block := self._source.read(BLOCK_BYTES):
                yield block
            self._source.check()
            return
        given = crc32 = 0
        is_zst = self._compression == "zst"
        blocks = _Zst(self._pieces) if is_zst else _streams(self._pieces, self._compression)
        for block in blocks:
            if self._pieces.start > self._start[0]:
                self._start = self._pieces.start, self.num_bytes
            given += len(block)
            crc32 = zlib.crc32(block, crc32)
            if given > max(EXPANSION_FROM_BYTES, EXPANSION * self._pieces.at):
                raise Bomb(
                    f"{self._pieces.at} bytes gave {given}, over {EXPANSION} times as many; "
                    "decompress the file if that is intended"
                )
            yield block
        if self._source.crc32 not in (None, crc32):
            raise DamagedStream(OTHER_CHECKSUM)
        self._source.check()


def _raising(damage: DamagedStream) -> Iterator[bytes]:
    raise damage
    yield b""


def line_limit(options: ReadOptions) -> int:
    """Length of the longest line or CSV row that is parsed, in bytes.

    Other columns and escapes need space beside the text.
    """
    return max(LINE_BYTES, 8 * options.max_document_bytes)


def lines(stream: Stream, limit: int, start: int = 0) -> Iterator[Line]:
    """Yield the lines of ``stream``, whose first byte is byte ``start`` of its file.

    At most ``limit`` bytes are held in memory.
    """
    offset = start
    number = 0
    length = 0
    blank = True
    pieces: list[bytes] = []  # of the current line; empty once it is over the limit

    def line() -> Line:
        data = b"".join(pieces) if length <= limit else None
        return Line(offset, number, length, data, blank)

    for i, block in enumerate(stream):
        if i == 0 and start == 0 and block.startswith(BOM):
            block = block[len(BOM) :]
            offset = len(BOM)
        parts = block.split(b"\n")
        for j, part in enumerate(parts):
            length += len(part)
            blank = blank and (not part or part.isspace())
            if length <= limit:
                pieces.append(part)
            else:
                pieces.clear()
            if j + 1 < len(parts):
                stream.done = offset + length + 1 - start
                yield line()
                offset += length + 1
                number += 1
                length = 0
                blank = True
                pieces.clear()
    if length:
        stream.done = offset + length - start
        yield line()
