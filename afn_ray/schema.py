"""The nouns of the product and the Arrow schemas of its tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

SCHEMA_VERSION = 5
"""Raised when a stored table or the meaning of a stored value changes; part of every measure."""

SPECIAL = 1
"""``flags`` bit 0: the token was added by the tokenizer's template and has no text."""
WORD_START = 2
"""``flags`` bit 1: the token starts a word."""
REPLACED = 4
"""``flags`` bit 2: the token covers a U+FFFD that replaced invalid UTF-8 in the source."""


def fingerprint(value: object) -> str:
    """First 128 bits of the SHA-256 of ``value`` as canonical JSON, in hex."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:32]


def fingerprint_of_rows(header: object, groups: Iterable[Sequence[object]]) -> str:
    """``fingerprint([header, rows])`` of all rows in ``groups``, none of them empty, one in memory
    at a time.
    """
    digest = hashlib.sha256(f"[{_canonical(header)},[".encode())
    for at, rows in enumerate(groups):
        digest.update(("," if at else "").encode() + _canonical(list(rows))[1:-1].encode())
    digest.update(b"]]")
    return digest.hexdigest()[:32]


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


UPOS, XPOS = "upos", "xpos"
"""The two columns of CoNLL-U that hold tags: Universal Dependencies' parts of speech, and the
language's own.
"""


class Span(NamedTuple):
    """Characters of a text that carry a tag."""

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
    labels: str | None = None  # column of the tags; None: none, but of CoNLL-U
    # of a quote in a quoted field of CSV: "doubled", "backslash"; "auto": no doubt is left
    csv_escape: str = "auto"

    def labels_in(self, format: str) -> str | None:
        """Where the tags of a file of ``format`` come from; None: it has none."""
        return self.labels or (UPOS if format == "conllu" else None)

    def identity(self, format: str) -> list[object]:
        """What of it changes the documents of a file of ``format``."""
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
    """Part of one file: a byte range on line boundaries, a range of Parquet row groups, or the
    whole file.
    """

    uri: str
    size: int  # bytes of the file
    version: str  # of the file, as in FileInfo
    format: str  # "txt", "jsonl", "csv", "parquet" or "conllu"
    compression: str  # "", "gz", "bz2", "xz" or "zst"
    start: int  # bytes; row groups for Parquet
    end: int  # exclusive
    num_bytes: int  # bytes to read
    num_documents: int  # exact for Parquet and uncompressed lines, else -1
    sha256: str  # hex, of the bytes read

    @property
    def identity(self) -> list[object]:
        """What the slice's documents are a function of."""
        return [self.uri, self.format, self.compression, self.start, self.end, self.sha256]


@dataclass(frozen=True, slots=True)
class Shard:
    """A few slices: the unit of work, retry and commit."""

    id: str  # fingerprint of its slices and of how they are read
    slices: tuple[FileSlice, ...]
    options: ReadOptions
    generation: int = 0  # of the commit that counts, as of ``epochs``

    @classmethod
    def of(cls, slices: Sequence[FileSlice], options: ReadOptions) -> Shard:
        identity = fingerprint([[*s.identity, options.identity(s.format)] for s in slices])
        return cls(identity, tuple(slices), options)

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for s in self.slices)


@dataclass(frozen=True, slots=True)
class Document:
    """One document of the corpus, or the reason why it has no text."""

    source: str  # URI of the file
    offset: int  # byte of the line in the file; row number for CSV, Parquet and compressed files
    text: str
    doc_id: str | None = None  # the corpus's own id, where it has one
    num_replaced: int = 0  # bytes sequences of invalid UTF-8 that became U+FFFD
    problem: str | None = None  # why it is quarantined; ``text`` is then empty
    tags: tuple[Span, ...] = ()  # sorted, none empty, no two of them over the same character
    lost_bytes: int = 0  # bytes of the file, as it is stored, that a quarantined row stands for
    lost_documents: int | None = (
        None  # documents that it stands for; None: the format does not tell
    )


STRENGTH = "strength"
"""The signal that labels go by, whose thresholds and vocabulary every run has."""


class Series(NamedTuple):
    """One number for each token: what is measured, and at which layer."""

    signal: str  # a signal with more than one number has more than one name here
    layer: int

    @property
    def name(self) -> str:
        """Of its column in the tables."""
        return f"{self.signal}_{self.layer}"


