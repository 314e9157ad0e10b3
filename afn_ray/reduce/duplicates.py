"""Copies of texts in a run, and ids that several documents share: found by hashes, over all shards.

A copy is a document with tokens whose text an other document of the run has too, by the SHA-256 of
the text. All steps are pure functions under ``reduce.tasks.Tasks``::

    read     documents of some shards       -> hashes of texts and ids, cut by hash into parts
    join     a part from up to FAN_IN sums  -> its rows, until each part occurs once
    copies   a part of the texts            -> the copies in it
    ids      a part of the ids              -> the ids in it that occur more than once

A part holds all documents of its hashes, about ``PART_DOCS`` of them, 52 bytes each; a call needs
four times that at most. The caller holds 8 bytes for each copy, and 16 for each one that is not
counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.option_rules import CHOICES
from afn_ray.reduce.features import read_columns
from afn_ray.reduce.shards import CommittedFile, CommittedShards, LeftOut
from afn_ray.reduce.stats import Ints
from afn_ray.reduce.tasks import Inline, Tasks, batches, merge_parts
from afn_ray.run_info import RunInfo
from afn_ray.schema import DUPLICATES_SCHEMA
from afn_ray.text import count, printable

Words = npt.NDArray[np.uint64]

KEEP, ONCE, WEIGHT = CHOICES["duplicates"]
"""Documents of one text that are counted: all, the first, or one that is drawn."""
PART_DOCS = 1_000_000
"""Number of documents for each part."""
NOT_COUNTED = "the run is older than the count of copies and repeated ids"
"""Reason why a run has no figures of copies."""
EXAMPLES = 5
"""Largest number of repeated ids that a run names; those of the first documents come first."""
ID_CHARS = 80
"""Longest part of an id that a run names, in characters."""


class RepeatedId(NamedTuple):
    """An id that several documents have."""

    doc: int  # the first of them, run-wide
    n: int
    id: str  # printable, cut after ``ID_CHARS``


class Figures(NamedTuple):
    """Numbers of copies and of repeated ids in a run."""

    documents: int  # copies: documents beside the one of their text that counts
    tokens: int  # of these, special ones included
    texts: int  # texts that have copies
    repeated_ids: int
    id_documents: int  # documents with one of these ids
    examples: tuple[RepeatedId, ...]  # of repeated ids

    def to_json(self) -> dict[str, object]:
        """The figures as plain values; the inverse of ``figures_of``."""
        return self._asdict() | {"examples": [one._asdict() for one in self.examples]}


class Duplicates(NamedTuple):
    """Copies and repeated ids of a run."""

    figures: Figures
    table: pa.Table  # ``DUPLICATES_SCHEMA``; without rows if copies are kept
    copies: Ints  # documents, run-wide and ascending, with the text of an earlier one

    @property
    def left_out(self) -> LeftOut:
        """The documents that are counted nowhere."""
        if not len(self.table):
            return LeftOut()
        return LeftOut(self.table["doc"].to_numpy(), self.figures.tokens)


def figures_of(info: RunInfo) -> Figures | None:
    """The figures in ``info``, a run.json; None if it is older than they are."""
    found = info.get("duplicates")
    if found is None:
        return None
    examples = tuple(RepeatedId(**example) for example in found["examples"])
    return Figures(**{**found, "examples": examples})


def choice_of(info: RunInfo) -> str:
    """Treatment of copies by the run of ``info``, a run.json: ``KEEP``, ``ONCE`` or ``WEIGHT``."""
    return str(info["config"].get("duplicates", KEEP))


def duplicate_share(info: RunInfo, figures: Figures) -> float:
    """Share of the measured documents that are copies of others, 0 to 1; ``info`` is a run.json."""
    counts = info["counts"]
    measured: int = counts["documents"] - counts["empty"] - counts["quarantined"]
    if choice_of(info) != KEEP:
        measured += figures.documents
    return figures.documents / max(1, measured)


def counted(counts: Mapping[str, int], found: Duplicates, thresholds: pa.Table) -> dict[str, int]:
    """Numbers of documents and tokens without those left out, as run.json has them.

    ``counts`` are the sums over the commits, ``thresholds`` the run's own. All else that run.json
    counts is what was read, copies included.
    """
    left_out = found.left_out
    n_special = thresholds["n_special"][0].as_py()
    return {
        "documents": counts["documents"] - len(left_out.docs),
        "tokens": counts["tokens"] - left_out.n_tokens,
        "special": n_special,
    }


def find(shards: CommittedShards, choice: str, tasks: Tasks | None = None) -> Duplicates:
    """The copies among all documents of ``shards``; ``choice`` is ``KEEP``, ``ONCE`` or ``WEIGHT``.

    Raises ``StoreError`` for a file that differs from its commit.
    """
    tasks = tasks or Inline()
    places = []
    for commit, doc_offset, _ in shards.places():
        places.append(_Place(shards.file(commit, "documents"), doc_offset))
    num_parts = 1 + sum(commit.counts["documents"] for commit in shards.commits) // PART_DOCS
    leaves = (
        tasks.submit(_read, some, choice, num_parts, num_results=2 * num_parts)
        for some in batches(places)
    )
    parts = merge_parts(tasks, leaves, _join, None)
    of_texts = [tasks.submit(_copies, part, choice, num_results=3) for part in parts[:num_parts]]
    of_ids = [tasks.submit(_repeated, part)[0] for part in parts[num_parts:]]
    sums = []
    tables = []
    copies = []
    for sums_of_part, table_of_part, copies_of_part in of_texts:
        sums.append(tasks.result(sums_of_part))
        tables.append(tasks.result(table_of_part))
        copies.append(tasks.result(copies_of_part))
    ids = [tasks.result(found) for found in of_ids]
    examples = sorted(example for found in ids for example in found.examples)
    figures = Figures(
        documents=sum(n for n, _, _ in sums),
        tokens=sum(n for _, n, _ in sums),
        texts=sum(n for _, _, n in sums),
        repeated_ids=sum(found.n for found in ids),
        id_documents=sum(found.n_documents for found in ids),
        examples=tuple(RepeatedId(doc, n, _id_of(places, doc)) for doc, n in examples[:EXAMPLES]),
    )
    table = pa.concat_tables(tables).sort_by("doc")
    return Duplicates(figures, table.combine_chunks(), np.sort(np.concatenate(copies)))


def describe(figures: Figures, choice: str) -> tuple[str, str]:
    """Sentences about the copies and about the repeated ids; each is empty if there are none."""
    copies = ""
    if figures.documents:
        what = {KEEP: "all are counted", ONCE: "the first of each is counted"}
        copies = (
            f"{count(figures.documents, 'document')} ({count(figures.tokens, 'token')}) "
            f"{'is a copy' if figures.documents == 1 else 'are copies'} of "
            f"{count(figures.texts, 'text')}; {what.get(choice, 'one of each, drawn, is counted')}"
        )
    ids = ""
    if figures.repeated_ids:
        named = ", ".join(f"{one.id} ({one.n:,} documents)" for one in figures.examples)
        more = ", ..." if figures.repeated_ids > len(figures.examples) else ""
        ids = (
            f"{count(figures.repeated_ids, 'id')} of {figures.id_documents:,} documents: "
            f"{named}{more}"
        )
    return copies, ids


# --- hashes


class _Place(NamedTuple):
    """A shard's documents, and the run-wide number of the first."""

    file: CommittedFile
    doc_offset: int


