"""SQL of the macros that read text: a keyword in context, and a whole document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afn_ray.kept import beside
from afn_ray.query.expressions import (
    RecordedColumns,
    ShardFile,
    is_high,
    lower_word,
    quoted,
    tokens_of,
)
from afn_ray.schema import SPECIAL, WORD_START

FAR_TOKENS = 1 << 18
"""Largest number of tokens on each side of a word that ``kwic`` reads."""
CONTEXT_CHARS = 10_000
"""Largest number of characters on each side that ``kwic`` returns, for up to 100 words."""
CONTINUES = SPECIAL | WORD_START
"""Mask of the flags that a token which continues a word does not have."""


def _spelled(rows: str, key: str, offsets: bool, also: str = "") -> str:
    """SQL of the words of ``rows``, a few tokens with their texts.

    The rows are whole documents or contiguous ranges of them; ``key`` identifies a range. Words are
    numbered from 1 in each range; 0 is the rest of a word that began before the range. The column
    ``gap`` is the space before a word, if there is one. ``also`` is SQL of more columns.
    """
    # In most BPE tokenizers the offsets of a token include the space before the word.
    holds_space = 'is_spaced AND "end" - start > length(ltrim(text))'
    gap = (
        f"CASE WHEN start > lag(\"end\") OVER w OR ({holds_space}) THEN ' ' ELSE '' END"
        if offsets
        else f"CASE WHEN flags & {WORD_START} <> 0 THEN ' ' ELSE '' END"
    )
    return f"""
        SELECT {key}, number, min(row) AS row, max(row) AS last_row,
          any_value(gap ORDER BY position) AS gap,
            coalesce(max(surface), ltrim(string_agg(text, '' ORDER BY position))) AS text{also}
        FROM (
            SELECT *, count(*) FILTER (flags & {WORD_START} <> 0) OVER w AS number, {gap} AS gap
            FROM ({rows}) WHERE flags & {SPECIAL} = 0
              WINDOW w AS (PARTITION BY {key} ORDER BY position)
        ) GROUP BY {key}, number"""  # noqa: S608


def document_text_macro(rows: str, offsets: bool) -> str:
    """SQL of the text of the document numbered ``document``."""
    of_document = (
        f"SELECT t.*, s.text, s.is_spaced FROM {rows} t JOIN internal.types s "  # noqa: S608
        "USING (token_id) WHERE t.doc = document"
    )
    words = _spelled(of_document, "doc", offsets)
    return f"SELECT ltrim(string_agg(gap || text, '' ORDER BY number)) FROM ({words})"  # noqa: S608


def kwic_macro(files: Sequence[ShardFile], recorded: RecordedColumns) -> str:
    """SQL of the occurrences of ``word`` with ``n`` words on both sides.

    With ``most`` it returns at most that many early occurrences. The query never sorts the run: it
    finds token ids in the vocabulary, first tokens of the word (heads) by a scan, and the context
    by row numbers. The first ``20 * most + 1000`` heads are nearly always enough for ``most``. Only
    if too many of them begin other words, all heads are read.
    """
    rows = tokens_of(files, recorded.offsets)
    counts = recorded.and_counts
    limit = f"{counts} LIMIT coalesce(20 * greatest(most, 0) + 1000, 0)"
    some = _occurrences(rows, "some", "most IS NOT NULL", limit)
    every = _occurrences(
        rows, "every", "coalesce((SELECT count(*) FROM some_found) < most, true)", counts
    )
    context = _Surroundings(rows, recorded.offsets, _word_values(recorded))
    # Read few tokens first, and more only for occurrences that lack words. A catalog reads once:
    # before DuckDB 1.4 the plan of two steps takes half a minute.
    is_portable = files[0].folder is not None
    chosen = context.read_once() if is_portable else context.read_twice()
    names = _value_names(recorded)
    found = _with_sides(names)
    of_word = ["position", "left_context", "text", "right_context", *names]
    values = ", ".join(f"k.{name}" for name in of_word)
    own = ["doc", "doc_id", "source", *of_word]
    # Names of kept columns are qualified, since one may be that of a parameter.
    kept_columns = "".join(
        f", d.{quoted(name)} AS {quoted(beside(name, own))}" for name in recorded.kept
    )
    return f"""
        WITH {some}, {every},
        found AS MATERIALIZED (
            SELECT DISTINCT file, row FROM (FROM some_found UNION ALL FROM every_found)
              ORDER BY file, row LIMIT {MOST}
        ),
        {chosen}
        SELECT d.doc, d.doc_id, d.source, {values}{kept_columns}
        FROM documents d JOIN {_few(found)} k USING (doc)
          ORDER BY d.doc, k.position"""  # noqa: S608


WORDS = "greatest(n, 0)::BIGINT"
"""SQL of the number of words on each side."""
_REFUSED = "error('kwic: {0} is ' || coalesce({0}::VARCHAR, 'NULL') || ', expected {1}')"
MOST = f"""CASE
    WHEN n IS NULL OR n < 0 THEN {_REFUSED.format("n", "0 or more words on each side")}
    WHEN most < 0 THEN {_REFUSED.format("most", "0 or more occurrences, or NULL for all")}
      ELSE most END"""
"""SQL of the largest number of occurrences; an error for a wrong number, also of words beside them.

