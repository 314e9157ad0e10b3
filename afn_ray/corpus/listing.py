"""List the files of a corpus, cut them into slices, and read a small sample of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow.parquet as pq

from afn_ray import kept
from afn_ray.corpus import documents, iceberg, lakehouse, nested, reading, row_groups, streams, warc
from afn_ray.corpus.sources import BLOCK_BYTES, DamagedStream, Source
from afn_ray.corpus_values import REST, UPOS, WARC, XPOS, Document, FileInfo, FileSlice, ReadOptions
from afn_ray.errors import CorpusError
from afn_ray.store import corpus_files, uris
from afn_ray.store.layout import is_store_file
from afn_ray.text import count, nearest
from afn_ray.text_encodings import encoding_of

FORMATS = {
    "txt": "txt",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "csv": "csv",
    "parquet": "parquet",
    "conllu": "conllu",
    "warc": WARC,
    "wet": WARC,
}
"""File name ending -> format."""
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
"""Second endings allowed for all formats except Parquet."""

MEMBER_COMPRESSIONS = ("deflate", "bz2", "zst")
"""Compressions of members of zip archives."""
WITHOUT_COLUMNS = {"txt", "conllu", REST}
"""Formats whose files have no columns to keep."""
SAMPLE_FILES = 8
"""Most files in a sample."""
LEAST_SHARD_BYTES, MOST_SHARD_BYTES = 64 << 10, 16 << 20
"""Smallest and largest target size of a shard, in bytes.

