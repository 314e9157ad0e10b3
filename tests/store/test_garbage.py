"""gc deletes the files that no kept run refers to, and nothing else, wherever it is stopped and
whatever runs beside it.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import afn_ray
from afn_ray import collect_garbage, verify_store
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, Interrupted, StoreError
from afn_ray.store import calibrations, epochs, manifest, storage, uris, verdicts
from afn_ray.store.garbage import Garbage
from afn_ray.store.gc_report import lines as garbage_lines
from afn_ray.store.layout import RAY_IGNORE
from afn_ray.store.retention import threshold_runs
from afn_ray.store.verdicts import StoredVerdict
from conftest import afn, config_of, rewrite, write_jsonl

NIGHTS = ("ab", "Ab", "AB", "aB")
"""Nights of a corpus of two files, each file in one of two states; the last night has nothing that
no earlier one had.
"""


def set_corpus(folder: Path, night: str, verses: list[str]) -> Path:
    for file, state in zip(("1.jsonl", "2.jsonl"), night, strict=True):
        texts = verses[40:60] if file == "2.jsonl" else verses[:20]
        write_jsonl(folder / file, [{"text": t.upper() if state.isupper() else t} for t in texts])
    return folder


SMALL: dict[str, Any] = {"shard_bytes": 1024, "layers": "2"}


@dataclass(frozen=True)
class Made:
    """A store of four nights, and the corpus that it is of."""

    corpus: Path
    store: Path
    runs: tuple[str, ...]  # names

    def copy(self, target: str) -> str:
        """A copy of the store, whose files are new."""
        if "://" not in target:
            shutil.copytree(self.store, target, copy_function=shutil.copyfile)
            return uris.absolute(target)
        for file in self.store.rglob("*"):
            if file.is_file():
                storage.upload(file, f"{target}/{file.relative_to(self.store)}")
        return uris.absolute(target)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> Made:
    folder = tmp_path_factory.mktemp("garbage")
    (folder / "corpus").mkdir()
    names = []
    for night in NIGHTS:
        set_corpus(folder / "corpus", night, verses)
        with afn_ray.run(
            config_of(tiny_bert, folder / "corpus", str(folder / "store"), **SMALL)
        ) as run:
            names.append(run.uri.rpartition("/")[2])
            assert run.info["counts"]["shards"] == 6
    assert run.info["counts"]["shards_reused"] == run.info["counts"]["shards"]
    return Made(folder / "corpus", folder / "store", tuple(names))


@pytest.fixture
def store(made: Made, tmp_path: Path) -> str:
    return made.copy(str(tmp_path / "store"))


def files_of(store: str) -> dict[str, int]:
    """Size by URI of all files but the store's own: epochs, what is left of a run that went, and
    its .rayignore.
    """
    own = (f"{store}/gc/", f"{store}/{RAY_IGNORE}")
    files = (f for f in storage.list_below(store) if not f.uri.startswith(own))
    return {f.uri: f.size for f in files if not (f.uri.endswith("/run.json") and is_grave(f.uri))}


def is_grave(uri: str) -> bool:
    return "condemned" in json.loads(storage.read_bytes(uri))


def graves(store: str) -> list[str]:
    return [
        f.uri
        for f in storage.list_below(f"{store}/runs")
        if f.uri.endswith("/run.json") and is_grave(f.uri)
    ]


def planned(store: str, runs: Iterator[str] | tuple[str, ...]) -> set[str]:
    """Shards that the plans of ``runs`` list, read without the product's code."""
    plans = (
        pq.read_table(pa.BufferReader(storage.read_bytes(f"{store}/runs/{n}/plan.parquet")))
        for n in runs
    )
    return {shard for plan in plans for shard in plan["shard"].to_pylist()}


def expected(store: str, kept: tuple[str, ...]) -> dict[str, int]:
    """The files that stay when ``kept`` does."""
    shards = planned(store, kept)
    return {
        uri: size
        for uri, size in files_of(store).items()
        if any(f"/runs/{name}/" in uri for name in kept) or uri.split("/")[-2] in shards
    }


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


