"""A corpus that changed: only what changed is done, and the run is the one that a new store would
have.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray.config import RunConfig
from afn_ray.corpus import listing as corpus
from afn_ray.corpus_values import FileInfo
from afn_ray.runs import worker
from afn_ray.runs.plan import make_plan
from afn_ray.store import corpus_files, manifest, run_claims, storage
from conftest import config_of, make_measure, recorded, write_jsonl

B = 1024
"""Bytes of a shard."""
OLD_NS = 1_700_000_000_000_000_000
DAY_NS = 86_400_000_000_000


@dataclass
class Work:
    """Work of a run: files read to plan, and shards measured."""

    hashed: int = 0
    measured: int = 0


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    done = Work()
    cut, process = corpus.cut, worker.Processor.process

    def counted_cut(*args: Any) -> Any:
        done.hashed += 1
        return cut(*args)

    def counted_process(*args: Any) -> Any:
        done.measured += 1
        return process(*args)

    monkeypatch.setattr(corpus, "cut", counted_cut)
    monkeypatch.setattr(worker.Processor, "process", counted_process)
    return done


def run_over(config: RunConfig, work: Work) -> tuple[afn_ray.Run, Work]:
    """The run of ``config``, and what it had to do."""
    work.hashed = work.measured = 0
    run = afn_ray.run(config)
    assert (
        work.measured == run.info["counts"]["shards"] - run.info["counts"]["shards_reused"]
        or not work.measured
    )
    return run, replace(work)


def check_same(mine: afn_ray.Run, theirs: afn_ray.Run) -> None:
    """Both runs hold the same rows, bit for bit, and the same tables and counts."""
    with mine, theirs:
        for ours, other in zip(recorded(mine), recorded(theirs), strict=True):
            assert ours.equals(other)
        tables = []
        for run in (mine, theirs):
            store, _, name = run.uri.rpartition("/runs/")
            folder = manifest.RunFolder(run.uri, store, name, run.info)
            shards = manifest.read_table(folder, "shards")
            files = [
                c
                for c in shards.column_names
                if c.endswith(("_file", "_bytes", "seconds")) and c != "num_bytes"
            ]
            screening = [manifest.read_table(folder, name) for name in ("sources", "screened")]
            tables.append(
                (manifest.read_table(folder, "histogram"), *screening, shards.drop_columns(files))
            )
            counts = {k: v for k, v in run.info["counts"].items() if k != "shards_reused"}
            where = (
                "SELECT doc, count(*), min(source) FROM tokens JOIN documents USING (doc) GROUP BY "
                "doc ORDER BY doc"
            )
            tables[-1] += (counts, run.info["corpus"], run.sql(where).fetchall())
        assert tables[0] == tables[1]


# --- one change
# ------------------------------------------------------------------------------------------


def lines_of(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": t} for t in texts]


def fill(folder: Path, verses: list[str]) -> None:
    """Ten files. Which small ones share a shard does not depend on their names: each lies between
    large ones.
    """
    folder.mkdir()
    for i in range(3):
        (folder / f"a{i}.txt").write_text(verses[i][:60])  # one shard, not a quarter full
    write_jsonl(folder / "b.jsonl", lines_of(verses[100:143]))
    (folder / "c.csv").write_text(
        "id,text\n" + "".join(f'{i},"{verses[i]}"\n' for i in range(200, 215))
    )
    pq.write_table(
        pa.table({"text": verses[300:324]}),
        folder / "d.parquet",
        row_group_size=8,
        compression="none",
    )
    data = "".join(json.dumps(row) + "\n" for row in lines_of(verses[400:440])).encode()
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
    write_jsonl(folder / "f.jsonl", lines_of(verses[500:502]))  # smaller than a shard, and alone
    (folder / "g.txt").write_text(" ".join(verses[600:612]))
    write_jsonl(folder / "h.jsonl", lines_of(verses[700:706]))
    for file in folder.iterdir():
        os.utime(file, ns=(OLD_NS, OLD_NS))


def sizes(folder: Path) -> None:
    """Corpus that the counts below rest on."""
    for name, low, high in (
        ("a0.txt", 1, B // 12),
        ("c.csv", B, 1 << 20),
        ("e.jsonl.gz", B, 1 << 20),
        ("f.jsonl", 1, B // 2),
        ("g.txt", B, 1 << 20),
    ):
        assert low <= (folder / name).stat().st_size <= high, name


@dataclass(frozen=True)
class Ground:
    """A corpus as it was yesterday, and the store of yesterday's run over ``corpus``."""

    pristine: Path
    corpus: Path
    store: Path
    slices: dict[str, list[tuple[int, int]]]  # file -> where its slices lie


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_gpt: Path, verses: list[str]) -> Ground:
    folder = tmp_path_factory.mktemp("increment")
    fill(folder / "pristine", verses)
    sizes(folder / "pristine")
    shutil.copytree(folder / "pristine", folder / "corpus")
    config = config_of(tiny_gpt, folder / "corpus", folder / "store", **SMALL)
    plan = make_plan(config)
    slices: dict[str, list[tuple[int, int]]] = {}
    for piece in (piece for shard in plan.shards for piece in shard.slices):
        slices.setdefault(piece.uri.rpartition("/")[2], []).append((piece.start, piece.end))
    assert len(slices["b.jsonl"]) == 5 and len(slices["d.parquet"]) == 3 and len(plan.shards) == 14
    afn_ray.run(config).close()
    return Ground(folder / "pristine", folder / "corpus", folder / "store", slices)