A word that does not occur has no rows, whatever the numbers are.
"""
MOST_TOKENS = "greatest(4 * length(word), 3 * strlen(word))"
"""SQL of the most tokens of the word in any spelling.

A byte tokenizer may need four for one character, and decomposed letters have up to three times the
bytes of composed ones.
"""
ASKED = lower_word("word")
"""SQL of the asked word as words are compared."""
BESIDE = "replace(strip_accents({}), '\u03c2', '\u03c3')"
"""SQL of a letter without its marks, where both small sigmas are one."""
MAY_BEGIN = f"""(starts_with(asked, folded) OR starts_with(asked, left(folded, -1)) AND (
                {BESIDE.format("right(folded, 1)")}
                  = {BESIDE.format("substr(asked, length(folded), 1)")}
                OR regexp_matches(text, '[\\x{{1100}}-\\x{{11ff}}]$')))"""
"""SQL of whether the word ``asked`` may begin with a type: its ``text``, and that as it is
compared.

The next token may compose with the last character, or make a final sigma of it another one. So
marks of that character do not count, nor a Hangul syllable whose last letter is still to come.
"""
PLACE = "number - max(number) FILTER (row = head) OVER (PARTITION BY file, head, doc) AS place"
"""SQL of the number of a word relative to the head's word, which has 0."""


def _value_names(recorded: RecordedColumns) -> list[str]:
    """Names of the columns with the values of an occurrence."""
    names = ["n_tokens"]
    if recorded.offsets:
        names += ["start", '"end"']
    for k in recorded.layers:
        names += [f"{which}_strength_{k}" for which in ("max", "mean", "first", "last")]
        names.append(f"high_{k}")
    return names


