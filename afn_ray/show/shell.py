"""Output of query results, and the interactive SQL prompt."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.lexers import PygmentsLexer
from pygments.lexers.sql import SqlLexer  # type: ignore[import-untyped]
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from afn_ray.errors import QueryError
from afn_ray.query.database import Result, Run
from afn_ray.query.views import MACROS, VIEWS
from afn_ray.store import parquet
from afn_ray.text import printable

FORMATS = ("table", "csv", "json", "parquet")
MAX_ROWS = 100
"""Largest number of rows of a table in the prompt."""
MAX_CELL = 300
"""Largest length of a table cell, in characters; the number left out is shown."""
TEXT_WIDTH = 24
"""Least width of text columns, in characters, before columns are left out of a table."""
BATCH_ROWS = 1 << 14


# --- printing


def print_result(
    result: Result, format: str = "table", out: IO[bytes] | None = None, max_rows: int | None = None
) -> int:
    """Print ``result`` to ``out`` (None: standard output) and return its number of rows.

    ``format`` is table, csv, json (an array of objects) or parquet. A table fits the terminal,
    shows at most ``max_rows`` rows (None: all) and says what it leaves out; its number of rows is
    that of rows shown. The other formats are complete and are written while they are computed.

    In CSV, null is an empty field and empty text is ``""``. In JSON, null, NaN and infinities are
    null. In both, bytes are hex and dates ISO 8601.

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


def say_why_empty(run: Run, query: str, num_rows: int) -> None:
    """Print on standard error why a query may have no rows."""
    for note in run.why_empty(query) if num_rows == 0 else ():
        print(f"note: {printable(note)}", file=sys.stderr)


class _Terminal(io.RawIOBase):
    """Binary stream to a terminal; writes control characters as escapes."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out, self._decoder = out, codecs.getincrementaldecoder("utf-8")("replace")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._out.write(printable(self._decoder.decode(bytes(data)), keep="\n\t").encode())
        return len(data)


def _write_csv(reader: pa.RecordBatchReader, out: IO[bytes]) -> None:
    schema = pa.schema(
        [pa.field(f.name, f.type if _is_flat(f.type) else pa.string()) for f in reader.schema]
    )
    with pa.csv.CSVWriter(out, schema) as writer:
        for batch in reader:
            columns = [
                column
                if _is_flat(column.type)
                else pa.array(map(_as_text, _values(column)), pa.string())
                for column in batch.columns
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


def _write_json(reader: pa.RecordBatchReader, out: IO[bytes]) -> None:
    names = _unique(reader.schema.names)
    before = "["
    for batch in reader:
        for row in zip(*map(_values, batch.columns), strict=True):
            text = json.dumps(
                dict(zip(names, row, strict=True)), ensure_ascii=False, allow_nan=False
            )
            out.write(f"{before}\n{text}".encode())
            before = ","
    out.write(b"[]\n" if before == "[" else b"\n]\n")


def _write_parquet(reader: pa.RecordBatchReader, out: IO[bytes]) -> None:
    schema = pa.schema(
        [f.with_name(n) for f, n in zip(reader.schema, _unique(reader.schema.names), strict=True)]
    )
    with parquet.writer(out, schema) as writer:
        for batch in reader:
            writer.write_batch(batch.rename_columns(schema.names))


def _is_flat(kind: pa.DataType) -> bool:
    """Whether Arrow's own CSV form of the type is used."""
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    )


def _unique(names: Iterable[str]) -> list[str]:
    """``names``, repeated ones numbered _1, _2, ...: JSON and Parquet need distinct names."""
    taken: list[str] = []
    for name in names:
        free = (
            n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if n not in taken
        )
        taken.append(next(free))
    return taken


def _values(column: pa.Array) -> list[Any]:
    """The column's values as JSON values.

    A FLOAT becomes the shortest number that reads back as the same FLOAT.
    """
    if pa.types.is_float32(column.type):
        return [
            None if text is None else _plain(float(text))
            for text in column.cast(pa.string()).to_pylist()
        ]
    values = _listed(column)
    return (
        values
        if _is_flat(column.type) and not pa.types.is_floating(column.type)
        else [_plain(v) for v in values]
    )


