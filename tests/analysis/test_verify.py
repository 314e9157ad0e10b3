"""Whatever happens to a store, verify finds it and names the file; what is as it was committed is
left in peace.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray import verify_store
from afn_ray.analysis.findings import Finding
from afn_ray.analysis.table_difference import difference
from afn_ray.analysis.verify import Verification, lines
from afn_ray.cli import commands
from afn_ray.corpus_values import FileSlice, ReadOptions, Shard
from afn_ray.errors import ConfigError, StoreError
from afn_ray.fingerprints import fingerprint
from afn_ray.measure import Measure
from afn_ray.store import calibrations, layout, manifest, plans, shard_files, storage, uris
from afn_ray.store.layout import RAY_IGNORE
from conftest import (
    afn,
    config_of,
    edit_checksummed,
    edit_table,
    recommit,
    rewrite,
    stop_after,
    write_jsonl,
)

MEASURE: dict[str, Any] = {"shard_bytes": 3000, "layers": "0,2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> Path:
    """A store of one complete run: several shards, a text of many windows, an empty one, and a line
    that is no JSON.
    """
    folder = tmp_path_factory.mktemp("verify")
    (folder / "corpus").mkdir()
    texts = [*verses[:60], " ".join(verses[60:75]), "", *verses[75:90]]
    write_jsonl(folder / "corpus/a.jsonl", [*({"text": t} for t in texts), "no JSON"])
    (folder / "corpus/b.txt").write_text(" ".join(verses[90:100]))
    (folder / "corpus/c.txt").write_text("")
    afn_ray.run(config_of(tiny_bert, folder / "corpus", folder / "store", **MEASURE)).close()
    return folder / "store"


@pytest.fixture(scope="module")
def other(made: Path, tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """The same corpus under another measure, in a store of its own: other strengths in the same
    schema.
    """
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(made.parent / "corpus", folder / "corpus")
    changed = MEASURE | {"window_tokens": 32}
    afn_ray.run(config_of(tiny_bert, made.parent / "corpus", folder / "store", **changed)).close()
    return folder / "store"


@dataclass(frozen=True)
class Copy:
    """A copy of a store, to be damaged; ``shards`` are the folders of its shards, the largest
    first.
    """

    uri: str
    shards: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        return [f.uri for f in storage.list_below(self.uri)]

    @property
    def run(self) -> str:
        (name,) = storage.list_names(f"{self.uri}/runs")
        return uris.absolute(f"{self.uri}/runs/{name}")

    def file(self, table: str, folder: str = "") -> str:
        """URI of a file of the shard in ``folder``, or of the largest."""
        folder = folder or self.shards[0]
        (name,) = (n for n in storage.list_names(folder) if n.endswith(f"-{table}.parquet"))
        return f"{folder}/{name}"

    @property
    def commit(self) -> str:
        return f"{self.shards[0]}/commit.json"

    def verify(self, **options: Any) -> Verification:
        return verify_store(self.uri, **options)


def copy(source: Path, target: str) -> Copy:
    for file in source.rglob("*"):
        if file.is_file() and file.name != RAY_IGNORE:  # nothing relies on it
            storage.write_once(f"{target}/{file.relative_to(source)}", file.read_bytes())
    tokens = [f for f in storage.list_below(target) if f.uri.endswith("-tokens.parquet")]
    return Copy(
        target, tuple(f.uri.rpartition("/")[0] for f in sorted(tokens, key=lambda f: -f.size))
    )


@pytest.fixture
def store(made: Path, quiet_place: str) -> Copy:
    """A copy of the store on each kind of filesystem."""
    return copy(made, quiet_place)


def flip(uri: str, at: float) -> None:
    """Change one bit of the byte at the share ``at`` of the file."""
    data = bytearray(storage.read_bytes(uri))
    data[int(at * len(data))] ^= 16
    rewrite(uri, bytes(data))


def swap(store: Copy, table: str, data: bytes, **changes: Any) -> None:
    """Put ``data`` in the place of a shard's file, and have its commit say that this is right."""
    recommit(store.shards[0], table, data, **changes)


