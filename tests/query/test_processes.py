"""Query processes: forks of a template are as fresh ones, and nothing of either stays behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from afn_ray.errors import QueryError
from afn_ray.query import processes
from afn_ray.query.database import Run, open_run
from hosts import wait_until
from test_query import LAYERS, make_shard, write_run

pytestmark = pytest.mark.skipif(not processes.CAN_FORK, reason="this system has no templates")

QUESTION = "SELECT count(*), sum(strength_8), max(text) FROM tokens"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("store"))
    write_run(folder, [make_shard(1, 20)], LAYERS)
    return folder


@pytest.fixture
def templates(
    own_templates: None,
) -> dict[processes._Python, processes._Template]:
    """The templates of one test, which start at the first need."""
    need()
    return processes._templates


def need() -> None:
    """Have the need of a process, so that the next one is a fork."""
    processes._once.add(processes._Python.now())


def pid_of(run: Run) -> int:
    assert run.sql("SELECT 1").fetchall() == [(1,)]
    return process_of(run).pid


def process_of(run: Run) -> processes.Fresh | processes.Fork:
    child = run._backend.process._child
    assert child is not None
    return child._process


def only(templates: dict[processes._Python, processes._Template]) -> int:
    """The pid of the one template."""
    (template,) = templates.values()
    return template._process.pid


def state_of(pid: int) -> str:
    """The state of a process as in ps; empty once it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def wait_until_gone(*pids: int) -> None:
    wait_until(
        "these processes end",
        lambda: not any(map(state_of, pids)),
        said=lambda: str([(pid, state_of(pid)) for pid in pids]),
        every_s=0.01,
        within_s=10,  # a template that outlives its idle time ends after 60 s
    )


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def fds_of(pid: int) -> dict[int, str]:
    """Open descriptors of a process: number and kind."""
    found = {}
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found[int(handle.name)] = str(handle.readlink()).partition("[")[0]
    return found


@contextlib.contextmanager
def started() -> Iterator[processes.Fresh | processes.Fork]:
    """A query process without a session; it ends with the block."""
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(3)]
        for one in itertools.chain(*pairs):
            stack.enter_context(one)
        process = processes.start([there.fileno() for _, there in pairs])
        yield process
        process.kill()
        process.wait()
        process.close()


def surroundings(run: Run) -> dict[str, object]:
    """Environment, limits and files of a query process."""
    pid = pid_of(run)
    status = Path(f"/proc/{pid}/status").read_text()
    limits = Path(f"/proc/{pid}/limits").read_text()
    return {
        "environment": Path(f"/proc/{pid}/environ").read_bytes(),
        "folder": Path(f"/proc/{pid}/cwd").readlink(),
        "signals": re.findall(r"Sig(?:Blk|Ign|Cgt):.*", status),
        "limits": [line for line in limits.splitlines() if not re.search("cpu time|data", line)],
        "leads its session": os.getsid(pid) == pid,
        "standard streams": [fds_of(pid)[fd] for fd in range(3)],
        "descriptors": Counter(fds_of(pid).values()),
    }


def test_the_first_process_is_fresh_and_later_ones_are_forks_that_are_as_it_was(
    store: str, own_templates: None
) -> None:
    with open_run(store) as fresh:
        answer = fresh.sql(QUESTION).fetchall()
        expected = surroundings(fresh)
        assert isinstance(process_of(fresh), processes.Fresh) and not processes._templates
        with open_run(store) as first, open_run(store) as second:
            for run in (first, second):
                assert run.sql(QUESTION).fetchall() == answer
                assert isinstance(process_of(run), processes.Fork)
                assert surroundings(run) == expected
            template = only(processes._templates)
            asked = "SELECT random(), gen_random_uuid()"
            assert first.sql(asked).fetchall() != second.sql(asked).fetchall()
            assert children_of(template) == [str(pid_of(first)), str(pid_of(second))]
    assert children_of(template) == [] and processes._crashes == 0
    assert "Threads:\t1\n" in Path(f"/proc/{template}/status").read_text()
    expected_files = ["/dev/null"] * 3 + ["socket:"]
    wait_until(
        "the template closes what it had of its forks",
        lambda: list(fds_of(template).values()) == expected_files,
        said=lambda: str(fds_of(template)),
        within_s=5,
    )


