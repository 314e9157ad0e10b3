"""Identity of a shard, whose result counts, and which run is meant."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, tzinfo
from functools import cache
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import faults
from afn_ray.config import RunConfig
from afn_ray.corpus import listing
from afn_ray.corpus_values import FileInfo, FileSlice, ReadOptions, Shard
from afn_ray.errors import ConfigError, Interrupted, StoreError, Unavailable
from afn_ray.fingerprints import fingerprint
from afn_ray.measure import Measure
from afn_ray.runs.plan import (
    MOST_NAMES_BYTES,
    MOST_SLICES,
    RACY_NS,
    _share,
    group_slices,
    is_trusted,
    make_plan,
)
from afn_ray.schema import SCHEMA_VERSION
from afn_ray.store import (
    calibrations,
    checksums,
    layout,
    manifest,
    plans,
    probes,
    retry,
    run_claims,
    shard_files,
    storage,
    uris,
)
from afn_ray.store.checksums import entry_of
from afn_ray.store.commits import Commit, CommitEntry, Commits, total_counts
from afn_ray.store.label_thresholds import measure_differences
from afn_ray.store.manifest import RunFolder, find_run, finish_run
from afn_ray.store.plans import Plan
from afn_ray.store.run_claims import begin_run
from afn_ray.store.shard_files import find_commits
from conftest import RUN_INFO, edit_checksummed, make_measure, rewrite, write_new

MEASURE = make_measure([8])
MEASURE_ID = MEASURE.id
OLD_NS = 1_700_000_000_000_000_000


def _slice(uri: str, num_bytes: int, sha256: str = "") -> FileSlice:
    return FileSlice(
        uri, num_bytes, "", "txt", "", 0, num_bytes, num_bytes, 1, sha256 or fingerprint(uri)
    )


@pytest.fixture
def store(place: str) -> str:
    """A fresh store on each kind of filesystem."""
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of 60 small JSONL files, 5 texts and one long JSONL file, all old enough to be
    trusted.
    """
    path = tmp_path / "corpus"
    path.mkdir()
    for i in range(60):
        _write(path / f"{i:02}.jsonl", [f"file {i} " + "x" * (i * 7 % 90) for _ in range(3)])
    for i in range(5):
        (path / f"t{i}.txt").write_text(f"text {i}")
    _write(path / "long.jsonl", [f"line {i} " + "y" * 60 for i in range(120)])
    for file in path.iterdir():
        os.utime(file, ns=(OLD_NS, OLD_NS))
    return path


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


@pytest.fixture
def config(folder: Path, store: str) -> RunConfig:
    return RunConfig(corpus=(str(folder),), model="m", store=store, shard_bytes=1024)


def _ids(plan: Plan) -> list[str]:
    return [s.id for s in plan.shards]


def _begin(config: RunConfig, measure: Measure = MEASURE, begun_ns: int | None = None) -> RunFolder:
    time.sleep(0.002)  # names of runs tell milliseconds
    return begin_run(
        config, measure, make_plan(config), time.time_ns() if begun_ns is None else begun_ns
    ).run


# --- groups of slices
# ------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 50) | st.integers(0, 3000), max_size=60)


@given(SIZES, st.integers(1, 2000))
def test_groups_lose_nothing_keep_order_and_stay_small(sizes: list[int], shard_bytes: int) -> None:
    slices = [_slice(f"/corpus/{i}", n) for i, n in enumerate(sizes)]
    groups = group_slices(slices, shard_bytes)
    assert [s for g in groups for s in g] == slices
    for group in groups:
        assert group and (len(group) == 1 or sum(s.num_bytes for s in group) <= shard_bytes)
    for group in groups[:-1]:  # none is left small for no reason
        following = slices[slices.index(group[-1]) + 1]
        total = sum(s.num_bytes for s in group)
        assert total + following.num_bytes > shard_bytes or total >= shard_bytes // 4