def _word_values(recorded: RecordedColumns) -> str:
    """SQL of the position and the values of a word, from those of its tokens."""
    values = ["min(position) AS position", "count(*) AS n_tokens"]
    if recorded.offsets:
        values += ["min(start) AS start", 'max("end") AS "end"']
    for k in recorded.layers:
        condition = is_high(f"max(strength_{k})", recorded.quartile("q3", k))
        values += [
            f"max(strength_{k}) AS max_strength_{k}",
            f"avg(strength_{k}) AS mean_strength_{k}",
            f"arg_min(strength_{k}, position) AS first_strength_{k}",
            f"arg_max(strength_{k}, position) AS last_strength_{k}",
            f"{condition} AS high_{k}",
        ]
    return "".join(f", {value}" for value in values)


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """The words around occurrences, as SQL."""

    rows: str
    """SQL of the run's tokens."""
    offsets: bool
    values: str
    """SQL of the values of a word, as ``_word_values`` returns it."""

    def read_once(self) -> str:
        """SQL of ``chosen``: the words around ``found``, all read at once."""
        beside = f"least(64 * {WORDS} + 256, {FAR_TOKENS})"
        tokens = self._near("found", beside)
        spelled = _spelled(tokens, "file, head, doc", self.offsets, self.values)
        return f"""
        chosen AS (
            SELECT *, {PLACE} FROM ({spelled})
            WHERE number > 0 AND last_row < head + {MOST_TOKENS} + {beside}
        )"""  # noqa: S608

    def read_twice(self) -> str:
        """SQL of ``chosen``: the words around ``found``, more tokens where few lack words."""
        close = self._numbered("found", f"least(4 * {WORDS} + 16, {FAR_TOKENS})")
        far = self._numbered("lacking", f"least(256 * {WORDS} + 1024, {FAR_TOKENS})")
        whole = (
            "CASE WHEN is_cut_before THEN '…' ELSE '' END || text "
            "|| CASE WHEN is_cut_behind THEN '…' ELSE '' END AS text"
        )
        return f"""
        close AS MATERIALIZED ({close}),
        lacking AS MATERIALIZED (
            SELECT file, head AS row FROM close GROUP BY file, head
            HAVING count(*) FILTER (place < 0 AND NOT is_cut_before) < n AND bool_or(begins_before)
                OR count(*) FILTER (place > 0 AND NOT is_cut_behind) < n AND bool_or(ends_behind)
        ),
        chosen AS (
            SELECT c.* FROM close c ANTI JOIN lacking l ON c.file = l.file AND c.head = l.row
            UNION ALL SELECT * REPLACE ({whole}) FROM ({far})
        )"""  # noqa: S608

    def _near(self, heads: str, beside: str, ends: str = "") -> str:
        """SQL of the tokens up to ``beside`` before and after the words at ``heads``."""
        around = (
            f"SELECT file, row AS head, "  # noqa: S608
            f"row + unnest(range(-{beside}, {MOST_TOKENS} + {beside} + 1)) AS near FROM {heads}"
        )
        return f"""
            SELECT f.head, t.*, s.text, s.is_spaced{ends}
            FROM {self.rows} t JOIN {_few(around)} f ON t.file = f.file AND t.row = f.near
            JOIN internal.types s USING (token_id)"""  # noqa: S608

    def _numbered(self, heads: str, beside: str) -> str:
        """SQL of the words in the ``beside`` tokens on both sides of ``heads``."""
        of_ends = {
            "first_row": "min(t.row)",
            "first_position": "min(t.position)",
            "end_row": "max(t.row)",
        }
        window = "OVER (PARTITION BY t.file, f.head, t.doc)"
        ends = "".join(f", {sql} {window} AS {name}" for name, sql in of_ends.items())
        kept = "".join(f", any_value({name}) AS {name}" for name in of_ends)
        tokens = self._near(heads, beside, ends)
        spelled = _spelled(tokens, "file, head, doc", self.offsets, self.values + kept)
        return f"""
            SELECT *, first_row = head - {beside} AND first_position > 0 AS begins_before,
                end_row = head + {MOST_TOKENS} + {beside} AS ends_behind,
                begins_before AND number = 0 AS is_cut_before,
                ends_behind AND last_row = end_row AS is_cut_behind
            FROM (SELECT *, {PLACE} FROM ({spelled})) WHERE place IS NOT NULL"""  # noqa: S608


def _with_sides(names: Sequence[str]) -> str:
    """SQL of each occurrence in ``chosen``, with its columns ``names`` and its context."""
    columns = [repr(name.strip('"')) for name in ("position", "text", *names)]
    chars = f"greatest({CONTEXT_CHARS}, 100 * {WORDS})"
    left = _side("<", chars, f"'…' || right({{}}, {chars})")
    right = _side(">", chars, f"left({{}}, {chars}) || '…'")
    return f"""
            SELECT doc, any_value(COLUMNS([{", ".join(columns)}]))
                    FILTER (place = 0),
                {left} AS left_context,
                {right} AS right_context
            FROM chosen WHERE abs(place) <= {WORDS} GROUP BY file, head, doc"""  # noqa: S608


