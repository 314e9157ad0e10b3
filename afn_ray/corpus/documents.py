"""A row of the corpus becomes a document of valid text, or the reason why it cannot be one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from afn_ray import kept
from afn_ray.corpus import tags
from afn_ray.corpus.streams import MARK, Line, Stream
from afn_ray.corpus_values import Document, FileSlice, ReadOptions, Span
from afn_ray.text import count

ID_CHARS = 1024
"""Longest document id, in characters."""
REASON_CHARS = 600
"""Longest reason for a quarantine, in characters."""
GARBLED_SHARE = 0.05
"""Largest share of a document's characters that may be replaced or control characters."""
GARBLED_FROM = 4
"""Fewest replaced and control characters that mark a text as garbled.

In a very short text, a share proves nothing.
"""
SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}
"""Separators of fields in files that are not comma-separated, and their names in messages."""

COLUMN = re.compile(r"[\w.:/$@+-]{1,40}")
"""A likely column name, as opposed to a line of text."""
SURROGATES = re.compile("[\ud800-\udfff]")
CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x80-\x9f]")
"""Control characters: C0 except tab, newline, carriage return and form feed; and C1."""
SEVEN_BIT = re.compile("\x1b\\$[@AB(]|\x1b\\$\\)C")
"""Start of ISO-2022 text. All its bytes are ASCII, so none of them is invalid UTF-8."""
INVALID = "\udcff"
"""Character that stands for an invalid sequence, from the error handler ``streams.MARK``."""


class Origin(NamedTuple):
    """The place of a row in the corpus, and what is lost if it cannot be measured."""

    uri: str
    offset: int
    lost_bytes: int
    """Bytes of the file as it is stored, compressed or not."""
    lost_documents: int | None = 1


def decode(data: bytes | bytearray) -> str:
    """``data`` as text, with a lone surrogate for each invalid UTF-8 sequence."""
    return data.decode("utf-8", MARK)


