"""The Arrow schemas of the product's tables, and the names and numbers that stand in them.

In this order: what is recorded of a token; then the tables of a shard, of a run, and of two runs
compared. ``columns`` says how the tables are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from afn_ray.columns import comments_in, fields_of, list_type, name_type, schema_of

SCHEMA_VERSION = 6
"""Version of the stored files: it grows when a table or a JSON file changes its form.

``store.shard_tables`` reads shards of every version in ``READABLE_VERSIONS``.
"""
READABLE_VERSIONS = (5, SCHEMA_VERSION)
"""Versions of stored files that are read; a run may have shards of several."""
VALUES_VERSION = 5
"""Version of the recorded values, part of every measure.

It grows when the same token would be recorded with another value. A measure does not depend on the
form of its files, so that a store of an older ``SCHEMA_VERSION`` goes on.
"""

# --- what is recorded of a token

SPECIAL = 1
"""``flags`` bit 0: the tokenizer's template added the token, which has no text."""
WORD_START = 2
"""``flags`` bit 1: the token starts a word."""
REPLACED = 4
"""``flags`` bit 2: the token covers a U+FFFD that replaced invalid UTF-8 in the source."""

TOKEN_CHARS = 5
"""Characters of text for each token before it that ``start_ahead`` leaves out.

A token starts at ``TOKEN_CHARS * position + start_ahead`` and ends ``length`` later. Where short
documents follow each other, starts fall back far; these numbers hardly do, and take fewer bytes.
"""

STRENGTH = "strength"
"""Signal that decides HIGH labels; every run has its thresholds and vocabulary."""


class Series(NamedTuple):
    """One number per token: a signal at a layer."""

    signal: str  # a signal that gives several numbers has a name for each
    layer: int

    @property
    def name(self) -> str:
        """Name of its column in the tables."""
        return f"{self.signal}_{self.layer}"


def strengths(layers: Sequence[int]) -> tuple[Series, ...]:
    """The strength series at ``layers``."""
    return tuple(Series(STRENGTH, layer) for layer in layers)


def strength_column(layer: int) -> str:
    """Name of the strength column of ``layer``."""
    return Series(STRENGTH, layer).name


HASH_ID_CHARS = 16
"""Hex digits of the SHA-256 of its text that are the id of a document without one."""
MOST_NEURONS = 1 << 16
"""Largest number of neurons in an MLP; neuron numbers are recorded as uint16."""


def neurons_column(layer: int) -> str:
    """Name of the column of ``layer`` in ``token_neurons_schema``."""
    return f"neurons_{layer}"


# Groups of columns that several tables share
_TOKEN_TYPE = (
    "token_id: int32",
    "token: string  # the piece in the tokenizer's notation",
    "text: string  # the piece as plain text",
    "class: string",
)
_DISTRIBUTION = ("mean, sd: float64", "min, q1, q2, q3, max: float32")
_DISTRIBUTION_OR_NULL = tuple(f"{line} or null" for line in _DISTRIBUTION)
_TYPE_IN_CORPUS = (*_TOKEN_TYPE, "n, n_docs: int64", *_DISTRIBUTION)
_HISTOGRAM = ("bins: list of int32", "counts: list of int64")
_LOST_DOCUMENTS = (
    "lost_documents: int64  # from losses of known number",
    "lost_unknown: int64  # losses whose number of documents is unknown",
)
_DAMAGE = (
    "n_quarantined: int64  # rows of documents",
    *_LOST_DOCUMENTS,
    "n_replaced: int64  # U+FFFD for invalid UTF-8",
)

# --- tables of a shard


def tokens_schema(series: Sequence[Series], offsets: bool, tagged: bool = False) -> pa.Schema:
    """Schema of a shard's ``tokens`` table; rows are sorted by (doc_in_shard, position).

    ``tagged``: the corpus is labelled, so the table has a ``tag`` column.
    """
    columns = fields_of(
        "doc_in_shard, position, token_id: int32",
        "flags: uint8",
        "surface: repeated string or null",
        *(["tag: repeated string or null"] if tagged else []),
        *(["start_ahead, length: int32"] if offsets else []),
    )
    values = [pa.field(s.name, pa.float32(), nullable=False) for s in series]
    return pa.schema(columns + values)


