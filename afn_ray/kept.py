"""Kept columns: values of the corpus that ``documents`` carries beside its own columns.

``--keep-columns lang,meta.year:int64`` names them, each with a type; without one, it is a string. A
value of another type is never changed into one of the type: it is left out, and ``not_kept`` of its
document has the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa

from afn_ray.corpus_values import Document
from afn_ray.errors import ConfigError
from afn_ray.schema import LANGUAGE, NOT_KEPT, documents_schema
from afn_ray.text import count, printable

KINDS: dict[str, pa.DataType] = {
    "string": pa.dictionary(pa.int32(), pa.string()),
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
}
"""Types of kept columns, and their Arrow types. A timestamp is in UTC."""
MOST_COLUMNS = 16
"""Largest number of kept columns."""
MOST_BYTES = 1024
"""Largest kept value, in bytes of UTF-8."""
SHOWN_CHARS = 40
"""Longest part of a value that a reason shows, in characters."""
NAME = re.compile(r"[^\W\d][\w-]{0,62}")
"""Form of a name: letters of any alphabet, digits, ``_`` and ``-``; no digit first."""
PATH = re.compile(rf"(?=.{{1,63}}\Z){NAME.pattern}(\.[\w-]+)*")
"""Form of a column of the corpus: a name, or dotted names and numbers, as ``corpus.nested`` has
them.
"""
RESERVED = frozenset(
    {
        *documents_schema(()).names,
        "doc",
        NOT_KEPT,
        "duplicate_of",
        "near_duplicate_of",
        "file",
        "row",
        "filename",
        "file_index",
        "file_row_number",
    }
)
"""Names in a documents file and its view, in lower case: SQL does not tell the case."""
NEWLY_RESERVED = frozenset({LANGUAGE})
"""Names that new runs write themselves, in lower case; older ones may have kept such columns."""
OF_LAYERS = re.compile(r"mean_(\w+_)?\d+")
"""Names of the columns of ``documents`` that stand for a layer."""
BESIDE = "document_"
"""Beginning of the name of a kept column in a view that has a column of that name."""
INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
SURROGATE = re.compile("[\ud800-\udfff]")


class KeptColumn(NamedTuple):
    """One kept column."""

    path: str  # its column of the corpus, which may be a dotted path
    kind: str  # one of ``KINDS``

    @property
    def name(self) -> str:
        """Name in ``documents``: ``_`` stands for the dots, which SQL would take for its own."""
        return self.path.replace(".", "_")


Kept = tuple[KeptColumn, ...]
"""Kept columns, by path."""


# --- names and types


@lru_cache(8)
def parse(spec: str, *, is_new: bool = False) -> Kept:
    """The columns of ``spec``, as in ``lang,meta.year:int64``, by path; none if it is empty.

    ``is_new``: no stored run has the ``spec``, so its names may not be among ``NEWLY_RESERVED``.
    Raises ``ConfigError`` for a name or type that a kept column cannot have.
    """
    reserved = RESERVED | NEWLY_RESERVED if is_new else RESERVED
    columns = sorted(_column(entry, reserved) for entry in spec.split(",")) if spec else []
    names = [column.name.lower() for column in columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"keep_columns has {twice[0]!r} twice (SQL does not tell the case of a name, and a "
            "dot becomes _); name it once"
        )
    if len(columns) > MOST_COLUMNS:
        raise ConfigError(
            f"keep_columns names {len(columns)} columns; expected at most {MOST_COLUMNS}"
        )
    return tuple(columns)


def canonical(columns: Iterable[KeptColumn]) -> str:
    """The shortest ``spec`` of ``columns``: the same for any order and spelling of it."""
    return ",".join(
        path if kind == "string" else f"{path}:{kind}" for path, kind in sorted(columns)
    )


def _column(entry: str, reserved: Collection[str]) -> KeptColumn:
    """The column of one ``entry`` of a spec, whose name is not among ``reserved``."""
    path, _, kind = (part.strip() for part in entry.partition(":"))
    column = KeptColumn(path, kind or "string")
    if not PATH.fullmatch(path):
        raise ConfigError(
            f"keep_columns has {path[:80]!r}; expected names of letters, digits, _ and - (at most "
            "63), with dots before nested ones and commas between, as in lang,meta.year:int64: "
            "rename the column in the corpus"
        )
    lower = column.name.lower()
    if lower in reserved or OF_LAYERS.fullmatch(lower) or lower.startswith(BESIDE):
        raise ConfigError(
            f"keep_columns has {path!r}, which is the name of a column that afn-ray writes itself; "
            f"rename the column in the corpus, as to my_{column.name}"
        )
    if column.kind not in KINDS:
        raise ConfigError(
            f"keep_columns has type {kind[:80]!r} for {path!r}; expected one of {', '.join(KINDS)}"
        )
    return column


def beside(name: str, others: Iterable[str]) -> str:
    """Name of the kept column ``name`` in a view that has the columns ``others``."""
    taken = {other.strip('"').lower() for other in others}
    return f"{BESIDE}{name}" if name.lower() in taken else name


def fields_of(spec: str) -> list[pa.Field]:
    """The fields of the columns of ``spec`` in a table of documents; all may be null."""
    return [pa.field(column.name, KINDS[column.kind]) for column in parse(spec)]


# --- values


def values_of(
    row: Mapping[str, object], columns: Kept
) -> tuple[tuple[object, ...], tuple[tuple[str, str], ...]]:
    """The values of ``columns`` in ``row``, by path, and name and reason of those that are left
    out.

    A value is None where the row lacks the column, has null in it, or the value is left out.
    """
    values: list[Any] = []
    refused: list[tuple[str, str]] = []
    for column in columns:
        found = row.get(column.path)
        value = None
        if found is not None:
            try:
                value = convert(found, column.kind)
            except ValueError as error:
                refused.append((column.name, str(error)))
        values.append(value)
    return tuple(values), tuple(refused)


def _not(found: object, kind: str) -> ValueError:
    """Error of a value that is not of ``kind``."""
    if isinstance(found, list | tuple | dict):
        return ValueError(f"{type(found).__name__}, expected {kind}; nested values are not kept")
    if isinstance(found, Exception):
        return ValueError(f"unreadable, expected {kind}: {printable(str(found))[:200]}")
    return ValueError(f"{_shown(found)}, expected {kind}")


def _shown(found: object) -> str:
    text = printable(str(found))
    cut = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
    return f'{type(found).__name__} "{cut}"'


def _string(found: object) -> str:
    """``found`` as text: a string as it is, a number, date or boolean as it is written."""
    match found:
        case str():
            text = found
        case bool():
            text = str(found).lower()
        case int() | float():
            text = repr(found)
        case Decimal():
            text = f"{found:f}"
        case datetime() | date() | time():
            text = found.isoformat()
        case _:
            raise _not(found, "string")
    if SURROGATE.search(text):
        raise ValueError("not valid UTF-8; convert the file to UTF-8")
    # No character has fewer bytes than one.
    if len(text) > MOST_BYTES or len(text.encode()) > MOST_BYTES:
        raise ValueError(f"{count(len(text), 'character')}, expected at most {MOST_BYTES} bytes")
    return text


def _int64(found: object) -> int:
    """A whole number; also one that is written as a float, as pandas does beside gaps."""
    value: int | None = None
    match found:
        case bool():
            pass
        case int():
            value = found
        case float() | Decimal() if math.isfinite(found) and found == int(found):
            value = int(found)
        case str() if INTEGER.fullmatch(found.strip()):
            value = int(found)
    if value is None or not -(2**63) <= value < 2**63:
        raise _not(found, "int64")
    return value


def _double(found: object) -> float:
    """A finite number."""
    value = math.nan
    match found:
        case bool():
            pass
        case int() if abs(found) >= 2**1023:  # Python's integers may exceed a float
            pass
        case int() | float() | Decimal():
            value = float(found)
        case str() if NUMBER.fullmatch(found.strip()):
            value = float(found)
    if not math.isfinite(value):
        raise _not(found, "double")
    return value


def _bool(found: object) -> bool:
    """A boolean, or the word true or false."""
    if isinstance(found, bool):
        return found
    word = found.strip().lower() if isinstance(found, str) else ""
    if word not in ("true", "false"):
        raise _not(found, "bool")
    return word == "true"


def _parsed(found: object, kind: str) -> object:
    """The moment that a string names in ISO 8601; any other value as it is."""
    if not isinstance(found, str):
        return found
    try:
        return datetime.fromisoformat(found.strip())
    except ValueError:
        raise _not(found, kind) from None


def _date(found: object) -> date:
    """A day: YYYY-MM-DD, or a midnight."""
    found = _parsed(found, "date")
    if isinstance(found, datetime):
        if found.time() != time():
            raise _not(found, "date")
        return found.date()
    if not isinstance(found, date):
        raise _not(found, "date")
    return found


def _timestamp(found: object) -> datetime:
    """A moment in UTC, in microseconds; one without an offset is taken as UTC."""
    found = _parsed(found, "timestamp")
    if isinstance(found, date) and not isinstance(found, datetime):
        found = datetime.combine(found, time())
    if not isinstance(found, datetime):
        raise _not(found, "timestamp")
    if found.tzinfo is None:
        return found
    try:
        return found.astimezone(UTC).replace(tzinfo=None)
    except OverflowError:
        raise _not(found, "timestamp") from None


_CONVERT: dict[str, Callable[[object], Any]] = {
    "string": _string,
    "int64": _int64,
    "double": _double,
    "bool": _bool,
    "date": _date,
    "timestamp": _timestamp,
}
"""Conversion of a value to each of ``KINDS``; raises ``ValueError`` with the reason."""


def convert(found: object, kind: str) -> Any:
    """``found`` as a value of ``kind``. Raises ``ValueError`` with the reason if it is none."""
    return _CONVERT[kind](found)


def columns_of(documents: Sequence[Document], names: Sequence[str]) -> dict[str, list[Any]]:
    """Kept columns ``names`` and ``NOT_KEPT`` of a table of ``documents``;
    nothing without names.
    """
    if not names:
        return {}
    found: dict[str, list[Any]] = {name: [] for name in names}
    none = (None,) * len(names)
    for document in documents:
        for name, value in zip(names, document.kept or none, strict=True):
            found[name].append(value)
    found[NOT_KEPT] = []
    for document in documents:
        refused = [{"name": name, "reason": reason} for name, reason in document.refused]
        found[NOT_KEPT].append(refused or None)
    return found
