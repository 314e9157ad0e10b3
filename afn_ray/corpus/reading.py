"""The bytes of a slice become documents.

``read`` never raises for the content of a slice: a bad line, row or stream becomes a ``Document``
with a ``problem``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from afn_ray.corpus import nested, selection, streams, text_paths, warc
from afn_ray.corpus.conllu import conllu_documents
from afn_ray.corpus.csv_rows import csv_documents, read_rows
from afn_ray.corpus.documents import (
    Origin,
    columns_of,
    decode,
    document,
    origin_in,
    problem,
)
from afn_ray.corpus.jsonl import json_document, parse_line
from afn_ray.corpus.row_groups import (
    UNREADABLE,
    chunk_paths,
    column_chunks,
    hash_chunks,
    hashed_names,
    parquet_documents,
)
from afn_ray.corpus.sources import DamagedStream, Source
from afn_ray.corpus.streams import BOM, Bomb, Stream
from afn_ray.corpus.txt import whole_document
from afn_ray.corpus_values import REST, WARC, Document, FileInfo, FileSlice, ReadOptions
from afn_ray.errors import CorpusChanged, CorpusError, ShardError
from afn_ray.store import corpus_files, parquet, uris

PEEK_DOCUMENTS = 20
"""Most documents read to find the columns."""
SAMPLE_BYTES = 1 << 20
"""Most bytes of a file read for a sample or a check of its columns."""


# --- reading


def read(slice: FileSlice, options: ReadOptions) -> Generator[Document, None, None]:
    """Yield the documents of ``slice`` in order, streamed in bounded memory.

    Documents that ``options`` do not select come too, marked. Bad content is yielded as a
    ``Document`` with a ``problem``. Raises ``CorpusChanged``, possibly after the last document, if
    the slice's bytes are not the planned ones; ``ShardError`` if the disk or the network fails;
    ``Unavailable`` if it does not answer.

    A plan fixes bytes, not files. A file that was touched or rewritten with the same content is
    read, and so is a slice of lines or row groups whose bytes are unchanged in a file that grew.
    """
    try:
        now = _check(slice, options)
        if slice.format == "parquet":
            share = _Share(slice.num_bytes)
            with Source(slice.uri, 0, now.size) as source:
                found = map(share.bound, parquet_documents(source, slice, options))
                yield from selection.mark(_limited(found, slice), options)
            # The pages were read out of order and not hashed, so check the file again.
            _check(slice, options, trusted="etag:")
        else:
            yield from _read_bytes(slice, options)
    except CorpusError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CorpusChanged(
                f"{slice.uri} is gone since it was planned; run the same command again to plan "
                "without it"
            ) from error
        raise ShardError(str(error)) from error


def _read_bytes(slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    with Source(slice.uri, slice.start, slice.end) as source:
        yield from selection.mark(_limited(_of_stream(source, slice, options), slice), options)
        source.drain()
        if source.sha256.hexdigest() != slice.sha256:
            raise _changed(slice, corpus_files.stat(slice.uri), source.sha256.hexdigest())


def _limited(documents: Iterable[Document], slice: FileSlice) -> Iterator[Document]:
    """The first of ``documents``, up to the limit of their ``slice``."""
    return itertools.islice(documents, slice.limit if slice.limit >= 0 else None)


def _of_stream(source: Source, slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents in ``source``, and one for the rest where the stream is damaged."""
    stream = _stream(source, slice, options)
    num_documents = offset = done = 0
    share = _Share(source.size)
    try:
        for found in _documents(stream, slice, options):
            yield share.bound(found)
            num_documents += 1
            offset, done = found.offset + 1, stream.done
        if slice.start and slice.num_documents < 0:  # the last lines of an altered member
            with Source(slice.uri, 0, slice.size) as whole:
                whole.check_whole()
    except DamagedStream as damage:
        what = "rest left out of" if isinstance(damage, Bomb) else "truncated or corrupt"
        is_one = slice.format == "txt" and not is_lines(slice.format, options)
        rest = problem(
            Origin(slice.uri, offset, stream.lost_from(done), 1 if is_one else None),
            f"{what} {slice.compression or 'stored'} stream after {num_documents} "
            f"documents: {damage}",
        )
        yield share.bound(rest)


def beginning(whole: FileSlice, options: ReadOptions, limit: int) -> tuple[FileSlice, int]:
    """The beginning of a file with its first ``limit`` selected documents, and their number.

    ``whole`` is the file as a slice that must be read from its start. No more is read than these
    documents need, and the one after them; the number is smaller where the file has no more.
    """
    with Source(whole.uri, whole.start, whole.end) as source:
        documents = selection.mark(_of_stream(source, whole, options), options)
        first = selection.first_of(documents, limit)
        if first.following is None:
            source.drain()
            known = whole
        else:
            end = source.tell()
            known = replace(whole, end=end, num_bytes=end, limit=first.documents)
            known = replace(known, num_documents=first.documents)
        return replace(known, sha256=source.sha256.hexdigest()), first.selected