def strengths(layers: Sequence[int]) -> tuple[Series, ...]:
    """The series of strength at ``layers``."""
    return tuple(Series(STRENGTH, layer) for layer in layers)


def strength_column(layer: int) -> str:
    """Name of the strength column of ``layer``."""
    return Series(STRENGTH, layer).name


def tokens_schema(series: Sequence[Series], offsets: bool, tagged: bool = False) -> pa.Schema:
    """Schema of a shard's ``tokens`` table; rows are sorted by (doc, position). ``tagged``: the
    corpus is labelled.
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
    """Schema of a shard's ``documents`` table; one row for every document read, in order."""
    return pa.schema(
        [
            pa.field("doc", pa.int32(), nullable=False),
            pa.field(
                "doc_id", pa.string()
            ),  # null: the corpus has none; the view gives the content hash
            pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("offset", pa.int64(), nullable=False),
            pa.field("n_tokens", pa.int32(), nullable=False),
            pa.field("n_windows", pa.int32(), nullable=False),
            pa.field("n_chars", pa.int32(), nullable=False),
            pa.field("n_replaced", pa.int64(), nullable=False),
            pa.field(
                "lost_bytes", pa.int64(), nullable=False
            ),  # of the file as stored, for which the row stands
            pa.field(
                "lost_documents", pa.int64()
            ),  # 0 where nothing is lost; null: nobody can tell
            pa.field("text_sha256", pa.binary(32)),
            pa.field("status", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            *(pa.field(f"mean_{s.name}", pa.float32()) for s in series),
        ]
    )


MOST_NEURONS = 1 << 16
"""Of an MLP; their numbers are recorded as uint16."""
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
"""The neurons of a token that are furthest from 0, that one first."""


def neurons_column(layer: int) -> str:
    """Name of the column of ``layer`` in ``token_neurons_schema``."""
    return f"neurons_{layer}"


def token_neurons_schema(layers: Sequence[int]) -> pa.Schema:
    """Schema of a shard's ``neurons`` table: a row for each token, in the order of ``tokens``.

    Where HIGH tokens alone are asked for: a row for each that is HIGH at one of ``layers``, and
    null at the others.
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
        pa.field("total", pa.int64(), nullable=False),  # of the values, in units of 2^-20
        pa.field("largest", pa.float32(), nullable=False),
    ]
)
"""A shard's mergeable statistics of neurons: of each with each type, of normal tokens that have it
in their list.
"""

SUMMARY_SCHEMA = pa.schema(
    [
        pa.field("signal", pa.string(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("special", pa.bool_(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("n_docs", pa.int64(), nullable=False),
        pa.field("n_word_start", pa.int64(), nullable=False),
        pa.field("n_whole", pa.int64(), nullable=False),  # that are a whole word by themselves
        pa.field("bins", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("counts", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
    ]
)
"""A shard's mergeable statistics: per series and type the lossless histogram of its values.

Count, sum, sum of squares, minimum, maximum and every quantile are read off the histogram, whose
integers merge by addition in any order. One Parquet row group per series.
"""

TAGGED_SUMMARY_SCHEMA = SUMMARY_SCHEMA.append(pa.field("tag", pa.string()))
"""The same of a labelled corpus, with one more row group, in which ``counts`` says how often a type
has ``tag``.
"""

HISTOGRAM_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("special", pa.bool_(), nullable=False),
        pa.field("strength", pa.float32(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
    ]
)
"""The run's strengths, each distinct recorded value with its count; special tokens apart."""

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

VOCABULARY_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),  # the piece as the tokenizer writes it
        pa.field("text", pa.string(), nullable=False),  # the piece as a reader writes it
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
        pa.field("share_high_low", pa.float64(), nullable=False),  # Wilson, 95 %
        pa.field("share_high_high", pa.float64(), nullable=False),
        pa.field("idf", pa.float64(), nullable=False),
    ]
)

_OF_STRENGTH = ("n_high", "share_high", "share_high_low", "share_high_high")

SIGNAL_VOCABULARY_SCHEMA = pa.schema(
    [pa.field("signal", pa.string(), nullable=False)]
    + [f for f in VOCABULARY_SCHEMA if f.name not in _OF_STRENGTH]
)
"""Every type under each signal but strength, as in ``VOCABULARY_SCHEMA``."""

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
"""How each signal but strength is distributed over the tokens, special ones apart."""

