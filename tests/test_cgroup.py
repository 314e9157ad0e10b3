"""cgroup: the cores and the memory that a container gives are counted, wherever its limits
stand.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afn_ray import cgroup, model
from afn_ray.config import RunConfig
from afn_ray.query import sandbox
from afn_ray.runs.cluster import connection

V2 = "30 23 0:26 {top} {point} rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"


def limited_to(limited: int, num_bytes: int) -> Callable[[int], tuple[int, int]]:
    """``resource.getrlimit`` of a process with one limit."""
    none = resource.RLIM_INFINITY
    return lambda kind: (num_bytes if kind == limited else none, none)


V1 = "33 31 0:30 {top} {point} rw - cgroup cgroup rw,{controllers}\n"


def tree(root: Path, files: dict[str, str], mounts: str, groups: str) -> Path:
    """A machine's ``proc`` and ``sys`` below ``root``."""
    meminfo = "MemTotal:       67108864 kB\nMemFree: 1 kB\n"
    own = {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, "proc/meminfo": meminfo}
    for name, text in (own | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def sixty_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 64), ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1),
     ("6400000 50000", 64),
     ("250000 50000", 5), ("", 64), ("-1 100000", 64), ("200000 0", 64), ("nonsense", 64)],
)  # fmt: skip
def test_the_quota_of_a_container_is_counted_in_whole_cores(
    tmp_path: Path, quota: str, cores: int
) -> None:
    files = {"sys/fs/cgroup/cpu.max": quota + "\n"}
    without_source = "22 1 0:5 / /run rw - tmpfs  rw\n"
    mounts = without_source + V2.format(top="/", point="/sys/fs/cgroup")
    root = tree(tmp_path, files, mounts, "0::/\n")
    assert cgroup.num_cores(root) == cores


def test_the_least_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/"
    files = {
        base + "kubepods/cpu.max": "400000 100000",
        base + "kubepods/pod/cpu.max": "300000 100000",
        base + "kubepods/pod/box/cpu.max": "max 100000",
        base + "kubepods/other/cpu.max": "100000 100000",
        base + "kubepods/pod/memory.max": str(2 << 30),
        base + "kubepods/memory.max": "max",
    }
    root = tree(
        tmp_path, files, V2.format(top="/", point="/sys/fs/cgroup"), "0::/kubepods/pod/box\n"
    )
    assert (cgroup.num_cores(root), cgroup.memory_bytes(root)) == (3, 2 << 30)


def test_quotas_of_version_1_count_in_either_view_of_a_container(tmp_path: Path) -> None:
    """Paths as the host sees them, as a container does whose mount begins at its own group, and as
    one of a namespace.
    """
    for at, (top, group, below) in enumerate(
        (
            ("/", "/docker/abc", "docker/abc/"),
            ("/docker/abc", "/docker/abc", ""),
            ("/docker/abc", "/", ""),
        )
    ):
        folder = f"sys/fs/cgroup/cpu,cpuacct/{below}"
        memory = f"sys/fs/cgroup/memory/{below}memory.limit_in_bytes"
        files = {
            folder + "cpu.cfs_quota_us": "350000\n",
            folder + "cpu.cfs_period_us": "100000\n",
            memory: "1073741824",
        }
        mounts = V1.format(top=top, point="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct")
        mounts += V1.format(top=top, point="/sys/fs/cgroup/memory", controllers="memory")
        root = tree(
            tmp_path / str(at), files, mounts, f"4:cpu,cpuacct:{group}\n3:memory:{group}\n0::/\n"
        )
        assert (cgroup.num_cores(root), cgroup.memory_bytes(root)) == (3, 1 << 30), top


def test_no_limit_leaves_the_machines_own_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    mounts = V1.format(top="/", point="/sys/fs/cgroup/cpu", controllers="cpu")
    mounts += V1.format(top="/", point="/sys/fs/cgroup/memory", controllers="memory")
    root = tree(tmp_path, files, mounts, "2:memory:/\n1:cpu:/\n")
    assert (cgroup.num_cores(root), cgroup.memory_bytes(root)) == (64, 64 << 30)
    assert (cgroup.num_cores(tmp_path / "none"), cgroup.memory_bytes(tmp_path / "none")) == (
        64,
        None,
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})  # a cpuset, or taskset
    assert cgroup.num_cores(root) == 2
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):  # ulimit -v, ulimit -d
        with monkeypatch.context() as patch:
            patch.setattr(resource, "getrlimit", limited_to(kind, 3 << 30))
            assert cgroup.memory_bytes(root) == 3 << 30


def test_workers_tokenizers_and_a_local_ray_get_what_the_quota_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"sys/fs/cgroup/cpu.max": "400000 100000"}
    root = tree(tmp_path, files, V2.format(top="/", point="/sys/fs/cgroup"), "0::/\n")
    count = cgroup.num_cores
    monkeypatch.setattr(cgroup, "num_cores", lambda: count(root))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def asked(**values: Any) -> RunConfig:
        return RunConfig(corpus=("c",), model="m", store="s", **values)

    from afn_ray.runs import cluster

    assert model.count_devices("cpu") == 4
    assert cluster.place_workers(asked(), "cpu").num_workers == 4
    assert cluster.place_workers(asked(tokenizer_workers=1), "cpu").num_workers == 2
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda **_: 64)
    assert connection._local_cpus(asked()) == 4  # Ray does not see the quota of a group above
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda **_: 3)
    assert connection._local_cpus(asked()) == 3  # nor is a lower count of its own overridden
    assert connection._local_cpus(asked(workers=5)) == 5


def test_ray_still_counts_by_the_function_that_is_asked() -> None:
    from ray._private.utils import get_num_cpus

    assert get_num_cpus(override_docker_cpu_warning=True) >= 1


def test_a_share_of_the_memory_is_of_what_the_container_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cgroup, "memory_bytes", lambda: 1 << 30)
    assert sandbox.memory_bytes("50%") == 1 << 29
