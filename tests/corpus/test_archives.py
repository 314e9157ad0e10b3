"""Members of zip and tar archives are files of the corpus, with identities of their own."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray.corpus import first, listing, reading
from afn_ray.corpus_values import Document, FileSlice, ReadOptions
from afn_ray.errors import CorpusChanged, CorpusError
from afn_ray.runs import plan
from afn_ray.store import readers, storage, uris
from conftest import config_of
from test_corpus import jsonl

OPTIONS = ReadOptions("auto", "text", None, "line", 1 << 20)


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def tarred(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


PACK: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "zip": zipped,
    "stored.zip": lambda members: zipped(members, zipfile.ZIP_STORED),
    "bz2.zip": lambda members: zipped(members, zipfile.ZIP_BZIP2),
    "tar": tarred,
    "gnu.tar": lambda members: tarred(members, tarfile.GNU_FORMAT),
}


def slices_of(
    place: str | Path, options: ReadOptions = OPTIONS, shard_bytes: int = 40
) -> list[FileSlice]:
    files, _ = listing.list_files([str(place)], options)
    listing.check_columns(files, options)
    return [piece for file in files for piece in listing.cut(file, options, shard_bytes)]


def read(
    place: str | Path, options: ReadOptions = OPTIONS, shard_bytes: int = 40
) -> dict[str, list[Document]]:
    """Documents by member."""
    found: dict[str, list[Document]] = {}
    for piece in slices_of(place, options, shard_bytes):
        documents = list(reading.read(piece, options))
        assert piece.num_documents in (-1, len(documents))
        found.setdefault(piece.uri.partition("::")[2], []).extend(documents)
    return found


@pytest.mark.parametrize("kind", PACK)
def test_members_are_read_as_the_files_that_they_are(kind: str, tmp_path: Path) -> None:
    texts = [f"text {i} é" for i in range(20)]
    lines = jsonl(*({"text": text} for text in texts))
    members = {
        "deep/a.jsonl": lines,
        "../b.txt": "\n".join(texts).encode(),
        "/abs/c.csv": b"text\n" + "\n".join(texts).encode(),
        "n" * 150 + "/d.txt": "\n".join(texts).encode(),
        "e.pdf": b"no corpus",
        "__MACOSX/._a.jsonl": b"\0\1\2",
        ".hidden.txt": b"hidden",
    }
    if "stored" in kind or "tar" in kind:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": texts}), sink)
        members |= {"f.parquet": sink.getvalue().to_pybytes(), "g.jsonl.gz": gzip.compress(lines)}
    path = tmp_path / f"x.{kind}"
    path.write_bytes(PACK[kind](members))
    found = read(path)
    assert sorted(found) == sorted(set(members) - {"e.pdf", "__MACOSX/._a.jsonl", ".hidden.txt"})
    for name, documents in found.items():
        assert [d.text for d in documents] == texts, name
        assert {d.source for d in documents} == {f"{path}::{name}"}
    if "stored" in kind or "tar" in kind:  # members that are not compressed are cut
        assert len(slices_of(f"{path}::deep/a.jsonl")) > 1


def test_a_name_or_a_glob_after_the_mark_names_members(tmp_path: Path) -> None:
    for name in ("x.zip", "y.zip"):
        (tmp_path / name).write_bytes(
            zipped({"a/1.txt": b"1", "a/b/2.txt": b"2", "3.txt": b"3", ".h.txt": b"4"})
        )
    assert [*read(f"{tmp_path}/x.zip::a/1.txt")] == ["a/1.txt"]
    assert [*read(f"{tmp_path}/x.zip::*.txt")] == [".h.txt", "3.txt"]
    assert [*read(f"{tmp_path}/x.zip::**/*.txt")] == [".h.txt", "3.txt", "a/1.txt", "a/b/2.txt"]
    files, _ = listing.list_files([f"{tmp_path}/*.zip::a/*.txt"], OPTIONS)
    assert [Path(file.uri).parts[-2:] for file in files] == [
        ("x.zip::a", "1.txt"),
        ("y.zip::a", "1.txt"),
    ]
    with pytest.raises(CorpusError, match=r"x\.zip::\*\.csv: no files match"):
        read(f"{tmp_path}/x.zip::*.csv")
    named = tmp_path / "z.zip::a.txt"
    named.write_bytes(b"a local file of that name")
    assert [d.text for d in read(named)["a.txt"]] == ["a local file of that name"]


def test_an_archive_without_a_known_member_is_skipped_as_one_file(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zipped({f"{i}.png": b"x" for i in range(5)}))
    (tmp_path / "y.zip").write_bytes(zipped({"a.png": b"x", "b.txt": b"text"}))
    files, skipped = listing.list_files([str(tmp_path)], OPTIONS)
    assert [file.uri for file in files] == [f"{tmp_path}/y.zip::b.txt"]
    assert sorted(file.uri for file in skipped) == [f"{tmp_path}/x.zip", f"{tmp_path}/y.zip::a.png"]


def test_a_member_keeps_its_identity_while_its_archive_changes(
    tiny_bert: Path, tmp_path: Path
) -> None:
    texts = {f"{i}.jsonl": jsonl({"text": f"in the beginning {i}"}) for i in range(4)}
    config = config_of(tiny_bert, tmp_path / "c.zip", tmp_path / "s")
    identities = []
    for members in (texts, {"0.txt": b"more"} | texts):
        (tmp_path / "c.zip").write_bytes(zipped(members))
        slices = [piece for shard in plan.make_plan(config).shards for piece in shard.slices]
        identities.append({json.dumps(piece.identity) for piece in slices})
    assert identities[0] < identities[1]
    with afn_ray.run(config) as run:
        assert run.sql("SELECT count(*) FROM documents").fetchall() == [(5,)]
    assert not afn_ray.verify_store(str(tmp_path / "s")).findings
    (tmp_path / "c.zip").write_bytes(zipped(texts))
    gone = next(piece for piece in slices if piece.uri.endswith("::0.txt"))
    for piece in slices:
        if piece is not gone:
            assert len(list(reading.read(piece, config.read_options))) == 1
    with pytest.raises(CorpusChanged, match=r"c\.zip::0\.txt is gone"):
        list(reading.read(gone, config.read_options))


@pytest.mark.parametrize("kind", PACK)
def test_a_limit_takes_the_first_documents_of_members(kind: str, tmp_path: Path) -> None:
    lines = [f"text {i}\n" for i in range(10)]
    path = tmp_path / f"x.{kind}"
    path.write_bytes(PACK[kind]({f"{i}.txt": "".join(lines).encode() for i in range(3)}))
    files, _ = listing.list_files([str(path)], OPTIONS)
    found = first.cut_first(files, 17, OPTIONS, lambda file: listing.parts(file, OPTIONS, 40))
    texts = [d.text for piece in found.slices for d in reading.read(piece, OPTIONS)]
    assert texts == [line.strip() for line in [*lines, *lines[:7]]]
    assert found.unread.first == f"{path}::2.txt"


# --- damage


@pytest.mark.parametrize("kind", ["zip", "stored.zip", "tar"])
def test_a_damaged_archive_is_quarantined_and_counted(kind: str, tmp_path: Path) -> None:
    chance = random.Random(3)
    members = {f"{i}.txt": b"%d\n" % i * 400 for i in range(5)}
    data = PACK[kind](members)
    path = tmp_path / f"x.{kind}"
    for cut in (1, 30, 600, 1500, len(data) // 2, len(data) - 5, len(data)):
        left = max(0, len(data) - cut)
        path.write_bytes(data[:left])
        found = read(path)
        if "zip" in kind:  # the directory is at the end
            (document,) = found.pop("")
            assert "not a readable zip archive" in str(document.problem) and not found
            assert document.lost_bytes == max(1, left)
        elif "" in found:
            (document,) = found.pop("")
            assert "not a readable tar archive from byte" in str(document.problem)
            read_bytes = sum(512 + -(-len(members[name]) // 512) * 512 for name in found)
            assert document.lost_bytes == max(1, left - read_bytes)
        assert all(d.problem is None for documents in found.values() for d in documents)
    for _ in range(25):
        bad = bytearray(data)
        at = chance.randrange(len(bad))
        bad[at : at + 9] = chance.randbytes(9)
        path.write_bytes(bad)
        try:
            read(path)
        except CorpusError as error:
            assert str(path) in str(error)


def test_bytes_after_the_end_of_a_tar_are_one_quarantined_document(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    first, second = tarred({"a.txt": b"a"}), tarred({"b.txt": b"b"})
    with_hole = first[:1024] + bytes(512) + second
    for data, num_lost in ((first + second, len(second)), (with_hole, len(second))):
        path.write_bytes(data)
        found = read(path)
        assert [d.text for d in found.pop("a.txt")] == ["a"]
        (rest,) = found.pop("")
        assert "bytes after the mark of its end" in str(rest.problem) and not found
        assert rest.lost_bytes == num_lost
    path.write_bytes(first + bytes(3 << 20))
    assert [*read(path)] == ["a.txt"]


def test_global_headers_of_a_tar_give_members_no_other_bytes_and_no_other_time(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.tar"
    many = {f"k{i}": "v" for i in range(101)}
    for headers, why in (
        ({"size": "3000"}, "has two sizes"),
        ({"size": "1"}, "has two sizes"),
        ({"size": "-1"}, "has -1 bytes"),
        (many, "more than 100 global headers"),
    ):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", pax_headers=headers) as archive:
            for i in range(9):
                info = tarfile.TarInfo(f"{i}.txt")
                info.size = 600
                archive.addfile(info, io.BytesIO(bytes(600)))
        path.write_bytes(data.getvalue())
        (rest,) = read(path).pop("")
        assert why in str(rest.problem) and rest.lost_bytes == len(data.getvalue())
    nested = tarfile.TarInfo("a.txt")
    nested.type = tarfile.XHDTYPE
    path.write_bytes(nested.tobuf(tarfile.GNU_FORMAT) * 3000 + bytes(1024))
    assert "recursion" in str(read(path)[""][0].problem)


@pytest.mark.parametrize("kind", PACK)
def test_members_with_dots_in_their_paths_are_not_hidden(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    names = ["./a.txt", "./x/b.txt", "x/./c.txt", "../d.txt", "x/.hidden.txt", "./_hidden/e.txt"]
    path.write_bytes(PACK[kind](dict.fromkeys(names, b"text")))
    assert sorted(read(path)) == ["../d.txt", "a.txt", "x/./c.txt", "x/b.txt"]


def test_a_member_may_have_a_name_too_long_for_a_disk(tmp_path: Path) -> None:
    name = "n" * 300 + ".txt"
    (tmp_path / "x.zip").write_bytes(zipped({name: b"text"}))
    assert [d.text for d in read(tmp_path / "x.zip")[name]] == ["text"]


def test_a_changed_bit_in_a_compressed_member_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    data = bytearray(zipped({"a.txt": bytes(range(32, 127)) * 40 + b"\n"}))
    path.write_bytes(data)
    assert read(path)["a.txt"][-1].problem is None
    data[data.index(b"PK\1\2") + 16] ^= 1  # the checksum in the directory
    path.write_bytes(data)
    *_, last = read(path)["a.txt"]
    assert "its checksum is another; what came of it may be altered" in str(last.problem)


@pytest.mark.parametrize("shard_bytes", [40, 1 << 20])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "jsonl.gz", "txt", "parquet"])
def test_a_changed_byte_in_a_stored_member_is_found(
    ending: str, shard_bytes: int, tmp_path: Path
) -> None:
    options = replace(OPTIONS, txt_documents="file")
    table = pa.table({"text": ["text one", "text two", "text six"] * 9})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    lines = jsonl(*table.to_pylist())
    content = {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines, 0),
        "csv": b"text\n" + b"\n".join(row["text"].encode() for row in table.to_pylist()) + b"\n",
        "txt": lines,
        "parquet": sink.getvalue().to_pybytes(),
    }[ending]
    path = tmp_path / "x.zip"
    data = bytearray(zipped({f"a.{ending}": content, "b.txt": b"fine"}, zipfile.ZIP_STORED))
    path.write_bytes(data)
    whole = read(path, options, shard_bytes)
    assert all(d.problem is None for documents in whole.values() for d in documents)
    place = data.index(b"text two" if ending != "jsonl.gz" else b"six")
    data[place : place + 1] = b"T"
    path.write_bytes(data)
    found = read(path, options, shard_bytes)
    assert [d.text for d in found["b.txt"]] == ["fine"]
    *others, last = found[f"a.{ending}"]
    assert str(last.problem) and last.lost_bytes > 0 and last.source == f"{path}::a.{ending}"
    if ending != "jsonl.gz":  # which has a checksum of its own
        assert "its checksum is another" in str(last.problem)
    num_read = 0 if ending in ("parquet", "txt") else 27
    assert len(others) == num_read or ending == "jsonl.gz"
    if not num_read:
        assert last.lost_bytes == len(content)


@pytest.mark.parametrize("limit", [26, 27, 28, 29])
def test_a_limit_finds_an_altered_stored_member_where_it_reads_its_end(
    limit: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.zip"
    lines = jsonl(*({"text": f"text {i}"} for i in range(27)))
    data = zipped({"a.jsonl": lines, "b.txt": b"b"}, zipfile.ZIP_STORED)
    path.write_bytes(data.replace(b"text 3", b"text X", 1))
    files, _ = listing.list_files([str(path)], OPTIONS)
    found = first.cut_first(files, limit, OPTIONS, lambda file: listing.parts(file, OPTIONS, 100))
    documents = [d for piece in found.slices for d in reading.read(piece, OPTIONS)]
    problems = [d.problem for d in documents if d.problem]
    assert len(documents) == limit  # of lines, of the damage, and of the next member
    assert len(problems) == (limit > 27)


def test_a_member_of_another_name_than_in_the_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    for name, other in (("text.txt", "evil.txt"), ("text.txt", "a.tx"), ("é.txt", "e.txt")):
        data = bytearray(zipped({name: b"some text"}, zipfile.ZIP_STORED))
        path.write_bytes(data)
        assert [d.text for d in read(path)[name]] == ["some text"]
        data[26:28] = len(other.encode()).to_bytes(2, "little")
        data[30 : 30 + len(other)] = other.encode()
        path.write_bytes(data)
        with pytest.raises(CorpusError, match="does not begin at byte 0"):
            read(path)


def test_archives_made_to_fill_memory_or_time_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zipped({"a.txt": bytes(200 << 20), "b.txt": b"fine"}))
    found = read(path)
    assert "over 200 times as many" in str(found["a.txt"][-1].problem)
    assert [d.text for d in found["b.txt"]] == ["fine"]
    # Two members that share their bytes: the trick of zip bombs.
    data = bytearray(zipped({"a.txt": b"x" * 5000, "b.txt": b"x" * 5000}))
    second = data.rindex(b"PK\1\2")
    data[second + 42 : second + 46] = bytes(4)
    path.write_bytes(data)
    (document,) = read(path)[""]
    assert "overlaps another one" in str(document.problem)
    huge = tarfile.TarInfo("a.txt")
    huge.size, huge.type = 1 << 40, tarfile.XHDTYPE
    (tmp_path / "x.tar").write_bytes(huge.tobuf(tarfile.GNU_FORMAT) + bytes(5000))
    (document,) = read(tmp_path / "x.tar")[""]
    assert "is over the limit of" in str(document.problem)


def test_members_that_cannot_be_read_are_refused_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    lines = jsonl({"text": "a" * 100})
    for members, why in (
        ({"a.jsonl.gz": gzip.compress(lines)}, "is compressed once more in its archive"),
        ({"a.parquet": lines * 9}, "is compressed once more in its archive"),
    ):
        path.write_bytes(zipped(members))
        with pytest.raises(CorpusError, match=rf"x\.zip::a\..* {why}"):
            read(path)
    data = bytearray(zipped({"a.txt": b"secret"}))
    for place in (data.index(b"PK\3\4") + 6, data.index(b"PK\1\2") + 8):
        data[place] |= 1
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"a\.txt is encrypted in its archive"):
        read(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.txt", "1")
            archive.writestr("a.txt", "2")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CorpusError, match=r"has two members named 'a\.txt'"):
        read(path)
    for log in ("t/_delta_log/0.json", "metadata/v1.metadata.json", "t/metadata/version-hint.text"):
        path.write_bytes(zipped({log: b"{}", "t/a.parquet": b"x"}, zipfile.ZIP_STORED))
        with pytest.raises(CorpusError, match="has a table of a lakehouse"):
            read(path)


@pytest.mark.parametrize(
    ("member_bytes", "num_requests"), [(600, 2), (50_000, 8), (300_000, 10), (2_000_000, 25)]
)
def test_a_remote_tar_is_listed_with_few_requests_and_bytes(
    member_bytes: int, num_requests: int, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tarred({f"{i}.txt": b"x" * member_bytes for i in range(20)}, tarfile.GNU_FORMAT)
    storage.write_once(f"{memory}/c/x.tar", data)
    asked: list[int] = []
    fs, _ = uris.open_filesystem(memory)
    cat_file = type(fs).cat_file

    def counted(*args: Any, **options: Any) -> bytes:
        found = bytes(cat_file(*args, **options))
        asked.append(len(found))
        return found

    monkeypatch.setattr(type(fs), "cat_file", counted)
    files, _ = listing.list_files([f"{memory}/c/x.tar"], OPTIONS)
    assert [file.size for file in files] == [member_bytes] * 20
    assert len(asked) <= num_requests
    if member_bytes > readers.CLOSE_BYTES:  # the members are skipped
        assert sum(asked) <= num_requests * readers.HEADER_BYTES < len(data) / 20
    else:
        assert sum(asked) <= 1.2 * len(data)


@pytest.mark.parametrize("kind", ["stored.zip", "tar", "zip"])
def test_members_in_a_bucket_are_read_by_ranges(kind: str, memory: str) -> None:
    texts = [f"text {i}" for i in range(9)]
    data = PACK[kind]({"a.jsonl": jsonl(*({"text": text} for text in texts)), "b.txt": b"b"})
    storage.write_once(f"{memory}/c/x.{kind}", data)
    for place in (f"{memory}/c", f"{memory}/c/x.{kind}", f"{memory}/c/*.{kind}::*"):
        found = read(place)
        assert [d.text for d in found["a.jsonl"]] == texts and len(found) == 2