@pytest.mark.parametrize("per_shard", [3, 8, 50, 1000])
@pytest.mark.parametrize("kind", ["goes", "comes", "grows", "shrinks", "is edited"])
def test_a_change_reaches_no_group_far_from_it(
    kind: str, per_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many files a shard holds: the groups made anew are few, next to each other, and hold
    the change.
    """
    monkeypatch.setattr("afn_ray.runs.plan._share", cache(_share))  # of 8 million paths, most again
    shard_bytes, order = 1 << 20, random.Random(f"{kind} {per_shard}")
    mean = shard_bytes // per_shard
    slices = [
        _slice(f"/corpus/{i:06}.jsonl", int(order.lognormvariate(-0.3, 0.8) * mean))
        for i in range(30 * per_shard)
    ]
    before = {tuple(group) for group in group_slices(slices, shard_bytes)}
    assert 30 < len(before) < 140
    changes = []
    for _ in range(50 if per_shard < 1000 else 15):  # of 30,000 slices each
        at = order.randrange(len(slices))
        old = slices[at]
        new = {
            "goes": [],
            "comes": [_slice(f"{old.uri}.x", shard_bytes // 5), old],
            "grows": [_slice(old.uri, old.num_bytes + shard_bytes // 5)],
            "shrinks": [_slice(old.uri, old.num_bytes // 2)],
            "is edited": [replace(old, sha256="0" * 64)],
        }[kind]
        after = [
            tuple(group)
            for group in group_slices([*slices[:at], *new, *slices[at + 1 :]], shard_bytes)
        ]
        anew = [i for i, group in enumerate(after) if group not in before]
        assert anew == list(range(anew[0], anew[-1] + 1)) if anew else kind == "goes"
        if new and new[0] != old:
            ours = next(i for i, group in enumerate(after) if new[0] in group)
            assert anew[0] in (ours - 1, ours)
        assert len(anew) <= (1 if kind == "is edited" else 7)
        changes.append(len(anew))
    assert sum(changes) / len(changes) < 3


def test_the_end_of_a_file_of_several_slices_stands_alone() -> None:
    small, cut = _slice("/corpus/b", 10), _slice("/corpus/a", 1000)
    tail = replace(cut, start=1000, end=1200, num_bytes=200)
    assert group_slices([cut, tail, small], 1000) == [[cut], [tail], [small]]


# --- what lies in a store
# --------------------------------------------------------------------------------


def test_every_file_of_a_store_is_sorted_by_its_name_and_no_other_is_taken_for_ours(
    store: str,
) -> None:
    m, s, a, run = "1" * 32, "2" * 32, "a" * 16, "20260102T030405.678Z-0123456789ab"
    ours = {
        "shards": [
            f"shards/{m}/{s}/{n}" for n in ("commit.json", "commit-12.json", f"{a}-tokens.parquet")
        ]
        + [f"shards/{m}/{s}/.commit.json-{m}"],
        "runs": [
            f"runs/{run}/{n}"
            for n in ("run.json", "status.json", f"signals-{a}.parquet", f"lease-{m}.json")
        ]
        + [f"runs/{run}/.plan.parquet-{m}"],
        "pilots": ["pilots/abc.json"],
        "probes": [
            f"probe-{m}",
            f".probe-{m}-{m}",
            f".planning.json-{m}",
            f"gc/.00000001.parquet-{m}",
        ],
        "of gc": ["gc/00000001.parquet"],
        "planning": ["planning.json"],
        "ignore": [".rayignore"],
    }
    foreign = [
        f"shards/{m}/{s}/notes.parquet",
        f"shards/{m}/{s}/deep/commit.json",
        f"shards/{m}/commit.json",
        f"shards/{m[1:]}/{s}/commit.json",
        f"runs/{run}/report.html",
        f"runs/{run}/mine.parquet",
        f"runs/{run}/.notes-{m}",
        f"shards/{m}/{s}/commit-0.json",
        f"shards/{m}/{s}/commit-x.json",
        "gc/1.parquet",
        f"runs/{run}/lease-1.json",
        "runs/run.json",
        "run.json",
        "status.json",
        f"runs/{run}/planning.json",
        "pilots/abc.txt",
        "probe-of-mine",
    ]
    root = uris.absolute(store)
    files = [
        storage.StoredFile(f"{root}/{name}", 1, 0.0)
        for name in (*itertools.chain(*ours.values()), *foreign)
    ]
    there = layout.sort_files(store, files)
    assert [f.uri for f in there.shards.pop((m, s))] == [
        f"{root}/{n}" for n in ours["shards"]
    ] and not there.shards
    assert [f.uri for f in there.runs.pop(run)] == [
        f"{root}/{n}" for n in ours["runs"]
    ] and not there.runs
    assert there.pilots == ["abc.json"] and [f.uri for f in there.probes] == [
        f"{root}/{n}" for n in ours["probes"]
    ]
    assert [f.uri for f in there.planning] == [f"{root}/planning.json"]
    assert [f.uri for f in there.ignore] == [f"{root}/.rayignore"]
    assert there.foreign == [f"{root}/{n}" for n in foreign]


# --- plans
# -----------------------------------------------------------------------------------------------


def test_a_plan_covers_the_corpus_and_is_the_same_every_time(
    config: RunConfig, folder: Path
) -> None:
    plan = make_plan(config)
    assert [f.uri for f in plan.files] == sorted(map(str, folder.iterdir()))
    assert plan.num_hashed == len(plan.files) == 66
    assert plan.num_bytes == sum(f.stat().st_size for f in folder.iterdir())
    assert len(plan.shards) > 10 and len(set(_ids(plan))) == len(plan.shards)
    other = replace(
        config,
        workers=7,
        batch_tokens=512,
        store=f"{config.store}/other",
        sink_factor=3.0,
        device="cpu",
    )
    assert make_plan(other) == plan


def test_what_changes_the_documents_changes_the_shards_and_nothing_else_does(
    config: RunConfig,
) -> None:
    plan = make_plan(config)
    assert not set(_ids(plan)) & set(_ids(make_plan(replace(config, max_document_bytes=9))))
    by_line = set(_ids(make_plan(replace(config, txt_documents="line"))))
    for shard in plan.shards:
        assert (shard.id in by_line) is all(piece.format != "txt" for piece in shard.slices)


def test_files_of_the_last_run_are_not_read_again(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make_plan(config)
    _begin(config)
    calls: list[str] = []
    monkeypatch.setattr(listing, "cut", lambda file, *rest: calls.append(file.uri))
    again = make_plan(config)
    assert calls == [] and again.num_hashed == 0
    assert again.shards == before.shards and again.files == before.files


def find_names(config: RunConfig) -> list[str]:
    return storage.list_names(uris.join(config.store, "runs"))


def test_a_touched_file_is_read_again_and_gives_the_same_shards(
    config: RunConfig, folder: Path
) -> None:
    before = make_plan(config)
    _begin(config)
    os.utime(folder / "07.jsonl", ns=(OLD_NS, OLD_NS + 5))
    again = make_plan(config)
    assert again.num_hashed == 1
    assert _ids(again) == _ids(before)


def test_a_changed_file_changes_only_its_own_shards(config: RunConfig, folder: Path) -> None:
    before = make_plan(config)
    _begin(config)
    text = (folder / "07.jsonl").read_text()
    (folder / "07.jsonl").write_text(text.replace("file", "FILE"))
    again = make_plan(config)
    assert again.num_hashed == 1
    differing = [(a, b) for a, b in zip(before.shards, again.shards, strict=True) if a.id != b.id]
    assert len(differing) == 1
    assert all(str(folder / "07.jsonl") in [s.uri for s in shard.slices] for shard in differing[0])


def test_appending_keeps_the_shards_of_the_full_slices(config: RunConfig, folder: Path) -> None:
    def of_long(plan: Plan) -> list[str]:
        return [
            s.id for s in plan.shards if {p.uri for p in s.slices} == {str(folder / "long.jsonl")}
        ]

    before = make_plan(config)
    _begin(config)
    with (folder / "long.jsonl").open("a") as sink:
        sink.writelines(json.dumps({"text": f"more {i}"}) + "\n" for i in range(100))
    again = make_plan(config)
    assert again.num_hashed == 1
    kept = len(of_long(before)) - 1
    assert kept >= 5 and of_long(again)[:kept] == of_long(before)[:kept]
    assert len(of_long(again)) > len(of_long(before))


def test_a_file_written_just_before_it_was_hashed_is_not_trusted(
    config: RunConfig, folder: Path
) -> None:
    begun_ns = OLD_NS + 10 * RACY_NS
    for name, behind_ns in (("01.jsonl", 1), ("02.jsonl", RACY_NS), ("03.jsonl", RACY_NS + 1)):
        os.utime(folder / name, ns=(0, begun_ns - behind_ns))
    os.utime(folder / "04.jsonl", ns=(0, begun_ns + 10**12))  # a clock ahead of ours
    _begin(config, begun_ns=begun_ns)
    assert make_plan(config).num_hashed == 3
    _begin(replace(config, sink_factor=5.0), begun_ns=begun_ns + 10 * RACY_NS)
    assert make_plan(config).num_hashed == 1  # what was hashed again long after it was written is


@pytest.mark.parametrize(
    ("version", "trusted"),
    [
        ("etag:abc", True),
        ("time:5", True),
        (f"time:{OLD_NS}", False),
        ("time:2026-01-01", False),
        ("", False),
    ],
)
def test_versions_that_prove_nothing_are_not_trusted(version: str, trusted: bool) -> None:
    assert is_trusted(version, OLD_NS) is trusted


def test_other_cuts_are_not_remembered(config: RunConfig) -> None:
    _begin(config)
    assert make_plan(replace(config, shard_bytes=2048)).num_hashed == 66
    assert make_plan(replace(config, text_column="text", txt_documents="line")).num_hashed == 66
    assert make_plan(replace(config, language="de", layers="0")).num_hashed == 0


def test_progress_of_hashing_is_told(config: RunConfig) -> None:
    seen: list[tuple[int, int]] = []
    make_plan(config, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 66) for i in range(1, 67)]


# --- runs
# ------------------------------------------------------------------------------------------------


def test_a_run_is_resumed_and_a_complete_one_found_again(config: RunConfig) -> None:
    first = _begin(config)
    assert first.info == {} and _begin(config) == first
    done = finish_run(first, RUN_INFO)
    assert done.info["layers"] == [8]
    assert _begin(replace(config, workers=3)) == done
    assert find_names(config) == [first.id]


def test_what_was_asked_before_last_is_a_new_run(config: RunConfig) -> None:
    a = finish_run(_begin(config), RUN_INFO)
    b = finish_run(_begin(replace(config, sink_factor=5.0)), RUN_INFO)
    again = _begin(config)
    assert again.info == {} and len({a.id, b.id, again.id}) == 3
    assert find_names(config) == [a.id, b.id, again.id]
    assert find_run(config.store).id == b.id  # the latest complete one
    finish_run(again, RUN_INFO)
    assert find_run(config.store).id == again.id


def test_a_run_without_a_plan_is_passed_over(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full when the plan was to be written; its folder stays behind on a local
    disk.
    """

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(uris.open_filesystem(config.store)[0], "pipe_file", full)
        with pytest.raises(Interrupted):
            _begin(config)
    run = _begin(config)
    assert plans.created_at(run).endswith("+00:00")
    assert _begin(config) == run and make_plan(config).num_hashed == 0


def test_the_plan_is_written_as_rows_in_order(config: RunConfig) -> None:
    run, plan = _begin(config), make_plan(config)
    table = manifest.read_table(run, "plan")
    assert table["shard"].to_pylist() == [s.id for s in plan.shards for _ in s.slices]
    assert table["uri"].to_pylist() == [p.uri for s in plan.shards for p in s.slices]
    assert table["ordinal"].to_pylist() == [i for i, s in enumerate(plan.shards) for _ in s.slices]


def test_a_plan_proves_itself(config: RunConfig) -> None:
    run, plan = _begin(config), make_plan(config)
    shards, header = plans.read_shards(run)
    assert shards == list(plan.shards) and header["measure"] == MEASURE.as_dict()
    uri = run.uri + "/plan.parquet"
    table = manifest.read_table(run, "plan")

    def edited(table: pa.Table) -> bytes:
        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()

    def resealed(rows: list[dict[str, Any]], **changes: Any) -> pa.Table:
        changed = header | changes
        changed["sha256"] = fingerprint([changed, rows])
        return pa.Table.from_pylist(rows, table.schema).replace_schema_metadata(
            {"afn": json.dumps(changed)}
        )

    rows = table.to_pylist()
    for bad, says in (
        (edited(table.slice(1)), "do not have the checksum"),
        (edited(table.replace_schema_metadata({"afn": b"{}"})), "damaged: KeyError"),
        (edited(table.replace_schema_metadata(None)), "damaged: TypeError"),
        (
            edited(resealed([{**rows[0], "sha256": "0" * 64}, *rows[1:]])),
            "the slices of its shard",
        ),
        (edited(resealed([row for row in rows if row["ordinal"]])), "of another run"),
        (edited(resealed(rows, measure={"dtype": "bfloat16"})), "damaged: KeyError"),
        (
            edited(resealed(rows, measure=header["measure"] | {"dtype": "bfloat16"})),
            "of another run",
        ),
    ):
        rewrite(uri, bad)
        with pytest.raises(StoreError, match=rf"plan\.parquet is .*{says}"):
            plans.read_shards(run)
    rewrite(uri, edited(resealed(rows)))
    assert plans.read_shards(run)[0] == shards


def test_another_measure_is_refused_and_the_difference_is_named(
    config: RunConfig, tmp_path: Path
) -> None:
    _begin(config)
    _publish(config.store, make_plan(config).shards[0], "a" * 16, tmp_path)
    other = replace(MEASURE, dtype="bfloat16", layers=tuple(range(200)))
    with pytest.raises(StoreError) as caught:
        _begin(config, other)
    message = str(caught.value)
    assert 'dtype: the store has "float32", this run asks for "bfloat16". ' in message
    assert "layers" not in message and "model" not in message  # other layers would be no hindrance
    assert "Use another --store, or --allow-another-measure" in message and len(message) < 500
    files = {"config.json": "c" * 64, "model.safetensors": "a" * 64}
    theirs, ours = (
        {"model": files | {"model.safetensors": digit * 64}, "dtype": "float32"} for digit in "ab"
    )
    assert measure_differences(theirs, ours) == (  # of the model's files, only those that differ
        f'model: the store has {{"model.safetensors": "{"a" * 64}"}}, '
        f'this run asks for {{"model.safetensors": "{"b" * 64}"}}'
    )
    allowed = _begin(replace(config, allow_another_measure=True), other)
    assert allowed.info == {} and len(find_names(config)) == 2
    assert _begin(config).id != allowed.id  # the first measure needs no leave


@pytest.mark.parametrize(("theirs", "ours"), [("auto", "fr"), ("fr", "auto")])
def test_another_language_is_refused_by_its_flag_and_the_flag_that_goes_on_is_named(
    theirs: str, ours: str, config: RunConfig
) -> None:
    detecting = replace(MEASURE, languages="lid.176.ftz, rules 1")
    measures = {"auto": detecting, "fr": MEASURE}
    _begin(replace(config, language=theirs), measures[theirs])
    storage.write_once(uris.join(config.store, "shards", measures[theirs].id, SHARD.id), b"")
    with pytest.raises(StoreError) as caught:
        _begin(replace(config, language=ours), measures[ours])
    assert (
        f'. languages: the store has "--language {theirs}", this run asks for "--language {ours}". '
        f"--language {theirs} goes on with that measure. Use another --store"
    ) in str(caught.value)
    with pytest.raises(StoreError, match="labels: the store has null") as caught:
        _begin(replace(config, language=ours), replace(measures[ours], labels="tags"))
    assert "goes on with that measure" not in str(caught.value)


def test_find_run_says_what_is_wrong(config: RunConfig, store: str) -> None:
    with pytest.raises(StoreError, match="neither a store nor a run"):
        find_run(store)
    run = _begin(config)
    with pytest.raises(StoreError, match="no complete run"):
        find_run(store)
    with pytest.raises(StoreError, match=rf"{run.id} is not complete"):
        find_run(run.uri)
    finish_run(run, RUN_INFO)
    info = find_run(store).info
    assert find_run(run.uri + "/").info == info
    assert info == {
        "schema_version": SCHEMA_VERSION,
        "id": run.id,
        **RUN_INFO,
        "tables": info["tables"],
    }
    assert list(info["tables"]) == ["plan"]
    with pytest.raises(StoreError, match="neither a store nor a run"):
        find_run(store + "/runs/nothing")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[]", "schema version list, expected 5 or 6"),
        (b"{}", "schema version None, expected 5 or 6"),
        (
            b'{"schema_version": 5}',
            "is damaged: its bytes do not have the checksum that it carries",
        ),
        (checksums.checksummed({"schema_version": 5}), "is damaged: id is null"),
        (
            checksums.checksummed({"schema_version": 5}) + b" ",
            "is damaged: its bytes do not have the checksum",
        ),
        (
            b'{"schema_version": 2}',
            "schema version 2, expected 5 or 6; use the afn-ray that wrote it, or measure the "
            "corpus anew",
        ),
    ],
)
def test_a_run_json_that_cannot_be_read_is_named(config: RunConfig, body: bytes, says: str) -> None:
    run = _begin(config)
    write_new(run.uri + "/run.json", body)
    for uri in (config.store, run.uri):
        with pytest.raises(StoreError, match=rf"run\.json.* {says}"):
            find_run(uri)


