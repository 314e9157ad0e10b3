"""The SQL of a run's views and macros.

It contains only text and numbers of this package, never text from a corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from afn_ray.reduce.stats import Z_95
from afn_ray.schema import REPLACED, SPECIAL, STRENGTH, UNTAGGED, WORD_START, Series

VIEWS = {
    "tokens": "one row per token of the corpus, special tokens included",
    "documents": "one row per document read",
    "vocabulary": "statistics of every type (token_id) that occurs, per layer",
    "classes": "classes by their tokens, per layer: by the tokens own tags where the corpus is "
    "labelled",
    "words": "one row per word with the strengths of its tokens; special tokens belong to none",
    "thresholds": "quartiles of the run per layer, with and without sinks",
    "labels": "the quartiles that labels go by: these, or frozen ones of another run",
    "signals": "how each signal but strength is distributed, per layer; empty where none was "
    "recorded",
    "signal_vocabulary": "statistics of every type under each of these",
    "token_neurons": "the neurons of each token that are furthest from 0; empty where none were "
    "recorded",
    "neurons": "what each of these neurons answers to, per layer; empty where none were recorded",
    "neuron_types": "each neuron with each type that it meets at least five times; empty where "
    "none were recorded",
    "histogram": "how often each distinct strength occurs, per layer; special tokens apart",
    "files": "what was read of each file of the corpus, and what was lost; files left out for "
    "their ending as well",
    "sources": "tokens and HIGH tokens of each source, with their histogram; empty where the run "
    "has none",
    "screened": "the strangest documents, with reasons; empty where the run was not screened",
    "movers": "every type here or in the baseline, and how it moved; empty without a baseline",
    "drift": "distances of the strengths from the baseline, whole and by source; empty without a "
    "baseline",
    "class_drift": "classes here and in the baseline; empty without a baseline",
    "shards": "where the files are and how many rows they hold",
    "run": "the run itself: one row",
}
"""Descriptions of the views, by name."""
DERIVED = ("tokens", "documents", "words", "classes", "token_neurons", "neuron_types")
"""Views that are read from files; the others are small tables."""
MACROS = {
    "kwic(word, n := 5, most := NULL)": "where a word occurs, with n words before and after; most: "
    "enough for a look",
    "document_text(document)": "a document put together from its words",
}
"""Descriptions of the macros, by signature."""

PIECES = 4
"""Largest number of tokens of a word that window functions join; longer words are grouped."""
SLICES = 16
"""Largest number of parts in which ``words`` reads a run.

Parts are read in parallel. A query for one document reads only its part.
"""
SLICE_TOKENS = 1 << 21
"""Smallest number of tokens in a part of ``words``: planning a part costs time too."""
FAR_TOKENS = 1 << 18
"""Largest number of tokens on each side of a word that ``kwic`` reads."""
CONTEXT_CHARS = 10_000
"""Largest number of characters on each side that ``kwic`` returns, for up to 100 words."""
SPACES = "'\u0120', '\u2581'"
"""SQL list of the marks for the space before a word, in byte-level BPE and in SentencePiece."""
CONTINUES = SPECIAL | WORD_START
"""Mask of the flags that a token which continues a word does not have."""


class File(NamedTuple):
    """One shard's file of a table."""

    path: str  # SQL of its path
    doc_offset: int  # run-wide number of its first document
    n_documents: int
    n_tokens: int
    folder: str | None
    """Unique folder of its shard, for catalogs: DuckDB before 1.3 does not number files.

    None for queries in the package's own process.
    """


def _rows(files: Sequence[File]) -> str:
    """SQL of the rows of ``files`` in order, with run-wide ``doc`` and the ``file`` and ``row``."""
    paths, offsets = ", ".join(f.path for f in files), ", ".join(str(f.doc_offset) for f in files)
    numbered = (
        f"SELECT *, file_index AS file, file_row_number AS row FROM read_parquet([{paths}], "  # noqa: S608
        f"{PLAIN})"
    )
    if files[0].folder is not None:
        folders = ", ".join(f"'{f.folder}'" for f in files)
        numbered = (
            "SELECT * EXCLUDE (filename, file_row_number), file_row_number AS row, "  # noqa: S608
            f"list_position([{folders}], string_split(filename, '/')[-2]) - 1 AS file "
            f"FROM read_parquet([{paths}], {PLAIN}, filename = true, file_row_number = true)"
        )
    return (
        f"(SELECT * REPLACE (([{offsets}]::BIGINT[])[file::BIGINT + 1] + doc AS doc) FROM "  # noqa: S608
        f"({numbered}))"
    )


