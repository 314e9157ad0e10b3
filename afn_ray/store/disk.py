"""Files on a disk of this machine, or one that is mounted: each appears whole, and where that is
asked, only once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

COPY_BYTES = 1 << 20

NO_LINKS = frozenset(
    {
        errno.EPERM,
        errno.EACCES,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.EMLINK,
        errno.EXDEV,
    }
)
"""How filesystems answer that have no hard links (FAT, exFAT, SMB, and buckets or folders mounted
through FUSE).
"""
NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS, errno.EPERM,
                            errno.EACCES, errno.EISDIR})  # fmt: skip
"""How filesystems answer that cannot write a folder's entries through, or not on demand."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""How filesystems answer that have no locks on files (NFS without its lock service, some FUSE)."""

FOLDER_TRIES = 5
"""How often a folder is made that goes before there is a file in it."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

CLAIM_S = 10.0
"""Longest that a writer may take from claiming a name to filling it, in seconds."""
CLAIM_POLL_S = 0.02
READER_S = 1.0
"""Longest that a reader waits for a name that is claimed, in seconds."""


class NameTaken(Exception):
    """Another writer has created the file."""


class UnfinishedClaim(OSError):
    """A name was claimed and never filled: its writer ended in between."""


def create_once(target: Path, data: bytes) -> None:
    """Create ``target`` with ``data``, whole or not at all. Raises ``NameTaken`` when it is there.

    A hard link appears whole and only once. Without hard links the name is claimed by an empty
    file, which one writer alone can create, and then replaced by the full one. Raises
    ``UnfinishedClaim`` where that never happened.
    """
    temporary = write_temporary(target, data)
    try:
        try:
            os.link(temporary, target)
        except FileExistsError:
            _check_content(target)
            raise NameTaken(target) from None
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            _claim(target, temporary, data)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def _claim(target: Path, temporary: Path, data: bytes) -> None:
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        _check_content(target)
        raise NameTaken(target) from None
    try:
        temporary.replace(target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    if target.read_bytes() != data:  # this filesystem let two writers claim one name
        raise NameTaken(target)


def _check_content(target: Path) -> None:
    if not wait_for_content(target, CLAIM_S):
        raise UnfinishedClaim(
            errno.EEXIST,
            f"it is empty, and nobody has filled it for {CLAIM_S:g} s: its writer ended as it began; delete that file "
            "and run the same command again",
            str(target),
        )


def wait_for_content(target: Path, seconds: float) -> bool:
    """Whether ``target``, which a writer may have claimed, is no empty file within ``seconds``."""
    end = time.monotonic() + seconds
    while _is_empty(target):
        if time.monotonic() >= end:
            return False
        time.sleep(CLAIM_POLL_S)
    return True


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False


def replace(target: Path, data: bytes) -> None:
    """Put ``data`` at ``target`` in the place of what is there."""
    temporary = write_temporary(target, data)
    try:
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copy the file ``source`` to ``target``, which is removed again where that fails."""
    try:
        with source.open("rb") as reader, _created(target) as sink:
            while block := reader.read(COPY_BYTES):
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def write_temporary(target: Path, data: bytes) -> Path:
    """A hidden file beside ``target`` that holds ``data``."""
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        with _created(temporary) as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _created(target: Path) -> IO[bytes]:
    """``target``, open for writing, in a folder that another process may remove while it is
    empty.
    """
    for left in reversed(range(FOLDER_TRIES)):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            return target.open("wb")
        except FileNotFoundError:
            if not left:
                raise
    raise AssertionError


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` survive a power cut, where its filesystem can do that."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(file: IO[str]) -> bool:
    """Lock ``file`` until it is closed; False where its filesystem has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def scratch_folder(given: str | None) -> Path:
    """Where unfinished files go: ``given``, or what the environment names.

    Python's own choice passes over a folder that is full, silently, and ends in the working folder.
    """
    named = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return Path(given or next(filter(None, named), "/tmp"))  # noqa: S108 - the system's, as tempfile has it


def find_lacks(folder: Path) -> list[str]:
    """What the filesystem of the writable ``folder`` lacks, and what is done instead; nothing on
    most disks.
    """
    name = f"probe-{uuid.uuid4().hex}"  # as of a store's other probes, in case it stays
    probe = write_temporary(
        folder / name, b"afn-ray asks what this filesystem can do; this file can be deleted\n"
    )
    link = folder / name
    tries: list[tuple[str, Callable[[], object], frozenset[int]]] = [
        (
            "hard links (commits are claimed by exclusive creation instead)",
            lambda: os.link(probe, link),
            NO_LINKS,
        ),
        (
            "fsync of folders (a power cut may lose the last commits, which are then measured again)",
            lambda: _sync(folder),
            NO_FOLDER_SYNC,
        ),
    ]
    lacks = []
    try:
        for what, attempt, answers in tries:
            try:
                attempt()
            except OSError as error:
                if error.errno not in answers:
                    raise
                lacks.append(what)
    finally:
        for path in (link, probe):
            path.unlink(missing_ok=True)
    return lacks