SMALL: dict[str, Any] = {"shard_bytes": B, "batch_tokens": 512, "layers": "0,2"}
Change = Callable[[Path, Ground, list[str]], object]


def add(folder: Path, name: str, texts: list[str]) -> None:
    with (folder / name).open("a") as sink:
        sink.writelines(json.dumps(row) + "\n" for row in lines_of(texts))


def replace_in(file: Path, start: int, old: bytes, new: bytes) -> None:
    data = file.read_bytes()
    at = data.index(old, start)
    file.write_bytes(data[:at] + new + data[at + len(old) :])


def insert(folder: Path, ground: Ground, slice: int) -> None:
    """A line at the beginning of a slice of b.jsonl."""
    at = ground.slices["b.jsonl"][slice][0]
    data = (folder / "b.jsonl").read_bytes()
    (folder / "b.jsonl").write_bytes(data[:at] + b'{"text": "a line between"}\n' + data[at:])


def truncate(folder: Path, ground: Ground, slice: int, part: float) -> None:
    start, end = ground.slices["b.jsonl"][slice]
    os.truncate(folder / "b.jsonl", int(start + part * (end - start)))


def write_parquet(folder: Path, texts: list[str]) -> None:
    pq.write_table(
        pa.table({"text": texts}), folder / "d.parquet", row_group_size=8, compression="none"
    )


def write_gzip(folder: Path, text: str) -> None:
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode(), mtime=0))


def add_two(folder: Path, ground: Ground, verses: list[str]) -> None:
    add(folder, "b9.jsonl", verses[:3])
    (folder / "a3.txt").write_text("one more")


def change_all(folder: Path, ground: Ground, verses: list[str]) -> None:
    add(folder, "b.jsonl", verses[:1])
    (folder / "c.csv").unlink()
    write_parquet(folder, verses[300:332])
    (folder / "a1.txt").unlink()
    shutil.copy(folder / "g.txt", folder / "g2.txt")
    (folder / "h.jsonl").rename(folder / "i.jsonl")
    os.utime(folder / "f.jsonl")


CHANGES: dict[str, tuple[int, int, Change]] = {  # files hashed, shards measured
    "append a line": (1, 1, lambda f, g, v: add(f, "b.jsonl", v[:1])),  # the last slice
    # the last slice, and what is new
    "append more than a shard": (1, 3, lambda f, g, v: add(f, "b.jsonl", v[:20])),
    "append to a small file": (1, 1, lambda f, g, v: add(f, "f.jsonl", v[:1])),
    # that slice and those behind it: they begin elsewhere
    "insert a line": (1, 3, lambda f, g, v: insert(f, g, 2)),
    "edit a line to another of its length": (1, 1, lambda f, g,
                                             v: replace_in(f / "b.jsonl", B, b"the", b"THE")),
    "edit a line to a longer one": (1, 4, lambda f, g,
                                    v: replace_in(f / "b.jsonl", B + 99, b"the", b"these")),
    "truncate in a slice": (1, 1, lambda f, g, v: truncate(f, g, 2, 0.5)),
    "truncate at the end of a slice": (1, 0, lambda f, g, v: truncate(f, g, 2, 1.0)),
    "empty a large file": (1, 1, lambda f, g, v: os.truncate(f / "b.jsonl", 0)),
    "empty a small file": (1, 1, lambda f, g, v: os.truncate(f / "a1.txt", 0)),
    "delete a large file": (0, 0, lambda f, g, v: (f / "b.jsonl").unlink()),
    # those that it shared a shard with
    "delete a small file": (0, 1, lambda f, g, v: (f / "a1.txt").unlink()),
    "rename a file": (1, 5, lambda f, g, v: (f / "b.jsonl").rename(f / "b2.jsonl")),  # a new source
    "duplicate a file": (1, 5, lambda f, g, v: shutil.copy(f / "b.jsonl", f / "b2.jsonl")),
    "add files": (2, 2, add_two),
    "change a text": (1, 1, lambda f, g, v: (f / "a0.txt").write_text("another")),
    "change a CSV": (1, 1, lambda f, g, v: replace_in(f / "c.csv", 99, b"the", b"a")),
    "change what is compressed": (1, 1, lambda f, g, v: write_gzip(f, "another")),
    "change a row group": (1, 1, lambda f, g,
                           v: write_parquet(f, [*v[300:315], v[308], *v[316:324]])),
    "add a row group": (1, 1, lambda f, g, v: write_parquet(f, v[300:332])),
    "all at once": (5, 5, change_all),
}  # fmt: skip