PLAIN = "hive_partitioning = false"
"""Options of ``read_parquet``: folder names are no columns."""


class NeuronFiles(NamedTuple):
    """Files with a run's neurons."""

    layers: Sequence[int]
    tokens: Sequence[File]  # files of ``token_neurons``
    types: str  # SQL of the path of the run's table ``neuron_types``


def statements(
    tokens: Sequence[File],
    documents: Sequence[File],
    layers: Sequence[int],
    quartiles: Mapping[int, Mapping[str, Any]],
    others: Sequence[Series],
    neurons: NeuronFiles | None,
    offsets: bool,
    tagged: bool,
) -> list[str]:
    """SQL statements that create the views and macros.

    The run's small tables must exist under the names of their views. ``quartiles`` has, by layer,
    the thresholds that label tokens, for the population of all tokens. ``others`` are the recorded
    series beside strength; ``neurons`` are the files of recorded neurons, or None. ``offsets``:
    tokens have ``start`` and ``end``. ``tagged``: tokens have ``tag``.
    """
    # A token that occurs both as text and as a special token has two vocabulary rows with the same
    # text.
    is_spaced = f"any_value(token)[1] IN ({SPACES}) AS is_spaced"
    made = [
        "CREATE TABLE internal.types AS SELECT token_id, any_value(token) AS token, "  # noqa: S608
        "any_value(text) AS text, "
        f"{is_spaced}, any_value(class) FILTER (class <> 'special') AS class FROM vocabulary GROUP "
        "BY token_id",
        "CREATE VIEW tokens AS "
        f"{tokens_view(_rows(tokens), layers, quartiles, others, offsets, tagged)}",
        f"CREATE VIEW documents AS {documents_view(_rows(documents), layers, others)}",
        f"CREATE VIEW words AS {words_view(tokens, layers, quartiles, offsets, tagged)}",
        f"CREATE VIEW classes AS {classes_view(layers, tagged)}",
        "CREATE MACRO kwic(word, n := 5, most := NULL) AS TABLE "
        f"{kwic_macro(tokens, layers, quartiles, offsets)}",
        f"CREATE MACRO document_text(document) AS ({document_text_macro(_rows(tokens), offsets)})",
        f"CREATE VIEW token_neurons AS {token_neurons_view(neurons)}",
        f"CREATE VIEW neuron_types AS {neuron_types_view(neurons)}",
    ]
    made += [
        f"COMMENT ON {'VIEW' if n in DERIVED else 'TABLE'} {n} IS '{text}'"
        for n, text in VIEWS.items()
    ]
    return made


# --- tokens and documents ---


def is_high(strength: str, q3: str) -> str:
    """SQL of whether ``strength`` is HIGH: at or above ``q3``, the Q3 of the thresholds that label.

    It is NULL if ``q3`` is NULL, because a run without normal tokens has no HIGH ones.
    """
    return f"{strength} >= {q3}"


def _exact(value: float | None, kind: str) -> str:
    """SQL of ``value`` as ``kind``, without loss."""
    # DuckDB reads text as the nearest FLOAT, which is the value itself. It would read a bare
    # number as DECIMAL first.
    return f"NULL::{kind}" if value is None else f"'{value!r}'::{kind}"


