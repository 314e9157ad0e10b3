"""Results as people and programs read them, and the prompt with keys pressed by a test."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from afn_ray.errors import ConfigError, QueryError
from afn_ray.query import joined
from afn_ray.query.database import Run, open_run
from afn_ray.show import query_output, shell
from afn_ray.text import UNSAFE
from test_query import ENDLESS, LAYERS, SHARDS, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("store")
    write_run(str(folder), SHARDS, LAYERS)
    with open_run(str(folder), threads=2) as run:
        yield run


def printed(run: Run, sql: str, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    query_output.print_result(run.sql(sql), format, out, **options)
    return out.getvalue()


MIXED = """
    SELECT * FROM (VALUES
        (1, 'a,"b"', 0.1::FLOAT, 'nan'::DOUBLE, true, DATE '2026-01-02', '\\xAB'::BLOB, [1, NULL],
            {'x': 1.5}, 2::HUGEINT),
        (NULL, '', 1e-7::FLOAT, 'inf'::DOUBLE, NULL, NULL, NULL, NULL, NULL, NULL)
    ) t(n, text, f, d, flag, day, bytes, list, struct, huge)
"""


# --- formats
# ---------------------------------------------------------------------------------------------


def test_json_is_an_array_of_objects(run: Run) -> None:
    first, second = json.loads(printed(run, MIXED, "json"), parse_constant=pytest.fail)
    assert first == {
        "n": 1,
        "text": 'a,"b"',
        "f": 0.1,
        "d": None,
        "flag": True,
        "day": "2026-01-02",
        "bytes": "ab",
        "list": [1, None],
        "struct": {"x": 1.5},
        "huge": 2,
    }
    assert second == dict.fromkeys(first) | {"text": "", "f": 1e-7}
    assert json.loads(printed(run, "SELECT 1 WHERE false", "json")) == []
    assert json.loads(printed(run, "SELECT 1 AS a, 2 AS a, 3 AS a_1", "json")) == [
        {"a": 1, "a_1": 2, "a_1_1": 3}
    ]


def test_csv_tells_null_from_empty_text(run: Run) -> None:
    text = printed(run, MIXED, "csv").decode()
    header, *rows = csv.reader(io.StringIO(text))
    assert header == ["n", "text", "f", "d", "flag", "day", "bytes", "list", "struct", "huge"]
    assert rows[0] == [
        "1",
        'a,"b"',
        "0.1",
        "nan",
        "true",
        "2026-01-02",
        "ab",
        "[1, null]",
        '{"x": 1.5}',
        "2",
    ]
    assert text.splitlines()[2] == ',"",1e-7,inf,,,,,,'


@pytest.mark.parametrize("format", ["csv", "json", "parquet"])
def test_other_formats_are_complete_whatever_the_rows_a_table_shows(run: Run, format: str) -> None:
    data = printed(run, "SELECT range AS i, sqrt(range) AS r FROM range(50000)", format, max_rows=3)
    if format == "csv":
        ids = [int(row["i"]) for row in csv.DictReader(io.StringIO(data.decode()))]
    elif format == "json":
        ids = [row["i"] for row in json.loads(data)]
    else:
        ids = pq.read_table(io.BytesIO(data))["i"].to_pylist()
    assert ids == list(range(50000))


def test_parquet_keeps_the_types(run: Run) -> None:
    table = pq.read_table(io.BytesIO(printed(run, "FROM tokens ORDER BY doc, position", "parquet")))
    assert table.equals(run.sql("FROM tokens ORDER BY doc, position").to_arrow_table())


def test_parquet_on_a_terminal_is_refused(run: Run) -> None:
    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with pytest.raises(QueryError, match="binary"):
        query_output.print_result(run.sql("SELECT 1"), "parquet", out)
    assert out.getvalue() == b""
    with pytest.raises(QueryError, match="table, csv, json, parquet"):
        query_output.print_result(run.sql("SELECT 1"), "xml", out)


@pytest.mark.parametrize("format", ["csv", "json", "table"])
def test_a_decimal_has_all_its_digits(run: Run, format: str) -> None:
    long = "12345678901234567890.12345678"
    sql = f"SELECT {long} AS long, {{'x': {long}}} AS nested, 1.50 AS short"
    got = printed(run, sql, format).decode()
    assert got.count(long) == 2 and "1.5" in got and "1.50" not in got


def test_standard_output_is_the_default(
    run: Run, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    for format in query_output.FORMATS:
        query_output.print_result(run.sql("SELECT 7 AS seven"), format)
        got = capfdbinary.readouterr().out
        assert b"seven" in got
        assert not sys.stdout.closed


# --- tables
# ----------------------------------------------------------------------------------------------


def test_a_table_aligns_numbers_and_marks_null(run: Run) -> None:
    sql = (
        "SELECT * FROM (VALUES (1, 'ab', 12.3456789::FLOAT, true), (100, NULL, 1e9, NULL)) t(n, "
        "text, x, flag)"
    )
    lines = [line.rstrip() for line in printed(run, sql, "table").decode().splitlines()]
    assert [line.split() for line in lines if line] == [
        ["n", "text", "x", "flag"],
        [lines[1].strip()],
        ["1", "ab", "12.3457", "true"],
        ["100", "NULL", "1e+09", "NULL"],
        ["(2", "rows)"],
    ]
    assert lines[2].index("1") == lines[3].index("100") + 2


def test_a_table_that_is_cut_says_so(run: Run) -> None:
    text = printed(run, "FROM range(1000)", "table", max_rows=3).decode()
    assert "(first 3 rows shown, there are more)" in text
    assert "2" in text.split()
    assert "3" not in text.replace("first 3 rows", "").split()
    assert "(3 rows)" in printed(run, "FROM range(3)", "table", max_rows=3).decode()
    assert "(0 rows)" in printed(run, "FROM range(0)", "table", max_rows=3).decode()
    assert "(1,000 rows)" in printed(run, "FROM range(1000)", "table").decode()
    assert "(+700 characters)" in printed(run, "SELECT repeat('x', 1000)", "table").decode()


def test_a_table_fits_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    query_output.print_result(run.sql("FROM tokens LIMIT 3"))
    lines = screen.getvalue().splitlines()
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines[:-1]) <= 60
    screen.seek(0)
    screen.truncate()
    four = "SELECT repeat('a', 64) AS one, repeat('b', 64) AS two, repeat('c', 64) AS three, 4 AS n"
    query_output.print_result(run.sql(four))
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert text.split()[:4] == ["one", "two", "three", "n"] and "…" not in text
    assert all(text.count(letter) >= 64 for letter in "abc")
    assert " of 19 columns shown" in " ".join(lines[-2:])
    header = lines[0].split()
    assert {"doc", "position", "…", "high_8", "sink_8"} <= {
        re.sub(r"\x1b\[[0-9;]*m", "", word) for word in header
    }


HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "[red]x[/red] :smile:",
    "a\nb\tc\r",
    "\u202egnp.exe",
    "\x7f\x00",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_the_corpus_cannot_act_on_the_terminal(run: Run, text: str) -> None:
    for sql in ("SELECT $t AS x", "SELECT [$t] AS x", "SELECT {'k': $t} AS x"):
        out = io.BytesIO()
        query_output.print_result(run.sql(sql, {"t": text}), "table", out)
        shown = out.getvalue().decode()
        assert not UNSAFE.search(shown.replace("\n", ""))
        assert "[red]x[/red] :smile:" in shown or "[red]" not in text
        assert "\\" in shown or "[red]" in text
    out = io.BytesIO()
    query_output.print_result(
        run.sql(f"PIVOT (SELECT '{text.replace(chr(0), '')}' AS k) ON k USING count(*)"),
        "table",
        out,
    )
    assert not UNSAFE.search(out.getvalue().decode().replace("\n", ""))


@pytest.mark.parametrize("format", ["csv", "json"])
def test_other_formats_are_escaped_on_a_terminal_and_exact_elsewhere(run: Run, format: str) -> None:
    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

    text, out = "é\x1b[2J\x9b\u202e", Terminal()
    query_output.print_result(run.sql("SELECT $t AS x", {"t": text}), format, out)
    assert (
        not UNSAFE.search(out.getvalue().decode().replace("\n", ""))
        and "é" in out.getvalue().decode()
    )
    exact = io.BytesIO()
    query_output.print_result(run.sql("SELECT $t AS x", {"t": text}), format, exact)
    assert "\u202e" in exact.getvalue().decode()


@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_dates_that_python_does_not_have_are_text(run: Run, format: str) -> None:
    sql = (
        "SELECT DATE '20000-01-02' AS a, 'infinity'::DATE AS b, '-infinity'::TIMESTAMP AS c, DATE "
        "'2026-01-02' AS d"
    )
    text = printed(run, sql, format).decode()
    assert all(word in text for word in ("20000-01-02", "infinity", "-infinity", "2026-01-02"))
    assert printed(run, "SELECT [DATE '20000-01-02'] AS a, DATE '0044-03-15 (BC)' AS b", format)


@pytest.mark.parametrize(
    ("sql", "note"),
    [
        ("FROM movers", "empty without a baseline"),
        ("FROM neurons", "none were recorded"),
        ("FROM vocabulary WHERE layer = 5", "layer 5 was not recorded; the run has 0, 8"),
        ("FROM vocabulary WHERE class = 'noun'", "no type is of class 'noun'; the run has content"),
        ("FROM kwic('river bank')", "takes one word"),
        ("SELECT 1 WHERE false", ""),
        ("FROM vocabulary", ""),
        (f"SELECT 1 WHERE 'layer = {'9' * 5000}' = ''", ""),
        ("FROM kwic('zzzz', 2)", "no word is 'zzzz'"),
    ],
)
def test_an_empty_answer_says_why(
    run: Run, sql: str, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.Shell(run).execute(f"{sql};")
    err = capsys.readouterr().err
    assert note in err and bool(err) == bool(note)


def test_files_of_your_own_are_joined(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    (tmp_path / "a.csv").write_text("doc,day\n0,2026-01-02\n1,2026-01-03\n")
    (tmp_path / "b.jsonl").write_text('{"doc": 1, "who": "x"}\n')
    pq.write_table(pa.table({"doc": [1]}), tmp_path / "c.parquet")
    tables = joined.read_tables(
        [f"{n}={tmp_path}/{n}{e}" for n, e in (("a", ".csv"), ("b", ".jsonl"), ("c", ".parquet"))]
    )
    prompt = shell.Shell(run, tables)
    prompt.execute(".format csv")
    prompt.execute(
        "SELECT day, who FROM documents JOIN a USING (doc) JOIN b USING (doc) JOIN c USING (doc);"
    )
    assert capsys.readouterr().out.split() == ['"day","who"', '"2026-01-03","x"']
    for wrong in ("a", "a.b=x.csv", f"a={tmp_path}/a.txt", f"a={tmp_path}/none.csv", "=x.csv"):
        with pytest.raises(ConfigError):
            joined.read_tables([wrong])
    monkeypatch.setattr(joined, "MAX_ROWS", 1)
    with pytest.raises(ConfigError, match="over 1 rows"):
        joined.read_table(tmp_path / "a.csv")


def test_a_plan_is_printed_as_it_is_drawn(run: Run) -> None:
    text = printed(run, "EXPLAIN SELECT count(*) FROM tokens", "table").decode()
    assert "Read Parquet" in text.replace("_", " ").title()
    assert len(text.splitlines()) > 3
    assert "\\n" not in text


# --- completion and splitting
# ----------------------------------------------------------------------------

TABLES = {"tokens": ["doc", "token", "end"], "vocabulary": ["token", "n_docs"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("SEL", ["SELECT"]),
        ("sel", ["SELECT"]),
        ("FROM vo", ["vocabulary"]),
        ("SELECT tok", ["tokens", "token"]),
        ("SELECT * FROM tokens JOIN tok", ["tokens"]),
        ("from ", ["tokens", "vocabulary"]),
        ("FROM vocabulary SELECT d", ["DESC", "DESCRIBE", "DISTINCT"]),
        ("FROM tokens SELECT d", ["doc", "DESC", "DESCRIBE", "DISTINCT"]),
        ("SELECT tokens.", ["doc", "token", '"end"']),
        ("SELECT tokens.e", ['"end"']),
        ("SELECT nothing ", []),
        (".f", [".format"]),
        (".format ", ["table", "csv", "json"]),
        (".format j", ["json"]),
        (".schema to", ["tokens"]),
        (".timer o", ["on", "off"]),
        (".nothing ", []),
    ],
)
def test_completion_offers_names_that_fit(text: str, expected: list[str]) -> None:
    assert shell.complete(text, TABLES) == expected


@pytest.mark.parametrize(
    ("text", "statements", "rest"),
    [
        ("SELECT 1; SELECT 2;", ["SELECT 1", "SELECT 2"], ""),
        ("SELECT ';' ; x", ["SELECT ';'"], " x"),
        ("SELECT 'it''s;';", ["SELECT 'it''s;'"], ""),
        ('SELECT ";" -- ;\n;', ['SELECT ";" -- ;'], ""),
        (
            "SELECT /* ; */ $$;$$, $a$;$$;$a$, e'\\';' ;",
            ["SELECT /* ; */ $$;$$, $a$;$$;$a$, e'\\';'"],
            "",
        ),
        ("SELECT 'open;", [], "SELECT 'open;"),
        ("SELECT /* open;", [], "SELECT /* open;"),
        (";;", [], ""),
    ],
)
def test_statements_end_at_semicolons_that_are_sql(
    text: str, statements: list[str], rest: str
) -> None:
    assert shell.split_statements(text) == (statements, rest)


# --- commands and the prompt
# -----------------------------------------------------------------------------

Press = Callable[..., None]


@pytest.fixture
def press(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Press]:
    """Runs the prompt on the keys given, as on a terminal; history is in ``tmp_path``."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())

    def press(*keys: str, on: Run = run) -> None:
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text("".join(keys))
            shell.interactive(on)

    yield press


