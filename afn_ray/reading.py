"""The bytes of a slice become documents.

``read`` never raises for what is in a slice: a bad line, row or stream becomes a ``Document`` with a ``problem``.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from afn_ray import storage, streams, tags
from afn_ray.errors import CorpusChanged, CorpusError, ShardError
from afn_ray.schema import Document, FileInfo, FileSlice, ReadOptions, Span
from afn_ray.streams import BLOCK_BYTES, BOM, EXPANSION, EXPANSION_FROM_BYTES, Bomb, Damaged, Line, Source

BATCH_BYTES = 4 << 20
BATCH_ROWS = 64  # few: the bytes of dictionary-encoded rows cannot be told from the file's metadata
PEEK_DOCUMENTS = 20
SAMPLE_BYTES = 1 << 20
ID_CHARS = 1024
CONLLU_LINES = 1 << 20
"""Of one document: lines of a letter take 200 times their bytes."""

UNREADABLE = (OSError, ValueError, IndexError, pa.ArrowException)
"""What pyarrow raises for a file that is not Parquet, or damaged."""

MARK = "afn_ray.mark"
COLUMN = re.compile(r"[\w.:/$@+-]{1,40}")
"""What looks like the name of a column, and not like a line of text."""
SURROGATES = re.compile("[\ud800-\udfff]")


class _TooLong(Exception):
    """A CSV row is over the line limit."""


# --- reading ---------------------------------------------------------------------------------------------


def read(slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    """Documents of ``slice`` in order, streamed in bounded memory.

    Bad content is yielded as a ``Document`` with a ``problem``. Raises ``CorpusChanged``, possibly after the last
    document, when the slice's bytes are not those that were planned, ``ShardError`` when the disk or the network
    fails, ``Unavailable`` when it does not answer.

    What is planned is bytes: a file that was touched or written anew with the same content is read, and so is a
    slice of lines or row groups whose own bytes are the same in a file that grew.
    """
    try:
        now = _check(slice, options)
        if slice.format == "parquet":
            with Source(slice.uri, 0, now.size) as source:
                yield from _documents(source, slice, options)
            _check(slice, options, trusted="etag:")  # pages are read here and there, and not hashed on the way
        else:
            yield from _read_bytes(slice, options)
    except CorpusError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CorpusChanged(
                f"{slice.uri} is gone since it was planned; run the same command again to plan without it"
            ) from error
        raise ShardError(str(error)) from error


def _read_bytes(slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    with Source(slice.uri, slice.start, slice.end) as source:
        num_documents = offset = 0
        try:
            for document in _documents(source, slice, options):
                yield document
                num_documents += 1
                offset = document.offset + 1
        except Damaged as damage:
            what = "rest left out of" if isinstance(damage, Bomb) else "truncated or corrupt"
            yield _problem(
                slice, offset, f"{what} {slice.compression} stream after {num_documents} documents: {damage}"
            )  # fmt: skip
        source.drain()
        if source.sha256.hexdigest() != slice.sha256:
            raise _changed(slice, storage.stat(slice.uri), source.sha256.hexdigest())


def _check(slice: FileSlice, options: ReadOptions, trusted: str = "") -> FileInfo:
    """The file now. Raises ``CorpusChanged`` when the bytes of ``slice`` are not those that were planned.

    They are not read where the file has the planned size and version, and that begins with ``trusted``.
    """
    now = storage.stat(slice.uri)
    if (now.size, now.version) == (slice.size, slice.version) and now.version.startswith(trusted):
        return now
    if now.size != slice.size and not _is_part(slice, options):
        raise _changed(slice, now)
    if (sha256 := _hash(slice, options, now.size)) != slice.sha256:
        raise _changed(slice, now, sha256)
    return now


def _is_part(slice: FileSlice, options: ReadOptions) -> bool:
    """Whether the file may have another size and ``slice`` the same bytes."""
    return _is_row_groups(slice) or (is_lines(slice.format, options) and not slice.compression)


def _is_row_groups(slice: FileSlice) -> bool:
    return slice.format == "parquet" and slice.num_documents >= 0  # else the file was unreadable when it was cut


def _hash(slice: FileSlice, options: ReadOptions, size: int) -> str:
    """SHA-256, in hex, of the bytes of ``slice`` in its file of ``size`` bytes, as ``corpus.cut`` takes it."""
    if _is_row_groups(slice):
        with Source(slice.uri, 0, size) as source, contextlib.suppress(*UNREADABLE):
            groups = column_chunks(pq.ParquetFile(source).metadata, columns_of(options), size)
            return hash_chunks(source, columns_of(options), groups[slice.start : slice.end])
        return "unreadable"
    with Source(slice.uri, slice.start, slice.end) as source:
        source.drain()
        return source.sha256.hexdigest()


def _changed(slice: FileSlice, now: FileInfo, sha256: str = "") -> CorpusChanged:
    part = f"{'row groups' if _is_row_groups(slice) else 'bytes'} {slice.start} to {slice.end}"
    differing = [
        f"{what} {got}, planned {expected}"
        for what, got, expected in (
            ("size", now.size, slice.size), ("version", now.version, slice.version),
            (f"sha256 of {part}", sha256[:12] or None, slice.sha256[:12]),
        )
        if got not in (None, expected)
    ]  # fmt: skip
    # A plan remembers files by size and version.
    touch = "touch it and " if (now.size, now.version) == (slice.size, slice.version) else ""
    return CorpusChanged(
        f"{slice.uri} is not the file that was planned: {'; '.join(differing)}; {touch}run the same command again "
        "to plan it anew"
    )


# --- a first look ----------------------------------------------------------------------------------------


def peek_columns(slice: FileSlice, options: ReadOptions) -> list[str] | None:
    """Columns of the first documents of ``slice``; None when they have none, or none that can be read."""
    with Source(slice.uri, slice.start, slice.end) as source:
        if slice.format == "parquet":
            with contextlib.suppress(*UNREADABLE):
                return list(pq.ParquetFile(source).schema_arrow.names)
            return None
        lines = streams.lines(streams.blocks(source, slice.compression), streams.line_limit(options))
        names: dict[str, None] = {}
        with contextlib.suppress(Damaged):
            if slice.format == "csv":
                header = next(_rows(lines, streams.line_limit(options)), None)
                names.update(dict.fromkeys(header if isinstance(header, list) else []))
            elif slice.format == "jsonl":
                seen = 0
                for line in lines:
                    value = _json(line.data) if line.data and not line.blank else None
                    names.update(dict.fromkeys(value if isinstance(value, dict) else []))
                    seen += not line.blank
                    if seen == PEEK_DOCUMENTS or (names and line.offset + line.length > SAMPLE_BYTES):
                        break
        return list(names) or None


def sample(slice: FileSlice, options: ReadOptions, max_documents: int) -> list[Document]:
    """At most ``max_documents`` readable documents from the beginning of ``slice``, a whole file; reads about 1 MB."""
    documents: list[Document] = []
    budget = None if slice.format == "parquet" else SAMPLE_BYTES
    with Source(slice.uri, slice.start, slice.end, budget) as source, contextlib.suppress(Damaged):
        if slice.format == "txt" and options.txt_documents == "file":
            return _sample_text(source, slice, options)[:max_documents]
        num_bytes = 0
        for document in _documents(source, slice, options) if max_documents > 0 else ():
            if document.problem is None:
                documents.append(document)
            num_bytes += len(document.text)
            if len(documents) == max_documents or num_bytes > SAMPLE_BYTES:
                break
    return documents


def _sample_text(source: Source, slice: FileSlice, options: ReadOptions) -> list[Document]:
    head = bytearray()
    with contextlib.suppress(Damaged):
        for block in streams.blocks(source, slice.compression):
            head += block
            if len(head) >= SAMPLE_BYTES:
                break
    document = _document(slice, 0, _decode(head[:SAMPLE_BYTES].removeprefix(BOM)), None, options)
    return [document] if document.problem is None else []


# --- Parquet's columns -----------------------------------------------------------------------------------


def column_chunks(metadata: Any, columns: Sequence[str], size: int) -> list[list[tuple[int, int]]]:
    """Per row group the (offset, bytes) of the chunks of ``columns``. ``ValueError`` for one outside the file."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    leaves = [i for i, path in enumerate(paths) if _is_of(path, columns)]
    groups: list[list[tuple[int, int]]] = []
    for group in range(metadata.num_row_groups):
        groups.append([])
        for leaf in leaves:
            chunk = metadata.row_group(group).column(leaf)
            offset = min(o for o in (chunk.dictionary_page_offset, chunk.data_page_offset) if o)
            if not 0 <= offset <= offset + chunk.total_compressed_size <= size:
                raise ValueError(f"row group {group} lies outside the file")
            groups[-1].append((offset, chunk.total_compressed_size))
    return groups