LANGUAGE = "detected_language"
"""Column of ``documents`` with their languages, and the way to group by them.

null: a document without text.
"""
UNKNOWN_LANGUAGE = "unknown"
"""Language of a document whose text does not show it."""
NOT_KEPT = "not_kept"
"""Column of ``documents`` with the values that a run with kept columns left out."""
REFUSED = list_type(pa.struct(fields_of("name, reason: string")))
"""Arrow type of ``NOT_KEPT``: the kept column, and why its value is left out."""


_DOCUMENT = (
    "doc_in_shard: int32",
    # null in a file: the corpus gives no id
    "doc_id: string or null  # id in the corpus, or the hash of the text",
    "source: repeated string  # URI of the file",
    "offset: int64  # where the document begins in its file: a byte, a line or a row",
    "n_tokens, n_windows, n_chars: int32",
    "n_replaced: int64  # U+FFFD for invalid UTF-8",
    "lost_bytes: int64  # bytes of the stored file that the row stands for",
    "lost_documents: int64 or null  # 0: nothing is lost; null: the number is unknown",
    "text_sha256: 32 bytes or null",
    "status: repeated string  # ok, empty, or quarantined with a reason",
)
_DETECTED = f"{LANGUAGE}: repeated string or null  # null: the document has no text"
DOCUMENT_COMMENTS = comments_in(*_DOCUMENT, _DETECTED)
"""Comments of the columns of ``documents``, by name, as ``comments_of`` gives them."""


def documents_schema(
    series: Sequence[Series], kept: Sequence[pa.Field] = (), detected: bool = False
) -> pa.Schema:
    """Schema of a shard's ``documents`` table: one row per document read, in order.

    ``kept`` are the fields of the kept columns; with any, ``NOT_KEPT`` is a column too.
    ``detected``: languages are detected, so the table has ``LANGUAGE``.
    """
    columns = fields_of(*_DOCUMENT, *([_DETECTED] if detected else []))
    means = [pa.field(f"mean_{s.name}", pa.float32()) for s in series]
    refused = [pa.field(NOT_KEPT, REFUSED)] if kept else []
    return pa.schema(columns + means + [*kept, *refused])


NEURON_LIST = list_type(pa.struct(fields_of("neuron: uint16", "value: float32")))
"""Arrow type of a token's recorded neurons, the largest absolute value first."""


def token_neurons_schema(layers: Sequence[int]) -> pa.Schema:
    """Schema of a shard's ``neurons`` table: one row per token, in the order of ``tokens``.

    With neurons of HIGH tokens alone, a row stands for a token that is HIGH at one of ``layers`` or
    more; the column of every other layer is null.
    """
    lists = [pa.field(neurons_column(layer), NEURON_LIST) for layer in layers]
    return pa.schema(fields_of("doc_in_shard, position: int32") + lists)


PAIRS_SCHEMA = schema_of(
    "layer: int16",
    "neuron, token_id: int32",
    "n: int64",
    "total: int64  # sum of the values, in units of 2^-20",
    "largest: float32",
)
"""A shard's mergeable statistics of neurons, one row per pair of a neuron and a token type.

Each row counts the normal tokens of the type that have the neuron in their list.
"""

STATE_UNITS = 1 << 20
"""Units per 1.0 in which hidden states are added."""
STATE_LIMIT = float(1 << 24)
"""Strength from which on a document is refused where states are added, so that sums fit."""
VECTORS_SCHEMA = schema_of(
    "layer: int16",
    "token_id: int32",
    "n: int64",
    "totals: list of int64  # sum of the states, in units of 1 / ``STATE_UNITS``",
)
"""A shard's mergeable sums of the hidden states of some types, special tokens apart.

The Parquet file has one row group per layer.
"""

