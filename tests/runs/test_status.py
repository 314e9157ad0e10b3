"""Views of a run from outside: its status in the store, its log as JSON, its metrics, and rules
that judge these.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import afn_ray
import warm_workers
from afn_ray import logs
from afn_ray.analysis import verify
from afn_ray.cli import commands as cli
from afn_ray.cli.progress import bar_counts, log_as, log_json
from afn_ray.config import RunConfig
from afn_ray.corpus_values import FileSlice, ReadOptions, Shard
from afn_ray.errors import ConfigError, CorpusError, IncompleteRun, StoreError, Unavailable
from afn_ray.run_info import RunInfo
from afn_ray.runs import cluster, dispatch, status, status_text
from afn_ray.runs.cluster import metrics
from afn_ray.runs.cluster.metrics import COUNTERS, GAUGES, SHARD_SECONDS
from afn_ray.runs.events import Event, Planned, Reducing, Starting, Warned, Working
from afn_ray.runs.outcome import State
from afn_ray.runs.progress import Counters, Progress
from afn_ray.runs.reporter import Reporter
from afn_ray.store import garbage, layout, manifest, probes, run_claims, storage, uris
from afn_ray.store.commits import Commit, Commits
from afn_ray.store.layout import PLANNING
from conftest import MakeConfig, fenced, stop_after, write_jsonl
from hosts import wait_until

INFRA = Path(__file__).parents[2] / "infra"
MONITORING, GUIDE = INFRA / "monitoring", INFRA / "guide" / "seeing.md"
MARK = "zyxwmark"
"""A word in every text of the corpus of the live run, so that its logs can be searched for it."""
EXACT = (
    "tokens_total", "documents_total", "documents_quarantined_total", "shards_total",
    "bytes_read_total",
    "bytes_written_total", "shards_quarantined", "shard_seconds_count", "shards_queued",
    "shards_running",
    "workers_wanted", "workers_ready",
)  # fmt: skip


def read(config: RunConfig) -> status.Status:
    return status.read_status(config.store)[0]


# --- the file
# --------------------------------------------------------------------------------------------


def test_a_run_that_failed_says_why_wherever_it_is_named(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": None}, {"text": ""}])
    config = make_config(corpus=(str(corpus),))
    with pytest.raises(CorpusError):
        afn_ray.run(config)
    (failed,) = status.read_status(config.store)
    lines = list(status_text.lines(failed))
    assert any(re.fullmatch(r"state .* 1 empty, 1 quarantined", line) for line in lines)
    assert any(re.fullmatch(r"reason .*c.jsonl: text is null", line) for line in lines)
    assert not any("complete run" in line for line in lines)
    why = r"it failed: .*1 empty, 1 quarantined; 'afn status"
    for uri in (config.store, failed.uri):
        with pytest.raises(StoreError, match=why):
            manifest.find_run(uri)
    found = verify.lines(verify.verify_store(config.store))
    assert any(re.search(f"incomplete .*{why}", line) for line in found)


def test_a_run_tells_how_far_it_is_from_its_plan_to_its_end(
    make_config: MakeConfig, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afn_ray.runs.reporter.LEAST_S", 0.02)
    monkeypatch.setattr("afn_ray.runs.reporter.EVERY_S", 0.04)
    config, told = make_config(corpus=(corpus,)), {}

    def look(event: Event) -> None:
        def tells() -> bool:
            found = read(config)
            # A run without a status file is starting too, and has no counts of shards.
            if found.state == event.name and "shards" in found.body:
                told[event.name] = found
            return event.name in told

        if isinstance(event, Starting | Reducing):
            wait_until(f"the status says {event.name}", tells, every_s=0.001)

    with afn_ray.run(config, look) as run:
        counts = run.info["counts"]
    assert list(told) == ["starting", "reducing"]
    assert told["starting"].exit_code == status.UNDER_WAY
    assert told["starting"].body["shards"] | {"planned": 0} == dict.fromkeys(
        ("planned", "reused", "done", "running", "quarantined"), 0
    )
    body = told["reducing"].body
    assert body["shards"]["done"] == body["shards"]["planned"] == counts["shards"]
    assert {k: body[k] for k in ("tokens", "documents")} == {
        k: counts[k] for k in ("tokens", "documents")
    }
    assert body["documents_quarantined"] == counts["quarantined"]
    assert body["bytes_lost"] == counts["lost_bytes"]
    assert body["bytes_read"] == Path(corpus).stat().st_size
    written = Path(config.store, "shards").rglob("*.parquet")
    assert body["bytes_written"] == sum(path.stat().st_size for path in written)
    end = json.loads(Path(run.uri, "status.json").read_text())
    assert (end["phase"], end["exit_code"], end["tokens"]) == ("complete", 0, counts["tokens"])
    found = read(config)
    assert (found.state, found.exit_code, found.body["tokens"]) == ("complete", 0, counts["tokens"])
    assert not Path(config.store, "planning.json").exists()


def test_a_run_of_one_shard_moves(
    make_config: MakeConfig, tmp_path: Path, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*({"text": t} for t in verses[:400]), {"text": ""}, "no JSON"]
    corpus = str(write_jsonl(tmp_path / "one.jsonl", rows))
    monkeypatch.setattr(dispatch, "POLL_S", 0.002)
    monkeypatch.setattr(dispatch, "POLL_PER_WORKER_S", 0.0)
    bars: list[tuple[str, int, int]] = []
    on_the_way: list[float | None] = []

    def look(event: Event) -> None:
        if isinstance(event, Working):
            bars.append(bar_counts(event.progress))
            if not event.progress.num_done:
                on_the_way.append(bars[-1][1])

    with afn_ray.run(make_config(corpus=(corpus,), shard_bytes=1 << 20), look) as run:
        assert run.info["counts"]["shards"] == 1
    assert len({n for n in on_the_way if n and 0 < n < 402}) >= 5  # before any shard is done
    assert [b[1] for b in bars] == sorted(b[1] for b in bars)
    assert bars[-1] == ("documents", 402, 402)
    end = json.loads(Path(run.uri, "status.json").read_text())
    assert (end["documents_measured"], end["documents_planned"]) == (402, 402)


def test_documents_tell_the_time_left_before_a_shard_is_done() -> None:
    state = Progress(
        1, num_ready=1, num_documents=1000, seconds=20.0, work=Counters(measured=250.0)
    )
    assert state.left_s == 60.0
    assert replace(state, seconds=1.0).left_s is None  # too early
    assert replace(state, num_documents=None).left_s is None
    assert bar_counts(replace(state, num_documents=None)) == ("shards", 0, 1)
    again = replace(state, work=Counters(measured=1700.0))  # attempts that failed count too
    assert (again.num_measured, again.left_s) == (1000, 0.0)


def test_a_run_that_is_stopped_and_resumed_counts_what_was_there_before(
    make_config: MakeConfig, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(corpus=(corpus,), shard_bytes=2000)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            afn_ray.run(config)
    stopped = read(config)
    assert (stopped.state, stopped.exit_code, stopped.body["exit_code"]) == ("stopped", 75, 75)
    assert stopped.body["shards"]["done"] == len(list(Path(config.store).rglob("commit.json"))) > 0
    assert "the same command resumes" in "\n".join(status_text.lines(stopped))
    with afn_ray.run(config) as run:
        counts = run.info["counts"]
    end = json.loads(Path(run.uri, "status.json").read_text())
    assert end["shards"]["reused"] == counts["shards_reused"] == stopped.body["shards"]["done"]
    assert (end["shards"]["done"], end["tokens"]) == (counts["shards"], counts["tokens"])


def test_a_run_that_fails_says_why_and_with_what_code(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"and it was so, {i} " * 9)
    config = make_config(corpus=(f"{tmp_path}/*.txt",), shard_bytes=1024)
    begin = run_claims.begin_run

    def change_one(*args: Any) -> Any:
        (tmp_path / "1.txt").write_text("something else")
        return begin(*args)

    monkeypatch.setattr(run_claims, "begin_run", change_one)
    with pytest.raises(IncompleteRun):
        afn_ray.run(config)
    found = read(config)
    assert (found.state, found.exit_code, found.body["exit_code"]) == ("failed", 1, 1)
    (failure,) = found.body["failures"]
    assert failure["uri"].endswith("/1.txt") or failure["uri"].endswith(
        "/0.txt"
    )  # a shard is named by its first file
    assert failure["reason"].startswith("CorpusChanged: ") and found.body["num_failures"] == 1
    text = "\n".join(status_text.lines(found))
    assert failure["reason"] in text and "exit code 1" in text


def test_what_fails_before_a_run_has_a_name_is_told_by_its_store(
    make_config: MakeConfig, corpus: str
) -> None:
    config = make_config(corpus=(corpus,))
    with afn_ray.run(config):
        pass
    with pytest.raises(ConfigError):
        afn_ray.run(make_config(corpus=(corpus,), layers="9"))
    failed, before = status.read_status(config.store)
    assert (failed.state, failed.exit_code, before.state) == ("failed", 1, "complete")
    assert "layer 9 does not exist" in "\n".join(status_text.lines(failed))
    assert failed.uri == f"{config.store}/planning.json"
    assert not verify.verify_store(config.store).foreign
    with afn_ray.run(config):  # nothing to do, and the last failure is history
        pass
    assert [s.state for s in status.read_status(config.store)] == ["complete"]


def test_a_driver_without_a_word_is_thought_dead_by_the_clock_of_the_store(
    make_config: MakeConfig, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(corpus=(corpus,))
    with afn_ray.run(config) as run:
        uri = run.uri
    Path(uri, "run.json").unlink()
    file = Path(uri, "status.json")
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"phase": "working", "exit_code": None})
    )
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the clock of this machine was asked"))
    assert read(config).state == "working" and read(config).exit_code == status.UNDER_WAY
    now = file.stat().st_mtime
    os.utime(file, (now - 200, now - 200))
    found = read(config)
    assert (found.state, found.exit_code) == ("silent", status.STOPPED)
    assert "silent: no update for 3 min, while working: killed?" in "\n".join(
        status_text.lines(found)
    )
    file.unlink()
    plan = Path(uri, "plan.parquet")
    os.utime(plan, (now - 200, now - 200))
    assert (read(config).state, read(config).exit_code) == ("begun", status.STOPPED)


def test_a_store_that_refuses_the_status_is_told_of_once_and_the_run_goes_on(
    make_config: MakeConfig,
    corpus: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("afn_ray.runs.reporter.LEAST_S", 0.02)
    monkeypatch.setattr("afn_ray.runs.reporter.EVERY_S", 0.04)
    tries = []

    def refuse(uri: str, data: bytes) -> None:
        tries.append(uri)
        raise StoreError(f"writing {uri}: permission denied")

    monkeypatch.setattr(storage, "write_over", refuse)
    with afn_ray.run(make_config(corpus=(corpus,))) as run:
        assert run.info["counts"]["documents"] == 60
    told = [r for r in caplog.records if "the run goes on without a status in" in r.message]
    assert len(tries) > 1 and len(told) == 1 and "permission denied" in told[0].message


def test_a_status_is_replaced_whole_on_every_filesystem(place: str) -> None:
    uri = f"{place}/runs/x/status.json"
    for text in (b"a long one, to begin with", b"short"):
        for _ in range(9):  # it asks once, and on a bad night that is not enough
            try:
                storage.write_over(uri, text)
            except Unavailable:
                continue
            break
        assert storage.read_bytes(uri) == text
    assert storage.list_names(f"{place}/runs/x") == ["status.json"]
    modified_s = storage.modified_s(uri)
    assert modified_s is not None and modified_s <= probes.clock_s(place)
    assert storage.modified_s(f"{place}/nothing") is None


def test_a_store_lists_its_runs_newest_first_and_gc_and_verify_know_the_files(
    make_config: MakeConfig, tmp_path: Path, verses: list[str]
) -> None:
    for night in (10, 20):
        path = write_jsonl(tmp_path / f"{night}.jsonl", [{"text": t} for t in verses[:night]])
        config = make_config(corpus=(str(path),))
        with afn_ray.run(config):
            pass
    found = status.read_status(config.store)
    assert [s.body["documents"] for s in found] == [20, 10]
    assert [s.body["documents"] for s in status.read_status(config.store, last=1)] == [20]
    head, first, *_ = status_text.table(found)
    assert head.split() == ["STATE", "BEGUN", "SHARDS", "TOKENS", "RUN", "CORPUS"]
    assert (
        first.startswith("complete ")
        and first.endswith("/20.jsonl")
        and f"{found[0].body['tokens']:,}" in first
    )
    assert list(status_text.table(found, 1000)) == list(status_text.table(found))
    narrow = list(status_text.table(found, 80))
    assert max(map(len, narrow[::2])) <= 80 and narrow[3].strip().endswith("/20.jsonl")
    assert " ".join(narrow[2:4]).split() == first.split()
    assert status.read_status(found[1].uri).runs == (found[1],)
    checked = verify.verify_store(config.store)
    assert not checked.findings and not checked.orphans and not checked.foreign
    left = garbage.collect_garbage(config.store, keep=1, min_age_h=0, delete=True)
    assert len(left.runs) == 1 and len(status.read_status(config.store)) == 1
    assert manifest.open_folder(config.store, found[0].body["run"]).info
    assert [p.name for p in Path(found[1].uri).iterdir()] == [
        "run.json"
    ]  # it says that the run was removed


def test_a_word_before_a_run_is_no_news_once_a_run_has_said_more(
    make_config: MakeConfig, corpus: str
) -> None:
    config = make_config(corpus=(corpus,))
    planning = uris.join(config.store, PLANNING)
    failed = {**status.NOTHING, "phase": "failed", "exit_code": 2, "reason": "a misspelt flag"}

    def plant(written_at: str, **values: Any) -> None:
        storage.write_over(
            planning, json.dumps(failed | values | {"written_at": written_at}).encode()
        )

    plant("2020-01-01T00:00:00+00:00")  # by a call of before, which planned for long
    with afn_ray.run(config):
        assert not storage.exists(planning)
    plant("2020-01-01T00:00:00+00:00")  # which could not delete it
    (only,) = status.read_status(config.store)
    assert only.exit_code == status.COMPLETE
    plant("2099-01-01T00:00:00+00:00")
    assert [s.state for s in status.read_status(config.store)] == ["failed", "complete"]
    plant("2020-01-01T00:00:00+00:00", phase="planning")
    assert [s.state for s in status.read_status(config.store)] == [
        "planning",
        "complete",
    ]  # under way: it is young


def test_a_run_that_has_just_begun_is_under_way_and_not_killed(
    make_config: MakeConfig, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(corpus=(corpus,))
    seen: list[status.Status] = []

    def look(*args: Any) -> Any:
        seen.extend(status.read_status(config.store))
        raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "begin", look)
    with pytest.raises(KeyboardInterrupt):
        afn_ray.run(config)
    assert [(s.state, s.exit_code) for s in seen if s.body.get("run")] == [
        ("starting", status.UNDER_WAY)
    ]
    assert "begun a moment ago" in "\n".join(status_text.lines(seen[-1]))


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, "[]", "{}", '{"schema_version": 1}', "x" * 99, "9" * 5000,
     json.dumps(status.NOTHING | {"shards": {"planned": "many"}}),
     json.dumps(status.NOTHING | {"left_s": "soon"}),
     json.dumps(status.NOTHING | {"documents_planned": "some"}),
     json.dumps(status.NOTHING | {"failures": ["none"]}),
     json.dumps(status.NOTHING | {"corpus": [1]}),
     json.dumps(status.NOTHING | {"reason": "x" * status.MOST_BYTES})],
)  # fmt: skip
def test_a_strangers_status_is_none(make_config: MakeConfig, corpus: str, text: str) -> None:
    config = make_config(corpus=(corpus,))
    with afn_ray.run(config) as run:
        folder = Path(run.uri)
    (folder / "run.json").unlink()
    (folder / layout.STATUS).write_text(text)
    (found,) = status.read_status(config.store)
    assert (
        found.state in ("starting", "begun")
        and list(status_text.lines(found))
        and list(status_text.table([found]))
    )


def test_what_watches_a_run_never_ends_it(
    make_config: MakeConfig,
    corpus: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: Any) -> None:
        raise TypeError("no number")

    monkeypatch.setattr("afn_ray.runs.reporter._counts_of", broken)
    monkeypatch.setattr(Reporter, "begin", lambda *args: None)
    with afn_ray.run(make_config(corpus=(corpus,))) as run:
        assert run.info["counts"]["documents"] == 60
    assert [
        r.getMessage().split(": ", 1)[1]
        for r in caplog.records
        if "goes on without" in r.getMessage()
    ] == ["TypeError: no number"]
    told = metrics.Published.__new__(metrics.Published)
    told._best_effort = logs.BestEffort(logging.getLogger("afn_ray"), "metrics")
    told.publish(Progress(1))  # it has no gauges at all


def test_what_is_no_store_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="neither a store nor a run"):
        status.read_status(str(tmp_path))


def test_the_picture_in_the_guide_is_what_a_run_at_work_looks_like(
    memory: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "head-0")
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    monkeypatch.setattr("afn_ray.runs.reporter._now", lambda: "2026-11-22T06:25:45+00:00")
    reporter = Reporter(make_config(store=memory, corpus=("s3://corpus/2026-11-22",)))
    piece = FileSlice("s3://corpus/2026-11-22/7.jsonl", 9, "", "jsonl", "", 0, 9, 9, 1, "")
    shard = Shard("bad", (piece,), ReadOptions("jsonl", "text", None, "file", 1 << 20))
    before = Commit(
        "x",
        "",
        {},
        {"tokens": 24_011, "documents": 110, "quarantined": 0, "lost_bytes": 13_000},
        1.0,
        {},
    )
    found = Commits()
    found.update(dict.fromkeys(map(str, range(100)), before))
    reporter.begin(manifest.RunFolder(f"{memory}/runs/x", memory, "x", {}), [shard] * 190, found)
    progress = Progress(
        90,
        num_workers=8,
        num_ready=7,
        num_lost=2,
        num_running=21,
        retries=3,
        seconds=100.0,
        counts=Counter(tokens=70_012, documents=1000, quarantined=5, lost_bytes=5000),
        work=Counters(
            tokens=50_000,
            forward_tokens=60_000,
            model_s=60.0,
            wait_s=40.0,
            read_s=9.0,
            measured=1900.5,
        ),
        num_documents=9000,
        num_committed=9,
        failures=(("bad", "HelperDied: it died"),),
        notices=("a worker was replaced",),
    )
    monkeypatch.setattr("afn_ray.runs.reporter._now", lambda: "2026-11-22T06:31:02+00:00")
    reporter.working(progress)
    reporter.notice("a worker was replaced")
    seen = status.Status(
        "s3://tas/store/runs/20261122T062545.265Z-f39961c98fe2", "working", 4.0, reporter._body
    )
    assert "\n".join(["```", *status_text.lines(seen), "```"]) in GUIDE.read_text()
    reporter.end("stopped", 75, "")


# --- the log
# ---------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_one_line_of_json_too(
    corpus: str,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("on two\nlines \x1b[31m")

    monkeypatch.setattr(run_claims, "begin_run", fail)
    config = tmp_path / "run.toml"
    config.write_text(
        f'model = "{tiny_bert}"\nstore = "{tmp_path}/s"\ndtype = "float32"\nlog_format = "json"\n'
    )
    with pytest.raises(SystemExit) as end:
        cli.main(["run", corpus, "--config", str(config), "--executor", "inline"])
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (end.value.code, last["exit_code"], last["event"], last["level"]) == (
        1,
        1,
        "failed",
        "error",
    )
    assert (
        last["message"] == "RuntimeError: on two\nlines \x1b[31m" and "in fail" in last["traceback"]
    )
    log_as("text", quiet=False)


def test_what_is_wrong_with_the_config_is_one_line_of_json_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.toml").write_text("modle = 1\n")
    for flags in (
        ["--config", str(tmp_path / "nope.toml")],
        ["--config", str(tmp_path / "odd.toml")],
        ["--rate", "r"],
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["run", *flags, "--log-format", "json"])
        (line,) = map(json.loads, capsys.readouterr().err.splitlines())
        assert (line["event"], line["exit_code"], end.value.code) == ("failed", 2, 2)
    log_as("text", quiet=False)


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_quiet_run_still_warns(
    form: str,
    corpus: str,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def notice(config: Any, task: Any, shards: Any, on_progress: Any, composed: Any) -> State:
        failures = {shards[0].id: "it failed"}
        on_progress(
            Progress(len(shards), failures=tuple(failures.items()), notices=("be careful",))
        )
        return State(len(shards), failures=failures)

    monkeypatch.setattr(cluster, "process_shards", notice)
    with pytest.raises(SystemExit) as end:
        cli.main(
            [
                "run",
                corpus,
                "--model",
                str(tiny_bert),
                "--store",
                str(tmp_path / "s"),
                "--dtype",
                "float32",
                "--executor",
                "inline",
                "--quiet",
                "--log-format",
                form,
            ]
        )
    assert end.value.code == 1
    said = capsys.readouterr().err.splitlines()
    if form == "json":
        warning, failed = map(json.loads, said)
        assert (warning["event"], warning["message"], failed["event"]) == (
            "warning",
            "be careful",
            "failed",
        )
        (run,) = Path(tmp_path, "s", "runs").iterdir()
        assert warning["run"] == failed["run"] == run.name
    else:
        assert said[0] == "warning: be careful" and said[1].startswith("afn: 1 of ")
    log_as("text", quiet=False)


def test_progress_is_a_record_with_counts(caplog: pytest.LogCaptureFixture) -> None:
    lines = logs.Lines("json")
    state = Progress(
        10,
        num_workers=2,
        num_ready=1,
        num_running=3,
        seconds=10.0,
        num_documents=900,
        work=Counters(7, 100, 120, measured=9.4),
    )
    with caplog.at_level("INFO", logs.ROOT):
        on_event = log_json(lines)
        on_event(Planned("10 shards", run="a-run"))
        on_event(Working(state))
        on_event(Working(state))  # too soon
        on_event(Warned("be careful"))
    planned, progress, warning = (json.loads(lines.format(record)) for record in caplog.records)
    assert planned["event"] == "planned" and progress["run"] == "a-run"
    assert (progress["event"], progress["tokens_per_s"], progress["left_s"]) == (
        "progress",
        10.0,
        None,
    )
    assert progress["counts"] == {
        "shards": 10,
        "done": 0,
        "quarantined": 0,
        "running": 3,
        "retries": 0,
        "workers": 2,
        "workers_ready": 1,
        "documents": 7,
        "tokens": 100,
        "lost_bytes": 0,
        "documents_measured": 9,
        "documents_planned": 900,
    }
    assert (warning["level"], warning["message"]) == ("warning", "be careful")


# --- a live run
# ------------------------------------------------------------------------------------------

LIVE = """
import os, re, signal, sys, time, urllib.request
from pathlib import Path
import ray
from afn_ray.cli import commands as cli
from afn_ray.runs.cluster import access, pool
from afn_ray.errors import CorpusChanged

