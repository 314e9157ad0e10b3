"""The nouns of the product and the Arrow schemas of its tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

SCHEMA_VERSION = 5
"""Version of the stored tables, part of every measure.

It grows when a stored table or the meaning of a stored value changes.
"""

SPECIAL = 1
"""``flags`` bit 0: the tokenizer's template added the token, which has no text."""
WORD_START = 2
"""``flags`` bit 1: the token starts a word."""
REPLACED = 4
"""``flags`` bit 2: the token covers a U+FFFD that replaced invalid UTF-8 in the source."""


def fingerprint(value: object) -> str:
    """First 128 bits of the SHA-256 of ``value`` as canonical JSON, in hex."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:32]


def fingerprint_of_rows(header: object, groups: Iterable[Sequence[object]]) -> str:
    """``fingerprint([header, rows])`` of all rows in ``groups``, one group in memory at a time.

    No group may be empty.
    """
    digest = hashlib.sha256(f"[{_canonical(header)},[".encode())
    for at, rows in enumerate(groups):
        digest.update(("," if at else "").encode() + _canonical(list(rows))[1:-1].encode())
    digest.update(b"]]")
    return digest.hexdigest()[:32]


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


UPOS, XPOS = "upos", "xpos"
"""Tag columns of CoNLL-U: Universal Dependencies' parts of speech, and the language's own."""


class Span(NamedTuple):
    """A tagged range of characters in a text."""

    start: int
    end: int  # exclusive
    tag: str


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How bytes become documents; part of a shard's identity."""

    format: str  # "auto", "txt", "jsonl", "csv", "parquet" or "conllu"
    text_column: str
    id_column: str | None
    txt_documents: str  # "file" or "line"
    max_document_bytes: int
    labels: str | None = None  # column of the tags; None: upos in CoNLL-U, else no tags
    # how CSV writes a quote in a quoted field: "doubled", "backslash", or
    # "auto": doubled, with ambiguous rows quarantined
    csv_escape: str = "auto"

    def labels_in(self, format: str) -> str | None:
        """Column of the tags in a file of ``format``; None: the file has no tags."""
        return self.labels or (UPOS if format == "conllu" else None)

    def identity(self, format: str) -> list[object]:
        """The options that change the documents of a file of ``format``."""
        if format == "txt":
            return [self.txt_documents, self.max_document_bytes]
        if format == "conllu":
            return [self.labels_in(format), self.max_document_bytes]
        more = [self.labels] if self.labels else []
        if format == "csv" and self.csv_escape != "auto":
            more = [self.csv_escape]
        return [self.text_column, self.id_column, self.max_document_bytes, *more]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of the corpus as the filesystem lists it."""

    uri: str
    size: int  # bytes
    version: str  # etag where the filesystem has one, else the modification time


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Part of one file: lines of a byte range, a range of Parquet row groups, or the whole file."""

    uri: str
    size: int  # bytes of the file
    version: str  # version of the file, as in FileInfo
    format: str  # "txt", "jsonl", "csv", "parquet" or "conllu"
    compression: str  # "", "gz", "bz2", "xz" or "zst"
    start: int  # bytes; row groups for Parquet
    end: int  # exclusive
    num_bytes: int  # bytes to read
    num_documents: int  # exact for Parquet and uncompressed lines, else -1
    sha256: str  # SHA-256 of the bytes read, in hex

    @property
    def identity(self) -> list[object]:
        """The inputs of the slice's documents."""
        return [self.uri, self.format, self.compression, self.start, self.end, self.sha256]


@dataclass(frozen=True, slots=True)
class Shard:
    """A few slices: the unit of work, retry and commit."""

    id: str  # fingerprint of its slices and of how they are read
    slices: tuple[FileSlice, ...]
    options: ReadOptions
    generation: int = 0  # number of the commit that counts, see ``store.epochs``

    @classmethod
    def of(cls, slices: Sequence[FileSlice], options: ReadOptions) -> Shard:
        """The shard of ``slices``; its id depends on them and on the options that affect them."""
        identity = fingerprint([[*s.identity, options.identity(s.format)] for s in slices])
        return cls(identity, tuple(slices), options)

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return sum(s.num_bytes for s in self.slices)


