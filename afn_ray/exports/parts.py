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
"""Largest number of rows that are encoded to learn the size of a file."""
FEWEST_ROWS = SAMPLE_ROWS // 4
"""Number of rows below which more shards are sampled, if there are any."""


def cut(run: Run, request: ExportRequest, schema: pa.Schema) -> list[ShardRange]:
    """Parts of all shards in order, each with whole documents.

    A part has as many tokens (of documents: as many documents) as give a file of the size asked
    for, by the size of the first ones. Without rows in the first ones it is one part.
    """
    is_of_documents = request.table == "documents"
    sizes = [f.n_documents if is_of_documents else f.n_tokens for f in run.shard_views.shards]
    most = _size_of_file(run, request, schema, sizes)
    parts = list[ShardRange]()
    first = held = 0
    for at, size in enumerate(sizes):
        if at > first and held + size > most:
            parts.append(ShardRange(first, at))
            first, held = at, 0
        if size > most:
            parts += _parts_of_shard(run, at, most, is_of_documents)
            first, held = at + 1, 0
        else:
            held += size
    if first < len(sizes):
        parts.append(ShardRange(first, len(sizes)))
    return parts


def _size_of_file(run: Run, request: ExportRequest, schema: pa.Schema, sizes: list[int]) -> int:
    """Sum of ``sizes`` of a file of the size asked for, measured on the first shards of the run.

    A run may have fewer rows than tokens, or none: it keeps those of a sample, or no neurons.
    """
    num_full = int(np.searchsorted(np.cumsum(sizes), SAMPLE_ROWS))
    end = min(num_full + 1, len(sizes))
    num_rows = _num_rows(run, request, end)
    while num_rows < FEWEST_ROWS and end < len(sizes):
        end = min(2 * end, len(sizes))
        num_rows = _num_rows(run, request, end)
    if not num_rows:
        return sum(sizes)
    sample = rows(run, request, ShardRange(0, end)).limit(SAMPLE_ROWS)
    sink = io.BytesIO()
    num_encoded = 0
    with writing.encoded(request, schema, sink) as write:
        for batch in sample.to_arrow_reader(BATCH_ROWS):
            write(batch)
            num_encoded += batch.num_rows
    num_bytes = sink.tell() * num_rows // num_encoded  # of all rows of these shards
    return max(1, sum(sizes[:end]) * request.file_bytes // num_bytes)


def _num_rows(run: Run, request: ExportRequest, end: int) -> int:
    """Number of rows of the shards before ``end``."""
    part = run.shard_views.sql(str(request.table), ShardRange(0, end))
    ((counted,),) = run.sql(f"SELECT count(*) FROM ({part})").fetchall()  # noqa: S608
    return int(counted)


def _parts_of_shard(run: Run, shard: int, most: int, is_of_documents: bool) -> Iterator[ShardRange]:
    """Parts of one large shard, as documents allow."""
    documents = run.shard_views.sql("documents", ShardRange(shard, shard + 1))
    found = run.sql(
        f"SELECT doc, n_tokens FROM ({documents}) "  # noqa: S608
        "ORDER BY doc"
    ).to_arrow_table()
    docs = found["doc"].to_numpy()
    sizes = np.ones(len(docs)) if is_of_documents else found["n_tokens"].to_numpy()
    numbers = (np.cumsum(sizes) - 1) // most
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    ends = [*docs[starts[1:]], docs[-1] + 1]
    for begin, end in zip(docs[starts], ends, strict=True):
        yield ShardRange(shard, shard + 1, (int(begin), int(end)))
