"""Statements that ask for more than there is: each ends within its limits, and the next one is
answered.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from afn_ray.errors import QueryError
from afn_ray.query import sandbox
from afn_ray.query.database import Run, open_run
from test_query import LAYERS, SHARDS, write_run

TIMEOUT_S, MEMORY = 1.0, "300MB"
SLACK_S = 2.0
"""Longest that a statement may go on past its limit, in seconds: the grace and the end of its
process are in it.
"""
TRIES = 3
"""Tries at a statement that was late: a machine that others use too may be late once, and not each
time.
"""


def nested(before: str, inner: str, after: str, depth: int) -> str:
    return before * depth + inner + after * depth


SHORT = {
    "crash in a function": "SELECT json_transform('1', repeat('[', 50000) || '\"INT\"' || "
    "repeat(']', 50000))",
    "function that is not interrupted": "SELECT levenshtein(repeat('a', 400000), repeat('b', "
    "400000))",
    "loop without end": "WITH RECURSIVE r AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM r) SELECT "
    "max(i) FROM r",
    "one large value": "SELECT md5(repeat('x', 1900000000))",
    "many large values": "SELECT repeat('x', 50000000) FROM range(100)",
    "deep parentheses": f"SELECT {nested('(', '1', ')', 200_000)}",
    "kwic of all words": "FROM kwic('river', n := 1000000000)",
}
LONG = {
    "cross join": "SELECT count(*) FROM range(1000000) a, range(1000000) b, range(1000000) c",
    "jaro": "SELECT jaro_similarity(repeat('ab', 800000), repeat('ba', 800000))",
    "sleep": "SELECT sleep_ms(100000000)",
    "text put together": "SELECT length(string_agg(repeat('x', 10000), '')) FROM range(400000)",
    "list of a billion": "SELECT len(list(i)) FROM range(1000000000) t(i)",
    "replacement": "SELECT length(replace(repeat('a', 50000), 'a', repeat('b', 50000)))",
    "padding": "SELECT length(lpad('x', 2000000000, 'y'))",
    "number without end": "SELECT length((repeat('9', 1000000)::BIGNUM * repeat('9', "
    "1000000)::BIGNUM)::VARCHAR)",
    "lambdas": "SELECT len(list_transform(range(30000), lambda x: len(list_filter(range(30000), "
    "lambda y: y = x))))",
    "not not not": "SELECT " + "NOT " * 100_000 + "true",
    "deep lists": f"SELECT {nested('[', '1', ']', 50_000)}",
    "deep queries": f"SELECT * FROM {nested('(SELECT * FROM ', '(SELECT 1)', ')', 10_000)}",
    "union": " UNION ALL ".join(["SELECT 1"] * 20_000),
    "joins": "SELECT count(*) FROM " + ", ".join(f"range(2) t{i}" for i in range(200)),
    "pivot": "PIVOT (SELECT i FROM range(50000) t(i)) ON i USING count(*)",
    "sort": "SELECT i FROM range(100000000) t(i) ORDER BY hash(i) LIMIT 1 OFFSET 50000000",
    "distinct": "SELECT count(DISTINCT i) FROM range(200000000) t(i)",
    "large result": "SELECT repeat('x', 1000) FROM range(10000000)",
    "unicode": "SELECT length(nfc_normalize(repeat('é', 100000000)))",
}


def seconds_of(run: Run, text: str) -> float:
    """Time until the answer, or until an error that says something."""
    began = time.monotonic()
    try:
        run.sql(text).fetchall()
    except QueryError as error:
        assert len(str(error).strip()) > 10, text[:100]
    return time.monotonic() - began


def test_no_statement_passes_its_limits(
    tmp_path: Path, fuzz_length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(str(tmp_path), SHARDS, LAYERS)
    resident = [0]
    look = sandbox._resident_bytes

    def watched(pid: int) -> int:
        resident.append(look(pid))
        return resident[-1]

    monkeypatch.setattr(sandbox, "_resident_bytes", watched)
    with open_run(str(tmp_path), timeout_s=TIMEOUT_S, memory_limit=MEMORY, threads=2) as run:
        for name, text in (SHORT | LONG if fuzz_length == "long" else SHORT).items():
            took: list[float] = []
            while not took or (took[-1] > TIMEOUT_S + SLACK_S and len(took) < TRIES):
                assert run.sql("SELECT 42").fetchall() == [(42,)], name
                took.append(seconds_of(run, text))
            assert took[-1] <= TIMEOUT_S + SLACK_S, (name, took)
        assert run.sql("SELECT 42").fetchall() == [(42,)]
        assert max(resident) < 200 * 2**20 + run._backend.limits.process_bytes
