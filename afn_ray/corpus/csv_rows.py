"""CSV in, documents out: a header, commas, and fields in double quotes.

A quote within a field is doubled or preceded by a backslash, as set by ``csv_escape``. A row that
other programs may read differently is never guessed at: it is quarantined with the reason.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import NamedTuple

from afn_ray.corpus import streams
from afn_ray.corpus.documents import (
    Origin,
    clean_id,
    columns,
    decode,
    document,
    missing_column,
    problem,
    with_kept,
)
from afn_ray.corpus.streams import Stream
from afn_ray.corpus_values import Document, FileSlice, ReadOptions

NULL = "\\N"
"""Marker of MySQL and Hive for a missing value."""
BACKSLASH = "its quotes may have backslashes before them, as Spark and MySQL write them: "
SPACED = re.compile(r'(?:^|,) +"')
"""A space before the opening quote of a field."""
OPENING = re.compile(r'(?:^|,)"')
"""The opening quote of a field."""
IN_QUOTES = re.compile(r'\\(["\\\n])|""|"')
"""Inside quotes: a character escaped by a backslash, a doubled quote, or the closing quote."""


class _TooLong(Exception):
    """A CSV row is over the line limit."""


class Row(NamedTuple):
    """One row of a file, or the reason why it could not be parsed."""

    fields: list[str]
    problem: str
    start: int
    """Bytes of the stream before the row."""
    end: int
    """Bytes of the stream up to the end of the row."""
    num_lines: int
    """Lines of the row that are not blank."""


def csv_documents(stream: Stream, slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of ``slice``, which is a whole file."""
    rows = read_rows(stream, options)
    header = next(rows, None)
    if header is None:
        return
    whole = Origin(slice.uri, 0, slice.num_bytes, None)
    if header.problem:
        yield problem(whole, f"header: {header.problem}")
        return
    names = header.fields
    if (missing := missing_column(names, options)) is not None:
        yield problem(whole, f"no column {missing!r}; it has: {columns(names)}")
        return
    for number, row in enumerate(rows):
        origin = Origin(slice.uri, number, stream.stored(row.end - row.start))
        if row.problem:
            yield problem(origin._replace(lost_documents=row.num_lines), row.problem)
        elif len(row.fields) != len(names):
            yield problem(origin, f"row has {len(row.fields)} fields, the header has {len(names)}")
        else:
            # Of two columns with one name, the first counts.
            values = dict(zip(reversed(names), reversed(row.fields), strict=True))
            given: dict[str, str] = {}
            if options.keep:
                given = {name: value for name, value in values.items() if value not in ("", NULL)}
            yield with_kept(_document(origin, values, options), given, options)


def _document(origin: Origin, row: dict[str, str], options: ReadOptions) -> Document:
    text, doc_id = row[options.text_column], None
    if options.id_column is not None and row[options.id_column] not in ("", NULL):
        try:
            doc_id = clean_id(row[options.id_column])
        except ValueError as error:
            return problem(origin, str(error))
    if text == NULL:
        reason = f"{options.text_column} is {NULL}, which MySQL and Hive write for null"
        return problem(origin, reason, doc_id)
    return document(origin, text, doc_id, options)