class _Rows(NamedTuple):
    """Hashes of some texts or ids, and their documents."""

    keys: Words  # [n, 4]
    docs: Ints  # run-wide, [n]
    ranks: Words  # of documents with the same hash, the lowest counts, [n]
    n_tokens: npt.NDArray[np.int32]  # [n]

    def take(self, which: npt.NDArray[Any]) -> _Rows:
        """The rows ``which``, a mask or indices."""
        return _Rows(*(column[which] for column in self))

    def cut(self, num_parts: int) -> list[_Rows]:
        """The rows in ``num_parts`` parts by hash."""
        part_of = self.keys[:, 3] % np.uint64(num_parts)
        return [self.take(part_of == part) for part in range(num_parts)]

    def grouped(self) -> tuple[_Rows, Ints]:
        """The rows whose hash occurs more than once, by hash and rank, and
        where each hash begins.
        """
        order = np.argsort(self.keys[:, 0], kind="stable")
        first = self.keys[order, 0]
        is_same = np.zeros(len(first) + 1, bool)  # as the one before
        is_same[1:-1] = first[1:] == first[:-1]
        some = self.take(order[is_same[1:] | is_same[:-1]])
        order = np.lexsort((some.docs, some.ranks, *some.keys.T))
        some = some.take(order)
        begins = _begins(some.keys)
        sizes = np.diff(begins, append=len(some.docs))
        found = some.take(np.repeat(sizes > 1, sizes))
        return found, _begins(found.keys)


