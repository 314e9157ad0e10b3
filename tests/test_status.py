"""What can be seen of a run: its status in the store, its log as JSON, its metrics, and rules that judge these."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import stop_after, write_jsonl

import afn_ray
from afn_ray import garbage, manifest, status, storage, verify
from afn_ray.config import RunConfig
from afn_ray.dispatch import State
from afn_ray.errors import ConfigError, IncompleteRun, StoreError
from afn_ray.pipeline import Progress

MakeConfig = Callable[..., RunConfig]
MONITORING = Path(__file__).parents[1] / "infra" / "monitoring"


@pytest.fixture
def corpus(tmp_path: Path, verses: list[str]) -> str:
    return str(write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:60]]))


def read(config: RunConfig) -> status.Status:
    return status.read_status(config.store)[0]


# --- the file --------------------------------------------------------------------------------------------


def test_a_run_tells_how_far_it_is_from_its_plan_to_its_end(
    make_config: MakeConfig, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "LEAST_S", 0.0)
    monkeypatch.setattr(status, "EVERY_S", 0.0)
    config, told = make_config(corpus=(corpus,)), {}

    def look(event: Any) -> None:
        until = time.monotonic() + 10
        while event.kind in ("starting", "reducing") and event.kind not in told and time.monotonic() < until:
            if (found := read(config)).state == event.kind:
                told[event.kind] = found

    with afn_ray.run(config, look) as run:
        counts = run.info["counts"]
    assert list(told) == ["starting", "reducing"]
    assert told["starting"].exit_code == status.UNDER_WAY
    assert told["starting"].body["shards"] | {"planned": 0} == dict.fromkeys(
        ("planned", "reused", "done", "running", "quarantined"), 0
    )  # fmt: skip
    body = told["reducing"].body
    assert body["shards"]["done"] == body["shards"]["planned"] == counts["shards"]
    assert {k: body[k] for k in ("tokens", "documents")} == {k: counts[k] for k in ("tokens", "documents")}
    assert body["documents_quarantined"] == counts["quarantined"]
    assert body["bytes_read"] == Path(corpus).stat().st_size
    written = Path(config.store, "shards").rglob("*.parquet")
    assert body["bytes_written"] == sum(path.stat().st_size for path in written)
    end = json.loads(Path(run.uri, "status.json").read_text())
    assert (end["phase"], end["exit_code"], end["tokens"]) == ("complete", 0, counts["tokens"])
    found = read(config)
    assert (found.state, found.exit_code, found.body["tokens"]) == ("complete", 0, counts["tokens"])
    assert not Path(config.store, "planning.json").exists()


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
    assert "the same command resumes" in "\n".join(status.lines(stopped))
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
    begin = manifest.begin_run

    def change_one(*args: Any) -> Any:
        (tmp_path / "1.txt").write_text("something else")
        return begin(*args)

    monkeypatch.setattr(manifest, "begin_run", change_one)
    with pytest.raises(IncompleteRun):
        afn_ray.run(config)
    found = read(config)
    assert (found.state, found.exit_code, found.body["exit_code"]) == ("failed", 1, 1)
    (failure,) = found.body["failures"]
    assert failure["uri"].endswith("/1.txt") or failure["uri"].endswith("/0.txt")  # a shard is named by its first file
    assert failure["reason"].startswith("CorpusChanged: ") and found.body["num_failures"] == 1
    text = "\n".join(status.lines(found))
    assert failure["reason"] in text and "exit code 1" in text


def test_what_fails_before_a_run_has_a_name_is_told_by_its_store(make_config: MakeConfig, corpus: str) -> None:
    config = make_config(corpus=(corpus,))
    with afn_ray.run(config):
        pass
    with pytest.raises(ConfigError):
        afn_ray.run(make_config(corpus=(corpus,), layers="9"))
    failed, before = status.read_status(config.store)
    assert (failed.state, failed.exit_code, before.state) == ("failed", 1, "complete")
    assert "layer 9 does not exist" in "\n".join(status.lines(failed))
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
    file.write_text(json.dumps(json.loads(file.read_text()) | {"phase": "working", "exit_code": None}))
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the clock of this machine was asked"))
    assert read(config).state == "working" and read(config).exit_code == status.UNDER_WAY
    now = file.stat().st_mtime
    os.utime(file, (now - 200, now - 200))
    found = read(config)
    assert (found.state, found.exit_code) == ("silent", status.STOPPED)
    assert "working, but no word for 3 min: killed?" in "\n".join(status.lines(found))
    file.unlink()
    assert (read(config).state, read(config).exit_code) == ("begun", status.STOPPED)


def test_a_store_that_refuses_the_status_is_told_of_once_and_the_run_goes_on(
    make_config: MakeConfig, corpus: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(status, "LEAST_S", 0.0)
    monkeypatch.setattr(status, "EVERY_S", 0.0)
    tries = []

    def refuse(uri: str, data: bytes) -> None:
        tries.append(uri)
        raise StoreError(f"writing {uri}: permission denied")

    monkeypatch.setattr(storage, "write_over", refuse)
    with afn_ray.run(make_config(corpus=(corpus,))) as run:
        assert run.info["counts"]["documents"] == 60
    told = [r for r in caplog.records if "status of the run cannot be written" in r.message]
    assert len(tries) > 1 and len(told) == 1 and "permission denied" in told[0].message


def test_a_status_is_replaced_whole_on_every_filesystem(place: str) -> None:
    uri = f"{place}/runs/x/status.json"
    for text in (b"a long one, to begin with", b"short"):
        for _ in range(9):  # it asks once, and on a bad night that is not enough
            try:
                storage.write_over(uri, text)
            except storage.Unavailable:
                continue
            break
        assert storage.read_bytes(uri) == text
    assert storage.list_names(f"{place}/runs/x") == ["status.json"]
    modified_s = storage.modified_s(uri)
    assert modified_s is not None and modified_s <= storage.clock_s(place)
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
    head, first, *_ = status.table(found)
    assert head.split() == ["STATE", "BEGUN", "SHARDS", "TOKENS", "RUN", "CORPUS"]
    assert first.startswith("complete ") and first.endswith("/20.jsonl") and f"{found[0].body['tokens']:,}" in first
    assert status.read_status(found[1].uri) == (found[1],)
    checked = verify.verify_store(config.store)
    assert not checked.findings and not checked.orphans and not checked.foreign
    left = garbage.collect_garbage(config.store, keep=1, min_age_h=0, delete=True)
    assert len(left.runs) == 1 and len(status.read_status(config.store)) == 1
    assert [p.name for p in Path(config.store, "runs").iterdir()] == [found[0].body["run"]]


def test_what_is_no_store_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="neither a store nor a run"):
        status.read_status(str(tmp_path))


def test_lines_for_people_have_all_that_is_asked_for(make_config: MakeConfig) -> None:
    state = State(
        90, num_workers=8, num_ready=7, num_lost=2, num_running=21, retries=3, seconds=100.0,
        live=Progress(tokens=50_000, forward_tokens=60_000, model_s=60.0, wait_s=40.0, read_s=9.0),
        failures={"bad": "HelperDied: it died"}, notices=["a worker was replaced"],
    )  # fmt: skip
    state.commits = dict.fromkeys("abcdefghi")  # type: ignore[assignment]
    reporter = object.__new__(status.Reporter)
    reporter._body, reporter._reused = {"shards": {}, "last_commit_at": None, "phase": "", "failures": []}, {}
    assert (state.tokens_per_s, state.left_s) == (500.0, 800.0)
    assert status.waits(state.live) == "40% of the time waiting for the corpus"
