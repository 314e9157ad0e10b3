"""WARC in, documents out: bodies of web responses as text, with their headers as columns.

Records are framed here and parsed one by one by fastwarc. Its own iterator ends the whole archive
at a body that cannot be decoded, and takes a record that was cut for a whole one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from afn_ray import kept
from afn_ray.corpus.documents import Origin, clean_id, document, problem, with_kept
from afn_ray.corpus.html import html_text
from afn_ray.corpus.http_body import decoded
from afn_ray.corpus.sources import DamagedStream
from afn_ray.corpus.streams import MARK, Stream, line_limit
from afn_ray.corpus_values import WARC, Document, FileSlice, ReadOptions
from afn_ray.errors import ConfigError

HEADER_BYTES = 64 << 10
"""Longest header of a record, in bytes."""
STATUS = "http-status"
"""Column of the status of an HTTP response."""
BODIES = ("response", "resource", "conversion")
"""Types of records with a body of the web. Others, such as requests, describe the crawl."""
CONTINUATION = "continuation"
"""Type of a record with more of the body of another one."""
RULES = 2
"""Version of what this module and its helpers make of a record, as part of a shard's identity."""
HTML = ("text/html", "application/xhtml+xml")

PACKAGES = ("fastwarc", "resiliparse")
"""Packages whose versions are part of a shard's identity."""
BEGIN = re.compile(rb"WARC/[0-9]+\.[0-9]+\r\n")
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE)
LENGTH_VALUE = re.compile(r"[0-9]{1,18}", re.ASCII)
SEPARATOR = b"\r\n\r\n"
NO_BODY = (204, 304)
"""Statuses of responses that have no body, whatever length their headers state."""


class _Record(NamedTuple):
    """One record, or bytes between two records that are none."""

    number: int
    """Records from the start of the stream."""
    start: int
    """Bytes of the stream before it."""
    length: int
    """Bytes, with the empty lines after it."""
    data: bytes
    problem: str = ""


@cache
def format_name() -> str:
    """The format of slices of WARC: it names parser, extractor and rules, which make the texts.

    Raises ``ConfigError`` if a package is missing.
    """
    try:
        importlib.metadata.version("brotli")
        versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
        return f"{WARC} {' '.join(versions)} rules {RULES}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f'WARC needs the package {error.name}; pip install "afn-ray[warc]", on the nodes of a '
            "cluster too"
        ) from error


