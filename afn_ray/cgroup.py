"""CPU cores and memory that this process may use: a container's limits, which the machine's own
counts do not show.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def num_cores(root: Path = ROOT) -> int:
    """CPU cores that this process may keep busy: those that it may run on, or fewer by a quota of a
    control group.

    A fraction of a core is rounded down, and one core is always left. ``root`` holds ``proc`` and
    ``sys``.
    """
    cores = len(os.sched_getaffinity(0))  # which heeds cpusets
    quota = min(_cpu_quotas(root), default=float(cores))
    return max(1, min(cores, int(quota)))


def memory_bytes(root: Path = ROOT) -> int | None:
    """Memory that this process may have: the machine's, or less by a limit of a control group;
    None: unknown.
    """
    return min([*_machine_bytes(root), *_memory_limits(root)], default=None)


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Cores that each control group above this process gives it; a group without a quota gives
    none.
    """
    for folder in _groups(root, "cpu"):
        line = _read(folder / "cpu.max").split()  # version 2: quota and period in microseconds
        line = line or [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        if len(line) == 2 and all(
            re.fullmatch(r"[1-9][0-9]*", word) for word in line
        ):  # else "max", or -1
            yield int(line[0]) / int(line[1])


def _memory_limits(root: Path) -> Iterator[int]:
    for folder in _groups(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.isdecimal():  # version 1 has a number near 2^63 for none
            yield int(limit)


def _machine_bytes(root: Path) -> Iterator[int]:
    for found in re.findall(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.M):
        yield int(found) * 1024


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, each with all above it that are to be
    seen here.
    """
    within = _own_groups(root)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        _, _, _, top, point, *_ = mount.split()
        kind, *_, options = filesystem.split()  # the source between them may be empty
        name = "" if kind == "cgroup2" else controller
        if (
            not (kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")))
            or name not in within
        ):
            continue
        group = PurePosixPath(within[name])
        # A container may see its own group as the top of the mount, and its name as the host has
        # it.
        below = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
        folder = root / point.lstrip("/")
        yield folder
        for part in below.parts:
            if part not in ("/", ".."):
                folder = folder / part
                yield folder


def _own_groups(root: Path) -> dict[str, str]:
    """Controller -> path of the group that this process is in; of version 2, which has one for all,
    under "".
    """
    groups: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    return groups


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # none here, or one of a controller that is off
        return ""
