"""Files of a corpus, with their sizes and versions: one by its URI, or all that a pattern names."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from afn_ray.corpus_values import FileInfo
from afn_ray.errors import CorpusError
from afn_ray.store import archives, disk, readers, uris
from afn_ray.store.fs_calls import FsEntry, call_with_retries, find_entry, named_errors


def _version(info: FsEntry) -> str:
    for key in ("ETag", "etag", "md5Hash", "content_md5", "blob_id"):
        if info.get(key):
            tag = str(info[key]).strip('"')
            return f"etag:{tag}"
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        if info.get(key) is not None:
            return f"time:{info[key]}"
    return ""


def _file_info(fs: fsspec.AbstractFileSystem, info: FsEntry) -> FileInfo:
    name = str(info["name"])
    if isinstance(fs, LocalFileSystem):
        now = Path(name).stat()
        if not S_ISREG(now.st_mode):  # a pipe would block its reader, a device has no end
            raise CorpusError(f"examining {name}: {disk.NO_FILE}")
        return FileInfo(name, now.st_size, f"time:{now.st_mtime_ns}")
    if info.get("size") is None:
        raise CorpusError(
            f"{name}: its size is unknown, so it cannot be read in parts; copy it to a filesystem "
            "that reports sizes"
        )
    return FileInfo(str(fs.unstrip_protocol(name)), int(info["size"]), _version(info))


def stat(uri: str) -> FileInfo:
    """Current size and version of one file. Raises ``CorpusError`` if it is gone or unreadable."""
    if (parts := uris.split_member(uri)) is not None:
        return _member_info(*find_member(*parts))
    fs, path = uris.open_filesystem(uri)

    # The Hub's filesystem keeps listings, and from them alone it would not see a change.
    now = {"refresh": True, "expand_info": True} if fs.protocol == "hf" else {}

    def examine() -> FileInfo:
        return _file_info(fs, fs.info(path, **now))

    return call_with_retries(fs, "examining", uri, CorpusError, examine)


def find_member(archive_uri: str, name: str) -> tuple[FileInfo, archives.Member]:
    """The archive as it is now, and its member ``name``. Raises ``CorpusError`` if it is gone."""
    archive = stat(archive_uri)
    member = archives.members(archive, readers.open_headers).get(name)
    if member is None:
        what = f"{archive_uri} has no member {name!r}"
        raise CorpusError(what) from FileNotFoundError(what)
    return archive, member


def _member_info(archive: FileInfo, member: archives.Member) -> FileInfo:
    uri = uris.MEMBER_MARK.join([archive.uri, member.name])
    return FileInfo(uri, member.size, archive.version, member.compression)


def _members(archive: FileInfo, pattern: str, left_out: set[str] | None) -> list[FileInfo]:
    """The members of ``archive`` that the glob or name ``pattern`` matches; an empty one matches
    all.

    Without a ``pattern``, hidden ones are left out. The damaged rest always matches.
    """
    found: list[FileInfo] = []
    matches = re.compile(glob_translate(pattern)).match
    for name, member in archives.members(archive, readers.open_headers).items():
        info = _member_info(archive, member)
        parts = [part for part in name.split("/") if part not in (".", "..")]
        is_hidden = any(map(_is_hidden, parts))
        if not name or name == pattern or (matches(name) if pattern else not is_hidden):
            found.append(info)
        elif left_out is not None:
            left_out.add(info.uri)
    return found


def find_files(pattern: str, left_out: set[str] | None = None) -> list[FileInfo]:
    """Files that ``pattern`` names, sorted by URI: a file, all files below a folder, or a glob.

    An archive is its members, or those that a name or glob after ``::`` names.

    Hidden files and folders (``.x``, ``_x``) below a folder are left out, as in Spark and Hive.
    Links are followed. Raises ``CorpusError`` if no file matches, or if something cannot be listed.
    ``left_out`` collects the other files and folders of a remote listing.
    """
    pattern, members = uris.split_member(pattern) or (pattern, "")
    fs, path = uris.open_filesystem(pattern)
    others: list[str] = []
    fs.invalidate_cache()

    def match() -> list[FileInfo]:
        return _match(fs, path, pattern, others)

    found = call_with_retries(fs, "listing", pattern, CorpusError, match)
    if left_out is not None:
        for name in others:
            uri = str(fs.unstrip_protocol(name))
            left_out.add(uri.rstrip("/"))
    archived = [file for file in found if archives.is_archive(file.uri)]
    found = [] if members else [file for file in found if file not in archived]
    for archive in archived:
        found += _members(archive, members, left_out)
    if not found:
        what = f"{pattern}{uris.MEMBER_MARK}{members}" if members else pattern
        raise CorpusError(f"{what}: no files match")
    for file in found:
        if not _is_utf8(file.uri):
            raise CorpusError(
                f"listing {pattern}: the name of {file.uri!r} is not UTF-8; rename or move the file"
            )
    return sorted(found, key=lambda f: f.uri)


def _is_utf8(name: str) -> bool:
    """True if all bytes of ``name`` were UTF-8; Python decodes others as lone surrogates."""
    if name.isascii():
        return True
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _match(
    fs: fsspec.AbstractFileSystem, path: str, pattern: str, left_out: list[str]
) -> list[FileInfo]:
    """The files that ``path``, the path of ``pattern``, matches, in any order."""
    entry = find_entry(fs, path)
    # A pattern that is the exact name of a file or folder is no glob, even if it contains * or [.
    if entry is not None and entry["type"] == "file":
        return [_file_info(fs, entry)]
    if entry is not None and isinstance(fs, LocalFileSystem):
        disk.check_ends(Path(entry["name"]))
    if entry is not None and entry["type"] == "directory":
        entries = _files_in_folder(fs, path, left_out)
    elif _is_glob(path):
        entries = _glob(fs, path, left_out)
    else:
        raise FileNotFoundError(pattern)
    return [_file_info(fs, entry) for entry in entries]


def _is_glob(path: str) -> bool:
    """True if ``path`` contains a character of globs."""
    return any(character in path for character in uris.WILDCARDS)


def _files_in_folder(
    fs: fsspec.AbstractFileSystem, folder: str, left_out: list[str]
) -> Iterator[FsEntry]:
    """The files below ``folder`` that are not hidden; hidden remote ones go to ``left_out``."""
    if isinstance(fs, LocalFileSystem):
        return ({"name": name} for name in _walk(folder))

    def is_visible(name: str) -> bool:
        parts = posixpath.relpath(name, folder).split("/")
        return not any(map(_is_hidden, parts))

    return _sifted(_below(fs, folder), is_visible, left_out)


def _sifted(
    entries: Iterable[FsEntry], is_wanted: Callable[[str], Any], left_out: list[str]
) -> Iterator[FsEntry]:
    """Yield the ``entries`` whose names are wanted; append the other names to ``left_out``."""
    for info in entries:
        if is_wanted(info["name"]):
            yield info
        else:
            left_out.append(info["name"])


def _below(fs: fsspec.AbstractFileSystem, folder: str) -> Iterator[FsEntry]:
    """All files below ``folder``.

    fsspec's generic ``find()`` skips folders that it cannot list; the ``find()`` of object stores
    does not.
    """
    options = {} if _has_own_find(fs) else {"on_error": "raise"}
    for name, info in fs.find(folder, detail=True, **options).items():
        if info["type"] == "file" and not name.endswith("/"):
            yield info


def _has_own_find(fs: fsspec.AbstractFileSystem) -> bool:
    """True if the class of ``fs`` replaces fsspec's generic ``find()``."""
    # fsspec has no public name for the method that asynchronous filesystems replace.
    if getattr(type(fs), "_find", None) not in (None, AsyncFileSystem._find):
        return True
    if isinstance(fs, AsyncFileSystem):
        return False
    return type(fs).find is not fsspec.AbstractFileSystem.find


