"""doctor: every failure is a row that says what to do, and nothing is left running."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, ModelError
from afn_ray.runs.cluster import access, connection, session
from afn_ray.show import doctor, ray_check
from afn_ray.show.diagnosis import Check, Diagnosis, render
from afn_ray.show.doctor import check
from hosts import wait_until

NAMES = ["Python", "packages", "torch", "Ray", "model", "scratch space", "store"]


def by_name(found: Diagnosis) -> dict[str, Check]:
    assert [c.name for c in found.checks] == NAMES
    assert all(c.advice for c in found.checks if c.ok is not True)
    return {c.name: c for c in found.checks}


def completed(code: int, out: str = "", err: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, out, err)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_check, "check", lambda address: Check("Ray", True, "not tried here"))


def running(mark: str) -> list[str]:
    """Command lines of the processes whose environment holds ``mark``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it ended, or is not ours
            continue
    return found


@pytest.mark.ray
def test_all_is_good_here_and_nothing_stays_running(
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``afn doctor`` whole, and its checks one by one."""
    found: list[Diagnosis] = []

    def check_and_keep(*words: Any) -> Diagnosis:
        found.append(check(*words))
        return found[0]

    monkeypatch.setattr(doctor, "check", check_and_keep)
    mark = uuid.uuid4().hex
    monkeypatch.setenv("AFN_TEST_MARK", mark)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with subprocess.Popen(["sleep", "60"]) as sleep:
        while running(mark) != ["sleep 60 "]:  # it can be seen, once it runs
            assert sleep.poll() is None
        sleep.kill()
    words = ["doctor", "--model", str(tiny_bert), "--store", str(tmp_path / "new" / "store")]
    with pytest.raises(SystemExit) as end:
        commands.main(words)
    assert not end.value.code and "ran a task of afn-ray" in capsys.readouterr().out
    checks = by_name(found[0])
    needed = [checks[name] for name in ("Python", "packages", "Ray", "model")]
    assert [c for c in needed if c.ok is not True] == []
    assert all(c.ok is not False for c in checks.values())  # a full disk or an unused GPU may warn
    assert "ran a task of afn-ray" in checks["Ray"].found
    assert "3 layers of 32, 64 tokens; passed its self-check at layer 2 on" in checks["model"].found
    assert (
        "is writable (it is new)" in checks["store"].found
        and list((tmp_path / "new" / "store").iterdir()) == []
    )
    for name in ("torch", "ray", "pyarrow", "duckdb"):
        assert f"{name} {importlib.metadata.version(name)}" in checks["packages"].found
    wait_until(
        "the kernel reaps what was started",
        lambda: running(mark) == [],
        said=lambda: str(running(mark)),
        within_s=10,
    )


def test_a_missing_model_and_an_unwritable_store(tmp_path: Path, without_ray: None) -> None:
    (tmp_path / "file").write_text("no folder")
    checks = by_name(check(str(tmp_path / "gone"), str(tmp_path / "file" / "store"), None))
    assert checks["model"].ok is False and "no model at" in checks["model"].found
    assert checks["store"].ok is False and "writing" in checks["store"].found
    assert {c.name for c in checks.values() if c.ok is False} == {"model", "store"}
    assert by_name(check(str(tmp_path), "/proc/store", None))["store"].ok is False
    with pytest.raises(SystemExit) as left:
        commands.main(["doctor", "--model", str(tmp_path / "gone")])
    assert left.value.code == 2


def test_what_was_not_asked_for_is_no_failure(
    without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise ConfigError("the demo needs a package")

    monkeypatch.setattr("afn_ray.runs.demo.model_folder", missing)
    checks = by_name(check(None, None, None))
    assert (checks["model"].ok, checks["store"].ok) == (None, None)
    assert (
        by_name(check(None, "memory://store", None))["store"].advice
        == "it works with --executor inline only"
    )


def test_a_model_that_fails_its_self_check(
    tiny_bert: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(task: Any) -> None:
        raise ModelError(
            "self-check failed: one padded batch against single texts differs by 3.00e-01"
        )

    monkeypatch.setattr("afn_ray.runs.measurer.Measurer", failing)
    found = by_name(check(str(tiny_bert), None, None))["model"]
    assert found.ok is False and "self-check failed" in found.found


def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        Requirement("pyarrow>=9999"),
        Requirement("no-such-package>=1.2"),
        Requirement("rich>=1"),
    ]
    monkeypatch.setattr(doctor, "_requirements", lambda: wanted)
    found = doctor._packages()
    assert found.ok is False
    assert found.found == (
        f"pyarrow is {importlib.metadata.version('pyarrow')}, expected >=9999; no-such-package is "
        "missing"
    )
    assert found.advice == "pip install 'pyarrow>=9999' 'no-such-package>=1.2'"


def test_the_bounds_come_from_the_package_s_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {r.name: {s.operator for s in r.specifier} for r in doctor._requirements()}
    assert bounds["torch"] == {">=", "<"} and ">=" in bounds["duckdb"]
    assert "pytest" not in bounds and "gguf" not in bounds  # extras
    monkeypatch.setattr(doctor, "PACKAGE", "no-such-package")
    assert doctor._requirements() == [] and doctor._python().ok is None


def test_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, ok in (("3.10.14", False), ("3.11.0", True), ("3.13.9", True), ("3.14.0", False)):
        monkeypatch.setattr(platform, "python_version", lambda v=version: v)
        assert doctor._python().ok is ok


def test_a_broken_installation_is_a_row_and_no_traceback(
    without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    torch = by_name(check(None, None, None))["torch"]
    assert torch.ok is False and "import of torch halted" in torch.found
    assert re.search("pip install --force-reinstall 'torch[^']*>=", torch.advice)


@pytest.mark.parametrize(("free", "ok"), [(1 << 20, False), (1 << 30, None), (1 << 40, True)])
def test_low_space_is_warned_of_and_too_little_fails(
    free: int, ok: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        def __init__(self, path: Path) -> None:
            assert path == tmp_path  # the disk of a folder that is not there yet is its parent's
            self.free = free

    monkeypatch.setattr(shutil, "disk_usage", Usage)
    found = doctor._space("store", tmp_path / "a" / "b", "use another")
    assert found.ok is ok and bool(found.advice) is (ok is not True)


def test_scratch_is_looked_at_where_a_run_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python passes over a TMPDIR that is full, and takes the next folder that is not; a run does
    not.
    """
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "mine"))
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/other")
    monkeypatch.setattr(session, "SOCKET_BYTES", 1000)
    found = doctor._scratch()
    assert found.ok is not False and f"free at {tmp_path / 'mine'}" in found.found
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
        found = doctor._scratch()
        assert found.ok is False and "set TMPDIR, or give --scratch" in found.advice
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    monkeypatch.setattr(session, "SOCKET_BYTES", 107)
    found = doctor._scratch()
    assert found.ok is False and "a socket's may have 107; set RAY_TMPDIR" in found.found
    assert f"free at {tmp_path / 'mine'}" in found.found and "longlong" in found.found


