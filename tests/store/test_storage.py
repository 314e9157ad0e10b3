"""One door to files: whole or not at all, once or not at all, and errors that say what to do."""

from __future__ import annotations

import builtins
import errno
import hashlib
import multiprocessing
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import boto3
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

import faults
from afn_ray.errors import ConfigError, CorpusError, Interrupted, StoreError
from afn_ray.store import blocks, corpus_files, disk, fs_calls, probes, readers, storage
from afn_ray.store.uris import absolute, is_local, is_process_memory, join, open_filesystem, path_in
from conftest import write_new

BODY_BYTES = 3 << 20  # more than one block, so that a torn write would show


@pytest.fixture
def folder(place: str) -> str:
    """A fresh folder on each kind of filesystem, there already where that can be."""
    if "://" not in place:
        Path(place).mkdir()
    return place


def _left(folder: str) -> list[str]:
    """Everything below ``folder``, hidden or not, by relative path."""
    fs, path = open_filesystem(faults.unwrap(folder))
    return sorted(name.removeprefix(path).strip("/") for name in fs.find(path))


def test_a_missing_file_of_this_machine_is_no_missing_bucket() -> None:
    error = FileNotFoundError(errno.ENOENT, "gone", "/gone/file")
    match = "writing s3://b/x: no such file or folder: /gone/file"
    with (
        pytest.raises(StoreError, match=match),
        fs_calls.named_errors("writing", "s3://b/x", StoreError),
    ):
        raise error


def test_two_writers_of_one_name_have_a_hidden_file_each(tmp_path: Path) -> None:
    with disk.unfinished(tmp_path / "a") as one, disk.unfinished(tmp_path / "a") as other:
        assert one != other and one.parent == other.parent == tmp_path


def test_a_local_path_has_one_spelling(tmp_path: Path) -> None:
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/deep")
    (tmp_path / "a.txt").touch()
    for spelling in ("a.txt", "./a.txt", "/a.txt", "far/../a.txt", "far/deep/.././../a.txt"):
        assert absolute(f"{tmp_path}/{spelling}") == f"{tmp_path}/a.txt"
    assert absolute(f"{tmp_path}/") == str(tmp_path)
    assert (absolute("/"), absolute("/..")) == ("/", "/..")
    for other in ("link/../a.txt", "*/../a.txt"):  # a.txt of far; once for each folder
        assert absolute(f"{tmp_path}/{other}") == f"{tmp_path}/{other}"


# --- write_once
# ------------------------------------------------------------------------------------------


def _body(writer: int) -> bytes:
    return bytes([writer]) * BODY_BYTES


def _try(uri: str, writer: int, start: Any, wins: Any) -> None:
    start.wait()
    try:
        storage.write_once(uri, _body(writer))
        wins.put(writer)
    except storage.AlreadyWritten:
        wins.put(None)


def _race(uri: str, workers: list[Any], queue: Any) -> None:
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    winners = [a for a in answers if a is not None]
    assert len(winners) == 1 or (
        not winners and uri.startswith("faulty:")
    )  # there the winner may not know it
    assert storage.read_bytes(uri) in [_body(w) for w in winners or range(len(workers))]


def test_one_of_eight_threads_wins_and_its_content_is_whole(folder: str) -> None:
    import queue

    for trial in range(3):
        uri, start, wins = (
            join(folder, "deep", f"{trial}"),
            threading.Barrier(8),
            queue.Queue[int | None](),
        )
        _race(
            uri, [threading.Thread(target=_try, args=(uri, w, start, wins)) for w in range(8)], wins
        )
    assert _left(folder) == ["deep/0", "deep/1", "deep/2"]


def test_one_of_four_processes_wins_and_its_content_is_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    uri, start, wins = str(tmp_path / "deep" / "commit.json"), context.Barrier(4), context.Queue()
    _race(uri, [context.Process(target=_try, args=(uri, w, start, wins)) for w in range(4)], wins)
    assert _left(str(tmp_path)) == ["deep/commit.json"]


def test_a_second_write_is_refused_and_changes_nothing(folder: str) -> None:
    uri = join(folder, "a")
    write_new(uri, b"first")
    with pytest.raises(storage.AlreadyWritten):
        storage.write_once(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    assert _left(folder) == ["a"]


def test_no_reader_ever_sees_part_of_a_file(tmp_path: Path) -> None:
    target, seen = tmp_path / "whole", set[int]()

    def look() -> None:
        while not seen:
            if target.exists():
                seen.add(target.stat().st_size)

    reader = threading.Thread(target=look)
    reader.start()
    storage.write_once(str(target), b"x" * (64 << 20))
    reader.join(30)
    assert seen == {64 << 20}


@pytest.mark.parametrize("call", ["fsync", "link"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), OSError(errno.EIO, "Input/output error")]
)
def test_an_exception_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StoreError if isinstance(error, OSError) else type(error)):
        storage.write_once(str(tmp_path / "a"), b"data")
    assert _left(str(tmp_path)) == []


