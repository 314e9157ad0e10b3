"""Tables of a shard from columns of several results of it, row for row and checked against each
other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.errors import StoreError
from afn_ray.measure import Measure
from afn_ray.runs.task import NEURONS, TOKENS, MeasurePart
from afn_ray.schema import NOT_KEPT, STATE_LIMIT, Series, neurons_column
from afn_ray.store.layout import VECTORS
from afn_ray.store.records import BATCH_ROWS, ShardFiles, TableFile
from afn_ray.store.shard_tables import ShardTable


class Tables(Protocol):
    """The tables of one result of a shard."""

    def open(self, table: str) -> ShardTable:
        """The file of ``table``."""


@dataclass(frozen=True, slots=True)
class PartialResult:
    """One result of a shard, and the parts that are taken from it."""

    tables: Tables
    parts: Collection[MeasurePart]
    counts: Mapping[str, int]
    made_by: Mapping[str, str]
    name: str  # for messages

    def of_table(self, table: str) -> list[Series]:
        """The series of its parts in ``table``."""
        return [part.series for part in self.parts if part.table == table]


def check_complete(source: PartialResult) -> None:
    """Raise ``StoreError`` if a document of ``source`` was read and not measured.

    Other parts may refuse other documents, so such a shard is measured as a whole.
    """
    columns = ["status", "text_sha256"]
    for batch in source.tables.open("documents").batches(BATCH_ROWS, columns):
        status, digests = (batch[name] for name in columns)
        refused = pc.starts_with(status.cast(pa.string()), "quarantined")
        was_read = digests.is_valid()
        if pc.any(pc.and_(refused, was_read)).as_py():
            raise StoreError(f"{source.name} lacks a document that could not be measured")


def write(
    sources: Sequence[PartialResult],
    measure: Measure,
    files: ShardFiles,
    check_stopped: Callable[[], None],
) -> None:
    """Write the tables of ``measure`` to ``files``, each part from the one of ``sources`` with it.

    The rows and their order are those of a shard that is measured as a whole. Raises ``StoreError``
    where two sources differ in a row.
    """
    kept = {*files.kept_names, NOT_KEPT}  # they depend on the corpus alone, and may be nan
    for table in _joined(sources, "tokens", _series_names("{}"), files.tokens.schema):
        check_stopped()
        if measure.mean_types:
            _check_summable(table, measure.series)
        files.tokens.write(table)
    of_documents = _series_names("mean_{}")
    for table in _joined(sources, "documents", of_documents, files.documents.schema, kept):
        files.documents.write(table)
    by_series = {(one.signal, one.layer): MeasurePart(TOKENS, one) for one in measure.series}
    lacking = _write_groups(sources, files.summary, by_series)
    if lacking and files.tokens.num_rows:
        raise StoreError(f"there are no summaries of {', '.join(map(str, lacking))}")
    if measure.tagged or measure.detected:
        summary = sources[0].tables.open("summary")
        if tags := [group for key, group in _groups(summary) if key is None]:
            files.summary.write_each([summary.read_row_group(tags[0])])
    if files.neurons is not None and files.pairs is not None:
        some = [source for source in sources if source.of_table(NEURONS)]
        for table in _joined(some, "neurons", _neuron_names, files.neurons.schema):
            check_stopped()
            files.neurons.write(table)
        layers = measure.neuron_layers
        _write_groups(
            sources, files.pairs, {(k,): MeasurePart(NEURONS, Series(NEURONS, k)) for k in layers}
        )
    if files.vectors is not None:
        layers = measure.layers
        _write_groups(
            sources, files.vectors, {(k,): MeasurePart(VECTORS, Series(VECTORS, k)) for k in layers}
        )


# --- tables with a row for each token or document


def _series_names(form: str) -> Callable[[PartialResult], list[str]]:
    """Function that gives the columns of a source's series, named by ``form``."""

    def names(source: PartialResult) -> list[str]:
        return [form.format(one.name) for one in source.of_table(TOKENS)]

    return names


def _neuron_names(source: PartialResult) -> list[str]:
    return [neurons_column(one.layer) for one in source.of_table(NEURONS)]