ENTER, CTRL_C, CTRL_D = "\r", "\x03", "\x04"


def test_the_prompt_answers_on_several_lines(
    press: Press, capsys: pytest.CaptureFixture[str]
) -> None:
    press("SELECT 40", ENTER, "+ 2 AS answer;", ENTER, CTRL_D)
    assert "42" in capsys.readouterr().out


def test_an_error_is_printed_and_the_prompt_goes_on(
    press: Press, capsys: pytest.CaptureFixture[str]
) -> None:
    press(
        "SELECT nothing;",
        ENTER,
        ".nothing",
        ENTER,
        "DROP VIEW tokens;",
        ENTER,
        "SELECT 41 + 1;",
        ENTER,
        CTRL_D,
    )
    out, err = capsys.readouterr()
    assert "42" in out
    assert "nothing" in err
    assert ".help lists them" in err
    assert "read-only" in err


def test_ctrl_c_gives_the_line_up(press: Press, capsys: pytest.CaptureFixture[str]) -> None:
    press("SELECT 41", CTRL_C, "SELECT 41 + 1;", ENTER, ".quit", ENTER)
    out = capsys.readouterr().out
    assert "42" in out


def test_ctrl_c_stops_a_query_and_not_the_prompt(
    press: Press, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    sql = run.sql

    def interrupted(text: str, parameters: Any = None) -> Any:
        asked.append(text)
        if text == ENDLESS:
            raise KeyboardInterrupt
        return sql(text, parameters)

    monkeypatch.setattr(run, "sql", interrupted)
    press(f"{ENDLESS};", ENTER, "SELECT 41 + 1;", ENTER, CTRL_D)
    assert asked[-2:] == [ENDLESS, "SELECT 41 + 1"]
    assert "42" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FROM thres", "FROM thresholds"),
        ("SELECT tokens.e", 'SELECT tokens."end"'),
        (".sch", ".schema"),
        (".schema vocab", ".schema vocabulary"),
    ],
)
def test_a_completion_replaces_the_word_and_no_more(run: Run, text: str, expected: str) -> None:
    [completion] = shell._Completer(run.tables()).get_completions(Document(text), CompleteEvent())
    assert text[: len(text) + completion.start_position] + completion.text == expected