SUMMARY_SCHEMA = schema_of(
    "signal: string",
    "layer: int16",
    "special: bool",
    "token_id: int32",
    "n_docs, n_word_start: int64",
    "n_whole: int64  # tokens that are a whole word",
    *_HISTOGRAM,
)
"""A shard's mergeable statistics: the lossless histogram of values per series and type.

Count, sum, sum of squares, minimum, maximum and every quantile are read off the histogram. Its
integers merge by addition in any order. The Parquet file has one row group per series.
"""

TAGGED_SUMMARY_SCHEMA = SUMMARY_SCHEMA.append(pa.field("tag", pa.string()))
"""``SUMMARY_SCHEMA`` of a corpus with tags or with detected languages, with one more row group.

In that row group ``counts`` holds how often a type has ``tag``. Without tags, ``tag`` is the
language of the document, and only tokens that are a whole word count.
"""


def summary_schema(*, tagged: bool, detected: bool) -> pa.Schema:
    """Schema of a shard's summary; ``detected``: the languages of documents are."""
    return TAGGED_SUMMARY_SCHEMA if tagged or detected else SUMMARY_SCHEMA


# --- tables of a run

PLAN_SCHEMA = schema_of(
    "ordinal: int32",
    "shard, uri: string",
    "size: int64",
    "version, format, compression: string",
    "start, end, num_bytes, num_documents: int64",
    "sha256: string",
    "limit: int64",  # documents to read; -1: all
)
"""A run's plan: one row per slice, in order."""

SHARDS_SCHEMA = schema_of(
    "ordinal: int32",
    "shard: string",
    "doc_offset: int64  # run-wide doc = doc_offset + doc_in_shard",
    "n_documents, n_empty, n_quarantined, n_tokens, n_windows, n_replaced: int64",
    "lost_bytes: int64  # corpus bytes not measured",
    *_LOST_DOCUMENTS,
    "padding_share: float64",
    "num_bytes: int64  # read from the corpus",
    "token_bytes, document_bytes, summary_bytes: int64",
    "neurons_bytes: int64  # 0: no neurons are recorded",
    "pairs_bytes: int64  # pairs of neurons and types",
    "vectors_bytes: int64 or null  # sums of hidden states; null: the run is older",
    "seconds: float64",
    "tokens_file, documents_file, summary_file: string  # relative to the store",
    "neurons_file: string or null",
    "schema_version: int16 or null  # of the shard's files; null: 5",
)
"""A run's shards in plan order: the location of their files and their numbers of rows."""

FILES_SCHEMA = schema_of(
    "source: string  # URI of the file",
    "is_skipped: bool  # not read: the suffix is unknown, or the file belongs to a store",
    "bytes: int64  # size of the file",
    "num_bytes: int64  # bytes to read: all, or those of the columns used in Parquet",
    "lost_bytes: int64  # part of num_bytes not measured",
    "share_read: float64  # measured share of num_bytes",
    *_DAMAGE,
)
"""Bytes and documents measured of each file of a run's corpus."""

KEPT_SCHEMA = schema_of(
    "name: string",
    "type: string  # string, int64, double, bool, date or timestamp",
    "n: int64  # documents with a value",
    "n_lacking: int64  # documents that lack the column or have null in it",
    "n_refused: int64  # documents whose value is of another type or too large",
    "example_doc: int64 or null  # the first of these, run-wide",
    "example: string or null  # why its value is left out",
)
"""A run's kept columns; n, n_lacking and n_refused add up to all documents."""

LANGUAGES_SCHEMA = schema_of(
    "language: string  # as in detected_language of documents",
    "n_words: int64  # in documents that count",
    "n_whole: int64  # words of one token among them",
    "n_types: int64  # types of these",
    "has_list: bool  # there are closed-class words of the language",
)
"""A run's words by the detected language of their document."""

