"""Shards' summaries in, a run's thresholds, histogram and vocabulary out. No record is read again.

Summaries merge in a tree of pure functions that run here or elsewhere (``Tasks``)::

    read    some shards' summaries of one series -> their sum, cut by type into parts
    merge   a part from FAN_IN places            -> their sum, until there is one of each part
    count   a part                               -> how often each value occurs in it
    total   all parts' counts                    -> the layer's histogram and thresholds
    types   a part, what labels go by            -> statistics of each type

Pairs of neurons and types go the same way, cut by neuron, to a last step that gives the rows of
both their tables. Of a labelled corpus the counts of each type's tags::

    tags    some shards' summaries               -> their sum
    add     sums from FAN_IN places              -> their sum, until there is one

All that is added are integers, so neither order nor grouping nor place changes a bit; whoever calls
holds handles and the small tables at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.errors import StoreError
from afn_ray.reduce import neurons
from afn_ray.reduce.histogram import (
    BIN_BITS,
    SPECIAL_KEY,
    Histogram,
    SeriesSummary,
    TypeTags,
)
from afn_ray.reduce.stats import Ints
from afn_ray.reduce.tables import (
    STATISTICS_SCHEMA,
    frozen_rows,
    histogram_table,
    shards_table,
    threshold_rows,
    type_statistics,
    vocabulary_table,
)
from afn_ray.schema import (
    SIGNAL_VOCABULARY_SCHEMA,
    SIGNALS_SCHEMA,
    STRENGTH,
    THRESHOLDS_SCHEMA,
    Series,
)
from afn_ray.store import parquet, shard_files
from afn_ray.store.commits import Commit

READ_AHEAD = 8
FAN_IN = 64
"""Sums that one call merges, and shards that one reads at most."""
READ_BYTES = 16 << 20
"""Of one series' summaries, that one call reads: large shards come in smaller groups. Each byte
becomes 8 to 40.
"""
SLICE_PAIRS = 1 << 20
"""Pairs of a type and a strength that a call looks at together."""
PART_BYTES = 32 << 20
"""Of one series' summaries that go into one part. Sums are smaller, for what they have in common
counts once.
"""
MAX_PARTS = 16
"""Parts of a series. More would spread the last merges, but parts under 100 kB would pass through
the driver.
"""


class Tasks(Protocol):
    """Calls pure functions, here or in other processes, perhaps more than once where a process
    died.
    """

    def submit(
        self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1
    ) -> list[Any]:
        """A handle for each of the ``num_results`` values that ``function(*args)`` returns.

        Handles among ``args`` arrive as the values that they stand for.
        """

    def result(self, handle: Any) -> Any:
        """The value of ``handle``. Raises what its function raised, or one that it depends on."""


class Inline:
    """Calls at once, in this process: what is held is what the caller still has handles of."""

    def submit(
        self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1
    ) -> list[Any]:
        values = list(function(*args))
        assert len(values) == num_results
        return values

    def result(self, handle: Any) -> Any:
        return handle


class SummaryFile(NamedTuple):
    """What it takes to read a shard's summary and to trust it."""

    shard: str
    name: str
    rows: int
    num_bytes: int
    sha256: str