class _Share:
    """The bytes that the rows of a slice can still lose, at most ``num_bytes`` together.

    In compressed files, each row's loss is an estimate, and the sum could exceed the file.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def bound(self, found: Document) -> Document:
        """``found`` with its lost bytes limited to what is left, but at least 1."""
        if found.problem is None:
            return found
        lost_bytes = max(1, min(found.lost_bytes, self._left))
        self._left -= lost_bytes
        return replace(found, lost_bytes=lost_bytes)


def _check(slice: FileSlice, options: ReadOptions, trusted: str = "") -> FileInfo:
    """The file's current state. Raises ``CorpusChanged`` if ``slice`` has other bytes than planned.

    The bytes are not read if the file has its planned size and version and the version begins with
    ``trusted``.
    """
    now = corpus_files.stat(slice.uri)
    if (now.size, now.version) == (slice.size, slice.version) and now.version.startswith(trusted):
        return now
    if now.size != slice.size and not _is_part(slice, options):
        raise _changed(slice, now)
    if (sha256 := _hash(slice, options, now.size)) != slice.sha256:
        raise _changed(slice, now, sha256)
    return now


def _is_part(slice: FileSlice, options: ReadOptions) -> bool:
    """True if ``slice`` can be unchanged although the file has another size."""
    return _is_row_groups(slice) or (is_lines(slice.format, options) and not slice.compression)


def _is_row_groups(slice: FileSlice) -> bool:
    # Without a number of documents, the file was unreadable when it was cut.
    return slice.format == "parquet" and slice.num_documents >= 0


def _hash(slice: FileSlice, options: ReadOptions, size: int) -> str:
    """SHA-256, in hex, of the bytes of ``slice``, as computed by ``listing.cut``.

    ``size`` is the current size of its file, in bytes.
    """
    if _is_row_groups(slice):
        with Source(slice.uri, 0, size) as source, contextlib.suppress(*UNREADABLE):
            file = parquet.open_file(source)
            names = hashed_names(file.schema_arrow, options)
            groups = column_chunks(source, chunk_paths(file, columns_of(options)))
            return hash_chunks(source, names, groups[slice.start : slice.end])
        return "unreadable"
    with Source(slice.uri, slice.start, slice.end) as source:
        source.drain()
        return source.sha256.hexdigest()


def _changed(slice: FileSlice, now: FileInfo, sha256: str = "") -> CorpusChanged:
    part = f"{'row groups' if _is_row_groups(slice) else 'bytes'} {slice.start} to {slice.end}"
    values: list[tuple[str, object, object]] = [
        ("size", now.size, slice.size),
        ("version", now.version, slice.version),
    ]
    if sha256:
        values.append((f"sha256 of {part}", sha256[:12], slice.sha256[:12]))
    differing = [f"{what} {got}, planned {plan}" for what, got, plan in values if got != plan]
    # A plan identifies files by size and version.
    touch = "touch it and " if (now.size, now.version) == (slice.size, slice.version) else ""
    return CorpusChanged(
        f"{slice.uri} is not the file that was planned: {'; '.join(differing)}; {touch}run the "
        "same command again to plan it anew"
    )


# --- columns and samples


def peek_columns(
    slice: FileSlice, options: ReadOptions, wanted: Sequence[str] = ()
) -> list[str] | None:
    """Columns of the first documents of ``slice``; None if there are none that can be read.

    More documents of JSONL are read while ``wanted`` columns are missing, up to ``SAMPLE_BYTES``.
    """
    with Source(slice.uri, slice.start, slice.end) as source:
        if slice.format == "parquet":
            with contextlib.suppress(*UNREADABLE):
                return nested.names_in(parquet.open_file(source).schema_arrow, columns_of(options))
            return None
        stream = _stream(source, slice, options)
        names: dict[str, None] = {}
        with contextlib.suppress(DamagedStream):
            if slice.format == "csv":
                header = next(read_rows(stream, options), None)
                names.update(dict.fromkeys(header.fields if header else []))
            elif slice.format == "jsonl":
                _add_json_columns(names, stream, options, wanted)
            elif slice.format.startswith(WARC):
                for of_page in itertools.islice(
                    warc.columns_of(stream, options, columns_of(options)), PEEK_DOCUMENTS
                ):
                    names.update(dict.fromkeys(of_page))
        return list(names) or None


def peek_text(slice: FileSlice, options: ReadOptions) -> str:
    """Reason why the first documents of ``slice`` have no text or id; empty if there is none."""
    with Source(slice.uri, slice.start, slice.end) as source:
        if slice.format == "parquet":
            with contextlib.suppress(*UNREADABLE):
                return text_paths.why_no_text_in(parquet.open_file(source).schema_arrow, options)
        elif slice.format == "jsonl":
            stream = _stream(source, slice, options)
            rows: list[dict[str, Any]] = []
            with contextlib.suppress(DamagedStream):
                lines = streams.lines(stream, streams.line_limit(options))
                for line in itertools.islice(lines, PEEK_DOCUMENTS):
                    value = parse_line(stream.line_text(line.data)) if line.data else None
                    if isinstance(value, dict):
                        rows.append(value)
            return text_paths.why_no_text(rows, options)
        return ""


def _add_json_columns(
    names: dict[str, None], stream: Stream, options: ReadOptions, wanted: Sequence[str]
) -> None:
    """Add the columns of the first documents of ``stream`` to ``names``, also if it is damaged."""
    num_documents = 0
    for line in streams.lines(stream, streams.line_limit(options)):
        if line.blank:
            value = None
        else:
            num_documents += 1
            value = parse_line(stream.line_text(line.data)) if line.data else None
        if isinstance(value, dict):
            found = nested.names(value, columns_of(options))
            names.update(dict.fromkeys(found))
        if num_documents >= PEEK_DOCUMENTS and names.keys() >= {*wanted}:
            return
        if names and line.offset + line.length > SAMPLE_BYTES:
            return


def sample(slice: FileSlice, options: ReadOptions, max_documents: int) -> list[Document]:
    """Up to ``max_documents`` readable documents from the beginning of ``slice``, a whole file.

    About 1 MB is read at most.
    """
    documents: list[Document] = []
    budget = None if slice.format == "parquet" else SAMPLE_BYTES
    with (
        Source(slice.uri, slice.start, slice.end, budget) as source,
        contextlib.suppress(DamagedStream),
    ):
        if slice.format == "txt" and options.txt_documents == "file":
            return _sample_text(source, slice, options)[:max_documents]
        if slice.format == "parquet":
            found = parquet_documents(source, slice, options)
        else:
            found = _documents(_stream(source, slice, options), slice, options)
        if max_documents <= 0:
            return documents
        num_bytes = 0
        for each in found:
            if each.problem is None:
                documents.append(each)
            num_bytes += len(each.text)
            if len(documents) == max_documents or num_bytes > SAMPLE_BYTES:
                break
    return documents


def _sample_text(source: Source, slice: FileSlice, options: ReadOptions) -> list[Document]:
    head = bytearray()
    with contextlib.suppress(DamagedStream):
        for block in _stream(source, slice, options):
            head += block
            if len(head) >= SAMPLE_BYTES:
                break
    text = decode(head[:SAMPLE_BYTES].removeprefix(BOM))
    found = document(Origin(slice.uri, 0, slice.num_bytes), text, None, options)
    return [found] if found.problem is None else []


# --- formats


def _stream(source: Source, slice: FileSlice, options: ReadOptions) -> Stream:
    # Each page of WARC has an encoding of its own.
    encoding = "" if slice.format.startswith(WARC) else options.encoding
    return Stream(source, slice.compression, encoding, is_lines(slice.format, options))


def _documents(stream: Stream, slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of ``slice`` from the bytes of ``stream``.

    Raises ``DamagedStream`` if the stream ends too early.
    """
    if slice.format == REST:
        return _rest_documents(slice)
    if slice.format == "csv":
        return csv_documents(stream, slice, options)
    if slice.format == "conllu":
        return conllu_documents(stream, slice, options)
    if slice.format.startswith(WARC):
        return warc.warc_documents(stream, slice, options)
    if is_lines(slice.format, options):
        return _line_documents(stream, slice, options)
    return whole_document(stream, slice, options)


def _rest_documents(slice: FileSlice) -> Iterator[Document]:
    """Yield the one document that stands for the damaged rest of an archive."""
    parts = uris.split_member(slice.uri)
    assert parts is not None
    _, member = corpus_files.find_member(*parts)
    yield problem(Origin(slice.uri, 0, max(slice.num_bytes, 1), None), member.problem)


def _line_documents(stream: Stream, slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    limit = streams.line_limit(options)
    for line in streams.lines(stream, limit, slice.start):
        if line.blank:
            continue
        origin = origin_in(stream, slice, line, line.length)
        if line.data is None:
            yield problem(origin, f"line of {line.length} bytes is over the limit of {limit}")
        elif slice.format == "txt":
            text = stream.line_text(line.data.removesuffix(b"\r"))
            yield document(origin, text, None, options)
        else:
            yield json_document(origin, stream.line_text(line.data), options)


def is_lines(format: str, options: ReadOptions) -> bool:
    """True if every line is a document."""
    return format == "jsonl" or (format == "txt" and options.txt_documents == "line")


def is_stream(format: str, options: ReadOptions) -> bool:
    """True if documents follow each other, so that the beginning of a file has some."""
    return format in ("csv", "conllu") or format.startswith(WARC) or is_lines(format, options)
