"""Files on a local or mounted disk: each appears whole and, where required, only once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from afn_ray.errors import ConfigError

COPY_BYTES = 1 << 20
"""Bytes copied at a time."""

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
"""Errors of filesystems without hard links (FAT, exFAT, SMB, FUSE mounts of buckets or folders)."""
NO_FOLDER_SYNC = frozenset(
    {
        errno.EINVAL,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.EBADF,
        errno.ENOSYS,
        errno.EPERM,
        errno.EACCES,
        errno.EISDIR,
    }
)
"""Errors of filesystems that cannot fsync a folder."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""Errors of filesystems without file locks (NFS without its lock service, some FUSE)."""

FOLDER_TRIES = 5
"""Most tries to create a file in a folder that another process removes while it is empty."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a full disk or an exhausted quota."""

CLAIM_S = 10.0
"""Longest wait of a writer for another writer to fill a name that it claimed, in seconds."""
CLAIM_POLL_S = 0.02
"""Pause between two checks of a claimed name, in seconds."""
READER_S = 1.0
"""Longest wait of a reader for a claimed name to be filled, in seconds."""


class NameTaken(Exception):
    """Another writer has created the file."""


class UnfinishedClaim(OSError):
    """A writer claimed a name and ended before it filled the file."""


NO_FILE = "it is a pipe, a device or a socket; give a regular file"
"""Reason not to read what may have no end."""


def create_once(target: Path, data: bytes) -> None:
    """Create ``target`` with ``data``, whole or not at all. Raises ``NameTaken`` if it exists.

    A hard link publishes the file whole and only once. On a filesystem without hard links, the
    writer claims the name with an empty file, which only one writer can create, and then replaces
    it with the full file. Raises ``UnfinishedClaim`` if another writer claimed the name and did not
    fill it within ``CLAIM_S``.
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
            f"it is empty, and its content has not appeared for {CLAIM_S:g} s: its writer ended "
            "before it wrote the content; delete that file and run the same command again",
            str(target),
        )


def wait_for_content(target: Path, seconds: float) -> bool:
    """Wait for a claimed ``target`` to be filled; False if it is still empty after ``seconds``."""
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
    """Write ``data`` to ``target``, replacing what is there."""
    temporary = write_temporary(target, data)
    try:
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_ends(path: Path) -> None:
    """Raise ``OSError`` for a pipe, device or socket, whose reader may wait for ever."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # opening it fails too, and says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, NO_FILE, str(path))


def copy(source: Path, target: Path) -> None:
    """Copy the file ``source`` to ``target``; remove ``target`` if that fails."""
    try:
        with source.open("rb") as reader, _created(target) as sink:
            while block := reader.read(COPY_BYTES):
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
    except BaseException:
        target.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A hidden path beside ``target`` for a file that the caller names ``target`` once it is whole.

    What is left under the hidden path at the end is removed.
    """
    # The name is cut, because a suffix could make it longer than the filesystem allows.
    path = target.with_name(f".{target.name[:40]}-{uuid.uuid4().hex}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def write_temporary(target: Path, data: bytes) -> Path:
    """Write ``data`` to a hidden file beside ``target`` and return its path."""
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
    """Open ``target`` for writing, and create its folder.

    It retries, because another process may remove the folder while it is empty.
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
    """Make the names in ``folder`` survive a power cut, if its filesystem supports that."""
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
    """Lock ``file`` until it is closed; False if its filesystem has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def scratch_folder(given: str | None) -> Path:
    """The folder for unfinished files: ``given``, else the one that the environment names.

    It is /tmp if neither is set. ``tempfile.gettempdir`` is not used: it silently skips a full
    folder and falls back to the working folder.
    """
    named = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    # The default is the system's, as in tempfile.
    return Path(given or next(filter(None, named), "/tmp"))  # noqa: S108


def find_lacks(folder: Path) -> list[str]:
    """Features that the filesystem of the writable ``folder`` lacks, and their substitutes.

    The list is empty on most disks.
    """
    name = f"probe-{uuid.uuid4().hex}"  # a probe that is left behind is recognised by this name
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
            "fsync of folders (a power cut may lose the last commits, which are then measured "
            "again)",
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


@contextlib.contextmanager
def write_local(path: Path) -> Iterator[IO[bytes]]:
    """A local file, open for writing, that appears whole on success or not at all.

    Raises ``ConfigError`` if it cannot be written.
    """
    if path.exists() and not path.is_file():  # a pipe, /dev/stdout
        with path.open("wb") as file:
            yield file
        return
    try:
        with unfinished(path) as hidden:
            with hidden.open("wb") as file:
                yield file
                file.flush()
                # After a power cut, the file has its old content or all of the new, never none.
                os.fsync(file.fileno())
            hidden.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
