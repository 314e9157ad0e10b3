"""Per-token and per-document records as Parquet files on local scratch, compactly encoded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from afn_ray.errors import Interrupted
from afn_ray.schema import (
    PAIRS_SCHEMA,
    TOKEN_CHARS,
    VECTORS_SCHEMA,
    Series,
    documents_schema,
    summary_schema,
    token_neurons_schema,
    tokens_schema,
)
from afn_ray.store import disk, parquet
from afn_ray.store.layout import VECTORS
from afn_ray.store.shard_tables import DOC, START, ShardTable

ROW_GROUP_ROWS = 1 << 19
"""Rows after which a row group ends: 0.5 M scan fastest, and a document is found in about 3 ms."""

PAGE_ROWS = 1 << 17
"""Largest number of rows in a page. In Arrow's pages of 20,000, dictionaries and zstd find less
that repeats: level 1 takes as many bytes in these as level 3 in those, and a fifth less time."""

START_COLUMN = (
    f"a token starts at character {TOKEN_CHARS} * position + start_ahead of its document, and ends "
    "length characters later"
)
"""Note on this column in the footer of files that have it."""

DOC_COLUMN = (
    "doc_in_shard counts the documents of this shard from 0: it repeats in every shard, so a join "
    "over several shards needs the shard beside it, which is the folder of the file"
)
"""Note on this column in the footer of each file that has it, for readers of raw files."""

BATCH_ROWS = 1 << 18
"""Rows read at a time."""

_DELTA = (
    "doc_in_shard",
    "position",
    "start_ahead",
    "offset",
    "n_tokens",
    "n_windows",
    "n_chars",
    "n_replaced",
    "bins",
    "total",
    "totals",
)
"""Integer columns that are delta-encoded."""

_LEVELS = {"token_id": 3}
"""Level of zstd by column, 1 for the others: here 3 saves a fifteenth for 3 ns a token."""


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer with the encodings that measured best, and zstd for all columns.

    Integers in ``_DELTA`` are delta-encoded, repeated values get dictionaries, and floats are
    byte-stream split. Surfaces have no statistics: a row group has nearly all of them, and to find
    the first and the last takes a tenth of the time of writing a token.
    """
    encodings: dict[str, str] = {}
    dictionaries: list[str] = []
    summarised: list[str] = []
    levels: dict[str, int] = {}
    for leaf, name, kind in _leaves(schema):
        levels[leaf] = _LEVELS.get(name, 1)
        if name != "surface":
            summarised.append(leaf)
        if name in _DELTA and pa.types.is_integer(kind):
            encodings[leaf] = "DELTA_BINARY_PACKED"
        elif pa.types.is_floating(kind):
            encodings[leaf] = "BYTE_STREAM_SPLIT"
        elif not pa.types.is_fixed_size_binary(kind):
            dictionaries.append(leaf)
    return parquet.writer(
        path,
        schema,
        compression_level=levels,
        max_rows_per_page=PAGE_ROWS,
        write_batch_size=PAGE_ROWS,
        use_dictionary=dictionaries,
        column_encoding=encodings,
        write_statistics=summarised,
    )


def _leaves(schema: pa.Schema) -> Iterator[tuple[str, str, pa.DataType]]:
    """Path, name and type of each Parquet column, including those inside lists and structs."""
    for field in schema:
        path, kind = field.name, field.type
        if pa.types.is_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        if pa.types.is_struct(kind):
            for member in kind:
                yield f"{path}.{member.name}", member.name, member.type
        else:
            yield path, field.name, kind


class TableFile:
    """One Parquet file that grows: tables go in, row groups of ``ROW_GROUP_ROWS`` come out."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.num_rows = 0
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        with _scratch(path):
            self._file = _writer(path, schema)

    def write(self, table: pa.Table) -> None:
        """Append ``table``; write a row group when enough rows are gathered."""
        self._pending.append(table)
        self._pending_rows += table.num_rows
        self.num_rows += table.num_rows
        if self._pending_rows >= ROW_GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        """End the row group: write all rows since the previous one."""
        if self._pending_rows:
            with _scratch(self.path):
                table = pa.concat_tables(self._pending).unify_dictionaries()
                self._file.write_table(table, self._pending_rows)
        self._pending = []
        self._pending_rows = 0

    def write_each(self, tables: Iterable[pa.Table]) -> None:
        """Write one row group for each table with rows, so that a reduce can read one at a time."""
        for table in tables:
            self.write(table)
            self.flush()

    def close(self) -> None:
        """Write the remaining rows and the footer."""
        self.flush()
        with _scratch(self.path):
            self._file.close()


class CorpusColumns(NamedTuple):
    """Columns of a shard's tables that depend on the corpus."""

    tagged: bool = False  # the corpus is labelled, so tokens have tags
    kept: Sequence[pa.Field] = ()  # kept columns of the documents
    detected: bool = False  # the languages of documents are detected


NO_COLUMNS = CorpusColumns()
"""Columns of a corpus without tags and kept columns."""


