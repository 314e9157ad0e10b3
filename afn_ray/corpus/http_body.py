"""The body of an HTTP response with its codings undone, in bounded memory: whole, or not at all."""

from __future__ import annotations

import re
import zlib
from typing import Any

MOST_CODINGS = 2
"""Most codings of a body, one over the other. A server uses one."""
MOST_MEMBERS = 16
"""Most members of a body of gzip, one after the other. A server writes one."""
CHUNK_LINE_BYTES = 4 << 10
"""Longest line before a chunk, in bytes."""
CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,8}")
GZIP, ZLIB, DEFLATE = 31, 15, -15
"""Kinds of streams of zlib, by its ``wbits``."""


def decoded(body: bytes, transfer: list[str], content: list[str], max_bytes: int) -> bytes:
    """``body`` without its codings, which are listed in the order in which they were applied.

    ``transfer`` are those of Transfer-Encoding, ``content`` those of Content-Encoding. Raises
    ``ValueError`` if the body is damaged or cut, has a coding that is not read, or more than
    ``max_bytes`` once decoded.
    """
    if transfer not in ([], ["chunked"]):
        raise ValueError(f"Transfer-Encoding {', '.join(transfer)[:80]!r} is not read")
    if transfer:
        body = _dechunked(body)
    if len(content) > MOST_CODINGS:
        raise ValueError(f"{len(content)} codings are over the limit of {MOST_CODINGS}")
    for coding in reversed(content):
        body = _decompressed(body, coding, max_bytes)
    if len(body) > max_bytes:
        raise _over(max_bytes)
    return body


def _over(max_bytes: int) -> ValueError:
    return ValueError(f"body is over the limit of {max_bytes} bytes")


def _dechunked(data: bytes) -> bytes:
    body = bytearray()
    at = 0
    while True:
        end = data.find(b"\r\n", at, at + CHUNK_LINE_BYTES)
        size_text = data[at : max(end, at)].partition(b";")[0].strip()
        if end < 0 or not CHUNK_SIZE.fullmatch(size_text):
            raise ValueError(f"no chunk begins at byte {at} of {len(data)}, and none was the last")
        size = int(size_text, 16)
        start = end + 2
        if size == 0:
            return bytes(body)
        at = start + size + 2
        if data[at - 2 : at] != b"\r\n":
            raise ValueError(f"the chunk at byte {start} of {len(data)} does not end after {size}")
        body += data[start : start + size]


def _decompressed(data: bytes, coding: str, max_bytes: int) -> bytes:
    if coding in ("gzip", "x-gzip"):
        return _unzipped(data, GZIP, max_bytes)
    if coding == "deflate":  # with the header of zlib, or without as some servers send it
        is_deflate = len(data) > 1 and data[0] & 15 == 8
        has_header = is_deflate and int.from_bytes(data[:2], "big") % 31 == 0
        return _unzipped(data, ZLIB if has_header else DEFLATE, max_bytes)
    if coding == "br":
        return _unbrotlied(data, max_bytes)
    raise ValueError(f"Content-Encoding {coding[:80]!r} is not read")


def _unzipped(data: bytes, wbits: int, max_bytes: int) -> bytes:
    body = bytearray()
    for _ in range(MOST_MEMBERS):
        decoder = zlib.decompressobj(wbits)
        try:
            body += decoder.decompress(data, max_bytes + 1 - len(body))
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if len(body) > max_bytes:
            raise _over(max_bytes)
        if not decoder.eof:
            raise ValueError(f"the end is missing after {len(body)} bytes")
        data = decoder.unused_data
        if not data or wbits != GZIP:
            break
    if data:
        raise ValueError(f"{len(data)} bytes follow the end")
    return bytes(body)


def _unbrotlied(data: bytes, max_bytes: int) -> bytes:
    import brotli

    decoder: Any = brotli.Decompressor()
    try:
        body = bytes(decoder.process(data, output_buffer_limit=max_bytes + 1))
    except brotli.error as error:
        raise ValueError(str(error)) from error
    if len(body) > max_bytes:
        raise _over(max_bytes)
    if not decoder.is_finished():
        raise ValueError(f"the end is missing after {len(body)} bytes")
    return body
