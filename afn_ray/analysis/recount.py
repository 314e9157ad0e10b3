"""SQL that recomputes a run's tables from its rows; shares no code with the reduce step."""

from __future__ import annotations

from afn_ray.query.expressions import is_high, lower_word
from afn_ray.schema import LANGUAGE


def thresholds_sql(layer: int) -> str:
    """SQL of a layer's thresholds from the rows; its parameter is the sink factor.

    Quartiles equal those of DuckDB's ``quantile_disc``, which holds every row in memory. This query
    counts equal values first.
    """
    return f"""
        WITH counted AS MATERIALIZED (
            SELECT is_special, strength_{layer} AS value, count(*) AS n FROM tokens GROUP BY ALL
        ), ranked AS (
            SELECT value, sum(n) OVER (ORDER BY value) AS upto, sum(n) OVER () AS total
            FROM counted WHERE NOT is_special
        ), sinks AS (
            SELECT $1 * min(value) FILTER (2 * upto >= total)::DOUBLE AS above FROM ranked
        ), members AS (
            SELECT 'tokens' AS population, value, n FROM counted WHERE NOT is_special
            UNION ALL
            SELECT 'tokens_without_sinks', value, n FROM counted, sinks WHERE NOT is_special
              AND value::DOUBLE <= above
        ), places AS (
            SELECT *, sum(n) OVER (PARTITION BY population ORDER BY value) AS upto,
                sum(n) OVER (PARTITION BY population) AS total FROM members
        ), quartiles AS (
            SELECT population, any_value(total) AS n, min(value) AS min,
              min(value) FILTER (4 * upto >= total) AS q1,
                min(value) FILTER (2 * upto >= total) AS q2,
                  min(value) FILTER (4 * upto >= 3 * total) AS q3,
                max(value) AS max, sum(value::DOUBLE * n) / any_value(total) AS mean FROM places
                  GROUP BY population
        )
        SELECT population, coalesce(q.n, 0)::BIGINT AS n, mean, q.min, q1, q2, q3, q.max,
            coalesce((
                SELECT sum(p.n) FROM places p WHERE p.population = all_of.population
                  AND {is_high("p.value", "q.q3")}
            ), 0)::BIGINT AS n_high,
            coalesce((
              SELECT sum(n) FROM counted, sinks
              WHERE NOT is_special AND value::DOUBLE > above), 0)
                ::BIGINT AS n_sinks,
            coalesce((SELECT sum(n) FROM counted WHERE is_special), 0)::BIGINT AS n_special
        FROM (VALUES ('tokens'), ('tokens_without_sinks')) all_of(population) LEFT JOIN quartiles q
          USING (population)
        ORDER BY population
    """  # noqa: S608


def vocabulary_sql(layer: int) -> str:
    """SQL of a layer's types whose counts or extremes differ between vocabulary and rows."""
    strength = f"strength_{layer}"
    return f"""
        WITH q AS (SELECT q3 FROM labels WHERE layer = {layer} AND population = 'tokens'),
        counted AS (
            SELECT token_id, is_special, count(*) AS n,
              count(*) FILTER ({is_high(strength, "q3")}) AS n_high,
                min({strength}) AS min, max({strength}) AS max
            FROM tokens, q GROUP BY token_id, is_special
        ), stored AS (
            SELECT token_id, class = 'special' AS is_special, n, n_high, min, max FROM vocabulary
              WHERE layer = {layer}
        )
        (FROM counted EXCEPT ALL FROM stored) UNION ALL (FROM stored EXCEPT ALL FROM counted)
          ORDER BY ALL
    """  # noqa: S608


CHECKED_WORDS = 1 << 21
"""Number of words, about, that ``word_vocabulary_sql`` counts one by one."""