def _write_and_die(uri: str) -> None:
    os.fsync = lambda fd: os._exit(9)  # as a kill between writing and linking
    storage.write_once(uri, b"data")


def test_a_killed_writer_leaves_no_final_name(tmp_path: Path) -> None:
    uri = str(tmp_path / "a")
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(uri,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert storage.read_if_there(uri) is None
    assert all(
        name.startswith(".") for name in _left(str(tmp_path))
    )  # hidden: no one takes it for a file
    storage.write_once(uri, b"again")
    assert storage.read_bytes(uri) == b"again"


# --- filesystems that lack something
# ---------------------------------------------------------------------

LINKLESS = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS]
"""Error of exFAT, SMB and FUSE for a hard link."""


@pytest.fixture(params=LINKLESS, ids=[errno.errorcode[n] for n in LINKLESS])
def poor_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem without hard links and without fsync of folders."""
    fsync = os.fsync

    def no_link(*args: object, **options: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    def no_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(os, "fsync", no_folders)


def test_without_hard_links_one_writer_wins_and_its_content_is_whole(
    poor_disk: None, tmp_path: Path
) -> None:
    import queue

    for trial in range(3):
        uri, start, wins = (
            str(tmp_path / f"{trial}"),
            threading.Barrier(8),
            queue.Queue[int | None](),
        )
        _race(
            uri, [threading.Thread(target=_try, args=(uri, w, start, wins)) for w in range(8)], wins
        )
    assert _left(str(tmp_path)) == ["0", "1", "2"]
    probes.check_writable(str(tmp_path / "store"))
    assert _left(str(tmp_path / "store")) == []
    lacks = probes.find_lacks(str(tmp_path / "store"))
    assert [what.partition(" (")[0] for what in lacks] == ["hard links", "fsync of folders"]
    assert _left(str(tmp_path / "store")) == []


def test_a_usual_disk_lacks_nothing(tmp_path: Path) -> None:
    assert probes.find_lacks(str(tmp_path)) == [] == _left(str(tmp_path))


def test_readers_of_a_claimed_name_wait_for_its_content(poor_disk: None, tmp_path: Path) -> None:
    target, replace = tmp_path / "commit.json", Path.replace
    claimed, read = threading.Event(), threading.Event()

    def slow(self: Path, other: Path) -> Path:
        claimed.set()
        read.wait(10)
        return replace(self, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", slow)
        writer = threading.Thread(target=storage.write_once, args=(str(target), b"whole"))
        writer.start()
        assert claimed.wait(10) and target.stat().st_size == 0
        threading.Timer(0.1, read.set).start()
        assert storage.read_if_there(str(target)) == b"whole"
        writer.join(10)


def test_a_claim_whose_writer_ended_is_named_with_what_to_do(
    poor_disk: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "CLAIM_S", 0.05)
    (tmp_path / "commit.json").touch()
    with pytest.raises(
        StoreError,
        match=r"commit\.json: it is empty.*delete that file and run the same command again",
    ):
        storage.write_once(str(tmp_path / "commit.json"), b"x")
    assert _left(str(tmp_path)) == ["commit.json"]


def test_an_exception_after_the_claim_gives_the_name_back(
    poor_disk: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, other: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", fail)
        storage.write_once(str(tmp_path / "a"), b"x")
    assert _left(str(tmp_path)) == []


def test_a_filesystem_that_lets_two_claim_one_name_is_refused(
    poor_disk: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *mode: opened(path, flags & ~os.O_EXCL, *mode)
    )
    with pytest.raises(StoreError, match="lets a second writer replace a file"):
        probes.check_writable(str(tmp_path))


def test_what_a_filesystem_cannot_do_is_no_want_of_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(Path, "mkdir", unable)
    with pytest.raises(StoreError, match="its filesystem does not support this call") as caught:
        probes.check_writable(str(tmp_path))
    assert "permission" not in str(caught.value)


def test_a_result_may_have_the_longest_name_there_is(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".csv")
    with disk.write_local(path) as file:
        file.write(b"a")
    assert path.read_bytes() == b"a" and len(_left(str(tmp_path))) == 1


# --- upload
# ----------------------------------------------------------------------------------------------


def test_upload_copies_the_file_and_makes_its_folder(
    folder: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    local = tmp_path_factory.mktemp("scratch") / "x"
    local.write_bytes(_body(7))
    storage.upload(local, join(folder, "shards", "one", "x"))
    assert storage.read_bytes(join(folder, "shards", "one", "x")) == _body(7)
    assert local.exists()


def test_upload_that_fails_half_way_removes_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(_body(7))
    seen: list[int] = []

    def fail(handle: int) -> None:
        seen.append(os.fstat(handle).st_size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Interrupted):
        storage.upload(tmp_path / "x", str(tmp_path / "store" / "x"))
    assert seen == [BODY_BYTES]
    assert _left(str(tmp_path / "store")) == []


# --- errors
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("write", ["write_once", "upload"])
def test_a_full_disk_can_be_resumed_and_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, write: str
) -> None:
    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "x").write_bytes(b"x")
    monkeypatch.setattr(os, "fsync", full)
    target = str(tmp_path / "store" / "x")
    with pytest.raises(Interrupted) as caught:
        storage.write_once(target, b"x") if write == "write_once" else storage.upload(
            tmp_path / "x", target
        )
    assert "no space left" in str(caught.value) and target in str(caught.value)
    assert "make room and run the same command again" in str(caught.value)
    assert caught.value.exit_code == 75


def test_a_full_object_store_can_be_resumed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", full)
    with pytest.raises(Interrupted, match="make room"):
        storage.write_once("memory://full/x", b"x")


def _denied(*args: object, **kwargs: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_store_that_may_not_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "mkdir", _denied)
    with pytest.raises(StoreError, match="permission denied; check owner, mode or credentials"):
        probes.check_writable(str(tmp_path))
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", _denied)
    with pytest.raises(StoreError, match="permission denied"):
        probes.check_writable("memory://denied")


def test_a_store_under_proc_or_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for store in ("/proc/self/store", str(tmp_path / "file")):
        with pytest.raises(StoreError, match=store):
            probes.check_writable(store)
    assert not storage.exists(str(tmp_path / "file" / "store"))


def test_a_corpus_that_may_not_be_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", _denied)
        patch.setattr(LocalFileSystem, "_open", _denied)
        with pytest.raises(CorpusError, match=r"opening .*a\.txt: permission denied"):
            readers.open_read(str(tmp_path / "a.txt"))
    with pytest.raises(CorpusError, match="no such file or folder"):
        readers.open_read(str(tmp_path / "b.txt"))
    with pytest.raises(CorpusError, match="no such file or folder"):
        corpus_files.stat(str(tmp_path / "b.txt"))


def test_a_folder_that_may_not_be_listed_is_not_left_out_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "a.txt").write_bytes(b"a")
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("private"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(CorpusError, match=r"private: Permission denied"):
        corpus_files.find_files(str(tmp_path))


@pytest.mark.parametrize("uri", ["zip://a.txt::/tmp/x.zip", "nosuch://a/b"])
def test_a_url_that_cannot_be_opened_is_a_wrong_request(uri: str) -> None:
    with pytest.raises(ConfigError):
        corpus_files.find_files(uri)


# --- reading and listing
# ---------------------------------------------------------------------------------


def test_reading_gives_bytes_ranges_and_none(folder: str) -> None:
    uri = join(folder, "x")
    write_new(uri, b"0123456789")
    assert storage.read_bytes(uri) == storage.read_if_there(uri) == b"0123456789"
    assert storage.read_bytes(uri, 3, 6) == b"345"
    with readers.open_read(uri) as source:
        assert source.seek(4) == 4 and source.read(2) == b"45"
    absent = join(folder, "y")
    assert storage.read_if_there(absent) is None
    assert storage.exists(uri) and not storage.exists(absent)
    with pytest.raises(StoreError, match="no such file"):
        storage.read_bytes(absent)
    storage.delete([uri, absent, uri])
    assert not storage.exists(uri)


def test_what_is_removed_is_gone_with_its_folder(folder: str) -> None:
    here = join(folder, "a")
    uris = [f"{here}/x", f"{here}/y"]
    for uri in uris:
        write_new(uri, b"")
    for uri in uris:
        storage.remove(uri)
        storage.remove(uri)
        storage.remove_if_empty(here)
        assert storage.list_names(here) == (["y"] if uri.endswith("x") else [])
    storage.remove_if_empty(here)
    assert "a" not in storage.list_names(folder)


def test_what_may_not_be_removed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "rm_file", _denied)
    with pytest.raises(StoreError, match="deleting memory://x/y: permission denied"):
        storage.remove("memory://x/y")
    storage.delete(["memory://x/y"])


def test_a_file_that_goes_while_its_store_is_listed_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        storage.write_once(str(tmp_path / name / "x"), b"")
    lstat = Path.lstat

    def gone_in_the_meantime(path: Path) -> Any:
        if path.parent.name == "b":
            path.unlink()
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", gone_in_the_meantime)
    assert [f.uri for f in storage.list_below(str(tmp_path))] == [
        str(tmp_path / n / "x") for n in "ac"
    ]


def test_read_if_there_does_not_take_an_error_for_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", _denied)
    with pytest.raises(StoreError, match="permission denied"):
        storage.read_if_there("memory://x/y")


def test_list_names_gives_names_right_below_sorted(folder: str) -> None:
    assert storage.list_names(join(folder, "runs")) == []
    for name in ("b/x", "a/x/y", "c"):
        write_new(join(folder, "runs", name), b"")
    assert storage.list_names(join(folder, "runs")) == ["a", "b", "c"]
    assert storage.list_names(join(folder, "runs") + "/") == ["a", "b", "c"]


def test_check_writable_leaves_nothing(folder: str) -> None:
    probes.check_writable(folder)
    assert _left(folder) == []


def test_absolute_is_one_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = str(tmp_path / "a" / "*.txt")
    assert {absolute(u) for u in ("a/*.txt", "./a/*.txt", whole, f"file://{whole}")} == {whole}
    assert absolute("memory://x/y") == absolute("memory:///x/y")
    assert absolute(absolute("memory://x/y")) == absolute("memory://x/y")
    assert is_local(whole) and not is_process_memory(whole)
    assert is_process_memory("memory://x") and not is_local("memory://x")


def test_join_has_one_slash_between() -> None:
    assert join("s3://b/", "x", "y") == join("s3://b", "x/y") == "s3://b/x/y"


# --- find_files
# ------------------------------------------------------------------------------------------

NAMES = ("b.txt", "a.txt", "sub/deep/c.txt", "sub/d.jsonl", "a*b[1].txt", "a b#?.txt", "日本.txt")
HIDDEN = (".hidden.txt", "_SUCCESS", ".git/x.txt", "sub/_tmp/y.txt")


def _fill(folder: str, names: tuple[str, ...] = NAMES + HIDDEN) -> None:
    for name in names:
        write_new(join(folder, name), name.encode())


def _names(folder: str, pattern: str) -> list[str]:
    found = corpus_files.find_files(join(folder, pattern) if pattern else folder)
    assert [f.uri for f in found] == sorted({f.uri for f in found})
    base = absolute(folder)
    for file in found:
        if is_local(folder):  # memory's listing and its info write times differently
            assert file == corpus_files.stat(file.uri)
        assert file.size == len(storage.read_bytes(file.uri))
    return [f.uri.removeprefix(base + "/") for f in found]


def test_a_folder_gives_all_below_it_but_hidden_files(folder: str) -> None:
    _fill(folder)
    assert _names(folder, "") == sorted(NAMES)
    assert _names(folder, "sub/") == ["sub/d.jsonl", "sub/deep/c.txt"]


@pytest.mark.parametrize("name", NAMES + HIDDEN)
def test_a_name_is_a_file_before_it_is_a_pattern(folder: str, name: str) -> None:
    _fill(folder)
    assert _names(folder, name) == [name]


def test_globs_find_the_files_that_they_match(folder: str) -> None:
    _fill(folder, NAMES)
    assert _names(folder, "?.txt") == ["a.txt", "b.txt"]
    assert _names(folder, "sub/*") == ["sub/d.jsonl"]
    assert _names(folder, "**/*.txt") == sorted(n for n in NAMES if n.endswith(".txt"))
    assert _names(folder, "[b]*.txt") == ["b.txt"]


def test_a_folder_is_a_folder_before_it_is_a_pattern(folder: str) -> None:
    _fill(folder, ("data[1]/x.txt", "data1/y.txt"))
    assert _names(folder, "data[1]") == ["data[1]/x.txt"]


@pytest.mark.parametrize("pattern", ["nothing", "*.csv", "nothing/*.txt", "empty"])
def test_nothing_that_matches_is_an_error_with_the_pattern(tmp_path: Path, pattern: str) -> None:
    _fill(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError) as caught:
        corpus_files.find_files(str(tmp_path / pattern))
    assert str(tmp_path / pattern) in str(caught.value)


def test_links_are_followed_and_pipes_are_not_read(tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    _fill(str(other), ("x.txt", "y.txt"))
    corpus.mkdir()
    (corpus / "file.txt").symlink_to(other / "x.txt")
    (corpus / "folder").symlink_to(other)
    (corpus / "up").symlink_to("..")  # back to where we are: no file twice, no end missed
    os.mkfifo(corpus / "pipe.txt")
    assert _names(str(corpus), "*.txt") == ["file.txt"]
    assert _names(str(corpus), "folder") == ["folder/x.txt", "folder/y.txt"]
    assert _names(str(corpus), "") == ["file.txt", "folder/x.txt", "folder/y.txt"]


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"gone\.txt: no such file"):
        corpus_files.find_files(str(tmp_path))


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb"):  # noqa: PTH123
        pass
    with pytest.raises(CorpusError, match=r"udcff\.txt' is not UTF-8"):
        corpus_files.find_files(str(tmp_path))


def test_listings_are_not_remembered(object_store: str) -> None:
    """Tomorrow's run in the same process must see tomorrow's files; s3fs has a listing cache."""
    _fill(object_store, ("a.txt",))
    assert _names(object_store, "") == _names(object_store, "*.txt") == ["a.txt"]
    bucket = object_store.removeprefix("s3://")
    boto3.client("s3").put_object(
        Bucket=bucket, Key="b.txt", Body=b"b.txt"
    )  # as another process would
    assert _names(object_store, "") == _names(object_store, "*.txt") == ["a.txt", "b.txt"]
    assert storage.list_names(object_store) == ["a.txt", "b.txt"]


def test_a_version_changes_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"a")
    os.utime(file, ns=(0, 1_700_000_000_123_456_789))
    assert corpus_files.stat(str(file)).version == "time:1700000000123456789"
    os.utime(file, ns=(0, 1_700_000_000_123_456_790))
    assert corpus_files.stat(str(file)).version == "time:1700000000123456790"


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ({"ETag": '"abc"', "LastModified": "x"}, "etag:abc"),
        ({"etag": "W/1", "mtime": 5}, "etag:W/1"),
        ({"ETag": None, "LastModified": "2026-01-01"}, "time:2026-01-01"),
        ({"mtime": 0}, "time:0"),
        ({}, ""),
    ],
)
def test_an_etag_counts_before_a_time(info: dict[str, Any], version: str) -> None:
    assert corpus_files._version(info) == version


@pytest.mark.parametrize("num_bytes", [0, 1, 65_536, 65_537, 65_536 * blocks.MOST_BLOCKS + 1])
def test_any_part_of_a_file_is_checked_by_its_blocks(tmp_path: Path, num_bytes: int) -> None:
    data = Random(num_bytes).randbytes(num_bytes)
    (tmp_path / "x").write_bytes(data)

    def reads(data: bytes) -> Callable[[int, int], bytes]:
        return lambda start, end: data[start:end]

    sha256, checksums = blocks.file_checksums(tmp_path / "x")
    assert sha256 == hashlib.sha256(data).hexdigest() and checksums == blocks.checksums(data)
    found = blocks.Blocks.of(num_bytes, checksums)
    assert len(checksums) <= blocks.MOST_BLOCKS * blocks.CRC_CHARS
    random = Random(1)
    for _ in range(20):
        start, end = sorted(random.randrange(num_bytes + 1) for _ in range(2))
        assert found.read(start, end, reads(data)) == data[start:end]
        if start < end:
            damaged = bytearray(data)
            damaged[random.randrange(start, end)] ^= 1 << random.randrange(8)
            for wrong in (bytes(damaged), data[: end - 1]):
                assert found.read(start, end, reads(wrong)) is None
    for no_sums in (checksums + "00000000", checksums[:-1] or "0", None, 7):
        with pytest.raises(ValueError, match="crc32"):
            blocks.Blocks.of(num_bytes, no_sums)
    with pytest.raises(ValueError, match="bytes is"):
        blocks.Blocks.of(-1, checksums)


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:/mnt/x", "/mnt/x"),
        ("local:/mnt/x", "/mnt/x"),
        ("file:///mnt/x", "/mnt/x"),
        ("/mnt/data:x", "/mnt/data:x"),
        ("/mnt/x/", "/mnt/x"),
    ],
)
def test_a_local_path_is_the_same_however_it_is_written(uri: str, path: str) -> None:
    assert path_in(uri) == path


def test_a_local_name_that_looks_like_a_data_url_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(path_in("data:x")) == tmp_path / "data:x"
