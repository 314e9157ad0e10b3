"""A real Ray, with a token and without: who is let in, who is refused, and what listens where."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from afn_ray import doctor
from afn_ray.cluster import access
from afn_ray.errors import ConfigError

pytestmark = pytest.mark.ray
TOKEN = secrets.token_hex(32)


def other_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        return str(probe.getsockname()[0])


def without_ray(**more: str) -> dict[str, str]:
    """The environment without what it says of Ray."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_USAGE_STATS_ENABLED": "0"} | more


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("", 0))
        return int(held.getsockname()[1])


@contextmanager
def head(folder: Path, **environment: str) -> Iterator[str]:
    """Address of a head, started as ``ray start`` does, on all addresses of this machine."""
    port = free_port()
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
        f"--node-ip-address={other_address()}", "--object-store-memory=80000000", f"--temp-dir={folder}",
        f"--dashboard-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}", "--no-monitor",
        "--include-log-monitor=false", "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, env=without_ray(**environment), stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"{other_address()}:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for Ray's sockets, whose names may have 107 characters."""
    return tmp_path_factory.mktemp("r")


@pytest.fixture(scope="module")
def open_head(short: Path) -> Iterator[str]:
    with head(short / "o", RAY_AUTH_MODE="disabled") as where:
        yield where


@pytest.fixture(scope="module")
def token_head(short: Path) -> Iterator[str]:
    with head(short / "t", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as where:
        yield where


def afn(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "afn_ray", *arguments], env=without_ray(**environment), capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, tiny_bert: Path) -> list[str]:
    """A small run, by its command."""
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "In the beginning was the Word."}])
    return ["run", str(corpus), "--model", str(tiny_bert), "--store", str(tmp_path / "store"), "--layers", "0",
            "--executor", "ray", "--workers", "1", "--quiet"]  # fmt: skip


def test_an_open_cluster_is_refused_and_joined_only_by_a_flag_that_says_so(
    open_head: str, run: list[str], tmp_path: Path
) -> None:
    refused = afn(*run, "--address", open_head, RAY_AUTH_TOKEN=TOKEN)
    assert refused.returncode == 2, refused.stderr
    assert "asks for no token: whoever reaches it can run code there" in refused.stderr
    assert "RAY_AUTH_MODE=token" in refused.stderr and "--allow-open-cluster" in refused.stderr
    assert not list((tmp_path / "store").rglob("*.parquet"))
    found = doctor._ray(open_head)
    assert found.ok is False and "without a token" in found.found and "RAY_AUTH_MODE=token" in found.advice
    joined = afn(*run, "--allow-open-cluster", RAY_ADDRESS=open_head, RAY_AUTH_MODE="disabled")
    assert joined.returncode == 0, joined.stderr
    assert "asks for no token" in joined.stderr


def test_a_cluster_with_a_token_takes_it_and_no_other(token_head: str, run: list[str]) -> None:
    joined = afn(*run, RAY_ADDRESS=token_head, RAY_AUTH_TOKEN=TOKEN)
    assert joined.returncode == 0, joined.stderr
    stranger = afn(*run, "--address", token_head, RAY_AUTH_TOKEN="f" * 64)
    assert stranger.returncode == 2 and "Authentication token is missing or incorrect" in stranger.stderr
    assert TOKEN not in joined.stderr + stranger.stderr and "f" * 64 not in stranger.stderr


def test_what_is_no_address_of_a_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"Ray Client, which afn-ray does not use: give host:6379"):
        access.check("ray://127.0.0.1:10001", allow_open=True)
    with pytest.raises(ConfigError, match=rf"nothing answers at {other_address()}:1: .*check the address"):
        access.check(f"{other_address()}:1", allow_open=True)
    monkeypatch.setattr(access, "ASK_S", 0.01)
    with socket.create_server((other_address(), 0)) as mute:
        where = "{}:{}".format(*mute.getsockname())
        with pytest.raises(ConfigError, match=rf"{where} does not answer within 0.01 s"):
            access.check(where, allow_open=True)


def test_a_ray_of_our_own_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    access.check(None, allow_open=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=disabled starts a Ray that asks for no token"):
        access.check(None, allow_open=False)
    access.check(None, allow_open=True)


def listening(pids: set[str]) -> set[str]:
    """Addresses at which ``pids`` listen, of IPv4 and IPv6."""
    sockets = set()
    for pid in pids:
        for handle in Path("/proc", pid, "fd").iterdir():
            sockets.update(re.findall(r"socket:\[(\d+)\]", str(handle.readlink())))
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path("/proc/net", table).read_text().splitlines()[1:]:
            columns = row.split()
            if columns[3] == "0A" and columns[9] in sockets:
                words = bytes.fromhex(columns[1].partition(":")[0])
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(socket.inet_ntop(socket.AF_INET6 if len(address) == 16 else socket.AF_INET, address))
    return found


LOCAL = """
import json, os, sys
if sys.argv[1] == "ray first":
    import ray
from afn_ray.cluster import connection
from afn_ray.config import RunConfig
with connection.joined(RunConfig(corpus=("-",), model="-", store="/", executor="ray", workers=1)):
    import ray
    ray.get(ray.remote(lambda: None).remote())
    print("ready", ray._private.worker._global_node.get_session_dir_path(), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("order", ["afn first", "ray first"])
def test_a_ray_of_our_own_listens_on_loopback_alone_and_writes_no_token(order: str, tmp_path: Path) -> None:
    pipe: Any = subprocess.PIPE
    ours = subprocess.Popen(
        [sys.executable, "-c", LOCAL, order], env=without_ray(HOME=str(tmp_path)), stdin=pipe, stdout=pipe, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert ours.stdout is not None
        ready, _, session = ours.stdout.readline().strip().partition(" ")
        assert ready == "ready"
        pids = {str(ours.pid)}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if session in (process / "cmdline").read_text() or session in (process / "environ").read_text():
                    pids.add(process.name)
            except (OSError, UnicodeDecodeError):
                continue
        assert len(pids) >= 3  # this one, gcs_server, raylet
        found = listening(pids)
        assert found and found <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert not list(tmp_path.rglob("auth_token"))
    finally:
        ours.communicate("over\n", timeout=60)
    assert ours.returncode == 0
