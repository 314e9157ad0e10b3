"""SQL of the view ``words``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from afn_ray.query.expressions import File, Recorded, is_high, rows_of
from afn_ray.schema import SPECIAL, WORD_START

PIECES = 4
"""Largest number of tokens of a word that window functions join; longer words are grouped."""
SLICES = 16
"""Largest number of parts in which ``words`` reads a run.

Parts are read in parallel. A query for one document reads only its part.
"""
SLICE_TOKENS = 1 << 21
"""Smallest number of tokens in a part of ``words``: planning a part costs time too."""


def words_view(files: Sequence[File], recorded: Recorded) -> str:
    """SQL of the ``words`` view: one pass over the rows in their order.

    Memory does not grow with the rows: window functions without partition or order stream, if
    their input has no join. DuckDB does not push a filter through such a window. So the run is read
    in parts with known documents, and a query for one document reads one part.
    """
    parts = []
    for part in _parts(files):
        last = part[-1].doc_offset + part[-1].n_documents
        words = _words(part, recorded)
        parts.append(f"FROM ({words}) WHERE doc >= {part[0].doc_offset} AND doc < {last}")
    return " UNION ALL ".join(parts)


def _parts(files: Sequence[File]) -> list[list[File]]:
    """``files`` in at most ``SLICES`` groups with about equal numbers of tokens.

    Files without documents are left out.
    """
    room = max(SLICE_TOKENS, -(-sum(f.n_tokens for f in files) // SLICES))
    parts: list[list[File]] = [[]]
    size = 0
    for file in (f for f in files if f.n_documents):
        if size >= room:
            parts.append([])
            size = 0
        parts[-1].append(file)
        size += file.n_tokens
    return parts if parts[0] else [[files[0]]]


def _words(files: Sequence[File], recorded: Recorded) -> str:
    """SQL of the words of ``files``.

    Window functions join words of up to ``PIECES`` tokens; longer words are grouped. A word has the
    tag of its first token, and the class of that token's type.
    """
    rows, portable = rows_of(files), files[0].folder is not None
    strengths = [f"strength_{k}" for k in recorded.layers]
    columns = ["token_id", *strengths, *(['"end"'] if recorded.offsets else [])]
    every = range(1, PIECES + 1)
    # A token belongs to a long word if no other word begins before the word has more than PIECES
    # tokens.
    inside = " ".join(
        f"WHEN {at} THEN NOT ({' OR '.join(f'is_head_{j}' for j in range(1, PIECES - at + 1))})"
        for at in range(PIECES)
    )
    ahead = f"""
        SELECT *, count(*) FILTER (is_head) OVER (ROWS UNBOUNDED PRECEDING) AS number, row_number() OVER () AS nth
        FROM (
            SELECT *, is_first OR flags & {WORD_START} <> 0 AS is_head FROM (
                SELECT *, coalesce(doc <> lag(doc) OVER (), true) AS is_first
                FROM {rows} WHERE flags & {SPECIAL} = 0
            )
        )"""  # noqa: S608
    # A catalog uses lead with one argument only: when another version of DuckDB opens the file, it
    # gets the further arguments of lag and lead twice.
    if portable:
        for j in every:
            head = f"is_head_{j - 1}" if j > 1 else "is_head"
            leads = [f"coalesce(lead({head}) OVER (), true) AS is_head_{j}"]
            leads += [
                f"lead({_piece(c, j - 1)}) OVER () AS {_piece(c, j)}" for c in columns if j < PIECES
            ]
            ahead = f"SELECT *, {', '.join(leads)} FROM ({ahead})"  # noqa: S608
    else:  # the same rows in half the time
        leads = [f"lead(is_head, {j}, true) OVER () AS is_head_{j}" for j in every]
        leads += [
            f"lead({c}, {j}) OVER () AS {_piece(c, j)}" for c in columns for j in range(1, PIECES)
        ]
        ahead = f"SELECT *, {', '.join(leads)} FROM ({ahead})"  # noqa: S608
    tokens = f"""
        SELECT *, (number - first_number)::INTEGER AS word, CASE place {inside} ELSE true END AS is_long FROM (
            SELECT *, max(number) FILTER (is_first) OVER (ROWS UNBOUNDED PRECEDING) AS first_number,
                nth - max(nth) FILTER (is_head) OVER (ROWS UNBOUNDED PRECEDING) AS place
            FROM ({ahead})
        )"""  # noqa: S608

    def by_length(of: Callable[[list[int]], str]) -> str:
        return f"CASE pieces {' '.join(f'WHEN {n} THEN {of(list(range(n)))}' for n in every)} END"

    def joined(between: str, name: str, kind: str = "") -> str:
        return by_length(lambda places: between.join(_piece(name, j) + kind for j in places))

    def largest(name: str) -> str:
        return by_length(lambda places: f"greatest({', '.join(_piece(name, j) for j in places)})")

    text = by_length(
        lambda places: " || ".join(
            ["text", *(f"texts[{_piece('token_id', j)} + 1]" for j in places[1:])]
        )
    )
    short = [
        "doc",
        "word",
        f"coalesce(surface, {text}) AS text",
        "class",
        "pieces AS n_tokens",
        "position",
    ]
    long = [
        "doc",
        "word",
        "coalesce(max(surface), string_agg(text, '' ORDER BY place)) AS text",
        "any_value(class) FILTER (place = 0) AS class",
        "count(*) AS n_tokens",
        "min(position) AS position",
    ]
    if recorded.tagged:
        short += ["tag"]
        long += ["any_value(tag) FILTER (place = 0) AS tag"]
    if recorded.offsets:
        last = by_length(lambda places: _piece('"end"', places[-1]))
        short += ["start", f'{last} AS "end"']
        long += ["min(start) AS start", 'max("end") AS "end"']
    for k, s in zip(recorded.layers, strengths, strict=True):
        is_word_high = is_high(f"max_strength_{k}", recorded.quartile("q3", k))
        high = f"{is_word_high} AS high_{k}"
        short += [f"{largest(s)} AS max_strength_{k}"]
        short += [
            f"({joined(' + ', s, '::DOUBLE')}) / pieces AS mean_strength_{k}",
            f"{s} AS first_strength_{k}",
            high,
        ]
        long += [f"max({s}) AS max_strength_{k}", f"avg({s}) AS mean_strength_{k}"]
        long += [f"arg_min({s}, place) AS first_strength_{k}", high]
    pieces = f"CASE {' '.join(f'WHEN is_head_{j} THEN {j}' for j in every)} END::BIGINT AS pieces"
    return f"""
        SELECT {", ".join(short)} FROM (SELECT *, {pieces} FROM ({tokens}) WHERE is_head AND NOT is_long)
        LEFT JOIN internal.types USING (token_id), (
            SELECT list(coalesce(text, '') ORDER BY id) AS texts
            FROM (SELECT unnest(range((SELECT max(token_id) + 1 FROM internal.types))) AS id)
            LEFT JOIN internal.types ON token_id = id
        )
        UNION ALL
        SELECT {", ".join(long)} FROM (FROM ({tokens}) WHERE is_long) LEFT JOIN internal.types USING (token_id)
        GROUP BY doc, word"""  # noqa: S608


def _piece(column: str, at: int) -> str:
    """Name of the column with the value of ``column`` for the token ``at`` places later."""
    return column if at == 0 else f"{column.strip(chr(34))}_piece_{at}"
