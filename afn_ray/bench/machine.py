"""Facts about the machine: its name, the memory of processes, and other processes' CPU use."""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TypedDict

from rich.console import Console

from afn_ray import cgroup
from afn_ray.provenance import cpu_name

SAMPLE_S = 0.5
"""Interval between two samples of a ``Watch``, in seconds."""
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
"""Unit of CPU times in ``/proc``, in seconds."""


class MachineFacts(TypedDict):
    """The machine, its cores and the package versions that produced the figures."""

    machine: str
    cores: int
    python: str
    versions: dict[str, str]


def facts(device: str) -> MachineFacts:
    import torch

    packages = ("afn-ray", "torch", "transformers", "ray")
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cores": cgroup.num_cores(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def print_facts(result: MachineFacts, console: Console) -> None:
    """Print ``facts`` in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    console.print(
        f"{result['machine']}, {result['cores']} cores; Python {result['python']}, {versions}",
        markup=False,
    )


def family(pids: Iterable[int]) -> list[int]:
    """``pids`` and all their descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        pid = int(entry.parent.name)
        fields = _stat(pid)
        if fields:
            parent = int(fields[1])
            children.setdefault(parent, []).append(pid)
    found = list(pids)
    for at in found:
        found += children.get(at, [])
    return found


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/<pid>/stat`` after the name; empty when the process has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def memory_bytes(pid: int) -> int:
    """Proportional set size (PSS) of one process, in bytes; 0 when it has ended.

    A page that n processes share counts 1/n.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process ended
        return 0
    for line in lines:
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def own_memory_bytes(name: str) -> int:
    """``VmRSS`` (resident memory) or ``VmHWM`` (its peak) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(rf"^{name}:\s+(\d+) kB", status, re.M)
    return int(kilobytes) * 1024


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time of ``pids`` and all their descendants that still run, in seconds."""
    return sum(_cpu_s(pid) for pid in family(pids))


def _cpu_s(pid: int) -> float:
    """CPU time of one process, in seconds; 0 when it has ended."""
    fields = _stat(pid)
    if not fields:
        return 0.0
    user = int(fields[11])
    system = int(fields[12])
    return (user + system) * _TICK_S


def _busy_s(cores: set[int]) -> float:
    """Seconds that ``cores`` have worked since the machine started, for all processes."""
    names = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks * _TICK_S


class Watch:
    """Samples processes and their descendants while a block runs.

    ``peak_bytes``: highest sum of their proportional set sizes, in bytes. ``foreign``: share of the
    cores' time that other processes used.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self.peak_bytes = 0
        self.foreign = 0.0
        self._pids = list(pids)
        self._cores = os.sched_getaffinity(0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._cpu_s: dict[int, float] = {}

    def __enter__(self) -> Watch:
        self._before = {pid: _cpu_s(pid) for pid in self._family()}
        self._began = time.monotonic()
        self._busy = _busy_s(self._cores)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        seconds = time.monotonic() - self._began
        busy = _busy_s(self._cores) - self._busy
        self._ended.set()
        self._thread.join()
        own = sum(after - self._before.get(pid, 0.0) for pid, after in self._cpu_s.items())
        self.foreign = max(0.0, busy - own) / (seconds * len(self._cores))

    def _family(self) -> list[int]:
        return [*family(self._pids), os.getpid()]  # the sampling is not foreign

    def _watch(self) -> None:
        while True:
            ended = self._ended.wait(SAMPLE_S)
            num_bytes = 0
            for pid in self._family():
                self._cpu_s[pid] = max(self._cpu_s.get(pid, 0.0), _cpu_s(pid))
                if pid != os.getpid():
                    num_bytes += memory_bytes(pid)
            self.peak_bytes = max(self.peak_bytes, num_bytes)
            if ended:
                return
