"""The run on a real local Ray: same rows for any number of workers, and whatever is killed is done
again once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray

import afn_ray
import warm_workers
from afn_ray import model
from afn_ray.errors import ConfigError, IncompleteRun, ModelError, StoreError
from afn_ray.runs import demo
from afn_ray.runs.cluster import pool, session
from afn_ray.runs.deadlines import SLOTS
from afn_ray.runs.events import Event, Working
from afn_ray.runs.pool import Ready
from afn_ray.runs.progress import Counters
from afn_ray.store.commits import COMPOSED
from conftest import MakeConfig, config_of, recorded, stop_after, write_jsonl
from hosts import PATIENCE_S, killed, wait_until

pytestmark = pytest.mark.ray


def plain(tables: tuple[pa.Table, ...]) -> list[list[dict[str, Any]]]:
    return [t.to_pylist() for t in tables]


def test_ray_has_its_sockets_where_they_are_looked_for(local_ray: None) -> None:
    from ray._private.worker import _global_node

    socket = Path(_global_node.plasma_store_socket_name).relative_to(session.folder())
    assert len(str(socket)) <= len(session.LONGEST_SOCKET)
    assert re.sub(r"\d+", "0", str(socket)) == re.sub(r"\d+", "0", session.LONGEST_SOCKET)


def test_rows_are_identical_for_one_two_and_four_workers_and_without_ray(
    local_ray: None, tmp_path: Path, make_config: MakeConfig, minilm: Path, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:120]])
    base: dict[str, Any] = {"corpus": (str(corpus),), "model": str(minilm), "layers": "0,4"}
    base |= {"shard_bytes": 1024, "batch_tokens": 1024}
    with afn_ray.run(make_config(**base)) as run:
        expected = plain(recorded(run))
        assert run.info["counts"]["shards"] > 4 * SLOTS  # several for each of four workers
    for workers in (1, 2, 4):
        config = make_config(
            **base, executor="ray", workers=workers, store=str(tmp_path / f"store-{workers}")
        )
        with afn_ray.run(config) as run:
            assert plain(recorded(run)) == expected


def test_a_run_begun_in_this_process_is_finished_on_ray(
    local_ray: None,
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:200]])
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        afn_ray.run(make_config(corpus=(str(corpus),)))
    with afn_ray.run(make_config(corpus=(str(corpus),), executor="ray", workers=2)) as run:
        assert run.info["counts"]["shards_reused"] == 2
        assert run.info["counts"]["documents"] == 200


def test_lean_runs_and_composed_columns_are_on_ray_what_they_are_in_this_process(
    local_ray: None, tmp_path: Path, make_config: MakeConfig, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:60]])
    base: dict[str, Any] = {"corpus": (str(corpus),), "shard_bytes": 2048, "screen": 0}
    on_ray: dict[str, Any] = {"executor": "ray", "workers": 2}

    def rows(name: str, **more: Any) -> list[list[dict[str, Any]]]:
        with afn_ray.run(make_config(**base, store=str(tmp_path / name), **more)) as run:
            return plain(recorded(run))

    for record in ("sample:50%", "summaries"):
        here = rows(f"here-{record}", layers="2", record=record)
        assert rows(f"ray-{record}", layers="2", record=record, **on_ray) == here
    expected = rows("scratch", layers="1,2")
    rows("composed", layers="2")
    assert rows("composed", layers="1,2", **on_ray) == expected
    commits = [json.loads(p.read_text()) for p in (tmp_path / "composed").rglob("commit.json")]
    made = [commit for commit in commits if COMPOSED in commit["made_by"]]
    assert 1 < len(made) == len(commits) // 2


class Poisoned(pool._Worker):
    """Kills its process at the first try of a shard whose file holds "once", and at every try of
    "always".
    """

    def process(self, shard: Any, oom_retries: int) -> Any:
        text = Path(shard.slices[0].uri).read_text()
        mark = Path(shard.slices[0].uri + ".tried")
        if "always" in text or ("once" in text and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().process(shard, oom_retries)


def num_commits(folder: Path) -> int:
    return len(list(folder.rglob("commit.json")))


def poisoned_corpus(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(texts.get(f"n{i}", f"And it was so, number {i}. ") * 40)
    return folder


def test_a_worker_killed_in_the_middle_is_replaced_and_its_shard_done_again(
    local_ray: None, tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_Worker", Poisoned)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = poisoned_corpus(
        tmp_path / "corpus", n1="It happened once. ", n4="It happened once more. "
    )
    events: list[Event] = []
    config = make_config(corpus=(f"{folder}/*.txt",), executor="ray", workers=2, shard_bytes=1024)
    with afn_ray.run(config, events.append) as run:
        assert run.info["counts"]["documents"] == 6
        assert run.sql("SELECT count(*) FROM (SELECT doc FROM tokens GROUP BY doc)").fetchall() == [
            (6,)
        ]
    assert (folder / "1.txt.tried").exists() and (folder / "4.txt.tried").exists()
    assert max(e.progress.retries for e in events if isinstance(e, Working)) >= 1


def test_a_shard_that_always_kills_its_worker_is_given_up_and_the_others_are_kept(
    local_ray: None, tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_Worker", Poisoned)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = poisoned_corpus(tmp_path / "corpus", n2="It is always so. ")
    config = make_config(corpus=(f"{folder}/*.txt",), executor="ray", workers=2, shard_bytes=1024)
    with pytest.raises(
        IncompleteRun,
        match=r"1 of 6 shards are quarantined.*\n.*2\.txt.*process died, with this shard alone",
    ):
        afn_ray.run(config)
    assert len(list(Path(config.store).rglob("commit.json"))) == 5


def test_a_worker_with_a_new_process_is_seen_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its count begins at nothing again: held at the lost process's, it would seem to hang until it
    had passed that.
    """
    answers: list[tuple[Counters, str, str]] = []
    mine = object.__new__(pool.RayPool)
    mine._ray = SimpleNamespace(get=lambda ref: answers[ref], exceptions=ray.exceptions, nodes=list)
    mine._actors, mine._in_flight, mine._released = {0: pool._Actor(handle=None)}, {}, Counters()
    monkeypatch.setattr(pool, "_restarts", lambda handle: 0)
    monkeypatch.setattr(pool.RayPool, "_send_poll", lambda self, actor: None)

    def look(tokens: int, process: str) -> list[Any]:
        answers.append((Counters(tokens=tokens), "node", process))
        mine._actors[0].poll, mine._actors[0].next_poll = len(answers) - 1, float("inf")
        return list(mine._handle_poll(0, len(answers) - 1))

    assert look(0, "a") == [Ready(0)] and look(5000, "a") == []
    assert mine.num_tokens(0) == mine.counters().tokens == 5000
    mine._handle_death(0, ray.exceptions.RayActorError())
    (_, ready) = look(0, "b")
    assert ready == Ready(0) and mine.num_tokens(0) == 0
    assert look(70, "b") == [] and mine.num_tokens(0) == 70 and mine.counters().tokens == 5070


