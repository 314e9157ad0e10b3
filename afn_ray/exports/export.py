"""Export a table or query of a run to a folder that other engines read: once, and resumable."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from afn_ray import notebook
from afn_ray.errors import ConfigError
from afn_ray.exports import card, catalogs, formats, parts, writing
from afn_ray.exports.request import (
    BATCH_ROWS,
    ExportRequest,
    IcebergTable,
    arrow_schema,
    check_names,
    first_rows,
    rows,
)
from afn_ray.exports.target import Target
from afn_ray.exports.writing import ExportFile
from afn_ray.query.database import Run, open_run
from afn_ray.query.shard_views import SHARD_VIEWS, ShardRange
from afn_ray.show.query_output import unique_names
from afn_ray.store import uris
from afn_ray.text import count

FILE_BYTES = 256 << 20
"""Default size of a file, in bytes."""
TIMEOUT_S = 3600.0
"""Time limit for each batch of rows, in seconds, where no open run brings another."""

FILES = pa.schema([("name", pa.string()), ("rows", pa.int64()), ("bytes", pa.int64())])
"""Columns of ``Exported.table``, the fields of ``ExportFile``."""

OnFile = Callable[[ExportFile, int | None], None]
"""Called with each file that was written, and the number of files of the export if it is known."""


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    uri: str
    format: str
    files: tuple[ExportFile, ...]
    """Its files, in ``data`` of the folder ``uri``."""
    num_new: int
    """Number of files that this call wrote; the others were there."""

    @property
    def num_rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def table(self) -> pa.Table:
        """One row for each file, with the columns of ``FILES``."""
        return pa.Table.from_pylist([asdict(file) for file in self.files], FILES)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        return notebook.table(f"{count(self.num_rows, 'row')} as {self.format}", self.table)


def export(
    run: Run | str,
    target: str,
    table: str | None = None,
    *,
    sql: str | None = None,
    format: str = "parquet",
    file_bytes: int = FILE_BYTES,
    iceberg: IcebergTable | None = None,
    on_file: OnFile | None = None,
) -> Exported:
    """Write ``table`` of a run (by default tokens), or the rows of ``sql``, to ``target``.

    ``target`` is a folder, or one of a bucket.

    ``run`` is an open run, with its limits and its baseline, or a URI as for ``open_run``.
    ``format`` is parquet, iceberg, hf-dataset or csv. Files have about ``file_bytes``. With the
    format iceberg, ``iceberg`` is the table to create.

    Memory does not grow with the rows. The same call finishes an export that was killed: of tokens,
    documents, words and token_neurons it writes only the parts that are missing; other tables and
    queries begin again. A finished export stays as it is. Raises ``ConfigError`` if ``target``
    holds anything else, and what ``open_run`` and a query raise.
    """
    check_names(table, sql, format, file_bytes)
    if not target:
        raise ConfigError("the target is empty; name a folder, or its URL")
    if iceberg is not None:
        if format != "iceberg":
            raise ConfigError(f"an Iceberg table is named, and the format is {format!r}; give one")
        catalogs.check_uri(iceberg)
    with contextlib.ExitStack() as stack:
        if isinstance(run, str):
            run = stack.enter_context(open_run(run, timeout_s=TIMEOUT_S))
        viewed = table or "tokens" if sql is None else None
        if format == "iceberg" and iceberg is None:
            iceberg = IcebergTable(f"afn.{viewed or 'query'}")
        asked = ExportRequest(
            run.id, run.baseline, viewed, sql, format, file_bytes, iceberg, columns=()
        )
        result = first_rows(run, asked)
        columns = zip(unique_names(result.columns), result.types, strict=True)
        return _finish(run, target, replace(asked, columns=tuple(columns)), on_file)


def _finish(run: Run, uri: str, request: ExportRequest, on_file: OnFile | None) -> Exported:
    """Do what is left of an export: nothing, if it is finished."""
    target = Target(uri, request)
    new = set[str]()  # names of files that this call wrote
    if (files := target.finished()) is None:
        try:
            files = _write(run, target, request, on_file, new)
        except ConfigError:
            # The process that was first has finished, and removed what this one was writing.
            if (files := target.finished()) is None:
                raise
    target.clean(files)
    num_new = sum(file.name in new for file in files)
    return Exported(target.uri, request.format, tuple(files), num_new)


def _write(
    run: Run, target: Target, request: ExportRequest, on_file: OnFile | None, new: set[str]
) -> list[ExportFile]:
    """Write what is missing of an export and end it; add the names of new files to ``new``."""
    planned = target.planned()
    about = card.about(run, request)
    schema = arrow_schema(run, request)
    writing.check_types(request, schema)
    if request.iceberg is not None:
        catalogs.check(request, target.uri, schema)
    if planned is None:
        is_sharded = request.table in SHARD_VIEWS
        planned = target.plan(parts.cut(run, request, schema) if is_sharded else [])
    table, files = None, None
    if request.iceberg is not None:
        table = catalogs.CommittedTable(request, target.uri, schema)
        schema, files = table.schema, table.files()
    if files is None:
        files = []
        for file, is_new in _files(run, request, schema, target, planned):
            files.append(file)
            if is_new:
                new.add(file.name)
                if on_file is not None:
                    on_file(file, len(planned) or None)
        if (finished := target.finished()) is not None:
            return finished
        if table is not None:
            files = table.commit(files)
    read = formats.readers(request.format, target.uri) if table is None else table.readers()
    return target.finish(files, card.readme(about, request, schema, files, read))


def _files(
    run: Run,
    request: ExportRequest,
    schema: pa.Schema,
    target: Target,
    planned: Sequence[ShardRange],
) -> Iterator[tuple[ExportFile, bool]]:
    """The files of the export in order, and whether this call wrote them."""
    if not planned:
        reader = rows(run, request).to_arrow_reader(BATCH_ROWS)
        for file in writing.write_files(request, schema, reader, target.data):
            yield file, True
            if target.finished() is not None:  # by another process; do not write the rest
                return
        return
    there = target.written()
    for number, part in enumerate(planned):
        if (done := there.get(number) or target.noted(number)) is not None:
            yield done, False
            continue
        if target.finished() is not None:
            return
        reader = rows(run, request, part).to_arrow_reader(BATCH_ROWS)
        uri = uris.join(target.data, writing.file_name(request, number))
        ours = writing.write_file(request, schema, iter(reader), uri)
        first = target.note(number, ours)
        yield first, first == ours
