"""Cut the first documents of a corpus into slices; read no more of it than they need."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from afn_ray.corpus import listing, reading, selection
from afn_ray.corpus_values import NOTHING_UNREAD, FileInfo, FileSlice, ReadOptions, Unread
from afn_ray.store import readers


@dataclass(frozen=True, slots=True)
class First:
    """Slices with the first selected documents of a corpus, and what comes after them."""

    slices: list[FileSlice]
    files: list[FileInfo]  # those that the slices are of
    unread: Unread


def cut_first(
    files: Sequence[FileInfo],
    limit: int,
    options: ReadOptions,
    cut: Callable[[FileInfo], Iterator[FileSlice]],
) -> First:
    """Cut the first ``limit`` documents of ``files`` that ``options`` select.

    ``cut`` yields the slices of a file, as ``listing.parts`` does. All slices but the last are
    those of the whole corpus, so that their shards are, too.
    """
    slices: list[FileSlice] = []
    left = limit
    for at, file in enumerate(files):
        for part in _parts(file, options, cut):
            piece, num_selected = _beginning(part, options, left)
            slices.append(piece)
            left -= num_selected
            if not left:
                rest = listing.rest_bytes(file, options, piece)
                return First(slices, list(files[: at + 1]), _unread(files[at + 1 :], rest))
    return First(slices, list(files), NOTHING_UNREAD)


def _unread(files: Sequence[FileInfo], rest: int) -> Unread:
    num_bytes = rest + sum(file.size for file in files)
    return Unread(len(files), num_bytes, files[0].uri if files else "")


def _parts(
    file: FileInfo, options: ReadOptions, cut: Callable[[FileInfo], Iterator[FileSlice]]
) -> Iterator[FileSlice]:
    """Yield the slices of ``file``; one without a hash if it must be read from its start."""
    is_cut = False
    for part in cut(file):
        is_cut = True
        yield part
    if not is_cut:
        yield listing.uncut(file, options)


def _beginning(part: FileSlice, options: ReadOptions, limit: int) -> tuple[FileSlice, int]:
    """The beginning of ``part`` with its first ``limit`` selected documents, and their number.

    It is ``part`` itself where that has no more.
    """
    is_known = part.num_documents >= 0 and part.sha256 != ""
    if is_known and not options.selects and part.num_documents <= limit:
        return part, part.num_documents
    if is_known or part.format == "parquet" or part.start:
        return _beginning_of_part(part, options, limit)
    return reading.beginning(part, options, limit)  # also where an earlier run has read all of it


def _beginning_of_part(part: FileSlice, options: ReadOptions, limit: int) -> tuple[FileSlice, int]:
    """The beginning of ``part``, a hashed slice, with its first ``limit`` selected documents."""
    with closing(reading.read(part, options)) as documents:
        first = selection.first_of(documents, limit)
    if first.following is None:
        return part, first.selected
    found = replace(part, limit=first.documents, num_documents=first.documents)
    # Parquet has no offsets in bytes, nor has the damage that may follow the last document.
    if part.format == "parquet" or part.num_documents < 0:
        return found, first.selected
    # A line ends where the next one begins.
    end = first.following.offset
    data = readers.read_range(part.uri, part.start, end)
    sha256 = hashlib.sha256(data).hexdigest()
    found = replace(found, end=end, num_bytes=len(data), sha256=sha256, limit=-1)
    return found, first.selected
