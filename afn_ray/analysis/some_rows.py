"""Check of the rows of tokens in a shard that does not keep those of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray import samples, token_rows
from afn_ray.corpus.selection import place_of
from afn_ray.reduce.histogram import round_strengths
from afn_ray.reduce.stats import is_high
from afn_ray.schema import HASH_ID_CHARS, SPECIAL, STRENGTH, Series
from afn_ray.store.shard_tables import DOC, ShardTable
from afn_ray.text import count

OF_DOCUMENTS = ("doc_id", "text_sha256", "source", "offset")
"""Columns of ``documents`` by which a document is drawn."""

Ints = npt.NDArray[np.int64]


def wrong_rows(file: ShardTable, documents: pa.Table, series: Sequence[Series], record: str) -> str:
    """Error in the rows of tokens in ``file``, which a shard of ``record`` keeps; empty if none.

    ``documents`` are those of the shard, with ``n_tokens`` and ``OF_DOCUMENTS``.
    """
    if record == token_rows.SUMMARIES:
        found = file.metadata.num_rows
        return f"it has {count(found, 'row')}, but the shard keeps none" if found else ""
    table = file.read([DOC, "position", "flags", *(s.name for s in series)])
    docs, positions = (table[name].to_numpy().astype(np.int64) for name in (DOC, "position"))
    n_tokens = documents["n_tokens"].to_numpy().astype(np.int64)
    return (
        _wrong_place(docs, positions, n_tokens)
        or _wrong_value(table, series)
        or _wrong_choice(table, docs, documents, record)
    )


def _wrong_place(docs: Ints, positions: Ints, n_tokens: Ints) -> str:
    is_there = (docs >= 0) & (docs < len(n_tokens)) & (positions >= 0)
    is_there &= positions < n_tokens[np.clip(docs, 0, max(0, len(n_tokens) - 1))]
    is_in_next_doc = np.diff(docs) > 0
    is_next_in_doc = (np.diff(docs) == 0) & (np.diff(positions) > 0)
    is_later = is_in_next_doc | is_next_in_doc
    wrong = ~is_there
    wrong[1:] |= ~is_later
    if not wrong.any():
        return ""
    row = int(np.argmax(wrong))
    return f"row {row}: doc {docs[row]}, position {positions[row]} is no token, or out of place"


def _wrong_value(table: pa.Table, series: Sequence[Series]) -> str:
    for one in series:
        values = table[one.name].to_numpy()
        is_rounded = round_strengths(values).view(np.uint32) == values.view(np.uint32)
        right = np.isfinite(values) & (values >= 0) & is_rounded
        if not right.all():
            row = int(np.argmin(right))
            return f"row {row}: {one.name} is {values[row]}, which is never recorded"
    return ""


def _wrong_choice(table: pa.Table, docs: Ints, documents: pa.Table, record: str) -> str:
    """Error in which rows are kept, as far as the rows and ``documents`` show it."""
    if least := token_rows.thresholds_of(record):
        high = np.zeros(len(table), bool)
        for layer, q3 in least.items():
            high |= is_high(table[Series(STRENGTH, layer).name].to_numpy(), q3)
        high &= table["flags"].to_numpy() & SPECIAL == 0
        return "" if high.all() else f"row {int(np.argmin(high))} is not of a HIGH token"
    share = samples.share_of(record.partition(":")[2])
    rows = documents.select(OF_DOCUMENTS).to_pylist()
    drawn = [samples.is_drawn(_id_of(row), share, token_rows.SALT) for row in rows]
    expected = np.where(drawn, documents["n_tokens"].to_numpy(), 0)
    got = np.bincount(docs, minlength=len(rows))
    if np.array_equal(got, expected):
        return ""
    doc = int(np.argmax(got != expected))
    return f"it has {count(got[doc], 'row')} of doc {doc}, expected {expected[doc]:,}"


def _id_of(row: dict[str, object]) -> str:
    """The id of a document as ``selection.id_of`` gives it."""
    if row["doc_id"] is not None:
        return str(row["doc_id"])
    digest = row["text_sha256"]
    if isinstance(digest, bytes):
        return digest.hex()[:HASH_ID_CHARS]
    return place_of(str(row["source"]), row["offset"])