def test_free_space_that_is_not_known_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(path: Path) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(shutil, "disk_usage", unknown)
    assert doctor._space("store", tmp_path, "use another").ok is None


def test_what_a_stores_filesystem_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    assert "lacks" not in doctor._store(str(tmp_path)).found
    monkeypatch.setattr(os, "link", no_links)
    found = doctor._store(str(tmp_path))
    assert (
        found.ok is not False
        and "its filesystem lacks hard links (commits are claimed by" in found.found
    )


# --- Ray
# -------------------------------------------------------------------------------------------------


def test_an_open_cluster_is_refused_before_it_gets_our_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_check, "_probe", lambda address: pytest.fail("sent our token"))
    monkeypatch.setattr(access, "unreachable", lambda where: None)
    monkeypatch.setattr(access, "is_open", lambda where: True)
    found = ray_check.check("10.0.0.7:6379")
    assert (
        found.ok is False
        and "without a token" in found.found
        and "RAY_AUTH_MODE=token" in found.advice
    )
    client = ray_check.check("ray://127.0.0.1:10001")
    assert client.ok is False and "Ray Client" in client.found
    monkeypatch.setattr(ray_check, "_probe", lambda address: completed(0, "Ray ran a task"))
    for address in (
        "127.0.0.1:6379",
        "localhost:6379",
        "[::1]:6379",
        None,
    ):  # none of another machine's
        assert ray_check.check(address).ok is True


