"""CPU cores and memory that this process may use.

A container limits both through control groups, and a shell limits memory with ``ulimit``. The
machine's own counts do not show these limits.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def num_cores(root: Path = ROOT) -> int:
    """CPU cores that this process may keep busy.

    These are the cores that it may run on, or fewer where a control group has a quota. A fraction
    of a core is rounded down, but the result is at least 1. ``root`` holds ``proc`` and ``sys``.
    """
    cores = len(os.sched_getaffinity(0))  # respects cpusets
    quota = min(_cpu_quotas(root), default=float(cores))
    return max(1, min(cores, int(quota)))


def memory_bytes(root: Path = ROOT) -> int | None:
    """Memory that this process may use, in bytes; None: unknown.

    This is the machine's memory, or less where a control group or this process has a limit.
    ``root`` holds ``proc`` and ``sys``.
    """
    limits = [*_machine_bytes(root), *_memory_limits(root), *_process_limits()]
    return min(limits, default=None)


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Yield the quota of each control group of this process, in cores; skip groups without one."""
    for folder in _groups(root, "cpu"):
        line = _read(folder / "cpu.max").split()  # version 2: quota and period in microseconds
        line = line or [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        # A group without a quota has "max" or -1.
        if len(line) == 2 and all(re.fullmatch(r"[1-9][0-9]*", word) for word in line):
            yield int(line[0]) / int(line[1])


def _memory_limits(root: Path) -> Iterator[int]:
    """Yield the memory limit of each control group of this process, in bytes."""
    for folder in _groups(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.isdecimal():  # version 1 writes "no limit" as a number near 2^63
            yield int(limit)


def _process_limits() -> Iterator[int]:
    """Yield the limits of this process's own data and of its address space, in bytes."""
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit


def _machine_bytes(root: Path) -> Iterator[int]:
    """Yield the machine's memory in bytes, where ``/proc/meminfo`` states it."""
    for found in re.findall(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.M):
        yield int(found) * 1024


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, each from the visible top down."""
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
        # In a container the top of the mount may be its own group, with its name on the host.
        below = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
        folder = root / point.lstrip("/")
        yield folder
        for part in below.parts:
            if part not in ("/", ".."):
                folder = folder / part
                yield folder


def _own_groups(root: Path) -> dict[str, str]:
    """Control group of this process by controller, as a path.

    Version 2 has one group for all controllers; its key is "".
    """
    groups: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    return groups


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # no such file, or its controller is off
        return ""