class ShardFiles:
    """The files of one attempt at a shard, closed on leaving the context.

    Tables of neurons are included if neurons are recorded. ``origin`` (measure, shard, attempt) is
    written into each footer, so that a file states where it belongs.
    """

    def __init__(
        self,
        folder: Path,
        series: Sequence[Series],
        neuron_layers: Sequence[int],
        offsets: bool,
        origin: Mapping[str, str],
        of_corpus: CorpusColumns = NO_COLUMNS,
    ) -> None:
        def table(name: str, schema: pa.Schema) -> TableFile:
            metadata = {"afn": json.dumps({**origin, "table": name})}
            if DOC in schema.names:
                metadata[f"afn.{DOC}"] = DOC_COLUMN
            if name == "tokens" and offsets:
                metadata[f"afn.{START}"] = START_COLUMN
            return TableFile(folder / f"{name}.parquet", schema.with_metadata(metadata))

        self.kept_names = [field.name for field in of_corpus.kept]
        tagged, detected = of_corpus.tagged, of_corpus.detected
        self.tokens = table("tokens", tokens_schema(series, offsets, tagged))
        self.documents = table("documents", documents_schema(series, of_corpus.kept, detected))
        self.summary = table("summary", summary_schema(tagged=tagged, detected=detected))
        self._files = [self.tokens, self.documents, self.summary]
        self._table = table
        self.vectors: TableFile | None = None
        self.neurons: TableFile | None = None
        self.pairs: TableFile | None = None
        if neuron_layers:
            self.neurons = table("neurons", token_neurons_schema(neuron_layers))
            self.pairs = table("pairs", PAIRS_SCHEMA)
            self._files += [self.neurons, self.pairs]

    def record_vectors(self) -> None:
        """Make the file of sums of hidden states too."""
        self.vectors = self._table(VECTORS, VECTORS_SCHEMA)
        self._files.append(self.vectors)

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()

    def close(self) -> None:
        """Write the remaining rows and the footers."""
        for file in self._files:
            file.close()

    def tables(self) -> dict[str, tuple[Path, int]]:
        """Path and number of rows of each file, by table name."""
        return {file.path.stem: (file.path, file.num_rows) for file in self._files}


def read_origin(file: ShardTable) -> dict[str, str]:
    """The origin that ``ShardFiles`` wrote into a footer: measure, shard, attempt and table.

    It is empty if there is none.
    """
    try:
        value = json.loads((file.metadata.metadata or {}).get(b"afn", b"{}"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def make_table(columns: Mapping[str, object], schema: pa.Schema) -> pa.Table:
    """``columns`` (arrays or lists) as a table of ``schema``; other columns are left out."""
    arrays = []
    for field in schema:
        values = columns[field.name]
        if isinstance(values, pa.Array):
            arrays.append(values)
        elif pa.types.is_dictionary(field.type):
            arrays.append(pa.array(values, field.type.value_type).dictionary_encode())
        else:
            arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def whole_documents(
    file: ShardTable, ends: npt.NDArray[np.int64], columns: Sequence[str]
) -> Iterator[tuple[int, pa.Table]]:
    """Yield the rows of ``tokens`` in order, several whole documents at a time.

    Each item is the number of the first row and a table with ``DOC`` and ``columns``. ``ends``
    (int64) is the row after each document's last one. Memory is bounded by ``BATCH_ROWS`` or the
    longest document, whatever the size of the shard.
    """
    first = read = 0
    held: list[pa.RecordBatch] = []
    for batch in file.batches(BATCH_ROWS, [DOC, *columns]):
        held.append(batch)
        read += len(batch)
        ended = int(np.searchsorted(ends, read, side="right"))
        if ended and ends[ended - 1] > first:
            table = pa.Table.from_batches(held)
            whole = int(ends[ended - 1]) - first
            yield first, table.slice(0, whole).combine_chunks()
            first += whole
            held = table.slice(whole).to_batches()


def some_documents(
    file: ShardTable, docs: npt.NDArray[np.int64], columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield the rows of ``docs``, in ascending order, several whole documents at a time.

    The tables have ``DOC`` and ``columns``. Row groups without these documents are not read.
    """
    groups = []
    for group in range(file.num_row_groups):
        begin, end = 0, len(docs)
        if (found := file.docs_in(group)) is not None:
            begin = int(np.searchsorted(docs, found[0]))
            end = int(np.searchsorted(docs, found[1], side="right"))
        if begin < end:
            groups.append(group)
    held: list[pa.RecordBatch] = []
    for batch in file.batches(BATCH_ROWS, [DOC, *columns], groups):
        rows = batch[DOC].to_numpy()
        is_wanted = np.isin(rows, docs)
        held.append(batch.filter(pa.array(is_wanted)))
        table = pa.Table.from_batches(held)
        end = int(np.searchsorted(table[DOC].to_numpy(), rows[-1]))  # the last may go on
        if end:
            yield table.slice(0, end).combine_chunks()
        held = table.slice(end).to_batches()
    if sum(map(len, held)):
        yield pa.Table.from_batches(held).combine_chunks()


@contextmanager
def _scratch(path: Path) -> Iterator[None]:
    """Raise ``Interrupted`` in place of an error of a full scratch disk."""
    try:
        yield
    except OSError as error:
        if error.errno in disk.FULL:
            raise Interrupted(
                f"no space left on scratch while writing {path}; make room or give another "
                "--scratch, and run the same command again: it resumes"
            ) from error
        raise