def warc_documents(stream: Stream, slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of ``slice``, planned with the extractor that is installed here.

    Raises ``ConfigError`` for another one.
    """
    if slice.format != format_name():
        raise ConfigError(
            f"{slice.uri} was planned with {slice.format}, but here is {format_name()}; install "
            "one version everywhere and run the same command again"
        )
    for record in _records(stream, line_limit(options)):
        offset = record.start if stream.is_plain else record.number
        origin = Origin(slice.uri, offset, stream.stored(record.length))
        if record.problem:
            yield problem(origin._replace(lost_documents=None), record.problem)
            continue
        page = _Page.of(record.data)
        if isinstance(page, str):
            yield problem(origin, page)
        elif page.is_document:
            yield with_kept(_page_document(origin, page, options), page.values(options), options)


def columns_of(stream: Stream, options: ReadOptions, wanted: Sequence[str]) -> Iterator[list[str]]:
    """Yield the names of the columns of each page; those ``wanted`` as they are spelled there."""
    for record in _records(stream, line_limit(options)):
        page = "" if record.problem else _Page.of(record.data)
        if not isinstance(page, str) and page.is_document:
            spelled = [name for name in wanted if page.value(name) is not None]
            yield [options.text_column, *spelled, *page.names()]


# --- records


class _Buffer:
    """The blocks of a stream as bytes from one place on."""

    def __init__(self, stream: Stream) -> None:
        self._blocks = iter(stream)
        self.data = bytearray()
        self.at = 0  # bytes of the stream before ``data``
        self._searched = 0  # the place in the stream before which no separator begins
        self._damage: DamagedStream | None = None

    def fill(self, num_bytes: int) -> bool:
        """Have ``num_bytes`` in ``data``; false if the stream ends or is damaged before."""
        while len(self.data) < num_bytes:
            try:
                block = next(self._blocks, None)
            except DamagedStream as damage:
                self._damage, block = damage, None
            if block is None:
                return False
            self.data += block
        return True

    def check(self) -> None:
        """Raise ``DamagedStream`` if that is why there is no more."""
        if self._damage is not None:
            raise self._damage

    def header_end(self) -> int:
        """Bytes of ``data`` before the end of the header there; -1 if it has none in its bound."""
        end = self.data.find(SEPARATOR, max(0, self._searched - self.at), HEADER_BYTES)
        if end < 0:
            searched = min(HEADER_BYTES, len(self.data)) - len(SEPARATOR) + 1
            self._searched = max(self._searched, self.at + searched)
        return end

    def drop(self, num_bytes: int) -> int:
        """Drop the next ``num_bytes``, and return how many there were."""
        left = num_bytes
        while left and self.fill(1):
            some = min(left, len(self.data))
            del self.data[:some]
            left -= some
        self.at += num_bytes - left
        return num_bytes - left

    def drop_lines(self) -> int:
        """Drop empty lines, and return their bytes."""
        num_bytes = 0
        while self.fill(1) and self.data[0] in b"\r\n":
            num_bytes += self.drop(len(self.data) - len(self.data.lstrip(b"\r\n")))
        return num_bytes


def _records(stream: Stream, limit: int) -> Iterator[_Record]:
    """Yield the records of ``stream``, none over ``limit`` bytes, and what is between them."""
    buffer = _Buffer(stream)
    number = 0
    while True:
        start = buffer.at
        buffer.drop_lines()
        if not buffer.fill(1):
            buffer.check()
            return
        data, why = _next_record(buffer, limit)
        buffer.drop_lines()
        stream.done = buffer.at
        yield _Record(number, start, buffer.at - start, data, why)
        number += 1


def _next_record(buffer: _Buffer, limit: int) -> tuple[bytes, str]:
    """The bytes of the record at the start of ``buffer``, or why they are lost."""
    end, length = _header(buffer)
    if length is None:
        is_begun = BEGIN.match(buffer.data) is not None
        what = "has no header with Content-Length" if is_begun else "begins no record"
        at = buffer.at
        while length is None and buffer.fill(1):
            buffer.drop(max(end, 0))  # no record begins in a header without a length
            _skip(buffer)
            end, length = _header(buffer)
        return b"", f"not WARC: byte {at} {what}; left out up to byte {buffer.at}"
    size = end + len(SEPARATOR) + int(length[1])
    if size > limit:
        given = buffer.drop(size)
        cut = "" if given == size else f", and cut after {given}"
        return b"", f"record of {size} bytes is over the limit of {limit}{cut}"
    is_whole = buffer.fill(size)
    is_followed = not buffer.fill(size + 4) or buffer.data[size : size + 4] == SEPARATOR
    if is_whole and is_followed:
        data = bytes(buffer.data[:size])
        buffer.drop(size)
        return data, ""
    if not is_whole:
        buffer.check()
    at = buffer.at
    why = "has no empty line after them" if is_whole else "ends before"
    return b"", (
        f"record at byte {at} states {length[1].decode()} bytes of content, but the file {why}; "
        f"left out up to byte {_skip(buffer)}"
    )


def _header(buffer: _Buffer) -> tuple[int, re.Match[bytes] | None]:
    """End of the header at the start of ``buffer``, and its length of
    content; -1 or None without.
    """
    if not buffer.fill(HEADER_BYTES) and SEPARATOR not in buffer.data:
        buffer.check()
    if not BEGIN.match(buffer.data):
        return -1, None
    end = buffer.header_end()
    return end, LENGTH.search(buffer.data, 0, end + 2) if end >= 0 else None


def _skip(buffer: _Buffer) -> int:
    """Drop all up to the next line that begins a record, and return the place in the stream."""
    mark = b"\nWARC/1."
    buffer.drop(1)
    while buffer.fill(len(mark)):
        found = buffer.data.find(mark)
        if found >= 0:
            buffer.drop(found + 1)
            return buffer.at
        buffer.drop(len(buffer.data) - len(mark) + 1)
        if not buffer.fill(len(mark)):
            break
    buffer.drop(len(buffer.data))
    return buffer.at


# --- pages


class _Page:
    """A record, parsed."""

    def __init__(self, record: Any) -> None:
        self._record = record
        self.kind = str(record.record_type)
        self.http: Any = None
        self.problem = ""
        self._data = b""

    @classmethod
    def of(cls, data: bytes) -> _Page | str:
        """The record in ``data``, or why it cannot be read."""
        try:
            with _failures_named("record cannot be read"):
                page = cls(_fastwarc().WarcRecord.from_bytes(data))
        except ValueError as error:
            return str(error)
        if page.kind in BODIES:
            page._parse()
        elif page.kind == CONTINUATION:
            page.problem = "record continues another one; segmented records are not read"
        return page

    def _parse(self) -> None:
        try:
            with _failures_named("record cannot be read"):
                if self._record.is_http:
                    # Codings are undone here: fastwarc would do so without a bound.
                    self._record.parse_http(auto_decode="none", max_header_len=HEADER_BYTES)
                    self.http = self._record.http_headers
                    if self.http.status_code is None:
                        raise ValueError("response is none of HTTP")
                self._data = bytes(self._record.reader.read())
        except ValueError as error:
            self.problem = str(error)

    @property
    def is_document(self) -> bool:
        """True if it has a body, or should have one."""
        if self.problem:
            return True
        if self.kind != "response":
            return self.kind in BODIES
        return bool(self._data or self._stated_bytes or self.value("WARC-Truncated"))

    @property
    def _stated_bytes(self) -> int:
        """Bytes of the body as it was sent, by its header; 0 if none are stated."""
        if self.http is None or self.http.status_code in NO_BODY:
            return 0
        stated = str(self.http.get("Content-Length") or "").strip()
        return int(stated) if LENGTH_VALUE.fullmatch(stated) else 0

    def body(self, max_bytes: int) -> bytes:
        """The body, decoded. Raises ``ValueError`` if it is over ``max_bytes``, cut or damaged."""
        if truncated := self.value("WARC-Truncated"):
            raise ValueError(f"body was cut by the crawler (WARC-Truncated: {str(truncated)[:40]})")
        transfer = self._codings("Transfer-Encoding")
        content = self._codings("Content-Encoding")
        if not transfer and len(self._data) < self._stated_bytes:
            raise ValueError(
                f"body was cut: it has {len(self._data)} bytes, but its header states "
                f"{self._stated_bytes}"
            )
        with _failures_named("body cannot be decoded"):
            return decoded(self._data, transfer, content, max_bytes)

    def _codings(self, name: str) -> list[str]:
        """The codings that the header ``name`` lists, in lower case."""
        if self.http is None:
            return []
        stated = ",".join(self.http.get_multiple(name))
        codings = [coding.strip() for coding in stated.lower().split(",")]
        return [coding for coding in codings if coding not in ("", "identity")]

    def names(self) -> list[str]:
        """Names of its columns."""
        names = list(self._record.headers.keys())
        if self.http is not None:
            names += self.http.keys()
        return [*names, STATUS]

    def value(self, name: str) -> object:
        """The value of the column ``name``, in any case; None if there is none."""
        if name.lower() == STATUS:
            return None if self.http is None else self.http.status_code
        # The record and the response may have headers of one name, such as Content-Type.
        headers = self._record.headers
        if self.http is not None and not name.lower().startswith("warc-"):
            headers = self.http
        return ", ".join(headers.get_multiple(name)) or None

    def values(self, options: ReadOptions) -> dict[str, object]:
        """The values of the kept columns."""
        paths = [column.path for column in kept.parse(options.keep)]
        return {path: self.value(path) for path in paths}

    def media_type(self) -> tuple[str, str]:
        """Type of the body and its charset, in lower case; empty if they are not stated."""
        stated = str(self.value("Content-Type") or "").lower()
        kind, _, parameters = stated.partition(";")
        charset = re.search(r"charset\s*=\s*[\"']?([\w:.-]{1,40})", parameters)
        identified = str(self.value("WARC-Identified-Payload-Type") or "").lower()
        return identified.strip() or kind.strip(), charset[1] if charset else ""


def _page_document(origin: Origin, page: _Page, options: ReadOptions) -> Document:
    doc_id = None
    if options.id_column is not None:
        value = page.value(options.id_column)
        try:
            doc_id = None if value is None else clean_id(str(value))
        except ValueError as error:
            return problem(origin, str(error))
    if page.problem:
        return problem(origin, page.problem, doc_id)
    kind, charset = page.media_type()
    if page.kind == "response" and page.http is None:
        return problem(origin, "response is none of HTTP", doc_id)
    if kind not in HTML and not kind.startswith("text/"):
        return problem(
            origin, f"body is {kind or 'of no stated type'}, expected HTML or text", doc_id
        )
    limit = line_limit(options)
    try:
        body = page.body(limit)
        if kind in HTML:
            text = html_text(body, charset or options.encoding)
        else:
            text = _plain_text(body, charset or options.encoding or "utf-8")
    except ValueError as error:
        return problem(origin, str(error), doc_id)
    return document(origin, text, doc_id, options)


def _plain_text(body: bytes, charset: str) -> str:
    try:
        return body.decode(charset, MARK).removeprefix("\ufeff")
    except LookupError as error:
        raise ValueError(f"charset {charset!r} is unknown") from error


@cache
def _fastwarc() -> ModuleType:
    from fastwarc import warc

    return warc


@contextlib.contextmanager
def _failures_named(what: str) -> Iterator[None]:
    """Raise the errors of fastwarc, and its panics, as ``ValueError`` with ``what`` failed."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3, which has no module to import
            raise
        raise ValueError(f"{what}: {error}") from error
