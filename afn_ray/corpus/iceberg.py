"""Iceberg tables in, their data files out: those of one version, which its metadata file fixes.

pyiceberg reads metadata and manifests, through the store's own files and credentials. The data
files are Parquet, which is read as any. Whatever would make their rows differ from the table's is
refused: deleted rows, renamed columns, defaults of columns that a file lacks. Metadata is
untrusted: no file outside the table's folder is opened.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from afn_ray.corpus import avro, nested
from afn_ray.corpus.http_body import decoded
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
"""Largest metadata file or manifest, in bytes; also once it is unpacked."""
HINT_BYTES = 64
"""Largest ``HINT``, in bytes."""
THREADS = 16
"""Most data files examined at the same time."""
FIELD_ID = b"PARQUET:field_id"
REWRITE = "rewrite its data files (in Spark: CALL system.rewrite_data_files) or export the table"


class Version(NamedTuple):
    """One version of a table, as a pattern names it."""

    metadata: str
    """URI of its metadata file."""
    named_by: str = ""
    """Folder of the table, if that was named; else empty."""

    @property
    def folder(self) -> str:
        """Folder in which all files of the table must be."""
        folder, _, name = self.metadata.rpartition("/")[0].rpartition("/")
        return folder if name == "metadata" else f"{folder}/{name}"


class _Wanted(NamedTuple):
    """The way to a value that is read, in a table."""

    numbers: tuple[bytes, ...]
    """Field ids on the way; none if the table has no such value now."""
    may_lack: bool
    """True if a data file without it has nulls."""


def find_version(pattern: str) -> Version | None:
    """The version of a table that ``pattern`` names; None if it names none.

    It names a metadata file, or the folder of a table that has ``HINT``.
    """
    if any(character in pattern for character in uris.WILDCARDS):
        return None
    if METADATA.fullmatch(pattern):
        return Version(uris.absolute(pattern))
    if uris.split_member(pattern) is not None or pattern.startswith(
        ("http://", "https://", "hf://")
    ):
        return None
    folder = uris.absolute(pattern)
    hint = None
    with contextlib.suppress(StoreError):  # a user may have no permission for other files
        hint = storage.read_if_there(uris.join(folder, HINT), HINT_BYTES)
    if hint is None:
        return None
    version = hint.decode(errors="replace").strip()
    if not VERSION.fullmatch(version):
        raise CorpusError(f"{uris.join(folder, HINT)} is {version[:40]!r}, expected a number")
    return Version(uris.join(folder, "metadata", f"v{version}.metadata.json"), folder)


def data_files(version: Version, columns: Sequence[str]) -> list[FileInfo]:
    """The Parquet files of the table's ``version``, of which ``columns`` are read.

    Raises ``CorpusError`` if the rows of these files are not those of the table, if it cannot be
    read, or if one of its files is outside its folder; ``ConfigError`` without pyiceberg.
    """
    metadata = version.metadata
    with _named_errors(metadata):
        uri_of = _in_folder(version)
        table = _load(metadata, uri_of)
        _check_location(version, _uri(table.location()))
        places = sorted(_place(task, metadata, uri_of) for task in table.scan().plan_files())
        wanted = _wanted(table, columns)
    if not places:
        raise CorpusError(f"{metadata} is a version of the table that has no rows")

    def examine(uri: str) -> FileInfo:
        file = corpus_files.stat(uri)
        _check_columns(file, wanted)
        return file

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(examine, places))


def _in_folder(version: Version) -> Callable[[str], str]:
    """A function that returns our URI of a location in the table, and refuses one outside.

    All that metadata names passes through it: else metadata of strangers could make a run ask any
    server and read any file.
    """
    is_below = uris.below(version.folder)

    def uri_of(location: str) -> str:
        uri = _uri(location)
        if ".." in uri.split("/") or not is_below(uri):
            raise CorpusError(
                f"{version.metadata} names {location[:400]}, which is not in the table's folder "
                f"{version.folder}; if you trust the table, export it"
            )
        return uri

    return uri_of


def _check_location(version: Version, location: str) -> None:
    """Raise ``CorpusError`` if a folder was named whose metadata are of another one."""
    if version.named_by and (
        ".." in location.split("/") or not uris.below(version.named_by)(location.rstrip("/"))
    ):
        raise CorpusError(
            f"{version.named_by} has a {HINT}, but its metadata are of a table in "
            f"{location[:400]}; "
            "name the metadata file of the version, or remove the hint if it is no table"
        )


def _load(metadata: str, uri_of: Callable[[str], str]) -> Table:
    # StaticTable.from_metadata would import whatever class the table's own properties name.
    from pyiceberg.catalog.noop import NoopCatalog
    from pyiceberg.table import StaticTable
    from pyiceberg.table.metadata import TableMetadataUtil

    data = _read(metadata, uri_of)
    if metadata.endswith(".gz.metadata.json"):
        data = decoded(data, [], ["gzip"], MOST_BYTES)
    found = TableMetadataUtil.parse_raw(data.decode())
    files: Any = _file_io(uri_of)
    return StaticTable(("corpus", metadata), found, metadata, files, NoopCatalog("corpus"))


def _wanted(table: Table, columns: Sequence[str]) -> dict[str, _Wanted]:
    """The ways to ``columns``, each a name or a path, by column."""
    schema = table.schema()
    partitions: set[int] = set()
    for spec in table.specs().values():
        for part in spec.fields:
            if str(part.transform) == "identity":
                partitions.add(part.source_id)
    wanted: dict[str, _Wanted] = {}
    for column in columns:
        numbers, beside = _way(schema.as_arrow(), column)
        if beside is not None:
            wanted[column] = _Wanted((), may_lack=True)
            continue
        fields = [schema.find_field(int(number)) for number in numbers]
        may_lack = all(
            field.initial_default is None and field.field_id not in partitions for field in fields
        )
        wanted[column] = _Wanted(tuple(numbers), may_lack)
    return wanted


def _way(schema: pa.Schema, column: str) -> tuple[list[bytes], set[bytes] | None]:
    """Field ids on the way to ``column``, as ``nested`` follows it, as far as it leads.

    The set has the ids beside its next part; it is None if the way leads to its end.
    """
    numbers: list[bytes] = []
    kind: pa.DataType = pa.struct(list(schema))
    for part in [column] if column in schema.names else column.split("."):
        if pa.types.is_struct(kind):
            found = [field for field in kind if field.name == part]
            if not found:
                return numbers, {_number(field) for field in kind}
            numbers.append(_number(found[0]) if len(found) == 1 else b"several")
            kind = found[0].type
        elif nested.is_list(kind) and nested.INDEX.fullmatch(part):
            numbers.append(_number(kind.value_field))
            kind = kind.value_type
        else:
            return numbers, set()
    return numbers, None


def _number(field: pa.Field) -> bytes:
    """The field id of ``field``; empty if it has none."""
    return bytes((field.metadata or {}).get(FIELD_ID, b""))


def _check_columns(file: FileInfo, wanted: Mapping[str, _Wanted]) -> None:
    """Raise ``CorpusError`` unless the columns ``wanted`` of ``file`` are those of its table."""
    with readers.open_read(file.uri) as opened, contextlib.suppress(*UNREADABLE):
        schema = parquet.open_file(opened).schema_arrow
        for column, (numbers, may_lack) in wanted.items():
            found, beside = _way(schema, column)
            if not numbers:
                if beside is None:
                    raise CorpusError(
                        f"{file.uri} has a column {column!r}, which its table has not, or not any "
                        "more; name a column of the table"
                    )
                continue
            is_same = tuple(found) == numbers[: len(found)]
            is_absent = beside is not None and may_lack and numbers[len(found)] not in beside
            if not is_same or not (beside is None or is_absent):
                raise CorpusError(
                    f"{file.uri} lacks column {column!r} of its table (field "
                    f"{_words(numbers)}), whose "
                    f"value is in the metadata or under another name; {REWRITE}"
                )


def _words(numbers: Sequence[bytes]) -> str:
    return ".".join(number.decode() for number in numbers)


def _place(task: Any, metadata: str, uri_of: Callable[[str], str]) -> str:
    """URI of the data file of a scan ``task``.

    Raises ``CorpusError`` if it is not all of its rows.
    """
    uri = uri_of(str(task.file.file_path))
    if task.delete_files:
        raise CorpusError(f"{metadata}: rows of {uri} are deleted in other files; {REWRITE}")
    if not uri.endswith(".parquet"):
        raise CorpusError(f"{metadata}: {uri} is no .parquet file; {REWRITE}")
    return uri


def _uri(location: str) -> str:
    """``location`` of a file in a table as our own URI."""
    return re.sub(r"^s3[an]://", "s3://", re.sub(r"^file:(//)?(?=/)", "", location))


# --- files of the store, for pyiceberg


def _read(location: str, uri_of: Callable[[str], str]) -> bytes:
    """The bytes of a metadata file or manifest. Raises ``CorpusError`` if it has too many."""
    data, size = b"", corpus_files.stat(uri_of(location)).size  # which refuses pipes and devices
    if size <= MOST_BYTES:
        with readers.open_read(uri_of(location)) as file:
            data = file.read(MOST_BYTES + 1)
    if max(size, len(data)) > MOST_BYTES:
        raise CorpusError(
            f"{location} has {size} bytes, over the limit of {MOST_BYTES}; export the table"
        )
    return data


def _file_io(uri_of: Callable[[str], str]) -> Any:
    """The manifests of one table as pyiceberg's ``FileIO``, read-only.

    ``uri_of`` checks each location. pyiceberg has no bounds, so it is given what is unpacked.
    """
    from pyiceberg.io import FileIO, InputFile

    class StoreFile(InputFile):
        def __len__(self) -> int:
            return corpus_files.stat(uri_of(self.location)).size

        def exists(self) -> bool:
            return storage.exists(uri_of(self.location))

        def open(self, seekable: bool = True) -> Any:
            data = _read(self.location, uri_of)
            try:
                return io.BytesIO(avro.unpacked(data, MOST_BYTES))
            except (ValueError, OSError, pa.ArrowException) as error:
                raise CorpusError(
                    f"{self.location} cannot be read as a manifest: {error}; export the table"
                ) from error

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
