"""The SQL of a run's views and macros.

It contains only text and numbers of this package, never text from a corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from afn_ray.classes import UNTAGGED
from afn_ray.query.expressions import (
    RecordedColumns,
    ShardFile,
    answerable,
    answerable_value,
    exact,
    is_high,
    quoted,
    rows_of,
    tokens_of,
    wilson,
)
from afn_ray.query.kwic import document_text_macro, kwic_macro
from afn_ray.query.words import TEXTS_BY_ID, words_view
from afn_ray.schema import (
    HASH_ID_CHARS,
    LANGUAGE,
    NOT_KEPT,
    REPLACED,
    SPECIAL,
    STRENGTH,
    WORD_START,
    Series,
)
from afn_ray.token_rows import HIGH, NO_TOKENS, NO_WORDS, SAMPLE

VIEWS = {
    "tokens": "one row per token of the corpus, special tokens included",
    "documents": "one row per document read",
    "vocabulary": "statistics of every type (token_id) that occurs, per layer",
    "word_salience": "the same as salience, of the words of word_vocabulary that have a row",
    "salience": "how often every type is HIGH, and how often its frequency, positions and "
    "documents alone would make it so, per layer; empty where the run was not screened",
    "classes": "classes by their tokens, per layer: by the tokens own tags where the corpus is "
    "labelled",
    "words": "one row per word with the strengths of its tokens; special tokens belong to none",
    "word_vocabulary": "statistics of every word that occurs often enough, in lower case, per "
    "layer; rarer ones by their first piece and class; empty where the run was not screened",
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
    "moments": "how the second moment of the states of a frequent type splits into mean and "
    "variance, per layer; empty without mean_vectors",
    "mean_vectors": "the mean state of each of these types, per layer; empty without mean_vectors",
    "histogram": "how often each distinct strength occurs, per layer; special tokens apart",
    "files": "what was read of each file of the corpus, and what was lost; files left out for "
    "their ending as well",
    "kept": "columns of the corpus that documents carries, with how many documents have a value; "
    "empty where none were kept",
    "languages": "words in documents of each detected language; empty where --language named one",
    "sources": "tokens and HIGH tokens of each source, with their histogram; empty where the run "
    "has none",
    "groups": "tokens and thresholds of each group of documents, per layer; empty where the run is "
    "not grouped",
    "group_classes": "classes of each group by the classes of its types, per layer; empty where "
    "the run is not grouped",
    "screened": "the strangest documents, with reasons; empty where the run was not screened",
    "strange": "how many documents are as strange as that, of all, by source and group; empty "
    "where none is, or the run was not screened",
    "copied": "documents with tokens, and how many are copies of earlier ones, by source and "
    "group; empty where the run was not screened",
    "movers": "every type here or in the baseline, and how it moved; empty without a baseline",
    "word_movers": "every word that is frequent enough here and in the baseline, and how it moved, "
    "and new and vanished ones; empty without a baseline",
    "drift": "distances of the strengths from the baseline, whole and by source; empty without a "
    "baseline",
    "class_drift": "classes here and in the baseline; empty without a baseline",
    "group_drift": "distances of the strengths from the baseline by group; empty without a "
    "baseline of the same groups",
    "group_class_drift": "classes of each group here and in the baseline; empty without a baseline "
    "of the same groups",
    "group_movers": "the types that moved most in each group; empty without a baseline of the same "
    "groups",
    "history": "complete runs of the series of this run, per layer and group, with the verdicts of "
    "audits",
    "shards": "where the files are and how many rows they hold",
    "run": "the run itself: one row",
}
"""Descriptions of the views, by name."""


def described(view: str, record: str) -> str:
    """Description of a view of a run whose config has ``record``: of the rows that it keeps."""
    kind, _, share = record.partition(":")
    if kind == HIGH and view == "tokens":
        return "one row per token that is HIGH at one of the layers; special tokens are left out"
    if kind == SAMPLE and view in ("tokens", "words", "classes"):
        text = VIEWS[view].replace(" of the corpus, ", ", ")
        return f"{text}; of a sample of {share} of the documents"
    return VIEWS[view]


DERIVED = (
    "tokens",
    "documents",
    "words",
    "word_vocabulary",
    "classes",
    "salience",
    "word_salience",
    "token_neurons",
    "neuron_types",
    "mean_vectors",
)
"""Views that are read from files; the others are small tables."""
MACROS = {
    "kwic(word, n := 5, most := NULL)": "where a word occurs, with n words before and after; most: "
    "enough for a look",
    "document_text(document)": "a document put together from its words",
}
"""Descriptions of the macros, by signature."""

SPACES = "'\u0120', '\u2581'"
"""SQL list of the marks for the space before a word, in byte-level BPE and in SentencePiece."""


class NeuronFiles(NamedTuple):
    """Files with a run's neurons."""

    layers: Sequence[int]
    tokens: Sequence[ShardFile]  # files of ``token_neurons``
    types: str  # SQL of the path of the run's table ``neuron_types``


