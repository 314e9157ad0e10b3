"""Conditions on kept columns: SQL's meaning, one canonical form, and bounds."""

from __future__ import annotations

import random
from datetime import date, datetime
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from afn_ray import conditions, kept
from afn_ray.errors import ConfigError

COLUMNS = kept.parse("lang,year:int64,score:double,ok:bool,day:date,seen:timestamp,my-name")
VALUES: dict[str, list[Any]] = {
    "lang": [None, "", "de", "d'e", "DE", "das", "é", "a%b", "\U0001f600"],
    "year": [None, 0, -1, 2020, 2**62],
    "score": [None, 0.0, -0.5, 0.1, 1e300],
    "ok": [None, True, False],
    "day": [None, date(2020, 1, 1), date(2026, 11, 30)],
    "seen": [None, datetime(2020, 1, 1), datetime(2026, 11, 30, 12, 0, 0, 1)],
    "my-name": [None, "x"],
}
TESTS = [
    "lang = 'de'", "lang != 'd''e'", "lang < 'd'", "lang >= 'é'", "lang LIKE 'd%'",
    "lang NOT LIKE '_e'",
    "lang LIKE '%'", "lang LIKE ''", "lang LIKE '%a%b'", "lang IN ('de', 'DE', '')",
    "lang NOT IN ('de')",
    "lang IS NULL", "lang IS NOT NULL", "year = 2020", "year > -1", "year < 2020.5", "year <> 0",
    "year IN (1, 2020)", "score > 0.1", "score <= 0.1", "score = 1e300", "score >= -.5", "ok",
    "NOT ok",
    "ok = FALSE", "ok <> TRUE", "day >= '2020-01-02'", "seen > '2020-01-01'",
    "seen = '2026-11-30T12:00:00.000001'",
    "\"my-name\" = 'x'",
]  # fmt: skip


def rows(n: int) -> list[tuple[Any, ...]]:
    chance = random.Random(7)
    names = [column.name for column in COLUMNS]
    return [tuple(chance.choice(VALUES[name]) for name in names) for _ in range(n)]


def compound(chance: random.Random, depth: int) -> str:
    if depth == 0:
        return chance.choice(TESTS)
    parts = [compound(chance, depth - 1) for _ in range(chance.randint(1, 3))]
    found = chance.choice((" AND ", " or ")).join(parts)
    return f"not ({found})" if chance.random() < 0.3 else f"({found})"


def test_conditions_mean_what_they_mean_in_sql() -> None:
    found = rows(200)
    names = [column.name for column in COLUMNS]
    fields = [pa.field(name, kept.KINDS[kind]) for name, kind in COLUMNS]
    columns = [pa.array([row[at] for row in found], field.type) for at, field in enumerate(fields)]
    table = pa.Table.from_arrays(columns, names)
    chance = random.Random(5)
    texts = [*TESTS, *(compound(chance, chance.randint(1, 3)) for _ in range(60))]
    selected = 0
    with duckdb.connect() as connection:
        connection.register("t", table)
        for text in texts:
            condition = conditions.parse(text, COLUMNS)
            ours = [condition.holds(row) for row in found]
            sql = connection.execute(f"SELECT ({text})::BOOLEAN FROM t").fetchall()
            assert ours == [value for (value,) in sql], text
            assert conditions.parse(str(condition), COLUMNS) == condition, text
            selected += sum(value is True for value in ours)
    assert selected > len(texts)


def test_equal_conditions_have_one_form() -> None:
    forms = {
        str(conditions.parse(text, COLUMNS))
        for text in (
            "lang='de' and(YEAR>=2020)",
            "  LANG = 'de'\n AND \"year\" >= 2020 ",
            "((lang = 'de') AND year >= 2020)",
        )
    }
    assert forms == {"lang = 'de' AND year >= 2020"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("langg = 'de'", "(did you mean lang?)"),
        ("licence = 'mit'", "kept are day, lang, my-name"),
        ("licence = 'mit'", "--keep-columns day:date,lang,my-name,ok:bool,score:double"),
        ("lang = 5", "keep it as one: lang:int64"),
        ("year = 'x'", "expected a number"),
        ("score > 1e999", "expected a number"),
        ("day = 'tomorrow'", "as '2026-11-30'"),
        ("lang = NULL", "write lang IS NULL"),
        ("year LIKE '2%'", "year is int64"),
        ("lang = 'de", "goes wrong at 'de"),
        ("lang", "goes wrong at the end"),
        ("lang = 'de'; DROP TABLE t", "goes wrong at ;"),
        ("lang = (SELECT 1)", "goes wrong at ("),
        ("lang = lower('DE')", "goes wrong at lower"),
        ("", "goes wrong at the end"),
        ("NOT " * 40 + "ok", "more than 32 deep"),
        ("lang IN (" + "'a'," * 2000 + "'b')", "at most 4,096"),
    ],
)
def test_what_is_no_condition_is_refused_with_what_to_do(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        conditions.parse(text, COLUMNS)
    assert expected in str(refused.value)


def test_like_takes_time_of_a_product() -> None:
    assert not conditions.is_like("a" * 1024, "%a" * 1000 + "b")
    assert conditions.is_like("a" * 1024 + "b", "%a" * 1000 + "b")


def test_a_nested_column_has_its_path_or_its_name() -> None:
    columns = kept.parse("meta.lang,messages.0.n:int64")
    found = conditions.parse("meta.lang = 'de' and meta_lang <> 'x' or messages.0.n > 1", columns)
    assert str(found) == "(meta_lang = 'de' AND meta_lang <> 'x') OR messages_0_n > 1"
    assert found.holds((1, "de")) is True
    assert found.holds((None, "x")) is None


def test_only_the_text_of_a_user_is_held_against_the_longest_condition() -> None:
    text = " or ".join(["year=1"] * 400)
    found = str(conditions.parse(text, COLUMNS))
    assert len(text) <= conditions.MOST_CHARS < len(found)
    assert str(conditions.parse(found, COLUMNS)) == found
    with pytest.raises(ConfigError, match="characters; expected at most 4,096"):
        conditions.parse(text + " " * conditions.MOST_CHARS, COLUMNS)