def reduce_run(
    store: str,
    measure_id: str,
    commits: Sequence[Commit],
    series: Sequence[Series],
    *,
    pieces: Sequence[str],
    readable: Sequence[str],
    language: str,
    sink_factor: float,
    num_bytes: Sequence[int],
    frozen: Sequence[dict[str, Any]] = (),
    neuron_layers: Sequence[int] = (),
    high_neurons: bool = False,
    tagged: bool = False,
    tasks: Tasks | None = None,
) -> dict[str, pa.Table]:
    """The run's tables from its shards' summaries, by ``tasks`` or in this process.

    ``commits`` in plan order, ``num_bytes`` read for each; ``series`` as the shards have them,
    strength first; ``pieces`` and ``readable`` are the vocabulary's texts by token id; ``frozen``
    has rows of ``manifest.FROZEN`` to label by instead of the run's own thresholds;
    ``neuron_layers`` of which neurons are recorded, ``high_neurons`` where of HIGH tokens alone;
    where summaries are ``tagged``, classes are tags. The result does not depend on how the corpus
    was cut into shards. Raises ``StoreError`` when a summary is missing or damaged, or when
    together they have not the tokens that the commits count.
    """
    tasks = tasks or Inline()
    n_docs = sum(
        c.counts["documents"] - c.counts["empty"] - c.counts["quarantined"] for c in commits
    )
    n_tokens = sum(c.counts["tokens"] for c in commits)
    files = _Files(commits, "summary")
    submitted = [
        _submit_series(
            tasks,
            store,
            measure_id,
            files,
            at,
            series,
            sink_factor,
            [r for r in frozen if r["layer"] == one.layer and one.signal == STRENGTH],
        )
        for at, one in enumerate(series)
    ]
    tags = (
        tasks.result(_submit_tags(tasks, store, measure_id, files, len(series))) if tagged else None
    )
    thresholds: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    histograms, vocabularies = [], []
    signals: list[dict[str, Any]] = []
    signal_vocabularies = []
    for one, (total, types) in zip(series, submitted, strict=True):
        rows, goes_by, histogram = map(tasks.result, total)
        if (n := rows[0]["n"] + rows[0]["n_special"]) != n_tokens:
            raise StoreError(
                f"the summaries of {one.name} hold {n:,} tokens, expected {n_tokens:,} as the {len(commits):,} "
                f"commits of measure {measure_id} count; 'afn verify {store}' says where"
            )
        statistics = pa.concat_tables([tasks.result(part) for part in types])
        vocabulary = vocabulary_table(
            one.layer, statistics, n_docs, pieces, readable, language, tags
        )
        if one.signal != STRENGTH:
            signals.append(
                {f.name: ({"signal": one.signal} | rows[0])[f.name] for f in SIGNALS_SCHEMA}
            )
            named = vocabulary.append_column(
                "signal", pa.array([one.signal] * len(vocabulary), pa.string())
            )
            signal_vocabularies.append(
                named.select(SIGNAL_VOCABULARY_SCHEMA.names).cast(SIGNAL_VOCABULARY_SCHEMA)
            )
            continue
        thresholds += rows
        labels += goes_by
        histograms.append(histogram)
        vocabularies.append(vocabulary)
    vocabulary = pa.concat_tables(vocabularies)
    others = {
        "signals": pa.Table.from_pylist(signals, SIGNALS_SCHEMA),
        "signal_vocabulary": pa.concat_tables(
            [SIGNAL_VOCABULARY_SCHEMA.empty_table(), *signal_vocabularies]
        ),
    }
    return {
        "shards": shards_table(measure_id, commits, num_bytes),
        "thresholds": pa.Table.from_pylist(thresholds, THRESHOLDS_SCHEMA),
        **({"frozen": pa.Table.from_pylist(labels, THRESHOLDS_SCHEMA)} if frozen else {}),
        "histogram": pa.concat_tables(histograms),
        "vocabulary": vocabulary,
        **(others if signals else {}),
        **(
            _neurons(
                tasks, store, measure_id, commits, neuron_layers, vocabulary, high_neurons, readable
            )
            if neuron_layers
            else {}
        ),
    }


class _Files:
    """What it takes to read a table of every shard, in order; made anew each time, since a run may
    have a million.
    """

    def __init__(self, commits: Sequence[Commit], table: str) -> None:
        self._commits, self._table = commits, table

    def __iter__(self) -> Iterator[SummaryFile]:
        for c in self._commits:
            file = c.files[self._table]
            yield SummaryFile(c.shard, file["name"], file["rows"], file["bytes"], file["sha256"])