def test_a_damaged_table_is_named(config: RunConfig) -> None:
    run = _begin(config)
    write_new(run.uri + "/thresholds.parquet", b"PAR1 and no more")
    with pytest.raises(StoreError, match=r"thresholds\.parquet is damaged"):
        manifest.read_table(run, "thresholds")
    storage.delete([run.uri + "/plan.parquet"])
    with pytest.raises(StoreError, match=r"has lost its plan\.parquet"):
        plans.created_at(run)
    write_new(run.uri + "/plan.parquet", b"")
    with pytest.raises(StoreError, match=r"plan\.parquet is damaged"):
        make_plan(config)


def test_a_table_left_by_an_unfinished_reduce_stays_and_run_json_says_which_is_right(
    config: RunConfig,
) -> None:
    run = _begin(config)
    assert (
        manifest.write_table(run, "thresholds", pa.table({"x": [1]}))["name"]
        == "thresholds.parquet"
    )
    assert (
        manifest.write_table(run, "thresholds", pa.table({"x": [1]}))["name"]
        == "thresholds.parquet"
    )
    entry = manifest.write_table(run, "thresholds", pa.table({"x": [2]}))
    assert manifest.read_table(run, "thresholds")["x"].to_pylist() == [1]
    done = finish_run(run, {**RUN_INFO, "tables": {"thresholds": entry}})
    assert manifest.read_table(done, "thresholds")["x"].to_pylist() == [2]
    rewrite(f"{run.uri}/{entry['name']}", storage.read_bytes(f"{run.uri}/thresholds.parquet"))
    with pytest.raises(
        StoreError, match=rf"{entry['name']} is damaged: .*expected .*{entry['sha256'][:9]}"
    ):
        manifest.read_table(done, "thresholds")
    outside = entry_of("../x.parquet", b"")
    escaping = finish_run(
        _begin(replace(config, sink_factor=3.0)), {**RUN_INFO, "tables": {"shards": outside}}
    )
    for table in ("shards", "vocabulary"):
        with pytest.raises(
            StoreError,
            match=rf"run\.json is damaged: its table {table} is (null|.*\.\./x\.parquet)",
        ):
            manifest.read_table(escaping, table)


