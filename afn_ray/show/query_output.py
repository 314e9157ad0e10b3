"""Print the result of a query as a table, CSV, JSON or Parquet."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from afn_ray.cells import as_text, cell_text, is_number, listed, plain
from afn_ray.errors import QueryError
from afn_ray.query.database import Run
from afn_ray.query.result import Result
from afn_ray.store import parquet
from afn_ray.text import count, printable

FORMATS = ("table", "csv", "json", "parquet")
TEXT_WIDTHS = (24, 16, 10)
"""Least widths of text columns to try, in characters, until no column is left out of a table.

Where even the last leaves one out, the first is taken.
"""
BATCH_ROWS = 1 << 14


def print_result(
    result: Result, format: str = "table", out: IO[bytes] | None = None, max_rows: int | None = None
) -> int:
    """Print ``result`` to ``out`` (None: standard output) and return its number of rows.

    ``format`` is table, csv, json (an array of objects) or parquet. A table fits the terminal,
    shows at most ``max_rows`` rows (None: all) and says what it leaves out; its number of rows is
    that of rows shown. The other formats are complete and are written while they are computed.

    In CSV, null is an empty field and empty text is ``""``. In JSON, null, NaN and infinities are
    null. In both, bytes are hex, dates ISO 8601, and a DECIMAL that has more digits than a float is
    text.

    Raises ``QueryError`` for a query over its limits, and for Parquet on a terminal.
    """
    if format == "table":
        return _print_table(result, out, max_rows)
    if format not in FORMATS:
        raise QueryError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    sys.stdout.flush()
    sink = sys.stdout.buffer if out is None else out
    if format == "parquet" and sink.isatty():
        raise QueryError(
            "Parquet is binary, and this is a terminal; name a file (--out) or pipe it into a "
            "program"
        )
    batches = result.to_arrow_reader(BATCH_ROWS)
    num_rows = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal num_rows
        for batch in batches:
            num_rows += batch.num_rows
            yield batch

    reader = pa.RecordBatchReader.from_batches(batches.schema, counted())
    write = {"csv": _write_csv, "json": _write_json, "parquet": _write_parquet}[format]
    target: Any = _Terminal(sink) if sink.isatty() else sink
    write(reader, target)
    sink.flush()
    return num_rows


def say_notes(run: Run, query: str, num_rows: int) -> None:
    """Print on standard error why a query may have no rows, or rows of some tokens alone."""
    notes = run.why_empty(query) if num_rows == 0 else []
    for note in [*run.why_some(query), *notes]:
        print(f"note: {printable(note)}", file=sys.stderr)


class _Terminal(io.RawIOBase):
    """Binary stream to a terminal; writes control characters as escapes."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        text = self._decoder.decode(bytes(data))
        self._out.write(printable(text, keep="\n\t").encode())
        return len(data)


def _write_csv(reader: pa.RecordBatchReader, out: IO[bytes]) -> None:
    with csv_rows(reader.schema, out) as write:
        for batch in reader:
            write(batch)


@contextlib.contextmanager
def csv_rows(schema: pa.Schema, out: IO[bytes]) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """A function that writes batches of ``schema`` to ``out`` as CSV, after the columns' names."""
    fields = []
    for field in schema:
        kind = field.type if _is_flat(field.type) else pa.string()
        fields.append(pa.field(field.name, kind))
    text_schema = pa.schema(fields)
    with pa.csv.CSVWriter(out, text_schema) as writer:

        def write(batch: pa.RecordBatch) -> None:
            columns = []
            for column in batch.columns:
                if not _is_flat(column.type):
                    texts = map(as_text, _values(column))
                    column = pa.array(texts, pa.string())
                columns.append(column)
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=text_schema))

        yield write


def _write_json(reader: pa.RecordBatchReader, out: IO[bytes]) -> None:
    names = unique_names(reader.schema.names)
    before = "["
    for batch in reader:
        for row in zip(*map(_values, batch.columns), strict=True):
            values = dict(zip(names, row, strict=True))
            text = json.dumps(values, ensure_ascii=False, allow_nan=False)
            out.write(f"{before}\n{text}".encode())
            before = ","
    out.write(b"[]\n" if before == "[" else b"\n]\n")


def _write_parquet(reader: pa.RecordBatchReader, out: IO[bytes]) -> None:
    names = unique_names(reader.schema.names)
    fields = [field.with_name(name) for field, name in zip(reader.schema, names, strict=True)]
    schema = pa.schema(fields)
    with parquet.writer(out, schema) as writer:
        for batch in reader:
            writer.write_batch(batch.rename_columns(names))


