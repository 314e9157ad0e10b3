"""Forks in the place of Ray's workers: they end as raylet's children do."""

from __future__ import annotations

import os
import select
import subprocess
import time
from pathlib import Path

import pytest

import warm_workers
from hosts import wait_until

SETUP = """
import os, sys
print(os.getpid(), os.getpgrp(), os.environ["ASKED"], os.getcwd(), sys.argv[1:], flush=True)
"torch" in sys.modules or sys.exit(1)
{}
"""


def started(folder: Path, then: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A worker's start with a script of our own in the place of Ray's, and its first line."""
    (folder / "setup_worker.py").write_text(SETUP.format(then))
    process = subprocess.Popen(
        [warm_workers.choose(has_faults=False), str(folder / "setup_worker.py"), "--asked"],
        env=os.environ | {"ASKED": "yes"},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()


ENDING = """
import atexit, threading, time
def linger():
    time.sleep(0.2)
    print("thread")
atexit.register(print, "at the end")
threading.Thread(target=linger).start()
sys.exit(7)
"""


def test_a_fork_has_what_was_asked_for_and_its_end_is_raylets_childs(tmp_path: Path) -> None:
    process, (pid, group, *said) = started(tmp_path, ENDING)
    with process:
        last, _ = process.communicate(timeout=60)
        assert (process.returncode, last) == (7, "thread\nat the end\n")
    assert said == ["yes", str(tmp_path), "['--asked']"]
    assert pid == group != str(process.pid)


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_fork_dies_with_raylets_child(tmp_path: Path, end: str) -> None:
    process, (pid, *_) = started(tmp_path, "while True: pass")
    assert Path("/proc", pid).exists()
    with process:
        getattr(process, end)()
    wait_until("the fork is dead", lambda: not Path("/proc", pid).exists())


@pytest.mark.parametrize("after_s", [0, 0.3])
def test_a_template_outlives_one_that_dies_before_it_has_read_the_pid_of_its_fork(
    tmp_path: Path, after_s: float
) -> None:
    """The unread pid makes the closed connection an error for the fork or the template."""
    script = tmp_path / "script.py"
    script.write_text("while True: pass")
    with Path(os.devnull).open("r+") as nothing:
        address, files = warm_workers.address(has_faults=False), [nothing.fileno()] * 3
        fork = warm_workers.ask(address, [str(script)], os.environ, files)
        assert select.select([fork], [], [], 60)[0]
        time.sleep(after_s)  # at once, or where the fork runs
        fork.close()
    process, _ = started(tmp_path, "sys.exit(7)")
    with process:
        assert process.wait(60) == 7