def test_the_first_to_finish_a_run_wins(config: RunConfig) -> None:
    run = _begin(config)
    first = finish_run(run, {**RUN_INFO, "seconds": 1})
    assert finish_run(run, {**RUN_INFO, "seconds": 2}) == first


# --- commits
# ---------------------------------------------------------------------------------------------

COUNTS = {"documents": 3, "tokens": 9}
SHARD = Shard.of([_slice("/corpus/a", 5)], ReadOptions("auto", "text", None, "file", 100))


def _publish(
    store: str, shard: Shard, attempt: str, scratch: Path, counts: dict[str, int] = COUNTS
) -> Commit:
    tables = {}
    for rows, name in enumerate(layout.TABLES):
        path = scratch / f"{attempt}-{name}"
        path.write_bytes(f"{attempt} {name}".encode())
        tables[name] = (path, rows)
    finished = shard_files.Attempt(attempt, tables, counts, 1.5, {"device": "cpu"})
    return shard_files.publish(store, MEASURE_ID, shard, finished)


def _names(store: str) -> list[str]:
    return storage.list_names(shard_files.shard_uri(store, MEASURE_ID, SHARD.id))


def test_a_commit_names_files_that_are_there_whole(store: str, tmp_path: Path) -> None:
    assert shard_files.read_commit(store, MEASURE_ID, SHARD.id) is None
    commit = _publish(store, SHARD, "a" * 16, tmp_path)
    assert shard_files.read_commit(store, MEASURE_ID, SHARD.id) == commit
    assert find_commits(store, MEASURE_ID, [SHARD, replace(SHARD, id="other")]) == {
        SHARD.id: commit
    }
    assert _names(store) == sorted(["commit.json", *(f["name"] for f in commit.files.values())])
    for rows, (name, file) in enumerate(commit.files.items()):
        data = storage.read_bytes(
            f"{shard_files.shard_uri(store, MEASURE_ID, SHARD.id)}/{file['name']}"
        )
        assert (
            data == f"{'a' * 16} {name}".encode()
            and file["bytes"] == len(data)
            and file["rows"] == rows
        )
        assert hashlib.sha256(data).hexdigest() == file["sha256"]


