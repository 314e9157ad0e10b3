"""The interactive SQL prompt, and scripts on standard input."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.lexers import PygmentsLexer
from pygments.lexers.sql import SqlLexer  # type: ignore[import-untyped]
from rich.console import Console

from afn_ray import token_rows
from afn_ray.errors import QueryError
from afn_ray.query.database import Run
from afn_ray.query.views import MACROS, VIEWS, described
from afn_ray.show.query_output import print_result, say_notes
from afn_ray.text import printable

MAX_ROWS = 100
"""Largest number of rows of a table in the prompt."""


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


def _without_comments(statement: str) -> str:
    def kept(part: re.Match[str]) -> str:
        is_comment = part[0].startswith(("--", "/*"))
        return "" if is_comment else part[0]

    return SQL_PARTS.sub(kept, statement)


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
        columns: dict[str, None] = {}
        for name in views:
            columns |= dict.fromkeys(map(_quoted, tables[name]))
        names = [*tables, *columns, *KEYWORDS]
    begin = word.lower()
    return [c for c in names if c.lower().lstrip('"').startswith(begin)]


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
        self.run = run
        self.format = "table"
        self.timer = False
        self.done = False
        self._console = Console(highlight=False, markup=False, soft_wrap=True)

    def execute(self, text: str) -> None:
        """Run the command or the statements in ``text``. Raises ``QueryError``."""
        if text.lstrip().startswith("."):
            self._command(*text.split())
            return
        statements, rest = split_statements(text)
        for statement in [*statements, rest.strip()]:
            if _without_comments(statement).strip():
                began = time.monotonic()
                num_rows = print_result(
                    self.run.sql(statement, **self.tables), self.format, max_rows=MAX_ROWS
                )
                say_notes(self.run, statement, num_rows)
                if self.timer:
                    self._say(f"{time.monotonic() - began:.3f} s")

    def _described(self, view: str) -> str:
        return described(view, token_rows.record_of(self.run.info["config"]))

    def _command(self, name: str, *arguments: str) -> None:
        argument = arguments[0] if arguments else ""
        if name == ".help":
            self._say("SQL ends with a semicolon; commands stand on a line of their own:")
            self._say("\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items()))
        elif name == ".tables":
            self._say("\n".join(f"  {name:12}{self._described(name)}" for name in VIEWS))
            self._say("\n".join(f"  {name}\n              {text}" for name, text in MACROS.items()))
        elif name == ".schema" and (not argument or argument in VIEWS):
            for view in [argument] if argument else VIEWS:
                self._say(f"{view}: {self._described(view)}")
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
        f"WHERE layer = {layer} AND class <> 'special' AND n >= 100\n"
        f"ORDER BY share_high DESC LIMIT 20;",
        f"-- classes of types: how often HIGH\n"
        f"SELECT class, sum(n) AS n, sum(n_high) / sum(n) AS share_high FROM vocabulary\n"
        f"WHERE layer = {layer} AND class <> 'special' GROUP BY class ORDER BY share_high DESC;",
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
        is_command = buffer.text.lstrip().startswith(".")
        _, rest = split_statements(buffer.text)
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None
        elif is_command or not rest.strip():
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
