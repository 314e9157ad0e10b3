"""Write a run's views and macros into a DuckDB file for other clients."""

from __future__ import annotations

import os
from pathlib import Path

import duckdb

from afn_ray.errors import ConfigError
from afn_ray.query import filling, sandbox
from afn_ray.query.contents import Contents, read_contents
from afn_ray.query.views import DERIVED, described
from afn_ray.reduce import history
from afn_ray.store import disk, manifest


def write_catalog(uri: str, path: Path, *, baseline: str | None = None) -> None:
    """Write the views and macros of ``open_run`` into a DuckDB file for any DuckDB client.

    The file ``path`` holds the run's small tables. It reads tokens and documents from the store at
    its current place. After the store has moved, set ``SET VARIABLE afn_store =
    '/its/new/place'``. A store that is not local needs DuckDB's httpfs extension. The file appears
    complete or not at all. Raises ``ConfigError`` if ``path`` exists or cannot be written, and what
    ``open_run`` raises.
    """
    exists = f"{path} exists and stays as it is; name another file, or remove it"
    if os.path.lexists(path):
        raise ConfigError(exists)
    folder = manifest.find_run(uri)
    against = None if baseline is None else manifest.find_run(baseline)
    contents = read_contents(folder, against, "store() || ")
    contents.tables["history"] = history.of_run(folder).table
    place = folder.store.rstrip("/").replace("'", "''")
    try:
        with disk.unfinished(path) as unfinished:
            _write_catalog(unfinished, place, contents)
            os.link(unfinished, path)  # appears complete, and replaces no file
    except FileExistsError as error:
        raise ConfigError(exists) from error
    except (duckdb.Error, OSError) as error:
        raise ConfigError(f"{path} cannot be written: {sandbox.readable(str(error))}") from error


def _write_catalog(path: Path, place: str, contents: Contents) -> None:
    """Write the database to ``path``; ``place`` is the store, quoted for SQL."""
    try:
        # The file format of DuckDB 1.0: only the newest clients open the default format.
        with duckdb.connect(path, config={"storage_compatibility_version": "v1.0.0"}) as connection:
            connection.execute(
                f"CREATE MACRO store() AS coalesce(getvariable('afn_store'), '{place}') || '/'"
            )
            filling.Filling(connection, contents.tables, contents.statements).create_all(connection)
            for view in DERIVED:
                hint = "where the store has moved: SET VARIABLE afn_store = ''/its/new/place''"
                text = described(view, contents.shard_views.recorded.record)
                connection.execute(f"COMMENT ON VIEW {view} IS '{text}; {hint}'")
    finally:
        path.with_name(f"{path.name}.wal").unlink(missing_ok=True)