def test_history_is_kept_for_the_user_alone(press: Press, tmp_path: Path) -> None:
    history = tmp_path / "afn-ray/history"
    history.parent.mkdir()
    history.write_text("")
    history.chmod(0o644)
    press("SELECT 1;", ENTER, CTRL_D)
    assert "SELECT 1;" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    history.unlink()
    umask = os.umask(0)
    try:
        press("SELECT 2;", ENTER, CTRL_D)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_without_a_state_folder_there_is_no_history(
    press: Press, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    press(".quit", ENTER)


def test_commands_print_what_they_name(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = shell.Shell(run)
    expected = {
        ".help": [*shell.COMMANDS, "semicolon"],
        ".tables": list(run.tables()),
        ".schema": ["strength_8", "share_high_low", "max_strength_8"],
        ".schema documents": ["n_windows", "BIGINT"],
        ".examples": ["FROM thresholds;", "max_strength_8"],
    }
    for command, words in expected.items():
        prompt.execute(command)
        out = capsys.readouterr().out
        assert [w for w in words if w not in out] == [], command
    prompt.execute(".format csv")
    prompt.execute(".timer on")
    prompt.execute("SELECT 42 AS answer;")
    assert capsys.readouterr().out.startswith('"answer"\n42\n0.')
    prompt.execute(".timer off")
    for command in (".format parquet", ".timer", ".schema nothing", "."):
        with pytest.raises(QueryError):
            prompt.execute(command)
    assert not prompt.done
    prompt.execute(".quit")
    assert prompt.done


def test_the_examples_are_queries_that_work(run: Run) -> None:
    for example in shell.examples(8):
        found = run.sql(example)
        if "share_high" in found.columns and "class" in found.columns:
            assert "special" not in found.to_arrow_table()["class"].to_pylist()
        assert found.columns


# --- standard input
# --------------------------------------------------------------------------------------


def test_standard_input_is_a_script(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "-- two\n.format csv\nSELECT 1 AS a; SELECT\n 2 AS b;\n\nSELECT ';' AS c -- ; the last "
        "needs no end"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(text.removeprefix("-- two\n")))
    shell.interactive(run)
    assert capsys.readouterr().out == '"a"\n1\n"b"\n2\n"c"\n";"\n'


def test_a_script_ends_at_its_first_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 11;\nSELECT nothing;\nSELECT 22;\n"))
    with pytest.raises(QueryError, match="nothing"):
        shell.interactive(run)
    out = capsys.readouterr().out
    assert "11" in out
    assert "22" not in out


@pytest.mark.parametrize("text", ["", "\n \n", "-- only a comment\n", ".quit\nSELECT nothing;\n"])
def test_a_script_may_do_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    shell.interactive(run)