def tokens_view(
    source: str,
    layers: Sequence[int],
    quartiles: Mapping[int, Mapping[str, Any]],
    others: Sequence[Series],
    offsets: bool,
    tagged: bool,
) -> str:
    """SQL of the ``tokens`` view over ``source``."""
    columns = [
        "doc",
        "position",
        "token_id",
        "token",
        "text",
        "surface",
        *(["tag"] if tagged else []),
        f"flags & {SPECIAL} <> 0 AS is_special",
        f"flags & {WORD_START} <> 0 AS is_word_start",
        f"flags & {REPLACED} <> 0 AS is_replaced",
        *(("start", '"end"') if offsets else ()),
    ]
    for k in layers:
        row = quartiles[k]
        strength = f"strength_{k}"
        q1, q2, q3 = (_exact(row[q], "FLOAT") for q in ("q1", "q2", "q3"))
        sink = None if row["q2"] is None else row["sink_factor"] * row["q2"]
        columns += [
            strength,
            f"CASE WHEN is_special OR {q3} IS NULL THEN NULL WHEN {strength} < {q1} THEN 1 "
            f"WHEN {strength} < {q2} THEN 2 WHEN {strength} < {q3} THEN 3 ELSE 4 END::TINYINT AS "
            f"quartile_{k}",
            f"CASE WHEN NOT is_special THEN {is_high(strength, q3)} END AS high_{k}",
            f"CASE WHEN NOT is_special THEN {strength}::DOUBLE > {_exact(sink, 'DOUBLE')} END AS "
            f"sink_{k}",
        ]
    columns += [s.name for s in others]
    return f"SELECT {', '.join(columns)} FROM {source} LEFT JOIN internal.types USING (token_id)"  # noqa: S608


def documents_view(source: str, layers: Sequence[int], others: Sequence[Series]) -> str:
    """SQL of the ``documents`` view over ``source``."""
    means = "".join(f", mean_{s.name}" for s in [*(Series(STRENGTH, k) for k in layers), *others])
    return f"""
        SELECT doc, coalesce(doc_id, left(lower(hex(text_sha256)), 16)) AS doc_id, source, "offset",
            n_tokens, n_windows, n_chars, n_replaced, lost_bytes, lost_documents,
            lower(hex(text_sha256)) AS text_sha256, status{means}
        FROM {source}"""  # noqa: S608


def token_neurons_view(neurons: NeuronFiles | None) -> str:
    """SQL of the ``token_neurons`` view."""
    if neurons is None:
        return "SELECT NULL::BIGINT AS doc, NULL::INTEGER AS position WHERE false"
    columns = ", ".join(["doc", "position", *(f"neurons_{k}" for k in neurons.layers)])
    return f"SELECT {columns} FROM {_rows(neurons.tokens)}"  # noqa: S608


def neuron_types_view(neurons: NeuronFiles | None) -> str:
    """SQL of the ``neuron_types`` view."""
    source = "internal.no_neuron_types" if neurons is None else f"read_parquet({neurons.types})"
    return (
        "SELECT layer, neuron, token_id, text, n, share, mean, largest, lift "  # noqa: S608
        f"FROM {source} LEFT JOIN internal.types USING (token_id)"
    )


# --- classes ---


def classes_view(layers: Sequence[int], tagged: bool) -> str:
    """SQL of the ``classes`` view.

    It first counts equal values, so memory does not grow with the number of tokens.
    """
    source, name = "tokens", f"coalesce(tag, '{UNTAGGED}')"
    if not tagged:
        guessed = "SELECT DISTINCT token_id, class FROM vocabulary WHERE class <> 'special'"
        source, name = f"tokens JOIN ({guessed}) USING (token_id)", "class"
    z2 = f"{Z_95**2!r}::DOUBLE"
    centre = f"(n_high / n + {z2} / (2 * n))"
    half = f"sqrt({z2} * (n_high / n * (1 - n_high / n) + {z2} / (4 * n)) / n)"
    of_layers = " UNION ALL ".join(
        f"""
        SELECT {k}::SMALLINT AS layer, class, sum(n)::BIGINT AS n, sum(n_high)::BIGINT AS n_high,
            sum(value::DOUBLE * n) / sum(n) AS mean, min(value) FILTER (4 * upto >= total) AS q1,
            min(value) FILTER (2 * upto >= total) AS q2, min(value) FILTER (4 * upto >= 3 * total) AS q3
        FROM (
            SELECT *, sum(n) OVER (PARTITION BY class ORDER BY value) AS upto, sum(n) OVER (PARTITION BY class) AS total
            FROM (
                SELECT {name} AS class, strength_{k} AS value, count(*) AS n, count(*) FILTER (high_{k}) AS n_high
                FROM {source} WHERE NOT is_special GROUP BY ALL
            )
        ) GROUP BY class"""  # noqa: S608
        for k in layers
    )
    return f"""
        SELECT layer, class, n, n_high, n_high / n AS share_high,
            CASE n_high WHEN 0 THEN 0 ELSE greatest(0, ({centre} - {half}) / (1 + {z2} / n)) END AS share_high_low,
            CASE n_high WHEN n THEN 1 ELSE least(1, ({centre} + {half}) / (1 + {z2} / n)) END AS share_high_high,
            mean, q1, q2, q3
        FROM ({of_layers})"""  # noqa: S608


