"""What no kept run refers to goes and nothing else, wherever the collection is stopped and whoever else is there."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import rewrite, write_jsonl
from fsspec.implementations.memory import MemoryFileSystem

import afn_ray
from afn_ray import cli, collect_garbage, manifest, storage, verify_store
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, Interrupted, StoreError
from afn_ray.garbage import Garbage

NIGHTS = ("ab", "Ab", "AB", "aB")
"""Of a corpus of two files, each in one of two states; the last night has nothing that no earlier one had."""


def set_corpus(folder: Path, night: str, verses: list[str]) -> Path:
    for file, state in zip(("1.jsonl", "2.jsonl"), night, strict=True):
        texts = verses[40:60] if file == "2.jsonl" else verses[:20]
        write_jsonl(folder / file, [{"text": t.upper() if state.isupper() else t} for t in texts])
    return folder


def config_of(folder: Path, model: Path, store: str) -> RunConfig:
    return RunConfig(
        corpus=(str(folder),), model=str(model), store=store, executor="inline", shard_bytes=1024, batch_tokens=256,
        dtype="float32", layers="2",
    )  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A store of four nights, and the corpus that it is of."""

    corpus: Path
    store: Path
    runs: tuple[str, ...]  # names

    def copy(self, target: str) -> str:
        for file in self.store.rglob("*"):
            if file.is_file():
                storage.upload(file, f"{target}/{file.relative_to(self.store)}")
        return storage.absolute(target)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> Made:
    folder = tmp_path_factory.mktemp("garbage")
    (folder / "corpus").mkdir()
    names = []
    for night in NIGHTS:
        set_corpus(folder / "corpus", night, verses)
        with afn_ray.run(config_of(folder / "corpus", tiny_bert, str(folder / "store"))) as run:
            names.append(run.uri.rpartition("/")[2])
            assert run.info["counts"]["shards"] == 6
    assert run.info["counts"]["shards_reused"] == run.info["counts"]["shards"]
    return Made(folder / "corpus", folder / "store", tuple(names))


@pytest.fixture
def store(made: Made, tmp_path: Path) -> str:
    return made.copy(str(tmp_path / "store"))


def files_of(store: str) -> dict[str, int]:
    return {f.uri: f.size for f in storage.list_below(store)}


def planned(store: str, runs: Iterator[str] | tuple[str, ...]) -> set[str]:
    """Shards that the plans of ``runs`` list, read without the product's code."""
    plans = (pq.read_table(pa.BufferReader(storage.read_bytes(f"{store}/runs/{n}/plan.parquet"))) for n in runs)
    return {shard for plan in plans for shard in plan["shard"].to_pylist()}


def expected(store: str, kept: tuple[str, ...]) -> dict[str, int]:
    """The files that stay when ``kept`` does."""
    shards = planned(store, kept)
    return {
        uri: size for uri, size in files_of(store).items()
        if any(f"/runs/{name}/" in uri for name in kept) or uri.split("/")[-2] in shards
    }  # fmt: skip


def check_whole(store: str, runs: tuple[str, ...]) -> None:
    """All is as it was committed, and ``runs`` are complete and can be asked."""
    found = verify_store(store)
    assert not found.findings and not found.unproved and found.num_runs >= len(runs)
    for name in runs:
        with afn_ray.open_run(f"{store}/runs/{name}") as run:
            ((got,),) = run.sql("SELECT count(*) FROM tokens").fetchall()
            assert got == run.info["counts"]["tokens"] > 0


def collect(store: str, **options: Any) -> Garbage:
    return collect_garbage(store, **{"min_age_h": 0, "keep": 1} | options)


# --- what goes, what stays -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 99])
def test_exactly_what_no_kept_run_lists_goes(made: Made, store: str, keep: int) -> None:
    kept = made.runs[-keep:]
    before, stays = files_of(store), expected(store, kept)
    dry = collect(store, keep=keep)
    assert files_of(store) == before and not dry.deleted
    assert dry.kept == kept and dry.num_young == 0
    assert (dry.num_files, dry.num_bytes) == (len(before) - len(stays), sum(before.values()) - sum(stays.values()))
    assert [r.uri for r in dry.runs] == [f"{store}/runs/{n}" for n in made.runs[:-keep]]
    assert len(dry.shards) == {1: 6, 2: 3}.get(keep, 0)
    done = collect(store, keep=keep, delete=True)
    assert done.deleted and (done.runs, done.shards, done.kept) == (dry.runs, dry.shards, dry.kept)
    assert files_of(store) == stays
    empty = [d for d in Path(store).rglob("*") if d.is_dir() and not any(d.iterdir())]
    assert not empty
    again = collect(store, keep=keep, delete=True)
    assert not again.runs and not again.shards and files_of(store) == stays
    check_whole(store, kept)