# --- what goes, what stays
# -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3, 99])
def test_exactly_what_no_kept_run_lists_goes(made: Made, store: str, keep: int) -> None:
    kept = made.runs[-keep:]
    before, stays = files_of(store), expected(store, kept)
    dry = collect(store, keep=keep)
    assert files_of(store) == before and not dry.deleted
    assert dry.kept == kept and dry.num_young == 0
    assert (dry.num_files, dry.num_bytes) == (
        len(before) - len(stays),
        sum(before.values()) - sum(stays.values()),
    )
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
    with afn_ray.run(config_of(tiny_bert, made.corpus, store, **SMALL)) as run:
        sources = {row[0] for row in run.sql("SELECT DISTINCT source FROM documents").fetchall()}
    assert sources == {str(made.corpus / "1.jsonl")}
    shards = {uri.split("/")[-2] for uri in files_of(store) if "/shards/" in uri}
    assert planned(store, made.runs) == shards
    collect(store, delete=True)
    after = {uri.split("/")[-2] for uri in files_of(store) if "/shards/" in uri}
    assert after == planned(store, (run.uri.rpartition("/")[2],)) < shards


def test_a_run_whose_thresholds_a_kept_run_uses_is_named(
    tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    store = str(tmp_path / "store")

    def run(num_texts: int, thresholds: str | None) -> str:
        texts = [{"text": text} for text in verses[:num_texts]]
        corpus = write_jsonl(tmp_path / "c.jsonl", texts)
        config = config_of(tiny_bert, corpus, store, layers="2", screen=0, thresholds=thresholds)
        with afn_ray.run(config) as made:
            return made.uri.rpartition("/")[2]

    first = run(5, None)
    names = [first, run(6, store), run(7, f"{store}/runs/{first}/"), run(8, None)]
    assert threshold_runs(store, names[1:2], names) == {first: names[1]}  # the store
    assert threshold_runs(store, names, names) == threshold_runs(store, names[3:], names) == {}
    found = collect(store, keep=3)
    assert found.kept == tuple(names[1:]) and found.threshold_users == {first: names[2]}
    (said,) = (line for line in garbage_lines(found, []) if "its thresholds label" in line)
    assert f"kept run {names[2]}" in said and f"--keep-run {first}" in said


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


def test_the_newest_run_that_may_be_a_baseline_is_kept_beside_broken_ones(
    made: Made, store: str
) -> None:
    runs = [manifest.open_folder(store, name) for name in made.runs]
    for run, broken in zip(runs, ((), (), ("psi",), ("psi",)), strict=True):
        state = "broken" if broken else "held"
        verdicts.write_verdict(run, StoredVerdict(state, "all", 2, None, broken, (), (), {}))
        manifest.mark_audited(run)
    assert collect(store).kept == (made.runs[1], made.runs[3])
    verdicts.accept(runs[2], "meant")
    assert collect(store).kept == (made.runs[2], made.runs[3])


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


def test_calibrations_and_what_is_not_ours_stay(made: Made, store: str) -> None:
    calibrations.write_calibration(store, "abc", {"dtype": "float32"})
    garbage = collect(store)
    foreign = [
        f"{garbage.runs[0].uri}/report.html",
        f"{garbage.shards[0].uri}/notes.txt",
        f"{store}/x/commit.json",
        f"{store}/runs/mine/notes.txt",
    ]
    for uri in foreign:
        storage.write_once(uri, b"x")
    collect(store, delete=True)
    assert {*foreign, f"{store}/pilots/abc.json"} < set(files_of(store))
    assert set(verify_store(store).foreign) == set(foreign)
    assert not collect(store).runs and not collect(store).shards


# --- stopped anywhere
# ------------------------------------------------------------------------------------


def stop_at(patch: pytest.MonkeyPatch, n: int, error: BaseException) -> list[str]:
    """Remove nothing from the ``n``-th file on any more, as if this process had died; gives
    what was.
    """
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


def test_what_refers_goes_before_what_it_refers_to(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = stop_at(monkeypatch, 10**6, KeyboardInterrupt())
    found = collect(store, delete=True)
    assert len(graves(store)) == len(found.runs) == 3
    assert (
        len(gone) == found.num_files - len(found.runs) == len(set(gone))
    )  # run.json stays, as its grave
    is_run = ["/runs/" in uri for uri in gone]
    assert is_run == sorted(is_run, reverse=True)
    for folder in found.shards:
        first, *rest = (uri for uri in gone if uri.startswith(f"{folder.uri}/"))
        assert first.endswith("/commit.json") and len(rest) == folder.num_files - 1


def test_killed_at_any_point_the_store_is_whole_and_the_next_call_ends_it(
    made: Made, tmp_path: Path
) -> None:
    kept = made.runs[-1:]
    found = collect(made.copy(str(tmp_path / "all")))
    total = found.num_files - len(found.runs)  # run.json stays
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


def test_what_may_not_be_deleted_keeps_what_it_names(
    made: Made, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert planned(store, made.runs[-1:]) < {
        u.split("/")[-2] for u in files_of(store) if "-tokens.parquet" in u
    }


def test_a_store_that_does_not_answer_is_no_store_that_is_clean(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 3, Interrupted("no answer"))
    with pytest.raises(Interrupted):
        collect(store, delete=True)


# --- beside others
# ---------------------------------------------------------------------------------------


def test_two_collections_at_once_do_what_one_does(made: Made, tmp_path: Path) -> None:
    for turn in range(5):
        store = made.copy(str(tmp_path / f"{turn}"))
        stays = expected(store, made.runs[-1:])
        start = threading.Barrier(2)
        errors: list[BaseException] = []

        def one(
            store: str = store,
            start: threading.Barrier = start,
            errors: list[BaseException] = errors,
        ) -> None:
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


def test_a_run_begun_meanwhile_keeps_its_shards(
    made: Made, store: str, tiny_bert: Path, verses: list[str]
) -> None:
    """The corpus is what it was two nights ago: the run that begins finds old shards that were
    about to go.
    """
    begun: list[str] = []
    set_corpus(made.corpus, NIGHTS[1], verses)

    def on_progress(message: str) -> None:
        if not begun:
            with afn_ray.run(config_of(tiny_bert, made.corpus, store, **SMALL)) as run:
                begun.append(run.uri.rpartition("/")[2])
                assert run.info["counts"]["shards_reused"] < run.info["counts"]["shards"]

    doomed = {shard.uri for shard in collect(store).shards}
    done = collect(store, delete=True, on_progress=on_progress)
    assert {shard.uri for shard in done.shards} == doomed and not done.num_spared
    check_whole(store, (made.runs[-1], *begun))
    assert planned(store, tuple(begun)) & {
        uri.rpartition("/")[2] for uri in doomed
    }  # done anew under other names


@dataclass(frozen=True)
class Night:
    """A run of the second night's corpus, whose shards are garbage by now, beside a collection."""

    store: str
    config: RunConfig
    runs: list[str]
    tokens: int

    once: Any = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Once, whoever asks; the others wait for it."""
        with self.once:
            if not self.runs:
                with afn_ray.run(self.config) as run:
                    assert run.info["counts"]["tokens"] == self.tokens
                    self.runs.append(run.uri.rpartition("/")[2])

    def check(self, kept: str) -> None:
        """Nothing is lacking, nor after the collections of tomorrow, and the same command has
        nothing to do.
        """
        assert self.runs
        whole = verify_store(self.store, clean=True, min_age_h=0)
        assert not whole.findings and not whole.unproved and whole.num_runs >= 2
        again: list[str] = []
        afn_ray.run(self.config, lambda event: again.append(event.message)).close()
        assert any("nothing to do" in message for message in again)
        for name in (kept, *self.runs):
            afn_ray.open_run(f"{self.store}/runs/{name}").close()
        collect(self.store, delete=True)
        check_whole(self.store, tuple(self.runs))
        assert not collect(self.store).shards
        shards = {uri.split("/")[-2] for uri in files_of(self.store) if "/shards/" in uri}
        assert shards == planned(self.store, tuple(self.runs))


@pytest.fixture
def night(made: Made, store: str, tiny_bert: Path, verses: list[str]) -> Night:
    set_corpus(made.corpus, NIGHTS[1], verses)
    tokens = manifest.open_folder(store, made.runs[1]).info["counts"]["tokens"]
    return Night(store, config_of(tiny_bert, made.corpus, store, **SMALL), [], tokens)


def test_a_run_beside_a_collection_that_waits_in_a_delete_loses_nothing(
    night: Night, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = storage.remove

    def slow(uri: str, retry_for_s: float | None = None) -> None:
        if "/shards/" in uri:
            night.run()
        remove(uri, retry_for_s)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", slow)
        collect(night.store, delete=True)
    night.check(made.runs[-1])


@pytest.mark.parametrize("late", ["asked again", "an hour late"])
def test_a_delete_whose_answer_was_lost_hits_nothing_new(
    night: Night, made: Made, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    remove = storage.remove
    asked: list[str] = []

    def lossy(uri: str, retry_for_s: float | None = None) -> None:
        remove(uri, retry_for_s)
        if uri.startswith(f"{night.store}/shards/"):
            asked.append(uri)
            night.run()
            if late == "asked again":
                remove(uri, retry_for_s)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", lossy)
        collect(night.store, delete=True)
    for uri in asked if late == "an hour late" else ():
        remove(uri)
    night.check(made.runs[-1])


def test_two_collections_beside_a_run_lose_nothing(
    night: Night, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, waits = storage.remove, threading.Lock()

    def slow(uri: str, retry_for_s: float | None = None) -> None:
        if "/shards/" in uri and threading.current_thread() is not threading.main_thread():
            with waits:
                if (
                    not night.runs
                ):  # before this one deletes anything, another goes through the store, and a run
                    monkeypatch.setattr(storage, "remove", remove)
                    collect(night.store, delete=True)
                    night.run()
        remove(uri, retry_for_s)

    monkeypatch.setattr(storage, "remove", slow)
    collect(night.store, delete=True)
    night.check(made.runs[-1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_run_claims_as_a_collection_publishes_is_spared(
    night: Night, made: Made, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    publish = epochs.publish
    doomed = {shard.uri for shard in collect(night.store).shards}

    def beside(*args: Any) -> bool:
        if when == "before":
            night.run()
        done = publish(*args)
        if when == "after":
            night.run()
        return done

    with monkeypatch.context() as patch:
        patch.setattr(epochs, "publish", beside)
        done = collect(night.store, delete=True)
    assert done.num_spared > 0 and {shard.uri for shard in done.shards} < doomed
    assert any(f"{done.num_spared:,} shard" in line for line in garbage_lines(done, []))
    night.check(made.runs[-1])


def test_a_run_that_was_taken_up_is_spared(made: Made, store: str, tmp_path: Path) -> None:
    """A process has found it the newest, and stood still while another run came and a collection
    began.
    """
    lease = f"{store}/runs/{made.runs[0]}/lease-{'1' * 32}.json"
    with pytest.MonkeyPatch.context() as patch:
        publish = epochs.publish

        def publish_late(*args: Any) -> object:
            storage.write_once(lease, b"{}")
            return publish(*args)

        patch.setattr(epochs, "publish", publish_late)
        done = collect(store, delete=True)
    assert done.spared == made.runs[:1] and made.runs[0] in done.kept
    check_whole(store, (made.runs[0], made.runs[-1]))
    assert collect(store, min_age_h=24).kept == (
        made.runs[0],
        made.runs[-1],
    )  # while the lease is young
    assert not verify_store(store, clean=True, min_age_h=0).orphans and storage.exists(lease)
    collect(store, delete=True)
    check_whole(store, made.runs[-1:])


def test_a_run_that_was_given_up_can_not_end(made: Made, store: str) -> None:
    name = made.runs[0]
    run = manifest.open_folder(store, name)
    storage.delete(
        [f"{run.uri}/run.json"]
    )  # its process stands still for days, right before it writes this
    for file in storage.list_below(run.uri):
        os.utime(file.uri, (0, 0))
    plan = storage.read_bytes(f"{run.uri}/plan.parquet")
    collect(store, delete=True)
    storage.write_once(f"{run.uri}/plan.parquet", plan)
    with pytest.raises(
        Interrupted, match=r"has given up run .*; the same command begins a new one"
    ):
        manifest.finish_run(run, run.info)
    with pytest.raises(StoreError, match="was removed by 'afn gc'"):
        manifest.find_run(run.uri)
    assert name not in collect(store).kept and collect(store, delete=True).num_files == 1
    check_whole(store, made.runs[-1:])
    for grave in graves(store):
        os.utime(grave, (0, 0))
    assert collect(store, delete=True).num_files == 3 and not graves(store)
    assert set(storage.list_names(f"{store}/runs")) == set(made.runs[-1:])


def test_what_is_damaged_of_an_epoch_stops_all_and_is_named(night: Night, made: Made) -> None:
    collect(night.store, delete=True)
    ((epoch, _),) = ((f.uri, f.size) for f in storage.list_below(f"{night.store}/gc"))
    data = storage.read_bytes(epoch)
    copied = epoch.replace("01.parquet", "02.parquet")
    for uri, content in ((epoch, data[:-1]), (copied, data)):
        rewrite(uri, content)
        for call in (night.run, lambda: collect(night.store)):
            with pytest.raises(
                StoreError, match=rf"{Path(uri).name} is damaged: .*restore it from a backup"
            ):
                call()
        assert [(f.kind, f.uri) for f in verify_store(night.store, clean=True).findings] == [
            ("damaged", uri)
        ]
    storage.delete([epoch, copied])
    night.run()
    check_whole(night.store, (made.runs[-1], *night.runs))


# --- what cannot be known
# --------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[str], None]] = {
    "damaged": lambda uri: rewrite(uri, b"PAR1 and no more"),
    "gone": lambda uri: storage.delete([uri]),
    "another's": lambda uri: rewrite(uri, storage.read_bytes(sibling(uri))),
}


def sibling(uri: str) -> str:
    run = uri.rsplit("/", 2)[0]
    return next(
        f.uri for f in storage.list_below(run) if f.uri.endswith("/plan.parquet") and f.uri != uri
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_plan_that_cannot_be_read_stops_it_all(made: Made, store: str, damage: str) -> None:
    plan = f"{store}/runs/{made.runs[-1]}/plan.parquet"
    DAMAGES[damage](plan)
    before = files_of(store)
    with pytest.raises(
        StoreError, match=r"plan\.parquet.*no shard can be deleted. Restore its plan, or delete"
    ):
        collect(store, delete=True)
    assert files_of(store) == before
    storage.delete(
        [
            f"{store}/runs/{made.runs[-1]}/{name}"
            for name in storage.list_names(plan.rsplit("/", 1)[0])
        ]
    )
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


# --- the command
# -----------------------------------------------------------------------------------------


def test_the_command_lists_and_what_it_names_deletes(made: Made, store: str) -> None:
    before, stays = files_of(store), expected(store, made.runs[-1:])
    listed = afn("gc", store, "--keep", "1", "--min-age-h", "0")
    assert (listed.returncode, listed.stderr) == (0, "") and files_of(store) == before
    *each, sums, last = listed.stdout.splitlines()
    found = collect(store)
    assert [line.split()[1].rstrip(":") for line in each] == [
        f.uri for f in (*found.runs, *found.shards)
    ]
    assert sums.startswith(
        f"to delete: 3 runs and {len(found.shards)} shards, {found.num_files} files, "
    )
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
            commands.main(["gc", store, *args])
        return int(str(left.value.code)), *capsys.readouterr()

    code, out, _ = gc("--keep", "1", "--min-age-h", "0", "--json")
    found = json.loads(out)
    assert (
        code == 0
        and found["kept"] == [made.runs[-1]]
        and len(found["shards"]) == 6
        and not found["deleted"]
    )
    assert gc()[1] == f"nothing to delete; 4 runs kept, from {made.runs[0]} to {made.runs[-1]}\n"
    code, _, said = gc("--keep-run", "nothing")
    assert code == 2 and "has no run nothing to keep" in said