def _listed(column: pa.Array) -> list[Any]:
    """The column's values; dates outside Python's range, such as the year 20000, become text."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ArithmeticError, ValueError):
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ArithmeticError, ValueError):
        pass
    kind = scalar.type
    if pa.types.is_struct(kind):
        return {name: _value(part) for name, part in scalar.items()}
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_value(part) for part in scalar.values]
    most = 2**31 - 1 if pa.types.is_date32(kind) else 2**63 - 1
    if getattr(scalar, "value", None) in (most, -most):
        return "infinity" if scalar.value > 0 else "-infinity"
    try:
        return scalar.cast(pa.string()).as_py()
    except (pa.ArrowException, ArithmeticError, ValueError):
        return str(scalar.value) if hasattr(scalar, "value") else repr(scalar)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, date | time_of_day):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _as_text(value: Any) -> str | None:
    return (
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


# --- tables


def _print_table(result: Result, out: IO[bytes] | None, max_rows: int | None) -> int:
    target = sys.stdout if out is None else io.StringIO()
    console = Console(file=target, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(
            file=target, highlight=False, markup=False, emoji=False, width=1 << 20
        )  # no terminal to fit
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
        rows += zip(*map(_listed, batch.columns), strict=True)
        if max_rows is not None and len(rows) > max_rows:
            return rows[:max_rows], True
    return rows, False


def _draw(console: Console, schema: pa.Schema, rows: list[tuple[Any, ...]], more: bool) -> None:
    names = [printable(name) for name in schema.names]
    is_number = [_is_number(kind) for kind in schema.types]
    columns = [[_cell(row[i]) for row in rows] for i in range(len(names))]
    widths = [
        max([len(name), *(cell.cell_len for cell in cells)])
        for name, cells in zip(names, columns, strict=True)
    ]
    least = [
        w if number else min(w, TEXT_WIDTH) for w, number in zip(widths, is_number, strict=True)
    ]
    shown = _fitting(least, console.width)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    cut = len(shown) < len(names)
    for at in shown:
        if cut and at == shown[(len(shown) + 1) // 2]:
            table.add_column("…")
        table.add_column(
            Text(names[at]),
            justify="right" if is_number[at] else "left",
            no_wrap=is_number[at],
            overflow="fold",
        )
    for r in range(len(rows)):
        line = [columns[at][r] for at in shown]
        if cut:
            line.insert((len(shown) + 1) // 2, Text("…"))
        table.add_row(*line)
    console.print(table)
    notes = [
        f"first {len(rows):,} rows shown, there are more" if more else _count(len(rows), "row")
    ]
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
    while (
        len(shown) > 2
        and sum(widths[at] + gap for at in shown) + (1 + gap) * (len(shown) < len(widths)) > room
    ):
        del shown[len(shown) // 2]
    return shown


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def _cell(value: Any) -> Text:
    if value is None:
        return Text("NULL", style="dim italic")
    if isinstance(value, float):
        return Text(f"{value:.6g}")
    if isinstance(value, bool):
        return Text("true" if value else "false")
    text = printable(_as_text(_plain(value)) or "")
    return Text(
        text
        if len(text) <= MAX_CELL
        else f"{text[:MAX_CELL]}… (+{len(text) - MAX_CELL:,} characters)"
    )


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


# --- the prompt

KEYWORDS = re.findall(
    r"\w+",
    "ALL AND ANY AS ASC BETWEEN BY CASE CAST COUNT CROSS DESC DESCRIBE DISTINCT ELSE END EXCEPT "
    "EXCLUDE EXISTS EXPLAIN "
    "FALSE FILTER FROM FULL GROUP HAVING ILIKE IN INNER INTERSECT IS JOIN LEFT LIKE LIMIT NOT NULL "
    "OFFSET ON OR ORDER "
    "OVER PARTITION PIVOT QUALIFY RIGHT SELECT SHOW SUMMARIZE THEN TRUE UNION USING VALUES WHEN "
    "WHERE WINDOW WITH",
)

COMMANDS = {
    ".help": "this list",
    ".tables": "the views and what they hold",
    ".schema": "[VIEW]: columns and types of a view, or of all",
    ".format": "table | csv | json: how results are printed",
    ".timer": "on | off: print how long a query took",
    ".examples": "queries to start from",
    ".quit": "leave (also Ctrl-D)",
}

SQL_PARTS = re.compile(
    r"""[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z) | '[^']*(?:'|\Z) | "[^"]*(?:"|\Z)
    | --[^\n]*(?:\n|\Z) | /\*.*?(?:\*/|\Z) | \$(\w*)\$.*?(?:\$\1\$|\Z) | ;""",
    re.VERBOSE | re.DOTALL,
)
"""Parts in which a semicolon does not end a statement, and the semicolon that does."""


def split_statements(text: str) -> tuple[list[str], str]:
    """The statements of ``text`` that end with a semicolon, without it, and the rest."""
    statements, start = [], 0
    for part in SQL_PARTS.finditer(text):
        if part[0] == ";":
            statements.append(text[start : part.start()].strip())
            start = part.end()
    return [s for s in statements if s], text[start:]


def complete(text: str, tables: Mapping[str, list[str]]) -> list[str]:
    """Completions of the word at the end of ``text``: commands, views, columns, keywords.

    After FROM and JOIN only views. Columns are those of the view before a dot, otherwise of the
    views that ``text`` names, otherwise of all.
    """
    if text.startswith("."):
        command, _, word = text.partition(" ")
        if " " not in text:
            return [c for c in COMMANDS if c.startswith(command)]
        choices = {
            ".schema": list(tables),
            ".format": ["table", "csv", "json"],
            ".timer": ["on", "off"],
        }
        return [c for c in choices.get(command, []) if c.startswith(word)]
    match = re.search(r"(?:(\w+)\.)?(\w*)$", text)
    assert match is not None
    view, word = match.groups()
    if view in tables:
        names = [_quoted(c) for c in tables[view]]
    elif re.search(r"(?i)\b(from|join)\s+\w*$", text):
        names = list(tables)
    elif not word:
        return []
    else:
        views = [name for name in tables if re.search(rf"\b{name}\b", text)] or list(tables)
        names = [
            *tables,
            *dict.fromkeys(_quoted(c) for name in views for c in tables[name]),
            *KEYWORDS,
        ]
    return [c for c in names if c.lower().lstrip('"').startswith(word.lower())]


def _quoted(name: str) -> str:
    return f'"{name}"' if name.upper() in KEYWORDS else name


class _Completer(Completer):
    def __init__(self, tables: Mapping[str, list[str]]) -> None:
        self._tables = tables

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        text = document.text_before_cursor
        word = re.search(r"[\w.]*$" if text.startswith(".") and " " not in text else r"\w*$", text)
        assert word is not None
        for choice in complete(text, self._tables):
            yield Completion(choice, start_position=-len(word[0]))


class Shell:
    """State of one prompt or script: runs SQL statements and commands that begin with a dot."""

    def __init__(self, run: Run, tables: Mapping[str, pa.Table] | None = None) -> None:
        """``tables`` are the user's own, by name."""
        self.tables = dict(tables or {})
        self.run, self.format, self.timer, self.done = run, "table", False, False
        self._console = Console(highlight=False, markup=False, soft_wrap=True)

    def execute(self, text: str) -> None:
        """Run the command or the statements in ``text``. Raises ``QueryError``."""
        if text.lstrip().startswith("."):
            self._command(*text.split())
            return
        statements, rest = split_statements(text)
        for statement in [*statements, rest.strip()]:
            if SQL_PARTS.sub(lambda m: "" if m[0][:2] in ("--", "/*") else m[0], statement).strip():
                began = time.monotonic()
                num_rows = print_result(
                    self.run.sql(statement, **self.tables), self.format, max_rows=MAX_ROWS
                )
                say_why_empty(self.run, statement, num_rows)
                if self.timer:
                    self._say(f"{time.monotonic() - began:.3f} s")

    def _command(self, name: str, *arguments: str) -> None:
        argument = arguments[0] if arguments else ""
        if name == ".help":
            self._say("SQL ends with a semicolon; commands stand on a line of their own:")
            self._say("\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items()))
        elif name == ".tables":
            self._say("\n".join(f"  {name:12}{text}" for name, text in VIEWS.items()))
            self._say("\n".join(f"  {name}\n              {text}" for name, text in MACROS.items()))
        elif name == ".schema" and (not argument or argument in VIEWS):
            for view in [argument] if argument else VIEWS:
                self._say(f"{view}: {VIEWS[view]}")
                result = self.run.sql(f"FROM {view}")
                self._say(
                    "\n".join(
                        f"  {c:24}{t}" for c, t in zip(result.columns, result.types, strict=True)
                    )
                )
        elif name == ".format" and argument in ("table", "csv", "json"):
            self.format = argument
        elif name == ".timer" and argument in ("on", "off"):
            self.timer = argument == "on"
        elif name == ".examples":
            self._say("\n\n".join(examples(self.run.info["layers"][-1])))
        elif name in (".quit", ".exit"):
            self.done = True
        elif name in COMMANDS:
            raise QueryError(f"{name} {argument}: expected {name} {COMMANDS[name]}")
        else:
            raise QueryError(f"no command {name}; .help lists them")

    def _say(self, text: str) -> None:
        self._console.print(printable(text, keep="\n"))


def examples(layer: int) -> list[str]:
    """Example queries at ``layer``."""
    return [
        f"-- types that are HIGH most often, with 95 % intervals\n"
        f"SELECT text, class, n, share_high, share_high_low, share_high_high FROM vocabulary\n"
        f"WHERE layer = {layer} AND n >= 100 ORDER BY share_high DESC LIMIT 20;",
        f"-- classes of types: how often HIGH\n"
        f"SELECT class, sum(n) AS n, sum(n_high) / sum(n) AS share_high FROM vocabulary\n"
        f"WHERE layer = {layer} GROUP BY class ORDER BY share_high DESC;",
        f"-- one document, word by word\n"
        f"SELECT word, text, max_strength_{layer}, high_{layer} FROM words WHERE doc = 0 ORDER BY "
        "word;",
        f"-- documents with the strongest tokens\n"
        f"SELECT doc_id, source, n_tokens, mean_strength_{layer} FROM documents\n"
        f"ORDER BY mean_strength_{layer} DESC NULLS LAST LIMIT 10;",
        f"-- attention sinks\n"
        f"SELECT position, token, count(*) AS n, median(strength_{layer}) FROM tokens\n"
        f"WHERE sink_{layer} GROUP BY ALL ORDER BY n DESC LIMIT 10;",
        "-- the thresholds, with and without sinks\nFROM thresholds;",
    ]


def interactive(run: Run, tables: Mapping[str, pa.Table] | None = None) -> None:
    """Run a prompt over ``run`` until Ctrl-D or ``.quit``.

    Without a terminal, run the statements on standard input. The prompt prints an error and reads
    the next line; on standard input the error is raised at once (``QueryError``).
    """
    shell = Shell(run, tables)
    if not sys.stdin.isatty():
        _script(shell, sys.stdin)
        return
    session: PromptSession[str] = PromptSession(
        f"{printable(run.id)}> ",
        multiline=True,
        key_bindings=_keys(),
        completer=_Completer(run.tables()),
        history=_history(),
        lexer=PygmentsLexer(SqlLexer),
        complete_while_typing=False,
        prompt_continuation="  ",
    )
    shell._say(
        f"Run {run.uri}. SQL ends with a semicolon; .help for commands, .examples for queries."
    )
    while not shell.done:
        try:
            shell.execute(session.prompt())
        except QueryError as error:
            print(printable(str(error), keep="\n"), file=sys.stderr)
        except KeyboardInterrupt:
            continue  # drops the line, or stops the query
        except EOFError:
            return


def _script(shell: Shell, lines: Iterable[str]) -> None:
    pending = ""
    for line in lines:
        pending += line
        if pending.lstrip().startswith(".") or (
            ";" in line and not split_statements(pending)[1].strip()
        ):
            shell.execute(pending)
            pending = ""
        if shell.done:
            return
    shell.execute(pending)


def _keys() -> KeyBindings:
    """Key bindings: Enter runs complete input, otherwise it starts a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None
        elif buffer.text.lstrip().startswith(".") or not split_statements(buffer.text)[1].strip():
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    return keys


def _history() -> History:
    """Queries of earlier sessions in a private file in the user's state folder.

    In memory where that file cannot be written.
    """
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "afn-ray"
    path = folder / "history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