def test_the_first_commit_wins_and_the_losers_files_go(store: str, tmp_path: Path) -> None:
    first = _publish(store, SHARD, "a" * 16, tmp_path)
    names = _names(store)
    assert _publish(store, SHARD, "b" * 16, tmp_path) == first
    assert _names(store) == names


def test_attempts_that_disagree_are_an_error_and_the_first_stays(
    store: str, tmp_path: Path
) -> None:
    first = _publish(store, SHARD, "a" * 16, tmp_path)
    names = _names(store)
    with pytest.raises(StoreError, match=r"two attempts at shard .* disagree"):
        _publish(store, SHARD, "b" * 16, tmp_path, {**COUNTS, "tokens": 10})
    assert _names(store) == names
    assert shard_files.read_commit(store, MEASURE_ID, SHARD.id) == first


@pytest.mark.parametrize("arrived", [True, False])
def test_an_unknown_answer_is_looked_up(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    write_once = storage.write_once

    def unsure(uri: str, data: bytes) -> None:
        if arrived:
            write_once(uri, data)
        raise StoreError("writing: timed out")

    monkeypatch.setattr(storage, "write_once", unsure)
    if arrived:
        commit = _publish(store, SHARD, "a" * 16, tmp_path)
        assert (
            commit.attempt == "a" * 16
            and "commit.json" in _names(store)
            and len(_names(store)) == 4
        )
    else:
        with pytest.raises(StoreError, match="timed out"):
            _publish(store, SHARD, "a" * 16, tmp_path)
        assert "commit.json" not in _names(store)


def test_an_unknown_answer_may_hide_a_rival(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _publish(store, SHARD, "a" * 16, tmp_path)

    def unsure(uri: str, data: bytes) -> None:
        raise StoreError("writing: timed out")

    monkeypatch.setattr(storage, "write_once", unsure)
    assert _publish(store, SHARD, "b" * 16, tmp_path) == first
    assert len(_names(store)) == 4


# --- answers that are lost
# -------------------------------------------------------------------------------


@pytest.fixture
def liar(memory: str) -> Iterator[str]:
    """A store that writes what it is given and then says that it could not."""
    with faults.injected(seed=0, rate=1, kinds=("lie",), methods=("pipe_file",)) as schedule:
        yield faults.wrap(memory)
    assert schedule.total("lie")


def test_what_was_written_with_its_answer_lost_is_known_for_ours(
    liar: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes.check_writable(liar)
    run = _begin(RunConfig(corpus=(str(folder),), model="m", store=liar, shard_bytes=1024))
    assert plans.created_at(run)
    commit = _publish(liar, SHARD, "a" * 16, tmp_path)
    assert commit.attempt == "a" * 16 and len(_names(liar)) == 4
    table = pa.table({"x": [1, 2]})
    assert manifest.write_table(run, "thresholds", table)["name"] == "thresholds.parquet"
    other = manifest.write_table(run, "thresholds", pa.table({"x": [3]}))
    assert other["name"].startswith("thresholds-")
    assert manifest.read_table(run, "thresholds") == table
    assert calibrations.write_calibration(liar, "key", {"dtype": "float32"})["dtype"] == "float32"
    assert calibrations.write_calibration(liar, "key", {"dtype": "float16"})["dtype"] == "float32"
    done = finish_run(run, RUN_INFO)
    assert done == find_run(liar) and done.info["layers"] == RUN_INFO["layers"]


def test_what_an_unknown_commit_names_stays(
    liar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting the files on giving up would leave a commit of nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(retry, "RETRY_FOR_S", 0)
        with pytest.raises(Unavailable, match=r"writing .*commit\.json: no answer"):
            _publish(liar, SHARD, "a" * 16, tmp_path)
    commit = shard_files.read_commit(liar, MEASURE_ID, SHARD.id)
    assert commit is not None and commit.attempt == "a" * 16
    assert _names(liar) == sorted(["commit.json", *(f["name"] for f in commit.files.values())])
    assert _publish(liar, SHARD, "b" * 16, tmp_path) == commit
    assert len(_names(liar)) == 4


Damage = Callable[[dict[str, Any]], object]
DAMAGES: dict[str, Damage] = {
    "goes up": lambda c: c["files"]["tokens"].update(name=".."),
    "goes elsewhere": lambda c: c["files"]["tokens"].update(name="../../../x.parquet"),
    "absolute": lambda c: c["files"]["tokens"].update(name="/etc/passwd"),
    "no name": lambda c: c["files"]["tokens"].update(name=""),
    "a table less": lambda c: c["files"].pop("summary"),
    "a table more": lambda c: c["files"].update(x=c["files"]["tokens"]),
    "no files": lambda c: c.update(files=[]),
    "files of text": lambda c: c.update(files=dict.fromkeys(layout.TABLES, "x")),
    "another shard": lambda c: c.update(shard="0" * 32),
    "no attempt": lambda c: c.pop("attempt"),
    "no counts": lambda c: c.update(counts=None),
    "another measure": lambda c: c.update(measure="0" * 32),
    "no slices": lambda c: c.pop("slices"),
    "slices of text": lambda c: c.update(slices="x"),
    "no maker": lambda c: c.update(made_by=None),
    "a count of text": lambda c: c["counts"].update(tokens="many"),
    "a count below 0": lambda c: c["counts"].update(tokens=-1),
    "a count beyond all": lambda c: c["counts"].update(tokens=10**400),
    "seconds of text": lambda c: c.update(seconds="x"),
    "another version": lambda c: c.update(schema_version=99),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_commit_is_refused(store: str, tmp_path: Path, name: str) -> None:
    _publish(store, SHARD, "a" * 16, tmp_path)
    edit_checksummed(
        shard_files.shard_uri(store, MEASURE_ID, SHARD.id) + "/commit.json", DAMAGES[name]
    )
    with pytest.raises(StoreError, match=r"commit\.json (is damaged|has schema version 99)"):
        find_commits(store, MEASURE_ID, [SHARD])


def test_no_byte_of_a_commit_changes_unseen(store: str, tmp_path: Path) -> None:
    commit = _publish(store, SHARD, "a" * 16, tmp_path)
    assert shard_files.read_committed(store, MEASURE_ID, SHARD.id) == (commit, SHARD)
    uri = shard_files.shard_uri(store, MEASURE_ID, SHARD.id) + "/commit.json"
    data = storage.read_bytes(uri)
    for at in range(0, len(data), 7):
        rewrite(uri, data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(StoreError, match=r"commit\.json (is damaged|has schema version)"):
            shard_files.read_commit(store, MEASURE_ID, SHARD.id)
    rewrite(uri, data)
    assert shard_files.read_commit(store, MEASURE_ID, SHARD.id) == commit


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 2**40), min_size=8, max_size=8),
    st.floats(allow_nan=False),
    st.booleans(),
)
def test_packed_commits_are_those_that_were_given(
    numbers: list[int], seconds: float, neurons: bool
) -> None:
    tables = layout.TABLES + (layout.NEURON_TABLES if neurons else ())
    attempt = f"{numbers[0]:016x}"
    files = {
        t: CommitEntry(
            name=f"{attempt}-{t}.parquet",
            rows=numbers[1],
            bytes=numbers[2],
            sha256=f"{at:064x}",
        )
        for at, t in enumerate(tables)
    }
    counts = {f"count {at}": n for at, n in enumerate(numbers)}
    ours = Commit("s", attempt, files, counts, seconds, {"device": "cpu", "torch": "2.13.0"})
    odd = [
        replace(ours, attempt="a"),
        replace(ours, files={}),
        replace(ours, counts={"n": 1 << 70}),
        replace(ours, files={"tokens": {**files["tokens"], "name": "other"}}),
        replace(ours, made_by={"a": ["b"]}),  # type: ignore[dict-item]
    ]
    kept, others = Commits(), Commits()
    for at, commit in enumerate([ours, *odd]):
        (kept if at % 2 else others)[f"{at}"] = replace(commit, shard=f"{at}")
    kept |= others
    assert len(kept) == 6 and "5" in kept and "6" not in kept
    for at, commit in enumerate(kept.in_order(map(str, range(6)))):
        assert commit == replace([ours, *odd][at], shard=f"{at}") == kept[f"{at}"]
    assert sys.getsizeof(kept._packed["0"]) < 400  # this one is packed
    assert total_counts([ours, ours]) == {name: 2 * n for name, n in counts.items()}


def test_a_plan_that_is_written_in_groups_has_the_fingerprint_of_its_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ReadOptions("auto", "text", None, "file", 1 << 20)
    shards = tuple(
        Shard.of([_slice(f"/c/{i}", 9), _slice(f"/d/{i}", 7)], options) for i in range(5)
    )
    config = RunConfig(corpus=("/c",), model="-", store=str(tmp_path))
    monkeypatch.setattr(plans, "AHEAD", 4)
    run = begin_run(config, MEASURE, Plan(shards, (), (), 0), OLD_NS).run
    table = pq.read_table(f"{run.uri}/plan.parquet")
    header = json.loads(table.schema.metadata[b"afn"])
    assert header.pop("sha256") == fingerprint([header, table.to_pylist()])
    assert len(table) == 10 and table["ordinal"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


# --- the size of a shard
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "shard_bytes"),
    [(0, 64 << 10), (1, 64 << 10), (1_900_000, 64 << 10), (4 << 20, 64 << 10),
     ((4 << 20) + 1, 256 << 10),
     (16 << 20, 256 << 10), (60_000_000, 1 << 20), (256 << 20, 4 << 20),
     ((256 << 20) + 1, 16 << 20),
     (1 << 50, 16 << 20)],
)  # fmt: skip
def test_the_size_class_of_the_corpus_alone_decides_the_size_of_a_shard(
    num_bytes: int, shard_bytes: int
) -> None:
    for num_files in (1, 7):
        sizes = [num_bytes // num_files] * (num_files - 1)
        sizes.append(num_bytes - sum(sizes))
        assert (
            listing.choose_shard_bytes([FileInfo(f"/{n}", n, "etag:x") for n in sizes])
            == shard_bytes
        )


def test_a_corpus_that_grows_within_its_class_keeps_its_shards_and_its_hashes(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()

    def write(name: str, num_lines: int) -> None:
        _write(folder / name, [f"{name} {i} " + "y" * 980 for i in range(num_lines)])
        os.utime(folder / name, ns=(OLD_NS, OLD_NS + num_lines))

    write("a.jsonl", 1900)
    asked = RunConfig(corpus=(str(folder),), model="m", store=str(tmp_path / "store"))
    first = make_plan(asked)
    assert 25 <= len(first.shards) <= 32 and first.shard_bytes == 64 << 10
    assert max(s.num_bytes for s in first.shards) < 66 << 10
    _begin(asked)
    assert make_plan(replace(asked, workers=9)) == replace(first, num_hashed=0)

    write("a.jsonl", 2000)  # lines at the end
    write("b.jsonl", 300)
    grown = make_plan(asked)
    assert grown.num_hashed == 2 and _ids(grown)[: len(first.shards) - 1] == _ids(first)[:-1]
    _begin(asked)
    write("c.jsonl", 2100)  # over the border: all of it is cut anew
    crossed = make_plan(asked)
    assert crossed.shard_bytes == 256 << 10 and crossed.num_hashed == 3
    assert not set(_ids(crossed)) & set(_ids(grown)) and 16 <= len(crossed.shards) <= 20
    (folder / "c.jsonl").unlink()
    back = make_plan(asked)  # and back: as it was, and remembered
    assert back == replace(grown, num_hashed=0)
    named = make_plan(replace(asked, shard_bytes=64 << 10))  # the same size, asked for by name
    assert _ids(named) == _ids(grown) and named.num_hashed == 0


# --- bounds and what is foreign ---


def test_a_shard_has_a_bounded_number_of_slices_and_bytes_of_names() -> None:
    slices = [_slice(f"/corpus/{i}", 1) for i in range(MOST_SLICES * 2 + 1)]
    groups = group_slices(slices, 1 << 40)
    assert [s for g in groups for s in g] == slices
    assert [len(g) for g in groups] == [MOST_SLICES, MOST_SLICES, 1]
    long = [_slice(f"/corpus/{i}/" + "\x01" * 4000, 1) for i in range(2000)]  # 24 kB each in JSON
    groups = group_slices(long, 1 << 40)
    assert [s for g in groups for s in g] == long
    assert all(sum(len(json.dumps(s.uri)) for s in g) <= MOST_NAMES_BYTES for g in groups)
    body = {"slices": [asdict(s) for s in groups[0]]}
    assert len(checksums.checksummed(body)) < checksums.JSON_BYTES


def test_nothing_is_written_that_no_reader_takes(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig
) -> None:
    monkeypatch.setattr(checksums, "JSON_BYTES", 1000)
    with pytest.raises(
        StoreError, match=r"of 1,\d\d\d bytes was not written: .* its longest entry is long"
    ):
        calibrations.write_calibration(config.store, "0" * 32, {"short": 1, "long": "x" * 1000})
    with pytest.raises(
        ConfigError, match=r"corpus names 100,000 places in .* bytes; expected at most"
    ):
        replace(
            config,
            corpus=tuple(
                f"/a/folder/with/a/name/that/has/some/length/{i:050}" for i in range(100_000)
            ),
        )
    with pytest.raises(ConfigError, match="allow_quarantined is 5001; expected at most 5000"):
        replace(config, allow_quarantined=5001)


def test_a_clock_that_was_in_the_year_9999_does_not_end_later_runs(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)

    names = []
    for at in range(5):
        with monkeypatch.context() as patch:
            if at in (1, 2):
                patch.setattr(run_claims, "datetime", Clock)
            names.append(finish_run(_begin(replace(config, sink_factor=2.0 + at)), RUN_INFO).id)
        assert find_run(config.store).id == names[-1]
    assert names == sorted(names) and len(set(names)) == 5
    assert all(layout.is_run_name(name) for name in names)


def test_a_plan_with_a_flipped_bit_is_not_remembered_in_silence(config: RunConfig) -> None:
    run = _begin(config)
    data = storage.read_bytes(f"{run.uri}/plan.parquet")
    for at in random.Random(1).sample(range(4, len(data)), 25):
        damaged = bytearray(data)
        damaged[at] ^= 16
        rewrite(f"{run.uri}/plan.parquet", bytes(damaged))
        try:
            plan = make_plan(config)
        except StoreError as error:
            assert "plan.parquet is damaged" in str(error)
        else:  # what tells how it was compressed, or a bit that nobody reads
            rewrite(f"{run.uri}/plan.parquet", data)
            assert plan.shards == make_plan(config).shards


def test_parts_of_a_table_are_those_of_the_whole_without_columns_that_it_lacks(
    tmp_path: Path,
) -> None:
    run = RunFolder(str(tmp_path), str(tmp_path.parent), "r", {})
    whole = pa.table({"layer": [1, 1, 2, 2], "word": ["a", None, "a", "b"], "n": [4, 3, 2, 1]})
    entry = manifest.write_table(run, "words", whole)
    complete = replace(run, info={"tables": {"words": entry}})
    wanted = (pc.field("layer") == 2) & pc.field("word").isin(["a"])
    for folder in (run, complete):
        assert manifest.read_table(folder, "words").equals(whole)
        some = manifest.read_table(folder, "words", ["n", "newer", "word"])
        assert some.equals(whole.select(["n", "word"]))
        found = manifest.read_table(folder, "words", ["n"], wanted)
        assert found.to_pydict() == {"n": [2]}
    Path(tmp_path / entry["name"]).write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="damaged"):
        manifest.read_table(complete, "words", ["n"])
    with pytest.raises(StoreError, match="damaged"):
        manifest.read_table(run, "words", ["n"])