def clean(text: str) -> tuple[str, int]:
    """``text`` with U+FFFD in place of lone surrogates, and the number of them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return SURROGATES.subn("\ufffd", text)
    return text, 0


def clean_id(text: str) -> str:
    """``text`` as an id. Raises ``ValueError`` if it is not UTF-8.

    U+FFFD is not used here, because two different ids could become the same.
    """
    if SURROGATES.search(text):
        raise ValueError("the id is not valid UTF-8; convert the file to UTF-8")
    return text


def document(
    origin: Origin,
    text: str,
    doc_id: str | None,
    options: ReadOptions,
    spans: tuple[Span, ...] = (),
) -> Document:
    """The document of a row; quarantined if it exceeds a limit or is garbled."""
    if doc_id is not None and len(doc_id) > ID_CHARS:
        return problem(
            origin, f"id of {len(doc_id)} characters is over the limit of {ID_CHARS}", doc_id
        )
    limit = options.max_document_bytes
    # Check before encoding: many rows of Parquet may share one text of a gigabyte.
    if len(text) > limit:
        size = f"{'' if text.isascii() else 'at least '}{len(text)}"
        over = f"document of {size} bytes is over max_document_bytes = {limit}"
        return problem(origin, over, doc_id, text.count(INVALID))
    text, num_replaced = clean(text)
    if (num_bytes := len(text.encode())) > limit:
        over = f"document of {num_bytes} bytes is over max_document_bytes = {limit}"
        return problem(origin, over, doc_id, num_replaced)
    if why := garbled(text, num_replaced, options.encoding):
        return problem(origin, why, doc_id, num_replaced)
    return Document(origin.uri, origin.offset, text, doc_id, num_replaced, tags=spans)


def labelled_document(
    origin: Origin, text: object, labels: object, doc_id: str | None, options: ReadOptions
) -> Document:
    """The document of a row with tags, from the cells with its text and its tags."""
    assert options.labels is not None
    try:
        text, spans = tags.from_cells(text, labels, options.text_column, options.labels)
    except ValueError as error:
        return problem(origin, str(error), doc_id)
    return document(origin, text, doc_id, options, spans)


def with_kept(found: Document, row: Mapping[str, object], options: ReadOptions) -> Document:
    """``found`` with the kept columns of its ``row``, which it has even if it is quarantined.

    ``row`` has them by their paths.
    """
    if not options.keep:
        return found
    values, refused = kept.values_of(row, kept.parse(options.keep))
    return replace(found, kept=values, refused=refused)


def problem(
    origin: Origin, reason: str, doc_id: str | None = None, num_replaced: int = 0
) -> Document:
    """A quarantined row."""
    return Document(
        origin.uri,
        origin.offset,
        "",
        doc_id and doc_id[:ID_CHARS],
        num_replaced,
        problem=without_unprintable(reason[:REASON_CHARS]),
        lost_bytes=origin.lost_bytes,
        lost_documents=origin.lost_documents,
    )


def garbled(text: str, num_replaced: int, encoding: str = "") -> str:
    """Reason why ``text`` is not readable text, and the likely cause; empty if it is readable.

    ``num_replaced`` is the number of its replaced characters; ``encoding`` is the one that was
    given.
    """
    if SEVEN_BIT.search(text):
        return (
            "it looks like ISO-2022, as of Japanese mail (it has the mark ESC $); convert the file "
            "to UTF-8"
        )
    num_controls = len(CONTROLS.findall(text))
    num_bad = num_replaced + num_controls
    if num_bad < GARBLED_FROM or num_bad <= GARBLED_SHARE * len(text):
        return ""
    parts = []
    if num_replaced:
        parts.append(f"{num_replaced} are invalid {encoding or 'UTF-8'}")
    if num_controls:
        parts.append(count(num_controls, "control character"))
    cause = _likely_cause(text, num_replaced, encoding)
    return f"of {count(len(text), 'character')} {' and '.join(parts)}: {cause}"


def _likely_cause(text: str, num_replaced: int, encoding: str) -> str:
    if encoding:
        return f"is its encoding another than {encoding}? Give it alone, with its --encoding"
    if text.count("\0") * 5 > len(text):
        return (
            "it looks like UTF-16 or UTF-32 without a byte order mark, or binary data; convert the "
            "file to UTF-8"
        )
    num_low = sum(c < " " for c in CONTROLS.findall(text))  # C0
    if num_replaced > 4 * num_low:
        return (
            "it looks like an encoding such as cp1251, latin-1 or Shift-JIS; give its --encoding, "
            "or convert the file to UTF-8"
        )
    if num_replaced == 0 and num_low == 0:
        return "it looks like UTF-8 that was once read as latin-1 and written anew; repair the file"
    return (
        "it looks like binary data, or UTF-16 without a byte order mark; convert the file to "
        "UTF-8, or leave it out"
    )


# --- columns


def columns_of(options: ReadOptions) -> list[str]:
    """Names of the columns that are read: the required ones, then the kept ones."""
    kept_paths = [column.path for column in kept.parse(options.keep)]
    return list(dict.fromkeys([*_required(options), *kept_paths]))


def _required(options: ReadOptions) -> list[str]:
    """Names of the columns that every file must have."""
    columns = (options.text_column, options.id_column, options.labels)
    return list(dict.fromkeys(c for c in columns if c is not None))


def missing_column(names: Sequence[str], options: ReadOptions) -> str | None:
    """The first required column that is not among ``names``; None if all are there."""
    return next((c for c in _required(options) if c not in names), None)


def why_missing(names: Sequence[str], options: ReadOptions) -> str:
    """The likely reason why a column is missing from ``names``; empty if there is none."""
    line = ",".join(names)
    if why := garbled(line, line.count(INVALID), options.encoding):
        return why
    if any(name.startswith("sep=") for name in names):
        return "its first line, sep=, is for Excel: remove it"
    for separator, name in SEPARATORS.items():
        parts: list[str] = []
        for field in names:
            if separator in field:
                parts += [part.strip(' "') for part in field.split(separator)]
        # A header of one field with other separators is typical of European Excel.
        if options.text_column in parts or (parts and len(names) == 1):
            return (
                f"its fields are separated by {name}, expected commas: write it anew, as with "
                "duckdb -c \"COPY (FROM read_csv('FILE')) TO 'corpus.parquet'\""
            )
    if any(name.strip(" \ufeff") == options.text_column != name for name in names):
        return (
            f"a name in its header has spaces or a byte order mark around {options.text_column!r}: "
            "remove them"
        )
    return ""


def listing(names: Iterable[str], width: int = 40) -> str:
    """The first ten of ``names``, each cut at ``width`` characters, as one printable line."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return without_unprintable(", ".join(name[:width] for name in names[:10])) + more


def columns(names: Iterable[str]) -> str:
    """Column ``names`` as text for a message.

    Names that do not look like column names are not shown: if the header is missing they are text
    of the corpus, which must not be logged.
    """
    names = list(names)
    shown = [name for name in names if COLUMN.fullmatch(name)]
    parts = [listing(shown)] if shown else []
    if num_hidden := len(names) - len(shown):
        verb = "is" if num_hidden == 1 else "are"
        parts.append(f"{num_hidden} not shown, which {verb} no single word")
    return ", and ".join(parts) or "none"


def without_unprintable(text: str) -> str:
    """``text`` with U+FFFD in place of characters that cannot be printed."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def origin_in(stream: Stream, slice: FileSlice, line: Line, num_bytes: int) -> Origin:
    """The origin of a row of ``num_bytes`` that begins at ``line``.

    Its offset is in bytes of the file if ``stream`` is plain, else in lines.
    """
    offset = line.offset if stream.is_plain else line.number
    return Origin(slice.uri, offset, stream.stored(num_bytes))