NEURONS_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field(
            "n", pa.int64(), nullable=False
        ),  # tokens that have it in their list, special ones apart
        pa.field("share", pa.float64(), nullable=False),  # of all tokens that have a list
        pa.field("mean", pa.float64(), nullable=False),  # value there
        pa.field("largest", pa.float32(), nullable=False),
        pa.field("n_types", pa.int64(), nullable=False),
        pa.field(
            "selectivity", pa.float64(), nullable=False
        ),  # bits: how far its types are from all tokens' types
        pa.field(
            "types",  # those that give most of these bits, the first most
            pa.list_(
                pa.field(
                    "item",
                    pa.struct(
                        [
                            pa.field("token_id", pa.int32(), nullable=False),
                            pa.field("text", pa.string(), nullable=False),
                            pa.field("n", pa.int64(), nullable=False),
                            pa.field(
                                "lift", pa.float64(), nullable=False
                            ),  # times as often as among all tokens
                        ]
                    ),
                    nullable=False,
                )
            ),
            nullable=False,
        ),
    ]
)
"""What each MLP neuron answers to. Selectivity is the Kullback-Leibler divergence of its tokens'
types from those of all tokens: 0 for a neuron that goes by no type; of few tokens it is high by
chance.
"""

NEURON_TYPES_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field(
            "n", pa.int64(), nullable=False
        ),  # tokens of the type that have the neuron in their list
        pa.field("share", pa.float64(), nullable=False),  # of the type's tokens that have a list
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("largest", pa.float32(), nullable=False),
        pa.field("lift", pa.float64(), nullable=False),
    ]
)
"""Each neuron with each type that it meets at least five times."""

CLASSES = ("content", "function", "piece", "fragment", "number", "punctuation", "special")
"""Classes of a type, in the order in which tables show them."""
PARTS_OF_WORDS = ("piece", "fragment")
"""Classes of types that mostly begin or continue a word of several tokens: no list of words has
them.
"""
UNTAGGED = "untagged"
"""Class of what has no tag in a labelled corpus."""
RESERVED = ("special", UNTAGGED)
"""Classes that no tag may be called."""

UPOS_CLASSES = {
    "content": ("NOUN", "PROPN", "VERB", "ADJ", "ADV", "INTJ"),
    "function": ("ADP", "AUX", "CCONJ", "DET", "NUM", "PART", "PRON", "SCONJ"),
    "punctuation": ("PUNCT", "SYM"),
}
"""Universal Dependencies' open classes, its closed ones, numerals among them, and its others, but
for X.
"""
_ORDER = (*CLASSES[:-1], *(tag for tags in UPOS_CLASSES.values() for tag in tags), "X")


def in_order(classes: Iterable[str]) -> list[str]:
    """``classes``, guessed ones or tags, once each as tables show them: known ones first, what is
    none of them last.
    """
    rank = {name: at for at, name in enumerate(_ORDER)} | {
        name: len(_ORDER) + 1 for name in RESERVED
    }
    return sorted({*classes}, key=lambda name: (rank.get(name, len(_ORDER)), name))


def upos_classes(tags: Iterable[str]) -> dict[str, str]:
    """What each of ``tags`` is, by ``UPOS_CLASSES``; nothing where one of them is no UPOS.

    A joined tag is what all its parts are; X, and one whose parts differ, are left out.
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
        pa.field("lost_bytes", pa.int64(), nullable=False),  # of the corpus files, not measured
        pa.field("lost_documents", pa.int64(), nullable=False),  # where their number is known
        pa.field(
            "lost_unknown", pa.int64(), nullable=False
        ),  # losses of an unknown number of documents
        pa.field("padding_share", pa.float64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),  # read from the corpus
        pa.field("token_bytes", pa.int64(), nullable=False),
        pa.field("document_bytes", pa.int64(), nullable=False),
        pa.field("summary_bytes", pa.int64(), nullable=False),
        pa.field("neurons_bytes", pa.int64(), nullable=False),  # 0 where none are recorded
        pa.field("pairs_bytes", pa.int64(), nullable=False),  # of neurons and types
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("tokens_file", pa.string(), nullable=False),  # relative to the store
        pa.field("documents_file", pa.string(), nullable=False),
        pa.field("summary_file", pa.string(), nullable=False),
        pa.field("neurons_file", pa.string()),
    ]
)
"""A run's shards in plan order: where their files are and how many rows they hold."""

