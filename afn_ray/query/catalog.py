"""Write a run's views and macros into a DuckDB file for other clients."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa

from afn_ray.errors import ConfigError
from afn_ray.query import sandbox, session
from afn_ray.query.contents import shard_files, small_tables, view_statements
from afn_ray.query.files import ReadOnlyFiles
from afn_ray.query.views import DERIVED, VIEWS
from afn_ray.store import checksums, disk, manifest


def write_catalog(uri: str, path: Path, *, baseline: str | None = None) -> None:
    """Write the views and macros of ``open_run`` into a DuckDB file for any DuckDB client.

    The file ``path`` holds the run's small tables. It reads tokens and documents from the store at
    its current place. After the store has moved, set ``SET VARIABLE afn_store =
    '/its/new/place'``. A store that is not local needs DuckDB's httpfs extension. The file appears
    complete or not at all. Raises ``ConfigError`` if ``path`` exists or cannot be written, and what
    ``open_run`` raises.
    """
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists and stays as it is; name another file, or remove it")
    folder = manifest.find_run(uri)
    with checksums.named_damage(folder.uri):
        tables = small_tables(folder, None if baseline is None else manifest.find_run(baseline))
        files = shard_files(folder, tables["shards"])
        named = {f.name: (f.uri, f.size) for of_table in files.values() for f in of_table}
        read = ReadOnlyFiles(folder.store, named, partial(manifest.find_blocks, folder))
        made = view_statements(folder, tables, files, "store() || ", read)
    place = folder.store.rstrip("/").replace("'", "''")
    try:
        with disk.unfinished(path) as unfinished:
            _write_catalog(unfinished, place, tables, made)
            os.link(unfinished, path)  # appears complete, and replaces no file
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists and stays as it is; name another file, or remove it"
        ) from error
    except (duckdb.Error, OSError) as error:
        raise ConfigError(f"{path} cannot be written: {sandbox.readable(str(error))}") from error


def _write_catalog(
    path: Path, place: str, tables: Mapping[str, pa.Table], made: Sequence[str]
) -> None:
    """Write the database to ``path``; ``place`` is the store, quoted for SQL."""
    try:
        # The file format of DuckDB 1.0: only the newest clients open the default format.
        with duckdb.connect(path, config={"storage_compatibility_version": "v1.0.0"}) as connection:
            connection.execute(
                f"CREATE MACRO store() AS coalesce(getvariable('afn_store'), '{place}') || '/'"
            )
            session.fill(connection, tables, made)
            for view in DERIVED:
                hint = "where the store has moved: SET VARIABLE afn_store = ''/its/new/place''"
                connection.execute(f"COMMENT ON VIEW {view} IS '{VIEWS[view]}; {hint}'")
    finally:
        path.with_name(f"{path.name}.wal").unlink(missing_ok=True)