def statements(
    tokens: Sequence[ShardFile],
    documents: Sequence[ShardFile],
    neurons: NeuronFiles | None,
    recorded: RecordedColumns,
) -> dict[str, list[str]]:
    """SQL statements that create the views and macros and comment on views, by their names.

    They need the run's small tables under the names of their views. ``neurons`` are the files of
    recorded neurons, or None.
    """
    # A token that occurs both as text and as a special token has two vocabulary rows with the same
    # text.
    is_spaced = f"any_value(token)[1] IN ({SPACES}) AS is_spaced"
    rows = tokens_of(tokens, recorded.offsets)
    views = {
        "tokens": tokens_view(rows, recorded),
        "documents": documents_view(rows_of(documents), recorded),
        "words": words_view(tokens, documents, recorded),
        "word_vocabulary": f"FROM {_table_of(recorded.word_table, 'no_words')}",
        "classes": classes_view(rows, recorded),
        "salience": SALIENCE_VIEW,
        "word_salience": WORD_SALIENCE_VIEW,
        "token_neurons": token_neurons_view(neurons, recorded),
        "neuron_types": neuron_types_view(neurons),
        "mean_vectors": mean_vectors_view(recorded.mean_vectors),
    }
    made = {
        "internal.types": [
            "CREATE TABLE internal.types AS SELECT token_id, "  # noqa: S608
            "any_value(token) AS token, any_value(text) AS text, "
            f"{is_spaced}, any_value(class) FILTER (class <> 'special') AS class FROM vocabulary "
            "GROUP BY token_id"
        ],
        "internal.texts_by_id": [f"CREATE TABLE internal.texts_by_id AS {TEXTS_BY_ID}"],
    }
    made |= {name: [f"CREATE VIEW {name} AS {sql}"] for name, sql in views.items()}
    for name, text in VIEWS.items():
        kind = "VIEW" if name in DERIVED else "TABLE"
        made.setdefault(name, []).append(f"COMMENT ON {kind} {name} IS '{text}'")
    return made | _macros(tokens, recorded)


def _macros(tokens: Sequence[ShardFile], recorded: RecordedColumns) -> dict[str, list[str]]:
    """SQL statements that create the macros over the views, by name."""
    kwic = answerable(kwic_macro(tokens, recorded), recorded, NO_WORDS)
    rows = tokens_of(tokens, recorded.offsets)
    text = document_text_macro(rows, recorded.offsets)
    text = answerable_value(text, recorded, NO_WORDS)
    return {
        "kwic": [f"CREATE MACRO kwic(word, n := 5, most := NULL) AS TABLE {kwic}"],
        "document_text": [f"CREATE MACRO document_text(document) AS ({text})"],
    }


# --- tokens and documents ---


def tokens_view(source: str, recorded: RecordedColumns) -> str:
    """SQL of the ``tokens`` view over ``source``."""
    return answerable(_token_rows(source, recorded), recorded, NO_TOKENS)


def _token_rows(source: str, recorded: RecordedColumns) -> str:
    """SQL of the rows of ``tokens``, also where the run did not record them: none."""
    columns = ["doc", "position", "token_id", "token", "text", "surface"]
    if recorded.tagged:
        columns.append("tag")
    columns += [
        f"flags & {SPECIAL} <> 0 AS is_special",
        f"flags & {WORD_START} <> 0 AS is_word_start",
        f"flags & {REPLACED} <> 0 AS is_replaced",
    ]
    if recorded.offsets:
        columns += ["start", '"end"']
    for layer in recorded.layers:
        columns += _layer_columns(layer, recorded)
    joined = "LEFT JOIN internal.types USING (token_id)"
    if recorded.own_q3 is not None:
        joined += f" LEFT JOIN {recorded.own_q3} AS own USING (doc)"
        for k in recorded.layers:
            is_own = is_high(f"strength_{k}", f"own.q3_{k}")
            columns.append(f"CASE WHEN NOT is_special THEN {is_own} END AS high_own_{k}")
    columns += [s.name for s in recorded.others]
    view = f"SELECT {', '.join(columns)} FROM {source} {joined}"  # noqa: S608
    if recorded.copies is not None:
        view += f" WHERE true{recorded.and_counts}"
    return view