def _is_of(path: str, columns: Sequence[str]) -> bool:
    """Whether the leaf at ``path`` belongs to one of ``columns``."""
    return any(path == column or path.startswith(column + ".") for column in columns)


def hash_chunks(source: Source, columns: Sequence[str], groups: Iterable[list[tuple[int, int]]]) -> str:
    """SHA-256, in hex, of the names of ``columns`` and of the bytes of their chunks in ``groups``."""
    sha256 = hashlib.sha256(json.dumps(columns).encode())
    for chunks in groups:
        for offset, left in chunks:
            source.seek(offset)
            while left and (block := source.read(min(left, BLOCK_BYTES))):
                sha256.update(block)
                left -= len(block)
    return sha256.hexdigest()


# --- formats ---------------------------------------------------------------------------------------------


def _documents(source: Source, slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    """Documents of ``slice``, whose bytes ``source`` gives; raises ``Damaged`` where a stream ends too early."""
    if slice.format == "parquet":
        return _parquet_documents(source, slice, options)
    blocks = streams.blocks(source, slice.compression)
    if slice.format == "csv":
        return _csv_documents(blocks, slice, options)
    if slice.format == "conllu":
        return _conllu_documents(blocks, slice, options)
    return (_line_documents if is_lines(slice.format, options) else _whole_document)(blocks, slice, options)


def _whole_document(blocks: Iterator[bytes], slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    limit = options.max_document_bytes
    rule = f"bytes is over max_document_bytes = {limit}"
    if not slice.compression and slice.size > limit + len(BOM):
        yield _problem(slice, 0, f"document of {slice.size} {rule}")
        return
    data = bytearray()
    for block in blocks:
        data += block
        if len(data) > limit + len(BOM):
            yield _problem(slice, 0, f"document of at least {len(data)} {rule}")
            return
    yield _document(slice, 0, _decode(data.removeprefix(BOM)), None, options)


def _line_documents(blocks: Iterator[bytes], slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    limit = streams.line_limit(options)
    for line in streams.lines(blocks, limit, slice.start):
        if line.blank:
            continue
        offset = line.number if slice.compression else line.offset
        if line.data is None:
            yield _problem(slice, offset, f"line of {line.length} bytes is over the limit of {limit}")
        elif slice.format == "txt":
            yield _document(slice, offset, _decode(line.data.removesuffix(b"\r")), None, options)
        else:
            yield _json_document(slice, offset, line.data, options)


def _json_document(slice: FileSlice, offset: int, line: bytes, options: ReadOptions) -> Document:
    value = _json(line)
    if isinstance(value, _NotJson):
        return _problem(slice, offset, f"not JSON: {value}")
    if not isinstance(value, dict):
        return _problem(slice, offset, f"line is {type(value).__name__}, expected an object")
    doc_id = None
    if options.id_column is not None:
        found = value.get(options.id_column)
        if isinstance(found, str | int | float) and not isinstance(found, bool):
            doc_id = _clean(str(found))[0]
    for column in (options.text_column, options.labels):
        if column is not None and column not in value:
            return _problem(slice, offset, f"no column {column!r}; it has: {columns(value)}", doc_id)
    text = value[options.text_column]
    if options.labels is not None:
        return _labelled_document(slice, offset, text, value[options.labels], doc_id, options)
    if isinstance(text, str):
        return _document(slice, offset, text, doc_id, options)
    kind = "null" if text is None else f"{type(text).__name__}, expected a string"
    return _problem(slice, offset, f"{options.text_column} is {kind}", doc_id)


def _labelled_document(
    slice: FileSlice, offset: int, text: object, labels: object, doc_id: str | None, options: ReadOptions
) -> Document:
    assert options.labels is not None
    try:
        text, spans = tags.from_cells(text, labels, options.text_column, options.labels)
    except ValueError as error:
        return _problem(slice, offset, str(error), doc_id)
    return _document(slice, offset, text, doc_id, options, spans)


class _NotJson(str):
    """Why a line is not JSON."""


def _json(line: bytes) -> Any:
    try:
        return json.loads(_decode(line))
    except RecursionError:
        return _NotJson("nested too deeply")
    except ValueError as error:  # a number of too many digits is one that is no JSONDecodeError
        return _NotJson(error)


def _csv_documents(blocks: Iterator[bytes], slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    limit = streams.line_limit(options)
    rows = _rows(streams.lines(blocks, limit), limit)
    header = next(rows, None)
    if header is None:
        return
    if isinstance(header, str):
        yield _problem(slice, 0, f"header: {header}")
        return
    if (missing := missing_column(header, options)) is not None:
        yield _problem(slice, 0, f"no column {missing!r}; it has: {columns(header)}")
        return
    text_at = header.index(options.text_column)
    id_at = None if options.id_column is None else header.index(options.id_column)
    for number, row in enumerate(rows):
        if isinstance(row, str):
            yield _problem(slice, number, row)
        elif len(row) != len(header):
            yield _problem(slice, number, f"row has {len(row)} fields, the header has {len(header)}")
        else:
            doc_id = None if id_at is None else _clean(row[id_at])[0] or None
            yield _document(slice, number, row[text_at], doc_id, options)


def _rows(lines: Iterator[Line], limit: int) -> Iterator[list[str] | str]:
    """Rows of a CSV stream, the header first; a string says why a row could not be parsed."""
    held = 0  # bytes fed since the last row
    ended = False

    def feed() -> Iterator[str]:
        nonlocal held, ended
        for line in lines:
            held += line.length + 1
            if line.data is None or held > limit:
                raise _TooLong
            yield _decode(line.data) + "\n"
        ended = True

    # The module's limit belongs to the whole process: it is only ever raised, and the real bound is in feed().
    csv.field_size_limit(max(csv.field_size_limit(), limit))
    reader = csv.reader(feed())
    while True:
        held = 0
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield f"not CSV: {error}"
            continue
        except _TooLong:
            yield f"row is over the limit of {limit} bytes (is a quote not closed?); the rest of the file is left out"
            return
        if row is None:
            return
        if ended:  # the reader only asks for a line after the last one inside a quoted field
            yield "quoted field is not closed before the end of the file"
            return
        if row:
            yield row


def _conllu_documents(blocks: Iterator[bytes], slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    """A document is what a ``newdoc`` begins; where there is none above, a sentence."""
    limit = streams.line_limit(options)
    document: list[list[Line]] = []
    size, num_lines, together = 0, 0, False
    for sentence in _sentences(streams.lines(blocks, limit), limit):
        comments = [_decode(line.data) for line in sentence if line.data is not None and line.data.startswith(b"#")]
        begins = any(map(tags.begins_document, comments))
        if len(comments) == len(sentence) and not begins:
            continue
        if document and (begins or not together):
            yield _conllu_document(slice, document, options)
            document, size, num_lines = [], 0, 0
        together = together or begins
        document.append(sentence)
        size += sum(line.length for line in sentence)
        num_lines += len(sentence)
        if size > limit or num_lines > CONLLU_LINES:
            document = [[document[0][0]._replace(data=None)]]
    if document:
        yield _conllu_document(slice, document, options)


def _sentences(lines: Iterator[Line], limit: int) -> Iterator[list[Line]]:
    """Lines between blank ones; of more than ``limit`` bytes the first alone, without its data."""
    sentence: list[Line] = []
    size = 0
    for line in lines:
        if line.blank:
            if sentence:
                yield sentence
            sentence, size = [], 0
            continue
        sentence.append(line)
        size += line.length
        if size > limit or len(sentence) > CONLLU_LINES:
            sentence = [sentence[0]._replace(data=None)]
    if sentence:
        yield sentence


def _conllu_document(slice: FileSlice, sentences: list[list[Line]], options: ReadOptions) -> Document:
    first, labels = sentences[0][0], options.labels_in("conllu")
    offset = first.number if slice.compression else first.offset
    assert labels is not None
    if any(line.data is None for sentence in sentences for line in sentence):
        limit = streams.line_limit(options)
        return _problem(slice, offset, f"document of CoNLL-U, or a line of it, is over the limit of {limit} bytes "
                        f"or {CONLLU_LINES} lines")  # fmt: skip
    numbered = (
        [(line.number + 1, _decode(line.data or b"").removesuffix("\r")) for line in sentence] for sentence in sentences
    )
    try:
        text, spans, doc_id = tags.from_conllu(numbered, labels)
    except ValueError as error:
        return _problem(slice, offset, f"not CoNLL-U: {error}")
    return _document(slice, offset, text, _clean(doc_id)[0] or None, options, spans)


def _parquet_documents(source: Source, slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    unreadable = "not a readable Parquet file"
    try:
        metadata = pq.read_metadata(source)
        leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
        # As dictionaries, or 64 rows that share a value of 64 MB would be 4 GB.
        strings = [c.path for c in leaves if c.path in columns_of(options) and c.physical_type == "BYTE_ARRAY"]
        file = pq.ParquetFile(
            source, metadata=metadata, read_dictionary=strings, buffer_size=BLOCK_BYTES, pre_buffer=False
        )
        schema = file.schema_arrow
        num_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except UNREADABLE as error:
        yield _problem(slice, 0, f"{unreadable}: {error}")
        return
    if (missing := missing_column(schema.names, options)) is not None:
        yield _problem(slice, 0, f"no column {missing!r}; it has: {columns(schema.names)}")
        return
    kind = schema.field(schema.names.index(options.text_column)).type
    row = sum(num_rows[: slice.start])
    for group in range(slice.start, min(slice.end, len(num_rows))):
        end = row + num_rows[group]
        if not (_is_text(kind) or (options.labels is not None and _is_list(kind))):
            for offset in range(row, end):
                yield _problem(slice, offset, f"{options.text_column} is {kind}, expected a string")
            row = end
            continue
        try:
            _check_expansion(metadata.row_group(group), options)
            for texts, ids, labels in _batches(file, group, options):
                for text, doc_id, of_text in zip(texts, ids, labels, strict=True):
                    if text is None:
                        yield _problem(slice, row, f"{options.text_column} is null", doc_id)
                    elif options.labels is not None:
                        yield _labelled_document(slice, row, text, of_text, doc_id, options)
                    else:
                        yield _document(slice, row, text, doc_id, options)
                    row += 1
            if row != end:
                raise ValueError(f"{end - row} rows are missing")
        except UNREADABLE as error:
            yield _problem(slice, row, f"{unreadable}: row group {group}: {error}")
        row = end


def _check_expansion(group: Any, options: ReadOptions) -> None:
    """Raise ``ValueError`` for a row group whose metadata say that a column gives far more than it takes."""
    for chunk in map(group.column, range(group.num_columns)):
        given, taken = chunk.total_uncompressed_size, chunk.total_compressed_size
        if _is_of(chunk.path_in_schema, columns_of(options)) and given > max(EXPANSION_FROM_BYTES, EXPANSION * taken):
            raise ValueError(f"{taken} bytes of {chunk.path_in_schema} give {given}, over {EXPANSION} times as many")


def _batches(file: Any, group: int, options: ReadOptions) -> Iterator[tuple[list[Any], list[str | None], list[Any]]]:
    """Texts, ids and tags of one row group, a few megabytes at a time where its metadata allow to tell."""
    columns = columns_of(options)
    metadata = file.metadata.row_group(group)
    leaves = (metadata.column(i) for i in range(metadata.num_columns))
    num_bytes = sum(c.total_uncompressed_size for c in leaves if _is_of(c.path_in_schema, columns))
    num_rows = min(BATCH_ROWS, max(1, BATCH_BYTES * metadata.num_rows // max(num_bytes, 1)))
    for batch in file.iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False):
        names = batch.schema.names
        text = batch.column(names.index(options.text_column))
        ids: list[str | None] = [None] * len(text)
        if options.id_column is not None:
            found = _strings(batch.column(names.index(options.id_column)))
            ids = [doc_id and _clean(doc_id)[0] for doc_id in found]
        labels = ids if options.labels is None else _lists(batch.column(names.index(options.labels)))
        yield _lists(text) if _is_list(text.type) else _strings(text), ids, labels


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type holds strings, or bytes that may be UTF-8."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return pa.types.is_fixed_size_binary(kind) or any(getattr(pa.types, f"is_{test}")(kind) for test in tests)


def _is_list(kind: Any) -> bool:
    tests = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)


def _lists(column: Any) -> list[Any]:
    """Values of an Arrow array, nested as they are; one that is not UTF-8 is told by its type, for it is no list."""

    def value(scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except UnicodeDecodeError as error:
            return error

    return [value(scalar) for scalar in column]


def _strings(column: Any) -> list[str | None]:
    """Values of an Arrow array as strings that may hold surrogates; nested ones are None."""
    if pa.types.is_dictionary(column.type):
        used = column.indices.unique().drop_null()
        values = dict(zip(used.to_pylist(), _strings(column.dictionary.take(used)), strict=True))
        return [values.get(index) for index in column.indices.to_pylist()]
    if not _is_text(column.type):
        try:
            column = column.cast(pa.string())
        except pa.ArrowNotImplementedError:
            return [None] * len(column)
    # By way of bytes, since pyarrow does not check that strings are UTF-8.
    return [None if value is None else _decode(value) for value in column.cast(pa.large_binary()).to_pylist()]


def is_lines(format: str, options: ReadOptions) -> bool:
    """Whether every line is a document."""
    return format == "jsonl" or (format == "txt" and options.txt_documents == "line")


def columns_of(options: ReadOptions) -> list[str]:
    """Names of the columns that are read."""
    columns = (options.text_column, options.id_column, options.labels)
    return list(dict.fromkeys(c for c in columns if c is not None))


def missing_column(names: Sequence[str], options: ReadOptions) -> str | None:
    """The first column that is to be read and not among ``names``."""
    return next((c for c in columns_of(options) if c not in names), None)


def listing(names: Iterable[str], width: int = 40) -> str:
    """The first ten of ``names``, each cut at ``width``, as one printable line."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return _printable(", ".join(name[:width] for name in names[:10])) + more


def columns(names: Iterable[str]) -> str:
    """``names`` of columns for a message; where a header is missing they are text, which no log may have."""
    names = list(names)
    shown = [name for name in names if COLUMN.fullmatch(name)]
    parts = [listing(shown)] if shown else []
    if num_hidden := len(names) - len(shown):
        parts.append(f"{num_hidden} not shown, which {'is' if num_hidden == 1 else 'are'} no single word")
    return ", and ".join(parts) or "none"


# --- documents -------------------------------------------------------------------------------------------

# An invalid sequence becomes a lone surrogate, which UTF-8 cannot hold, so that it can be told from a U+FFFD
# of the source until the text has been found in its line.
codecs.register_error(MARK, lambda error: ("\udcff", error.end if isinstance(error, UnicodeDecodeError) else 0))


def _decode(data: bytes | bytearray) -> str:
    return data.decode("utf-8", MARK)


def _clean(text: str) -> tuple[str, int]:
    """``text`` with U+FFFD for lone surrogates, and their number."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return SURROGATES.subn("\ufffd", text)
    return text, 0


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _document(
    slice: FileSlice, offset: int, text: str, doc_id: str | None, options: ReadOptions, spans: tuple[Span, ...] = ()
) -> Document:
    if doc_id is not None and len(doc_id) > ID_CHARS:
        return _problem(slice, offset, f"id of {len(doc_id)} characters is over the limit of {ID_CHARS}", doc_id)
    limit = options.max_document_bytes
    if len(text) > limit:  # said before it is encoded: many rows of Parquet may share one text of a gigabyte
        size = f"{'' if text.isascii() else 'at least '}{len(text)}"
        return _problem(slice, offset, f"document of {size} bytes is over max_document_bytes = {limit}", doc_id)
    text, num_replaced = _clean(text)
    if (num_bytes := len(text.encode())) > limit:
        return _problem(slice, offset, f"document of {num_bytes} bytes is over max_document_bytes = {limit}", doc_id)
    return Document(slice.uri, offset, text, doc_id, num_replaced, tags=spans)


def _problem(slice: FileSlice, offset: int, reason: str, doc_id: str | None = None) -> Document:
    return Document(slice.uri, offset, "", doc_id and doc_id[:ID_CHARS], problem=_printable(reason[:600]))
