"""Sums over the documents that a run leaves out, and pairs of neurons without them.

A shard's summary holds integers that add up. So the summary of some of its documents, with all
counts negative, takes these documents out of the sum again, to the last bit. The largest value of
a pair of neuron and type cannot be taken out: the pairs of a shard with such documents are counted
anew from the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from afn_ray.reduce.encoded import encoded_parts
from afn_ray.reduce.features import read_columns
from afn_ray.reduce.histogram import SeriesSummary
from afn_ray.reduce.neurons import PairSummary
from afn_ray.reduce.shard_summary import Spoken, Summary
from afn_ray.reduce.shards import CommittedFile, CommittedShards
from afn_ray.reduce.stats import Ints
from afn_ray.reduce.tasks import Tasks, in_groups
from afn_ray.reduce.type_tags import TypeTags
from afn_ray.schema import LANGUAGE, Series
from afn_ray.store import records
from afn_ray.store.shard_tables import DOC, ShardTable

READ_BYTES = 64 << 20
"""Bytes of token files that one call reads; a larger shard has a call of its own."""


class _Place(NamedTuple):
    """Files of a shard with documents that are left out."""

    tokens: CommittedFile
    documents: CommittedFile
    neurons: CommittedFile | None  # None: no neurons are recorded
    docs: Ints  # the documents that are left out, as numbers in the shard


def submit_negative(
    tasks: Tasks, shards: CommittedShards, series: Sequence[Series], counted: str, num_parts: int
) -> list[list[list[Any]]]:
    """Leaves that take documents out of sums: for each series handles of its parts, last the tags'.

    ``counted`` is the column whose values the summaries count by type: "tag", ``LANGUAGE``, or ""
    for none.
    """
    leaves = []
    for some in _groups(shards):
        num_results = len(series) * num_parts + 1
        args = (_negative, some, series, counted, num_parts)
        leaves.append(_split(tasks.submit(*args, num_results=num_results), num_parts))
    return leaves


def submit_pairs(
    tasks: Tasks, shards: CommittedShards, layers: Sequence[int], num_parts: int
) -> list[list[list[Any]]]:
    """Leaves of the pairs in shards with documents left out: for each
    layer handles of its parts.
    """
    leaves = []
    for some in _groups(shards):
        args = (_pairs, some, layers, num_parts)
        handles = tasks.submit(*args, num_results=len(layers) * num_parts)
        leaves.append(_split(handles, num_parts))
    return leaves


def _groups(shards: CommittedShards) -> Iterator[tuple[_Place, ...]]:
    """The shards with documents that are left out, in groups of about ``READ_BYTES``."""
    groups = in_groups(_places(shards), lambda place: place.tokens.num_bytes, READ_BYTES)
    return (some for some in groups if some)


def _places(shards: CommittedShards) -> Iterator[_Place]:
    for commit, _, docs in shards.places():
        if len(docs):
            yield _Place(
                shards.file(commit, "tokens"),
                shards.file(commit, "documents"),
                shards.file(commit, "neurons") if "neurons" in commit.files else None,
                docs,
            )


def _split(handles: Sequence[Any], num_parts: int) -> list[list[Any]]:
    """``handles`` in lists of ``num_parts``; the last may be shorter."""
    begins = range(0, len(handles), num_parts)
    return [list(handles[begin : begin + num_parts]) for begin in begins]


def _negative(
    some: Sequence[_Place], series: Sequence[Series], counted: str, num_parts: int
) -> list[Any]:
    """Encoded parts of the negative sum of each series over documents left
    out, and of their tags.
    """
    summary = Summary(series, tagged=counted == "tag", spoken=counted == LANGUAGE)
    columns = ["token_id", "flags", *(one.name for one in series)]
    columns += ["tag"] if counted == "tag" else []
    for place in some:
        languages = _languages(place) if counted == LANGUAGE else None
        file = ShardTable(place.tokens.read())
        for rows in records.some_documents(file, place.docs, columns):
            docs = rows[DOC].to_numpy()
            flags = rows["flags"].to_numpy()
            tags = rows["tag"].cast(pa.string()) if counted == "tag" else None
            spoken = None if languages is None else Spoken.of(docs, languages)
            of_series = {one: rows[one.name].to_numpy() for one in series}
            summary.add(docs, rows["token_id"].to_numpy(), flags, of_series, tags, spoken)
    tables = list(summary.tables())
    tags = TypeTags.from_table(tables.pop()) if counted else TypeTags.empty()
    encoded: list[Any] = []
    for one, table in zip(series, tables, strict=True):
        negative = SeriesSummary.from_table(table).negative().to_table(one)
        encoded += encoded_parts(negative, "token_id", num_parts)
    return [*encoded, tags.negative()]


def _languages(place: _Place) -> pa.Array:
    """Language of each document of the shard, strings with nulls."""
    documents = read_columns(place.documents, [LANGUAGE])
    return documents[LANGUAGE].cast(pa.string()).combine_chunks()


def _pairs(some: Sequence[_Place], layers: Sequence[int], num_parts: int) -> list[bytes]:
    """Encoded parts of the pairs at each layer in ``some``, without documents left out."""
    summary = PairSummary(layers)
    for place in some:
        for rows, types in _counted_lists(place):
            summary.add(types["token_id"].to_numpy(), types["flags"].to_numpy(), rows)
    encoded: list[bytes] = []
    for table in summary.tables():
        encoded += encoded_parts(table, "neuron", num_parts)
    return encoded


def _counted_lists(place: _Place) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Rows of neurons of documents that count, and the types and flags of their tokens."""
    n_tokens = read_columns(place.documents, ["n_tokens"])["n_tokens"].to_numpy()
    begins = np.cumsum(n_tokens, dtype=np.int64) - n_tokens
    tokens = read_columns(place.tokens, ["token_id", "flags"])
    assert place.neurons is not None, "a run with neurons has them in every shard"
    for batch in ShardTable(place.neurons.read()).batches(records.BATCH_ROWS):
        counts = ~np.isin(batch[DOC].to_numpy(), place.docs)
        rows = pa.Table.from_batches([batch.filter(pa.array(counts))])
        at = begins[rows[DOC].to_numpy()] + rows["position"].to_numpy()
        yield rows, tokens.take(at)