def _layer_columns(layer: int, recorded: RecordedColumns) -> list[str]:
    """SQL of the columns of one layer in ``tokens``: strength, quartile, high and sink."""
    strength = f"strength_{layer}"
    q1, q2, q3 = (recorded.quartile(name, layer) for name in ("q1", "q2", "q3"))
    row = recorded.thresholds[layer]
    sink = None if row["q2"] is None else row["sink_factor"] * row["q2"]
    return [
        strength,
        f"CASE WHEN is_special OR {q3} IS NULL THEN NULL WHEN {strength} < {q1} THEN 1 "
        f"WHEN {strength} < {q2} THEN 2 WHEN {strength} < {q3} THEN 3 ELSE 4 END::TINYINT AS "
        f"quartile_{layer}",
        f"CASE WHEN NOT is_special THEN {is_high(strength, q3)} END AS high_{layer}",
        f"CASE WHEN NOT is_special THEN {strength}::DOUBLE > {exact(sink, 'DOUBLE')} END AS "
        f"sink_{layer}",
    ]


def documents_view(source: str, recorded: RecordedColumns) -> str:
    """SQL of the ``documents`` view over ``source``."""
    series = [Series(STRENGTH, layer) for layer in recorded.layers]
    series += recorded.others
    means = "".join(f", mean_{s.name}" for s in series)
    # Qualified, since a kept column may have the name of a parameter of a macro that reads this.
    kept = "".join(f", r.{quoted(name)}" for name in recorded.kept)
    if recorded.kept:
        kept += f", {NOT_KEPT}"
    files = {"duplicate_of": recorded.copies, "near_duplicate_of": recorded.near_copies}
    columns, joined = list[str](), ""
    if recorded.detected:
        columns.append(LANGUAGE)
    elif LANGUAGE not in map(str.lower, recorded.kept):  # an older run may have kept such a column
        columns.append(f"NULL::VARCHAR AS {LANGUAGE}")
    for name, path in files.items():
        columns.append(f"NULL::BIGINT AS {name}" if path is None else name)
        if path is not None:
            joined += (
                f" LEFT JOIN (SELECT doc, {name} FROM "  # noqa: S608
                f"read_parquet({path}){recorded.of_docs}) USING (doc)"
            )
    others = ", ".join(columns)
    return f"""
        SELECT doc, coalesce(doc_id, left(lower(hex(text_sha256)), {HASH_ID_CHARS})) AS doc_id,
          source, "offset",
            n_tokens, n_windows, n_chars, n_replaced, lost_bytes, lost_documents,
            lower(hex(text_sha256)) AS text_sha256, status, {others}{means}{kept}
        FROM {source} AS r{joined}"""  # noqa: S608


def token_neurons_view(neurons: NeuronFiles | None, recorded: RecordedColumns) -> str:
    """SQL of the ``token_neurons`` view."""
    if neurons is None:
        return "SELECT NULL::BIGINT AS doc, NULL::INTEGER AS position WHERE false"
    columns = ", ".join(["doc", "position", *(f"neurons_{k}" for k in neurons.layers)])
    view = f"SELECT {columns} FROM {rows_of(neurons.tokens)}"  # noqa: S608
    return view if recorded.copies is None else f"{view} WHERE true{recorded.and_counts}"


def neuron_types_view(neurons: NeuronFiles | None) -> str:
    """SQL of the ``neuron_types`` view."""
    source = _table_of(None if neurons is None else neurons.types, "no_neuron_types")
    return (
        "SELECT layer, neuron, token_id, text, n, share, mean, largest, lift "  # noqa: S608
        f"FROM {source} LEFT JOIN internal.types USING (token_id)"
    )


def _table_of(path: str | None, empty: str) -> str:
    """SQL of the rows of the run's table at ``path``; None: those of ``internal.<empty>``."""
    return f"internal.{empty}" if path is None else f"read_parquet({path})"