def error_of(run: Run, end: str) -> str:
    """The error of a query whose process ends in the way that ``end`` names."""
    need()
    pid, child = pid_of(run), run._backend.process._child
    assert isinstance(process_of(run), processes.Fork) == processes.CAN_FORK
    assert child is not None
    result = run.sql("SELECT 2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "is_usable", lambda: True)
        if end == "error":
            child._sender.send_bytes(b"no pickle")
        else:
            os.kill(pid, signal.SIGKILL if end == "kill" else signal.SIGTERM)
        with pytest.raises(QueryError) as caught:
            result.fetchall()
    assert state_of(pid) == ""
    return str(caught.value)


def test_a_process_that_ends_gives_the_same_error_both_ways(
    store: str, templates: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []
    for can_fork in (True, False):
        monkeypatch.setattr(processes, "CAN_FORK", can_fork)
        with open_run(store) as run:
            said.append([error_of(run, end) for end in ("kill", "terminate", "error")])
    assert len(processes._templates) == 3  # none is used after a crash
    assert said[0] == said[1]
    for text, how in zip(said[0], ("SIGKILL", "SIGTERM", "exit code 1: .*Unpickling"), strict=True):
        assert re.search(rf"died of this query \({how}", text)


def test_a_template_that_was_killed_is_replaced_and_its_forks_go_on(
    store: str, templates: dict[processes._Python, processes._Template]
) -> None:
    with open_run(store) as run, open_run(store) as other:
        before, first = pid_of(run), only(templates)
        os.kill(first, signal.SIGKILL)
        assert pid_of(other) and only(templates) != first
        assert pid_of(run) == before
        result, child = run.sql("SELECT 2"), run._backend.process._child
        assert child is not None
        os.kill(before, signal.SIGKILL)
        wait_until_gone(first)
        assert child._process.wait(5) == processes.LOST
        assert "exit code unknown" in str(child._died())
        assert result.fetchall() == [(2,)]
    assert not processes._failed.total()


def fork_soon(
    fork: Callable[[Sequence[int]], processes.Fork | None], fds: Sequence[int]
) -> processes.Fork | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "FORK_S", 0.2)
        return fork(fds)


@pytest.mark.parametrize("end", ["killed", "too slow", "Ctrl-C"])
def test_a_template_may_end_or_stop_while_it_is_asked(
    templates: dict[processes._Python, processes._Template],
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    with started() as process:
        assert isinstance(process, processes.Fork)
    first, fds = only(templates), fds_of(os.getpid())
    os.kill(first, signal.SIGSTOP)
    if end == "Ctrl-C":
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            with started():
                pass
        os.kill(first, signal.SIGCONT)
    elif end == "killed":
        threading.Timer(0.2, os.kill, (first, signal.SIGKILL)).start()
    else:
        template = templates[processes._Python.now()]
        monkeypatch.setattr(template, "fork", partial(fork_soon, template.fork))
    with started() as process:
        assert isinstance(process, processes.Fork)
    assert (only(templates) == first) == (end == "Ctrl-C")
    assert fds_of(os.getpid()) == fds


def test_templates_that_never_fork_are_given_up(
    store: str, templates: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "import sys\nif sys.argv[2].endswith('template'): sys.exit(1)\n" + processes.CODE
    monkeypatch.setattr(processes, "CODE", broken)
    monkeypatch.setattr(processes, "MOST_FAILED", 2)
    for failed in (1, 2, 2):
        with open_run(store) as run:
            assert pid_of(run) and isinstance(process_of(run), processes.Fresh)
        assert list(processes._failed.values()) == [failed] and not processes._templates


def test_another_time_zone_gets_a_template_of_its_own(
    store: str,
    templates: dict[processes._Python, processes._Template],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for zone in ("Asia/Tokyo", "America/Lima"):
        monkeypatch.setenv("TZ", zone)
        need()
        with open_run(store) as run:
            asked = "SELECT current_setting('TimeZone')"
            assert run.sql(asked).fetchall() == [(zone,)]
            assert isinstance(process_of(run), processes.Fork)
    assert len(templates) == 2


def test_another_user_or_limit_gets_a_template_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = processes._Python.now()
    assert processes._Python.now() == before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        assert processes._Python.now() != before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert processes._Python.now() != before


def test_many_starts_leave_no_process_and_no_descriptor(
    templates: dict[processes._Python, processes._Template],
) -> None:
    def start(_: int) -> int:
        with started() as process:
            assert isinstance(process, processes.Fork) and process.poll() is None
        assert process.wait() == -signal.SIGKILL
        return process.pid

    start(0)
    template = only(templates)
    time.sleep(0.2)
    mine, its = fds_of(os.getpid()).items(), fds_of(template).items()
    with ThreadPoolExecutor(8) as pool:
        pids = list(pool.map(start, range(200)))
    assert len(set(pids)) == 200
    assert only(templates) == template and children_of(template) == []
    assert processes._crashes == 0

    # The template closes a descriptor after its report. What earlier tests have left may be closed
    # meanwhile.
    def more() -> set[tuple[int, str]]:
        return (fds_of(os.getpid()).items() - mine) | (fds_of(template).items() - its)

    wait_until("no descriptor is left", lambda: not more(), said=lambda: str(more()), within_s=5)


def test_after_a_crash_no_fork_has_the_same_layout(
    templates: dict[processes._Python, processes._Template],
) -> None:
    for _ in range(2):
        with started() as process:
            pass
    assert len(templates) == 1 and isinstance(process, processes.Fork)
    with started() as process:
        os.kill(process.pid, signal.SIGSEGV)
        assert process.wait(5) == -signal.SIGSEGV
    with started() as process:
        assert isinstance(process, processes.Fresh)
    with started() as process:
        assert isinstance(process, processes.Fork) and len(templates) == 2


def test_an_idle_template_ends_and_the_next_need_starts_another(
    templates: dict[processes._Python, processes._Template], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "IDLE_S", 0.2)
    with started():
        first = only(templates)
        time.sleep(0.5)
        assert state_of(first)  # it is in use
    wait_until_gone(first)
    with started() as process:
        assert isinstance(process, processes.Fork) and only(templates) != first


FAMILY = """
import os, sys, time
from afn_ray.query import processes
from afn_ray.query.database import open_run

def pid_of(run):
    run.sql("SELECT 1").fetchall()
    return run._backend.process._child._process.pid

first, second, third = (open_run(sys.argv[1]) for _ in range(3))
pids = [pid_of(run) for run in (first, second, third)]
(template,) = processes._templates.values()
if (fork := os.fork()) == 0:
    assert pid_of(second) not in pids  # a process of its own, of no template
    assert isinstance(second._backend.process._child._process, processes.Fresh)
    if sys.argv[2] == "ends":
        sys.exit()
    print("ready", flush=True)
    time.sleep(600)
if sys.argv[2] == "ends":
    assert os.waitpid(fork, 0) == (fork, 0)
    assert [pid_of(run) for run in (first, second, third)] == pids
    second.close()
    assert pid_of(open_run(sys.argv[1])) and list(processes._templates.values()) == [template]
print(*pids, template._process.pid, os.getpid(), fork, flush=True)
if sys.argv[2] == "killed":
    second.sql("SELECT sleep_ms(100000000)").fetchall()
"""


@pytest.mark.parametrize("end", ["ends", "killed"])
def test_nothing_outlives_the_parent_even_if_a_fork_of_it_does(store: str, end: str) -> None:
    command = [sys.executable, "-c", FAMILY, store, end]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        if end == "ends":
            out, said = parent.communicate(timeout=60)
            assert (parent.returncode, said) == (0, "")
            assert not any(map(state_of, map(int, out.split())))
            return
        lines = sorted(parent.stdout.readline() for _ in range(2))
        *pids, itself, fork = map(int, lines[0].split())
        assert lines[1] == "ready\n" and all(map(state_of, pids))
        parent.kill()
        try:
            parent.wait()
            wait_until_gone(*pids[1:], itself)
            assert state_of(fork) == "S"
        finally:
            os.kill(fork, signal.SIGKILL)
        wait_until_gone(pids[0])  # its parent's fork had copies of its sockets
