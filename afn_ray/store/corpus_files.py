"""Files of a corpus, with their sizes and versions: one by its URI, or all that a pattern names."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from afn_ray.errors import CorpusError
from afn_ray.schema import FileInfo
from afn_ray.store import uris
from afn_ray.store.fs_calls import call_with_retries, find_entry, named_errors


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(key):
            return f"etag:{str(info[key]).strip(chr(34))}"
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        if info.get(key) is not None:
            return f"time:{info[key]}"
    return ""


def _file_info(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> FileInfo:
    name = str(info["name"])
    if isinstance(fs, LocalFileSystem):
        now = Path(name).stat()
        return FileInfo(name, now.st_size, f"time:{now.st_mtime_ns}")
    if info.get("size") is None:
        raise CorpusError(
            f"{name}: its size is unknown, so it cannot be read in parts; copy it to a store that "
            "tells"
        )
    return FileInfo(str(fs.unstrip_protocol(name)), int(info["size"]), _version(info))


def stat(uri: str) -> FileInfo:
    """Current size and version of one file. Raises ``CorpusError`` if it is gone or unreadable."""
    fs, path = uris.open_filesystem(uri)
    return call_with_retries(
        fs, "looking at", uri, CorpusError, lambda: _file_info(fs, fs.info(path))
    )


def find_files(pattern: str, left_out: set[str] | None = None) -> list[FileInfo]:
    """Files that ``pattern`` names, sorted by URI: a file, all files below a folder, or a glob.

    Hidden files and folders (``.x``, ``_x``) below a folder are left out, as in Spark and Hive.
    Links are followed. Raises ``CorpusError`` if no file matches, or if something cannot be listed.
    ``left_out`` collects the other files and folders of a remote listing.
    """
    fs, path = uris.open_filesystem(pattern)
    others: list[str] = []
    found = call_with_retries(
        fs, "listing", pattern, CorpusError, lambda: _match(fs, path, pattern, others)
    )
    if left_out is not None:
        left_out.update(str(fs.unstrip_protocol(name)).rstrip("/") for name in others)
    if not found:
        raise CorpusError(f"{pattern}: no files match")
    for file in found:
        if not file.uri.isascii() and any("\ud800" <= c <= "\udfff" for c in file.uri):
            raise CorpusError(
                f"listing {pattern}: the name of {file.uri!r} is not UTF-8; rename or move the file"
            )
    return sorted(found, key=lambda f: f.uri)


def _match(
    fs: fsspec.AbstractFileSystem, path: str, pattern: str, left_out: list[str]
) -> list[FileInfo]:
    local = isinstance(fs, LocalFileSystem)
    info = find_entry(fs, path)
    # A pattern that is the exact name of a file or folder is no glob, even if it contains * or [.
    if info is not None and info["type"] == "file":
        return [_file_info(fs, info)]
    if info is not None and info["type"] == "directory":
        if local:
            return [_file_info(fs, {"name": name}) for name in _walk(path)]

        def is_plain(name: str) -> bool:
            return not any(_is_hidden(part) for part in posixpath.relpath(name, path).split("/"))

        return [_file_info(fs, info) for info in _sifted(_below(fs, path), is_plain, left_out)]
    if not any(c in path for c in "*?["):
        raise FileNotFoundError(pattern)
    if local:
        return [_file_info(fs, {"name": name}) for name in fs.glob(path) if Path(name).is_file()]
    return [_file_info(fs, info) for info in _glob(fs, path, left_out)]


def _sifted(
    entries: Iterable[dict[str, Any]], is_wanted: Callable[[str], Any], left_out: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the ``entries`` whose names are wanted; append the other names to ``left_out``."""
    for info in entries:
        if is_wanted(info["name"]):
            yield info
        else:
            left_out.append(info["name"])


def _below(fs: fsspec.AbstractFileSystem, folder: str) -> Iterator[dict[str, Any]]:
    """All files below ``folder``.

    fsspec's generic ``find()`` skips folders that it cannot list; the ``find()`` of object stores
    does not.
    """
    own = getattr(type(fs), "_find", None) not in (None, AsyncFileSystem._find) or (
        not isinstance(fs, AsyncFileSystem) and type(fs).find is not fsspec.AbstractFileSystem.find
    )
    found = fs.find(folder, detail=True, **({} if own else {"on_error": "raise"}))
    return (
        info for name, info in found.items() if info["type"] == "file" and not name.endswith("/")
    )


def _glob(
    fs: fsspec.AbstractFileSystem, pattern: str, left_out: list[str]
) -> Iterator[dict[str, Any]]:
    """Files that match ``pattern``, found level by level.

    fsspec's ``glob()`` is not used: like its ``find()``, it skips folders that it cannot list.
    """
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    folders = ["/".join(parts[:fixed])]
    for depth, part in enumerate(parts[fixed:], fixed + 1):
        matches = re.compile(
            glob_translate("/".join(parts[:depth] if "**" not in part else parts))
        ).match
        if "**" in part:
            for folder in folders:
                yield from _sifted(_below(fs, folder), matches, left_out)
            return
        entries = [
            i for folder in folders for i in _sifted(fs.ls(folder, detail=True), matches, left_out)
        ]
        folders = [info["name"] for info in entries if info["type"] == "directory"]
        if depth == len(parts):
            yield from (info for info in entries if info["type"] == "file")
            left_out += folders


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
        for path in (posixpath.join(base, name) for name in names if not _is_hidden(name)):
            with named_errors("looking at", path, CorpusError):
                if S_ISREG(Path(path).stat().st_mode):  # a pipe would block its reader forever
                    yield path
