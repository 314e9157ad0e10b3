"""A real head of Ray, with a token and without: who is let in, and who is refused."""

from __future__ import annotations

import errno
import http.client
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, Interrupted
from afn_ray.runs import address
from afn_ray.runs.cluster import access, connection, session
from afn_ray.show import ray_check
from conftest import write_jsonl
from hosts import wait_until

pytestmark = pytest.mark.ray
TOKEN = secrets.token_hex(32)
DASHBOARDS: dict[str, int] = {}
"""Port of the dashboard of each head."""


def other_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        return str(probe.getsockname()[0])


def without_ray(**more: str) -> dict[str, str]:
    """The environment without what it says of Ray."""
    return (
        {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        | {"RAY_USAGE_STATS_ENABLED": "0"}
        | more
    )


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("", 0))
        return int(held.getsockname()[1])


@contextmanager
def head(folder: Path, **environment: str) -> Iterator[str]:
    """Address of a head, started as ``ray start`` does, on all addresses of this machine."""
    port, dashboard = free_port(), free_port()
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=1",
        f"--node-ip-address={other_address()}",
        "--object-store-memory=80000000",
        f"--temp-dir={folder}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}",
        "--no-monitor",
        "--include-log-monitor=false",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=without_ray(**environment), stdout=output, stderr=output
        )
    try:
        wait_until(
            "Ray is up", lambda: "Ray runtime started" in log.read_text(), process, log.read_text
        )
        where = f"{other_address()}:{port}"
        DASHBOARDS[where] = dashboard
        yield where
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A folder for Ray's sockets, whose names may have 107 characters: pytest's own is too long for
    some pids.
    """
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def open_head(short: Path) -> Iterator[str]:
    with head(short / "o", RAY_AUTH_MODE="disabled") as where:
        yield where


@pytest.fixture(scope="module")
def token_head(short: Path) -> Iterator[str]:
    with head(short / "t", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as where:
        yield where


@pytest.mark.usefixtures("no_ray")
def test_an_open_cluster_is_refused_and_joined_only_by_a_flag_that_says_so(
    open_head: str,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "In the beginning"}])
    found = ray_check.check(open_head)
    assert (
        found.ok is False
        and "without a token" in found.found
        and "RAY_AUTH_MODE=token" in found.advice
    )
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("joined it"))
    words = [
        "run",
        str(corpus),
        "--model",
        str(tiny_bert),
        "--store",
        str(tmp_path / "store"),
        "--executor",
        "ray",
    ]
    with pytest.raises(SystemExit) as left:
        commands.main([*words, "--address", open_head])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert (
        f"the cluster at {open_head} asks for no token: anyone who reaches it can run code there"
        in said
    )
    assert "RAY_AUTH_MODE=token" in said and "--allow-open-cluster" in said
    access.check(open_head, allow_open=True)
    assert caplog.messages[-1].startswith(
        f"the cluster at {open_head} asks for no token: anyone who reaches it can run"
    )


def refuse(**_: object) -> None:
    """Error of ``ray.init`` after half a minute and many lines."""
    raise ConnectionError("Failed to connect to the cluster")


@pytest.mark.usefixtures("no_ray")
def test_a_cluster_with_a_token_takes_it_and_no_other(
    token_head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    found = ray_check.check(token_head)
    assert (
        found.ok is None and "ran a task of afn-ray" in found.found and "clear text" in found.found
    )
    assert not access.refuses_us(token_head)
    for token in ("f" * 64, None):
        if token is None:
            monkeypatch.delenv("RAY_AUTH_TOKEN")
            monkeypatch.setenv("HOME", "/nonexistent")  # where another may lie
        else:
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        monkeypatch.setattr("ray.init", refuse)
        config = RunConfig(corpus=("c",), model="m", store="s", address=token_head)
        with (
            pytest.raises(ConfigError, match="requires a token that this process does not have"),
            connection.joined(config),
        ):
            pytest.fail("joined it")


@pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_cors") is None, reason="the dashboard comes with ray[default]"
)
def test_the_dashboard_answers_401_without_the_token_and_403_with_another(token_head: str) -> None:
    statuses = []
    for header in (
        {},
        {"Authorization": "Bearer " + "f" * 64},
        {"Authorization": f"Bearer {TOKEN}"},
    ):
        connection = http.client.HTTPConnection("127.0.0.1", DASHBOARDS[token_head], timeout=30)
        body = json.dumps({"entrypoint": "true"}) if "Authorization" not in header else None
        connection.request("POST" if body else "GET", "/api/jobs/", body, header)
        statuses.append(connection.getresponse().status)
        connection.close()
    assert statuses == [401, 403, 200]


def test_what_is_no_address_of_a_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"Ray Client, which afn-ray does not use: give host:6379"
    ):
        access.check("ray://127.0.0.1:10001", allow_open=True)
    for host in (other_address(), "127.0.0.1"):
        with pytest.raises(ConfigError, match=rf"nothing answers at {host}:1: .*check the address"):
            access.check(f"{host}:1", allow_open=True)
    monkeypatch.setattr(access, "ASK_S", 0.01)
    with socket.create_server((other_address(), 0)) as mute:
        where = "{}:{}".format(*mute.getsockname())
        with pytest.raises(ConfigError, match=rf"{where} does not answer within 0.01 s"):
            access.check(where, allow_open=True)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("http://head:8265", r"ray job submit --address http://head:8265 -- afn run \.\.\."),
        ("https://me:secret@head/ray", r"ray job submit --address https://head/ray"),
        ("ray://head:10001", "Ray Client"),
        ("ssh://head:22", "expected host:6379"),
        ("head", "it has no port; expected host:6379"),
        ("head:port", "expected host:6379"),
        ("head:99999", "expected host:6379"),
        ("head:6379/ray", "expected host:6379"),
        ("head :6379", "expected host:6379"),
        (":6379", "expected host:6379"),
    ],
)
@pytest.mark.usefixtures("no_ray")
def test_what_has_not_the_form_of_an_address_says_what_to_do(
    where: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        address.check(where)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("RAY_ADDRESS", where)
    with (
        pytest.raises(ConfigError, match=said),
        connection.joined(RunConfig(corpus=("c",), model="m", store="/s")),
    ):
        pytest.fail("joined")
    found = ray_check.check(where)
    assert found.ok is False and found.advice


@pytest.mark.parametrize("where", ["auto", "head:6379", "10.0.0.7:6379", "[::1]:6379"])
def test_addresses_of_heads_pass(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address.check(where)
    monkeypatch.setenv("RAY_ADDRESS", f" {where}\n")  # of a Secret made of a file
    assert address.of_cluster(None) == where
    assert address.of_cluster("local") is None


@pytest.mark.usefixtures("no_ray")
def test_a_full_or_too_long_folder_of_rays_is_named_and_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def joined() -> None:
        with connection.joined(RunConfig(corpus=("c",), model="m", store="/s", address="local")):
            pytest.fail("joined")

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(
        Interrupted, match=r"sockets in .*longlong.*may have 107; set RAY_TMPDIR to a folder"
    ) as caught:
        joined()
    assert caught.value.exit_code == 75
    monkeypatch.setenv("RAY_TMPDIR", tempfile.mkdtemp(prefix="afn-", dir="/tmp"))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
        with pytest.raises(
            Interrupted,
            match=r"no space left for a local Ray in .*1.0 MiB free, expected 16.*resumes",
        ):
            joined()
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        patch.setattr(Path, "touch", _full)
        with pytest.raises(Interrupted, match="no space left for a local Ray"):
            joined()
    session.check()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/afn")
    with pytest.raises(
        ConfigError, match=r"cannot write its folder /proc/afn/ray: .*set RAY_TMPDIR"
    ):
        joined()


def _full(*_: object) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_a_ray_of_our_own_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    access.check(None, allow_open=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(
        ConfigError, match="RAY_AUTH_MODE=disabled starts a Ray that asks for no token"
    ):
        access.check(None, allow_open=False)
    access.check(None, allow_open=True)
