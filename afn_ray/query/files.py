"""The read-only filesystem through which DuckDB reads a run's files; it checks every block."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from afn_ray.errors import AfnError, StoreError
from afn_ray.store.blocks import LEAST_BLOCK_BYTES, Blocks
from afn_ray.store.readers import RangeFile
from afn_ray.store.retry import with_retries
from afn_ray.store.uris import open_filesystem, path_in

MOST_BLOCKS = 4096
"""Most files whose checksums are held in memory."""
HELD_BYTES = LEAST_BLOCK_BYTES
"""Largest file that is held in memory once it was read, in bytes: it has one block, so that every
read reads all of it, and DuckDB reads each file several times for each query.
"""
MOST_HELD = 256
"""Most files that are held in memory: the first ones that are read."""


class ReadOnlyFiles(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Filesystem ``afn://`` with a fixed set of named files; it never writes.

    DuckDB 2.0 calls seek and read on one file object from many threads. With fsspec's own files
    this causes errors and sometimes wrong rows. Here every read is positional, so threads share no
    position. A local file must be below ``root`` after links are resolved. Any other access raises
    ``PermissionError``.
    """

    protocol = "afn"
    cachable = False

    def __init__(
        self, root: str, files: Mapping[str, tuple[str, int]], find_blocks: Callable[[str], Blocks]
    ) -> None:
        """Serve ``files``: name -> (URI below ``root``, size in bytes).

        The files must not change. ``find_blocks(name)`` returns a file's checksums; it is called
        on the first read of the file. All bytes read are compared with the checksums.
        """
        super().__init__()
        self._blocks = lru_cache(MOST_BLOCKS)(find_blocks)
        self._held: dict[str, bytes] = {}
        # Error of the last failed read: DuckDB reduces errors to text.
        self.failed: AfnError | None = None
        self._fs, path = open_filesystem(root)
        self._local_root = os.path.realpath(path) if isinstance(self._fs, LocalFileSystem) else None
        self._files = {name: (path_in(uri), size) for name, (uri, size) in files.items()}

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            self._refuse()
        _, size = self._find(path)
        return RangeFile(partial(self._checked, _name(path)), size, threading.local())

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "size": self._find(path)[1], "type": "file"}

    def glob(self, path: str, **options: Any) -> list[str]:
        return [path] if _name(path) in self._files else []

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        raise PermissionError(f"{path}: the files of a run cannot be listed")

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0, UTC)  # DuckDB uses it to validate its cache

    def _find(self, path: str) -> tuple[str, int]:
        try:
            return self._files[_name(path)]
        except KeyError:
            raise PermissionError(f"{path} is not a file of this run") from None

    def _checked(self, name: str, start: int, end: int) -> bytes:
        """The bytes of a file from ``start`` to ``end``.

        Raises ``StoreError`` if the file is gone or does not have the committed checksum, which is
        seen no more where a small file is held.
        """
        _, size = self._files[name]
        if size > HELD_BYTES:
            return self._read_checked(name, start, end)
        data = self._held.get(name)
        if data is None:
            data = self._read_checked(name, 0, size)
            if len(self._held) < MOST_HELD:
                self._held[name] = data
        return data[start:end]

    def _read_checked(self, name: str, start: int, end: int) -> bytes:
        target, size = self._files[name]
        try:
            blocks = self._blocks(name)
            data = None
            if blocks.num_bytes == size:
                data = blocks.read(start, end, partial(self._read, target))
            if data is None:
                raise StoreError(
                    f"{target} is damaged: bytes {start:,} to {end:,} do not have the checksum "
                    "that was committed; 'afn verify' says what else is, and what to do"
                )
            return data
        except AfnError as error:
            self.failed = error
            raise

    def _read(self, target: str, start: int, end: int) -> bytes:
        if self._local_root is not None:
            real = os.path.realpath(target)
            if os.path.commonpath([real, self._local_root]) != self._local_root:
                raise PermissionError(f"{target} is a link that leaves the store")
            target = real

        def read() -> bytes:
            return bytes(self._fs.cat_file(target, start=start, end=end))

        try:
            return with_retries(read, f"reading {target}", local=self._local_root is not None)
        except FileNotFoundError as error:
            raise StoreError(
                f"{target} is gone from the store; 'afn verify' says what else is, and what to do"
            ) from error

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise PermissionError("a run is read-only")

    mkdir = makedirs = rmdir = rm = rm_file = mv = copy = cp_file = put_file = pipe_file = touch = (
        _refuse
    )


def _name(path: str) -> str:
    """The name of the file that DuckDB asks for by ``path``."""
    return path.removeprefix(f"{ReadOnlyFiles.protocol}://")


class ServedFiles(ReadOnlyFiles):
    """The same files in a process that cannot open them; it reads through another process."""

    def __init__(self, sizes: Mapping[str, int], read: Callable[[str, int, int], bytes]) -> None:
        """``sizes`` are in bytes by name; ``read(name, start, end)`` returns bytes of a file."""
        fsspec.AbstractFileSystem.__init__(self)
        self._files = {name: (name, size) for name, size in sizes.items()}
        self._ask = read

    def _checked(self, name: str, start: int, end: int) -> bytes:
        return self._ask(name, start, end)
