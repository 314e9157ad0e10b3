"""Reduce shard summaries to a run's thresholds, histogram, vocabulary and neuron tables.

No token record is read again. Summaries are merged in a tree of pure functions, which run in this
process or in others (``Tasks``)::

    read    summaries of one series from some shards  -> their sum, cut by type into parts
    merge   one part from up to FAN_IN sums           -> its sum, until each part occurs once
    count   a part                                    -> how often each value occurs in it
    total   the counts of all parts                   -> the layer's histogram and thresholds
    types   a part and the thresholds that label      -> statistics of each type

Pairs of neurons and types are merged in the same way, cut by neuron. Their last step makes the rows
of both neuron tables. The tags of a labelled corpus, or else the languages of words, are counted
for each type, and read and merged with the first series.

Documents that the run leaves out are taken out of the sums by leaves with negative counts
(``left_out``).

All added values are integers, so order, grouping and place do not change a bit. The caller holds
only handles, and the small tables at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from afn_ray.errors import StoreError
from afn_ray.measure import Measure
from afn_ray.reduce import left_out, mean_vectors, neurons
from afn_ray.reduce.encoded import decode_table, encode_table, encoded_parts
from afn_ray.reduce.histogram import (
    BIN_MASK,
    SPECIAL_KEY,
    Histogram,
    SeriesSummary,
)
from afn_ray.reduce.language_uses import LanguageUses, words_of
from afn_ray.reduce.shards import CommittedFile, CommittedShards
from afn_ray.reduce.stats import Ints
from afn_ray.reduce.tables import (
    STATISTICS_SCHEMA,
    ThresholdRow,
    TokenTexts,
    histogram_table,
    rows_under_frozen,
    shards_table,
    threshold_rows,
    type_statistics,
    vocabulary_table,
)
from afn_ray.reduce.tasks import Inline, Tasks, in_groups, merge_parts
from afn_ray.reduce.type_tags import TagShare, TypeTags
from afn_ray.schema import (
    LANGUAGE,
    SIGNAL_VOCABULARY_SCHEMA,
    SIGNALS_SCHEMA,
    STRENGTH,
    THRESHOLDS_SCHEMA,
    Series,
)
from afn_ray.store import parquet
from afn_ray.token_rows import LabelThresholds

READ_AHEAD = 8
"""Number of files that one call reads at the same time."""
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


@dataclass(frozen=True, slots=True)
class RecordedSeries:
    """Series, neurons and tags that every shard of a run recorded."""

    series: Sequence[Series]  # in the order of the summaries, strength first
    neuron_layers: Sequence[int] = ()  # layers with recorded neurons
    high_neurons: bool = False  # only HIGH tokens have recorded neurons
    tagged: bool = False  # the summaries count tags, which are the classes of types
    detected: bool = (
        False  # documents have languages; without tags, the summaries count words by them
    )
    mean_types: Sequence[int] = ()  # types whose hidden states are added up, ascending

    @classmethod
    def of(cls, measure: Measure) -> RecordedSeries:
        """Series and tags that shards of ``measure`` recorded."""
        high_neurons, tagged = bool(measure.neurons_above), measure.tagged
        return cls(
            measure.series,
            measure.neuron_layers,
            high_neurons,
            tagged,
            measure.detected,
            measure.mean_types,
        )

    @property
    def counted(self) -> str:
        """Column whose values the summaries count by type: tags or languages; "" for none."""
        return "tag" if self.tagged else LANGUAGE if self.detected else ""


@dataclass(frozen=True, slots=True)
class LabelRules:
    """Rules by which a run classifies types and labels tokens."""

    language: str  # of the closed-class words
    sink_factor: float  # a sink is stronger than this many medians
    # Rows of ``label_thresholds.FROZEN`` that label tokens; empty: the run's own thresholds do.
    frozen: Sequence[LabelThresholds] = ()


def reduce_run(
    shards: CommittedShards,
    recorded: RecordedSeries,
    texts: TokenTexts,
    rules: LabelRules,
    tasks: Tasks | None = None,
) -> dict[str, pa.Table]:
    """The run's tables, made from its shards' summaries by ``tasks`` or in this process.

    The result does not depend on how the corpus was cut into shards. Raises ``StoreError`` if a
    summary is missing or damaged, or if the summaries do not hold the number of tokens that the
    commits count.
    """
    tasks = tasks or Inline()
    series = recorded.series
    num_parts = _num_parts(shards.files("summary"), len(series))
    negative = left_out.submit_negative(tasks, shards, series, recorded.counted, num_parts)
    submitted, labels = [], None
    for at in range(len(series)):
        is_first = at == 0 and recorded.counted != ""
        leaves = [[*leaf[at], *(leaf[-1] if is_first else [])] for leaf in negative]
        total, types, counts = _submit_series(tasks, shards, at, recorded, rules, leaves)
        submitted.append((total, types))
        labels = labels or counts
    tags, uses = _tags_and_uses(tasks, recorded, labels)
    words = words_of(rules.language, uses)
    of_strength: list[_Reduced] = []
    of_signals: list[_Reduced] = []
    for one, (total, types) in zip(series, submitted, strict=True):
        own, labels, histogram = map(tasks.result, total)
        _check_total(shards, one, own[0]["n"] + own[0]["n_special"])
        statistics = pa.concat_tables([tasks.result(part) for part in types])
        vocabulary = vocabulary_table(one.layer, statistics, shards.n_docs, texts, words, tags)
        of_kind = of_strength if one.signal == STRENGTH else of_signals
        of_kind.append(_Reduced(one, own, labels, histogram, vocabulary))
    tables = {"shards": shards_table(shards.measure_id, shards.commits, shards.num_bytes)}
    tables |= _strength_tables(of_strength, is_frozen=bool(rules.frozen))
    if uses is not None:
        tables["languages"] = uses.table()
    if of_signals:
        tables |= _signal_tables(of_signals)
    if recorded.neuron_layers:
        tables |= _neurons(tasks, shards, recorded, tables["vocabulary"], texts.readable)
    if recorded.mean_types:
        layers = [one.series.layer for one in of_strength]
        tables |= mean_vectors.vector_tables(
            tasks, shards, layers, recorded.mean_types, tables["vocabulary"]
        )
    return tables


class _Reduced(NamedTuple):
    """Results of one series, as in ``THRESHOLDS_SCHEMA`` and so on."""

    series: Series
    thresholds: list[ThresholdRow]  # the series' own
    labels: list[ThresholdRow]  # those that label tokens
    histogram: pa.Table
    vocabulary: pa.Table


def _strength_tables(layers: Sequence[_Reduced], *, is_frozen: bool) -> dict[str, pa.Table]:
    """Tables of strength at ``layers``; with ``is_frozen`` also of the thresholds that label."""
    thresholds = [row for one in layers for row in one.thresholds]
    tables = {"thresholds": pa.Table.from_pylist(thresholds, THRESHOLDS_SCHEMA)}
    if is_frozen:
        labels = [row for one in layers for row in one.labels]
        tables["frozen"] = pa.Table.from_pylist(labels, THRESHOLDS_SCHEMA)
    tables["histogram"] = pa.concat_tables([one.histogram for one in layers])
    tables["vocabulary"] = pa.concat_tables([one.vocabulary for one in layers])
    return tables


def _signal_tables(signals: Sequence[_Reduced]) -> dict[str, pa.Table]:
    """The tables ``signals`` and ``signal_vocabulary``."""
    rows, vocabularies = [], []
    for one in signals:
        rows.append({"signal": one.series.signal, **one.thresholds[0]})
        vocabularies.append(_signal_vocabulary(one.series.signal, one.vocabulary))
    return {
        "signals": pa.Table.from_pylist(rows, SIGNALS_SCHEMA),
        "signal_vocabulary": pa.concat_tables(vocabularies),
    }


def _check_total(shards: CommittedShards, series: Series, n: int) -> None:
    """Raise ``StoreError`` if the summaries do not hold the tokens that the commits count."""
    if n != shards.n_tokens:
        raise StoreError(
            f"the summaries of {series.name} hold {n:,} tokens, expected {shards.n_tokens:,} as "
            f"the {len(shards.commits):,} commits of measure {shards.measure_id} count; 'afn "
            f"verify {shards.store}' says where"
        )


def _signal_vocabulary(signal: str, vocabulary: pa.Table) -> pa.Table:
    names = pa.array([signal] * len(vocabulary), pa.string())
    named = vocabulary.append_column("signal", names)
    return named.select(SIGNAL_VOCABULARY_SCHEMA.names).cast(SIGNAL_VOCABULARY_SCHEMA)


def _neurons(
    tasks: Tasks,
    shards: CommittedShards,
    recorded: RecordedSeries,
    vocabulary: pa.Table,
    readable: Sequence[str],
) -> dict[str, pa.Table]:
    """The tables ``neurons`` and ``neuron_types``."""
    layers = recorded.neuron_layers
    counted = "n_high" if recorded.high_neurons else "n"
    num_parts = _num_parts(shards.files("pairs"), len(layers))
    whole = [
        shards.file(commit, "pairs") for commit, _, without in shards.places() if not len(without)
    ]
    recounted = left_out.submit_pairs(tasks, shards, layers, num_parts)
    submitted = []
    for at, layer in enumerate(layers):
        is_normal = (pc.field("layer") == layer) & (pc.field("class") != "special")
        here = vocabulary.filter(is_normal)
        types = {"token_id": here["token_id"].to_numpy(), "n": here[counted].to_numpy()}
        leaves = (
            tasks.submit(_read_pairs, group, layer, num_parts, num_results=num_parts)
            for group in _groups(whole, len(layers))
        )
        of_layer = (leaf[at] for leaf in recounted)
        parts = merge_parts(tasks, itertools.chain(leaves, of_layer), _merge_pairs, layer)
        submitted.append(
            [tasks.submit(_neuron_tables, part, layer, types, num_results=2) for part in parts]
        )
    order = [("layer", "ascending"), ("neuron", "ascending")]
    by_neuron, by_pair = [], []
    for parts_of_layer in submitted:
        neurons_here = [tasks.result(of_neurons) for of_neurons, _ in parts_of_layer]
        pairs_here = [tasks.result(of_pairs) for _, of_pairs in parts_of_layer]
        by_neuron.append(pa.concat_tables(neurons_here).sort_by(order))
        by_pair.append(pa.concat_tables(pairs_here).sort_by([*order, ("token_id", "ascending")]))
    return {
        "neurons": neurons.with_texts(pa.concat_tables(by_neuron), readable),
        "neuron_types": pa.concat_tables(by_pair),
    }


# --- the tree ---


def _submit_series(
    tasks: Tasks,
    shards: CommittedShards,
    at: int,
    recorded: RecordedSeries,
    rules: LabelRules,
    negative: Sequence[list[Any]] = (),
) -> tuple[list[Any], list[Any], Any]:
    """Handles of the results of ``_total`` for one series, of ``_types`` for each part, and of
    tags.

    Tags, or languages, are read with the first series, so that a summary is read once for both.
    ``negative`` are leaves that take documents out.
    """
    series = recorded.series
    one, tags_at = series[at], len(series) if at == 0 and recorded.counted else None
    frozen: list[LabelThresholds] = []
    if one.signal == STRENGTH:
        frozen = [row for row in rules.frozen if row["layer"] == one.layer]
    num_parts = _num_parts(shards.files("summary"), len(series))
    num_results = num_parts + (tags_at is not None)
    leaves = (
        tasks.submit(_read, group, at, one, num_parts, tags_at, num_results=num_results)
        for group in _groups(shards.files("summary"), len(series))
    )
    parts = merge_parts(tasks, itertools.chain(leaves, negative), _merge, one)
    tags = None if tags_at is None else parts.pop()
    counts: list[Any] = []
    for part in parts:
        counts += tasks.submit(_count, part)
    total = tasks.submit(_total, one.layer, rules.sink_factor, frozen, *counts, num_results=3)
    _, labels, _ = total
    types: list[Any] = []
    for part in parts:
        types += tasks.submit(_types, part, labels)
    return total, types, tags


def _tags_and_uses(
    tasks: Tasks, recorded: RecordedSeries, counts: Any
) -> tuple[dict[int, TagShare] | None, LanguageUses | None]:
    """The most frequent tag of each type, and its uses by language; None for what is not counted.

    ``counts`` is the handle of the sum of tags or languages.
    """
    if not recorded.counted:
        return None, None
    if not recorded.tagged:
        return None, LanguageUses(tasks.result(counts))
    (most_frequent,) = tasks.submit(_most_frequent, counts)
    return tasks.result(most_frequent), None


def _num_parts(files: Iterable[CommittedFile], num_series: int) -> int:
    """Number of parts into which the sum of one series over ``files`` is cut."""
    num_bytes = sum(file.num_bytes for file in files)
    return min(MAX_PARTS, 1 + num_bytes // (num_series * PART_BYTES))


def _groups(files: Iterable[CommittedFile], num_series: int) -> Iterator[tuple[CommittedFile, ...]]:
    """``files`` in order, in groups of about ``READ_BYTES`` per series."""
    return in_groups(files, lambda file: file.num_bytes, num_series * READ_BYTES)


def _read(
    files: Sequence[CommittedFile],
    at: int,
    series: Series,
    num_parts: int,
    tags_at: int | None = None,
) -> list[Any]:
    """The sum of ``series`` (row group ``at``) over ``files``, as ``num_parts`` encoded parts.

    Part p has the types whose id modulo ``num_parts`` is p. Most vocabularies order ids by
    frequency, so the parts have about equal sizes. Last comes the sum of the tags in row group
    ``tags_at``, if it is given.
    """
    tags = [TypeTags.empty()]
    total = SeriesSummary.merge(_read_series(files, at, series, tags_at, tags))
    parts = encoded_parts(total.to_table(series), "token_id", num_parts)
    return parts if tags_at is None else [*parts, TypeTags.merge(tags)]


def _merge(series: Series, *parts: Any) -> list[Any]:
    """The sum of ``parts``, which are parts of ``series`` or tags."""
    if isinstance(parts[0], TypeTags):
        return [TypeTags.merge(parts)]
    summaries = (SeriesSummary.from_table(decode_table(part)) for part in parts)
    total = SeriesSummary.merge(summaries)
    return [encode_table(total.to_table(series))]


def _count(part: bytes) -> list[tuple[Histogram, Histogram]]:
    """Histograms of the values in ``part``: one of normal tokens, one of special tokens."""
    normal: list[Histogram] = []
    special: list[Histogram] = []
    for some in _slices(part):
        bins, counts = some.values.keys & BIN_MASK, some.values.counts
        is_special = some.values.keys >= SPECIAL_KEY
        normal.append(Histogram.of(bins[~is_special], counts[~is_special]))
        special.append(Histogram.of(bins[is_special], counts[is_special]))
    return [(Histogram.merge(normal), Histogram.merge(special))]


def _total(
    layer: int,
    sink_factor: float,
    frozen: Sequence[LabelThresholds],
    *counts: tuple[Histogram, Histogram],
) -> tuple[list[ThresholdRow], list[ThresholdRow], pa.Table]:
    """Rows of the layer's own thresholds, rows of those that label tokens, and its histogram."""
    normal = Histogram.merge(of_normal for of_normal, _ in counts)
    special = Histogram.merge(of_special for _, of_special in counts)
    own = threshold_rows(layer, normal, special.n, sink_factor)
    labels = rows_under_frozen(own, normal, frozen) if frozen else own
    histogram = pa.concat_tables(
        [histogram_table(layer, False, normal), histogram_table(layer, True, special)]
    )
    return own, labels, histogram


