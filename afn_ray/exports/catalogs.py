"""The only door to pyiceberg: make a table, and commit files to it once."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from afn_ray.errors import AfnError, ConfigError, Interrupted, QueryError
from afn_ray.exports.request import ExportRequest, IcebergTable
from afn_ray.exports.writing import ExportFile
from afn_ray.store import storage, uris
from afn_ray.store.retry import is_transient, short_message

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

CATALOG = "afn"
"""Name of a catalog that is given by its URI; one in SQL keeps the tables of each name apart."""
EXPORT = "afn.export"
"""Property of the table and of its snapshot: the identity of the export to its target."""
NO_RETRIES = "commit.retry.num-retries"
"""Property of the table until the commit: a second writer then fails, where a retry would append
the rows twice.
"""


def check_uri(table: IcebergTable) -> None:
    """Raise ``ConfigError`` if the catalog's URI holds credentials; the message does not."""
    if "://" in (table.catalog or "") and uris.URL_SECRET.search(str(table.catalog)):
        raise ConfigError(
            "the catalog's URI holds credentials, which would end up in the export; put it into "
            "pyiceberg's configuration, and give its name there"
        )


def check(request: ExportRequest, target: str, schema: pa.Schema) -> None:
    """Raise ``ConfigError`` if the table cannot be made; a catalog in ``target`` can."""
    table = request.iceberg
    assert table is not None
    namespace, _, name = table.name.rpartition(".")
    if not namespace or not name:
        raise ConfigError(
            f"the Iceberg table is named {table.name!r}; expected a namespace and a name, as in "
            "afn.tokens"
        )
    if uris.is_local(target) and (found := re.search("[#?]", target)):
        raise ConfigError(
            f"the target {target} has a {found[0]!r} in its path, which ends the path of a URL; "
            "give an Iceberg table another folder"
        )
    _check_types(schema)
    if table.catalog is None and uris.is_local(target):
        return
    with _named_errors(table):
        catalog = _catalog(table.catalog, target)
        catalog.list_namespaces()
        if catalog.table_exists(table.name):
            _check_owner(catalog.load_table(table.name), request, target)


def _check_types(schema: pa.Schema) -> None:
    """Raise ``QueryError`` for a type that Iceberg lacks: in a catalog in
    memory, without a table.
    """
    catalog = _load_catalog()(CATALOG, uri="sqlite:///:memory:", type="sql")
    try:
        catalog.create_table_transaction("afn.types", _widened(schema), "file:///afn")
    except Exception as error:  # of several kinds, and about nothing else
        raise QueryError(
            f"a column does not fit into iceberg: {error}; cast it in the query, as with ::VARCHAR"
        ) from error


def _check_owner(found: Table, request: ExportRequest, target: str) -> None:
    """Raise ``ConfigError`` unless the table was made for the ``request`` and its ``target``."""
    if found.properties.get(EXPORT) != request.id_in(target):
        assert request.iceberg is not None
        raise ConfigError(
            f"{_words(request.iceberg)} is there and not of this export to {target}; name another "
            "table"
        )