@pytest.fixture
def today(ground: Ground, tmp_path: Path) -> Path:
    """Yesterday's corpus, in its place; yesterday's store is ``tmp_path / "store"``."""
    shutil.rmtree(ground.corpus)
    shutil.copytree(ground.pristine, ground.corpus)
    shutil.copytree(ground.store, tmp_path / "store")
    return ground.corpus


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_costs_what_changed_and_gives_what_a_new_store_would(
    change: str,
    today: Path,
    ground: Ground,
    tmp_path: Path,
    tiny_gpt: Path,
    verses: list[str],
    work: Work,
) -> None:
    hashed, measured, act = CHANGES[change]
    act(today, ground, verses)
    before = {f.uri for f in storage.list_below(str(tmp_path / "store"))}
    mine, done = run_over(config_of(tiny_gpt, today, tmp_path / "store", **SMALL), work)
    assert (done.hashed, done.measured) == (hashed, measured)
    assert before < {
        f.uri for f in storage.list_below(str(tmp_path / "store"))
    }  # what left the run is in the store
    theirs, _ = run_over(config_of(tiny_gpt, today, tmp_path / "new", **SMALL), work)
    check_same(mine, theirs)


def test_what_is_as_it_was_costs_nothing_and_what_was_touched_a_hash(
    today: Path, tmp_path: Path, tiny_gpt: Path, work: Work
) -> None:
    config = config_of(tiny_gpt, today, tmp_path / "store", **SMALL)
    run, done = run_over(config, work)
    assert (done.hashed, done.measured) == (0, 0)
    os.utime(today / "b.jsonl", ns=(OLD_NS, OLD_NS + 1))
    again, done = run_over(config, work)
    assert (done.hashed, done.measured) == (1, 0) and again.uri == run.uri
    run.close()
    again.close()


def test_two_corpora_in_one_store_each_remember_their_files(
    today: Path, tmp_path: Path, tiny_gpt: Path, verses: list[str], work: Work
) -> None:
    one = config_of(tiny_gpt, today, tmp_path / "store", **SMALL)
    (tmp_path / "other").mkdir()
    add(tmp_path / "other", "x.jsonl", verses[:3])
    os.utime(tmp_path / "other" / "x.jsonl", ns=(OLD_NS, OLD_NS))
    other = config_of(tiny_gpt, tmp_path / "other", tmp_path / "store", **SMALL)
    hashed = []
    for config in (other, one, other, one):
        run, done = run_over(config, work)
        run.close()
        hashed.append(done.hashed)
    assert hashed == [1, 0, 0, 0]


# --- many nights
# -----------------------------------------------------------------------------------------


def edit(folder: Path, dice: random.Random, verses: list[str], night: int) -> None:
    """One to three changes at random, each at a time of its own."""
    for _ in range(dice.randint(1, 3)):
        files = sorted(folder.iterdir())
        file = dice.choice(files)
        text = dice.choice(verses)
        match dice.choice(
            ["append", "insert", "drop", "delete", "rename", "copy", "touch", "add", "empty"]
        ):
            case "append":
                add(folder, file.name, dice.choices(verses, k=dice.randint(1, 9)))
            case "insert" | "drop" as what:
                rows = file.read_text().splitlines(keepends=True)
                at = dice.randint(0, len(rows))
                kept = rows[at:] if what == "insert" else rows[at + 1 :]
                file.write_text("".join([*rows[:at], json.dumps({"text": text}) + "\n", *kept]))
            case "delete" if len(files) > 3:
                file.unlink()
                continue
            case "rename":
                file = file.rename(folder / f"{dice.randrange(10**6):06}.jsonl")
            case "copy":
                file = Path(shutil.copy(file, folder / f"{dice.randrange(10**6):06}.jsonl"))
            case "add":
                add(
                    folder,
                    name := f"{dice.randrange(10**6):06}.jsonl",
                    dice.choices(verses, k=dice.randint(1, 12)),
                )
                file = folder / name
            case "empty" if dice.random() < 0.3:
                os.truncate(file, 0)
        os.utime(file, ns=(0, OLD_NS + night * DAY_NS + dice.randrange(10**9)))


