"""Near-copies: documents that share most of their word 5-grams with an earlier one, by MinHash.

All steps are pure functions under ``reduce.tasks.Tasks``::

    read     tokens of some shards      -> signatures by band, cut by the band's hash into parts
    join     a part from up to FAN_IN   -> its rows, until each part occurs once
    near     a part                     -> documents near the first one with their band

A signature has ``NUM_HASHES`` MinHash values of the document's words, in lower case. Documents that
agree in a whole band of values are compared by all values. The shards' cut and order of work do not
change the result. Each document takes 144 bytes for each band, in parts of about ``PART_ROWS``
rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.errors import ConfigError
from afn_ray.reduce.features import read_columns
from afn_ray.reduce.histogram import starts
from afn_ray.reduce.screen import joined_text
from afn_ray.reduce.shards import CommittedFile, CommittedShards
from afn_ray.reduce.stats import Ints
from afn_ray.reduce.tasks import Inline, Tasks, in_groups, merge_parts
from afn_ray.run_info import RunInfo
from afn_ray.schema import NEAR_DUPLICATES_SCHEMA
from afn_ray.store import records
from afn_ray.store.shard_tables import DOC, ShardTable
from afn_ray.text import count

NUM_HASHES = 128
"""MinHash values of a signature. The standard error of a similarity s is sqrt(s (1 - s) / 128)."""
SEED = 42
"""Seed of the hash functions."""
NUM_WORDS = 5
"""Words in a shingle; a shorter document is one shingle."""
RECALL = 0.99
"""Chance at least to compare two documents whose similarity is the threshold."""
PART_ROWS = 500_000
"""Number of rows for each part: a row is one band of one document."""
READ_BYTES = 64 << 20
"""Bytes of token files that one call reads; a larger shard has a call of its own."""
NOT_LOOKED_FOR = "near-copies were not looked for: give run.toml near_duplicates"
"""Reason why a run has no figure of near-copies."""
CHANCE = 1 / 256
"""Chance that the lowest eight bits of two different MinHash values are equal."""


def check_package() -> Any:
    """The module that hashes. Raises ``ConfigError`` where it is not installed."""
    try:
        return import_module("rensa")
    except ImportError as error:
        raise ConfigError(
            'near_duplicates needs the package rensa; pip install "afn-ray[dedup]", '
            "on the nodes of a cluster too"
        ) from error


def find(
    shards: CommittedShards, threshold: float, readable: Sequence[str], tasks: Tasks | None = None
) -> pa.Table:
    """The near-copies among the documents of ``shards`` that count, as ``NEAR_DUPLICATES_SCHEMA``.

    A document is a near-copy if its estimated similarity with an earlier one is ``threshold`` or
    more; of several it names the first. ``readable`` has the tokenizer's texts by token id. Raises
    ``ConfigError`` without the package that hashes.
    """
    tasks = tasks or Inline()
    size = band_size(threshold)
    num_parts = 1 + shards.n_docs * (NUM_HASHES // size) // PART_ROWS
    places = [
        _Place(shards.file(commit, "tokens"), shards.file(commit, "documents"), offset, left_out)
        for commit, offset, left_out in shards.places()
    ]
    leaves = (
        tasks.submit(_read, some, size, readable, num_parts, num_results=num_parts)
        for some in in_groups(places, lambda place: place.tokens.num_bytes, READ_BYTES)
    )
    parts = merge_parts(tasks, leaves, _join, None)
    handles = [tasks.submit(_near, part, threshold)[0] for part in parts]
    return _first_of_each(pa.concat_tables([tasks.result(handle) for handle in handles]))


def band_size(threshold: float) -> int:
    """MinHash values in a band: the most with which ``RECALL`` is reached at ``threshold``."""
    sizes = range(1, NUM_HASHES + 1)
    misses = [(1 - threshold**size) ** (NUM_HASHES // size) for size in sizes]
    return max(size for size, miss in zip(sizes, misses, strict=True) if miss <= 1 - RECALL)


def share_of(info: RunInfo) -> float | None:
    """Share of near-copies among the documents with tokens that count; None if not looked for.

    ``info`` is a run.json.
    """
    found = info.get("near_duplicates")
    counts = info["counts"]
    if found is None:
        return None
    measured = counts["documents"] - counts["empty"] - counts["quarantined"]
    return float(found["documents"] / max(1, measured))


def describe(info: RunInfo) -> str:
    """Sentence about the near-copies of a run; empty if it has none. ``info`` is a run.json."""
    share = share_of(info)
    if not share:
        return ""
    found = info["near_duplicates"]
    return (
        f"{count(found['documents'], 'document')} ({share:.1%}), each with at least "
        f"{found['threshold']:g} of the word {NUM_WORDS}-grams that it and an earlier one have"
    )


class _Place(NamedTuple):
    """Files of a shard."""

    tokens: CommittedFile
    documents: CommittedFile
    doc_offset: int  # run-wide number of the first document
    left_out: Ints  # documents that count nowhere, as numbers in the shard


class _Rows(NamedTuple):
    """One band of some documents in each row."""

    keys: npt.NDArray[np.uint64]  # hash of the band and its values, [n]
    docs: Ints  # run-wide, [n]
    marks: npt.NDArray[np.uint8]  # lowest eight bits of all values, [n, NUM_HASHES]


def _read(
    places: Sequence[_Place], size: int, readable: Sequence[str], num_parts: int
) -> list[_Rows]:
    """The bands of ``size`` values of the documents at ``places``, in parts by their hash."""
    hashing = check_package().RMinHash
    docs = [np.empty(0, np.int64)]
    signatures = [np.empty((0, NUM_HASHES), np.uint32)]
    for place in places:
        for numbers, shingles in _shingles(place, readable):
            found = hashing.digests_from_token_sets(shingles, NUM_HASHES, SEED)
            docs.append(numbers)
            signatures.append(np.array(found, np.uint32).reshape(-1, NUM_HASHES))
    values = np.concatenate(signatures)
    all_docs = np.concatenate(docs)
    marks = (values & 0xFF).astype(np.uint8)
    keys = _keys(values, size)
    parts = []
    for part in range(num_parts):
        of_part, _ = which = np.nonzero(keys % np.uint64(num_parts) == part)
        parts.append(_Rows(keys[which], all_docs[of_part], marks[of_part]))
    return parts


def _shingles(place: _Place, readable: Sequence[str]) -> Iterator[tuple[Ints, list[list[str]]]]:
    """Run-wide numbers of some documents that count, and the distinct shingles of each."""
    n_tokens = read_columns(place.documents, ["n_tokens"])["n_tokens"].to_numpy()
    file = ShardTable(place.tokens.read())
    ends = np.cumsum(n_tokens, dtype=np.int64)
    for _, tokens in records.whole_documents(file, ends, ["token_id", "flags", "surface"]):
        column = tokens[DOC].to_numpy()
        begins = starts(column)
        sizes = np.diff(begins, append=len(column))
        counts = ~np.isin(column[begins], place.left_out)
        shingles = []
        for begin, length in zip(begins[counts].tolist(), sizes[counts].tolist(), strict=True):
            text = joined_text(tokens.slice(begin, length), readable)
            words = text.lower().split()
            last = max(1, len(words) - NUM_WORDS + 1)
            distinct = {" ".join(words[at : at + NUM_WORDS]) for at in range(last)}
            shingles.append(list(distinct))
        yield column[begins][counts] + place.doc_offset, shingles


def _keys(values: npt.NDArray[np.uint32], size: int) -> npt.NDArray[np.uint64]:
    """A hash of each band of ``size`` values and of its number, [n_docs, num_bands]."""
    num_bands = values.shape[1] // size
    bands = values[:, : num_bands * size].reshape(len(values), num_bands, size)
    keys = np.tile(np.arange(num_bands, dtype=np.uint64), (len(values), 1))
    for at in range(size):
        keys = (keys ^ bands[:, :, at]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(32)
    return keys


def _join(_: None, *parts: _Rows) -> list[_Rows]:
    """All rows of ``parts``."""
    return [_Rows(*map(np.concatenate, zip(*parts, strict=True)))]


def _near(rows: _Rows, threshold: float) -> list[pa.Table]:
    """Documents that are near the first one of their band."""
    order = np.lexsort((rows.docs, rows.keys))
    begins = starts(rows.keys[order].view(np.int64))
    firsts = order[np.repeat(begins, np.diff(begins, append=len(order)))]
    others = order != firsts
    docs, firsts = order[others], firsts[others]
    equal = (rows.marks[docs] == rows.marks[firsts]).mean(axis=1)
    similarity = np.maximum(0, (equal - CHANCE) / (1 - CHANCE))
    is_near = similarity >= threshold
    columns = [
        rows.docs[docs[is_near]],
        rows.docs[firsts[is_near]],
        similarity[is_near].astype(np.float32),
    ]
    return [_first_of_each(pa.table(columns, schema=NEAR_DUPLICATES_SCHEMA))]


def _first_of_each(table: pa.Table) -> pa.Table:
    """Each document of ``table`` with the first that it is near to, by document."""
    table = table.sort_by([("doc", "ascending"), ("near_duplicate_of", "ascending")])
    first_rows = starts(table["doc"].to_numpy())
    return table.take(first_rows).combine_chunks()
