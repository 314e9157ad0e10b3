"""The SQL that recounts words, over tables made by hand."""

from __future__ import annotations

import duckdb
import pytest

from afn_ray.analysis import recount
from afn_ray.query.expressions import lower_word
from afn_ray.reduce.word_sums import normalised

DOTTED = [
    "i\u0307stanbul", "I\u0307STANBUL", "\u0130STANBUL", "istanbul", "\u0131rmak", "\u0130\u0307",
    "i\u0307\u0307", "i\u0323\u0307", "I\u0323\u0307", "i\u0308", "na\u00efve",
]  # fmt: skip
"""Words whose lower case depends on how the dot of an i is written."""
WAYS = ("max", "mean", "first", "last")


@pytest.mark.parametrize("word", DOTTED)
def test_sql_makes_the_word_that_the_reduce_makes(word: str) -> None:
    found = duckdb.execute(f"SELECT {lower_word('$1')}", [word]).fetchall()
    assert found == [(normalised(word),)]


def test_intact_words_with_a_dotted_i_are_proved_and_a_wrong_count_is_found() -> None:
    tables = duckdb.connect()
    tables.execute("CREATE TABLE labels AS SELECT 1 AS layer, 'tokens' AS population, 0.5 AS q3")
    strengths = ", ".join(f"1.0::FLOAT AS {way}_strength_1" for way in WAYS)
    tables.execute(
        f"""CREATE TABLE words AS SELECT row_number() OVER () AS doc, 0 AS word, text,
            1 AS n_tokens,
            {strengths} FROM (SELECT unnest($1) AS text)""",
        [DOTTED],
    )
    n = {
        word: [normalised(text) for text in DOTTED].count(word) for word in map(normalised, DOTTED)
    }
    high = ", ".join(f"n::BIGINT AS n_high{way}" for way in ("", "_mean", "_first", "_last"))
    tables.execute(
        f"""CREATE TABLE word_vocabulary AS SELECT 1 AS layer, word, n, n AS n_docs, n AS n_tokens,
            {high}, 1.0::FLOAT AS min, 1.0::FLOAT AS max, 1 AS least_n
            FROM (SELECT unnest($1) AS word, unnest($2) AS n)""",
        [list(n), list(n.values())],
    )
    wrong = recount.word_vocabulary_sql(1)
    assert tables.execute(wrong).fetchall() == []
    tables.execute("UPDATE word_vocabulary SET n = n + 1 WHERE word = 'istanbul'")
    assert {row[0] for row in tables.execute(wrong).fetchall()} == {None, "istanbul"}