def test_a_token_in_clear_text_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_check, "_probe", lambda address: completed(0, "Ray ran a task"))
    monkeypatch.setattr(access, "unreachable", lambda where: None)
    monkeypatch.setattr(access, "is_open", lambda where: False)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    found = ray_check.check("10.0.0.7:6379")
    assert found.ok is None and "clear text" in found.found and "RAY_USE_TLS=1" in found.advice
    monkeypatch.setenv("RAY_USE_TLS", "1")
    assert ray_check.check("10.0.0.7:6379").ok is True


@pytest.mark.parametrize(
    ("error", "found", "advice"),
    [
        (
            "W gcs_client: Unauthenticated: RPC error\nthe cluster cannot be reached",
            "requires a token",
            "RAY_AUTH_TOKEN",
        ),
        (
            "noise\nthe cluster cannot be reached: Version mismatch",
            "Version mismatch",
            "this Ray and Python version",
        ),
        ("", "its process died", "this Ray and Python version"),
    ],
)
def test_a_cluster_that_does_not_take_our_task(
    error: str, found: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_check, "_probe", lambda address: completed(1, "", error))
    monkeypatch.setattr(access, "unreachable", lambda where: None)
    monkeypatch.setattr(access, "is_open", lambda where: False)
    got = ray_check.check("cluster.example:6379")
    assert got.ok is False and found in got.found and advice in got.advice


def test_an_address_where_nobody_answers_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ray_check, "_probe", lambda *_, **__: pytest.fail("asked Ray, which takes a minute")
    )
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        found = ray_check.check(f"127.0.0.1:{held.getsockname()[1]}")
    assert found.ok is False and "nothing answers at 127.0.0.1" in found.found
    found = ray_check.check("127.0.0.1:no-port")
    assert found.ok is False and "no address of a Ray cluster" in found.found


def test_the_address_of_the_environment_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str | None] = []

    def ray(address: str | None) -> Check:
        tried.append(address)
        return Check("Ray", True, "")

    monkeypatch.setattr(ray_check, "check", ray)
    monkeypatch.setattr(doctor, "_model", lambda name: Check("model", True, ""))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    check(None, None, None)
    check(None, None, "10.0.0.8:6379")
    for ours in ("local", ""):  # Ray takes an empty one for none
        monkeypatch.setenv("RAY_ADDRESS", ours)
        check(None, None, None)
        assert connection.address(RunConfig(corpus=("c",), model="m", store="s")) is None
    assert tried == ["10.0.0.7:6379", "10.0.0.8:6379", None, None]


def test_the_probe_s_process_says_what_is_wrong_in_its_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(address: str | None) -> str:
        raise ConfigError(f"the cluster at {address} cannot be reached:\nno route")

    monkeypatch.setattr(connection, "probe", failing)
    with pytest.raises(SystemExit, match=r"^the cluster at x:1 cannot be reached: no route$"):
        ray_check.probe("x:1")
    monkeypatch.setattr(connection, "probe", lambda address: [f"fine: {address}", "few CPUs"])
    ray_check.probe()
    assert capsys.readouterr().out == "fine: None\nfew CPUs\n"


# --- rendering
# -------------------------------------------------------------------------------------------


def test_marks_are_words_and_findings_are_literal() -> None:
    checks = (
        Check("Python", True, "3.11"),
        Check("model", None, "not [bold]tried[/bold]", "name one"),
        Check("store", False, "\x1b[31mno", "make room"),
    )
    console = Console(file=io.StringIO(), width=80)
    render(Diagnosis(checks), console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [
        line.split()[:2] for line in lines if line.startswith(("  ok", "  warning", "  FAILED"))
    ] == [
        ["ok", "Python"],
        ["warning", "model"],
        ["FAILED", "store"],
    ]
    output = "\n".join(lines)
    assert (
        "not [bold]tried[/bold]" in output and "-> name one" in output and "-> make room" in output
    )
    assert r"\x1b[31mno" in output and "\x1b" not in output
    assert "3 checks: 1 failed, 1 warnings" in output