FILES_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # URI of the file
        pa.field(
            "is_skipped", pa.bool_(), nullable=False
        ),  # left out: of an unknown ending, or of a store
        pa.field("bytes", pa.int64(), nullable=False),  # of the file
        pa.field(
            "num_bytes", pa.int64(), nullable=False
        ),  # of it that were to be read: of Parquet its columns
        pa.field("lost_bytes", pa.int64(), nullable=False),  # of these, not measured
        pa.field("share_read", pa.float64(), nullable=False),  # of num_bytes, measured
        pa.field("n_quarantined", pa.int64(), nullable=False),  # rows of documents
        pa.field("lost_documents", pa.int64(), nullable=False),  # where their number is known
        pa.field(
            "lost_unknown", pa.int64(), nullable=False
        ),  # losses of an unknown number of documents
        pa.field("n_replaced", pa.int64(), nullable=False),  # characters
    ]
)
"""What was read of each file of a run's corpus."""

SOURCES_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field(
            "source", pa.string(), nullable=False
        ),  # URI of a file, or of a folder where files are many
        *(FILES_SCHEMA.field(name) for name in ("bytes", "lost_bytes", "share_read")),
        pa.field(
            "n_documents", pa.int64(), nullable=False
        ),  # read, empty and quarantined ones among them
        *(
            FILES_SCHEMA.field(name)
            for name in ("n_quarantined", "lost_documents", "lost_unknown", "n_replaced")
        ),
        pa.field("n_docs", pa.int64(), nullable=False),  # with tokens
        pa.field("n", pa.int64(), nullable=False),  # tokens, special ones apart
        pa.field("n_high", pa.int64(), nullable=False),
        pa.field("bins", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("counts", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
    ]
)
"""A run's tokens by where they come from: the lossless histogram of strengths, as in
``SUMMARY_SCHEMA``.
"""

FEATURES = (
    "mean_strength",
    "share_high",
    "share_rare",
    "share_sinks",
    "share_fragments",
    "share_distinct",
)
"""What documents are screened by, all at one layer; ``screen`` defines them."""

SCREENED_SCHEMA = pa.schema(
    [
        pa.field("rank", pa.int32(), nullable=False),  # from 1, the strangest document
        pa.field("doc", pa.int64(), nullable=False),  # run-wide, as in the views
        pa.field("source", pa.string(), nullable=False),  # URI of the file
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),  # special ones apart
        pa.field(
            "n_copies", pa.int32(), nullable=False
        ),  # documents of the run with this very text, itself included
        *(pa.field(name, pa.float32(), nullable=False) for name in FEATURES),
        pa.field("score", pa.float64(), nullable=False),  # the largest robust z
        pa.field("reason", pa.string(), nullable=False),
        pa.field(
            "text", pa.string(), nullable=False
        ),  # its beginning, put together from its tokens
    ]
)
"""A run's strangest documents."""

DRIFT_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("source", pa.string()),  # null: the whole corpus
        pa.field(
            "n_a", pa.int64(), nullable=False
        ),  # tokens, special ones apart; 0: the source is new or gone
        pa.field("n_b", pa.int64(), nullable=False),
        *(pa.field(f"{q}_{run}", pa.float32()) for q in ("q1", "q2", "q3") for run in "ab"),
        pa.field("share_high_a", pa.float64()),  # at or above the Q3 that the run labels by
        pa.field("share_high_b", pa.float64()),
        pa.field("psi", pa.float64()),
        pa.field("ks", pa.float64()),
        pa.field("js", pa.float64()),
    ]
)
"""Two runs' distributions of strengths, per layer: all tokens, and those of each source."""

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
"""Two runs' classes: their share of the tokens, and how many of theirs are HIGH, with Wilson's 95 %
interval.
"""

MOVERS_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("class", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # "both", "new" (in b alone) or "vanished"
        pa.field("n_a", pa.int64(), nullable=False),
        pa.field("n_b", pa.int64(), nullable=False),
        pa.field("share_high_a", pa.float64()),
        pa.field("share_high_b", pa.float64()),
        pa.field("median_a", pa.float32()),
        pa.field("median_b", pa.float32()),
        pa.field("z", pa.float64()),  # of the difference of the HIGH shares
        pa.field("p", pa.float64()),
        pa.field(
            "q", pa.float64()
        ),  # p after Benjamini and Hochberg, over the types of the layer in both runs
    ]
)
"""Every type in either of two runs, and how it moved."""

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
