"""Members of zip and tar archives as ranges of bytes: ``x.zip::a/b.jsonl`` is the member a/b.jsonl.

Nothing is extracted, so a member may have any name. What cannot be listed of a damaged archive is a
member of its own, with an empty name.
"""

from __future__ import annotations

import itertools
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from typing import IO, Any, NamedTuple, cast

from afn_ray.corpus_values import FileInfo
from afn_ray.errors import CorpusError

ENDING = re.compile(r"\.(zip|tar)$", re.IGNORECASE)
MOST_MEMBERS = 1_000_000
"""Most members of an archive that are listed."""
MOST_GLOBAL = 100
"""Most values in the global headers of a tar archive."""
READ_BYTES = 256 << 20
"""Longest directory of a zip archive, or header of a tar archive, in bytes."""
METHODS = {0: "", 8: "deflate", 12: "bz2", 93: "zst"}
"""Method of compression in a zip archive -> compression of a slice."""
DAMAGES = (
    zipfile.BadZipFile,
    tarfile.TarError,
    NotImplementedError,
    ValueError,
    OverflowError,
    EOFError,
    struct.error,
    RecursionError,  # of headers of tar, each of which describes the next one
)
"""Errors that damaged archives raise."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Header before a member of a zip archive: its mark, and the lengths of
its name and extra field.
"""


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    offset: int
    """First byte in the archive: of the content in tar, of the header before it in zip."""
    size: int
    """Stored bytes."""
    compression: str = ""
    """One of the values of ``METHODS``, or why it cannot be read."""
    crc32: int | None = None
    """Checksum of the content; None in tar, which has none."""
    stored_name: str = ""
    """Name in the directory of a zip archive, as it is stored."""
    problem: str = ""
    """Reason why the bytes cannot be listed: they are no file, but the
    damaged rest of the archive.
    """


def is_archive(uri: str) -> bool:
    """True if the name of ``uri`` is that of an archive."""
    return bool(ENDING.search(uri))


@lru_cache(8)
def members(archive: FileInfo, open_read: Callable[[str], IO[bytes]]) -> dict[str, Member]:
    """The files in ``archive`` by name, in its order.

    Raises ``CorpusError`` if two have the same name, and what ``open_read`` raises.
    """
    with open_read(archive.uri) as file:
        guarded = cast(IO[bytes], _Guarded(file))
        listed = _in_zip(guarded, archive) if _is_zip(archive) else _in_tar(guarded, archive)
    found: dict[str, Member] = {}
    for member in listed:
        if member.name in found:
            raise CorpusError(
                f"{archive.uri} has two members named {member.name!r}; write the archive anew with "
                "one of them"
            )
        found[member.name] = member
    return found


def data_start(archive: FileInfo, member: Member, file: IO[bytes]) -> int:
    """First byte of the content of ``member`` in ``archive``, which is open as ``file``.

    Raises ``CorpusError`` if the header before it is damaged.
    """
    if member.problem or not _is_zip(archive):
        return member.offset
    file.seek(member.offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) == LOCAL_HEADER.size:
        mark, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
        name = file.read(name_bytes)
        is_same = member.stored_name in (name.decode(errors="replace"), name.decode("cp437"))
        if mark == b"PK\3\4" and is_same:
            return member.offset + LOCAL_HEADER.size + int(name_bytes + extra_bytes)
    raise CorpusError(
        f"{archive.uri} is damaged: member {member.name!r} does not begin at byte {member.offset}; "
        "repair the archive, or name its other members"
    )


def _is_zip(archive: FileInfo) -> bool:
    return archive.uri.lower().endswith(".zip")