class Unlucky(pool._Worker):
    def process(self, shard, oom_retries):
        text, mark = Path(shard.slices[0].uri).read_text(), Path(shard.slices[0].uri + ".tried")
        if "gone" in text:
            raise CorpusChanged("it is another file now")
        if "killed" in text and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().process(shard, oom_retries)

pool._Worker = Unlucky
access.start_local(num_cpus=2, object_store_memory=128 << 20,
                   _system_config={"metrics_report_interval_ms": 1000})
try:
    cli.main(sys.argv[2:])
except SystemExit as end:
    code = end.code
(node,) = ray.nodes()
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
shards = len(list(Path(sys.argv[1]).rglob("commit.json")))
until, text = time.monotonic() + 30, ""
done = re.compile(rf"^ray_afn_shards_total.* {shards}\\.0$", re.M)
while not done.search(text):
    assert time.monotonic() < until, text
    time.sleep(0.5)
    text = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).read().decode()
time.sleep(2)
text = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).read().decode()
Path(sys.argv[1] + ".metrics").write_text(text)
logs = Path(ray._private.worker._global_node.get_logs_dir_path())
texts = [p.read_text() for p in sorted(logs.glob("worker-*.err"))]
Path(sys.argv[1] + ".workers").write_text("".join(texts))
ray.shutdown()
sys.exit(code)
"""


@dataclass(frozen=True)
class Live:
    """A run on Ray in which a worker was killed, a shard given up and a document quarantined."""

    uri: str
    store: str
    info: RunInfo
    driver: list[dict[str, Any]]  # lines of its log
    workers: list[dict[str, Any]]
    texts: tuple[str, ...]  # the logs as they are
    types: dict[str, str]  # metric -> type
    series: dict[str, list[float]]  # sample name -> values


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Live:
    folder = tmp_path_factory.mktemp("live")
    rows: list[list[dict[str, str] | str]] = [
        [{"text": f"{MARK} and it was so, number {i}. " * 9}] for i in range(6)
    ]
    rows[1].append({"text": "killed"})
    rows[3].append({"text": "gone"})
    rows[4].append("no JSON")
    for i, documents in enumerate(rows):
        write_jsonl(folder / f"{i}.jsonl", documents)
    store = str(folder / "store")
    command = [
        "run",
        f"{folder}/*.jsonl",
        "--model",
        str(tiny_bert),
        "--store",
        store,
        "--executor",
        "ray",
        "--workers",
        "1",
        "--shard-bytes",
        "1024",
        "--dtype",
        "float32",
        "--allow-quarantined",
        "9",
        "--log-format",
        "json",
    ]
    script = folder / "script.py"
    script.write_text(LIVE)
    python = warm_workers.choose(has_faults=False)  # its Ray's workers are forks too
    done = subprocess.run(
        [python, script, store, *command], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    workers = Path(f"{store}.workers").read_text()
    types: dict[str, str] = {}
    series: dict[str, list[float]] = {}
    for line in Path(f"{store}.metrics").read_text().splitlines():
        if line.startswith("# TYPE "):
            types[line.split()[2]] = line.split()[3]
        elif found := re.fullmatch(r"(ray_afn_\w+)\{.*\} (\S+)", line):
            series.setdefault(found[1], []).append(float(found[2]))
    run = manifest.find_run(store)
    parsed = [json.loads(line) for line in workers.splitlines() if line.startswith("{")]
    return Live(
        run.uri,
        store,
        run.info,
        [json.loads(line) for line in done.stderr.splitlines()],
        parsed,
        (done.stderr, workers),
        types,
        series,
    )


@pytest.mark.ray
def test_metrics_of_a_live_run_are_its_counts_each_once(live: Live) -> None:
    expected = {f"ray_{name}": "counter" for name in COUNTERS} | {
        f"ray_{name}": "gauge" for name in GAUGES
    }
    expected[f"ray_{SHARD_SECONDS}"] = "histogram"
    assert {k: v for k, v in live.types.items() if k.startswith("ray_afn_")} == expected
    buckets = f"ray_{SHARD_SECONDS}_bucket"
    assert {name for name, values in live.series.items() if len(values) > 1} == {
        buckets
    }  # a worker was restarted
    value = {name: values[0] for name, values in live.series.items()}
    counts, commits = live.info["counts"], list(Path(live.store).rglob("commit.json"))
    committed = [json.loads(path.read_text()) for path in commits]
    assert counts["quarantined"] == 1 and counts["shards_quarantined"] >= 1
    assert {name: value[f"ray_afn_{name}"] for name in EXACT} == {
        "tokens_total": counts["tokens"],
        "documents_total": counts["documents"],
        "documents_quarantined_total": counts["quarantined"],
        "shards_total": counts["shards"],
        "bytes_read_total": sum(piece["num_bytes"] for c in committed for piece in c["slices"]),
        "bytes_written_total": sum(
            p.stat().st_size for p in Path(live.store, "shards").rglob("*.parquet")
        ),
        "shards_quarantined": counts["shards_quarantined"],
        "shard_seconds_count": counts["shards"],
        "shards_queued": 0,
        "shards_running": 0,
        "workers_wanted": 0,
        "workers_ready": 0,
    }
    assert value["ray_afn_retries_total"] >= 1 and value["ray_afn_workers_lost_total"] == 1
    assert 0 < value["ray_afn_measured_tokens_total"] <= value["ray_afn_forward_tokens_total"]
    assert value["ray_afn_measured_tokens_total"] >= min(c["counts"]["tokens"] for c in committed)
    newest = max(path.stat().st_mtime for path in commits)
    assert abs(value["ray_afn_last_commit_timestamp_seconds"] - newest) < 5
    end = json.loads(Path(live.uri, "status.json").read_text())
    assert (end["bytes_read"], end["bytes_written"], end["retries"]) == tuple(
        value[f"ray_afn_{name}_total"] for name in ("bytes_read", "bytes_written", "retries")
    )


@pytest.mark.ray
def test_the_log_of_a_live_run_has_every_shard_and_attempt_and_no_text(live: Live) -> None:
    assert all(
        {"time", "level", "event", "message"} <= line.keys()
        for line in (*live.driver, *live.workers)
    )
    events = Counter(line["event"] for line in live.driver)
    assert events.keys() >= {
        "planned",
        "starting",
        "worker_ready",
        "worker_gone",
        "shard_handed",
        "shard_done",
        "shard_retried",
        "shard_quarantined",
        "reducing",
        "complete",
    }
    counts = live.info["counts"]
    assert (
        events["shard_done"] == counts["shards"]
        and events["shard_quarantined"] == counts["shards_quarantined"]
    )
    assert (
        events["shard_handed"]
        >= events["shard_done"] + events["shard_quarantined"] + events["shard_retried"]
    )
    done = [line for line in live.driver if line["event"] == "shard_done"]
    assert sum(line["counts"]["tokens"] for line in done) == counts["tokens"]
    first = next(i for i, line in enumerate(live.driver) if line["event"] == "planned")
    assert {line["run"] for line in (*live.driver[first:], *live.workers)} == {live.info["id"]}
    committed = [json.loads(path.read_text()) for path in Path(live.store).rglob("commit.json")]
    commits = {commit["shard"]: commit["attempt"] for commit in committed}
    assert {line["shard"]: line["attempt"] for line in done} == commits
    written = [line for line in live.workers if line["event"] == "attempt_committed"]
    assert {line["shard"]: line["attempt"] for line in written} == commits
    assert all(line["worker"] == 0 and line["counts"]["windows"] for line in written)
    assert {line["attempt"] for line in live.workers if line["event"] == "attempt_began"} >= set(
        commits.values()
    )
    assert all(MARK not in text and os.environ["RAY_AUTH_TOKEN"] not in text for text in live.texts)


@pytest.mark.ray
def test_dashboard_and_rules_name_only_what_a_live_run_exports(live: Live) -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    board = json.loads((MONITORING / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [
        variable["definition"]
        for variable in board["templating"]["list"]
        if "definition" in variable
    ]
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    named = {
        name
        for text in (*asked, *(r["expr"] for r in rules))
        for name in re.findall(r"\bray_\w+", text)
    }
    gpus = "ray_node_gpus_utilization"
    assert named - {gpus} <= live.series.keys() and gpus.removeprefix("ray_") in METRICS_GAUGES
    assert {f"ray_{name}" for name in (*COUNTERS, *GAUGES)} <= named  # each is looked at
    assert all({"summary", "description", "action"} <= rule["annotations"].keys() for rule in rules)
    assert {panel["type"] for panel in board["panels"]} == {"stat", "timeseries"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in board["panels"])
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in board["panels"])
    guide = GUIDE.read_text()
    assert set(re.findall(r"^\| `(ray_afn_\w+)` \| (\w+) ", guide, re.M)) == {
        (k, v) for k, v in live.types.items() if k.startswith("ray_afn_")
    }
    assert re.findall(r"^\| `(Afn\w+)`", guide, re.M) == [rule["alert"] for rule in rules]
    told = set(re.findall(r"`([a-z_]+)`", guide))
    assert {line["event"] for line in (*live.driver, *live.workers)} <= told


# --- rules and guide
# -------------------------------------------------------------------------------------


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None and not os.environ.get("CI"):
        pytest.skip("no promtool; Debian's package prometheus has it")
    assert found is not None
    return found


@pytest.mark.parametrize(
    "what", [("check", "config", "prometheus.yaml"), ("test", "rules", "alerts-test.yaml")]
)
def test_rules_are_right_and_each_fires_when_it_should_and_not_before(
    promtool: str, what: tuple[str, ...]
) -> None:
    done = subprocess.run([promtool, *what], cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_every_alert_is_tried_both_ways() -> None:
    tests = yaml.safe_load((MONITORING / "alerts-test.yaml").read_text())["tests"]
    tried = {
        (case["alertname"], bool(case["exp_alerts"]))
        for test in tests
        for case in test["alert_rule_test"]
    }
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    assert tried == {
        (rule["alert"], fires) for g in groups for rule in g["rules"] for fires in (True, False)
    }


def test_every_query_of_the_dashboard_is_promql(promtool: str, tmp_path: Path) -> None:
    board = json.loads((MONITORING / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"panel:{i}", "expr": text.replace("$__rate_interval", "1m")}
        for i, text in enumerate(asked)
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(asked)} rules found" in done.stdout, (
        done.stdout + done.stderr
    )


def test_the_pod_monitor_asks_for_the_port_that_pods_name() -> None:
    monitor = yaml.safe_load((INFRA / "kubernetes" / "monitoring" / "podmonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    (expression,) = monitor["spec"]["selector"]["matchExpressions"]
    assert expression["key"] == "ray.io/node-type" and expression["values"] == ["head", "worker"]
    assert [end["port"] for end in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


def test_commands_of_the_guide_run(
    make_config: MakeConfig, promtool: str, tmp_path: Path, tiny_bert: Path
) -> None:
    corpus = write_jsonl(tmp_path / "king-james.jsonl", [{"text": "in the beginning"}])
    with afn_ray.run(make_config(corpus=(str(corpus),), store=str(tmp_path / "afn-demo"))):
        pass
    (tmp_path / "model").symlink_to(tiny_bert)
    (tmp_path / "infra").symlink_to(MONITORING.parent)
    commands = [
        block for block in fenced(GUIDE.read_text(), "sh") if not block.startswith("pip install ")
    ]
    assert len(commands) == 4
    shim = f'afn() {{ "{warm_workers.choose(has_faults=False)}" -m afn_ray "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shim + "".join(commands)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(MONITORING.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert "state    complete since" in done.stdout and '"state": "complete"' in done.stdout
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["event"] == "complete" and {line["run"] for line in log if "shard" in line} != {
        ""
    }
    (toml,) = fenced(GUIDE.read_text(), "toml")
    assert make_config(**tomllib.loads(toml)).log_format == "json"