def test_ten_nights_of_any_changes(
    tmp_path: Path, tiny_gpt: Path, verses: list[str], work: Work
) -> None:
    dice = random.Random(5)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(8):
        write_jsonl(
            folder / f"{i}00000.jsonl", lines_of(dice.choices(verses, k=dice.randint(1, 12)))
        )
        os.utime(folder / f"{i}00000.jsonl", ns=(0, OLD_NS))
    config = replace(config_of(tiny_gpt, folder, tmp_path / "store", **SMALL), shard_bytes=2 * B)
    run_over(config, work)[0].close()
    num_measured = num_shards = 0
    for night in range(1, 11):
        known = {(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir()}
        seen = {shard.name for shard in (tmp_path / "store" / "shards").glob("*/*")}
        edit(folder, dice, verses, night)
        changed = [
            f
            for f in folder.iterdir()
            if (f.name, f.stat().st_size, f.stat().st_mtime_ns) not in known
        ]
        mine, done = run_over(config, work)
        plan = pq.read_table(f"{mine.uri}/plan.parquet")
        assert done.hashed == len(changed)
        assert done.measured == len(set(plan["shard"].to_pylist()) - seen)
        num_measured, num_shards = (
            num_measured + done.measured,
            num_shards + mine.info["counts"]["shards"],
        )
        if night in (4, 7, 10):
            theirs, _ = run_over(replace(config, store=str(tmp_path / f"{night}")), work)
            check_same(mine, theirs)
        mine.close()
    assert 0 < num_measured < num_shards / 2


# --- a bucket
# --------------------------------------------------------------------------------------------


def test_in_a_bucket_the_etag_tells(
    object_store: str, tmp_path: Path, tiny_bert: Path, verses: list[str], work: Work
) -> None:
    fill(tmp_path / "corpus", verses)
    keys = ("a0.txt", "a1.txt", "b.jsonl", "d.parquet")
    place = f"{object_store}/corpus"
    for key in keys:
        storage.upload(tmp_path / "corpus" / key, f"{place}/{key}")
    config = config_of(tiny_bert, place, f"{object_store}/store", **SMALL)
    run, done = run_over(config, work)
    run.close()
    assert done.hashed == 4 and done.measured == 9
    storage.upload(
        tmp_path / "corpus" / "b.jsonl", f"{place}/b.jsonl"
    )  # the same bytes have the same ETag
    run, done = run_over(config, work)
    run.close()
    assert (done.hashed, done.measured) == (0, 0)
    add(tmp_path / "corpus", "b.jsonl", verses[:1])
    storage.upload(tmp_path / "corpus" / "b.jsonl", f"{place}/b.jsonl")
    storage.delete([f"{place}/a1.txt"])
    mine, done = run_over(config, work)
    assert (done.hashed, done.measured) == (1, 2)
    theirs, _ = run_over(config_of(tiny_bert, place, f"{object_store}/new", **SMALL), work)
    check_same(mine, theirs)


def test_where_a_bucket_has_no_etag_the_time_does(
    object_store: str,
    tmp_path: Path,
    tiny_bert: Path,
    verses: list[str],
    work: Work,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then a file is trusted where its time is a number; a date is hashed again every night, and
    measured once.
    """
    write_jsonl(tmp_path / "b.jsonl", lines_of(verses[:10]))
    storage.upload(tmp_path / "b.jsonl", f"{object_store}/corpus/b.jsonl")
    find = corpus_files.find_files

    def without_etag(pattern: str, left_out: set[str]) -> list[FileInfo]:
        return [
            replace(file, version="time:2026-01-01 00:00:00+00:00")
            for file in find(pattern, left_out)
        ]

    monkeypatch.setattr(corpus_files, "find_files", without_etag)
    config = config_of(tiny_bert, f"{object_store}/corpus", f"{object_store}/store", **SMALL)
    plan = make_plan(config)
    run_claims.begin_run(config, make_measure(), plan, 0)
    work.hashed = 0
    assert make_plan(config).shards == plan.shards and work.hashed == 1