DUPLICATES_SCHEMA = schema_of(
    "doc: int64  # run-wide",
    "duplicate_of: int64  # the document of the same text that is counted",
)
"""The copies that a run does not count, by ``doc``."""

NEAR_DUPLICATES_SCHEMA = schema_of(
    "doc: int64  # run-wide",
    "near_duplicate_of: int64  # the first document that it is near to",
    "similarity: float32  # estimated: shared word 5-grams over all that the two have",
)
"""The near-copies of a run, by ``doc``."""

SOURCES_SCHEMA = schema_of(
    "layer: int16",
    "source: string  # URI of a file, or of a folder where there are many files",
    "bytes, lost_bytes: int64  # as in files",
    "share_read: float64",
    "n_documents: int64  # documents read, empty and quarantined ones included",
    *_DAMAGE,
    "n_docs: int64  # documents with tokens",
    "n: int64  # tokens, special ones apart",
    "n_high: int64",
    *_HISTOGRAM,
)
"""A run's tokens by source.

``bins`` and ``counts`` are the lossless histogram of strengths, as in ``SUMMARY_SCHEMA``.
"""

GROUPS_SCHEMA = schema_of(
    "layer: int16",
    "group: string or null  # null: documents without a value",
    "n_documents: int64  # documents read, empty and quarantined ones included",
    "n_docs: int64  # documents with tokens",
    "n: int64  # tokens, special ones apart",
    "n_high: int64  # by the thresholds that label the run",
    "q1, q2, q3: float32 or null  # of the group's own tokens",
    *_HISTOGRAM,
)
"""A run's tokens by group; ``bins`` and ``counts`` are as in ``SOURCES_SCHEMA``."""

GROUP_TYPES_SCHEMA = schema_of(
    "layer: int16",
    "group: repeated string or null",
    "token_id: int32",
    "n, n_high: int64",
)
"""Every type of each group, special tokens apart."""

GROUP_CLASSES_SCHEMA = schema_of(
    "layer: int16",
    "group: string or null",
    "class: string",
    "n: int64",
    "share: float64  # of the group's tokens",
    "n_high: int64",
    "share_high, share_high_low, share_high_high: float64  # Wilson interval, 95 %",
)
"""The classes of each group, by the classes of the run's types.

Where the groups are languages, a word has the class that the group's language gives it.
"""

OWN_LABELS = {
    "groups": schema_of("n_high_own: int64"),
    "group_types": schema_of("n_high_own: int64"),
    "group_classes": schema_of(
        "n_high_own: int64",
        "share_high_own, share_high_own_low, share_high_own_high: float64",
    ),
}
"""Further columns of the tables of groups, if tokens are labelled by their group's own Q3 too."""

HISTOGRAM_SCHEMA = schema_of("layer: int16", "special: bool", "strength: float32", "n: int64")
"""The run's strengths: each distinct recorded value with its count, special tokens apart."""

THRESHOLDS_SCHEMA = schema_of(
    "layer: int16",
    "population: string  # tokens or tokens_without_sinks",
    "n: int64",
    *_DISTRIBUTION_OR_NULL,
    "n_high, n_sinks, n_special: int64",
    "sink_factor: float64",
    "definition: string",
)
"""The run's thresholds and moments of strength, one row per layer and population."""

VOCABULARY_SCHEMA = schema_of(
    "layer: int16",
    *_TYPE_IN_CORPUS,
    "n_high: int64",
    "share_high: float64",
    "share_high_low, share_high_high: float64  # Wilson interval, 95 %",
    "idf: float64",
    "class_confidence: float32 or null  # estimated share of the type's uses that have its class",
    "is_ambiguous: bool or null  # a word that is used as open and as closed, or has two tags",
)
"""Every token type at each layer: its strengths, and how often it is HIGH."""
ADDED = {
    "vocabulary": ("class_confidence", "is_ambiguous"),
    "shards": ("vectors_bytes", "schema_version"),
    "languages": ("n_whole",),
}
"""Columns that tables of older runs lack; they read as null."""