def _in_zip(file: IO[bytes], archive: FileInfo) -> list[Member]:
    try:
        with zipfile.ZipFile(file) as opened:
            infos = sorted(opened.infolist(), key=lambda info: info.header_offset)
            _check_ranges(infos, archive.size)
    except DAMAGES as error:
        why = f"not a readable zip archive: {error}"
        return [Member("", 0, archive.size, problem=why)]
    listed = []
    for info in infos:
        compression = METHODS.get(info.compress_type, f"compressed by method {info.compress_type}")
        if info.flag_bits & 1:
            compression = "encrypted"
        if not info.is_dir():
            name = info.filename.removeprefix("./")
            packed = (info.header_offset, info.compress_size, compression, info.CRC)
            listed.append(Member(name, *packed, stored_name=info.orig_filename))
    return listed


def _check_ranges(infos: list[zipfile.ZipInfo], size: int) -> None:
    """Raise ``ValueError`` for more members than ``MOST_MEMBERS``, or some that share bytes."""
    if len(infos) > MOST_MEMBERS:
        raise ValueError(f"{len(infos)} members are over the limit of {MOST_MEMBERS}")
    starts = [info.header_offset for info in infos]
    for info, end in itertools.zip_longest(infos, starts[1:], fillvalue=size):
        assert isinstance(info, zipfile.ZipInfo)
        if (
            info.header_offset < 0
            or info.header_offset + LOCAL_HEADER.size + info.compress_size > end
        ):
            raise ValueError(f"member {info.filename!r} overlaps another one or the end")


def _in_tar(file: IO[bytes], archive: FileInfo) -> list[Member]:
    listed: list[Member] = []
    end = num_members = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            while (info := opened.next()) is not None:
                opened.members = []  # type: ignore[attr-defined]  # it keeps all, 1 kB each
                num_members += 1
                _check_member(opened, info, num_members, archive.size)
                end = opened.offset
                if info.isreg():
                    name = info.name.removeprefix("./")
                    is_sparse = "sparse" if info.issparse() else ""
                    listed.append(Member(name, info.offset_data, info.size, is_sparse))
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            raise ValueError("bytes that begin no member")
        why = "" if block else "the mark of its end is missing, so it may have been cut"
        if (start := _after_zeros(file, end)) is not None:
            end, why = start, "bytes after the mark of its end, perhaps of another archive"
    except DAMAGES as error:
        why = str(error) or type(error).__name__
    if why:
        what = f"not a readable tar archive from byte {end} on: {why}"
        listed.append(Member("", end, max(0, archive.size - end), problem=what))
    return listed


def _check_member(opened: tarfile.TarFile, info: tarfile.TarInfo, number: int, size: int) -> None:
    """Raise ``ValueError`` for a member that is cut, shares bytes with
    another, or is one too many.
    """
    if number > MOST_MEMBERS:
        raise ValueError(f"more than {MOST_MEMBERS} members")
    if len(opened.pax_headers) > MOST_GLOBAL:  # each member has a copy of all
        raise ValueError(f"more than {MOST_GLOBAL} global headers")
    if info.size < 0:
        raise ValueError(f"member {info.name!r} has {info.size} bytes")
    if info.issparse():
        return
    if info.offset_data + info.size > size:
        raise ValueError("its last member is cut")
    blocks = -(-info.size // tarfile.BLOCKSIZE)
    # A global header may state another size than that of the bytes before the next member.
    if info.isreg() and info.offset_data + blocks * tarfile.BLOCKSIZE != opened.offset:
        raise ValueError(f"member {info.name!r} has two sizes")


def _after_zeros(file: IO[bytes], start: int) -> int | None:
    """First block of a tar archive at or after byte ``start`` with more
    than zeros; None if none.
    """
    at = start
    file.seek(start)
    while block := file.read(1 << 20):
        rest = block.lstrip(b"\0")
        if rest:
            first = at + len(block) - len(rest)
            return first - (first - start) % tarfile.BLOCKSIZE
        at += len(block)
    return None


class _Guarded:
    """A file that is not read in pieces over ``READ_BYTES``, which damaged headers ask for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        if size > READ_BYTES:
            raise ValueError(f"a header of {size} bytes is over the limit of {READ_BYTES}")
        return self._file.read(min(size, READ_BYTES) if size >= 0 else READ_BYTES)
