"""Many machines on one host: a Ray of several nodes in a process of its own, and hosts that are
network namespaces.

The process that runs the tests never joins these Rays; it starts ``afn run`` against them. Started
as a program, this file is the process that owns the nodes of one ``Nodes``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm_workers import FAULTS, PYTHON_PATH, choose

ATOMIC_S3 = Path(__file__).parents[1] / "atomic_s3.py"
"""Server of S3."""
OBJECT_STORE_BYTES = 80 << 20
"""Object store of each node, near the least that Ray takes: only shards and commits travel through
it.
"""
PATIENCE_S = 300.0
"""Longest wait for what a process of a test does: a busy machine may take minutes to start one."""
NODES = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that is silent is declared dead after about 6 s instead of about 40."""
PREEMPTION = 2  # Ray's DrainNodeReason

Event = dict[str, Any]


def wait_until(
    what: str,
    condition: Callable[[], Any],
    process: subprocess.Popen[Any] | None = None,
    said: Callable[[], str] = str,
    every_s: float = 0.05,
    within_s: float = PATIENCE_S,
) -> Any:
    """The first true value of ``condition``.

    Raises ``TimeoutError`` that says ``what`` did not happen, and what was ``said``; where
    ``process`` ends before, at once.
    """
    deadline = time.monotonic() + within_s
    while True:
        has_ended = process is not None and process.poll() is not None
        if value := condition():
            return value
        if has_ended or time.monotonic() > deadline:
            when = "before its process ended" if has_ended else f"in {within_s:g} s"
            raise TimeoutError(f"not {when}: {what}\n{said()}")
        time.sleep(every_s)


@contextlib.contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """``process``, which is killed at the end, also of a test that fails."""
    with process:
        try:
            yield process
        finally:
            process.kill()


@dataclass(frozen=True, slots=True)
class Chaos:
    """The schedule of faults of all processes that have ``environment``, and the log of what they
    did.
    """

    file: Path
    log: Path

    @classmethod
    def of(cls, folder: Path) -> Chaos:
        chaos = cls(folder / "chaos.json", folder / "chaos.log")
        chaos.plan()
        return chaos

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a process that shall load the plugin, and of all that it starts."""
        inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        return inherited | {FAULTS: str(self.file), "PYTHONPATH": PYTHON_PATH}

    def plan(self, *faults: dict[str, Any], slow_s: float = 0.0) -> None:
        """Start these faults, none of them hit yet, and an empty log."""
        for old in self.log.parent.glob(f"{self.log.name}*"):
            old.unlink()
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"log": str(self.log), "slow_s": slow_s, "faults": faults}))
        new.replace(self.file)

    def events(self, point: str, **fields: Any) -> list[Event]:
        """Entries of the log for ``point``, in order; ``fields`` choose by value."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        events: list[Event] = [json.loads(line) for line in lines]
        wanted = {"point": point, **fields}
        return [event for event in events if wanted.items() <= event.items()]


