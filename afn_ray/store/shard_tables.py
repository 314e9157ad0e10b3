"""Tables of a shard with the columns of today's version, whichever version wrote their files.

Version 5 has ``doc`` in the place of ``doc_in_shard``, and in ``tokens`` ``start`` and ``end`` in
the place of ``start_ahead`` and ``length``. ``query.expressions`` knows the same difference in SQL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from afn_ray.schema import READABLE_VERSIONS, SCHEMA_VERSION, TOKEN_CHARS
from afn_ray.store import parquet

OLDEST = READABLE_VERSIONS[0]
DOC, START, LENGTH = "doc_in_shard", "start_ahead", "length"
_OFFSETS = {START: ("start", "position"), LENGTH: ("end", "start")}
"""Columns of version 5 that the offsets of today are made of; the first has its place."""
Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


class ShardTable:
    """A file of a shard's table."""

    def __init__(self, source: Any) -> None:
        """Open ``source`` (bytes, a path or a file). Reading a damaged page raises ``OSError``."""
        self._file: pq.ParquetFile = parquet.open_file(source)
        stored = self._file.schema_arrow
        self._stored: dict[str, str] = {}
        if "doc" in stored.names:
            self._stored[DOC] = "doc"
            if "doc_id" not in stored.names and "end" in stored.names:  # no documents' kept column
                self._stored |= {today: made_of[0] for today, made_of in _OFFSETS.items()}
        todays = {name: today for today, name in self._stored.items()}
        fields = [field.with_name(todays.get(field.name, field.name)) for field in stored]
        self.schema = pa.schema(fields, stored.metadata)
        """The columns as today's version writes them."""

    @property
    def metadata(self) -> pq.FileMetaData:
        """The footer, with the columns that the file has."""
        return self._file.metadata

    @property
    def num_row_groups(self) -> int:
        """Number of row groups."""
        return int(self._file.num_row_groups)

    @property
    def has_documents(self) -> bool:
        """True if the rows belong to documents, so that the version shows in the columns."""
        return DOC in self.schema.names

    @property
    def schema_version(self) -> int:
        """The version that wrote the file; today's for a table that has not changed since."""
        return OLDEST if self._stored else SCHEMA_VERSION

    def docs_in(self, group: int) -> tuple[int, int] | None:
        """The first and the last document of a row group; None where the footer does not say."""
        at = self.schema.get_field_index(DOC)
        found = self.metadata.row_group(group).column(at).statistics
        return (found.min, found.max) if found is not None and found.has_min_max else None

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows with ``columns``, all by default."""
        names = self._names(columns)
        return self._todays(self._file.read(self._stored_names(names)), names)

    def read_row_group(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one row group, as ``read`` gives them."""
        names = self._names(columns)
        return self._todays(self._file.read_row_group(group, self._stored_names(names)), names)

    def batches(
        self,
        rows: int,
        columns: Sequence[str] | None = None,
        row_groups: Sequence[int] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows in order, at most ``rows`` at a time, with ``columns``, all by default."""
        names = self._names(columns)
        stored = self._stored_names(names)
        for batch in self._file.iter_batches(rows, row_groups=row_groups, columns=stored):
            yield self._todays(batch, names)

    def _names(self, columns: Sequence[str] | None) -> list[str]:
        return self.schema.names if columns is None else list(columns)

    def _stored_names(self, names: Sequence[str]) -> list[str]:
        """The columns of the file that ``names`` need."""
        stored: dict[str, None] = {}
        for name in names:
            is_offset = name in _OFFSETS and name in self._stored
            stored |= dict.fromkeys(_OFFSETS[name] if is_offset else [self._stored.get(name, name)])
        return list(stored)

    def _todays(self, rows: Rows, names: Sequence[str]) -> Rows:
        if not self._stored:
            return rows
        columns = []
        for name in names:
            values = rows[self._stored.get(name, name)]
            if name == START and name in self._stored:
                chars = pc.multiply(rows["position"], pa.scalar(TOKEN_CHARS, pa.int32()))
                values = pc.subtract(values, chars)
            elif name == LENGTH and name in self._stored:
                values = pc.subtract(values, rows["start"])
            columns.append(values)
        fields = [self.schema.field(name) for name in names]
        return type(rows).from_arrays(columns, schema=pa.schema(fields))
