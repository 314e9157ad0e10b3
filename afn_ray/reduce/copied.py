"""Copies of texts by source and group: numbers of documents, and of copies among them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.groups import OTHERS, Grouping
from afn_ray.reduce.sources import Sources
from afn_ray.reduce.stats import Ints
from afn_ray.schema import COPIED_SCHEMA

SUMS = ("n_docs", "n_copies", "n")
"""Columns of ``COPIED_SCHEMA`` that are sums over documents."""


def count_copies(
    documents: pa.Table, copies: Ints, sources: Sources, grouping: Grouping | None
) -> pa.Table:
    """``COPIED_SCHEMA`` of those of a shard's ``documents`` that have tokens, whether they count.

    ``copies`` are numbers in the shard. A group of which no document counts has its own name,
    unless the run joins groups.
    """
    is_copy = np.zeros(len(documents), np.int64)
    is_copy[copies] = 1
    index = sources.index_of(documents["source"].combine_chunks())
    group = pa.nulls(len(documents), pa.string())
    if grouping is not None:
        group = grouping.values(documents).cast(pa.string())
        if OTHERS in grouping.names:
            is_named = pc.is_in(group, pa.array(grouping.names, pa.string()))
            group = pc.if_else(is_named, group, OTHERS)
    columns = [
        pa.array(sources.names, pa.string()).take(pa.array(index)),
        group,
        pa.array(np.ones(len(documents), np.int64)),
        pa.array(is_copy),
        documents["n_tokens"].cast(pa.int64()),
    ]
    table = pa.table(columns, schema=COPIED_SCHEMA)
    return add_copies(table.filter(pc.greater(table["n"], 0)))[0]


def add_copies(*tables: pa.Table) -> list[pa.Table]:
    """The sum of ``tables``, one row for each source and group, in their order."""
    groups = pa.concat_tables(tables).group_by(["source", "group"], use_threads=False)
    added = groups.aggregate([(name, "sum") for name in SUMS])
    names = [name.removesuffix("_sum") for name in added.column_names]
    added = added.rename_columns(names).select(COPIED_SCHEMA.names).cast(COPIED_SCHEMA)
    return [added.sort_by([("source", "ascending"), ("group", "ascending")]).combine_chunks()]