class Afn:
    """One ``afn`` command in a process of its own."""

    def __init__(
        self, environment: dict[str, str], *arguments: str, within: Sequence[str] = ()
    ) -> None:
        self.arguments = arguments
        self.process = subprocess.Popen(
            [*within, choose(has_faults=True), "-m", "afn_ray", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def finish(self, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
        """Exit code and what it said, once it has ended."""
        _, said = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, said

    def close(self) -> None:
        _kill_group(self.process)


def _kill_group(process: subprocess.Popen[Any]) -> None:
    """SIGKILL to a process that leads a group, and to all of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


# --- nodes of one Ray, in another process
# ----------------------------------------------------------------


class Nodes:
    """A Ray whose head has no CPU, and as many nodes of one logical CPU as are added; nodes are
    named by their ids.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._folder = Path(
            tempfile.mkdtemp(prefix="afn-", dir="/tmp")
        )  # the paths of sockets are short
        with (self._folder / "stderr").open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env=environment | HEALTH_CHECKS | {"RAY_TMPDIR": str(self._folder)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        try:
            self.address: str = self._answer()
        except BaseException:
            self.close()
            raise

    def add(self) -> str:
        """A new node."""
        return str(self._ask("add"))

    def kill(self, node: str) -> None:
        """SIGKILL the node's raylet; its workers see that and end."""
        self._ask("signal", node, signal.SIGKILL)

    def freeze(self, node: str) -> None:
        """SIGSTOP the node's raylet; its workers go on."""
        self._ask("signal", node, signal.SIGSTOP)

    def thaw(self, node: str) -> None:
        """SIGCONT the node's raylet."""
        self._ask("signal", node, signal.SIGCONT)

    def preempt(self, node: str, deadline_s: float) -> None:
        """Tell Ray that the node will be taken away in ``deadline_s``, as a cloud does with spot
        machines.
        """
        self._ask("preempt", node, deadline_s)

    def alive(self) -> set[str]:
        """Nodes, without the head, that Ray holds to be alive."""
        return set(self._ask("alive"))

    def close(self) -> None:
        _kill_group(self._process)  # raylets and workers as well
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self, *question: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (
            f"the process of the nodes ended: {(self._folder / 'stderr').read_text()[-2000:]}"
        )
        return json.loads(line)


def _own_nodes() -> None:
    """Start a Ray, then do what each line of standard input asks; one line of JSON answers each."""
    from ray._private.node import Node
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster

    sys.executable = choose(has_faults=True)
    Node.start_api_server = lambda *_, **__: None  # the dashboard's, which starts in any case
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    cluster = Cluster(
        initialize_head=True,
        head_node_args=NODES
        | {
            "num_cpus": 0,
            "include_dashboard": False,
            "dashboard_agent_listen_port": 0,
            "no_monitor": True,
            "include_log_monitor": False,
        },
    )
    gcs = GcsClient(address=cluster.address)
    nodes: dict[str, Any] = {}
    print(json.dumps(cluster.address), file=answers)
    for line in sys.stdin:
        answer: Any = None
        match json.loads(line):
            case ["add"]:
                node = cluster.add_node(**NODES)
                answer = node.node_id
                nodes[node.node_id] = node
            case ["signal", name, number]:
                os.kill(nodes[name].all_processes[PROCESS_TYPE_RAYLET][0].process.pid, number)
            case ["preempt", name, deadline_s]:
                until_ms = int((time.time() + deadline_s) * 1000)
                accepted, why = gcs.drain_node(name, PREEMPTION, "preempted by a test", until_ms)
                assert accepted, why
            case ["alive"]:
                answer = [
                    n["NodeID"]
                    for n in cluster.global_state.node_table()
                    if n["Alive"] and n["NodeID"] in nodes
                ]
            case unknown:
                raise ValueError(unknown)
        print(json.dumps(answer), file=answers)


# --- hosts that are network namespaces
# -------------------------------------------------------------------


ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2", "c": "10.77.0.3"}
"""Addresses of the hosts, in their namespaces alone."""
START_NODE = "import sys, ray.scripts.scripts as s; sys.executable = sys.argv.pop(1); s.main()"
"""``ray start``, given the executable of the node's workers."""
NAMESPACE = re.compile("afn-([0-9]+)-[abc]")


class NotPermitted(Exception):
    """This machine has no network namespaces for us; the message says why."""


class Hosts:
    """Three hosts on a bridge. ``a`` has Ray's head, an S3 server and the driver; ``b`` and ``c``
    have a node each.

    Each is a network namespace with an address of its own; nothing leads out of them, and what they
    send stays in them. They share this machine's disk, but not the store, which is on S3.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.address = f"{ADDRESSES['a']}:6379"
        self._folder = Path(tempfile.mkdtemp(prefix="afn-", dir="/tmp"))
        self.environment = (
            environment
            | HEALTH_CHECKS
            | {
                "AWS_ENDPOINT_URL": f"http://{ADDRESSES['a']}:5000",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "of-a-test",
                "AWS_SECRET_ACCESS_KEY": "of-a-test",
                "NO_PROXY": "*",
            }
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._connect()
            self.start("a", "-P", str(ATOMIC_S3), "-H", ADDRESSES["a"], "-p", "5000")
            self._start_ray(
                "a", "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"
            )
            for host in "bc":
                self._start_ray(host, f"--address={self.address}", "--num-cpus=1")
        except BaseException:
            self.close()
            raise

    def within(self, host: str) -> list[str]:
        """Words to put before a command that is to run on ``host``."""
        return ["ip", "netns", "exec", _namespace(host)]

    def start(self, host: str, *arguments: str) -> Path:
        """Start a Python program on ``host``; returns the file that gets what it prints."""
        output = self._folder / f"{host}-{secrets.token_hex(4)}.out"
        with output.open("w") as sink:
            process = subprocess.Popen(
                [*self.within(host), sys.executable, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return output

    def copy(self, source: str, target: str) -> None:
        """Copy a folder from this disk to S3 or back, as host ``a``."""
        command = [*self.within("a"), sys.executable, __file__, source, target]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stderr

    def find(self, pid: int) -> str:
        """The host on which a process runs."""
        return _ip("netns", "identify", str(pid)).strip()[-1]

    def cut(self, host: str) -> None:
        """Take ``host``, b or c, off the bridge: what it sends is lost, and so is what is sent to
        it.
        """
        _ip("-n", _namespace("a"), "link", "set", f"to-{host}", "down")

    def heal(self, host: str) -> None:
        """Put ``host`` back on the bridge."""
        _ip("-n", _namespace("a"), "link", "set", f"to-{host}", "up")

    def freeze(self, host: str) -> None:
        """SIGSTOP the host's raylet: once it hears that the node was taken for dead it would end
        the workers.
        """
        raylets = [
            pid
            for pid in _ip("netns", "pids", _namespace(host)).split()
            if _command(pid) == "raylet"
        ]
        assert len(raylets) == 1, f"{len(raylets)} raylets on host {host}"
        os.kill(int(raylets[0]), signal.SIGSTOP)

    def close(self) -> None:
        for process in self._processes:
            _kill_group(process)
        for host in ADDRESSES:
            _remove(_namespace(host))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _connect(self) -> None:
        if shutil.which("ip") is None:
            raise NotPermitted("there is no 'ip' command; it comes with iproute2")
        try:
            for name in _ip("netns", "list").split():
                if (match := NAMESPACE.fullmatch(name)) and not Path("/proc", match[1]).exists():
                    _remove(name)  # of tests that were killed
            for host in ADDRESSES:
                _ip("netns", "add", _namespace(host))
                _ip("-n", _namespace(host), "link", "set", "lo", "up")
            hub = ("-n", _namespace("a"))
            _ip(*hub, "link", "add", "bridge", "type", "bridge")
            _ip(*hub, "address", "add", f"{ADDRESSES['a']}/24", "dev", "bridge")
            _ip(*hub, "link", "set", "bridge", "up")
            for host in "bc":
                name = _namespace(host)
                _ip(
                    *hub,
                    "link",
                    "add",
                    f"to-{host}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "net",
                    "netns",
                    name,
                )
                _ip(*hub, "link", "set", f"to-{host}", "master", "bridge", "up")
                _ip("-n", name, "address", "add", f"{ADDRESSES[host]}/24", "dev", "net")
                _ip("-n", name, "link", "set", "net", "up")
        except subprocess.CalledProcessError as error:
            raise NotPermitted(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None

    def _start_ray(self, host: str, *options: str) -> None:
        output = self.start(
            host,
            "-c",
            START_NODE,
            choose(has_faults=True),
            "start",
            "--block",
            f"--node-ip-address={ADDRESSES[host]}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--temp-dir={self._folder / host}",
            "--no-monitor",
            "--include-log-monitor=false",
            *options,
        )
        wait_until(
            f"a node of Ray on host {host}",
            lambda: "Ray runtime started" in output.read_text(),
            self._processes[-1],
            output.read_text,
        )


def _namespace(host: str) -> str:
    return f"afn-{os.getpid()}-{host}"


def _ip(*arguments: str) -> str:
    return subprocess.run(
        ["ip", *arguments], check=True, capture_output=True, text=True, timeout=30
    ).stdout


def _command(pid: str) -> str:
    """Name of the program that a process runs; empty when it has ended."""
    try:
        return Path("/proc", pid, "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _remove(namespace: str) -> None:
    """Kill what runs in a namespace, and remove it; nothing where there is none."""

    def kill() -> bool:
        pids = _ip("netns", "pids", namespace).split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return not pids

    if Path("/run/netns", namespace).exists():
        wait_until(f"the processes in {namespace} are dead", kill)
        _ip("netns", "delete", namespace)


def _copy(source: str, target: str) -> None:
    import fsspec

    s3 = fsspec.filesystem("s3")
    if target.startswith("s3://"):
        s3.mkdirs(target.split("/")[2], exist_ok=True)
        s3.put(source, target, recursive=True)
    else:
        s3.get(source, target, recursive=True)


if __name__ == "__main__":
    _copy(*sys.argv[1:]) if sys.argv[1:] else _own_nodes()
