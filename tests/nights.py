"""Nights of a corpus and runs of a store, which several files of tests audit."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import warm_workers
from afn_ray.analysis import json_schema
from afn_ray.cli import commands
from afn_ray.run_info import RunInfo
from afn_ray.schema import PLAN_SCHEMA
from afn_ray.store import manifest
from afn_ray.store.manifest import RunFolder
from conftest import RUN_INFO, write_jsonl

SCRIPT = Path(__file__).parents[1] / "jobs" / "nightly_audit.py"


DYING = """
import importlib, os, runpy, signal, sys

module, _, name = sys.argv.pop(1).partition(":")
functions = vars(importlib.import_module(module))
functions[name]  # it is there
functions[name] = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
"""A job that is killed where it calls a function, as in "package.module:name"; its first argument
names the function, the second the job's script.
"""


def real_job(folder: Path, *arguments: str, dies_at: str = "") -> tuple[int, str, str]:
    """Exit code, output and errors of jobs/nightly_audit.py in a process that has imported what it
    imports.

    ``dies_at`` is the function of ``DYING`` where the process is killed.
    """
    command = [str(SCRIPT), *arguments]
    if dies_at:
        script = folder / "script.py"
        script.write_text(DYING)
        command = [str(script), dies_at, *command]
    done = subprocess.run(
        [warm_workers.choose(has_faults=False), *command],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


class Nights:
    """A corpus that changes, and the audit of it as a user types it."""

    reports = False

    def __init__(
        self,
        folder: Path,
        model: Path,
        verses: list[str],
        policy: str,
        store: str = "",
        executor: str = "inline",
    ) -> None:
        self.folder, self.verses, self.store = folder, verses, store or str(folder / "store")
        self.config = folder / "run.toml"
        folder.mkdir(exist_ok=True)
        self.config.write_text(
            f'corpus = "{folder}/corpus"\nmodel = "{model}"\nstore = '
            f'"{self.store}"\nlayers = "0,2"\n'
            f'dtype = "float32"\nexecutor = "{executor}"\nshard_bytes = 2048\nbatch_tokens = 256\n'
        )
        (folder / "corpus").mkdir()
        (folder / "policy.toml").write_text(policy)
        self.add(0, 0, 30)

    def add(self, file: int, begin: int, end: int) -> None:
        rows = [{"text": t} for t in self.verses[begin:end]]
        write_jsonl(self.folder / "corpus" / f"{file}.jsonl", rows)

    def words(self, *more: str) -> list[str]:
        given = {"policy": self.folder / "policy.toml", "out": self.folder / "out"}
        flags = [f"--{name}={path}" for name, path in given.items()]
        return [
            "audit",
            str(self.config),
            *flags,
            "--quiet",
            *(() if self.reports else ("--no-report",)),
            *more,
        ]

    def audit(self, *more: str) -> int:
        """Exit code of ``afn audit``, in this process."""
        with pytest.raises(SystemExit) as left:
            commands.main(self.words(*more))
        assert isinstance(left.value.code, int)
        return left.value.code

    def begin(self, *more: str) -> int:
        """Exit code of the audit of the night that begins the series."""
        return self.audit("--first-night", *more)

    def start(self, *more: str, python: str = sys.executable) -> subprocess.Popen[str]:
        """The real job."""
        command = [python, str(SCRIPT), *self.words(*more)[1:]]
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def script(self, *more: str) -> tuple[int, str, str]:
        """Exit code and output of the real job, in a process that has imported what it imports."""
        process = self.start(*more, python=warm_workers.choose(has_faults=False))
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    @property
    def said(self) -> dict[str, Any]:
        body = json.loads((self.folder / "out" / "audit.json").read_text("utf-8"))
        assert body["schema_version"] == 3
        return dict(body)


def complete(
    store: Path,
    began: datetime,
    measure: str = "m",
    done: bool = True,
    corpus: Sequence[str] = ("c",),
    ask: str = "",
    shards: str = "",
    **config: Any,
) -> RunFolder:
    name = f"{began.strftime('%Y%m%dT%H%M%S')}.000Z-{ask or began.strftime('%m%d%H') + '0' * 6}"
    run = RunFolder(f"{store}/runs/{name}", str(store), name, {})
    plan = manifest.write_table(run, "plan", PLAN_SCHEMA.empty_table())
    tables = {"plan": plan}
    if shards:
        tables["shards"] = {"name": "s", "bytes": 1, "sha256": shards, "crc32": ""}
    info: RunInfo = {
        **RUN_INFO,
        "measure": {"id": measure, "model": {"config.json": measure}},
        "tables": tables,
        "config": {"corpus": list(corpus), "layers": "0,2/3", **config},
    }
    return manifest.finish_run(run, info) if done else run


class Hook:
    """An HTTP server on this machine that answers with the statuses given, then with 200."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.got: list[bytes] = []
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.got.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(hook.statuses.pop(0) if hook.statuses else 200)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/secret"


@contextlib.contextmanager
def listening() -> Iterator[Hook]:
    """A ``Hook`` that answers."""
    found = Hook()
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.server.shutdown()
        thread.join()
        found.server.server_close()


@functools.cache
def validator_of(name: str) -> jsonschema.Draft202012Validator:
    """A validator of values by the published schema ``name``."""
    schema = json_schema.SCHEMAS[name]()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def strictly(name: str) -> jsonschema.Draft202012Validator:
    """The same without entries that the schema does not name."""

    def closed(schema: Any) -> Any:
        if isinstance(schema, list):
            return [closed(one) for one in schema]
        if not isinstance(schema, dict):
            return schema
        made = {key: closed(value) for key, value in schema.items()}
        return {**made, "additionalProperties": False} if "required" in made else made

    return jsonschema.Draft202012Validator(closed(json_schema.SCHEMAS[name]()))