def read_rows(stream: Stream, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of ``stream``, the header first."""
    limit = streams.line_limit(options)
    lines = streams.lines(stream, limit)
    raw: list[str] = []  # lines of the current row
    num_bytes = num_lines = first_line = 0  # of the current row
    ended = quoted = False

    def feed() -> Iterator[str]:
        nonlocal num_bytes, num_lines, first_line, ended, quoted
        for line in lines:
            first_line = first_line or line.number + 1
            num_lines += not line.blank
            num_bytes += line.length + 1
            if line.data is None or num_bytes > limit:
                raise _TooLong
            text = decode(line.data) + "\n"
            raw.append(text)
            if options.csv_escape == "backslash":
                text, quoted = _doubled(text, quoted)
            yield text
        ended = True

    # The limit of the csv module applies to the whole process, so it is only ever raised. feed()
    # enforces the real limit.
    csv.field_size_limit(max(csv.field_size_limit(), limit))
    reader = csv.reader(feed(), strict=True)
    while True:
        raw.clear()
        num_bytes = num_lines = first_line = 0
        quoted = False
        start = stream.done
        try:
            fields = next(reader, None)
        except csv.Error as error:
            why = _why_not_csv(error, raw, options)
            # The reader requests a line after the last one only inside a quoted field.
            if ended:
                why = (
                    "quoted field is not closed before the end of the file, and took all of it "
                    f"from line {first_line:,} on"
                )
            yield Row([], why, start, stream.done, max(num_lines, 1))
            continue
        except _TooLong:
            raw.clear()
            try:
                num_lines += sum(not line.blank for line in lines)
            finally:
                why = (
                    f"row is over the limit of {limit} bytes (is a quote not closed?); the file is "
                    f"left out from line {first_line:,} on"
                )
                yield Row([], why, start, stream.done, max(num_lines, 1))
            return
        if fields is None:
            return
        if fields:
            why = _other_reading(fields, raw, options)
            yield Row(fields, why, start, stream.done, max(num_lines, 1))


def _doubled(line: str, quoted: bool) -> tuple[str, bool]:
    """``line`` with its escaped quotes doubled, and whether a quoted field is still open after it.

    Inside quotes, a backslash escapes a quote, a backslash or a newline. Any other backslash is a
    plain character.
    """
    parts: list[str] = []
    at = 0
    while found := (IN_QUOTES if quoted else OPENING).search(line, at):
        parts.append(line[at : found.start()])
        if not quoted:
            quoted = True
            parts.append(found[0])
        elif found[0] == '"':
            quoted = False
            parts.append('"')
        else:
            parts.append({'"': '""', None: '""'}.get(found[1], found[1]))
        at = found.end()
    return "".join([*parts, line[at:]]), quoted


def _escaped_fields(raw: list[str]) -> list[str] | None:
    """Fields of a row, read with backslash escapes; None if it is not valid CSV that way.

    Raises ``EOFError`` if the row would continue after its last line.
    """
    quoted = False
    lines = []
    for line in raw:
        line, quoted = _doubled(line, quoted)
        lines.append(line)
    if quoted:
        raise EOFError
    try:
        rows = list(csv.reader(lines, strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


def _why_not_csv(error: csv.Error, raw: list[str], options: ReadOptions) -> str:
    hint = ""
    if options.csv_escape != "backslash" and any('\\"' in line for line in raw):
        hint = f"; {BACKSLASH}then give --csv-escape backslash"
    return f"not CSV: {error}{hint}"


def _other_reading(fields: list[str], raw: list[str], options: ReadOptions) -> str:
    """Reason why another CSV dialect reads the row differently from
    ``fields``; empty if none does.
    """
    # The substring test comes first: most lines fail it, and the pattern is slow.
    if any(' "' in line and SPACED.search(line) for line in raw):
        with_spaces = [field.lstrip(" ") for field in fields]
        try:
            (row,) = csv.reader(raw, strict=True, skipinitialspace=True)
        except (csv.Error, ValueError):
            row = fields
        if [field.lstrip(" ") for field in row] != with_spaces:
            return (
                "a field has a space before its opening quote, so that some programs take its "
                "quotes for text; remove such spaces"
            )
    if options.csv_escape == "auto" and any('\\"' in line for line in raw):
        try:
            escaped = _escaped_fields(raw)
        except EOFError:
            escaped = []
        if escaped is not None and escaped != fields and len(escaped) in (0, len(fields)):
            return (
                f"it can be read in two ways; {BACKSLASH}then give --csv-escape backslash, else "
                "--csv-escape doubled"
            )
    return ""