def _neurons(
    tasks: Tasks,
    store: str,
    measure_id: str,
    commits: Sequence[Commit],
    layers: Sequence[int],
    vocabulary: pa.Table,
    high_only: bool,
    readable: Sequence[str],
) -> dict[str, pa.Table]:
    """The tables of neurons. Tokens that have a list are all but special ones, or those of them
    that are HIGH.
    """
    files = _Files(commits, "pairs")
    submitted = []
    for layer in layers:
        here = vocabulary.filter((pc.field("layer") == layer) & (pc.field("class") != "special"))
        types = {
            "token_id": here["token_id"].to_numpy(),
            "n": here["n_high" if high_only else "n"].to_numpy(),
        }
        num_parts = min(
            MAX_PARTS, 1 + sum(f.num_bytes for f in files) // (len(layers) * PART_BYTES)
        )
        leaves = (
            tasks.submit(
                _read_pairs, store, measure_id, group, layer, num_parts, num_results=num_parts
            )
            for group in _groups(files, len(layers))
        )
        parts = _tree(tasks, leaves, _merge_pairs, layer)
        submitted.append(
            [tasks.submit(_neuron_tables, part, layer, types, num_results=2) for part in parts]
        )
    by_neuron, by_pair = [], []
    for layer_parts in submitted:
        tables = [[tasks.result(handle) for handle in part] for part in layer_parts]
        order = [("layer", "ascending"), ("neuron", "ascending")]
        by_neuron.append(pa.concat_tables([t for t, _ in tables]).sort_by(order))
        by_pair.append(
            pa.concat_tables([t for _, t in tables]).sort_by([*order, ("token_id", "ascending")])
        )
    return {
        "neurons": neurons.with_texts(pa.concat_tables(by_neuron), readable),
        "neuron_types": pa.concat_tables(by_pair),
    }


# --- the tree ---