def test_every_kind_of_store(made: Made, place: str) -> None:
    store = made.copy(place)
    stays = expected(store, made.runs[-1:])
    assert len(stays) < len(files_of(store))
    collect(store, delete=True)
    assert files_of(store) == stays
    check_whole(store, made.runs[-1:])


def test_a_removed_document_leaves_the_run_and_garbage_the_store(
    made: Made, store: str, tiny_bert: Path, verses: list[str]
) -> None:
    set_corpus(made.corpus, NIGHTS[-1], verses)
    (made.corpus / "2.jsonl").unlink()
    with afn_ray.run(config_of(made.corpus, tiny_bert, store)) as run:
        sources = {row[0] for row in run.sql("SELECT DISTINCT source FROM documents").fetchall()}
    assert sources == {str(made.corpus / "1.jsonl")}
    shards = {uri.split("/")[-2] for uri in files_of(store) if "/shards/" in uri}
    assert planned(store, made.runs) == shards
    collect(store, delete=True)
    after = {uri.split("/")[-2] for uri in files_of(store) if "/shards/" in uri}
    assert after == planned(store, (run.uri.rpartition("/")[2],)) < shards


def test_a_run_that_is_named_is_kept(made: Made, store: str) -> None:
    kept = (made.runs[0], made.runs[2], made.runs[3])
    found = collect(store, keep_runs=[made.runs[0], f"{store}/runs/{made.runs[2]}/"])
    assert found.kept == kept
    for run in ("20990101T000000.000Z-000000000000", f"/elsewhere/runs/{made.runs[0]}"):
        with pytest.raises(StoreError, match=f"has no run {run} to keep"):
            collect(store, keep_runs=[run])
    collect(store, keep_runs=[made.runs[0], made.runs[2]], delete=True)
    check_whole(store, kept)


def test_the_newest_audited_run_is_kept_for_the_next_audit(made: Made, store: str) -> None:
    for name in made.runs[:2]:
        manifest.mark_audited(manifest.open_folder(store, name))
    left = collect_garbage(store, keep=1, min_age_h=0, delete=True)
    assert set(left.kept) == {made.runs[1], made.runs[-1]}
    assert not verify_store(store).findings


def test_runs_that_may_be_under_way_are_kept(made: Made, store: str) -> None:
    storage.delete([f"{store}/runs/{name}/run.json" for name in (made.runs[0], made.runs[3])])
    found = collect(store)
    assert found.kept == made.runs[2:]  # the newest complete one, and the one begun after it
    assert collect(store, min_age_h=24).kept == (made.runs[0], *made.runs[2:])
    for file in storage.list_below(store):
        os.utime(file.uri, (0, 0))
    assert collect(store, min_age_h=24).kept == made.runs[2:]
    shard = sorted(planned(store, (made.runs[0],)) - planned(store, made.runs[2:]))[0]
    (commit,) = (uri for uri in files_of(store) if f"/{shard}/commit.json" in uri)
    os.utime(commit)  # somebody is at work on a plan that another run has overtaken
    assert collect(store, min_age_h=24).kept == (made.runs[0], *made.runs[2:])


def test_a_store_of_runs_that_never_ended_loses_nothing(made: Made, store: str) -> None:
    storage.delete([f"{store}/runs/{name}/run.json" for name in made.runs])
    found = collect(store, delete=True)
    assert found.kept == made.runs and not found.runs and not found.shards


def test_young_shards_stay(made: Made, store: str) -> None:
    garbage = collect(store)
    old = garbage.shards[0].uri
    for name in storage.list_names(old):
        os.utime(f"{old}/{name}", (0, 0))
    found = collect(store, min_age_h=24, delete=True)
    assert [s.uri for s in found.shards] == [old] and found.num_young == len(garbage.shards) - 1
    assert len(found.runs) == 3
    assert collect(store).shards == garbage.shards[1:]


def test_pilots_and_what_is_not_ours_stay(made: Made, store: str) -> None:
    manifest.write_pilot(store, "abc", {"dtype": "float32"})
    garbage = collect(store)
    foreign = [f"{garbage.runs[0].uri}/report.html", f"{garbage.shards[0].uri}/notes.txt", f"{store}/x/commit.json",
               f"{store}/runs/mine/notes.txt"]  # fmt: skip
    for uri in foreign:
        storage.write_once(uri, b"x")
    collect(store, delete=True)
    assert {*foreign, f"{store}/pilots/abc.json"} < set(files_of(store))
    assert set(verify_store(store).foreign) == set(foreign)
    assert not collect(store).runs and not collect(store).shards