def word_vocabulary_sql(layer: int) -> str:
    """SQL of a layer's words whose counts or extremes differ between ``word_vocabulary`` and rows.

    It counts the words of ASCII characters, whose lower case is the same by any rules; of a large
    run a part of them, by their hash. In a row without ``word`` are the sums over all words.
    """
    ways = {"": "max", "_mean": "mean", "_first": "first", "_last": "last"}
    high = ", ".join(
        f"count(*) FILTER ({is_high(f'{way}_strength_{layer}', 'q3')}) AS n_high{name}"
        for name, way in ways.items()
    )
    counts = f"sum(n_tokens)::BIGINT AS n_tokens, {high}"
    extremes = f"min(max_strength_{layer}) AS min, max(max_strength_{layer}) AS max"
    stored = ["n_tokens", *(f"n_high{name}" for name in ways)]
    sums = ", ".join(f"sum({name})::BIGINT" for name in stored)
    is_checked = f"""regexp_full_match(word, '[ -~]+')
                AND hash(word)
                  % (SELECT sum(n)::BIGINT // {CHECKED_WORDS} + 1 FROM stored) = 0"""  # noqa: S608
    return f"""
        WITH q AS (SELECT q3 FROM labels WHERE layer = {layer} AND population = 'tokens'),
        stored AS (FROM word_vocabulary WHERE layer = {layer}),
        here AS (SELECT * REPLACE ({lower_word("left(trim(text, ' '), 200)")} AS word) FROM words),
        counted AS (
            SELECT word, count(*) AS n, count(DISTINCT doc) AS n_docs, {counts}, {extremes}
              FROM here, q
            WHERE {is_checked} GROUP BY word
              HAVING n >= (SELECT coalesce(max(least_n), 1) FROM stored)
            UNION ALL SELECT NULL, count(*), NULL, {counts}, {extremes} FROM here, q
        ), listed AS (
            SELECT word, n, n_docs, {", ".join(stored)}, min, max FROM stored WHERE {is_checked}
            UNION ALL SELECT NULL, sum(n)::BIGINT, NULL, {sums}, min(min), max(max) FROM stored
        )
        (FROM counted EXCEPT ALL FROM listed) UNION ALL (FROM listed EXCEPT ALL FROM counted)
          ORDER BY ALL
    """  # noqa: S608


LANGUAGES_SQL = f"""
    WITH placed AS (
        SELECT doc, token_id, is_word_start,
            lead(is_word_start OR is_special) OVER (PARTITION BY doc ORDER BY position) AS ends
              FROM tokens
    ), older AS (SELECT bool_or(n_whole IS NULL) AS counts_whole FROM languages),
    counted AS (
        SELECT {LANGUAGE} AS language, count(*) FILTER (NOT counts_whole) AS n_words,
            count(*) FILTER (is_whole) AS n_whole,
              count(DISTINCT token_id) FILTER (is_whole) AS n_types
        FROM (SELECT *, coalesce(ends, true) AS is_whole FROM placed WHERE is_word_start)
        JOIN documents USING (doc), older
        WHERE {LANGUAGE} IS NOT NULL GROUP BY ALL HAVING n_words > 0 OR n_whole > 0
    ), stored AS (
        SELECT language, if(n_whole IS NULL, 0, n_words) AS n_words,
          coalesce(n_whole, n_words) AS n_whole, n_types
        FROM languages
    )
    (FROM counted EXCEPT ALL FROM stored) UNION ALL (FROM stored EXCEPT ALL FROM counted)
      ORDER BY ALL
"""  # noqa: S608
"""SQL of the languages whose words differ between ``languages`` and the rows.

The table of an older run has words of one token alone, as ``n_words``.
"""


def neurons_sql(layer: int, high_only: bool) -> str:
    """SQL of a layer's neurons whose counts or extremes differ between ``neurons`` and the rows.

    With neurons of HIGH tokens alone there are no special tokens to exclude.
    """
    special = "(SELECT doc, position FROM tokens WHERE is_special)"
    rows = "FROM token_neurons"
    if not high_only:  # the order of rows in a view with a join is not certain
        rows += f" ANTI JOIN {special} USING (doc, position)"
    return f"""
        WITH stored AS (SELECT neuron, n, largest FROM neurons WHERE layer = {layer}),
        counted AS (
            SELECT item.neuron::INTEGER AS neuron, count(*) AS n, max(item.value) AS largest FROM (
                SELECT unnest(neurons_{layer}) AS item {rows}
            ) GROUP BY ALL
        )
        (FROM counted EXCEPT ALL FROM stored) UNION ALL (FROM stored EXCEPT ALL FROM counted)
          ORDER BY ALL
    """  # noqa: S608