def _submit_series(
    tasks: Tasks,
    store: str,
    measure_id: str,
    files: Iterable[SummaryFile],
    at: int,
    series: Sequence[Series],
    sink_factor: float,
    frozen: Sequence[dict[str, Any]],
) -> tuple[list[Any], list[Any]]:
    """Handles of one series' ``_total``, and of ``_types`` of each part."""
    one, num_series = series[at], len(series)
    num_parts = min(MAX_PARTS, 1 + sum(f.num_bytes for f in files) // (num_series * PART_BYTES))
    leaves = (
        tasks.submit(_read, store, measure_id, group, at, one, num_parts, num_results=num_parts)
        for group in _groups(files, num_series)
    )
    parts = _tree(tasks, leaves, _merge, one)
    counts = [tasks.submit(_count, part)[0] for part in parts]
    total = tasks.submit(_total, one.layer, sink_factor, frozen, *counts, num_results=3)
    return total, [tasks.submit(_types, part, total[1])[0] for part in parts]


def _tree(
    tasks: Tasks, leaves: Iterable[list[Any]], merge: Callable[..., Sequence[Any]], subject: Any
) -> list[Any]:
    """Handles of the parts of the sum of ``leaves``, each of which has handles of the same parts.

    ``merge(subject, *parts)`` adds them up.
    """
    levels: list[list[list[Any]]] = [
        []
    ]  # at height h: sums of FAN_IN^h groups, each as handles of its parts

    def merge_level(height: int) -> None:
        """Replace the sums at ``height`` by one above them."""
        if height + 1 == len(levels):
            levels.append([])
        if len(levels[height]) > 1:
            of_part = zip(*levels[height], strict=True)
            levels[height] = [[tasks.submit(merge, subject, *handles)[0] for handles in of_part]]
        levels[height + 1] += levels[height]
        levels[height] = []

    for leaf in leaves:
        levels[0].append(leaf)
        height = 0
        while len(levels[height]) == FAN_IN:
            merge_level(height)
            height += 1
    for height in range(len(levels)):
        merge_level(height)
    (parts,) = levels[-1]
    return parts


def _submit_tags(
    tasks: Tasks, store: str, measure_id: str, files: Iterable[SummaryFile], num_series: int
) -> Any:
    """A handle of the tag that each type has most often."""
    leaves = (
        tasks.submit(_tags, store, measure_id, group, num_series)
        for group in _groups(files, num_series)
    )
    return tasks.submit(_most_frequent, *_tree(tasks, leaves, _add_tags, None))[0]


def _groups(files: Iterable[SummaryFile], num_series: int) -> Iterator[tuple[SummaryFile, ...]]:
    """``files`` in order, in groups of at most ``FAN_IN`` and about ``READ_BYTES`` of a series."""
    group: list[SummaryFile] = []
    size = 0
    for file in files:
        if group and (len(group) == FAN_IN or size + file.num_bytes > num_series * READ_BYTES):
            yield tuple(group)
            group, size = [], 0
        group.append(file)
        size += file.num_bytes
    yield tuple(group)


def _read(
    store: str,
    measure_id: str,
    files: Sequence[SummaryFile],
    at: int,
    series: Series,
    num_parts: int,
) -> list[bytes]:
    """The sum of ``series`` (row group ``at``) of ``files``; part p has the types whose id is p
    modulo the number.

    Ids go by frequency in most vocabularies, so the parts are about equal.
    """
    table = SeriesSummary.merge(_read_series(store, measure_id, files, at, series)).to_table(series)
    part_of = table["token_id"].to_numpy() % num_parts
    return [_encode(table.filter(pa.array(part_of == part))) for part in range(num_parts)]


def _merge(series: Series, *parts: bytes) -> list[bytes]:
    """The sum of ``parts``."""
    return [
        _encode(
            SeriesSummary.merge(SeriesSummary.from_table(_decode(p)) for p in parts).to_table(
                series
            )
        )
    ]


def _count(part: bytes) -> list[tuple[Histogram, Histogram]]:
    """How often each value occurs in ``part``: of normal tokens, and of special ones."""
    normal: list[Histogram] = []
    special: list[Histogram] = []
    for some in _slices(part):
        keys, counts = some.values.keys, some.values.counts
        for which, histograms in ((keys < SPECIAL_KEY, normal), (keys >= SPECIAL_KEY, special)):
            histograms.append(Histogram.of(keys[which] & ((1 << BIN_BITS) - 1), counts[which]))
    return [(Histogram.merge(normal), Histogram.merge(special))]


def _total(
    layer: int,
    sink_factor: float,
    frozen: Sequence[dict[str, Any]],
    *counts: tuple[Histogram, Histogram],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], pa.Table]:
    """Rows of the layer's thresholds, those that labels go by, and its histogram."""
    normal, special = (Histogram.merge(of) for of in zip(*counts, strict=True))
    histogram = pa.concat_tables(
        [histogram_table(layer, False, normal), histogram_table(layer, True, special)]
    )
    own = threshold_rows(layer, normal, special.n, sink_factor)
    return own, frozen_rows(own, normal, frozen) if frozen else own, histogram


def _types(part: bytes, labels: list[dict[str, Any]]) -> list[pa.Table]:
    """``type_statistics`` of ``part`` under the thresholds that labels go by."""
    tables = [type_statistics(some, labels[0]["q3"]) for some in _slices(part)]
    return [pa.concat_tables([STATISTICS_SCHEMA.empty_table(), *tables])]


def _read_pairs(
    store: str, measure_id: str, files: Sequence[SummaryFile], layer: int, num_parts: int
) -> list[bytes]:
    """The sum of the pairs of ``files`` at ``layer``; part p has the neurons whose number is p
    modulo the number.
    """

    def read(file: SummaryFile) -> neurons.Pairs:
        data = shard_files.read_file(
            store, measure_id, file.shard, {"name": file.name, "sha256": file.sha256}
        )
        table = parquet.read(data, filters=[("layer", "=", layer)], use_threads=False)
        return neurons.Pairs.from_table(table)

    total = neurons.EMPTY
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for begin in range(0, len(files), READ_AHEAD):
            total = neurons.Pairs.merge([total, *pool.map(read, files[begin : begin + READ_AHEAD])])
    table = total.to_table(layer)
    part_of = table["neuron"].to_numpy() % num_parts
    return [_encode(table.filter(pa.array(part_of == part))) for part in range(num_parts)]


