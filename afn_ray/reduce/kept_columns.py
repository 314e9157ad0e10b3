"""The table ``kept`` of a run: how many documents have a value in each kept column.

Only the kept columns of the shards' ``documents`` are read, by pure functions under
``reduce.tasks.Tasks``; their sums are the same in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.kept import Kept
from afn_ray.reduce.features import read_columns
from afn_ray.reduce.shards import CommittedFile, CommittedShards
from afn_ray.reduce.stats import Ints
from afn_ray.reduce.tasks import Inline, Tasks, batches, merged
from afn_ray.schema import KEPT_SCHEMA, NOT_KEPT
from afn_ray.text import count


class _Counts(NamedTuple):
    """Values of one kept column in some documents."""

    n: int  # documents with a value
    n_lacking: int  # documents without one
    n_refused: int  # documents whose value is left out
    example: tuple[int, str] | None  # run-wide number of the first of these, and the reason


NOTHING = _Counts(0, 0, 0, None)


def kept_table(shards: CommittedShards, tasks: Tasks | None = None) -> pa.Table:
    """One row of ``KEPT_SCHEMA`` for each kept column of ``shards``, by name.

    Raises ``StoreError`` for a file that differs from its commit.
    """
    tasks = tasks or Inline()
    places = [
        (shards.file(commit, "documents"), doc_offset, left_out)
        for commit, doc_offset, left_out in shards.places()
    ]
    handles = [tasks.submit(_count, some, shards.kept)[0] for some in batches(places)]
    counts: Sequence[_Counts] = [NOTHING for _ in shards.kept]
    if handles:
        counts = tasks.result(merged(tasks, _add, handles))
    rows = []
    for column, found in zip(shards.kept, counts, strict=True):
        doc, reason = found.example or (None, None)
        row = {"name": column.name, "type": column.kind, "example_doc": doc, "example": reason}
        rows.append(row | {name: getattr(found, name) for name in ("n", "n_lacking", "n_refused")})
    return pa.Table.from_pylist(rows, KEPT_SCHEMA)


_Place = tuple[CommittedFile, int, Ints]
"""Documents of a shard, run-wide number of the first, and numbers in it of those left out."""


def _count(places: Sequence[_Place], kept: Kept) -> list[list[_Counts]]:
    """The counts of each column in the documents of ``places``."""
    return _add(*(_count_shard(place, kept) for place in places))


def _count_shard(place: _Place, kept: Kept) -> list[_Counts]:
    file, doc_offset, left_out = place
    documents = read_columns(file, [*(column.name for column in kept), NOT_KEPT])
    numbers = np.delete(np.arange(len(documents)), left_out)
    if len(left_out):
        documents = documents.take(numbers)
    lists = documents[NOT_KEPT].combine_chunks()
    docs = numbers[pc.list_parent_indices(lists).to_numpy()]
    names, reasons = (lists.flatten().field(name) for name in ("name", "reason"))
    found = []
    for column in kept:
        n = len(documents) - documents[column.name].null_count
        of_column = pc.indices_nonzero(pc.equal(names, column.name)).to_numpy()
        example = None
        if len(of_column):
            first = int(of_column[0])
            example = (doc_offset + int(docs[first]), reasons[first].as_py())
        n_refused = len(of_column)
        found.append(_Counts(n, len(documents) - n - n_refused, n_refused, example))
    return found


def _add(*parts: Sequence[_Counts]) -> list[list[_Counts]]:
    """The sums of ``parts``, column by column."""
    sums = []
    for of_column in zip(*parts, strict=True):
        examples = [one.example for one in of_column if one.example is not None]
        sums.append(
            _Counts(
                sum(one.n for one in of_column),
                sum(one.n_lacking for one in of_column),
                sum(one.n_refused for one in of_column),
                min(examples, default=None),
            )
        )
    return [sums]


def describe(table: pa.Table) -> Iterator[str]:
    """Sentences on the columns of a ``kept`` table that no document has, or whose values are
    refused.

    They have no value of the corpus.
    """
    for row in table.to_pylist():
        num_documents = row["n"] + row["n_lacking"] + row["n_refused"]
        if row["n_refused"]:
            yield (
                f"{row['name']}: no value that is {row['type']} and short enough in "
                f"{row['n_refused']:,} of {count(num_documents, 'document')}; not_kept in the "
                "documents view says which"
            )
        elif not row["n"]:
            yield f"{row['name']}: none of {count(num_documents, 'document')} has it"
