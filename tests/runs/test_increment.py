"""A corpus that changed: only what changed is done, and the run is the one that a new store would
have.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray.config import RunConfig
from afn_ray.corpus import listing as corpus
from afn_ray.corpus_values import FileInfo, FileSlice, Shard
from afn_ray.runs import worker
from afn_ray.runs.plan import make_plan
from afn_ray.store import corpus_files, manifest, run_claims, storage
from conftest import config_of, make_measure, recorded, write_jsonl

B = 1024
"""Bytes of a shard."""
OLD_NS = 1_700_000_000_000_000_000
DAY_NS = 86_400_000_000_000


def part_of(*pieces: FileInfo | FileSlice) -> str:
    """The two characters with which the names of all ``pieces`` begin."""
    (name,) = {piece.uri.rpartition("/")[2][:2] for piece in pieces}
    return name


@dataclass
class Work:
    """Work of a run, by ``part_of``: files read to plan, and shards measured."""

    hashed: Counter[str] = field(default_factory=Counter)
    measured: Counter[str] = field(default_factory=Counter)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    done = Work()
    cut, process = corpus.cut, worker.Processor.process

    def counted_cut(file: FileInfo, *args: Any) -> Any:
        done.hashed[part_of(file)] += 1
        return cut(file, *args)

    def counted_process(self: Any, shard: Shard, *args: Any) -> Any:
        done.measured[part_of(shard.slices[0])] += 1
        return process(self, shard, *args)

    monkeypatch.setattr(corpus, "cut", counted_cut)
    monkeypatch.setattr(worker.Processor, "process", counted_process)
    return done


def run_over(config: RunConfig, work: Work) -> tuple[afn_ray.Run, Work]:
    """The run of ``config``, and what it had to do."""
    work.hashed, work.measured = Counter(), Counter()
    run = afn_ray.run(config)
    counts = run.info["counts"]
    num_measured = work.measured.total()
    assert num_measured == counts["shards"] - counts["shards_reused"] or not num_measured
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


def add(file: Path, texts: list[str]) -> None:
    with file.open("a") as sink:
        sink.writelines(json.dumps(row) + "\n" for row in lines_of(texts))


def replace_in(file: Path, start: int, old: bytes, new: bytes) -> None:
    data = file.read_bytes()
    at = data.index(old, start)
    file.write_bytes(data[:at] + new + data[at + len(old) :])


def write_parquet(file: Path, texts: list[str]) -> None:
    """A slice for every eight of ``texts``."""
    pq.write_table(pa.table({"text": texts}), file, row_group_size=8, compression="none")


def write_gzip(file: Path, texts: list[str]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in lines_of(texts)).encode()
    file.write_bytes(gzip.compress(data, mtime=0))


@dataclass(frozen=True)
class Part:
    """The files of one change: their names begin with ``name``, and no shard has others beside
    them.
    """

    folder: Path
    name: str
    verses: list[str]

    def file(self, ending: str = ".jsonl") -> Path:
        return self.folder / f"{self.name}{ending}"

    def end_of_slice(self, slice: int) -> int:
        """End of a slice of lines: the first newline at or after ``B`` bytes."""
        data, end = self.file().read_bytes(), 0
        for _ in range(slice + 1):
            end = data.index(b"\n", end + B) + 1
        return end


def large(part: Part) -> None:
    """Five shards."""
    write_jsonl(part.file(), lines_of(part.verses[100:143]))


def small(part: Part) -> None:
    """Three files in one shard, not a quarter full."""
    for i in range(3):
        part.file(f"-{i}.txt").write_text(part.verses[i][:60])


def lone(part: Part) -> None:
    """A file smaller than a shard, and alone."""
    write_jsonl(part.file(), lines_of(part.verses[500:502]))
    assert part.file().stat().st_size < B // 2


def csv(part: Part) -> None:
    rows = "".join(f'{i},"{part.verses[i]}"\n' for i in range(200, 215))
    part.file(".csv").write_text("id,text\n" + rows)
    assert part.file(".csv").stat().st_size > B


def compressed(part: Part) -> None:
    write_gzip(part.file(".jsonl.gz"), part.verses[400:440])
    assert part.file(".jsonl.gz").stat().st_size > B


def groups(part: Part) -> None:
    """Three shards."""
    write_parquet(part.file(".parquet"), part.verses[300:324])


def text(part: Part) -> None:
    part.file(".txt").write_text(" ".join(part.verses[600:612]))
    assert part.file(".txt").stat().st_size > B


def nothing(part: Part) -> None:
    """No file yet."""


def insert(part: Part, at: int) -> None:
    data = part.file().read_bytes()
    part.file().write_bytes(data[:at] + b'{"text": "a line between"}\n' + data[at:])


def edit_row_group(part: Part) -> None:
    v = part.verses
    write_parquet(part.file(".parquet"), [*v[300:315], v[308], *v[316:324]])


Act = Callable[[Part], object]
# By change: the files as they were, files hashed, shards measured, and what is done. Which small
# files share a shard does not depend on their names: each lies between large ones.
CHANGES: dict[str, tuple[Act, int, int, Act]] = {
    "append a line": (large, 1, 1, lambda p: add(p.file(), p.verses[:1])),  # the last slice
    "empty a small file": (small, 1, 1, lambda p: os.truncate(p.file("-1.txt"), 0)),
    # the last slice, and what is new
    "append more than a shard": (large, 1, 3, lambda p: add(p.file(), p.verses[:20])),
    # those that it shared a shard with
    "delete a small file": (small, 0, 1, lambda p: p.file("-1.txt").unlink()),
    # that slice and those behind it: they begin elsewhere
    "insert a line": (large, 1, 3, lambda p: insert(p, p.end_of_slice(1))),
    "change a text": (small, 1, 1, lambda p: p.file("-0.txt").write_text("another")),
    "edit a line to another of its length": (large, 1, 1,
                                             lambda p: replace_in(p.file(), B, b"the", b"THE")),
    "append to a small file": (lone, 1, 1, lambda p: add(p.file(), p.verses[:1])),
    "edit a line to a longer one": (large, 1, 4,
                                    lambda p: replace_in(p.file(), B + 99, b"the", b"these")),
    "add a file to a shard": (small, 1, 1, lambda p: p.file("-3.txt").write_text("one more")),
    "truncate in a slice": (large, 1, 1, lambda p: os.truncate(
        p.file(), (p.end_of_slice(1) + p.end_of_slice(2)) // 2)),
    "add a file": (nothing, 1, 1, lambda p: add(p.file(), p.verses[:3])),
    "truncate at the end of a slice": (large, 1, 0,
                                       lambda p: os.truncate(p.file(), p.end_of_slice(2))),
    "empty a large file": (large, 1, 1, lambda p: os.truncate(p.file(), 0)),
    "delete a large file": (large, 0, 0, lambda p: p.file().unlink()),
    # a new source
    "rename a file": (large, 1, 5, lambda p: p.file().rename(p.file("-2.jsonl"))),
    "duplicate a file": (large, 1, 5, lambda p: shutil.copy(p.file(), p.file("-2.jsonl"))),
    "change a CSV": (csv, 1, 1, lambda p: replace_in(p.file(".csv"), 99, b"the", b"a")),
    "change what is compressed": (compressed, 1, 1,
                                  lambda p: write_gzip(p.file(".jsonl.gz"), ["another"])),
    "change a row group": (groups, 1, 1, edit_row_group),
    "add a row group": (groups, 1, 1,
                        lambda p: write_parquet(p.file(".parquet"), p.verses[300:332])),
    "touch": (text, 1, 0, lambda p: os.utime(p.file(".txt"))),
    "leave as it is": (text, 0, 0, lambda p: None),
}  # fmt: skip
NUM_SHARDS: dict[Act, int] = {
    large: 5,
    small: 1,
    lone: 1,
    csv: 1,
    compressed: 1,
    groups: 3,
    text: 1,
    nothing: 0,
}


def parts_of(folder: Path, verses: list[str]) -> dict[str, Part]:
    """The part of the corpus of each change."""
    return {change: Part(folder, f"{i:02}", verses) for i, change in enumerate(CHANGES)}


@dataclass(frozen=True)
class Ground:
    """A corpus as it was yesterday, and the store of yesterday's run over ``corpus``."""

    pristine: Path
    corpus: Path
    store: Path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_gpt: Path, verses: list[str]) -> Ground:
    folder = tmp_path_factory.mktemp("increment")
    (folder / "pristine").mkdir()
    for change, part in parts_of(folder / "pristine", verses).items():
        CHANGES[change][0](part)
    for file in (folder / "pristine").iterdir():
        os.utime(file, ns=(OLD_NS, OLD_NS))
    shutil.copytree(folder / "pristine", folder / "corpus")
    config = config_of(tiny_gpt, folder / "corpus", folder / "store", **SMALL)
    shards = Counter(part_of(*shard.slices) for shard in make_plan(config).shards)
    expected = {f"{i:02}": NUM_SHARDS[made] for i, (made, *_) in enumerate(CHANGES.values())}
    assert shards == Counter(expected)
    afn_ray.run(config).close()
    return Ground(folder / "pristine", folder / "corpus", folder / "store")