def _glob(fs: fsspec.AbstractFileSystem, pattern: str, left_out: list[str]) -> Iterator[FsEntry]:
    """Files that match ``pattern``; other remote files and folders go to ``left_out``.

    On a remote filesystem they are found level by level. fsspec's ``glob()`` is not used there:
    like its ``find()``, it skips folders that it cannot list.
    """
    if isinstance(fs, LocalFileSystem):
        for name in fs.glob(pattern):
            if Path(name).is_file():
                yield {"name": name}
        return
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if _is_glob(part))
    folders = ["/".join(parts[:first])]
    for depth, part in enumerate(parts[first:], first + 1):
        if "**" in part:
            matches = _matcher(parts)
            for folder in folders:
                yield from _sifted(_below(fs, folder), matches, left_out)
            return
        matches = _matcher(parts[:depth])
        entries: list[FsEntry] = []
        for folder in folders:
            entries += _sifted(fs.ls(folder, detail=True), matches, left_out)
        folders = [info["name"] for info in entries if info["type"] == "directory"]
        if depth == len(parts):
            yield from [info for info in entries if info["type"] == "file"]
            left_out += folders


def _matcher(parts: Sequence[str]) -> Callable[[str], Any]:
    """A function that tells whether a path matches the glob of these ``parts``."""
    expression = glob_translate("/".join(parts))
    return re.compile(expression).match


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _walk(folder: str) -> Iterator[str]:
    """Regular files below the local ``folder``, following links, without hidden ones.

    fsspec's ``walk()`` is not used: it skips folders that it cannot list and does not follow links.
    """

    def fail(error: OSError) -> None:
        raise CorpusError(
            f"listing {error.filename}: {error.strerror}; a corpus is listed whole or not at all"
        )

    seen: set[str] = set()  # a link may lead back to a parent folder
    for base, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in names:
            if _is_hidden(name):
                continue
            path = posixpath.join(base, name)
            with named_errors("examining", path, CorpusError):
                if S_ISREG(Path(path).stat().st_mode):  # a pipe would block its reader forever
                    yield path