# --- words ---
#
# A word starts at a token with the word-start flag, and at the first normal token of a document.


def words_view(
    files: Sequence[File],
    layers: Sequence[int],
    quartiles: Mapping[int, Mapping[str, Any]],
    offsets: bool,
    tagged: bool,
) -> str:
    """SQL of the ``words`` view: one pass over the rows in their order.

    Memory does not grow with the rows: window functions without partition or order stream, if
    their input has no join. DuckDB does not push a filter through such a window. So the run is read
    in parts with known documents, and a query for one document reads one part.
    """
    parts = []
    for part in _parts(files):
        last = part[-1].doc_offset + part[-1].n_documents
        words = _words(part, layers, quartiles, offsets, tagged)
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


def _words(
    files: Sequence[File],
    layers: Sequence[int],
    quartiles: Mapping[int, Mapping[str, Any]],
    offsets: bool,
    tagged: bool,
) -> str:
    """SQL of the words of ``files``.

    Window functions join words of up to ``PIECES`` tokens; longer words are grouped. A word has the
    tag of its first token, and the class of that token's type.
    """
    rows, portable = _rows(files), files[0].folder is not None
    strengths = [f"strength_{k}" for k in layers]
    columns = ["token_id", *strengths, *(['"end"'] if offsets else [])]
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
    if tagged:
        short += ["tag"]
        long += ["any_value(tag) FILTER (place = 0) AS tag"]
    if offsets:
        last = by_length(lambda places: _piece('"end"', places[-1]))
        short += ["start", f'{last} AS "end"']
        long += ["min(start) AS start", 'max("end") AS "end"']
    for k, s in zip(layers, strengths, strict=True):
        q3 = _exact(quartiles[k]["q3"], "FLOAT")
        high = f"{is_high(f'max_strength_{k}', q3)} AS high_{k}"
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
        SELECT {key}, number, min(row) AS row, max(row) AS last_row, any_value(gap ORDER BY position) AS gap,
            coalesce(max(surface), ltrim(string_agg(text, '' ORDER BY position))) AS text{also}
        FROM (
            SELECT *, count(*) FILTER (flags & {WORD_START} <> 0) OVER w AS number, {gap} AS gap
            FROM ({rows}) WHERE flags & {SPECIAL} = 0 WINDOW w AS (PARTITION BY {key} ORDER BY position)
        ) GROUP BY {key}, number"""  # noqa: S608


def document_text_macro(rows: str, offsets: bool) -> str:
    """SQL of the text of the document numbered ``document``."""
    of_document = (
        f"SELECT t.*, s.text, s.is_spaced FROM {rows} t JOIN internal.types s USING (token_id) "  # noqa: S608
        "WHERE t.doc = document"
    )
    words = _spelled(of_document, "doc", offsets)
    return f"SELECT ltrim(string_agg(gap || text, '' ORDER BY number)) FROM ({words})"  # noqa: S608


# --- keyword in context ---


def kwic_macro(
    files: Sequence[File],
    layers: Sequence[int],
    quartiles: Mapping[int, Mapping[str, Any]],
    offsets: bool,
) -> str:
    """SQL of the occurrences of ``word`` with ``n`` words on both sides.

    With ``most`` it returns at most that many early occurrences. The query never sorts the run: it
    finds token ids in the vocabulary, first tokens of the word (heads) by a scan, and the context
    by row numbers. The first ``20 * most + 1000`` heads are nearly always enough for ``most``. Only
    if too many of them begin other words, all heads are read.
    """
    rows, portable = _rows(files), files[0].folder is not None
    some = _occurrences(rows, "some", "most IS NOT NULL", "LIMIT coalesce(20 * most + 1000, 0)")
    every = _occurrences(
        rows, "every", "coalesce((SELECT count(*) FROM some_found) < most, true)", ""
    )
    words = "greatest(n, 0)::BIGINT"
    # Most tokens of the word: a byte tokenizer may need four for one character.
    most_tokens = "4 * length(word)"
    places = ', min(start) AS start, max("end") AS "end"' if offsets else ""
    strengths = "".join(
        f", max(strength_{k}) AS max_strength_{k}, avg(strength_{k}) AS mean_strength_{k}"
        f", arg_min(strength_{k}, position) AS first_strength_{k}"
        f", {is_high(f'max(strength_{k})', _exact(quartiles[k]['q3'], 'FLOAT'))} AS high_{k}"
        for k in layers
    )
    names = ["n_tokens", *(["start", '"end"'] if offsets else [])]
    names += [
        f"{x}_{k}"
        for k in layers
        for x in ("max_strength", "mean_strength", "first_strength", "high")
    ]
    also = f", min(position) AS position, count(*) AS n_tokens{places}{strengths}"
    place = "number - max(number) FILTER (row = head) OVER (PARTITION BY file, head, doc) AS place"

    def near(heads: str, beside: str, ends: str = "") -> str:
        """SQL of the tokens up to ``beside`` before and after the words at ``heads``."""
        around = (
            f"SELECT file, row AS head, row + unnest(range(-{beside}, {most_tokens} + {beside} + "  # noqa: S608
            "1)) AS near "
            f"FROM {heads}"
        )
        return f"""
            SELECT f.head, t.*, s.text, s.is_spaced{ends}
            FROM {rows} t JOIN {_few(around)} f ON t.file = f.file AND t.row = f.near
            JOIN internal.types s USING (token_id)"""  # noqa: S608

    def numbered(heads: str, beside: str) -> str:
        """SQL of the words in the ``beside`` tokens on both sides of ``heads``.

        ``place`` is the number of a word relative to the head's word, which has 0.
        """
        of_ends = {
            "first_row": "min(t.row)",
            "first_position": "min(t.position)",
            "end_row": "max(t.row)",
        }
        window = "OVER (PARTITION BY t.file, f.head, t.doc)"
        tokens = near(
            heads, beside, "".join(f", {sql} {window} AS {name}" for name, sql in of_ends.items())
        )
        spelled = _spelled(
            tokens,
            "file, head, doc",
            offsets,
            also + "".join(f", any_value({name}) AS {name}" for name in of_ends),
        )
        return f"""
            SELECT *, first_row = head - {beside} AND first_position > 0 AS begins_before,
                end_row = head + {most_tokens} + {beside} AS ends_behind,
                begins_before AND number = 0 AS is_cut_before, ends_behind AND last_row = end_row AS is_cut_behind
            FROM (SELECT *, {place} FROM ({spelled})) WHERE place IS NOT NULL"""  # noqa: S608

    def side(which: str, cut: str) -> str:
        """SQL of the context on one side, shortened by ``cut`` if it is too long."""
        text = (
            f"coalesce(ltrim(string_agg(gap || text, '' ORDER BY place) FILTER (place {which} 0)), "
            "'')"
        )
        return f"CASE WHEN length({text}) > {chars} THEN {cut.format(f'({text})')} ELSE {text} END"

    chars = f"greatest({CONTEXT_CHARS}, 100 * {words})"
    found = f"""
            SELECT doc, any_value(COLUMNS([{", ".join(repr(c.strip(chr(34))) for c in ("position", "text", *names))}]))
                    FILTER (place = 0),
                {side("<", f"'…' || right({{}}, {chars})")} AS left_context,
                {side(">", f"left({{}}, {chars}) || '…'")} AS right_context
            FROM chosen WHERE abs(place) <= n GROUP BY file, head, doc"""  # noqa: S608
    far = f"least(256 * {words} + 1024, {FAR_TOKENS})"
    whole = (
        "CASE WHEN is_cut_before THEN '…' ELSE '' END || text "
        "|| CASE WHEN is_cut_behind THEN '…' ELSE '' END AS text"
    )
    # Read few tokens first, and more only for occurrences that lack words. A catalog reads once:
    # before DuckDB 1.4 the plan of two steps takes half a minute.
    beside = f"least(64 * {words} + 256, {FAR_TOKENS})"
    chosen = f"""
        chosen AS (
            SELECT *, {place} FROM ({_spelled(near("found", beside), "file, head, doc", offsets, also)})
            WHERE number > 0 AND last_row < head + {most_tokens} + {beside}
        )"""  # noqa: S608
    if not portable:
        chosen = f"""
        close AS MATERIALIZED ({numbered("found", f"least(4 * {words} + 16, {FAR_TOKENS})")}),
        lacking AS MATERIALIZED (
            SELECT file, head AS row FROM close GROUP BY file, head
            HAVING count(*) FILTER (place < 0 AND NOT is_cut_before) < n AND bool_or(begins_before)
                OR count(*) FILTER (place > 0 AND NOT is_cut_behind) < n AND bool_or(ends_behind)
        ),
        chosen AS (
            SELECT c.* FROM close c ANTI JOIN lacking l ON c.file = l.file AND c.head = l.row
            UNION ALL SELECT * REPLACE ({whole}) FROM ({numbered("lacking", far)})
        )"""  # noqa: S608
    return f"""
        WITH {some}, {every},
        found AS MATERIALIZED (
            SELECT DISTINCT file, row FROM (FROM some_found UNION ALL FROM every_found) ORDER BY file, row LIMIT most
        ),
        {chosen}
        SELECT doc, doc_id, source, position, left_context, k.text, right_context, {", ".join(names)}
        FROM (SELECT doc, doc_id, source FROM documents) JOIN {_few(found)} k USING (doc) ORDER BY doc, position"""  # noqa: S608


def _few(rows: str) -> str:
    """``rows`` in a form that DuckDB estimates as one row.

    So a join with the tokens builds its hash table from ``rows``. DuckDB cannot estimate how many
    rows a scan finds. If it expects more rows than there are tokens, it builds the hash table from
    all tokens, which takes 5 GB for 100 M tokens, even if nothing is found.
    """
    return f"(SELECT one.* FROM (SELECT unnest(list(of_these)) AS one FROM ({rows}) of_these))"  # noqa: S608


def _occurrences(rows: str, name: str, wanted: str, limit: str) -> str:
    """SQL of the steps from the vocabulary to ``<name>_found``: file and row of the word's heads.

    A head is a token that starts the word. Its surface is the word; or it has no surface, and its
    text with the texts of the tokens that continue it is the word. If ``wanted`` is false, nothing
    is scanned, because a join with no rows ends at once.
    """
    pieces = (
        "SELECT file, row AS head, row + unnest(range(0, 4 * length(word) + 1)) AS near "  # noqa: S608
        f"FROM {name}_longer WHERE NOT is_whole"
    )
    return f"""
        {name}_types AS MATERIALIZED (
            SELECT token_id, lower(text) = lower(word) AS is_whole FROM internal.types
            WHERE text <> '' AND starts_with(lower(word), lower(text)) AND {wanted}
        ),
        {name}_written AS MATERIALIZED (
            SELECT file, row FROM {rows}, (SELECT 1 WHERE {wanted}) WHERE lower(surface) = lower(word) {limit}
        ),
        {name}_heads AS MATERIALIZED (
            SELECT file, row, is_whole FROM {rows} JOIN {name}_types USING (token_id)
            WHERE flags & {CONTINUES} = {WORD_START} AND surface IS NULL {limit}
        ),
        {name}_longer AS MATERIALIZED (
            SELECT file, h.row, is_whole
            FROM {rows} t JOIN {_few(f"SELECT *, row + 1 AS next FROM {name}_heads")} h USING (file)
            WHERE t.row = h.next AND flags & {CONTINUES} = 0
        ),
        {name}_found AS MATERIALIZED (
            FROM {name}_written
            UNION ALL SELECT file, row FROM {name}_heads h ANTI JOIN {name}_longer USING (file, row) WHERE h.is_whole
            UNION ALL SELECT file, head AS row FROM (
                SELECT h.file, head, t.row, s.text,
                    min(t.row) FILTER (t.row > head AND flags & {CONTINUES} <> 0) OVER (PARTITION BY h.file, head)
                        AS stop
                FROM {rows} t JOIN {_few(pieces)} h ON t.file = h.file AND t.row = h.near
                JOIN internal.types s USING (token_id)
            ) WHERE row < stop OR stop IS NULL
            GROUP BY ALL HAVING lower(string_agg(text, '' ORDER BY row)) = lower(word)
        )"""  # noqa: S608