SMALL: dict[str, Any] = {"shard_bytes": B, "batch_tokens": 512, "layers": "0,2"}


@pytest.fixture
def today(ground: Ground, tmp_path: Path) -> Path:
    """Yesterday's corpus, in its place; yesterday's store is ``tmp_path / "store"``."""
    shutil.rmtree(ground.corpus)
    shutil.copytree(ground.pristine, ground.corpus)
    shutil.copytree(ground.store, tmp_path / "store")
    return ground.corpus


def test_a_change_costs_what_changed_and_gives_what_a_new_store_would(
    today: Path, tmp_path: Path, tiny_gpt: Path, verses: list[str], work: Work
) -> None:
    """All changes in one night, each of files of its own, whose work is counted apart."""
    parts = parts_of(today, verses)
    for change, part in parts.items():
        CHANGES[change][3](part)
    before = {f.uri for f in storage.list_below(str(tmp_path / "store"))}
    mine, done = run_over(config_of(tiny_gpt, today, tmp_path / "store", **SMALL), work)
    costs = {c: (done.hashed[part.name], done.measured[part.name]) for c, part in parts.items()}
    assert costs == {
        change: (hashed, measured) for change, (_, hashed, measured, _) in CHANGES.items()
    }
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
    assert not done.hashed and not done.measured
    os.utime(today / "00.jsonl", ns=(OLD_NS, OLD_NS + 1))
    again, done = run_over(config, work)
    assert done.hashed == {"00": 1} and not done.measured and again.uri == run.uri
    run.close()
    again.close()