@dataclass(frozen=True, slots=True)
class Document:
    """One document of the corpus, or the reason why it has no text."""

    source: str  # URI of the file
    offset: int  # byte of the line in the file; row number for CSV, Parquet and compressed files
    text: str
    doc_id: str | None = None  # the id that the corpus gives, if any
    num_replaced: int = 0  # invalid UTF-8 sequences that became U+FFFD
    problem: str | None = None  # why it is quarantined; ``text`` is then empty
    tags: tuple[Span, ...] = ()  # sorted; not empty, not overlapping
    lost_bytes: int = 0  # bytes of the stored file that a quarantined row stands for
    lost_documents: int | None = None  # documents that the row stands for; None: unknown


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


def tokens_schema(series: Sequence[Series], offsets: bool, tagged: bool = False) -> pa.Schema:
    """Schema of a shard's ``tokens`` table; rows are sorted by (doc, position).

    ``tagged``: the corpus is labelled, so the table has a ``tag`` column.
    """
    fields = [
        pa.field("doc", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("flags", pa.uint8(), nullable=False),
        pa.field("surface", pa.dictionary(pa.int32(), pa.string())),
    ]
    if tagged:
        fields.append(pa.field("tag", pa.dictionary(pa.int32(), pa.string())))
    if offsets:
        fields += [
            pa.field("start", pa.int32(), nullable=False),
            pa.field("end", pa.int32(), nullable=False),
        ]
    fields += [pa.field(s.name, pa.float32(), nullable=False) for s in series]
    return pa.schema(fields)


def documents_schema(series: Sequence[Series]) -> pa.Schema:
    """Schema of a shard's ``documents`` table: one row per document read, in order."""
    return pa.schema(
        [
            pa.field("doc", pa.int32(), nullable=False),
            # null: the corpus gives no id; the view then shows the content hash
            pa.field("doc_id", pa.string()),
            pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("offset", pa.int64(), nullable=False),
            pa.field("n_tokens", pa.int32(), nullable=False),
            pa.field("n_windows", pa.int32(), nullable=False),
            pa.field("n_chars", pa.int32(), nullable=False),
            pa.field("n_replaced", pa.int64(), nullable=False),
            # bytes of the stored file that the row stands for
            pa.field("lost_bytes", pa.int64(), nullable=False),
            # 0: nothing is lost; null: the number is unknown
            pa.field("lost_documents", pa.int64()),
            pa.field("text_sha256", pa.binary(32)),
            pa.field("status", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            *(pa.field(f"mean_{s.name}", pa.float32()) for s in series),
        ]
    )


MOST_NEURONS = 1 << 16
"""Largest number of neurons in an MLP; neuron numbers are recorded as uint16."""
NEURON_LIST = pa.list_(
    pa.field(
        "item",
        pa.struct(
            [
                pa.field("neuron", pa.uint16(), nullable=False),
                pa.field("value", pa.float32(), nullable=False),
            ]
        ),
        nullable=False,
    )
)
"""Arrow type of a token's recorded neurons, the largest absolute value first."""


def neurons_column(layer: int) -> str:
    """Name of the column of ``layer`` in ``token_neurons_schema``."""
    return f"neurons_{layer}"


def token_neurons_schema(layers: Sequence[int]) -> pa.Schema:
    """Schema of a shard's ``neurons`` table: one row per token, in the order of ``tokens``.

    With neurons of HIGH tokens alone, a row stands for a token that is HIGH at one of ``layers`` or
    more; the column of every other layer is null.
    """
    return pa.schema(
        [
            pa.field("doc", pa.int32(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            *(pa.field(neurons_column(k), NEURON_LIST) for k in layers),
        ]
    )


PAIRS_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("total", pa.int64(), nullable=False),  # sum of the values, in units of 2^-20
        pa.field("largest", pa.float32(), nullable=False),
    ]
)
"""A shard's mergeable statistics of neurons, one row per pair of a neuron and a token type.

Each row counts the normal tokens of the type that have the neuron in their list.
"""

SUMMARY_SCHEMA = pa.schema(
    [
        pa.field("signal", pa.string(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("special", pa.bool_(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("n_docs", pa.int64(), nullable=False),
        pa.field("n_word_start", pa.int64(), nullable=False),
        pa.field("n_whole", pa.int64(), nullable=False),  # tokens that are a whole word
        pa.field("bins", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("counts", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
    ]
)
"""A shard's mergeable statistics: the lossless histogram of values per series and type.

Count, sum, sum of squares, minimum, maximum and every quantile are read off the histogram. Its
integers merge by addition in any order. The Parquet file has one row group per series.
"""

TAGGED_SUMMARY_SCHEMA = SUMMARY_SCHEMA.append(pa.field("tag", pa.string()))
"""``SUMMARY_SCHEMA`` of a labelled corpus, with one more row group.

In that row group ``counts`` holds how often a type has ``tag``.
"""

HISTOGRAM_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("special", pa.bool_(), nullable=False),
        pa.field("strength", pa.float32(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
    ]
)
"""The run's strengths: each distinct recorded value with its count, special tokens apart."""

THRESHOLDS_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("population", pa.string(), nullable=False),  # "tokens" or "tokens_without_sinks"
        pa.field("n", pa.int64(), nullable=False),
        pa.field("mean", pa.float64()),
        pa.field("sd", pa.float64()),
        pa.field("min", pa.float32()),
        pa.field("q1", pa.float32()),
        pa.field("q2", pa.float32()),
        pa.field("q3", pa.float32()),
        pa.field("max", pa.float32()),
        pa.field("n_high", pa.int64(), nullable=False),
        pa.field("n_sinks", pa.int64(), nullable=False),
        pa.field("n_special", pa.int64(), nullable=False),
        pa.field("sink_factor", pa.float64(), nullable=False),
        pa.field("definition", pa.string(), nullable=False),
    ]
)
"""The run's thresholds and moments of strength, one row per layer and population."""

VOCABULARY_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),  # the piece in the tokenizer's notation
        pa.field("text", pa.string(), nullable=False),  # the piece as plain text
        pa.field("class", pa.string(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("n_docs", pa.int64(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("sd", pa.float64(), nullable=False),
        pa.field("min", pa.float32(), nullable=False),
        pa.field("q1", pa.float32(), nullable=False),
        pa.field("q2", pa.float32(), nullable=False),
        pa.field("q3", pa.float32(), nullable=False),
        pa.field("max", pa.float32(), nullable=False),
        pa.field("n_high", pa.int64(), nullable=False),
        pa.field("share_high", pa.float64(), nullable=False),
        pa.field("share_high_low", pa.float64(), nullable=False),  # Wilson interval, 95 %
        pa.field("share_high_high", pa.float64(), nullable=False),
        pa.field("idf", pa.float64(), nullable=False),
    ]
)
"""Every token type at each layer: its strengths, and how often it is HIGH."""

_OF_STRENGTH = ("n_high", "share_high", "share_high_low", "share_high_high")

SIGNAL_VOCABULARY_SCHEMA = pa.schema(
    [pa.field("signal", pa.string(), nullable=False)]
    + [f for f in VOCABULARY_SCHEMA if f.name not in _OF_STRENGTH]
)
"""Every type under each signal except strength, as in ``VOCABULARY_SCHEMA``."""

SIGNALS_SCHEMA = pa.schema(
    [
        pa.field("signal", pa.string(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        *(
            THRESHOLDS_SCHEMA.field(name)
            for name in ("n", "mean", "sd", "min", "q1", "q2", "q3", "max", "n_special")
        ),
    ]
)
"""Distribution of each signal except strength over the tokens, special tokens apart."""

NEURONS_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        # tokens that have the neuron in their list, special tokens apart
        pa.field("n", pa.int64(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),  # n over all tokens with a list
        pa.field("mean", pa.float64(), nullable=False),  # mean value over these tokens
        pa.field("largest", pa.float32(), nullable=False),
        pa.field("n_types", pa.int64(), nullable=False),
        # divergence of the neuron's types from the types of all tokens, in bits
        pa.field("selectivity", pa.float64(), nullable=False),
        pa.field(
            "types",  # the types that contribute most of these bits, in descending order
            pa.list_(
                pa.field(
                    "item",
                    pa.struct(
                        [
                            pa.field("token_id", pa.int32(), nullable=False),
                            pa.field("text", pa.string(), nullable=False),
                            pa.field("n", pa.int64(), nullable=False),
                            # frequency of the type here over its frequency among all tokens
                            pa.field("lift", pa.float64(), nullable=False),
                        ]
                    ),
                    nullable=False,
                )
            ),
            nullable=False,
        ),
    ]
)
"""The token types that each MLP neuron responds to.

Selectivity is the Kullback-Leibler divergence of the types of the neuron's tokens from the types of
all tokens. It is 0 for a neuron that responds to all types alike. With few tokens it is high by
chance.
"""

NEURON_TYPES_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        # tokens of the type that have the neuron in their list
        pa.field("n", pa.int64(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),  # n over the type's tokens with a list
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("largest", pa.float32(), nullable=False),
        pa.field("lift", pa.float64(), nullable=False),
    ]
)
"""Every pair of a neuron and a token type that occurs at least five times."""

CLASSES = ("content", "function", "piece", "fragment", "number", "punctuation", "special")
"""Classes of a token type, in the order of the tables."""
PARTS_OF_WORDS = ("piece", "fragment")
"""Classes of types that mostly begin or continue a word of several tokens.

No word list contains such types.
"""
UNTAGGED = "untagged"
"""Class of tokens without a tag in a labelled corpus."""
RESERVED = ("special", UNTAGGED)
"""Class names that no tag may have."""

UPOS_CLASSES = {
    "content": ("NOUN", "PROPN", "VERB", "ADJ", "ADV", "INTJ"),
    "function": ("ADP", "AUX", "CCONJ", "DET", "NUM", "PART", "PRON", "SCONJ"),
    "punctuation": ("PUNCT", "SYM"),
}
"""UPOS tags by class: open classes, closed classes with numerals, and the others except X."""
_ORDER = (*CLASSES[:-1], *(tag for tags in UPOS_CLASSES.values() for tag in tags), "X")


def in_order(classes: Iterable[str]) -> list[str]:
    """``classes`` or tags, each once, in the order of the tables.

    Known names come first, then other tags by name, then those in ``RESERVED``.
    """
    rank = {name: at for at, name in enumerate(_ORDER)} | {
        name: len(_ORDER) + 1 for name in RESERVED
    }
    return sorted({*classes}, key=lambda name: (rank.get(name, len(_ORDER)), name))


def upos_classes(tags: Iterable[str]) -> dict[str, str]:
    """Class of each of ``tags`` by ``UPOS_CLASSES``; empty where any tag is not a UPOS tag.

    A joined tag has the class that all its parts share. X, and joined tags whose parts differ in
    class, are left out.
    """
    kinds = {tag: kind for kind, of_kind in UPOS_CLASSES.items() for tag in of_kind} | {"X": ""}
    found = {
        tag: {kinds.get(part) for part in tag.split("+")} for tag in tags if tag not in RESERVED
    }
    if any(None in parts for parts in found.values()):
        return {}
    return {tag: kind for tag, parts in found.items() if len(parts) == 1 for kind in parts if kind}


SHARDS_SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("doc_offset", pa.int64(), nullable=False),  # run-wide doc = doc_offset + doc
        pa.field("n_documents", pa.int64(), nullable=False),
        pa.field("n_empty", pa.int64(), nullable=False),
        pa.field("n_quarantined", pa.int64(), nullable=False),
        pa.field("n_tokens", pa.int64(), nullable=False),
        pa.field("n_windows", pa.int64(), nullable=False),
        pa.field("n_replaced", pa.int64(), nullable=False),
        pa.field("lost_bytes", pa.int64(), nullable=False),  # corpus bytes not measured
        pa.field("lost_documents", pa.int64(), nullable=False),  # from losses of known number
        # losses whose number of documents is unknown
        pa.field("lost_unknown", pa.int64(), nullable=False),
        pa.field("padding_share", pa.float64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),  # read from the corpus
        pa.field("token_bytes", pa.int64(), nullable=False),
        pa.field("document_bytes", pa.int64(), nullable=False),
        pa.field("summary_bytes", pa.int64(), nullable=False),
        pa.field("neurons_bytes", pa.int64(), nullable=False),  # 0: no neurons are recorded
        pa.field("pairs_bytes", pa.int64(), nullable=False),  # pairs of neurons and types
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("tokens_file", pa.string(), nullable=False),  # relative to the store
        pa.field("documents_file", pa.string(), nullable=False),
        pa.field("summary_file", pa.string(), nullable=False),
        pa.field("neurons_file", pa.string()),
    ]
)
"""A run's shards in plan order: the location of their files and their numbers of rows."""

FILES_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # URI of the file
        # not read: the suffix is unknown, or the file belongs to a store
        pa.field("is_skipped", pa.bool_(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),  # size of the file
        # bytes to read: all, or those of the columns used in Parquet
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("lost_bytes", pa.int64(), nullable=False),  # part of num_bytes not measured
        pa.field("share_read", pa.float64(), nullable=False),  # measured share of num_bytes
        pa.field("n_quarantined", pa.int64(), nullable=False),  # rows of ``documents``
        pa.field("lost_documents", pa.int64(), nullable=False),  # from losses of known number
        # losses whose number of documents is unknown
        pa.field("lost_unknown", pa.int64(), nullable=False),
        pa.field("n_replaced", pa.int64(), nullable=False),  # U+FFFD for invalid UTF-8
    ]
)
"""How much of each file of a run's corpus was measured."""

SOURCES_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        # URI of a file, or of a folder where there are many files
        pa.field("source", pa.string(), nullable=False),
        *(FILES_SCHEMA.field(name) for name in ("bytes", "lost_bytes", "share_read")),
        # documents read, empty and quarantined ones included
        pa.field("n_documents", pa.int64(), nullable=False),
        *(
            FILES_SCHEMA.field(name)
            for name in ("n_quarantined", "lost_documents", "lost_unknown", "n_replaced")
        ),
        pa.field("n_docs", pa.int64(), nullable=False),  # documents with tokens
        pa.field("n", pa.int64(), nullable=False),  # tokens, special ones apart
        pa.field("n_high", pa.int64(), nullable=False),
        pa.field("bins", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("counts", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
    ]
)
"""A run's tokens by source.

``bins`` and ``counts`` are the lossless histogram of strengths, as in ``SUMMARY_SCHEMA``.
"""

FEATURES = (
    "mean_strength",
    "share_high",
    "share_rare",
    "share_sinks",
    "share_fragments",
    "share_distinct",
)
"""Features of a document that the screening compares, all at one layer; see ``reduce.screen``."""

SCREENED_SCHEMA = pa.schema(
    [
        pa.field("rank", pa.int32(), nullable=False),  # from 1, the strangest document
        pa.field("doc", pa.int64(), nullable=False),  # run-wide, as in the views
        pa.field("source", pa.string(), nullable=False),  # URI of the file
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),  # special ones apart
        # documents of the run with the same text, this one included
        pa.field("n_copies", pa.int32(), nullable=False),
        *(pa.field(name, pa.float32(), nullable=False) for name in FEATURES),
        pa.field("score", pa.float64(), nullable=False),  # the largest robust z
        pa.field("reason", pa.string(), nullable=False),
        # beginning of the document, joined from its tokens
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""A run's strangest documents."""

DRIFT_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("source", pa.string()),  # null: the whole corpus
        # tokens, special ones apart; 0: the source is new or gone
        pa.field("n_a", pa.int64(), nullable=False),
        pa.field("n_b", pa.int64(), nullable=False),
        *(pa.field(f"{q}_{run}", pa.float32()) for q in ("q1", "q2", "q3") for run in "ab"),
        pa.field("share_high_a", pa.float64()),  # at or above the Q3 of the run's labels
        pa.field("share_high_b", pa.float64()),
        pa.field("psi", pa.float64()),
        pa.field("ks", pa.float64()),
        pa.field("js", pa.float64()),
    ]
)
"""Strength distributions of two runs per layer: over all tokens, and per source."""

CLASS_DRIFT_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("class", pa.string(), nullable=False),
        *(
            pa.field(f"{name}_{run}", kind, nullable=False)
            for run in "ab"
            for name, kind in (
                ("n", pa.int64()), ("share", pa.float64()), ("n_high", pa.int64()), ("share_high", pa.float64()),
                ("share_high_low", pa.float64()), ("share_high_high", pa.float64()),
            )
        ),
    ]
)  # fmt: skip
"""Classes in two runs: their share of the tokens, and their HIGH share with its interval.

The interval is Wilson's, 95 %.
"""

MOVERS_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("class", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # "both", "new" (only in b) or "vanished"
        pa.field("n_a", pa.int64(), nullable=False),
        pa.field("n_b", pa.int64(), nullable=False),
        pa.field("share_high_a", pa.float64()),
        pa.field("share_high_b", pa.float64()),
        pa.field("median_a", pa.float32()),
        pa.field("median_b", pa.float32()),
        pa.field("z", pa.float64()),  # z score of the difference of the HIGH shares
        pa.field("p", pa.float64()),
        # p adjusted by Benjamini and Hochberg over the layer's types that both runs have
        pa.field("q", pa.float64()),
    ]
)
"""Every type that occurs in either of two runs, and how it moved between them."""

PLAN_SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("compression", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("end", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("num_documents", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)
"""A run's plan: one row per slice, in order."""