WORD_VOCABULARY_SCHEMA = schema_of(
    "layer: int16",
    "word: string or null  # lower case, NFC, cut to 200 characters; null: folded words",
    "text: string  # as written most often; of folded words, the text of their first piece",
    "token_id: int32  # the first piece",
    "class: string",
    # null: no document has a known language, folded words of several, or tags
    "language: string or null  # the one of --language, or of most occurrences in documents",
    "n: int64  # occurrences",
    "n_docs: int64 or null  # null: folded words",
    "n_tokens: int64  # pieces of all occurrences",
    "pieces: float64  # n_tokens / n",
    *_DISTRIBUTION,  # of the strength of each occurrence's strongest piece
    "mean_strength: float64  # mean over the occurrences of the mean of their pieces",
    "first_strength: float64  # the same of their first piece",
    "last_strength: float64  # the same of their last piece",
    "n_high: int64  # the strongest piece is HIGH",
    "share_high: float64",
    "share_high_low, share_high_high: float64  # Wilson interval, 95 %",
    "n_high_mean: int64  # the mean of the pieces is at or above Q3",
    "n_high_first: int64  # the first piece is HIGH",
    "n_high_last: int64  # the last piece is HIGH",
    "idf: float64 or null  # null: folded words",
    "class_confidence: float32 or null  # as in vocabulary; null: folded words",
    "is_ambiguous: bool or null",
    "n_folded: int64  # rare words in the row; 0: the row is one word",
    "least_n: int64 or null  # the words of the row occur fewer times; null: the row is one word",
    "expected, beyond, beyond_low, beyond_high, n_effective: float64 or null  # as in salience",
    "forms: list of string  # up to three ways to write the word, the most frequent first",
)
"""Every word that occurs often enough, at each layer; ``reduce.word_sums`` says what a word is.

Rarer words have a row together with those of the same first piece and class.
"""

SIGNAL_VOCABULARY_SCHEMA = schema_of(
    "signal: string", "layer: int16", *_TYPE_IN_CORPUS, "idf: float64"
)
"""Every type under each signal except strength, as in ``VOCABULARY_SCHEMA``."""

MOMENTS_SCHEMA = schema_of(
    "layer: int16",
    *_TOKEN_TYPE,
    "n: int64",
    "second_moment: float64  # Q, mean square of the strengths",
    "squared_mean: float64  # M, squared norm of the mean state",
    "variance: float64  # V = Q - M, mean squared distance from the mean state",
    "share_mean: float64 or null  # M / Q; null where Q is 0",
)
"""Parts of the second moment of a frequent type's states (Yamagiwa and Shimodaira 2025)."""

MEAN_VECTORS_SCHEMA = schema_of(
    "layer: int16",
    "token_id: int32",
    "n: int64",
    "mean: list of float32  # [hidden_size]",
)
"""The mean hidden state of each type in ``MOMENTS_SCHEMA``, in the same order."""

SIGNALS_SCHEMA = schema_of(
    "signal: string", "layer: int16", "n: int64", *_DISTRIBUTION_OR_NULL, "n_special: int64"
)
"""Distribution of each signal except strength over the tokens, special tokens apart."""

name_type(
    "types of a neuron",
    list_type(
        pa.struct(
            fields_of(
                "token_id: int32",
                "text: string",
                "n: int64",
                "lift: float64  # frequency of the type here over its frequency among all tokens",
            )
        )
    ),
)

NEURONS_SCHEMA = schema_of(
    "layer: int16",
    "neuron: int32",
    "n: int64  # tokens that have the neuron in their list, special tokens apart",
    "share: float64  # n over all tokens with a list",
    "mean: float64  # mean value over these tokens",
    "largest: float32",
    "n_types: int64",
    "selectivity: float64  # divergence of the neuron's types from those of all tokens, in bits",
    "types: types of a neuron  # those that contribute most of these bits, in descending order",
)
"""The token types that each MLP neuron responds to.

Selectivity is the Kullback-Leibler divergence of the types of the neuron's tokens from the types of
all tokens. It is 0 for a neuron that responds to all types alike. With few tokens it is high by
chance.
"""