class ElsewhereModel(pool._Worker):
    """A worker that finds other weights than the driver planned with."""

    def __init__(self, task: Any) -> None:
        identity = dict(task.measure.model) | {"model.safetensors": "0" * 64}
        super().__init__(
            replace(task, measure=replace(task.measure, model=tuple(identity.items())))
        )


def test_a_worker_with_another_model_stops_the_run_at_once(
    local_ray: None, tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_Worker", ElsewhereModel)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "hello"}])
    with pytest.raises(
        ModelError, match=r"differs on this worker from the one planned: model\.safetensors"
    ):
        afn_ray.run(make_config(corpus=(str(corpus),), executor="ray", workers=1))


def test_a_killed_driver_leaves_a_store_that_the_same_command_finishes(
    tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    store, expected = tmp_path / "store", tmp_path / "expected"
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:3000]])
    flags = {"shard-bytes": "19000", "layers": "2", "dtype": "float32", "workers": "2"}
    paths = [str(corpus), "--model", str(tiny_bert), "--store", str(store)]
    given = [f"--{name}={value}" for name, value in flags.items()]
    python = warm_workers.choose(has_faults=False)  # its Ray's workers are forks too
    command = [python, "-m", "afn_ray", "run", *paths, *given]
    said = tmp_path / "said"
    with said.open("w") as sink:
        driver = subprocess.Popen(command, stderr=sink, text=True, start_new_session=True)
    with killed(driver):
        committed = "3 shards are committed"
        wait_until(committed, lambda: num_commits(store) >= 3, driver, said.read_text)
    time.sleep(3)  # workers notice that their driver is gone; what they commit until then is good
    before = {p.parent.name: p.stat().st_mtime_ns for p in store.rglob("commit.json")}
    with pytest.raises(StoreError, match="holds no complete run"):
        afn_ray.open_run(str(store))
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    after = {p.parent.name: p.stat().st_mtime_ns for p in store.rglob("commit.json")}
    assert (
        len(before) < len(after) and before.items() <= after.items()
    )  # only unfinished shards were done
    straight = config_of(
        tiny_bert, corpus, expected, shard_bytes=19000, layers="2", batch_tokens=None
    )
    afn_ray.run(straight).close()
    with afn_ray.open_run(str(store)) as a, afn_ray.open_run(str(expected)) as b:
        assert a.info["counts"]["shards_reused"] == len(before)
        for mine, theirs in zip(recorded(a), recorded(b), strict=True):
            assert mine.equals(theirs)


