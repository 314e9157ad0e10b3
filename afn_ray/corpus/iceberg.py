"""Iceberg tables in, their data files out: those of one version, which its metadata file fixes.

pyiceberg reads metadata and manifests, through the store's own files and credentials. The data files
are Parquet, which is read as any. Whatever would make their rows differ from the table's is refused:
deleted rows, renamed columns, defaults of columns that a file lacks.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from afn_ray.corpus.row_groups import UNREADABLE
from afn_ray.corpus_values import FileInfo
from afn_ray.errors import AfnError, ConfigError, CorpusError, StoreError
from afn_ray.store import corpus_files, parquet, readers, storage, uris

if TYPE_CHECKING:
    from pyiceberg.table import Table

METADATA = re.compile(r".+\.metadata\.json")
"""A file that describes one version of a table."""
HINT = "metadata/version-hint.text"
"""File of a table without a catalog: the number of its current version."""
VERSION = re.compile(r"[0-9]{1,18}")
MOST_BYTES = 256 << 20
"""Largest metadata file or manifest, in bytes."""
THREADS = 16
"""Most data files examined at the same time."""
FIELD_ID = b"PARQUET:field_id"
REWRITE = "rewrite its data files (in Spark: CALL system.rewrite_data_files) or export the table"


def find_metadata(pattern: str) -> str | None:
    """URI of the metadata file of the table that ``pattern`` names; None if it names none.

    It names a metadata file, or the folder of a table that has ``HINT``.
    """
    if METADATA.fullmatch(pattern):
        return uris.absolute(pattern)
    if any(character in pattern for character in corpus_files.WILDCARDS):
        return None
    if uris.split_member(pattern) is not None or pattern.startswith(
        ("http://", "https://", "hf://")
    ):
        return None
    folder = uris.absolute(pattern)
    hint = None
    with contextlib.suppress(StoreError):  # a user may have no permission for other files
        hint = storage.read_if_there(uris.join(folder, HINT))
    if hint is None:
        return None
    version = hint.decode(errors="replace").strip()
    if not VERSION.fullmatch(version):
        raise CorpusError(f"{uris.join(folder, HINT)} is {version[:40]!r}, expected a number")
    return uris.join(folder, "metadata", f"v{version}.metadata.json")


def data_files(metadata: str, columns: Sequence[str]) -> list[FileInfo]:
    """The Parquet files of the table's version ``metadata``, of which ``columns`` are read.

    Raises ``CorpusError`` if the rows of these files are not those of the table, or if it cannot be
    read; ``ConfigError`` without pyiceberg.
    """
    with _named_errors(metadata):
        table = _load(metadata)
        places = sorted(_place(task, metadata) for task in table.scan().plan_files())
        doubtful = _doubtful(table, metadata, columns)
    if not places:
        raise CorpusError(f"{metadata} is a version of the table that has no rows")

    def examine(uri: str) -> FileInfo:
        file = corpus_files.stat(uri)
        if doubtful:
            _check_columns(file, doubtful)
        return file

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(examine, places))


def _load(metadata: str) -> Table:
    # StaticTable.from_metadata would import whatever class the table's own properties name.
    from pyiceberg.catalog.noop import NoopCatalog
    from pyiceberg.serializers import FromInputFile
    from pyiceberg.table import StaticTable

    io: Any = _file_io()
    found = FromInputFile.table_metadata(io.new_input(metadata))
    return StaticTable(("corpus", metadata), found, metadata, io, NoopCatalog("corpus"))


def _doubtful(table: Table, metadata: str, columns: Sequence[str]) -> dict[str, int]:
    """Field id by name of those ``columns`` that a data file may lack, or have for another one.

    They were renamed or made anew, have a default, or are in the path of a partition. Raises
    ``CorpusError`` for a path into a column whose fields have changed.
    """
    schemas = table.schemas().values()
    partitions = {
        field.source_id
        for spec in table.specs().values()
        for field in spec.fields
        if str(field.transform) == "identity"
    }
    names = {column: column.partition(".")[0] for column in columns}
    doubtful: dict[str, int] = {}
    for field in table.schema().fields:
        paths = [path for path, name in names.items() if field.name in (path, name)]
        if not paths:
            continue
        same = [f for schema in schemas for f in schema.fields if f.field_id == field.field_id]
        named = {f.field_id for schema in schemas for f in schema.fields if f.name == field.name}
        if field.name not in paths and len({str(f.field_type) for f in same}) > 1:
            raise CorpusError(
                f"{metadata}: the fields of column {field.name!r} have changed, so {paths[0]!r} may be "
                "another value in some files; export the table"
            )
        is_renamed = len({f.name for f in same}) > 1 or len(named) > 1
        if is_renamed or field.initial_default is not None or field.field_id in partitions:
            doubtful[field.name] = field.field_id
    return doubtful


def _check_columns(file: FileInfo, wanted: Mapping[str, int]) -> None:
    """Raise ``CorpusError`` unless ``file`` has the columns ``wanted``, by name and field id."""
    with readers.open_read(file.uri) as opened, contextlib.suppress(*UNREADABLE):
        schema = parquet.open_file(opened).schema_arrow
        for name, number in wanted.items():
            at = schema.names.index(name) if name in schema.names else -1
            found = (schema.field(at).metadata or {}).get(FIELD_ID, b"") if at >= 0 else b""
            if found != b"%d" % number:
                raise CorpusError(
                    f"{file.uri} lacks column {name!r} of its table (field {number}), whose value is in "
                    f"the metadata or under another name; {REWRITE}"
                )


def _place(task: Any, metadata: str) -> str:
    """URI of the data file of a scan ``task``. Raises ``CorpusError`` if it is not all of its rows."""
    uri = _uri(str(task.file.file_path))
    if task.delete_files:
        raise CorpusError(f"{metadata}: rows of {uri} are deleted in other files; {REWRITE}")
    if not uri.endswith(".parquet"):
        raise CorpusError(f"{metadata}: {uri} is no .parquet file; {REWRITE}")
    if _protocol(uri) != _protocol(metadata):
        raise CorpusError(f"{metadata}: {uri} is on another filesystem than the table")
    return uri


def _protocol(uri: str) -> str:
    protocol, mark, _ = uri.partition("://")
    return {"s3a": "s3"}.get(protocol, protocol) if mark else ""


def _uri(location: str) -> str:
    """``location`` of a file in a table as our own URI."""
    return re.sub(r"^file:(//)?(?=/)", "", location)


# --- files of the store, for pyiceberg


def _file_io() -> Any:
    """The store's files as pyiceberg's ``FileIO``, read-only."""
    from pyiceberg.io import FileIO, InputFile

    class StoreFile(InputFile):
        def __len__(self) -> int:
            return corpus_files.stat(_uri(self.location)).size

        def exists(self) -> bool:
            return storage.exists(_uri(self.location))

        def open(self, seekable: bool = True) -> Any:
            if (size := len(self)) > MOST_BYTES:
                raise CorpusError(
                    f"{self.location} has {size} bytes, over the limit of {MOST_BYTES}; export the table"
                )
            return readers.open_read(_uri(self.location))

    class StoreFiles(FileIO):
        def new_input(self, location: str) -> InputFile:
            return StoreFile(location)

        def new_output(self, location: str) -> Any:
            raise NotImplementedError("a corpus is only read")

        def delete(self, location: Any) -> None:
            raise NotImplementedError("a corpus is only read")

    return StoreFiles()


@contextlib.contextmanager
def _named_errors(metadata: str) -> Iterator[None]:
    """Raise the errors of pyiceberg as ``CorpusError``, and say which package is missing."""
    try:
        yield
    except AfnError:
        raise
    except ImportError as error:
        raise ConfigError(
            f'{metadata} is a table of Iceberg: pip install "afn-ray[iceberg]"'
        ) from error
    except Exception as error:  # untrusted bytes through several parsers
        raise CorpusError(f"{metadata} cannot be read as a table of Iceberg: {error}") from error
