"""The files of a run as DuckDB reads them: by name, read-only, each block checked."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from afn_ray.errors import AfnError, StoreError
from afn_ray.store.blocks import Blocks
from afn_ray.store.retry import with_retries
from afn_ray.store.storage import RangeFile, open_filesystem


class ReadOnlyFiles(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Filesystem ``afn://`` that holds exactly the files it was given, each under a name, and never
    writes.

    DuckDB 2.0 calls seek and read on one file object from many threads, which gives errors and
    sometimes wrong rows with fsspec's own files. Every read here is positional: no position is
    shared between threads. A local file must still lie in ``root`` once links are followed; every
    other access raises ``PermissionError``.
    """

    protocol = "afn"
    cachable = False

    def __init__(
        self, root: str, files: Mapping[str, tuple[str, int]], find_blocks: Callable[[str], Blocks]
    ) -> None:
        """``files``: name -> (URI below ``root``, size in bytes). They are taken to be immutable.

        ``find_blocks(name)`` gives a file's checksums when it is first read. What is read is held
        against them.
        """
        super().__init__()
        self._find_blocks, self._blocks = find_blocks, dict[str, Blocks]()
        self.failed: AfnError | None = (
            None  # how a read failed last: DuckDB makes text of what it meets
        )
        self._fs, path = open_filesystem(root)
        self._local_root = os.path.realpath(path) if isinstance(self._fs, LocalFileSystem) else None
        self._files = {
            name: (str(self._fs._strip_protocol(uri)), size) for name, (uri, size) in files.items()
        }

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            self._refuse()
        name, (_, size) = self._strip_protocol(path), self._find(path)
        return RangeFile(
            lambda start, end: self._checked(name, start, end), size, threading.local()
        )

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "size": self._find(path)[1], "type": "file"}

    def glob(self, path: str, **options: Any) -> list[str]:
        return [path] if self._strip_protocol(path) in self._files else []

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        raise PermissionError(f"{path}: the files of a run cannot be listed")

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0, UTC)  # DuckDB asks, to see whether its cache holds

    def _find(self, path: str) -> tuple[str, int]:
        try:
            return self._files[self._strip_protocol(path)]
        except KeyError:
            raise PermissionError(f"{path} is not a file of this run") from None

    def _checked(self, name: str, start: int, end: int) -> bytes:
        target, size = self._files[name]
        try:
            if (blocks := self._blocks.get(name)) is None:
                blocks = self._blocks[name] = self._find_blocks(name)
            data = (
                blocks.read(start, end, partial(self._read, target))
                if blocks.num_bytes == size
                else None
            )
            if data is None:
                raise StoreError(
                    f"{target} is damaged: bytes {start:,} to {end:,} do not have the checksum that was committed; "
                    "'afn verify' says what else is, and what to do"
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


class ServedFiles(ReadOnlyFiles):
    """The same files in a process that cannot read them itself, and asks one that can."""

    def __init__(self, sizes: Mapping[str, int], read: Callable[[str, int, int], bytes]) -> None:
        """``sizes``: in bytes, by name. ``read``: the bytes of a file, by its name, from start to
        end.
        """
        fsspec.AbstractFileSystem.__init__(self)
        self._files = {name: (name, size) for name, size in sizes.items()}
        self._ask = read

    def _checked(self, name: str, start: int, end: int) -> bytes:
        return self._ask(name, start, end)
