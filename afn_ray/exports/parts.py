"""Cut the shards of a run into parts, each of which becomes one file of about a given size."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from afn_ray.exports import writing
from afn_ray.exports.request import BATCH_ROWS, ExportRequest, rows
from afn_ray.query.database import Run
from afn_ray.query.shard_views import ShardRange

SAMPLE_ROWS = 1 << 18
"""Rows that are encoded to learn the size of a row in a file."""


def cut(run: Run, request: ExportRequest, schema: pa.Schema) -> list[ShardRange]:
    """Parts of all shards in order, each with whole documents.

    A part has as many rows as give a file of the size asked for, by the size of the first ones. A
    part of words is smaller: its size follows from its tokens.
    """
    is_of_documents = request.table == "documents"
    sizes = [f.n_documents if is_of_documents else f.n_tokens for f in run.shard_views.shards]
    most_rows = _rows_of_file(run, request, schema, sizes)
    parts = list[ShardRange]()
    first = num_rows = 0
    for at, size in enumerate(sizes):
        if at > first and num_rows + size > most_rows:
            parts.append(ShardRange(first, at))
            first, num_rows = at, 0
        if size > most_rows:
            parts += _parts_of_shard(run, at, most_rows, is_of_documents)
            first, num_rows = at + 1, 0
        else:
            num_rows += size
    if first < len(sizes):
        parts.append(ShardRange(first, len(sizes)))
    return parts


def _rows_of_file(run: Run, request: ExportRequest, schema: pa.Schema, sizes: list[int]) -> int:
    """Number of rows of a file of the size asked for, measured on the first rows of the run."""
    enough = int(np.searchsorted(np.cumsum(sizes), SAMPLE_ROWS)) + 1
    sample = rows(run, request, ShardRange(0, min(enough, len(sizes)))).limit(SAMPLE_ROWS)
    sink = io.BytesIO()
    num_rows = 0
    with writing.encoded(request, schema, sink) as write:
        for batch in sample.to_arrow_reader(BATCH_ROWS):
            write(batch)
            num_rows += batch.num_rows
    return max(1, num_rows * request.file_bytes // sink.tell())


def _parts_of_shard(
    run: Run, shard: int, most_rows: int, is_of_documents: bool
) -> Iterator[ShardRange]:
    """Parts of one large shard, as documents allow."""
    documents = run.shard_views.sql("documents", ShardRange(shard, shard + 1))
    found = run.sql(f"SELECT doc, n_tokens FROM ({documents}) ORDER BY doc").to_arrow_table()  # noqa: S608
    docs = found["doc"].to_numpy()
    sizes = np.ones(len(docs)) if is_of_documents else found["n_tokens"].to_numpy()
    numbers = (np.cumsum(sizes) - 1) // most_rows
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    ends = [*docs[starts[1:]], docs[-1] + 1]
    for begin, end in zip(docs[starts], ends, strict=True):
        yield ShardRange(shard, shard + 1, (int(begin), int(end)))