def _types(part: bytes, labels: list[ThresholdRow]) -> list[pa.Table]:
    """``type_statistics`` of ``part`` under the thresholds that label tokens."""
    tables = [type_statistics(some, labels[0]["q3"]) for some in _slices(part)]
    return [pa.concat_tables([STATISTICS_SCHEMA.empty_table(), *tables])]


def _read_pairs(files: Sequence[CommittedFile], layer: int, num_parts: int) -> list[bytes]:
    """The sum of the pairs in ``files`` at ``layer``, as ``num_parts`` encoded parts.

    Part p has the neurons whose number modulo ``num_parts`` is p.
    """

    def read(file: CommittedFile) -> neurons.Pairs:
        table = parquet.read(file.read(), filters=[("layer", "=", layer)], use_threads=False)
        return neurons.Pairs.from_table(table)

    total = neurons.EMPTY
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for begin in range(0, len(files), READ_AHEAD):
            found = pool.map(read, files[begin : begin + READ_AHEAD])
            total = neurons.Pairs.merge([total, *found])
    return encoded_parts(total.to_table(layer), "neuron", num_parts)


def _merge_pairs(layer: int, *parts: bytes) -> list[bytes]:
    """The sum of ``parts``."""
    pairs = (neurons.Pairs.from_table(decode_table(part)) for part in parts)
    total = neurons.Pairs.merge(pairs)
    return [encode_table(total.to_table(layer))]


