"""Reduce shard summaries to a run's thresholds, histogram, vocabulary and neuron tables.

No token record is read again. Summaries are merged in a tree of pure functions, which run in this
process or in others (``Tasks``)::

    read    summaries of one series from some shards  -> their sum, cut by type into parts
    merge   one part from up to FAN_IN sums           -> its sum, until each part occurs once
    count   a part                                    -> how often each value occurs in it
    total   the counts of all parts                   -> the layer's histogram and thresholds
    types   a part and the thresholds that label      -> statistics of each type

Pairs of neurons and types are merged in the same way, cut by neuron. Their last step makes the rows
of both neuron tables. The tags of a labelled corpus are counted for each type::

    tags    summaries of some shards                  -> their sum
    add     up to FAN_IN sums                         -> their sum, until one is left

All added values are integers, so order, grouping and place do not change a bit. The caller holds
only handles, and the small tables at the end.
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
"""Number of files that one call reads at the same time."""
FAN_IN = 64
"""Largest number of sums that one call merges, and of shards that one call reads."""
READ_BYTES = 16 << 20
"""Bytes of one series' summaries that one call reads, as stored.

Large shards are read in smaller groups. Each stored byte takes 8 to 40 bytes of memory.
"""
SLICE_PAIRS = 1 << 20
"""Number of pairs of a type and a strength that a call processes at a time."""
PART_BYTES = 32 << 20
"""Stored bytes of one series' summaries for each part.

The sum is smaller, because a pair that occurs in several summaries occurs once in it.
"""
MAX_PARTS = 16
"""Largest number of parts of a series.

More parts would distribute the last merges better, but parts under 100 kB would pass through the
driver.
"""


class Tasks(Protocol):
    """Runs pure functions in this process or in others, perhaps again if a process died."""

    def submit(
        self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1
    ) -> list[Any]:
        """Start ``function(*args)``; return one handle for each of its ``num_results`` values.

        The function receives the values of handles among ``args``.
        """

    def result(self, handle: Any) -> Any:
        """Wait for the value of ``handle``.

        Raises the error of its function, or of a function that it depends on.
        """


class Inline:
    """Runs each function at once in this process; a handle is the value itself."""

    def submit(
        self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1
    ) -> list[Any]:
        values = list(function(*args))
        assert len(values) == num_results
        return values

    def result(self, handle: Any) -> Any:
        return handle


class SummaryFile(NamedTuple):
    """Location, size and checksum of one table file of a shard."""

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
    """The run's tables, made from its shards' summaries by ``tasks`` or in this process.

    - ``commits`` are in plan order, and ``num_bytes`` are the bytes read for each of them.
    - ``series`` has the order of the summaries, strength first.
    - ``pieces`` and ``readable`` are the vocabulary's texts by token id.
    - ``frozen`` has rows of ``manifest.FROZEN``. If given, they label tokens instead of the run's
      own thresholds.
    - ``neuron_layers`` are the layers with recorded neurons; with ``high_neurons`` only HIGH tokens
      have them.
    - ``tagged``: the summaries count tags, and the classes of types are their tags.

    The result does not depend on how the corpus was cut into shards. Raises ``StoreError`` if a
    summary is missing or damaged, or if the summaries do not hold the number of tokens that the
    commits count.
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
    """The files of one table of all shards, in order.

    Entries are made on each iteration, because a run may have a million shards.
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
    """The tables ``neurons`` and ``neuron_types``.

    All normal tokens have recorded neurons; with ``high_only`` only the HIGH ones of them do.
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
    """Handles of the results of ``_total`` for one series, and of ``_types`` for each part."""
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
    """Handles of the parts of the sum of ``leaves``.

    Each leaf is a list of handles, one for each part. ``merge(subject, *values)`` adds the values
    of one part.
    """
    # At height h: sums of FAN_IN^h leaves, each as a list of handles of its parts.
    levels: list[list[list[Any]]] = [[]]

    def merge_level(height: int) -> None:
        """Replace the sums at ``height`` by one sum at the next height."""
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
    """Handle of the most frequent tag of each type."""
    leaves = (
        tasks.submit(_tags, store, measure_id, group, num_series)
        for group in _groups(files, num_series)
    )
    return tasks.submit(_most_frequent, *_tree(tasks, leaves, _add_tags, None))[0]


def _groups(files: Iterable[SummaryFile], num_series: int) -> Iterator[tuple[SummaryFile, ...]]:
    """``files`` in order, in groups of at most ``FAN_IN`` and about ``READ_BYTES`` per series."""
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
    """The sum of ``series`` (row group ``at``) over ``files``, as ``num_parts`` encoded parts.

    Part p has the types whose id modulo ``num_parts`` is p. Most vocabularies order ids by
    frequency, so the parts have about equal sizes.
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
    """Histograms of the values in ``part``: one of normal tokens, one of special tokens."""
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
    """Rows of the layer's own thresholds, rows of those that label tokens, and its histogram."""
    normal, special = (Histogram.merge(of) for of in zip(*counts, strict=True))
    histogram = pa.concat_tables(
        [histogram_table(layer, False, normal), histogram_table(layer, True, special)]
    )
    own = threshold_rows(layer, normal, special.n, sink_factor)
    return own, frozen_rows(own, normal, frozen) if frozen else own, histogram


def _types(part: bytes, labels: list[dict[str, Any]]) -> list[pa.Table]:
    """``type_statistics`` of ``part`` under the thresholds that label tokens."""
    tables = [type_statistics(some, labels[0]["q3"]) for some in _slices(part)]
    return [pa.concat_tables([STATISTICS_SCHEMA.empty_table(), *tables])]


def _read_pairs(
    store: str, measure_id: str, files: Sequence[SummaryFile], layer: int, num_parts: int
) -> list[bytes]:
    """The sum of the pairs in ``files`` at ``layer``, as ``num_parts`` encoded parts.

    Part p has the neurons whose number modulo ``num_parts`` is p.
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
    """The sum of the tag counts in ``files``; their row group follows those of the series."""
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
    """Run ``function`` for a ``Tasks`` in other processes; return a single result unwrapped."""
    values = function(*args)
    return values if num_results > 1 else values[0]


def _encode(table: pa.Table) -> bytes:
    """A sum as Parquet bytes, for transfer between processes.

    A distinct pair of a type and a strength takes 2 to 4 bytes, against 16 in memory.
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
    """``part``, some types at a time; each slice holds all values of its types."""
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
    """``series`` (row group ``at``) of every summary that has it, reading several files at a time.

    Raises ``StoreError`` if a row group holds another series.
    """

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
    """Row group ``at`` of a summary; None if the shard has no tokens or no tags for it."""
    data = shard_files.read_file(
        store, measure_id, file.shard, {"name": file.name, "sha256": file.sha256}
    )
    summary = parquet.open_file(data)
    return summary.read_row_group(at, use_threads=False) if at < summary.num_row_groups else None