NEURON_TYPES_SCHEMA = schema_of(
    "layer: int16",
    "neuron, token_id: int32",
    "n: int64  # tokens of the type that have the neuron in their list",
    "share: float64  # n over the type's tokens with a list",
    "mean: float64",
    "largest: float32",
    "lift: float64",
)
"""Every pair of a neuron and a token type that occurs at least five times."""

FEATURES = (
    "mean_strength",
    "share_high",
    "share_rare",
    "share_sinks",
    "share_fragments",
    "share_distinct",
)
"""Features of a document that the screening compares, all at one layer; see ``reduce.screen``."""

SCREENED_SCHEMA = schema_of(
    "rank: int32  # from 1, the strangest document",
    "doc: int64  # run-wide, as in the views",
    "source: string  # URI of the file",
    "layer: int16",
    "n_tokens: int32  # special ones apart",
    "n_copies: int32  # documents of the run with the same text, this one included",
    *(f"{name}: float32" for name in FEATURES),
    "score: float64  # the largest robust z",
    "reason: string",
    "text: string  # beginning of the document, joined from its tokens",
)
"""A run's strangest documents."""

SALIENCE_SCHEMA = schema_of(
    "layer: int16",
    "token_id: int32",
    "expected: float64  # HIGH share that the type's frequency, positions and documents would give",
    "beyond: float64  # HIGH share - expected",
    "beyond_low, beyond_high: float64  # 95 % interval, clustered by document",
    "n_effective: float64  # independent tokens that would say as much of the HIGH share",
)
"""Salience of each type beyond its frequency at each layer, special types apart."""

STRANGE_SCHEMA = schema_of(
    "source: string  # as in sources",
    "group: string or null  # as in groups; null too where the run has no groups",
    "n_docs: int64",
    "n: int64  # tokens of these documents, special ones apart",
)
"""A run's documents with a score of ``reduce.strangest.STRANGE_SCORE`` or more, of all documents.

``screened`` lists some of them; this table counts every one, by source and group.
"""

COPIED_SCHEMA = schema_of(
    "source: string  # as in sources",
    "group: string or null  # as in strange",
    "n_docs: int64  # documents with tokens, whether they count or not",
    "n_copies: int64  # of these, with the text of an earlier document of the run",
    "n: int64  # tokens of the documents, special ones included",
)
"""A run's copies of texts by source and group."""

# --- tables of two runs compared, a and b

_STRENGTHS_OF_TWO = (
    "n_a, n_b: int64  # tokens, special ones apart; 0: the source or group is new or gone",
    "q1_a, q1_b, q2_a, q2_b, q3_a, q3_b: float32 or null",
    "share_high_a, share_high_b: float64 or null  # at or above the Q3 of the run's labels",
    "psi, ks, js: float64 or null",
)
DRIFT_SCHEMA = schema_of(
    "layer: int16",
    "source: string or null  # null: the whole corpus",
    *_STRENGTHS_OF_TWO,
)
"""Strength distributions of two runs per layer: over all tokens, and per source."""

_CLASSES_OF_TWO = (
    "class: string",
    "n_a: int64",
    "share_a: float64",
    "n_high_a: int64",
    "share_high_a, share_high_low_a, share_high_high_a: float64",
    "n_b: int64",
    "share_b: float64",
    "n_high_b: int64",
    "share_high_b, share_high_low_b, share_high_high_b: float64",
)
CLASS_DRIFT_SCHEMA = schema_of("layer: int16", *_CLASSES_OF_TWO)
"""Classes in two runs: their share of the tokens, and their HIGH share with its interval.

The interval is Wilson's, 95 %.
"""