def mean_vectors_view(path: str | None) -> str:
    """SQL of the ``mean_vectors`` view; ``path`` is the SQL of the table's path, None for none."""
    return (
        "SELECT layer, token_id, text, n, mean FROM "  # noqa: S608
        f"{_table_of(path, 'no_mean_vectors')} LEFT JOIN internal.types USING (token_id)"
    )


# --- classes ---

CLASSES_OF_TYPES = (
    "SELECT layer, class, sum(n) AS n, sum(n_high) / sum(n) AS share_high FROM vocabulary "
    "WHERE class <> 'special' GROUP BY ALL"
)
"""Query of classes as ``afn show`` has them: by the types of the vocabulary, without quartiles."""


def classes_view(rows: str, recorded: RecordedColumns) -> str:
    """SQL of the ``classes`` view; ``rows`` is the source of ``tokens``.

    It first counts equal values, so memory does not grow with the number of tokens.
    """
    # The view ``tokens`` may have an error of its own, and of two errors either comes first.
    tokens = f"({_token_rows(rows, recorded)})" if recorded.record in NO_WORDS else "tokens"
    source, name = tokens, f"coalesce(tag, '{UNTAGGED}')"
    if not recorded.tagged:
        guessed = "SELECT DISTINCT token_id, class FROM vocabulary WHERE class <> 'special'"
        source, name = f"{tokens} JOIN ({guessed}) USING (token_id)", "class"
    low, high = wilson("n_high", "n")
    of_layers = " UNION ALL ".join(
        f"""
        SELECT {k}::SMALLINT AS layer, class, sum(n)::BIGINT AS n, sum(n_high)::BIGINT AS n_high,
            sum(value::DOUBLE * n) / sum(n) AS mean, min(value) FILTER (4 * upto >= total) AS q1,
            min(value) FILTER (2 * upto >= total) AS q2,
              min(value) FILTER (4 * upto >= 3 * total) AS q3
        FROM (
            SELECT *, sum(n) OVER (PARTITION BY class ORDER BY value) AS upto,
              sum(n) OVER (PARTITION BY class) AS total
            FROM (
                SELECT {name} AS class, strength_{k} AS value, count(*) AS n,
                  count(*) FILTER (high_{k}) AS n_high
                FROM {source} WHERE NOT is_special GROUP BY ALL
            )
        ) GROUP BY class"""  # noqa: S608
        for k in recorded.layers
    )
    view = f"""
        SELECT layer, class, n, n_high, n_high / n AS share_high,
            {low} AS share_high_low,
            {high} AS share_high_high,
            mean, q1, q2, q3
        FROM ({of_layers})"""  # noqa: S608
    return answerable(view, recorded, NO_WORDS, CLASSES_OF_TYPES)


# --- salience ---


def _salience_view(key: str, columns: str, source: str) -> str:
    """SQL of a view of salience; ``key`` names a row of ``source`` at a layer."""
    low, high = wilson("share_high * n_effective", "n_effective")
    ranks = ", ".join(
        f"row_number() OVER (PARTITION BY layer ORDER BY {end} DESC, n DESC, {key}) AS {rank}"
        for rank, end in (("rank", "beyond_low"), ("rank_high", "clustered_low"))
    )
    return (
        f"SELECT layer, {ranks}, {columns}, class, n, n_docs, "  # noqa: S608
        "share_high, share_high_low, share_high_high, clustered_low, clustered_high, "
        f"expected, beyond, beyond_low, beyond_high, n_effective FROM ("
        f"SELECT *, {low} AS clustered_low, {high} AS clustered_high FROM {source})"
    )


SALIENCE_VIEW = _salience_view(
    "token_id",
    "token_id, token, text",
    "internal.salience JOIN vocabulary USING (layer, token_id) WHERE class <> 'special'",
)
WORD_SALIENCE_VIEW = _salience_view(
    "word", "word, text", "word_vocabulary WHERE word IS NOT NULL AND expected IS NOT NULL"
)
"""SQL of the views ``salience`` and ``word_salience``.

``rank`` orders rows by how far they are HIGH beyond their frequency, ``rank_high`` by how often
they are HIGH; each by the lower end of its interval, so that no rare type leads by chance. Both
intervals are clustered by document: ``clustered_low`` and ``clustered_high`` are Wilson's of
``n_effective`` tokens, ``share_high_low`` and ``share_high_high`` those of the vocabulary, of ``n``
tokens.
"""

# --- words ---
#
# A word starts at a token with the word-start flag, and at the first normal token of a document.


# --- keyword in context ---
