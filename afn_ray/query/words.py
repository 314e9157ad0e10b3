"""SQL of the view ``words``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from afn_ray.query.expressions import (
    WORD,
    RecordedColumns,
    ShardFile,
    answerable,
    is_high,
    tokens_of,
)
from afn_ray.query.word_classes import classified
from afn_ray.schema import SPECIAL, WORD_START
from afn_ray.token_rows import NO_WORDS

PIECES = 4
"""Largest number of tokens of a word that window functions join; longer words are grouped."""
LENGTHS = range(1, PIECES + 1)
"""Numbers of tokens of the words that window functions join."""
TEXTS_BY_ID = f"""
    SELECT list(text ORDER BY id) AS texts, list({WORD} ORDER BY id) AS spellings
    FROM (SELECT unnest(range((SELECT max(token_id) + 1 FROM internal.types))) AS id)
    LEFT JOIN internal.types ON token_id = id
"""  # noqa: S608
"""SQL of one row: the texts of all token ids in order, and these texts as words."""
SLICES = 16
"""Largest number of parts in which ``words`` reads a run.

Parts are read in parallel. A query for one document reads only its part.
"""
SLICE_TOKENS = 1 << 21
"""Smallest number of tokens in a part of ``words``: planning a part costs time too."""


def words_view(
    files: Sequence[ShardFile], documents: Sequence[ShardFile], recorded: RecordedColumns
) -> str:
    """SQL of the ``words`` view: one pass over the rows in their order.

    Memory does not grow with the rows: window functions without partition or order stream, if
    their input has no join. DuckDB does not push a filter through such a window. So the run is read
    in parts with known documents, and a query for one document reads one part.
    """
    # Parts of one version: rows of two come from a union, above which a window has no order.
    parts: list[list[ShardFile]] = []
    for version in sorted({file.schema_version for file in files}):
        parts += _parts([file for file in files if file.schema_version == version])
    queries = []
    for part in parts:
        last = part[-1].doc_offset + part[-1].n_documents
        words = _words(part, recorded)
        queries.append(
            f"FROM ({words}) WHERE doc >= {part[0].doc_offset} AND doc < "
            f"{last}{recorded.and_counts}"
        )
    found = classified(" UNION ALL ".join(queries), documents, recorded)
    return answerable(found, recorded, NO_WORDS)


def _parts(files: Sequence[ShardFile]) -> list[list[ShardFile]]:
    """``files`` in at most ``SLICES`` groups with about equal numbers of tokens.

    Files without documents are left out.
    """
    num_tokens = sum(file.n_tokens for file in files)
    room = max(SLICE_TOKENS, math.ceil(num_tokens / SLICES))
    parts: list[list[ShardFile]] = [[]]
    size = 0
    for file in files:
        if not file.n_documents:
            continue
        if size >= room:
            parts.append([])
            size = 0
        parts[-1].append(file)
        size += file.n_tokens
    return parts if parts[0] else [[files[0]]]


def _words(files: Sequence[ShardFile], recorded: RecordedColumns) -> str:
    """SQL of the words of ``files``.

    Window functions join words of up to ``PIECES`` tokens; longer words are grouped. A word has the
    tag of its first token.
    """
    tokens = _placed_tokens(_tokens_ahead(files, recorded))
    lengths = " ".join(f"WHEN is_head_{j} THEN {j}" for j in LENGTHS)
    pieces = f"CASE {lengths} END::BIGINT AS pieces"
    short = ", ".join(_short_columns(recorded))
    long = ", ".join(_long_columns(recorded))
    # Lists, and no join of the types: DuckDB would build its table from few words, each with the
    # lists.
    return f"""
        SELECT {short} FROM (SELECT *, {pieces} FROM ({tokens}) WHERE is_head AND NOT is_long),
            internal.texts_by_id
        UNION ALL
        SELECT {long} FROM (FROM ({tokens}) WHERE is_long) LEFT JOIN internal.types USING (token_id)
        GROUP BY doc, word"""  # noqa: S608


def _tokens_ahead(files: Sequence[ShardFile], recorded: RecordedColumns) -> str:
    """SQL of the tokens of ``files`` without special ones, with the values of the next tokens."""
    columns = ["token_id"]
    columns += [f"strength_{k}" for k in recorded.layers]
    if recorded.offsets:
        columns.append('"end"')
    rows = tokens_of(files, recorded.offsets)
    tokens = f"""
        SELECT *, count(*) FILTER (is_head) OVER (ROWS UNBOUNDED PRECEDING) AS number,
          row_number() OVER () AS nth
        FROM (
            SELECT *, is_first OR flags & {WORD_START} <> 0 AS is_head FROM (
                SELECT *, coalesce(doc <> lag(doc) OVER (), true) AS is_first
                FROM {rows} WHERE flags & {SPECIAL} = 0
            )
        )"""  # noqa: S608
    is_portable = files[0].folder is not None
    if not is_portable:  # the same rows in half the time
        leads = [f"lead(is_head, {j}, true) OVER () AS is_head_{j}" for j in LENGTHS]
        for column in columns:
            leads += [f"lead({column}, {j}) OVER () AS {_piece(column, j)}" for j in LENGTHS[:-1]]
        return f"SELECT *, {', '.join(leads)} FROM ({tokens})"  # noqa: S608
    # A catalog uses lead with one argument only: when another version of DuckDB opens the file, it
    # gets the further arguments of lag and lead twice.
    for j in LENGTHS:
        head = f"is_head_{j - 1}" if j > 1 else "is_head"
        leads = [f"coalesce(lead({head}) OVER (), true) AS is_head_{j}"]
        if j < PIECES:
            for column in columns:
                leads.append(f"lead({_piece(column, j - 1)}) OVER () AS {_piece(column, j)}")
        tokens = f"SELECT *, {', '.join(leads)} FROM ({tokens})"  # noqa: S608
    return tokens


def _placed_tokens(tokens: str) -> str:
    """SQL of ``tokens`` with their word, their place in it, and whether it is a long one.

    A token belongs to a long word if no other word begins before the word has more than ``PIECES``
    tokens.
    """
    cases = []
    for place in range(PIECES):
        heads = [f"is_head_{j}" for j in range(1, PIECES - place + 1)]
        cases.append(f"WHEN {place} THEN NOT ({' OR '.join(heads)})")
    return f"""
        SELECT *, (number - first_number)::INTEGER AS word,
          CASE place {" ".join(cases)} ELSE true END AS is_long FROM (
            SELECT *, max(number) FILTER (is_first) OVER (ROWS UNBOUNDED PRECEDING) AS first_number,
                nth - max(nth) FILTER (is_head) OVER (ROWS UNBOUNDED PRECEDING) AS place
            FROM ({tokens})
        )"""  # noqa: S608


def _short_columns(recorded: RecordedColumns) -> list[str]:
    """SQL of the columns of words of up to ``PIECES`` tokens; their first token has the values."""
    texts = ["texts[token_id + 1]"]
    texts += [f"coalesce(texts[{_piece('token_id', j)} + 1], '')" for j in LENGTHS[:-1]]
    text = _by_length(lambda length: " || ".join(texts[:length]))
    columns = [
        "doc",
        "word",
        f"coalesce(surface, {text}) AS text",
        "CASE WHEN pieces = 1 AND surface IS NULL THEN spellings[token_id + 1] END AS of_type",
        "pieces AS n_tokens",
        "position",
    ]
    if recorded.tagged:
        columns.append("tag")
    if recorded.offsets:
        end = _by_length(lambda length: _piece('"end"', length - 1))
        columns += ["start", f'{end} AS "end"']
    for k in recorded.layers:
        strengths = [_piece(f"strength_{k}", at) for at in range(PIECES)]
        columns += [
            f"{_largest(strengths)} AS max_strength_{k}",
            f"({_sum(strengths)}) / pieces AS mean_strength_{k}",
            f"strength_{k} AS first_strength_{k}",
            f"{_last(strengths)} AS last_strength_{k}",
            _high_column(recorded, k),
        ]
    return columns


def _long_columns(recorded: RecordedColumns) -> list[str]:
    """SQL of the same columns for words of more than ``PIECES`` tokens, by aggregation."""
    columns = [
        "doc",
        "word",
        "coalesce(max(surface), string_agg(text, '' ORDER BY place)) AS text",
        "NULL AS of_type",
        "count(*) AS n_tokens",
        "min(position) AS position",
    ]
    if recorded.tagged:
        columns.append("any_value(tag) FILTER (place = 0) AS tag")
    if recorded.offsets:
        columns += ["min(start) AS start", 'max("end") AS "end"']
    for k in recorded.layers:
        columns += [
            f"max(strength_{k}) AS max_strength_{k}",
            f"avg(strength_{k}) AS mean_strength_{k}",
            f"arg_min(strength_{k}, place) AS first_strength_{k}",
            f"arg_max(strength_{k}, place) AS last_strength_{k}",
            _high_column(recorded, k),
        ]
    return columns


def _high_column(recorded: RecordedColumns, layer: int) -> str:
    condition = is_high(f"max_strength_{layer}", recorded.quartile("q3", layer))
    return f"{condition} AS high_{layer}"


def _by_length(of: Callable[[int], str]) -> str:
    """SQL that is ``of(n)`` for a word of n tokens, up to ``PIECES``."""
    cases = " ".join(f"WHEN {length} THEN {of(length)}" for length in LENGTHS)
    return f"CASE pieces {cases} END"


def _largest(values: Sequence[str]) -> str:
    """SQL of the largest of the ``values`` of a word's tokens."""
    return _by_length(lambda length: f"greatest({', '.join(values[:length])})")


def _last(values: Sequence[str]) -> str:
    """SQL of the last of the ``values`` of a word's tokens."""
    return _by_length(lambda length: values[length - 1])


def _sum(values: Sequence[str]) -> str:
    """SQL of the sum of the ``values`` of a word's tokens."""
    doubles = [f"{value}::DOUBLE" for value in values]
    return _by_length(lambda length: " + ".join(doubles[:length]))


def _piece(column: str, at: int) -> str:
    """Name of the column with the value of ``column`` for the token ``at`` places later."""
    return column if at == 0 else f"{column.strip(chr(34))}_piece_{at}"