@pytest.mark.parametrize("executor", ["ray", "inline"])
def test_sigterm_stops_resumable_and_leaves_no_scratch(
    executor: str, tmp_path: Path, tiny_bert: Path
) -> None:
    scratch = tmp_path / "scratch"
    python = warm_workers.choose(has_faults=False)  # of the worker; the driver has its own signals
    code = "import sys; sys.executable = sys.argv.pop(1); import afn_ray.__main__"
    command = [
        sys.executable,
        "-c",
        code,
        python,
        "run",
        str(demo.corpus_file()),
        "--model",
        str(tiny_bert),
        "--store",
        str(tmp_path / "store"),
        "--shard-bytes",
        "100000",
        "--executor",
        executor,
        "--scratch",
        str(scratch),
        "--workers",
        "1",
    ]
    with killed(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)) as driver:
        wait_until("a shard is committed", lambda: num_commits(tmp_path), driver)
        driver.terminate()
        _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 75
    assert "the same command resumes" in err and "Traceback" not in err and "SIGTERM" not in err
    assert list(scratch.iterdir()) == []


def listening(pids: set[str]) -> set[str]:
    """Addresses at which ``pids`` listen, of IPv4 and IPv6."""
    sockets = set()
    for pid in pids:
        for handle in Path("/proc", pid, "fd").iterdir():
            with contextlib.suppress(OSError):  # it was closed
                sockets.update(re.findall(r"socket:\[(\d+)\]", str(handle.readlink())))
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path("/proc/net", table).read_text().splitlines()[1:]:
            columns = row.split()
            if columns[3] == "0A" and columns[9] in sockets:
                words = bytes.fromhex(columns[1].partition(":")[0])
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(
                    socket.inet_ntop(
                        socket.AF_INET6 if len(address) == 16 else socket.AF_INET, address
                    )
                )
    return found


def test_a_ray_of_our_own_listens_on_loopback_alone_and_has_nothing_needless(
    local_ray: None,
) -> None:
    session = ray._private.worker._global_node.get_session_dir_path()
    commands = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is not ours
            command = (process / "cmdline").read_bytes()
            if session.encode() in command:
                commands[process.name] = command
    assert len(commands) >= 2  # gcs_server, raylet
    for script in (b"/dashboard.py", b"/monitor.py", b"/log_monitor.py"):
        assert not any(script in command for command in commands.values())
    found = listening({str(os.getpid()), *commands})
    assert found and found <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_script_that_imports_ray_first_can_run(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "hello there"}])
    code = (
        "import sys, ray, afn_ray\n"
        "sys.executable = sys.argv[4]\n"
        "config = afn_ray.RunConfig(corpus=(sys.argv[1],), model=sys.argv[2], store=sys.argv[3], "
        "workers=1)\n"
        "print(afn_ray.run(config).info['counts']['documents'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(tmp_path)
    }
    paths = [str(corpus), str(tiny_bert), str(tmp_path / "store")]
    python = warm_workers.choose(has_faults=False)  # of the worker
    done = subprocess.run(
        [sys.executable, "-c", code, *paths, python],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert not list(
        tmp_path.rglob("auth_token")
    )  # Ray's own is for every user of the machine to read


class Sick(pool._Worker):
    """A worker whose first process cannot process anything, as after a fault of its device."""

    def process(self, shard: Any, oom_retries: int) -> Any:
        mark = Path(self._processor.task.config.store).parent / "sick"
        if not mark.exists():
            mark.write_text(str(os.getpid()))
        if mark.read_text() == str(os.getpid()):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().process(shard, oom_retries)


def test_a_sick_process_is_replaced_and_does_not_give_up_every_shard(
    local_ray: None, tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_Worker", Sick)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = poisoned_corpus(tmp_path / "corpus")
    config = make_config(corpus=(f"{folder}/*.txt",), executor="ray", workers=2, shard_bytes=1024)
    with afn_ray.run(config) as run:
        assert run.info["counts"]["documents"] == 6


def test_a_ray_without_the_device_is_an_error_and_no_wait(
    local_ray: None, tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "choose_device", lambda device: "cuda")
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "hello"}])
    with pytest.raises(ConfigError, match=r"needs one GPU, and this Ray has none; it has .*CPU"):
        afn_ray.run(make_config(corpus=(str(corpus),), executor="ray"))