def _joined(
    sources: Sequence[PartialResult],
    table: str,
    names_of: Callable[[PartialResult], list[str]],
    schema: pa.Schema,
    uncompared: Collection[str] = (),
) -> Iterator[pa.Table]:
    """Yield ``table`` of ``schema`` in pieces, with the columns ``names_of`` each of ``sources``.

    The other columns must be equal in all sources, except those ``uncompared``; they are taken from
    the first. Raises ``StoreError`` where they differ.
    """
    own: dict[str, PartialResult] = {}
    for source in sources:
        own |= dict.fromkeys(names_of(source), source)
    shared = [name for name in schema.names if name not in own]
    compared = [name for name in shared if name not in uncompared]
    readers: list[_Rows] = []
    for source in sources:
        names = [*(compared if readers else shared), *names_of(source)]
        readers.append(_Rows(source.tables.open(table), names))
    while num_rows := min(reader.num_ready() for reader in readers):
        pieces = [reader.take(num_rows) for reader in readers]
        first = pieces[0]
        columns = {name: first[name] for name in shared}
        for source, piece in zip(sources, pieces, strict=True):
            for name in compared if piece is not first else ():
                if not _are_equal(first[name], piece[name]):
                    raise StoreError(
                        f"{table} of {sources[0].name} and {source.name} differ in {name}"
                    )
            columns |= {name: piece[name] for name in names_of(source)}
        yield pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
    if any(reader.num_ready() for reader in readers):
        raise StoreError(f"{table} of {', '.join(s.name for s in sources)} differ in their rows")


class _Rows:
    """The rows of a file in order, as many at a time as the caller takes."""

    def __init__(self, file: ShardTable, columns: Sequence[str]) -> None:
        self._batches = file.batches(BATCH_ROWS, columns)
        self._batch: pa.RecordBatch | None = None

    def num_ready(self) -> int:
        """Number of rows that can be taken at once; 0 at the end."""
        while self._batch is None or not self._batch.num_rows:
            self._batch = next(self._batches, None)
            if self._batch is None:
                return 0
        return int(self._batch.num_rows)

    def take(self, num_rows: int) -> pa.RecordBatch:
        """The next ``num_rows``, which are ready."""
        assert self._batch is not None
        taken = self._batch.slice(0, num_rows)
        self._batch = self._batch.slice(num_rows)
        return taken


def _are_equal(a: pa.Array, b: pa.Array) -> bool:
    """True if both have the same values and nulls; dictionaries may differ."""
    if pa.types.is_dictionary(a.type):
        a = a.dictionary_decode()
        b = b.dictionary_decode()
    return bool(a.equals(b))


def _check_summable(table: pa.Table, series: Sequence[Series]) -> None:
    """Raise ``StoreError`` if a value is too large for a shard that adds up states."""
    for one in series:
        largest = pc.max(table[one.name]).as_py()
        if largest is not None and largest >= STATE_LIMIT:
            raise StoreError(f"{one.name} reaches {largest:,.0f}, and states are added up")


# --- tables with a row group for each series or layer


def _write_groups(
    sources: Sequence[PartialResult], sink: TableFile, wanted: Mapping[tuple[Any, ...], MeasurePart]
) -> list[tuple[Any, ...]]:
    """Write the row group of each of ``wanted``, in order, from the source with its part.

    Returns those that have no row group, because they have no rows.
    """
    files: dict[MeasurePart, ShardTable] = {}
    for source in sources:
        if parts := [part for part in wanted.values() if part in source.parts]:
            files |= dict.fromkeys(parts, source.tables.open(sink.path.stem))
    groups = {id(file): dict(_groups(file)) for file in files.values()}
    lacking = []
    for key, part in wanted.items():
        file = files[part]
        at = groups[id(file)].get(key)
        if at is None:
            lacking.append(key)
        else:
            rows = file.read_row_group(at)
            sink.write_each([pa.Table.from_arrays(rows.columns, schema=sink.schema)])
    return lacking


def _groups(file: ShardTable) -> Iterator[tuple[tuple[Any, ...] | None, int]]:
    """The signal, if there is one, and the layer of each row group, with its number.

    None in their place: the row group counts tags.
    """
    names = [name for name in ("signal", "layer", "tag") if name in file.schema.names]
    for group in range(file.num_row_groups):
        (first,) = file.read_row_group(group, names).slice(0, 1).to_pylist()
        is_of_tags = first.pop("tag", None) is not None
        yield None if is_of_tags else tuple(first.values()), group
