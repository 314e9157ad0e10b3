"""Unpack Avro files within bounds, so that their reader has nothing left to unpack."""

from __future__ import annotations

import bz2
import io
import zlib
from collections.abc import Callable, Iterator

import pyarrow as pa

MAGIC = b"Obj\1"
CODEC = b"avro.codec"
SYNC_BYTES = 16
"""Length of the mark after the header and after each block, in bytes."""
TOO_LARGE = "its blocks are over the limit once they are unpacked"


def unpacked(data: bytes, most_bytes: int) -> bytes:
    """The Avro file ``data`` without compression.

    Raises ``ValueError`` if it is none, for a codec that is not known, and if it has more than
    ``most_bytes`` once unpacked, or more records than bytes.
    """
    file = io.BytesIO(data)
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError("it is no file of Avro")
    header = dict(_pairs(file))
    codec = header.get(CODEC, b"null").decode(errors="replace")
    if codec not in CODECS:
        raise ValueError(f"codec {codec[:40]!r} is not read; known are {', '.join(CODECS)}")
    mark = _exactly(file, SYNC_BYTES)
    header[CODEC] = b"null"
    given = io.BytesIO()
    given.write(MAGIC + _long(len(header)))
    for pair in header.items():
        for text in pair:
            given.write(_long(len(text)) + text)
    given.write(_long(0) + mark)
    while file.tell() < len(data):
        num_records = _read_long(file)
        block = CODECS[codec](_read_bytes(file), most_bytes - given.tell())
        if not 0 <= num_records <= len(block):
            raise ValueError(f"{num_records} records are in a block of {len(block)} bytes")
        given.write(_long(num_records) + _long(len(block)) + block)
        given.write(_exactly(file, SYNC_BYTES))
    if given.tell() > most_bytes:
        raise ValueError(TOO_LARGE)
    return given.getvalue()


# --- codecs


def _plain(data: bytes, most_bytes: int) -> bytes:
    if len(data) > most_bytes:
        raise ValueError(TOO_LARGE)
    return data


def _deflate(data: bytes, most_bytes: int) -> bytes:
    try:
        return _plain(zlib.decompressobj(-15).decompress(data, most_bytes + 1), most_bytes)
    except zlib.error as error:
        raise ValueError(str(error)) from error


def _bzip2(data: bytes, most_bytes: int) -> bytes:
    return _plain(bz2.BZ2Decompressor().decompress(data, most_bytes + 1), most_bytes)


def _zstandard(data: bytes, most_bytes: int) -> bytes:
    with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
        return _plain(bytes(stream.read(most_bytes + 1)), most_bytes)


CODECS: dict[str, Callable[[bytes, int], bytes]] = {
    "null": _plain,
    "deflate": _deflate,
    "bzip2": _bzip2,
    "zstandard": _zstandard,
}
"""Name of a codec -> what unpacks a block of it, with a limit in bytes."""


# --- numbers and texts


def _pairs(file: io.BytesIO) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a map."""
    while num_pairs := _read_long(file):
        if num_pairs < 0:
            _read_long(file)  # bytes of the pairs
        for _ in range(abs(num_pairs)):
            yield _read_bytes(file), _read_bytes(file)


def _read_bytes(file: io.BytesIO) -> bytes:
    return _exactly(file, _read_long(file))


def _exactly(file: io.BytesIO, num_bytes: int) -> bytes:
    data = file.read(num_bytes) if num_bytes >= 0 else b""
    if len(data) != num_bytes:
        raise ValueError(f"{num_bytes} bytes are missing at byte {file.tell()}")
    return data


def _read_long(file: io.BytesIO) -> int:
    """A number of up to 64 bits in groups of 7, the lowest first; its lowest bit is the sign."""
    number = 0
    for shift in range(0, 64, 7):
        (byte,) = _exactly(file, 1)
        number |= (byte & 127) << shift
        if byte < 128:
            return number >> 1 ^ -(number & 1)
    raise ValueError(f"a number before byte {file.tell()} has no end")


def _long(number: int) -> bytes:
    """``_read_long`` in reverse, of a number that is not negative."""
    left = number << 1
    groups = bytearray()
    while left > 127:
        groups.append(left & 127 | 128)
        left >>= 7
    return bytes(groups) + bytes([left])