class CommittedTable:
    """The Iceberg table of one export: empty until all files are committed, in one snapshot."""

    def __init__(self, request: ExportRequest, target: str, schema: pa.Schema) -> None:
        """Make the table in its catalog, or find it there.

        Raises ``ConfigError`` if the catalog cannot be used, or has another table of that name.
        """
        assert request.iceberg is not None
        self._id = request.id_in(target)
        self._asked = request.iceberg
        self._target = target
        location = target if "://" in target else f"file://{target}"
        self._data = uris.join(location, "data")
        storage.make_folder(target)
        with _named_errors(self._asked):
            catalog = _catalog(request.iceberg.catalog, target)
            namespace = request.iceberg.name.rpartition(".")[0]
            catalog.create_namespace_if_not_exists(namespace)
            properties = {EXPORT: self._id, NO_RETRIES: "0"}
            self._table: Table = catalog.create_table_if_not_exists(
                request.iceberg.name, _widened(schema), location, properties=properties
            )
        _check_owner(self._table, request, target)
        columns: pa.Schema = self._table.schema().as_arrow()
        self.schema = columns.with_metadata(schema.metadata)
        """The Arrow schema of the files, with the field ids of the table."""

    def files(self) -> list[ExportFile] | None:
        """The files that are committed; None if none are."""
        snapshot = self._snapshot()
        if snapshot is None:
            return None
        with _named_errors(self._asked):
            tasks = self._table.scan(snapshot_id=snapshot.snapshot_id).plan_files()
            found = [task.file for task in tasks]
        return [
            ExportFile(f.file_path.rpartition("/")[2], f.record_count, f.file_size_in_bytes)
            for f in sorted(found, key=lambda f: f.file_path)
        ]

    def commit(self, files: Sequence[ExportFile]) -> list[ExportFile]:
        """Commit ``files``; return these, or those that another process committed first."""
        paths = [uris.join(self._data, file.name) for file in files if file.rows]
        with _named_errors(self._asked):
            try:
                with self._table.transaction() as transaction:
                    transaction.remove_properties(NO_RETRIES)
                    transaction.add_files(paths, snapshot_properties={EXPORT: self._id})
            except Exception:  # another process was first, or only the answer was lost
                self._table.refresh()
                if self._snapshot() is None:
                    raise
        committed = self.files()
        assert committed is not None
        return committed

    def readers(self) -> list[str]:
        """Lines that read the table, as it is now; the catalog's URI has no credentials."""
        given = self._asked.catalog or _own_catalog(self._target)
        opened = json.dumps(given, ensure_ascii=False)
        if "://" in given:
            opened = f"{json.dumps(CATALOG)}, uri={opened}"
        name = json.dumps(self._asked.name, ensure_ascii=False)
        metadata = self._table.metadata_location.removeprefix("file://")
        in_sql = metadata.replace("'", "''")
        return [
            f"pyiceberg: load_catalog({opened}).load_table({name})",
            f"DuckDB:    FROM iceberg_scan('{in_sql}')",
            f"Polars:    pl.scan_iceberg({json.dumps(metadata, ensure_ascii=False)})",
        ]

    def _snapshot(self) -> Snapshot | None:
        """The snapshot of the export, whatever was committed after it."""
        for snapshot in self._table.snapshots():
            if snapshot.summary and snapshot.summary.additional_properties.get(EXPORT) == self._id:
                return snapshot
        return None


def _widened(schema: pa.Schema) -> pa.Schema:
    """The columns of ``schema`` with types that Iceberg has."""
    return pa.schema([field.with_type(_signed(field.type)) for field in schema])


def _signed(kind: pa.DataType) -> pa.DataType:
    """The type that holds all values of ``kind`` and that Iceberg has: no
    unsigned number, no enum.
    """
    if pa.types.is_uint32(kind):
        return pa.int64()
    if pa.types.is_uint64(kind):
        return pa.decimal128(20, 0)
    if pa.types.is_dictionary(kind):
        return _signed(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_signed(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_signed(kind.key_type), _signed(kind.item_type))
    if pa.types.is_list(kind):
        return pa.list_(_signed(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_signed(kind.value_type), kind.list_size)
    return kind


def _words(table: IcebergTable) -> str:
    return f"table {table.name} of the catalog {table.catalog or 'in the folder'}"


@contextlib.contextmanager
def _named_errors(table: IcebergTable) -> Iterator[None]:
    """Raise errors of pyiceberg, its catalogs and their clients as ``ConfigError``.

    Transient ones, as of a service that is away, become ``Interrupted``.
    """
    try:
        yield
    except AfnError:
        raise
    except Exception as error:
        if is_transient(error):
            raise Interrupted(
                f"{_words(table)}: {type(error).__name__}: {short_message(error)}; check the "
                "catalog and the network, then run the same command again"
            ) from error
        raise ConfigError(f"{_words(table)}: {type(error).__name__}: {error}") from error


def _load_catalog() -> Any:
    """pyiceberg's function of that name. Raises ``ConfigError`` if the package is missing."""
    try:
        from pyiceberg.catalog import load_catalog
    except ImportError as error:
        raise ConfigError(
            'Iceberg needs a package that is missing: pip install "afn-ray[iceberg]"'
        ) from error
    return load_catalog


def _own_catalog(target: str) -> str:
    """URI of the catalog that a local ``target`` has in itself."""
    return f"sqlite:///{target}/catalog.db"


def _catalog(given: str | None, target: str) -> Catalog:
    """The catalog ``given`` by its URI or name; a local ``target`` has one in itself."""
    load_catalog = _load_catalog()
    if given is None:
        if not uris.is_local(target):
            raise ConfigError(
                f"an Iceberg table in {target} needs a catalog: give its URI, or the name that it "
                "has in pyiceberg's configuration"
            )
        given = _own_catalog(target)
    if "://" not in given:
        named: Catalog = load_catalog(given)
        return named
    options = {"uri": given}
    if not uris.is_local(target):  # finds a bucket as the rest of the package does
        options["py-io-impl"] = "pyiceberg.io.fsspec.FsspecFileIO"
    catalog: Catalog = load_catalog(CATALOG, **options)
    return catalog