def edit_rows(store: Copy, table: str, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Edit a shard's table; its commit and footer say that this is right."""
    file = pq.ParquetFile(io.BytesIO(storage.read_bytes(store.file(table))))
    before = file.read()
    after = edit(before).cast(before.schema).replace_schema_metadata(before.schema.metadata)
    sink, at = io.BytesIO(), 0
    with pq.ParquetWriter(sink, after.schema) as writer:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            writer.write_table(after.slice(at, size))
            at += size
        if at < len(after):
            writer.write_table(after.slice(at))
    swap(store, table, sink.getvalue(), rows=len(after))


def put(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    at = table.schema.get_field_index(column)
    return table.set_column(
        at, table.schema.field(at), pa.array(values, table.schema.field(at).type)
    )


def forge_plan(store: Copy, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> str:
    """Edit the run's plan, make its checksum right, and give the run the name that fits; returns
    its new plan.
    """
    before = manifest.find_run(store.run)
    shards, header = plans.read_shards(before)
    table = manifest.read_table(before, "plan")
    rows = edit(table.to_pylist())
    header["sha256"] = fingerprint([header, rows])
    ids = list({row["ordinal"]: row["shard"] for row in rows}.values())
    ask = {
        "measure": fingerprint(header["measure"]),
        "shards": ids,
        "language": "auto",
        "sink_factor": 10.0,
        "screen": 1000,
        "frozen": [],
        "classes": header["classes"],
    }
    name = f"20990101T000000.000Z-{fingerprint(ask)[:12]}"
    for file in storage.list_below(before.uri):
        data = storage.read_bytes(file.uri)
        storage.write_once(f"{store.uri}/runs/{name}/{file.uri.rpartition('/')[2]}", data)
        storage.delete([file.uri])
    if Path(before.uri).exists():
        Path(before.uri).rmdir()
    uri = f"{store.uri}/runs/{name}"
    forged = pa.Table.from_pylist(rows, table.schema).replace_schema_metadata(
        {"afn": json.dumps(header)}
    )
    edit_checksummed(f"{uri}/run.json", lambda info: info.update(id=name))
    edit_table(uri, "plan", lambda _: forged)
    assert len(shards) > 3
    return f"{uri}/plan.parquet"


def kinds(v: Verification) -> list[tuple[str, str]]:
    return [(f.kind, f.uri) for f in v.findings]


# --- what is whole
# ---------------------------------------------------------------------------------------


def test_a_store_that_is_whole_is_said_to_be(store: Copy) -> None:
    v = store.verify()
    assert (v.findings, v.orphans, v.incomplete, v.unproved) == ((), (), (), ())
    run = manifest.find_run(store.uri)
    counts = run.info["counts"]
    assert (v.num_shards, v.num_rows, v.num_runs) == (counts["shards"], counts["tokens"], 1)
    assert counts["shards"] > 3 and counts["empty"] == 2 and counts["quarantined"] == 1
    assert v.num_files == 3 * v.num_shards + len(run.info["tables"]) == 3 * v.num_shards + 13
    sizes = {f.uri: f.size for f in storage.list_below(store.uri) if not f.uri.endswith(".json")}
    assert v.num_bytes == sum(sizes.values())
    one = verify_store(run.uri)
    assert replace(one, uri=v.uri, seconds=v.seconds) == v
    assert list(lines(v))[-1].endswith("all is as it was committed")


def test_shards_of_no_run_are_checked_too(store: Copy) -> None:
    storage.delete([f for f in store.files if "/runs/" in f])
    v = store.verify()
    assert not v.findings and v.num_shards > 3 and v.num_runs == 0
    flip(store.file("tokens"), 0.5)
    assert kinds(store.verify()) == [("damaged", store.file("tokens"))]


def test_an_unfinished_run_is_no_damage(
    tmp_path: Path, made: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_bert, made.parent / "corpus", tmp_path / "store", **MEASURE)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            afn_ray.run(config)
    v = verify_store(config.store)
    (run,) = v.incomplete
    assert not v.findings and v.num_shards == 2 and v.num_runs == 0
    assert verify_store(run).num_shards == 2
    plan = pq.read_table(f"{run}/plan.parquet")
    header = plan.schema.metadata[b"afn"].replace(b'"language": "auto"', b'"language": "de"')
    pq.write_table(plan.replace_schema_metadata({"afn": header}), f"{run}/plan.parquet")
    assert kinds(verify_store(config.store)) == [("damaged", f"{run}/plan.parquet")]


def test_the_reread_of_many_batches_is_the_same(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afn_ray.store.records.BATCH_ROWS", 7)
    assert not verify_store(str(made)).findings


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    for uri in (str(tmp_path), f"{tmp_path}/runs/x", "memory://nothing"):
        with pytest.raises(StoreError, match="neither a store nor a run"):
            verify_store(uri)
    with pytest.raises(ConfigError, match="min_age_h is nan"):
        verify_store(str(tmp_path), min_age_h=float("nan"))


# --- damage
# ----------------------------------------------------------------------------------------------

RUN_TABLES = ("plan", "shards", "thresholds", "histogram", "vocabulary")
WHY = {
    "flipped": "its SHA-256 is",
    "cut": "bytes, expected",
    "longer": "bytes, expected",
    "emptied": "bytes, expected",
    "missing": "there is no such file",
}
"""Kinds of damage to a file, and what is said of each."""
DAMAGES = tuple(WHY)


@pytest.mark.parametrize("table", layout.TABLES)
def test_a_damaged_file_of_a_shard_is_named(store: Copy, table: str) -> None:
    """Five shards, each with its own damage: one check names them all."""
    expected = []
    for folder, damage in zip(store.shards, DAMAGES, strict=False):
        uri = store.file(table, folder)
        hurt(uri, damage)
        expected.append(("missing" if damage == "missing" else "damaged", uri))
    assert len(expected) == len(DAMAGES)
    v = store.verify()
    assert sorted(kinds(v)) == sorted(expected) and v.unproved == (store.run,)
    messages = {finding.uri: finding.message for finding in v.findings}
    for damage, (_, uri) in zip(DAMAGES, expected, strict=True):
        assert f"delete {uri.rpartition('/')[0]} and" in messages[uri]
        assert WHY[damage] in messages[uri]


@pytest.mark.parametrize("name", [*(f"{t}.parquet" for t in RUN_TABLES), "run.json"])
def test_a_damaged_file_of_a_run_is_named(store: Copy, name: str) -> None:
    uri = f"{store.run}/{name}"
    whole = storage.read_bytes(uri)
    for damage in DAMAGES:
        hurt(uri, damage)
        v = verify_store(store.run)
        if (name, damage) == ("run.json", "missing"):
            assert not v.findings and v.incomplete == (
                store.run,
            )  # the run was not finished, as far as one can tell
        else:
            assert kinds(v) == [("missing" if damage == "missing" else "damaged", uri)], damage
            assert v.unproved == (store.run,)
        if damage != "missing":
            rewrite(uri, whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_commit_is_named_and_its_files_are_no_orphans(store: Copy, damage: str) -> None:
    hurt(store.commit, damage)
    v = store.verify(clean=True, min_age_h=0 if damage != "missing" else 24)
    assert kinds(v) == [("missing" if damage == "missing" else "damaged", store.commit)]
    assert len(storage.list_names(store.shards[0])) == 4 - (damage == "missing")


def hurt(uri: str, damage: str) -> None:
    data = storage.read_bytes(uri)
    if damage == "flipped":
        flip(uri, 0.5)
    elif damage == "missing":
        storage.delete([uri])
    else:
        rewrite(uri, {"cut": data[:-9], "longer": data + b"\n", "emptied": b""}[damage])


def test_no_byte_of_a_store_changes_unseen(made: Path, tmp_path: Path) -> None:
    """Change one byte of each folder, 40 times: all are found, and nothing else."""
    store = copy(made, str(tmp_path / "store"))
    chance = random.Random(4)
    folders: dict[Path, list[Path]] = {}
    for file in map(Path, store.files):
        if file.name != "status.json":  # nothing relies on it
            folders.setdefault(file.parent, []).append(file)
    assert len(folders) > 4 and not store.verify().findings
    for _ in range(40):
        whole: dict[Path, bytes] = {}
        changed: dict[str, tuple[int, int, int]] = {}
        for files in folders.values():
            file = chance.choice(files)
            whole[file] = file.read_bytes()
            data = bytearray(whole[file])
            at = chance.randrange(len(data))
            data[at] ^= chance.randrange(1, 256)
            file.write_bytes(data)
            changed[str(file)] = at, whole[file][at], data[at]
        assert {f.uri for f in store.verify().findings} == {*changed}, changed
        for file, data_before in whole.items():
            file.write_bytes(data_before)
    assert not store.verify().findings


def remove(folder: str) -> None:
    fs, path = uris.open_filesystem(folder)
    fs.rm(path, recursive=True)


@pytest.mark.parametrize(
    ("quiet_place", "name"),
    [
        ("local", "tokens"),
        ("memory", "summary"),
        ("local", "commit.json"),
        ("memory", "thresholds.parquet"),
        ("local", "run.json"),
        ("memory", "plan.parquet"),
    ],
    indirect=["quiet_place"],
)
def test_doing_what_a_finding_says_mends_the_store(
    store: Copy, made: Path, tiny_bert: Path, name: str
) -> None:
    in_run = name.endswith(".parquet") or name == "run.json"
    uri = (
        f"{store.run}/{name}"
        if in_run
        else store.commit
        if name == "commit.json"
        else store.file(name)
    )
    flip(uri, 0.5)
    (finding,) = store.verify().findings
    assert finding.uri == uri
    if f"delete {store.run} and give 'afn run' again" in finding.message:
        remove(store.run)
    else:
        assert "run.json" in finding.message and "again" in finding.message
        storage.delete([f"{store.run}/run.json"])
        if f"delete {store.shards[0]} and {store.run}/run.json" in finding.message:
            remove(store.shards[0])
    assert (name == "plan.parquet") is (not storage.list_names(f"{store.uri}/runs"))
    rows = afn_ray.verify_store(str(made)).num_rows
    afn_ray.run(config_of(tiny_bert, made.parent / "corpus", store.uri, **MEASURE)).close()
    v = store.verify()
    assert not v.findings and v.num_runs == 1 and v.num_rows == rows


# --- what was put in the place of another
# ----------------------------------------------------------------


def test_a_copied_shard_is_found_however_well_it_is_disguised(store: Copy) -> None:
    original = store.shards[0]
    name = "0" * 32
    folder = original.rpartition("/")[0] + f"/{name}"
    for file in storage.list_below(original):
        storage.write_once(f"{folder}/{file.uri.rpartition('/')[2]}", storage.read_bytes(file.uri))
    commit = f"{folder}/commit.json"
    v = store.verify()
    assert (
        kinds(v) == [("damaged", commit)] and "it is the commit of shard" in v.findings[0].message
    )
    edit_checksummed(commit, lambda c: c.update(shard=name))
    assert ("misplaced", commit) in kinds(store.verify())
    body = json.loads(storage.read_bytes(commit))
    body["slices"][0]["uri"] += "2"
    shard = Shard.of([FileSlice(**s) for s in body["slices"]], ReadOptions(**body["options"]))
    disguised = folder.replace(name, shard.id)
    for file in storage.list_below(folder):
        storage.write_once(
            f"{disguised}/{file.uri.rpartition('/')[2]}", storage.read_bytes(file.uri)
        )
        storage.delete([file.uri])
    edit_checksummed(
        f"{disguised}/commit.json", lambda c: c.update(shard=shard.id, slices=body["slices"])
    )
    found = kinds(store.verify())
    assert {k for k, _ in found} == {"misplaced"} and len(found) == 3
    assert all(uri.startswith(disguised) and uri.endswith(".parquet") for _, uri in found)


@pytest.mark.parametrize("table", layout.TABLES)
@pytest.mark.parametrize("whose", ["measure", "shard", "table"])
def test_a_file_from_elsewhere_is_found_behind_an_edited_commit(
    store: Copy, other: Path, table: str, whose: str
) -> None:
    find: dict[str, Callable[[], Path | str]] = {
        "measure": lambda: next(
            (other / "shards").glob(f"*/{store.shards[0].rpartition('/')[2]}/*-{table}.parquet")
        ),
        "shard": lambda: next(
            f for f in store.files if f.endswith(f"-{table}.parquet") and store.shards[0] not in f
        ),
        "table": lambda: store.file(
            {"tokens": "documents", "documents": "summary", "summary": "tokens"}[table]
        ),
    }
    data = storage.read_bytes(str(find[whose]()))
    swap(store, table, data, rows=pq.ParquetFile(io.BytesIO(data)).metadata.num_rows)
    v = store.verify()
    assert kinds(v) == [("misplaced", store.file(table))]
    assert v.findings[0].message.startswith("it was written as {")


def test_a_commit_that_takes_the_name_of_another_attempt_is_found(store: Copy) -> None:
    edit_checksummed(store.commit, lambda c: c.update(attempt="f" * 16))
    assert {k for k, _ in kinds(store.verify())} == {"misplaced"}


COMMIT_EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a count": ("rows", lambda c: c["counts"].update(tokens=c["counts"]["tokens"] + 1)),
    "a count of special tokens": ("rows", lambda c: c["counts"].update(special=0)),
    "a count less": ("rows", lambda c: c["counts"].pop("chars")),
    "the content of the corpus": ("misplaced", lambda c: c["slices"][0].update(sha256="0" * 64)),
    "how it was read": ("misplaced", lambda c: c["options"].update(text_column="body")),
    "another measure": ("damaged", lambda c: c.update(measure="0" * 32)),
}


@pytest.mark.parametrize("edit", COMMIT_EDITS)
def test_an_edited_commit_is_found(store: Copy, edit: str) -> None:
    kind, change = COMMIT_EDITS[edit]
    body = json.loads(storage.read_bytes(store.commit))
    change(body)
    before = storage.read_bytes(store.commit)
    rewrite(store.commit, (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())
    assert kinds(store.verify()) == [("damaged", store.commit)]
    rewrite(store.commit, before)
    edit_checksummed(store.commit, change)
    assert kinds(store.verify()) == [(kind, store.commit)]


def test_row_counts_of_a_commit_are_those_of_its_files(store: Copy) -> None:
    edit_checksummed(store.commit, lambda c: c["files"]["summary"].update(rows=1))
    assert kinds(store.verify()) == [("rows", store.file("summary"))]


# --- rows
# ------------------------------------------------------------------------------------------------


def _swapped(table: pa.Table) -> pa.Table:
    order = np.arange(len(table))
    order[[5, 6]] = 6, 5
    return table.take(pa.array(order))


ROW_EDITS: dict[str, tuple[str, Callable[[pa.Table], pa.Table], str]] = {
    "lost": ("tokens", lambda t: pa.concat_tables([t.slice(0, 5), t.slice(6)]), "documents have"),
    "doubled": ("tokens", lambda t: pa.concat_tables([t.slice(0, 6), t.slice(5)]),
                "documents have"),
    "one lost and one doubled": (
        "tokens", lambda t: pa.concat_tables([t.slice(0, 4), t.slice(5, 1), t.slice(5)]),
        "row 4: position is 5"),
    "out of order": ("tokens", _swapped, "row 5: position is 6, expected 5"),
    "in another document": ("tokens", lambda t: put(t, "doc_in_shard", 3, 1),
                            "row 3: doc_in_shard is 1, expected 0"),
    "not rounded": ("tokens", lambda t: put(t, "strength_2", 3, 1.2345678),
                    "which is never recorded"),
    "not finite": ("tokens", lambda t: put(t, "strength_0", 3, float("nan")), "strength_0 is nan"),
    "negative": ("tokens", lambda t: put(t, "strength_0", 3, -1.0), "strength_0 is -1.0"),
    "minus zero": ("tokens", lambda t: put(t, "strength_0", 3, -0.0), "strength_0 is -0.0"),
    "another strength": ("tokens", lambda t: put(t, "strength_2", 3, 64.0),
                         "doc 0: mean_strength_2"),
    "another type": ("tokens", lambda t: put(t, "token_id", 3, 7), "not the summary of the tokens"),
    "no longer special": ("tokens", lambda t: put(t, "flags", 0, 0), "mean_strength_0"),
    "a column less": ("tokens", lambda t: t.drop_columns(["length"]), "schema"),
    "a document lost": ("documents", lambda t: t.slice(1), "doc_in_shard is not 0 to"),
    "a document doubled": ("documents", lambda t: pa.concat_tables([t.slice(0, 2), t.slice(1)]),
                           "doc_in_shard is not 0 to"),
    "a token more": ("documents", lambda t: put(t, "n_tokens", 0, t["n_tokens"][0].as_py() + 1),
                     "together"),
    "called empty": ("documents", lambda t: put(t, "status", 0, "empty"), "and status 'empty'"),
    "another mean": ("documents", lambda t: put(t, "mean_strength_2", 0, 1.0),
                     "doc 0: mean_strength_2 is 1.0"),
    "bytes lost": ("documents", lambda t: put(t, "lost_bytes", 0, 7),
                   "its counts are {'lost_bytes'"),
    "a document said to be lost": ("documents", lambda t: put(t, "lost_documents", 0, 1),
                                   "doc 0 has {'status': 'ok'"),
    "a loss unknown": ("documents", lambda t: put(t, "lost_documents", 0, None),
                       "doc 0 has {'status': 'ok'"),
    "less than nothing lost": ("documents", lambda t: put(t, "lost_bytes", 0, -1),
                               "doc 0 has {'status': 'ok'"),
    "characters replaced": ("documents", lambda t: put(t, "n_replaced", 0, 2),
                            "its counts are {'replaced'"),
    "more characters": ("documents", lambda t: put(t, "n_chars", 0, 10**6),
                        "its counts are {'chars'"),
    "other counts of documents": ("summary", lambda t: put(t, "n_docs", 0, 10**6),
                                  "not the summary"),
    "a type lost": ("summary", lambda t: t.slice(1), "not the summary"),
}  # fmt: skip


@pytest.mark.parametrize("edit", ROW_EDITS)
def test_a_wrong_row_is_found_though_commit_and_footer_agree(
    made: Path, tmp_path: Path, edit: str
) -> None:
    store = copy(made, str(tmp_path / "store"))
    table, change, says = ROW_EDITS[edit]
    if edit == "a column less":
        data = storage.read_bytes(store.file(table))
        sink = io.BytesIO()
        pq.write_table(change(pq.read_table(io.BytesIO(data))), sink)
        swap(store, table, sink.getvalue())
    else:
        edit_rows(store, table, change)
    (finding,) = store.verify().findings
    assert finding.kind == "rows" and says in finding.message
    assert finding.uri.rpartition("/")[0] == store.shards[0]


def test_an_edit_of_rows_that_changes_nothing_is_none(made: Path, tmp_path: Path) -> None:
    store = copy(made, str(tmp_path / "store"))
    for table in layout.TABLES:
        edit_rows(store, table, lambda t: t)
    assert [
        f for f in store.verify().findings if f.kind != "tables"
    ] == []  # only the sizes in shards.parquet differ


# --- runs
# ------------------------------------------------------------------------------------------------

RUN_EDITS: dict[str, tuple[str, Callable[[pa.Table], pa.Table], str]] = {
    "q3": ("thresholds", lambda t: put(t, "q3", 0, 1.0), "row 0: q3 is 1.0, but its shards give"),
    "q1 without sinks": ("thresholds", lambda t: put(t, "q1", 3, 1.0), "q1 is 1.0"),
    "n": ("thresholds", lambda t: put(t, "n", 0, 7), "n is 7"),
    "n_high": ("thresholds", lambda t: put(t, "n_high", 2, 7), "n_high is 7"),
    "n_sinks": ("thresholds", lambda t: put(t, "n_sinks", 2, 7), "n_sinks is 7"),
    "n_special": ("thresholds", lambda t: put(t, "n_special", 2, 7), "n_special is 7"),
    "mean": ("thresholds", lambda t: put(t, "mean", 2, 7.0), "mean is 7"),
    "sd": ("thresholds", lambda t: put(t, "sd", 2, 7.0), "sd is 7"),
    "a row of thresholds": ("thresholds", lambda t: t.slice(0, 3), "it has 1 row, expected 2"),
    "n of a type": ("vocabulary", lambda t: put(t, "n", 9, 7777), "token_id"),
    "a type": ("vocabulary", lambda t: t.slice(1), "token_id"),
    "n_high of a type": ("vocabulary", lambda t: put(t, "n_high", 9, 7777), "token_id"),
    "n_docs of a type": (
        "vocabulary",
        lambda t: put(t, "n_docs", 9, 7777),
        "row 9: n_docs is 7777",
    ),
    "q2 of a type": ("vocabulary", lambda t: put(t, "q2", 9, 1.0), "row 9: q2 is 1.0"),
    "share of a type": (
        "vocabulary",
        lambda t: put(t, "share_high_low", 9, 0.123),
        "row 9: share_high_low",
    ),
    "n of words": ("word_vocabulary", lambda t: put(t, "n", 9, 7777), "count of the words"),
    "HIGH first pieces": (
        "word_vocabulary",
        lambda t: put(t, "n_high_first", 9, 7777),
        "of the words",
    ),
    "mean of words": ("word_vocabulary", lambda t: put(t, "mean", 9, 1.0), "row 9: mean is 1.0"),
    "histogram": ("histogram", lambda t: put(t, "n", 9, 7777), "row 9: n is 7777"),
    "offsets of shards": ("shards", lambda t: put(t, "doc_offset", 1, 0), "row 1: doc_offset is 0"),
    "loss of shards": ("shards", lambda t: put(t, "lost_bytes", 0, 9), "row 0: lost_bytes is 9"),
    "loss of a file": ("files", lambda t: put(t, "lost_bytes", 0, 9), "row 0: lost_bytes is 9"),
    "characters of a file": (
        "files",
        lambda t: put(t, "n_replaced", 0, 9),
        "row 0: n_replaced is 9",
    ),
    "a file less": ("files", lambda t: t.slice(1), "rows, expected"),
    "loss of a source": (
        "sources",
        lambda t: put(t, "share_read", 0, 0.5),
        "row 0: share_read is 0.5",
    ),
    "order of shards": (
        "shards",
        lambda t: pa.concat_tables([t.slice(1), t.slice(0, 1)]),
        "row 0: ordinal is 1",
    ),
    "a shard twice": ("shards", lambda t: pa.concat_tables([t, t.slice(0, 1)]), "rows, expected"),
    "another file": (
        "shards",
        lambda t: put(t, "tokens_file", 0, t["tokens_file"][1].as_py()),
        "tokens_file",
    ),
}


@pytest.mark.parametrize("edit", RUN_EDITS)
def test_a_run_whose_table_was_edited_is_found(made: Path, tmp_path: Path, edit: str) -> None:
    store = copy(made, str(tmp_path / "store"))
    table, change, says = RUN_EDITS[edit]
    edit_table(store.run, table, change)
    (finding,) = store.verify().findings
    assert (finding.kind, finding.uri) == ("tables", f"{store.run}/{table}.parquet")
    assert says in finding.message and f"delete {store.run}/run.json" in finding.message


INFO_EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "counts": ("tables", lambda i: i["counts"].update(tokens=1)),
    "bytes lost": (
        "tables",
        lambda i: i["counts"].update(lost_bytes=i["counts"]["lost_bytes"] + 1),
    ),
    "characters replaced": ("tables", lambda i: i["counts"].update(replaced=1)),
    "layers": ("tables", lambda i: i.update(layers=[2])),
    "measure": ("misplaced", lambda i: i["measure"].update(dtype="bfloat16")),
    "name": ("misplaced", lambda i: i.update(id="20990101T000000.000Z-000000000000")),
    "a table less": ("missing", lambda i: i["tables"].pop("histogram")),
    "a table of text": ("damaged", lambda i: i["tables"].update(histogram="histogram.parquet")),
    "quarantine": (
        "tables",
        lambda i: i.update(quarantined=[{"shard": "x", "uri": "x", "reason": "x"}]),
    ),
}


@pytest.mark.parametrize("edit", INFO_EDITS)
def test_an_edited_run_json_is_found(made: Path, tmp_path: Path, edit: str) -> None:
    store = copy(made, str(tmp_path / "store"))
    kind, change = INFO_EDITS[edit]
    edit_checksummed(f"{store.run}/run.json", change)
    assert kinds(store.verify()) == [(kind, f"{store.run}/run.json")]


def test_a_shard_listed_twice_or_never_is_found(made: Path, tmp_path: Path) -> None:
    store = copy(made, str(tmp_path / "store"))
    more = 1000

    def twice(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return rows + [{**row, "ordinal": more} for row in rows if row["ordinal"] == 0]

    plan = forge_plan(store, twice)
    (finding,) = store.verify().findings
    assert (finding.kind, finding.uri) == ("plan", plan) and "2 times" in finding.message
    plan = forge_plan(store, lambda rows: [r for r in rows if r["ordinal"] not in (1, more)])
    v = store.verify()
    assert {(f.kind, f.uri) for f in v.findings} == {("plan", plan)} and "never" in v.findings[
        0
    ].message


def test_a_plan_that_ends_before_its_file_does_is_found(made: Path, tmp_path: Path) -> None:
    store = copy(made, str(tmp_path / "store"))
    forge_plan(store, lambda rows: [{**r, "size": r["size"] + 1} for r in rows])
    assert "its last slice ends at" in store.verify().findings[0].message


def test_a_measure_that_lacks_a_key_is_damage_of_the_plan_and_not_of_its_shards(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy(made, str(tmp_path / "store"))

    def of_dict(stored: dict[str, Any]) -> Measure:
        raise KeyError("dtype")

    monkeypatch.setattr(Measure, "of_dict", of_dict)
    (finding,) = store.verify().findings
    assert (finding.kind, finding.uri) == ("damaged", f"{store.run}/plan.parquet")
    assert "its measure is not what afn-ray writes: KeyError('dtype')" in finding.message


def test_a_run_without_one_of_its_shards_says_so_unless_it_gave_it_up(
    made: Path, tmp_path: Path
) -> None:
    store = copy(made, str(tmp_path / "store"))
    gone = store.shards[0]
    storage.delete([f.uri for f in storage.list_below(gone)])
    assert kinds(store.verify()) == [("missing", f"{gone}/commit.json")]
    given_up = {"shard": gone.rpartition("/")[2], "uri": "a.jsonl", "reason": "it hangs"}
    edit_checksummed(f"{store.run}/run.json", lambda info: info.update(quarantined=[given_up]))
    assert "missing" not in {
        f.kind for f in store.verify().findings
    }  # its counts and tables still include it


def test_two_measures_and_runs_in_one_store_are_told_apart(
    made: Path, other: Path, tmp_path: Path
) -> None:
    store = copy(made, str(tmp_path / "store"))
    copy(other, store.uri)
    v = store.verify()
    assert not v.findings and v.num_runs == 2
    first, second = (f"{store.uri}/runs/{name}" for name in storage.list_names(f"{store.uri}/runs"))
    measure = manifest.find_run(second).info["measure"]["id"]
    hurt_file = next(
        f for f in store.files if f"/{measure}/" in f and f.endswith("-summary.parquet")
    )
    flip(hurt_file, 0.5)
    assert not verify_store(first).findings
    assert kinds(verify_store(second)) == kinds(store.verify()) == [("damaged", hurt_file)]
    assert store.verify().unproved == (second,) and store.verify().num_runs == 1


def test_a_damaged_calibration_is_named(store: Copy) -> None:
    calibrations.write_calibration(store.uri, "abc", {"dtype": "float32"})
    assert not store.verify().findings
    uri = uris.absolute(f"{store.uri}/pilots/abc.json")
    flip(uri, 0.7)
    assert kinds(store.verify()) == [("damaged", uri)]


# --- orphans
# ---------------------------------------------------------------------------------------------


def test_orphans_are_listed_and_only_those_that_nobody_can_need_are_removed(store: Copy) -> None:
    measure = store.shards[0].rpartition("/")[0]
    beside = f"{store.shards[0]}/{'e' * 16}-tokens.parquet"
    hidden = f"{store.shards[0]}/.commit.json-{'e' * 32}"
    alone = f"{measure}/{'1' * 32}/{'e' * 16}-documents.parquet"
    before = store.files
    for uri in (beside, hidden, alone):
        storage.write_once(uri, b"of an attempt that died")
    v = store.verify()
    assert not v.findings
    assert {(o.uri, o.removable, o.removed) for o in v.orphans} == {
        (beside, True, False),
        (hidden, True, False),
        (alone, False, False),
    }
    assert all(o.num_bytes == 23 and o.age_s < 600 for o in v.orphans)
    v = store.verify(clean=True)
    assert {o.uri for o in v.orphans if o.removed} == {beside, hidden}
    assert sorted(store.files) == sorted([*before, alone])
    v = store.verify(clean=True, min_age_h=0)
    assert [(o.uri, o.removed) for o in v.orphans] == [(alone, True)]
    assert store.files == before
    v = store.verify()
    assert not v.findings and not v.orphans and v.num_runs == 1


def test_a_commit_that_came_meanwhile_keeps_its_files(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that had stood still commits between the listing and the removal."""
    store = copy(made, str(tmp_path / "store"))
    before, commit = store.files, storage.read_bytes(store.commit)
    uri = store.commit
    storage.delete([f"{store.run}/run.json", uri])
    read = shard_files.read_committed
    calls: list[object] = []

    def commits_late(*place: Any) -> Any:
        found = read(*place)
        if found is None and not calls:
            calls.append(place)
            storage.write_once(uri, commit)
        return found

    monkeypatch.setattr(shard_files, "read_committed", commits_late)
    v = store.verify(clean=True, min_age_h=0)
    assert calls and len(v.orphans) == 3 and not any(o.removed for o in v.orphans)
    assert sorted([*store.files, f"{store.run}/run.json"]) == before


def test_what_a_dead_reduce_left_is_an_orphan_and_what_is_not_ours_is_left_alone(
    store: Copy,
) -> None:
    before = store.files
    left, probe = (
        f"{store.run}/histogram-{'e' * 16}.parquet",
        f"{uris.absolute(store.uri)}/probe-{'e' * 32}",
    )
    names = ("notes.txt", "runs/x.txt", "shards/zz/1/commit.json")
    foreign = [f"{uris.absolute(store.uri)}/{name}" for name in names]
    for uri in (left, probe, *foreign):
        storage.write_once(uri, b"x")
    v = store.verify(clean=True)
    assert {(o.uri, o.removed) for o in v.orphans} == {
        (left, True),
        (probe, False),
    } and not v.findings
    assert v.foreign == tuple(sorted(foreign))
    assert sum(line.startswith("foreign ") for line in lines(v)) == 3
    assert sorted(store.files) == sorted([*before, probe, *foreign])
    assert [o.removed for o in store.verify(clean=True, min_age_h=0).orphans] == [True]


def test_age_is_that_of_the_file(made: Path, tmp_path: Path) -> None:
    store = copy(made, str(tmp_path / "store"))
    storage.delete([store.commit])
    for file in Path(store.shards[0]).iterdir():
        os.utime(file, (0, 0))
    v = store.verify()
    assert len(v.orphans) == 3 and all(o.removable and o.age_s > 1e9 for o in v.orphans)


@pytest.mark.parametrize(
    ("info", "modified_s"),
    [
        ({"mtime": 12.5}, 12.5),
        ({"LastModified": datetime(2026, 1, 2, tzinfo=UTC)}, 1767312000.0),  # S3
        ({"updated": "2026-01-02T00:00:00Z"}, 1767312000.0),  # Google
        ({"created": datetime(2026, 1, 2, tzinfo=UTC), "LastModified": None}, 1767312000.0),
    ],
)
def test_every_filesystem_tells_the_age_of_a_file_its_own_way(
    info: dict[str, Any], modified_s: float
) -> None:
    assert storage.entry_modified_s(info) == modified_s


def test_a_file_without_an_age_is_young() -> None:
    assert abs(storage.entry_modified_s({}) - time.time()) < 60


def test_everything_below_a_folder_is_listed(quiet_place: str) -> None:
    assert storage.list_below(quiet_place) == []
    names = ["a", "b/.hidden", "b/c/d", "b/c/_e"]
    for name in names:
        storage.write_once(f"{quiet_place}/{name}", name.encode())
    found = storage.list_below(quiet_place)
    assert [f.uri for f in found] == sorted(
        uris.absolute(f"{quiet_place}/{name}") for name in names
    )
    assert all(
        f.size == len(storage.read_bytes(f.uri)) and abs(f.modified_s - time.time()) < 600
        for f in found
    )


@pytest.mark.parametrize(
    ("name", "change", "is_equal"),
    [
        ("beyond_low", 5e-10, True),
        ("expected", 2e-10, True),
        ("expected", 1e-5, False),
        ("idf", 2e-10, False),
        ("mean", 1e-13, True),
    ],
)
def test_only_columns_of_a_fit_may_differ_as_the_fit_of_older_runs_does(
    name: str, change: float, is_equal: bool
) -> None:
    ours, theirs = (pa.table({name: [0.5, 1e-3 + x]}) for x in (0.0, change))
    assert (difference(theirs, ours) == "") == is_equal


# --- the command
# -----------------------------------------------------------------------------------------


def test_the_command_prints_what_it_found_and_leaves_with_a_code(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed(*words: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as end:
            commands.main(["verify", *words])
        return end.value.code, *capsys.readouterr()

    store = copy(made, str(tmp_path / "store"))
    code, out, err = typed(store.uri)
    assert (code, err) == (0, "") and "all is as it was committed" in out
    flip(store.file("tokens"), 0.5)
    done = afn("verify", store.uri)
    assert done.returncode == 1 and done.stderr == f"afn: {store.uri} is damaged: 1 finding\n"
    first, unproved, last = done.stdout.splitlines()
    assert first.startswith(f"damaged     {store.file('tokens')}: its SHA-256 is ")
    assert unproved.startswith(f"unproved    {store.run}") and last.endswith("1 finding")
    code, out, _ = typed(store.run, "--json")
    (finding,) = json.loads(out)["findings"]
    assert code == 1 and Finding(**finding).uri == store.file("tokens")