def _begins(keys: Words) -> Ints:
    """Index at which each run of equal rows of ``keys`` begins."""
    is_new = np.ones(len(keys), bool)
    is_new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    return np.flatnonzero(is_new)


def _read(places: Sequence[_Place], choice: str, num_parts: int) -> list[_Rows]:
    """Rows of the texts, then of the ids, of the documents at ``places``, each in parts."""
    texts, ids = [], []
    for file, doc_offset in places:
        table = read_columns(file, ["doc_id", "text_sha256", "n_tokens"])
        docs = np.arange(len(table)) + doc_offset
        n_tokens = table["n_tokens"].to_numpy()
        has_text = (n_tokens > 0) & table["text_sha256"].is_valid().to_numpy()
        has_id = table["doc_id"].is_valid().to_numpy()
        hashes = table["text_sha256"].filter(pa.array(has_text)).to_pylist()
        rows = _Rows(
            _keys(hashes), docs[has_text], docs[has_text].astype(np.uint64), n_tokens[has_text]
        )
        if choice == WEIGHT:
            rows = rows._replace(ranks=_drawn(rows.keys, rows.docs - doc_offset, file.shard))
        texts.append(rows)
        named = table["doc_id"].filter(pa.array(has_id)).to_pylist()
        digests = [blake2b(name.encode(), digest_size=32).digest() for name in named]
        ids.append(
            _Rows(_keys(digests), docs[has_id], docs[has_id].astype(np.uint64), n_tokens[has_id])
        )
    (rows,) = _join(None, *texts)
    parts = rows.cut(num_parts)  # the copy of all rows of texts is free before that of the ids
    (rows,) = _join(None, *ids)
    return [*parts, *rows.cut(num_parts)]


def _keys(digests: Sequence[bytes]) -> Words:
    """``digests`` of 32 bytes each as numbers, [n, 4]."""
    numbers = np.frombuffer(b"".join(digests), ">u8")
    return numbers.astype(np.uint64).reshape(-1, 4)


def _drawn(keys: Words, docs: Ints, shard: str) -> Words:
    """A number for each document that its text and place decide, as if it were drawn.

    Of n copies each has the lowest with the same chance. ``docs`` are numbers in the shard.
    """
    with np.errstate(over="ignore"):
        seed = np.uint64(int(shard[:16], 16))
        mixed = keys[:, 1] ^ (seed + docs.astype(np.uint64))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def _join(_: None, *parts: _Rows) -> list[_Rows]:
    """All rows of ``parts``."""
    return [_Rows(*map(np.concatenate, zip(*parts, strict=True)))]


def _copies(rows: _Rows, choice: str) -> list[Any]:
    """Numbers of copies, their tokens and their texts; ``DUPLICATES_SCHEMA``; documents.

    The documents are those of ``rows`` with the text of an earlier one, whichever of them counts.
    """
    found, begins = rows.grouped()
    is_copy = np.ones(len(found.docs), bool)
    is_copy[begins] = False
    sizes = np.diff(begins, append=len(found.docs))
    counted = np.repeat(found.docs[begins], sizes)
    copies = found.take(is_copy)
    sums = [len(copies.docs), int(copies.n_tokens.sum(dtype=np.int64)), len(begins)]
    table = pa.table([copies.docs, counted[is_copy]], schema=DUPLICATES_SCHEMA)
    first = np.minimum.reduceat(found.docs, begins) if len(begins) else begins
    later = found.docs[found.docs != np.repeat(first, sizes)]
    return [sums, DUPLICATES_SCHEMA.empty_table() if choice == KEEP else table, later]


class _Ids(NamedTuple):
    """Ids that occur more than once, in some documents."""

    n: int
    n_documents: int
    examples: list[tuple[int, int]]  # first document and number of documents, in order


def _repeated(rows: _Rows) -> list[_Ids]:
    """The ids in ``rows`` that occur more than once."""
    found, begins = rows.grouped()
    sizes = np.diff(begins, append=len(found.docs))
    examples = sorted(zip(found.docs[begins].tolist(), sizes.tolist(), strict=True))
    return [_Ids(len(begins), len(found.docs), examples[:EXAMPLES])]


def _id_of(places: Sequence[_Place], doc: int) -> str:
    """The id of the document numbered ``doc``, for people."""
    *_, place = [place for place in places if place.doc_offset <= doc]
    ids = read_columns(place.file, ["doc_id"])["doc_id"]
    found = ids[doc - place.doc_offset]
    text = printable(found.as_py())
    return text if len(text) <= ID_CHARS else f"{text[:ID_CHARS]}..."