_MOVED = (
    "status: string  # both, new (only in b) or vanished",
    "n_a, n_b: int64",
    "share_high_a, share_high_b: float64 or null",
    "median_a, median_b: float32 or null",
    "z: float64 or null  # z score of the difference of the HIGH shares",
    "p: float64 or null",
    "q: float64 or null  # p adjusted by Benjamini and Hochberg over the layer",
)
_MOVER = (*_TOKEN_TYPE, *_MOVED)
MOVERS_SCHEMA = schema_of("layer: int16", *_MOVER)
"""Every type that occurs in either of two runs, and how it moved between them."""

WORD_MOVERS_SCHEMA = schema_of(
    "layer: int16",
    "word: string  # as in word_vocabulary",
    "text: string  # as written most often",
    "class: string",
    *_MOVED,
)
"""Every word that is frequent enough in either of two runs, and how it moved between them.

A word that is new or vanished is rare in the other run, or not there; it occurs in its own run at
least twice as often as a word must to have a row in both. Rarer ones are left out.
"""

GROUP_DRIFT_SCHEMA = schema_of("layer: int16", "group: string or null", *_STRENGTHS_OF_TWO)
"""Strength distributions of two runs per layer and group; null: documents without a value."""

GROUP_CLASS_DRIFT_SCHEMA = schema_of("layer: int16", "group: string or null", *_CLASSES_OF_TWO)
"""Classes in each group of two runs, as in ``CLASS_DRIFT_SCHEMA``."""

GROUP_MOVERS_SCHEMA = schema_of("layer: int16", "group: string or null", *_MOVER)
"""The types of each group that moved most between two runs, as in ``MOVERS_SCHEMA``.

Medians are null: groups have none of each type.
"""

LAYER_CLASSES_SCHEMA = schema_of(*_CLASSES_OF_TWO, "rank_a, rank_b: float64 or null")
"""Classes of words at two layers; null: the class has no words there.

A rank is the mean share of the run's words with a smaller strength, ties half, 0 to 1.
"""

LAYER_WORDS_SCHEMA = schema_of(
    "word: string  # lower case, NFC",
    "class: string  # at b; at a for a word that only a has",
    "status: string  # both, only_a or only_b: too rare on the other side, or not there",
    "n_a, n_b: int64 or null  # null: too rare, or not there",
    "share_high_a, share_high_b: float64 or null",
    "rank_a, rank_b: float64 or null  # as in ``LAYER_CLASSES_SCHEMA``",
    "z, p, q: float64 or null  # of the HIGH shares, as in movers",
)
"""Every word that is frequent enough at either of two layers, and how it differs."""

# --- table of a series of runs

name_type(
    "classes of a night",
    list_type(pa.struct(fields_of("class: string", "share, share_high: float64"))),
)

HISTORY_SCHEMA = schema_of(
    "run, measure: string",
    "base: string  # of the measure without layers and signals: of one base strengths compare",
    "began_at: timestamp[us]  # UTC",
    "partition: date32[day] or null  # null: the corpus has no date",
    "layer: int16",
    "group_by: string or null  # null: the row is of all tokens",
    "group: string or null  # null also for documents without a value",
    "n_tokens: int64  # special ones apart",
    "n_documents: int64",
    "n_quarantined: int64 or null  # rows of documents; null: not counted by group",
    "q1, q2, q3: float32 or null  # of the run's own tokens",
    "share_high: float64 or null",
    "classes: classes of a night",
    "baseline: string or null  # run that the distances are from",
    "psi, ks, js: float64 or null",
    "state: string or null  # of the last audit; null: no audit has kept one",
    "broken, warned: list of string",
    "accepted: string or null  # why a broken night may be a baseline",
)
"""Complete runs of a series, one row for each layer, and for each group at it; oldest first.

``broken`` and ``warned`` name limits. Without the verdict of an audit the baseline is the night
before.
"""