def _side(which: str, chars: str, cut: str) -> str:
    """SQL of the context on one side, shortened by ``cut`` if it is longer than ``chars``."""
    text = (
        f"coalesce(ltrim(string_agg(gap || text, '' ORDER BY place) FILTER (place {which} 0)), '')"
    )
    return f"CASE WHEN length({text}) > {chars} THEN {cut.format(f'({text})')} ELSE {text} END"


def _few(rows: str) -> str:
    """``rows`` in a form that DuckDB estimates as one row.

    So a join with the tokens builds its hash table from ``rows``. DuckDB cannot estimate how many
    rows a scan finds. If it expects more rows than there are tokens, it builds the hash table from
    all tokens, which takes 5 GB for 100 M tokens, even if nothing is found.
    """
    return (
        "(SELECT one.* FROM (SELECT unnest(list(of_these)) AS one FROM "  # noqa: S608
        f"({rows}) of_these))"
    )


def _occurrences(rows: str, name: str, wanted: str, also: str) -> str:
    """SQL of the steps from the vocabulary to ``<name>_found``: file and row of the word's heads.

    A head is a token that starts the word. Its surface is the word; or it has no surface, and its
    text with the texts of the tokens that continue it is the word. Both are compared as
    ``lower_word`` spells them. If ``wanted`` is false, nothing is scanned, because a join with no
    rows ends at once. ``also`` ends the conditions on a head.
    """
    pieces = (
        f"SELECT file, row AS head, "  # noqa: S608
        f"row + unnest(range(0, {MOST_TOKENS} + 1)) AS near "
        f"FROM {name}_longer WHERE NOT is_whole"
    )
    return f"""
        {name}_types AS MATERIALIZED (
            SELECT token_id, folded = asked AS is_whole FROM (
                SELECT token_id, text, {lower_word("text")} AS folded, {ASKED} AS asked
                FROM internal.types WHERE text <> '' AND {wanted}
            ) WHERE {MAY_BEGIN}
        ),
        {name}_written AS MATERIALIZED (
            SELECT file, row FROM {rows}, (SELECT 1 WHERE {wanted})
            WHERE {lower_word("surface")} = {ASKED}{also}
        ),
        {name}_heads AS MATERIALIZED (
            SELECT file, row, is_whole FROM {rows} JOIN {name}_types USING (token_id)
            WHERE flags & {CONTINUES} = {WORD_START} AND surface IS NULL{also}
        ),
        {name}_longer AS MATERIALIZED (
            SELECT file, h.row, is_whole
            FROM {rows} t JOIN {_few(f"SELECT *, row + 1 AS next FROM {name}_heads")} h USING (file)
            WHERE t.row = h.next AND flags & {CONTINUES} = 0
        ),
        {name}_found AS MATERIALIZED (
            FROM {name}_written
            UNION ALL SELECT file, row FROM {name}_heads h ANTI JOIN {name}_longer USING (file, row)
              WHERE h.is_whole
            UNION ALL SELECT file, head AS row FROM (
                SELECT file, head, string_agg(text, '' ORDER BY row) AS spelled FROM (
                    SELECT h.file, head, t.row, s.text,
                        min(t.row) FILTER (t.row > head AND flags & {CONTINUES} <> 0)
                          OVER (PARTITION BY h.file, head)
                            AS stop
                    FROM {rows} t JOIN {_few(pieces)} h ON t.file = h.file AND t.row = h.near
                    JOIN internal.types s USING (token_id)
                ) WHERE row < stop OR stop IS NULL GROUP BY ALL
            ) WHERE {lower_word("spelled")} = {ASKED}
        )"""  # noqa: S608
