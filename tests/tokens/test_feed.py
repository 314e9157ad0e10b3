"""Texts become batches ahead of the model: in order, a bounded number ahead, and nothing is left
behind or hangs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from afn_ray import model
from afn_ray.corpus_values import Document
from afn_ray.errors import HelperDied, ShardError
from afn_ray.schema import REPLACED
from afn_ray.tokens import encode, feed
from afn_ray.tokens.feed import AHEAD, Chunk, Feed, Prepared, Preparer, Recipe
from afn_ray.tokens.languages import detect
from afn_ray.tokens.surfaces import Speller
from conftest import find_model

pytestmark = pytest.mark.timeout(120)


def eventually(condition: Callable[[], bool], within_s: float = 60) -> bool:
    """True if ``condition`` comes true in time."""
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("afn-")]


def is_alive(pid: int) -> bool:
    """True if the process runs; one that ended and waits for its parent to ask does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def recipe(tiny_bert: Path) -> Recipe:
    files = find_model(tiny_bert)
    return Recipe(model.load_tokenizer(files).to_str(), 64, None, 256, False, True)


@pytest.fixture(scope="module")
def preparer(recipe: Recipe) -> Preparer:
    return Preparer(recipe)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document is a chunk."""
    monkeypatch.setattr(feed, "CHUNK_BYTES", 1)


@pytest.fixture
def threads(preparer: Preparer) -> Iterator[Feed]:
    made = Feed(preparer, 0)
    yield made
    made.close()
    assert eventually(lambda: not our_threads())


@pytest.fixture(scope="module")
def fork_server() -> forkserver.ForkServer:
    """A process whose forks have the imports of a tokenizer process, 0.5 CPU seconds each.

    pyarrow imports pandas where it is installed.
    """
    server = forkserver.ForkServer()
    server.set_forkserver_preload([feed.__name__, "pandas"])
    return server


@pytest.fixture
def forks(fork_server: forkserver.ForkServer) -> Iterator[None]:
    """Tokenizer processes are forks, where their start is not the point."""
    context = multiprocessing.get_context("forkserver")
    with (
        mock.patch.object(forkserver, "connect_to_new_process", fork_server.connect_to_new_process),
        mock.patch.object(multiprocessing, "get_context", return_value=context),
    ):
        yield


@pytest.fixture
def forked(preparer: Preparer, forks: None) -> Iterator[Feed]:
    made = Feed(preparer, 2)
    yield made
    made.close()
    assert eventually(lambda: not our_threads())


@pytest.fixture
def processes(preparer: Preparer) -> Iterator[Feed]:
    made = Feed(preparer, 2)
    yield made
    made.close()
    assert eventually(lambda: not our_threads())


def documents(verses: list[str], n: int) -> list[Document]:
    return [Document("s", i, " ".join(verses[i : i + 1 + i % 7])) for i in range(n)]


def pids(chunks: Feed) -> list[int]:
    """The tokenizer processes, of which there are some once a chunk was prepared."""
    pools = (e for e in chunks.executors if isinstance(e, ProcessPoolExecutor))
    return [pid for pool in pools for pid in pool._processes or {}]


class Counted:
    """Documents, and how many of them were read so far."""

    def __init__(self, rows: list[Document], error: BaseException | None = None) -> None:
        self.rows, self.error, self.read = rows, error, 0

    def __iter__(self) -> Iterator[Document]:
        for row in self.rows:
            self.read += 1
            yield row
        if self.error is not None:
            raise self.error

    def have_been_read(self, number: int) -> bool:
        return self.read == number


def assert_same(one: Prepared, other: Prepared) -> None:
    for f in fields(encode.Encoded):
        a, b = getattr(one.encoded, f.name), getattr(other.encoded, f.name)
        if f.name in ("problems", "same"):  # ``same`` does not travel
            assert a == b
        else:
            assert a.dtype == b.dtype and np.array_equal(a, b), f.name
    assert one.surfaces.equals(other.surfaces)
    assert np.array_equal(one.n_windows, other.n_windows)
    assert len(one.batches) == len(other.batches)
    for x, y in zip(one.batches, other.batches, strict=True):
        assert (x.lengths, x.forward_tokens) == (y.lengths, y.forward_tokens)
        for name in ("ids", "kept", "rows"):
            a, b = getattr(x, name), getattr(y, name)
            assert a.dtype == b.dtype and np.array_equal(a, b), name


# --- what is prepared
# ------------------------------------------------------------------------------------


def test_every_token_of_every_text_is_in_the_batches_once(
    preparer: Preparer, verses: list[str]
) -> None:
    texts = ["", verses[0], " ".join(verses[:20]), "a", "ab\ufffdc"]
    got = preparer.prepare(texts, [False] * 4 + [True])
    assert got.encoded.bounds[1] == 0
    rows = np.concatenate([b.rows for b in got.batches])
    assert np.array_equal(np.sort(rows), np.arange(len(got.encoded.token_ids)))
    for batch in got.batches:
        assert np.array_equal(batch.ids[batch.kept], got.encoded.token_ids[batch.rows])
    width = 62
    text_tokens = np.maximum(np.diff(got.encoded.bounds) - 2, 0)
    expected = [
        0 if not n else 1 + max(0, -(-(n - width) // (width - width // 4)))
        for n in text_tokens.tolist()
    ]
    assert got.n_windows.tolist() == expected and max(expected) > 3
    assert got.surfaces.equals(Speller(preparer.readable).surfaces(got.encoded, texts))
    assert got.seconds > 0


def test_texts_without_a_token_have_no_batch(preparer: Preparer) -> None:
    for texts in ([], ["", "\u200b"]):
        got = preparer.prepare(texts, [False] * len(texts))
        assert (
            got.batches == []
            and got.n_windows.tolist() == [0] * len(texts)
            and len(got.encoded.token_ids) == 0
        )


def test_texts_at_fault_are_packed_as_if_they_were_empty(
    preparer: Preparer, verses: list[str]
) -> None:
    texts = [" ".join(verses[i : i + 1 + i % 5]) for i in range(40)]
    got = preparer.prepare(texts, [False] * 40, 1, {7: "this", 39: "that"})
    expected = preparer.prepare(
        ["" if i in (7, 39) else t for i, t in enumerate(texts)], [False] * 40, 1
    )
    assert got.encoded.problems == {7: "this", 39: "that"} and got.n_windows[[7, 39]].tolist() == [
        0,
        0,
    ]
    assert len(got.batches) > 1
    assert_same(replace(got, encoded=replace(got.encoded, problems={})), expected)


@pytest.mark.usefixtures("forks")
def test_a_process_finds_the_documents_at_fault_that_a_thread_finds(
    recipe: Recipe, verses: list[str]
) -> None:
    pieces = [(c, -1.0) for c in f" {string.ascii_letters}.,:;"]
    recipe = replace(
        recipe, tokenizer=Tokenizer(models.Unigram(pieces, unk_id=None)).to_str(), num_embeddings=55
    )
    rows = documents(verses, 12)  # ":" is id 55, and the tokenizer has no "?"
    rows += [replace(rows[0], text="what?"), replace(rows[0], text="a: b")]
    made = [Feed(Preparer(recipe), n) for n in (0, 1)]
    one, other = ([c.prepared for c in feed_.chunks(rows)] for feed_ in made)
    for feed_ in made:
        feed_.close()
    assert len(one) == len(other) == 1
    assert_same(one[0], other[0])
    problems = one[0].encoded.problems
    assert "cannot take it: Exception" in problems[12] and "token id 55 (':')" in problems[13]
    assert sum(b.forward_tokens for b in one[0].batches) > 0 and len(problems) < len(rows)


# --- order and bounds
# ------------------------------------------------------------------------------------


def test_chunks_are_whole_documents_in_order_of_about_their_size(
    threads: Feed, preparer: Preparer, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "CHUNK_BYTES", 2000)
    rows = documents(verses, 60)
    got = list(threads.chunks(rows))
    assert [d for c in got for d in c.documents] == rows
    sizes = [[len(d.text) + 64 for d in c.documents] for c in got]
    assert all(sum(s) >= 2000 > sum(s[:-1]) for s in sizes[:-1]) and 0 < sum(sizes[-1][:-1]) < 2000
    assert len(got) > AHEAD + 3
    for chunk in got:
        assert_same(
            chunk.prepared,
            preparer.prepare([d.text for d in chunk.documents], [False] * len(chunk.documents)),
        )
        assert chunk.read_s >= 0


@pytest.mark.usefixtures("small_chunks")
def test_replaced_characters_are_marked_in_their_documents_alone(threads: Feed) -> None:
    rows = [Document("s", 0, "ab\ufffdc", num_replaced=1), Document("s", 1, "ab\ufffdc")]
    flags = [int(c.prepared.encoded.flags.max() & REPLACED) for c in threads.chunks(rows)]
    assert flags == [REPLACED, 0]


def test_no_documents_are_no_chunks(threads: Feed) -> None:
    assert list(threads.chunks([])) == []
    assert our_threads() == []  # the tokenizer's starts with the first chunk


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["threads", "forked"])
def test_the_reader_stays_a_bounded_number_of_chunks_ahead(
    kind: str, request: pytest.FixtureRequest, verses: list[str]
) -> None:
    made: Feed = request.getfixturevalue(kind)
    ahead = AHEAD + (2 if kind == "forked" else 0)
    rows = Counted(documents(verses, 40))
    chunks = made.chunks(rows)
    for taken in range(1, 6):
        assert next(chunks).documents == [rows.rows[taken - 1]]
        most = taken + ahead + 1  # those in the queue, and one in hand that has no room
        assert eventually(partial(rows.have_been_read, most))
        time.sleep(0.05)
        assert rows.read == most  # and there it waits
    assert sum(len(c.documents) for c in chunks) == 35


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["threads", "forked"])
@pytest.mark.parametrize("n", [0, 1, 3, 12])
def test_an_error_while_reading_comes_behind_the_chunks_before_it(
    kind: str, n: int, request: pytest.FixtureRequest, verses: list[str]
) -> None:
    made: Feed = request.getfixturevalue(kind)
    got: list[Chunk] = []
    with pytest.raises(OSError, match="the disk is gone"):
        for chunk in made.chunks(Counted(documents(verses, n), OSError("the disk is gone"))):
            got.append(chunk)
    assert [c.documents for c in got] == [[d] for d in documents(verses, n)]
    assert "afn-read" not in our_threads()
    assert [c.documents for c in made.chunks(documents(verses, 2))] == [
        [d] for d in documents(verses, 2)
    ]  # goes on


@pytest.mark.usefixtures("small_chunks")
def test_an_error_while_preparing_is_raised_where_its_chunk_is_taken(
    threads: Feed, preparer: Preparer, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = preparer.prepare

    def sometimes(texts: list[str], replaced: list[bool], oom_retries: int) -> Prepared:
        if "3" in texts:
            raise ValueError("no tokens for you")
        return right(texts, replaced, oom_retries)

    monkeypatch.setattr(threads, "_prepare", sometimes)
    chunks = threads.chunks(Document("s", i, str(i)) for i in range(30))
    assert [next(chunks).documents[0].text for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="no tokens for you"):
        next(chunks)
    assert "afn-read" not in our_threads()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["threads", "forked"])
@pytest.mark.parametrize("taken", [1, 2, 39, 40])
def test_giving_up_midway_ends_the_reader(
    kind: str, taken: int, request: pytest.FixtureRequest, verses: list[str]
) -> None:
    made: Feed = request.getfixturevalue(kind)
    rows = Counted(documents(verses, 40))
    chunks = made.chunks(rows)
    for _ in range(taken):
        next(chunks)
    chunks.close()
    assert "afn-read" not in our_threads()
    assert rows.read <= min(40, taken + made.ahead + 2)
    assert len(list(made.chunks(documents(verses, 3)))) == 3


def test_a_reader_whose_chunks_nobody_took_leaves_no_thread(
    threads: Feed, verses: list[str]
) -> None:
    threads.chunks(documents(verses, 3)).close()
    assert "afn-read" not in our_threads()


# --- processes
# -------------------------------------------------------------------------------------------


def test_processes_prepare_the_same_bits_and_close_ends_them(
    recipe: Recipe, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The languages that they detect are the same, too."""
    monkeypatch.setattr(feed, "CHUNK_BYTES", 3000)
    preparer = Preparer(replace(recipe, detects=True))
    processes = Feed(preparer, 2)
    rows = [
        *documents(verses, 60),
        Document("s", 60, ""),
        Document("s", 61, "ab\ufffdc", num_replaced=1),
    ]
    threads = Feed(preparer, 0)
    for one, other in zip(threads.chunks(rows), processes.chunks(rows), strict=True):
        assert one.documents == other.documents
        assert_same(one.prepared, other.prepared)
        assert one.prepared.languages == other.prepared.languages
        assert one.prepared.languages == [detect(d.text) for d in one.documents]
        assert "en" in one.prepared.languages
    threads.close()
    running = pids(processes)
    assert len(running) == 2 and os.getpid() not in running and all(map(is_alive, running))
    processes.close()
    assert eventually(lambda: not any(map(is_alive, running)))
    assert our_threads() == []


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("taken", [0, 1, 2, 7])
@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_tokenizer_process_is_an_error_and_not_a_hang(
    taken: int,
    killed: int,
    preparer: Preparer,
    verses: list[str],
    request: pytest.FixtureRequest,
) -> None:
    if taken:  # else the one that dies may still be importing
        request.getfixturevalue("forks")
    processes = Feed(preparer, 2)
    rows = Counted(documents(verses, 500))
    chunks = processes.chunks(rows)
    next(chunks)
    for _ in range(taken):
        next(chunks)
    assert eventually(lambda: len(pids(processes)) == 2)
    running = pids(processes)
    for pid in running[:killed]:  # the other may be about to start
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ShardError, match="a tokenizer process died"):
        for _ in chunks:
            pass
    assert "afn-read" not in our_threads()
    assert rows.read < 500
    assert len(list(processes.chunks(documents(verses, 3)))) >= 1  # the next shard finds new ones
    processes.close()
    assert eventually(lambda: not any(map(is_alive, running)) and not our_threads())