def _neuron_tables(part: bytes, layer: int, types: dict[str, Ints]) -> list[pa.Table]:
    """``neurons.neuron_tables`` of ``part``."""
    pairs = neurons.Pairs.from_table(decode_table(part))
    return list(neurons.neuron_tables(pairs, layer, types))


def _most_frequent(tags: TypeTags) -> list[dict[int, TagShare]]:
    return [tags.most_frequent()]


def _slices(part: bytes) -> Iterator[SeriesSummary]:
    """``part``, some types at a time; each slice holds all values of its types."""
    table = decode_table(part)
    if not len(table):
        return
    ends = table["bins"].chunk(0).offsets.to_numpy()
    num_pairs = int(ends[-1])
    cuts = np.searchsorted(ends, np.arange(0, num_pairs, SLICE_PAIRS))
    limits = [*np.unique(cuts).tolist(), len(table)]
    for begin, end in pairwise(limits):
        yield SeriesSummary.from_table(table.slice(begin, end - begin)).without_zeros()


def _read_series(
    files: Sequence[CommittedFile],
    at: int,
    series: Series,
    tags_at: int | None,
    tags: list[TypeTags],
) -> Iterator[SeriesSummary]:
    """``series`` (row group ``at``) of every summary that has it, reading several files at a time.

    The tags of each summary (row group ``tags_at``) are appended to ``tags``. Raises ``StoreError``
    if a row group holds another series.
    """

    def read(file: CommittedFile) -> SeriesSummary | None:
        summary = parquet.open_file(file.read())
        of_tags = None if tags_at is None else _read_group(summary, tags_at)
        if of_tags is not None:
            tags.append(TypeTags.from_table(of_tags))
        table = _read_group(summary, at)
        if table is None:
            return None
        found = Series(table["signal"][0].as_py(), table["layer"][0].as_py())
        if found != series:
            raise StoreError(
                f"{file.name} of shard {file.shard}: row group {at} holds {found.name}, expected "
                f"{series.name}"
            )
        return SeriesSummary.from_table(table)

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for begin in range(0, len(files), READ_AHEAD):
            for part in pool.map(read, files[begin : begin + READ_AHEAD]):
                if part is not None:
                    yield part


def _read_group(summary: pq.ParquetFile, at: int) -> pa.Table | None:
    """Row group ``at`` of a summary; None if the shard has no tokens or no tags for it."""
    if at >= summary.num_row_groups:
        return None
    return summary.read_row_group(at, use_threads=False)
