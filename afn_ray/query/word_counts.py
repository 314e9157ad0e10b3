"""Counts of a run's words at one layer: exact, in bounded memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.classes import UNTAGGED
from afn_ray.query.database import Run
from afn_ray.query.expressions import WORD

LEAST_N = 5
"""Smallest number of occurrences of a word that has a row of its own; rarer words are folded."""
MAX_GROUPS = 1 << 21
"""Number of distinct words, about, that one query counts; more of them take several queries."""
SUMS = ("n", "n_tokens", "n_high", "ranks")
"""Columns of counts that add up."""


class WordCounts(NamedTuple):
    """The words of a run at one layer.

    The rank of an occurrence is the share of the run's words with a smaller strength at the layer,
    with half of those that have the same: 0 to 1, and 0.5 on average. A word's ``rank`` is the mean
    of its occurrences.
    """

    words: pa.Table
    """Words that occur ``LEAST_N`` times or more: word, class, n, n_tokens, n_high, rank.

    The class is that of most occurrences.
    """
    classes: pa.Table
    """Classes of all words by occurrence: class, n, n_tokens, n_high, rank."""
    num_folded: int
    """Number of rarer words, which have no row in ``words``."""
    n_folded: int
    """Number of their occurrences."""

    @property
    def n(self) -> int:
        """Number of occurrences of all words."""
        return int(pc.sum(self.classes["n"]).as_py() or 0)

    @property
    def n_high(self) -> int:
        """Number of them that are HIGH."""
        return int(pc.sum(self.classes["n_high"]).as_py() or 0)

    @property
    def n_tokens(self) -> int:
        """Number of their tokens."""
        return int(pc.sum(self.classes["n_tokens"]).as_py() or 0)


def word_counts(run: Run, layer: int) -> WordCounts:
    """Count the words of ``run`` at the recorded ``layer`` from its view ``words``.

    A word's strength is that of its strongest token, and the word is HIGH if that token is. Raises
    ``QueryError`` for a query over the run's limits.
    """
    twice_below, n = _ranks(run, layer)
    ((num_words,),) = run.sql(
        "SELECT "  # noqa: S608
        f"approx_count_distinct({WORD}) FROM words"
    ).fetchall()
    num_parts = -(-num_words // MAX_GROUPS) or 1
    parts = [
        run.sql(_counted(layer, part, num_parts), ranked=twice_below).to_arrow_table()
        for part in range(num_parts)
    ]
    rows = pa.concat_tables(parts)
    classes = _with_ranks(_summed(rows, "class"), n)
    is_folded = pc.is_null(rows["word"])
    folded = rows.filter(is_folded)
    named = rows.filter(pc.invert(is_folded))
    is_main = pc.equal(named["words"], 1)
    main = named.filter(is_main).select(["word", "class"])
    words = _with_ranks(_summed(named, "word"), n)
    words = words.join(main, "word").sort_by("word")
    return WordCounts(
        words=words.select(["word", "class", "n", "n_tokens", "n_high", "rank"]),
        classes=classes,
        num_folded=pc.sum(folded["words"]).as_py() or 0,
        n_folded=pc.sum(folded["n"]).as_py() or 0,
    )


def _ranks(run: Run, layer: int) -> tuple[pa.Table, int]:
    """Twice the rank of each strength of a word at ``layer`` in words, and the number of words.

    Strengths have few distinct values (15 bits of mantissa), however many words there are.
    """
    table = run.sql(
        f"SELECT max_strength_{layer} AS strength, count(*) AS n FROM words GROUP BY "  # noqa: S608
        "1 ORDER BY 1"
    ).to_arrow_table()
    n = table["n"].to_numpy().astype(np.int64)
    upto = np.cumsum(n)
    ranked = {"strength": table["strength"], "twice_below": 2 * upto - n}
    return pa.table(ranked), int(n.sum())


def _counted(layer: int, part: int, num_parts: int) -> str:
    """SQL of the counts of one ``part`` of the words, by word and class.

    ``word`` is NULL for words that occur fewer than ``LEAST_N`` times. ``words`` is the number of
    words that have most of their occurrences in the row. ``ranks`` adds up integers, and is rounded
    once.
    """
    return f"""
        SELECT CASE WHEN n_word >= {LEAST_N} THEN word END AS word, class, sum(n)::BIGINT AS n,
            sum(n_tokens)::BIGINT AS n_tokens, sum(n_high)::BIGINT AS n_high,
              sum(ranks)::DOUBLE AS ranks,
            count(*) FILTER (nth = 1) AS words
        FROM (
            SELECT *, sum(n) OVER (PARTITION BY word) AS n_word,
                row_number() OVER (PARTITION BY word ORDER BY n DESC, class) AS nth
            FROM (
                SELECT word, class, count(*) AS n, sum(n_tokens) AS n_tokens,
                  count(*) FILTER (is_high) AS n_high,
                    sum(twice_below) AS ranks
                FROM (
                    SELECT {WORD} AS word, coalesce(class, '{UNTAGGED}') AS class, n_tokens,
                        max_strength_{layer} AS strength, high_{layer} AS is_high
                    FROM words
                ) JOIN ranked USING (strength)
                WHERE hash(word) % {num_parts} = {part} GROUP BY word, class
            )
        ) GROUP BY 1, 2"""  # noqa: S608


def _summed(rows: pa.Table, key: str) -> pa.Table:
    """The ``SUMS`` of ``rows`` by ``key``."""
    found = rows.group_by(key).aggregate([(name, "sum") for name in SUMS])
    sums = found.select([key, *(f"{name}_sum" for name in SUMS)])
    return sums.rename_columns([key, *SUMS])


def _with_ranks(rows: pa.Table, n: int) -> pa.Table:
    """``rows`` with their mean ``rank`` among ``n`` words, in place of the sum ``ranks``."""
    mean = pc.divide(rows["ranks"], pc.cast(rows["n"], pa.float64()))
    return rows.drop_columns("ranks").append_column("rank", pc.divide(mean, 2.0 * n))