def test_two_corpora_in_one_store_each_remember_their_files(
    today: Path, tmp_path: Path, tiny_gpt: Path, verses: list[str], work: Work
) -> None:
    one = config_of(tiny_gpt, today, tmp_path / "store", **SMALL)
    (tmp_path / "other").mkdir()
    add(tmp_path / "other" / "x.jsonl", verses[:3])
    os.utime(tmp_path / "other" / "x.jsonl", ns=(OLD_NS, OLD_NS))
    other = config_of(tiny_gpt, tmp_path / "other", tmp_path / "store", **SMALL)
    hashed = []
    for config in (other, one, other, one):
        run, done = run_over(config, work)
        run.close()
        hashed.append(done.hashed.total())
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
                add(file, dice.choices(verses, k=dice.randint(1, 9)))
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
                file = folder / f"{dice.randrange(10**6):06}.jsonl"
                add(file, dice.choices(verses, k=dice.randint(1, 12)))
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
        assert done.hashed.total() == len(changed)
        assert done.measured.total() == len(set(plan["shard"].to_pylist()) - seen)
        num_measured, num_shards = (
            num_measured + done.measured.total(),
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
    object_store: str, tmp_path: Path, tiny_gpt: Path, verses: list[str], work: Work
) -> None:
    folder, place = tmp_path / "corpus", f"{object_store}/corpus"
    folder.mkdir()
    small(Part(folder, "00", verses))
    large(Part(folder, "01", verses))
    for file in folder.iterdir():
        storage.upload(file, f"{place}/{file.name}")
    config = config_of(tiny_gpt, place, f"{object_store}/store", **SMALL)
    run, done = run_over(config, work)
    run.close()
    assert done.hashed == {"00": 3, "01": 1} and done.measured == {"00": 1, "01": 5}
    # the same bytes have the same ETag
    storage.upload(folder / "01.jsonl", f"{place}/01.jsonl")
    run, done = run_over(config, work)
    run.close()
    assert not done.hashed and not done.measured
    add(folder / "01.jsonl", verses[:1])
    storage.upload(folder / "01.jsonl", f"{place}/01.jsonl")
    storage.delete([f"{place}/00-1.txt"])
    mine, done = run_over(config, work)
    assert done.hashed == {"01": 1} and done.measured == {"00": 1, "01": 1}
    theirs, _ = run_over(config_of(tiny_gpt, place, f"{object_store}/new", **SMALL), work)
    check_same(mine, theirs)


def test_where_a_bucket_has_no_etag_the_time_does(
    object_store: str,
    tmp_path: Path,
    tiny_gpt: Path,
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
    config = config_of(tiny_gpt, f"{object_store}/corpus", f"{object_store}/store", **SMALL)
    plan = make_plan(config)
    run_claims.begin_run(config, make_measure(), plan, 0)
    work.hashed = Counter()
    assert make_plan(config).shards == plan.shards and work.hashed.total() == 1