def _merge_pairs(layer: int, *parts: bytes) -> list[bytes]:
    """The sum of ``parts``."""
    return [
        _encode(
            neurons.Pairs.merge(neurons.Pairs.from_table(_decode(p)) for p in parts).to_table(layer)
        )
    ]


def _neuron_tables(part: bytes, layer: int, types: dict[str, Ints]) -> list[pa.Table]:
    """``neurons.neuron_tables`` of ``part``."""
    return list(neurons.neuron_tables(neurons.Pairs.from_table(_decode(part)), layer, types))


def _tags(
    store: str, measure_id: str, files: Sequence[SummaryFile], num_series: int
) -> list[TypeTags]:
    """The sum of the counts of tags in ``files``, the row group behind those of the series."""
    nothing = TypeTags.of(np.empty(0, np.int32), pa.array([], pa.string()))
    found = (_read_group(store, measure_id, file, num_series) for file in files)
    return [
        TypeTags.merge(
            [nothing, *(TypeTags.from_table(table) for table in found if table is not None)]
        )
    ]


def _add_tags(_: None, *parts: TypeTags) -> list[TypeTags]:
    return [TypeTags.merge(parts)]


def _most_frequent(tags: TypeTags) -> list[dict[int, str]]:
    return [tags.most_frequent()]


def call(function: Callable[..., Sequence[Any]], num_results: int, *args: Any) -> Any:
    """What a ``Tasks`` elsewhere runs: a lone value comes out of its sequence."""
    values = function(*args)
    return values if num_results > 1 else values[0]


def _encode(table: pa.Table) -> bytes:
    """A sum as it travels: 2 to 4 bytes for a distinct pair of a type and a strength, where memory
    takes 16.
    """
    return parquet.encode(
        table,
        row_group_size=max(1, len(table)),
        use_dictionary=["counts.list.element", "neuron", "n"],
        write_statistics=False,
        column_encoding={
            n: "DELTA_BINARY_PACKED"
            for n in ("bins.list.element", "total")
            if n.split(".")[0] in table.column_names
        },
    )


def _decode(data: bytes) -> pa.Table:
    return parquet.read(data, use_threads=False).combine_chunks()


def _slices(part: bytes) -> Iterator[SeriesSummary]:
    """``part``, some types at a time, which are all there is of these types."""
    table = _decode(part)
    if not len(table):
        return
    ends = table["bins"].chunk(0).offsets.to_numpy()
    cuts = np.searchsorted(ends, np.arange(0, ends[-1], SLICE_PAIRS))
    for begin, end in pairwise([*np.unique(cuts).tolist(), len(table)]):
        yield SeriesSummary.from_table(table.slice(begin, end - begin))


def _read_series(
    store: str, measure_id: str, files: Sequence[SummaryFile], at: int, series: Series
) -> Iterator[SeriesSummary]:
    """``series`` (row group ``at``) of every summary, a few files ahead."""

    def read(file: SummaryFile) -> SeriesSummary | None:
        table = _read_group(store, measure_id, file, at)
        if table is None:
            return None
        found = Series(table["signal"][0].as_py(), table["layer"][0].as_py())
        if found != series:
            raise StoreError(
                f"{file.name} of shard {file.shard}: row group {at} holds {found.name}, expected {series.name}"
            )
        return SeriesSummary.from_table(table)

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for begin in range(0, len(files), READ_AHEAD):
            for part in pool.map(read, files[begin : begin + READ_AHEAD]):
                if part is not None:
                    yield part


def _read_group(store: str, measure_id: str, file: SummaryFile, at: int) -> pa.Table | None:
    """Row group ``at`` of a summary; None where it is not there: of a shard without tokens, or
    without tags.
    """
    data = shard_files.read_file(
        store, measure_id, file.shard, {"name": file.name, "sha256": file.sha256}
    )
    summary = parquet.open_file(data)
    return summary.read_row_group(at, use_threads=False) if at < summary.num_row_groups else None


# --- the tables ---