64 KiB are 8 batches of a CPU; 16 MiB are about five minutes of one worker.
"""
SHARDS_IN_CLASS = 64
"""Shards of the largest corpus in a size class, if neither limit applies."""


def list_files(
    patterns: Sequence[str], options: ReadOptions, store: str | None = None
) -> tuple[list[FileInfo], list[FileInfo]]:
    """The files that ``patterns`` name, and those that are left out; unique, sorted by URI.

    Left out are files with unknown endings if ``options.format`` is ``auto``, files in ``store``,
    and files with a path like that of a file in any other store. Raises ``CorpusError`` if no file
    is left, if a pattern is in ``store``, and for tables of Delta Lake and similar formats, of
    which not all files are valid.
    """
    in_store = uris.below(store) if store is not None else lambda folder: False
    for pattern in patterns:
        if in_store(uris.absolute(pattern)):
            raise CorpusError(
                f"corpus {pattern} is in the store {store}; give a --store that is not above the "
                "corpus"
            )

    def is_left_out(uri: str) -> bool:
        if is_store_file(uri) or in_store(uri.rpartition("/")[0]):
            return True
        return not _format(uri, options)

    others: set[str] = set()
    found: dict[str, FileInfo] = {}
    plain: list[str] = []
    of_tables: dict[str, FileInfo] = {}
    for pattern in patterns:
        is_parquet = options.format in ("auto", "parquet")
        version = iceberg.find_version(pattern) if is_parquet else None
        if version is None:
            plain.append(pattern)
            found.update((file.uri, file) for file in corpus_files.find_files(pattern, others))
        else:
            of_table = iceberg.data_files(version, documents.columns_of(options))
            if version.named_by:
                _check_only_table(version.named_by, options)
            of_tables.update((file.uri, file) for file in of_table)
    listed = found.keys() | others
    found |= of_tables
    files: list[FileInfo] = []
    skipped: list[FileInfo] = []
    for uri, file in sorted(found.items()):
        (skipped if is_left_out(uri) else files).append(file)
    skipped = _with_whole_archives(skipped, files)
    if not files:
        raise CorpusError(_why_empty(skipped))
    lakehouse.refuse_tables(plain, listed)
    return files, skipped


def _check_only_table(folder: str, options: ReadOptions) -> None:
    """Raise ``CorpusError`` if ``folder``, named as a table of Iceberg, has other files of a
    corpus.
    """
    for file in corpus_files.find_files(folder):
        format = _format(file.uri, replace(options, format="auto"))
        place = "data" if format == "parquet" else "metadata"
        if format and not file.uri.startswith(f"{folder}/{place}/"):
            raise CorpusError(
                f"{folder} is a table of Iceberg, but {file.uri} is none of its files; name both: "
                "the metadata file of the table's version, and the other files"
            )


def _with_whole_archives(skipped: Sequence[FileInfo], files: Sequence[FileInfo]) -> list[FileInfo]:
    """``skipped`` with an archive in place of its members, if none of them is in ``files``."""
    read: set[str] = set()
    for file in files:
        if parts := uris.split_member(file.uri):
            read.add(parts[0])
    whole: dict[str, FileInfo] = {}
    for file in skipped:
        archive, _ = uris.split_member(file.uri) or (file.uri, "")
        uri = file.uri if archive in read else archive
        if uri not in whole:
            whole[uri] = file if uri == file.uri else corpus_files.stat(uri)
    return list(whole.values())


def _why_empty(skipped: Sequence[FileInfo]) -> str:
    """Reason why no file is left of the ``skipped`` ones, and what to do."""
    if all(is_store_file(file.uri) for file in skipped):
        return (
            f"all {len(skipped):,} files found are of an afn-ray store, as {skipped[0].uri}; a "
            "store is no corpus: name the folder with the texts"
        )
    names = documents.listing([file.uri for file in skipped], 200)
    return (
        f"no file has a known ending: .{', .'.join(FORMATS)}; each but .parquet may be followed by "
        f".{', .'.join(COMPRESSIONS)}. Found: {names}. If they all have one format, name it with "
        "--format"
    )


def choose_shard_bytes(files: Sequence[FileInfo]) -> int:
    """Target size of a shard, in bytes, for a corpus of ``files``.

    It depends only on the smallest power of 4 that is at least the total size. Shards thus keep
    their ids while the corpus grows within its size class, for any number of workers. There are 16
    to 64 shards; fewer if a file cannot be cut or most of its bytes are not read; more above 1 GiB.
    """
    num_bytes = sum(file.size for file in files)
    size_class = 1
    while size_class < num_bytes:
        size_class *= 4
    return min(MOST_SHARD_BYTES, max(LEAST_SHARD_BYTES, size_class // SHARDS_IN_CLASS))


def check_columns(files: Sequence[FileInfo], options: ReadOptions) -> None:
    """Check the columns of one file of each format, so that a wrong name fails before the run.

    Raises ``CorpusError`` if a required column (text, and id or tags if configured) is in none of
    the first 20 documents of a file, if that of the text or id has another type in all of them, if
    a format cannot have the configured tags, or if none of ``SAMPLE_FILES`` files has a kept
    column. Empty and unreadable files pass.
    """
    first: dict[str, FileInfo] = {}
    for file in files:
        if file.size:
            first.setdefault(_kind(file, options)[0], file)
    with naming_others(files, options):
        for format, file in first.items():
            _check_labels(file, format, options)
            whole = _whole(file, options)
            _require_columns(file, reading.peek_columns(whole, options), options)
            if why := reading.peek_text(whole, options):
                raise CorpusError(f"{file.uri}: {why}")
    _check_kept([file for file in files if file.size], options)


class LackingColumn(CorpusError):
    """A file lacks a required column."""

    def __init__(self, message: str = "", uri: str = "") -> None:
        super().__init__(message)
        self.uri = uri


@contextlib.contextmanager
def naming_others(files: Sequence[FileInfo], options: ReadOptions) -> Iterator[None]:
    """Add to a ``LackingColumn`` which others of some ``files`` lack a required column too."""
    try:
        yield
    except LackingColumn as error:
        others = _spread([file for file in files if file.size and file.uri != error.uri])
        lacking: list[str] = []
        for file in others:
            names = reading.peek_columns(_whole(file, options), options)
            if names is not None and documents.missing_column(names, options) is not None:
                lacking.append(file.uri)
        if not lacking:
            raise
        of_others = f"{len(lacking)} of {count(len(others), 'other file')} looked at"
        raise CorpusError(
            f"{error}; {of_others} lack it too: {documents.listing(lacking, 200)}"
        ) from error


def _check_kept(files: Sequence[FileInfo], options: ReadOptions) -> None:
    """Raise ``CorpusError`` for a kept column that none of some ``files`` has.

    A file may lack a kept column, but a column that all lack is probably misspelt.
    """
    missing = [column.path for column in kept.parse(options.keep)]
    if not missing or not files:
        return
    formats = {_kind(file, options)[0] for file in files}
    if formats <= WITHOUT_COLUMNS:
        raise CorpusError(
            f"keep_columns names {missing[0]!r}, but the files are {', '.join(sorted(formats))}, "
            "which has no columns; JSONL, CSV and Parquet have"
        )
    names: dict[str, None] = {}
    for file in _spread(files):
        found = reading.peek_columns(_whole(file, options), options, missing)
        names.update(dict.fromkeys(found or ()))
        missing = [name for name in missing if name not in names]
    if missing and names:
        num_files = min(SAMPLE_FILES, len(files))
        hint = documents.without_unprintable(nearest(missing[:1], list(names)))
        raise CorpusError(
            f"no column {missing[0]!r} in the first documents of {count(num_files, 'file')}, as "
            f"{files[0].uri}{hint}; they have: {documents.columns(names)}"
        )


def _spread(files: Sequence[FileInfo]) -> list[FileInfo]:
    """Up to ``SAMPLE_FILES`` of ``files``, evenly spaced."""
    num_files = min(SAMPLE_FILES, len(files))
    last = len(files) - 1
    num_steps = max(num_files - 1, 1)
    return [files[step * last // num_steps] for step in range(num_files)]


def cut(file: FileInfo, options: ReadOptions, shard_bytes: int) -> list[FileSlice]:
    """Cut all of ``file`` into slices, in order. The file is read once and hashed.

    Uncompressed lines are cut at the first newline at or after ``shard_bytes`` from a slice's
    start. Appending to a file thus changes only its last slice. Parquet is cut between row groups.
    Any other file is one slice. So is an unreadable Parquet file, which ``reading`` quarantines.
    Raises ``CorpusError`` if a CSV or Parquet file lacks a column, or if a file cannot be read.
    """
    return list(parts(file, options, shard_bytes)) or [_cut_whole(uncut(file, options))]


def parts(file: FileInfo, options: ReadOptions, shard_bytes: int) -> Iterator[FileSlice]:
    """Yield the slices of ``cut``, each once it is read; none where ``file`` cannot be cut."""
    format, compression = _kind(file, options)
    if format == "parquet":
        yield from _cut_parquet(file, options, shard_bytes)
    elif reading.is_lines(format, options) and not compression:
        yield from _cut_lines(_unhashed(file, format, ""), options.encoding, shard_bytes)


def uncut(file: FileInfo, options: ReadOptions) -> FileSlice:
    """All of a file that cannot be cut as one slice, without its hash.

    Raises ``CorpusError`` if it is CSV and lacks a column.
    """
    whole = _whole(file, options)
    if whole.format == "csv":
        _require_columns(file, reading.peek_columns(whole, options), options)
    if whole.format == REST:
        num_documents = 1
    elif whole.format == "txt" and not reading.is_lines(whole.format, options):
        num_documents = -1 if whole.compression else 1
    else:
        num_documents = -1 if file.size or whole.compression else 0
    return replace(whole, num_documents=num_documents)


def rest_bytes(file: FileInfo, options: ReadOptions, piece: FileSlice) -> int:
    """Bytes of ``file`` after its slice ``piece``; of Parquet, of the columns that are read."""
    if piece.format != "parquet" or piece.num_documents < 0:
        return file.size - piece.end
    with Source(file.uri, 0, file.size) as source:
        paths = row_groups.chunk_paths(pq.ParquetFile(source), documents.columns_of(options))
        groups = row_groups.column_chunks(source, paths)
        return sum(map(_group_bytes, groups[piece.end :]))


def _group_bytes(chunks: Sequence[tuple[int, int]]) -> int:
    """The size of a row group, the sum of those of its column ``chunks``, in bytes."""
    return sum(size for _, size in chunks)


def is_outdated(slices: Sequence[FileSlice], options: ReadOptions) -> bool:
    """True if remembered ``slices`` of a file would be read in another way today."""
    return any(piece.format != _format(piece.uri, options) for piece in slices)


def sample(files: Sequence[FileInfo], options: ReadOptions, max_documents: int) -> list[Document]:
    """Up to ``max_documents`` readable documents of up to 8 files, evenly spaced in ``files``.

    At most about 1 MB of each file is read. Of a longer text file, the sample has the beginning.
    """
    chosen = _spread(files)
    documents: list[Document] = []
    for i, file in enumerate(chosen):
        # If one file has too few documents, the next ones supply more.
        quota = -(-(max_documents - len(documents)) // (len(chosen) - i))
        documents += reading.sample(_whole(file, options), options, quota)
    return documents


def _kind(file: FileInfo, options: ReadOptions) -> tuple[str, str]:
    """Format and compression of ``file``.

    Raises ``CorpusError`` for a member that cannot be read.
    """
    format = _format(file.uri, options)
    _, _, ending = file.uri.lower().rpartition(".")
    compression = ending if ending in COMPRESSIONS and format not in ("parquet", REST) else ""
    if not file.compression:
        return format, compression
    if file.compression not in MEMBER_COMPRESSIONS:
        why = f"is {file.compression} in its archive"
    elif compression or format == "parquet":
        why = f"is compressed once more in its archive ({file.compression})"
    else:
        return format, file.compression
    raise CorpusError(
        f"{file.uri} {why}, so it cannot be read there; unpack the archive, write it anew without "
        "that (zip -0), or name other members, as in x.zip::*.jsonl"
    )


def _format(uri: str, options: ReadOptions) -> str:
    """Format of the file ``uri``; empty if it is unknown."""
    if uris.split_member(uri) is not None and uri.endswith(uris.MEMBER_MARK):
        return REST
    name = uri.lower()
    stem, _, ending = name.rpartition(".")
    is_compressed = ending in COMPRESSIONS
    format = options.format
    if format == "auto":
        format = FORMATS.get((stem if is_compressed else name).rpartition(".")[2], "")
        if format == "parquet" and is_compressed:
            return ""
    return warc.format_name() if format == WARC else format


def _require_columns(file: FileInfo, names: Sequence[str] | None, options: ReadOptions) -> None:
    """Raise ``CorpusError`` if ``names``, the columns of ``file``, lack one; None passes."""
    missing = None if names is None else documents.missing_column(names, options)
    if names is None or missing is None:
        return
    hint = nearest([missing], names).strip(" ()")
    why = documents.why_missing(names, options) or documents.without_unprintable(hint)
    raise LackingColumn(
        f"no column {missing!r} in {file.uri}; it has: "
        f"{documents.columns(names)}{why and '; '}{why}",
        file.uri,
    )


def _check_labels(file: FileInfo, format: str, options: ReadOptions) -> None:
    what = f"labels is {options.labels!r}, but {file.uri} is {format}, which has"
    if options.labels is not None and (format in ("txt", "csv") or format.startswith(WARC)):
        raise CorpusError(f"{what} no column of tags; JSONL, Parquet and CoNLL-U have")
    if options.labels not in (None, UPOS, XPOS) and format == "conllu":
        raise CorpusError(f"{what} {UPOS} and {XPOS}")


# --- cutting


def _whole(file: FileInfo, options: ReadOptions) -> FileSlice:
    """All of ``file`` as a slice without hash, for samples and checks."""
    return _unhashed(file, *_kind(file, options))


def _unhashed(file: FileInfo, format: str, compression: str) -> FileSlice:
    """All of ``file`` as a slice, whose hash and number of documents are not known yet."""
    return FileSlice(
        uri=file.uri,
        size=file.size,
        version=file.version,
        format=format,
        compression=compression,
        start=0,
        end=file.size,
        num_bytes=file.size,
        num_documents=-1,
        sha256="",
    )


def _cut_whole(whole: FileSlice) -> FileSlice:
    with Source(whole.uri, 0, whole.size) as source:
        source.drain()
        return replace(whole, sha256=source.sha256.hexdigest())


def _cut_lines(whole: FileSlice, encoding: str, shard_bytes: int) -> Iterator[FileSlice]:
    """Slices of lines of the file ``whole``.

    There are none for UTF-16 and UTF-32, where a newline is more than one byte, and where a mark of
    UTF-8, which only the first slice would have, counts more than ``encoding``.
    """
    start = end = num_documents = 0
    sha256 = hashlib.sha256()
    is_started = False  # the current line has a character that is not white space

    def ended_slice(num_documents: int) -> FileSlice:
        return replace(
            whole,
            start=start,
            end=end,
            num_bytes=end - start,
            num_documents=num_documents,
            sha256=sha256.hexdigest(),
        )

    with Source(whole.uri, 0, whole.size) as source:
        while block := source.read(max(BLOCK_BYTES, streams.LONGEST_BOM)):
            if end == 0 and (encoding_of(block) or (encoding and block.startswith(streams.BOM))):
                return
            block_start = end
            while end < block_start + len(block):
                at = end - block_start
                newline = block.find(b"\n", max(at, start + shard_bytes - block_start))
                piece = block[at : newline + 1] if newline >= 0 else block[at:]
                sha256.update(piece)
                text = piece.removeprefix(streams.BOM) if end == 0 else piece
                *ended, last = text.split(b"\n")
                for line in ended:
                    num_documents += is_started or bool(line.strip())
                    is_started = False
                is_started = is_started or bool(last.strip())
                end += len(piece)
                if newline >= 0:
                    yield ended_slice(num_documents)
                    start = end
                    num_documents = 0
                    sha256 = hashlib.sha256()
        is_altered = source.is_altered
    if start < end or not end or is_altered:  # the last slice has a document for the damage
        yield ended_slice(-1 if is_altered else num_documents + is_started)


def _cut_parquet(file: FileInfo, options: ReadOptions, shard_bytes: int) -> Iterator[FileSlice]:
    columns = documents.columns_of(options)
    with Source(file.uri, 0, file.size) as source:
        try:
            opened = pq.ParquetFile(source)
            schema, metadata = opened.schema_arrow, opened.metadata
            groups = row_groups.column_chunks(source, row_groups.chunk_paths(opened, columns))
            source.check_whole()
        except (*row_groups.UNREADABLE, DamagedStream):
            yield _cut_whole(_unhashed(file, "parquet", ""))
            return
        _require_columns(file, nested.names_in(schema, columns), options)
        row_groups.check_id_type(opened, file.uri, options)
        row_groups.check_kept_types(opened, file.uri, options)
        whole = _unhashed(file, "parquet", "")
        hashed = row_groups.hashed_names(schema, options)
        start = num_bytes = num_documents = 0
        sizes = [_group_bytes(chunks) for chunks in groups]
        for end, size in enumerate(sizes, 1):
            num_bytes += size
            num_documents += metadata.row_group(end - 1).num_rows
            if end < len(sizes) and num_bytes + sizes[end] <= shard_bytes:
                continue
            yield replace(
                whole,
                start=start,
                end=end,
                num_bytes=num_bytes,
                num_documents=num_documents,
                sha256=row_groups.hash_chunks(source, hashed, groups[start:end]),
            )
            start, num_bytes, num_documents = end, 0, 0
        if not sizes:
            empty = row_groups.hash_chunks(source, hashed, [])
            yield replace(whole, end=0, num_bytes=0, num_documents=0, sha256=empty)
