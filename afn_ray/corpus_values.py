"""The corpus as values: how files are read, which there are, what a shard is of, and a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from afn_ray.fingerprints import fingerprint

UPOS, XPOS = "upos", "xpos"
"""Tag columns of CoNLL-U: Universal Dependencies' parts of speech, and the language's own."""
REST = "rest"
"""The format of what cannot be listed of a damaged archive."""
WARC = "warc"
"""The format of WARC; that of a slice is followed by its extractor."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Options that turn bytes into documents and rows; part of a shard's identity."""

    format: str  # "auto", "txt", "jsonl", "csv", "parquet", "conllu" or "warc"
    text_column: str
    id_column: str | None
    txt_documents: str  # "file" or "line"
    max_document_bytes: int
    labels: str | None = None  # column of the tags; None: upos in CoNLL-U, else no tags
    # how CSV writes a quote in a quoted field: "doubled", "backslash", or
    # "auto": doubled, with ambiguous rows quarantined
    csv_escape: str = "auto"
    keep: str = ""  # kept columns, as ``kept.canonical`` writes them
    encoding: str = ""  # of all formats but Parquet, as Python names it; "": UTF-8, or by its mark
    sample: str = ""  # share of the documents to select, as ``samples.canonical`` writes it
    where: str = ""  # condition on kept columns, as ``conditions`` writes it
    record: str = ""  # rows of tokens that are kept, as ``token_rows`` writes them; "": all

    def as_dict(self) -> dict[str, object]:
        """The options as plans and commits store them; those of later versions only where given."""
        newer = ("keep", "encoding", "sample", "where", "record")
        options = asdict(self)
        return {name: value for name, value in options.items() if value or name not in newer}

    @property
    def selects(self) -> bool:
        """True if not all documents may be selected."""
        return bool(self.sample or self.where)

    def of_all(self) -> ReadOptions:
        """The options with all documents selected, and all rows kept."""
        return replace(self, sample="", where="", record="")

    def labels_in(self, format: str) -> str | None:
        """Column of the tags in a file of ``format``; None: the file has no tags."""
        return self.labels or (UPOS if format == "conllu" else None)

    def identity(self, format: str) -> list[object]:
        """The options that change the documents of a file of ``format``."""
        # Kept columns are columns of ``documents``, also where the files have no columns.
        kept: list[object] = [{"keep": self.keep}] if self.keep else []
        if self.encoding and format != "parquet":
            # Earlier versions gave lines the places of lines, and ignored the mark of UTF-8.
            kept.append({"encoding": self.encoding, "rules": 2})
        if self.selects:
            kept.append({"sample": self.sample, "where": self.where})
        if self.record:
            kept.append({"record": self.record})
        if format == "txt":
            return [self.txt_documents, self.max_document_bytes, *kept]
        if format == "conllu":
            return [self.labels_in(format), self.max_document_bytes, *kept]
        if format.startswith(WARC):
            return [self.id_column, self.max_document_bytes, *kept]
        more: list[object] = [self.labels] if self.labels else []
        if format == "csv" and self.csv_escape != "auto":
            more = [self.csv_escape]
        if format in ("jsonl", "parquet") and self._has_paths:
            more.append({"paths": 1})  # earlier versions read no nested columns
        return [self.text_column, self.id_column, self.max_document_bytes, *more, *kept]

    @property
    def _has_paths(self) -> bool:
        """True if a column but the kept ones has a dot in its name."""
        columns = (self.text_column, self.id_column, self.labels)
        return any("." in column for column in columns if column)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of the corpus as the filesystem lists it."""

    uri: str
    size: int  # bytes
    version: str  # etag where the filesystem has one, else the modification time
    compression: str = field(default="", compare=False)  # of a member in its archive


@dataclass(frozen=True, slots=True)
class Unread:
    """The end of a corpus, after the documents that a limit asks for."""

    num_files: int = 0  # of which nothing is read
    num_bytes: int = 0  # in these files, and in the rest of the last one that is read
    first: str = ""  # URI of the first of these files; empty without any


NOTHING_UNREAD = Unread()
"""The end of a corpus that is read as a whole."""


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Part of one file: lines of a byte range, a range of Parquet row groups, or the whole file."""

    uri: str
    size: int  # bytes of the file
    version: str  # version of the file, as in FileInfo
    format: str  # "txt", "jsonl", "csv", "parquet", "conllu" or, with its extractor, "warc"
    compression: str  # "", "gz", "bz2", "xz", "zst" or "deflate"
    start: int  # bytes; row groups for Parquet
    end: int  # exclusive
    num_bytes: int  # bytes to read
    num_documents: int  # exact for Parquet and uncompressed lines, else -1
    sha256: str  # SHA-256 of the bytes read, in hex
    limit: int = -1  # documents to read, selected or not; -1: all

    @property
    def identity(self) -> list[object]:
        """The inputs of the slice's documents."""
        all_bytes = [self.uri, self.format, self.compression, self.start, self.end, self.sha256]
        return all_bytes if self.limit < 0 else [*all_bytes, self.limit]


@dataclass(frozen=True, slots=True)
class Shard:
    """A few slices: the unit of work, retry and commit."""

    id: str  # fingerprint of its slices and of how they are read
    slices: tuple[FileSlice, ...]
    options: ReadOptions
    generation: int = 0  # number of the commit that counts, see ``store.epochs``

    @classmethod
    def of(cls, slices: Sequence[FileSlice], options: ReadOptions) -> Shard:
        """The shard of ``slices``; its id depends on them and on the options that affect them."""
        identity = fingerprint([[*s.identity, options.identity(s.format)] for s in slices])
        return cls(identity, tuple(slices), options)

    def recording(self, record: str) -> Shard:
        """The shard of the same slices that keeps the rows ``record``."""
        return Shard.of(self.slices, replace(self.options, record=record))

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return sum(s.num_bytes for s in self.slices)


class Span(NamedTuple):
    """A tagged range of characters in a text."""

    start: int
    end: int  # exclusive
    tag: str


@dataclass(frozen=True, slots=True)
class Document:
    """One document of the corpus, or the reason why it has no text."""

    source: str  # URI of the file
    offset: int  # byte of the line in the file; row number for CSV, Parquet and compressed files
    text: str
    doc_id: str | None = None  # the id that the corpus gives, if any
    num_replaced: int = 0  # invalid UTF-8 sequences that became U+FFFD
    problem: str | None = None  # why it is quarantined; ``text`` is then empty
    tags: tuple[Span, ...] = ()  # sorted; not empty, not overlapping
    lost_bytes: int = 0  # bytes of the stored file that a quarantined row stands for
    lost_documents: int | None = None  # documents that the row stands for; None: unknown
    kept: tuple[object, ...] = ()  # values of the kept columns; empty: the row has none
    refused: tuple[tuple[str, str], ...] = ()  # kept column and why its value is left out
    selected: bool | None = True  # None: a null makes the condition unknown, so it is not selected