@pytest.mark.usefixtures("small_chunks")
def test_a_process_that_dies_while_another_starts_leaves_none_behind(
    preparer: Preparer, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned = multiprocessing.get_context("spawn").Process
    right = spawned.start
    started: list[int] = []

    def start(self: multiprocessing.Process) -> None:
        right(self)
        started.append(self.pid or 0)
        if len(started) == 2:
            os.kill(started[0], signal.SIGKILL)
            time.sleep(0.3)

    monkeypatch.setattr(spawned, "start", start)
    processes = Feed(preparer, 2)
    with pytest.raises(ShardError):
        list(processes.chunks(documents(verses, 500)))
    processes.close()
    try:
        assert len(started) == 2
        assert eventually(lambda: not any(map(is_alive, started)) and not our_threads(), 10)
    finally:
        for pid in filter(is_alive, started):
            os.kill(pid, signal.SIGKILL)


EARLY_END = """
import os, sys
if "spawn_main" in " ".join(sys.orig_argv):
    {}
"""


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("os._exit(3)", r"died as it started \(exit code 3\)"),
        (
            "os.kill(os.getpid(), 9)",
            r"died as it started \(signal 9, Killed, as for want of memory\)",
        ),
        ("import time; time.sleep(600)", r"has not started in"),
    ],
)
def test_a_tokenizer_process_that_does_not_start_is_an_error_and_no_hang(
    what: str,
    said: str,
    preparer: Preparer,
    tmp_path: Path,
    verses: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even where its recipe has more bytes than the pipe to it holds."""
    (tmp_path / "sitecustomize.py").write_text(EARLY_END.format(what))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(feed, "ANSWER_S", 0.1)
    monkeypatch.setattr(feed, "START_S", 1.0)
    large = Preparer(
        replace(preparer.recipe, tokenizer=preparer.recipe.tokenizer + " " * (1 << 20)),
        preparer.encoder,
    )
    processes = Feed(large, 1)
    with pytest.raises(HelperDied, match=said):
        list(processes.chunks(documents(verses, 5)))
    assert "afn-read" not in our_threads()
    processes.close()


@pytest.mark.usefixtures("small_chunks")
def test_a_tokenizer_process_that_hangs_is_killed_at_the_end(
    preparer: Preparer, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "CLOSE_S", 0.2)
    processes = Feed(preparer, 1)
    chunks = processes.chunks(documents(verses, 50))
    next(chunks)
    (running,) = pids(processes)
    os.kill(running, signal.SIGSTOP)
    chunks.close()
    processes.close()
    assert eventually(lambda: not is_alive(running), 10)


@pytest.mark.usefixtures("small_chunks")
def test_ctrl_c_is_for_the_parent_alone(processes: Feed, verses: list[str]) -> None:
    num_taken = 0
    for _ in processes.chunks(documents(verses, 20)):
        num_taken += 1
        for pid in pids(processes):
            os.kill(pid, signal.SIGINT)  # as a terminal does, to all of its processes
        time.sleep(0.01)
    assert num_taken == 20


@pytest.mark.usefixtures("small_chunks")
def test_ctrl_c_as_processes_start_is_for_the_parent_alone(
    processes: Feed, verses: list[str]
) -> None:
    chunks = processes.chunks(documents(verses, 4))
    assert eventually(lambda: len(pids(processes)) == 2)
    while not all(started.done() for started in list(processes._started.values())):
        for pid in pids(processes):
            os.kill(pid, signal.SIGINT)
        time.sleep(0.001)
    assert len(list(chunks)) == 4


ORPHANS = """
import sys, time
from pathlib import Path
from afn_ray.tokens import feed
from afn_ray.corpus_values import Document
if __name__ == "__main__":
    feed.CHUNK_BYTES = 1
    recipe = feed.Recipe(Path(sys.argv[1]).read_text("utf-8"), 64, None, 256, False, True)
    made = feed.Feed(feed.Preparer(recipe), 2)
    list(made.chunks([Document("s", i, "a") for i in range(2)]))
    print(*(pid for pool in made.executors for pid in pool._processes), flush=True)
    time.sleep(600)
"""


def test_a_killed_worker_leaves_no_tokenizer_processes(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "worker.py").write_text(ORPHANS)
    (tmp_path / "tokenizer.json").write_text(recipe.tokenizer, "utf-8")
    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "tokenizer.json")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as worker:
        assert worker.stdout is not None
        running = [int(pid) for pid in worker.stdout.readline().split()]
        worker.kill()
    try:
        assert len(running) == 2
        assert eventually(lambda: not any(map(is_alive, running)))
    finally:
        for pid in filter(is_alive, running):
            os.kill(pid, signal.SIGKILL)


def test_what_is_ready_is_taken_without_a_wait(
    preparer: Preparer, verses: list[str], small_chunks: None
) -> None:
    gate, rows = threading.Event(), documents(verses, 3)

    class Gated(Preparer):
        def prepare(self, *args: Any) -> Prepared:
            assert gate.wait(60)
            return super().prepare(*args)

    made = Feed(Gated(preparer.recipe), 0)
    error = OSError("the disk is gone")
    with made.chunks(Counted(rows, error)) as chunks:
        assert not chunks.is_ready() and not chunks.is_ready()
        gate.set()
        for row in rows:
            assert eventually(chunks.is_ready)
            assert next(chunks).documents == [row]
        assert eventually(chunks.is_ready)
        with pytest.raises(OSError, match="the disk is gone"):
            next(chunks)
        assert chunks.is_ready() and next(chunks, None) is None
    gate.clear()
    with made.chunks(rows) as chunks:
        assert not chunks.is_ready()
        gate.set()  # the chunk that was looked at is given up
    with made.chunks(rows) as chunks:
        assert [d for chunk in chunks for d in chunk.documents] == rows
    made.close()