def _is_flat(kind: pa.DataType) -> bool:
    """True if Arrow's own CSV form of the type is used."""
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    )


def unique_names(names: Iterable[str]) -> list[str]:
    """``names``, repeated ones numbered _1, _2, ...: JSON and Parquet need distinct names."""
    taken: list[str] = []
    for name in names:
        free, number = name, 0
        while free in taken:
            number += 1
            free = f"{name}_{number}"
        taken.append(free)
    return taken


def _values(column: pa.Array) -> list[Any]:
    """The column's values as JSON values.

    A FLOAT becomes the shortest number that reads back as the same FLOAT.
    """
    if pa.types.is_float32(column.type):
        texts = column.cast(pa.string()).to_pylist()
        return [None if text is None else plain(float(text)) for text in texts]
    values = listed(column)
    if _is_flat(column.type) and not pa.types.is_floating(column.type):
        return values
    return [plain(value) for value in values]


def _print_table(result: Result, out: IO[bytes] | None, max_rows: int | None) -> int:
    target = sys.stdout if out is None else io.StringIO()
    console = Console(file=target, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:  # there is no width to fit
        console = Console(file=target, highlight=False, markup=False, emoji=False, width=1 << 20)
    reader = result.to_arrow_reader(BATCH_ROWS)
    rows, more = _first_rows(reader, max_rows)
    if reader.schema.names == ["explain_key", "explain_value"]:
        for _, plan in rows:
            console.print(printable(plan, keep="\n"), soft_wrap=True)
    else:
        _draw(console, reader.schema, rows, more)
    if out is not None and isinstance(target, io.StringIO):
        out.write(target.getvalue().encode())
    return len(rows)


def _first_rows(
    reader: pa.RecordBatchReader, max_rows: int | None
) -> tuple[list[tuple[Any, ...]], bool]:
    """The first ``max_rows`` rows, and whether there are more; the rest is not computed."""
    rows: list[tuple[Any, ...]] = []
    for batch in reader:
        rows += zip(*map(listed, batch.columns), strict=True)
        if max_rows is not None and len(rows) > max_rows:
            return rows[:max_rows], True
    return rows, False


def _draw(console: Console, schema: pa.Schema, rows: list[tuple[Any, ...]], more: bool) -> None:
    names = [printable(name) for name in schema.names]
    numeric = [is_number(kind) for kind in schema.types]
    columns = [[_cell(row[i]) for row in rows] for i in range(len(names))]
    widths = []
    for at, name in enumerate(names):
        widths.append(max(len(name), *(cell.cell_len for cell in columns[at]), 0))
    fitting = []
    for text_width in TEXT_WIDTHS:
        least = [w if n else min(w, text_width) for w, n in zip(widths, numeric, strict=True)]
        fitting.append(_fitting(least, console.width))
    shown = next((some for some in fitting if len(some) == len(names)), fitting[0])
    cut = len(shown) < len(names)
    middle = (len(shown) + 1) // 2
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for at in shown:
        if cut and at == shown[middle]:
            table.add_column("…")
        table.add_column(
            Text(names[at]),
            justify="right" if numeric[at] else "left",
            no_wrap=numeric[at],
            overflow="fold",
        )
    for r in range(len(rows)):
        line = [columns[at][r] for at in shown]
        if cut:
            line.insert(middle, Text("…"))
        table.add_row(*line)
    console.print(table)
    notes = [f"first {len(rows):,} rows shown, there are more" if more else count(len(rows), "row")]
    if cut:
        notes.append(
            f"{len(shown)} of {len(names)} columns shown: name those you want, or use format csv"
        )
    console.print(f"({'; '.join(notes)})")


def _fitting(widths: list[int], room: int) -> list[int]:
    """Indices of the columns that fit into ``room`` with three spaces between them.

    Columns in the middle are left out first.
    """
    shown = list(range(len(widths)))
    gap = 3
    mark = 0  # width of the column that stands for those left out
    while len(shown) > 2 and sum(widths[at] + gap for at in shown) + mark > room:
        del shown[len(shown) // 2]
        mark = 1 + gap
    return shown


def _cell(value: Any) -> Text:
    return Text("NULL", style="dim italic") if value is None else Text(cell_text(value))
