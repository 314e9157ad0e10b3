"""Scratch folders of attempts: files of a shard before they are uploaded."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, Interrupted
from afn_ray.store import disk
from afn_ray.store.layout import SCRATCH_PREFIX


@contextmanager
def attempt_folder(config: RunConfig) -> Iterator[Path]:
    """A folder for one attempt's unfinished files, locked while its process lives."""
    root = disk.scratch_folder(config.scratch)
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=root))
            )
            lock = stack.enter_context((folder / "new-lock").open("w"))
            if disk.lock(lock):
                Path(lock.name).rename(folder / "lock")  # visible only once it is held
        except OSError as error:
            if error.errno in disk.FULL:
                raise Interrupted(
                    f"no space left in the scratch folder {root}; make room, or give another "
                    "--scratch or TMPDIR, and run the same command again: it resumes"
                ) from error
            raise ConfigError(f"scratch folder {root}: {error.strerror}") from error
        yield folder


def sweep(config: RunConfig) -> None:
    """Remove scratch folders that killed workers left on this machine: those with a free lock."""
    for lock in disk.scratch_folder(config.scratch).glob(f"{SCRATCH_PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock.open() as file:  # held, gone, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
