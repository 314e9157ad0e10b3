"""Faults on purpose, for tests: every Python process with this folder on PYTHONPATH loads it.

The environment variable AFN_CHAOS names a file, read anew at every point, so a test may change it
under way::

    {"log": path, "slow_s": seconds added to every attempt,
     "faults": [{"point": one of POINTS, "shard": part of a file's URI or of the shard's id
     (default: any),
                 "skip": how many pass before the first one hit (0), "times": how many are hit (1),
                 "do": sigkill | sigstop | exit | raise | hang | eat (memory, up to EAT_BYTES, and
                 then hang), "until": path whose existence ends a hang}]}

``skip`` and ``times`` count over all processes. Each point that is reached adds one line of JSON to
the log: ``time, pid, node, shard, uri, point``, at "process" ``oom_retries`` (of the token budget),
from "measured" on ``attempt`` (at "committed": of the attempt that won), and ``fault`` where one
follows. Nothing is patched before afn_ray.runs.worker is imported, and of Ray one thread alone.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # that of typing, whose import is not every process's to pay
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from afn_ray.corpus_values import Shard
    from afn_ray.runs.worker import Processor
    from afn_ray.store.commits import Commit
    from afn_ray.store.shard_files import Attempt

POINTS = (
    "process",  # the attempt begins
    "measured",  # its files are finished on scratch
    "uploaded",  # all of them are in the store, the commit is not
    "committed",  # it is, by this attempt or a rival's; the driver was not told
)
HANG_S = 600.0
"""A hang that nobody ends ends its process after this time: tests must not leave any behind."""


EAT_BYTES = 6 << 30


def _reach(point: str, shard: str, uri: str, **more: object) -> None:
    import fcntl
    import json
    import time
    from pathlib import Path

    schedule = json.loads(Path(os.environ["AFN_CHAOS"]).read_text())
    event = {
        "time": time.time(),
        "pid": os.getpid(),
        "node": _node(),
        "shard": shard,
        "uri": uri,
        "point": point,
    } | more
    hit = None
    for i, fault in enumerate(schedule.get("faults", ())):
        part = fault.get("shard", "")
        if fault["point"] == point and (part in uri or part in shard):
            with Path(f"{schedule['log']}.hits-{i}").open("a+") as hits:
                fcntl.flock(hits, fcntl.LOCK_EX)
                hits.seek(0)
                before = len(hits.read())
                hits.write(".")
            if 0 <= before - fault.get("skip", 0) < fault.get("times", 1):
                hit = fault
                event["fault"] = fault["do"]
    log = os.open(schedule["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(log, json.dumps(event).encode() + b"\n")
    finally:
        os.close(log)
    if hit is not None:
        _strike(hit, f"at {point!r} of {uri}")
    if point == "process":
        time.sleep(schedule.get("slow_s", 0.0))


def _strike(fault: dict[str, object], where: str) -> None:
    import signal
    import time
    from pathlib import Path

    match fault["do"]:
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sigstop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(1)
        case "raise":
            raise RuntimeError(f"a fault on purpose {where}")
        case "eat":
            eaten: list[bytes] = []
            while len(eaten) << 26 < EAT_BYTES:
                eaten.append(b"x" * (64 << 20))
                time.sleep(0.02)
            _strike({"do": "hang"}, where)
        case "hang":
            until = fault.get("until")
            deadline = time.monotonic() + HANG_S
            while until is None or not Path(str(until)).exists():
                if time.monotonic() > deadline:
                    os._exit(1)
                time.sleep(0.02)
        case unknown:
            raise ValueError(f"AFN_CHAOS asks to do {unknown!r} {where}")


def _node() -> str | None:
    ray = sys.modules.get("ray")
    return (
        ray.get_runtime_context().get_node_id()
        if ray is not None and ray.is_initialized()
        else None
    )


def _patch(worker: ModuleType) -> None:
    import json

    shard_files, storage = worker.shard_files, worker.shard_files.storage
    process, publish, write_once = worker.Processor.process, shard_files.publish, storage.write_once

    def process_slowly(self: Processor, shard: Shard, oom_retries: int = 0) -> Commit:
        _reach("process", shard.id, shard.slices[0].uri, oom_retries=oom_retries)
        commit: Commit = process(self, shard, oom_retries)
        _reach("committed", shard.id, shard.slices[0].uri, attempt=commit.attempt)
        return commit

    def publish_measured(store: str, measure_id: str, shard: Shard, attempt: Attempt) -> Commit:
        _reach("measured", shard.id, shard.slices[0].uri, attempt=attempt.id)
        commit: Commit = publish(store, measure_id, shard, attempt)
        return commit

    def write_uploaded(uri: str, data: bytes, *args: object, **options: object) -> None:
        if uri.rpartition("/")[2].startswith("commit"):
            commit = json.loads(data)
            _reach(
                "uploaded", commit["shard"], commit["slices"][0]["uri"], attempt=commit["attempt"]
            )
        write_once(uri, data, *args, **options)

    worker.Processor.process = process_slowly
    shard_files.publish, storage.write_once = publish_measured, write_uploaded


def _patch_ray(worker: ModuleType) -> None:
    """Turn off a driver's thread that prints Ray's errors: it polls a dead head without a pause."""
    assert "listen_error_messages" in vars(worker)
    vars(worker)["listen_error_messages"] = lambda *_: None


PATCHES = {"afn_ray.runs.worker": _patch, "ray._private.worker": _patch_ray}
"""Functions that change a module after its import, by the module's name."""


class _Finder:
    """Finder of the modules in ``PATCHES``, which it changes."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in PATCHES:
            return None
        from importlib.util import find_spec

        patch = PATCHES.pop(name)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


if "AFN_CHAOS" in os.environ:
    sys.meta_path.insert(0, _Finder())