# --- stopped anywhere ------------------------------------------------------------------------------------


def stop_at(patch: pytest.MonkeyPatch, n: int, error: BaseException) -> list[str]:
    """From the ``n``-th file on nothing is removed any more, as if this process had died; gives what was."""
    remove, turn, gone = storage.remove, itertools.count(), []

    def removes(uri: str, retry_for_s: float | None = None) -> None:
        if "/probe-" in uri:  # by which the time was asked
            remove(uri, retry_for_s)
            return
        if next(turn) >= n:
            raise error
        remove(uri, retry_for_s)
        gone.append(uri)

    patch.setattr(storage, "remove", removes)
    return gone


def test_what_refers_goes_before_what_it_refers_to(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = stop_at(monkeypatch, 10**6, KeyboardInterrupt())
    found = collect(store, delete=True)
    assert len(gone) == found.num_files == len(set(gone))
    is_run = ["/runs/" in uri for uri in gone]
    assert is_run == sorted(is_run, reverse=True)
    for folder in (*found.runs, *found.shards):
        first, *rest = (uri for uri in gone if uri.startswith(f"{folder.uri}/"))
        assert first.endswith(("/run.json", "/commit.json")) and len(rest) == folder.num_files - 1


def test_killed_at_any_point_the_store_is_whole_and_the_next_call_ends_it(made: Made, tmp_path: Path) -> None:
    kept = made.runs[-1:]
    total = collect(made.copy(str(tmp_path / "all"))).num_files
    assert total > 25
    for n in range(total):
        store = made.copy(str(tmp_path / f"{n}"))
        stays = expected(store, kept)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            assert stop_at(patch, n, KeyboardInterrupt()) == []
            collect(store, delete=True)
        left = files_of(store)
        assert len(left) == len(stays) + total - n and stays.items() <= left.items()
        for uri in left:
            folder = uri.rpartition("/")[0]
            if uri.endswith("/commit.json"):
                named = json.loads(storage.read_bytes(uri))["files"].values()
                assert all(f"{folder}/{file['name']}" in left for file in named)
            elif uri.endswith("/run.json"):
                committed = {u.split("/")[-2] for u in left if u.endswith("/commit.json")}
                assert planned(store, (folder.rpartition("/")[2],)) <= committed
        if n % 14 == 0:
            check_whole(store, kept)
        collect(store, delete=True)
        assert files_of(store) == stays
    check_whole(store, kept)


def test_what_may_not_be_deleted_keeps_what_it_names(made: Made, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made.copy(memory)
    remove = MemoryFileSystem.rm_file

    def guarded(self: MemoryFileSystem, path: str) -> None:
        if path.endswith("commit.json"):
            raise PermissionError("delete is not allowed")
        remove(self, path)

    monkeypatch.setattr(MemoryFileSystem, "rm_file", guarded)
    with pytest.raises(StoreError, match=r"deleting .*/commit\.json: permission denied"):
        collect(store, delete=True)
    check_whole(store, made.runs[-1:])
    assert planned(store, made.runs[-1:]) < {u.split("/")[-2] for u in files_of(store) if "-tokens.parquet" in u}


def test_a_store_that_does_not_answer_is_no_store_that_is_clean(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 3, Interrupted("no answer"))
    with pytest.raises(Interrupted):
        collect(store, delete=True)


# --- beside others ---------------------------------------------------------------------------------------


def test_two_collections_at_once_do_what_one_does(made: Made, tmp_path: Path) -> None:
    for turn in range(5):
        store = made.copy(str(tmp_path / f"{turn}"))
        stays = expected(store, made.runs[-1:])
        start, errors = threading.Barrier(2), []

        def one(store: str = store, start: threading.Barrier = start, errors: list[Any] = errors) -> None:
            start.wait()
            try:
                collect(store, delete=True)
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == [] and files_of(store) == stays


def test_a_run_begun_meanwhile_keeps_its_shards(made: Made, store: str, tiny_bert: Path, verses: list[str]) -> None:
    """The corpus is what it was two nights ago: the run that begins finds old shards that were about to go."""
    begun: list[str] = []
    set_corpus(made.corpus, NIGHTS[1], verses)

    def on_progress(message: str) -> None:
        if not begun:
            with afn_ray.run(config_of(made.corpus, tiny_bert, store)) as run:
                begun.append(run.uri.rpartition("/")[2])
                assert run.info["counts"]["shards_reused"] == run.info["counts"]["shards"]

    doomed = {shard.uri.rpartition("/")[2] for shard in collect(store).shards}
    done = collect(store, delete=True, on_progress=on_progress)
    found = {shard.uri.rpartition("/")[2] for shard in done.shards}
    assert found == doomed - planned(store, tuple(begun)) and found < doomed
    check_whole(store, (made.runs[-1], *begun))


def test_a_run_that_found_what_went_the_next_instant_is_finished_by_the_same_command(
    made: Made, store: str, tiny_bert: Path, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one moment that no order closes: runs were looked at, this one begins and finds a commit, the commit goes."""
    set_corpus(made.corpus, NIGHTS[1], verses)
    config = config_of(made.corpus, tiny_bert, store)
    find = manifest.find_commits

    garbage = [shard.uri for shard in collect(store).shards[:2]]

    def find_in_vain(*args: Any) -> Any:
        found = find(*args)
        storage.delete([f"{uri}/{name}" for uri in garbage for name in storage.list_names(uri)])
        return found

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="no such file"):
        patch.setattr(manifest, "find_commits", find_in_vain)
        afn_ray.run(config)
    with afn_ray.run(config) as run:
        assert run.info["counts"]["shards_reused"] == run.info["counts"]["shards"] - 2
    collect(store, delete=True)
    check_whole(store, (run.uri.rpartition("/")[2],))


# --- what cannot be known --------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[str], None]] = {
    "damaged": lambda uri: rewrite(uri, b"PAR1 and no more"),
    "gone": lambda uri: storage.delete([uri]),
    "another's": lambda uri: rewrite(uri, storage.read_bytes(sibling(uri))),
}


def sibling(uri: str) -> str:
    run = uri.rsplit("/", 2)[0]
    return next(f.uri for f in storage.list_below(run) if f.uri.endswith("/plan.parquet") and f.uri != uri)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_plan_that_cannot_be_read_stops_it_all(made: Made, store: str, damage: str) -> None:
    plan = f"{store}/runs/{made.runs[-1]}/plan.parquet"
    DAMAGES[damage](plan)
    before = files_of(store)
    with pytest.raises(StoreError, match=r"plan\.parquet.*no shard can be deleted. Restore its plan, or delete"):
        collect(store, delete=True)
    assert files_of(store) == before
    storage.delete([f"{store}/runs/{made.runs[-1]}/{name}" for name in storage.list_names(plan.rsplit("/", 1)[0])])
    assert collect(store, delete=True).kept == made.runs[-2:-1]


def test_the_plan_of_a_run_that_goes_need_not_be_readable(made: Made, store: str) -> None:
    rewrite(f"{store}/runs/{made.runs[0]}/plan.parquet", b"PAR1 and no more")
    assert collect(store, delete=True).kept == made.runs[-1:]
    check_whole(store, made.runs[-1:])


def test_wrong_requests_are_refused(store: str, made: Made, tmp_path: Path) -> None:
    for options in ({"keep": 0}, {"min_age_h": -1}, {"min_age_h": float("nan")}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} is .*; expected"):
            collect(store, **options)
    for uri in (str(tmp_path / "nothing"), f"{store}/runs/{made.runs[0]}"):
        with pytest.raises(StoreError, match="is no store"):
            collect(uri)


# --- the command -----------------------------------------------------------------------------------------


def afn(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "afn_ray", *args], capture_output=True, text=True, timeout=300)


def test_the_command_lists_and_what_it_names_deletes(made: Made, store: str) -> None:
    before, stays = files_of(store), expected(store, made.runs[-1:])
    listed = afn("gc", store, "--keep", "1", "--min-age-h", "0")
    assert (listed.returncode, listed.stderr) == (0, "") and files_of(store) == before
    *each, sums, last = listed.stdout.splitlines()
    found = collect(store)
    assert [line.split()[1].rstrip(":") for line in each] == [f.uri for f in (*found.runs, *found.shards)]
    assert sums.startswith(f"to delete: 3 runs and {len(found.shards)} shards, {found.num_files} files, ")
    assert sums.endswith("; 1 run kept")
    said, command = last.split(": ", 1)
    assert said == "nothing was deleted; this does it"
    done = afn(*shlex.split(command)[1:])
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("deleted: 3 runs and ")
    assert files_of(store) == stays


def test_the_command_tells_machines_and_says_what_is_wrong(
    made: Made, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def gc(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["gc", store, *args])
        return int(str(left.value.code)), *capsys.readouterr()

    code, out, _ = gc("--keep", "1", "--min-age-h", "0", "--json")
    found = json.loads(out)
    assert code == 0 and found["kept"] == [made.runs[-1]] and len(found["shards"]) == 6 and not found["deleted"]
    assert gc()[1] == f"nothing to delete; 4 runs kept, from {made.runs[0]} to {made.runs[-1]}\n"
    code, _, said = gc("--keep-run", "nothing")
    assert code == 2 and "has no run nothing to keep" in said
