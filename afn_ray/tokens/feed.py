"""Prepare batches ahead of the model: tokenize and pack texts on a thread or in processes."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from queue import Empty, Queue
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer

from afn_ray.corpus_values import Document
from afn_ray.errors import HelperDied
from afn_ray.tokens import encode, languages
from afn_ray.tokens import windows as tokens
from afn_ray.tokens.surfaces import Speller

CHUNK_BYTES = 1 << 20
"""Text that is encoded and packed together, in characters; each document adds 64.

1 MiB is about 250,000 tokens, enough to keep filler at 1 %.
"""

ANSWER_S = 5.0
"""Pause between two checks whether a tokenizer process is alive, in seconds."""

START_S = 120.0
"""Longest start of a tokenizer process, in seconds; imports from a slow disk take long."""

CLOSE_S = 10.0
"""Longest wait for tokenizer processes to end before they are killed, in seconds."""

EXIT_CODE_S = 1.0
"""Longest wait for the exit code of a dead process, in seconds."""

GIVEN_UP = (CancelledError, RuntimeError)
"""Errors of chunks whose pool another shard has replaced."""

AHEAD = 2
"""Number of chunks that wait before the model, besides one for each process; bounds memory."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings that turn texts into batches; small and picklable, for tokenizer processes."""

    tokenizer: str  # as JSON
    window_tokens: int
    overlap_tokens: int | None
    batch_tokens: int
    causal: bool
    packed: bool
    num_embeddings: int | None = None  # token ids that the model has a vector for; None: unknown
    detects: bool = False  # the language of each text is detected


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokens of several texts, and the batches for the model."""

    encoded: encode.Encoded
    surfaces: pa.DictionaryArray  # strings [n_tokens], from ``Speller.surfaces``
    n_windows: npt.NDArray[np.int64]  # [n_texts]
    batches: list[tokens.TokenBatch]
    seconds: float  # duration of the preparation
    languages: Sequence[str | None]  # [n_texts], from ``languages.detect``; empty: not detected


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole documents of a shard, ready for the model."""

    documents: list[Document]
    prepared: Prepared
    read_s: float  # seconds that reading the documents took


class Preparer:
    """Prepares texts by a ``Recipe``, in any process."""

    def __init__(self, recipe: Recipe, encoder: encode.TextEncoder | None = None) -> None:
        self.recipe = recipe
        self.encoder = encoder or encode.TextEncoder(
            Tokenizer.from_str(recipe.tokenizer), recipe.num_embeddings
        )
        self.pieces, self.readable = self.encoder.texts()
        self._speller = Speller(self.readable)
        self._width, self._overlap = tokens.window_sizes(
            recipe.window_tokens, recipe.overlap_tokens, self.encoder.template
        )

    def prepare(
        self,
        texts: Sequence[str],
        replaced: Sequence[bool],
        oom_retries: int = 0,
        refused: Mapping[int, str] | None = None,
    ) -> Prepared:
        """Tokens, windows and batches of ``texts``.

        ``replaced`` marks texts in which U+FFFD stands for invalid UTF-8. ``oom_retries``: how
        often the token budget is halved. ``refused``: texts with known problems, which are packed
        as empty ones, and why.
        """
        began = time.monotonic()
        recipe, template = self.recipe, self.encoder.template
        encoded = self.encoder.encode(texts, replaced, refused)
        windows = tokens.make_windows(encoded, template, self._width, self._overlap, recipe.causal)
        budget = max(1, recipe.batch_tokens >> oom_retries)
        batches = list(
            tokens.make_batches(windows, encoded, self.encoder, budget, packed=recipe.packed)
        )
        assert sum(len(b.rows) for b in batches) == len(encoded.token_ids), (
            "every token is recorded once"
        )
        text_of = np.searchsorted(encoded.bounds, [w.row for w in windows], side="right") - 1
        n_windows = np.bincount(text_of, minlength=len(texts))
        surfaces = self._speller.surfaces(encoded, texts)
        encoded = replace(encoded, same=None)  # need not travel
        detected = [languages.detect(text) for text in texts] if recipe.detects else []
        return Prepared(encoded, surfaces, n_windows, batches, time.monotonic() - began, detected)


@dataclass(frozen=True, slots=True)
class _Work:
    """A chunk that an executor prepares."""

    prepared: Future[Prepared]
    started: Future[None] | None  # the pool's process is ready; None: a thread needs no start
    submitted: float  # monotonic time, in seconds


_preparer: Preparer


@contextlib.contextmanager
def _without_sigint() -> Iterator[None]:
    """Context in which spawned processes block SIGINT.

    Ctrl-C signals all processes of a terminal, but the parent must end its processes itself. A
    process that ignores the signal by itself does so only after its imports, which take seconds.
    """
    resource_tracker.ensure_running()  # else spawn starts it, and that unblocks SIGINT
    # the mask of this thread, which a new process inherits
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> None:
    """Initialize a tokenizer process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _use(recipe: Recipe) -> None:
    """Build the preparer of a tokenizer process: its first task."""
    global _preparer
    _preparer = Preparer(recipe)


def _end_with_parent() -> None:
    """End this process with its parent; otherwise it waits for work of a killed parent for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(texts: list[str], replaced: list[bool], oom_retries: int) -> Prepared:
    """``Preparer.prepare`` in a tokenizer process."""
    return _preparer.prepare(texts, replaced, oom_retries)


class Feed:
    """Prepares chunks of documents for the model, in order, a bounded number ahead.

    Several shards may use it at once. ``num_processes``: number of tokenizer processes; 0 uses a
    thread of this process, which is enough for a model on a CPU core.
    """

    def __init__(self, preparer: Preparer, num_processes: int) -> None:
        self._preparer, self._num_processes = preparer, num_processes
        self.ahead = AHEAD + num_processes
        self.executors: list[Executor]
        self._prepare: Callable[[list[str], list[bool], int], Prepared]
        self._renewing = threading.Lock()
        self._starting = threading.Lock()
        self._started: dict[Executor, Future[None]] = {}
        self._open()

    def _open(self) -> None:
        """Start the executors."""
        preparer, num_processes = self._preparer, self._num_processes
        if num_processes:  # a fresh interpreter each: a fork of a process with threads may hang
            spawn = multiprocessing.get_context("spawn")
            # One pool per process: a pool of several may hang when one process dies while the pool
            # starts another. The recipe is sent as the first task: if the start itself sent more
            # than a pipe holds, it would wait for ever for a process that died before it read.
            self.executors = [ProcessPoolExecutor(1, spawn, _start) for _ in range(num_processes)]
            self._prepare = _prepare
        else:
            self.executors = [ThreadPoolExecutor(1, "afn-tokenize")]
            self._prepare = preparer.prepare
        self._turns = itertools.cycle(self.executors)

    def chunks(self, documents: Iterable[Document], oom_retries: int = 0) -> Chunks:
        """``documents`` in chunks of about ``CHUNK_BYTES``; they depend on the shard alone."""
        return Chunks(self, documents, oom_retries)

    def submit(self, documents: list[Document], oom_retries: int) -> _Work:
        """Start to prepare a chunk, after those submitted before it."""
        texts = [d.text for d in documents]
        replaced = [d.num_replaced > 0 for d in documents]
        executor = next(self._turns)
        with self._starting:
            started = self._started.get(executor)
            if started is None and self._num_processes:
                with _without_sigint():  # the first task of a pool spawns its process
                    started = self._started[executor] = executor.submit(_use, self._preparer.recipe)
        return _Work(
            executor.submit(self._prepare, texts, replaced, oom_retries), started, time.monotonic()
        )

    def why_dead(self, executors: Sequence[Executor]) -> str:
        """End of the first dead process of ``executors``, in words.

        It says only "died" where no exit code is known after ``EXIT_CODE_S``.
        """
        end = time.monotonic() + EXIT_CODE_S
        while time.monotonic() < end:
            for executor in executors:
                for process in _processes(executor):
                    if process.exitcode is not None:
                        when = "" if _is_ready(self._started.get(executor)) else " as it started"
                        return f"died{when} ({_ending(process.exitcode)})"
            time.sleep(0.02)
        return "died"

    def renew(self, broken: list[Executor]) -> None:
        """Replace the ``broken`` executors, unless another shard has done so already."""
        with self._renewing:
            if self.executors is broken:
                for executor in broken:
                    _kill(_processes(executor))
                    executor.shutdown(wait=False, cancel_futures=True)  # it may never end
                    self._started.pop(executor, None)
                self._open()

    def close(self) -> None:
        """End the thread or the processes; kill a process that hangs."""
        processes = [p for executor in self.executors for p in _processes(executor)]
        late = threading.Timer(CLOSE_S, _kill, (processes,))
        late.daemon = True
        late.start()
        for executor in self.executors:
            executor.shutdown(wait=True, cancel_futures=True)
        late.cancel()


class _NotStarted(BrokenProcessPool):
    """A process is alive but not ready in time."""


class Chunks:
    """A shard's chunks, read on a thread of their own from construction on.

    An error of the reading is raised in place of its chunk, after the chunks before it. The
    iterator closes itself at its end and at the first error.
    """

    def __init__(self, feed: Feed, documents: Iterable[Document], oom_retries: int) -> None:
        self._feed = feed
        self._executors = feed.executors
        self._oom_retries = oom_retries
        # items: (documents, seconds, work), or an error, or None at the end
        self._ready: Queue[Any] = Queue(feed.ahead)
        self._first: list[Any] = []  # the next item, if ``is_ready`` has taken it from the queue
        self._stopped = threading.Event()
        self._reader = threading.Thread(
            target=self._read, args=(documents,), name="afn-read", daemon=True
        )
        self._reader.start()

    def __iter__(self) -> Chunks:
        return self

    def __next__(self) -> Chunk:
        if self._stopped.is_set():
            raise StopIteration
        try:
            item = self._first.pop() if self._first else self._ready.get()
            if item is None:
                raise StopIteration
            if isinstance(item, BaseException):
                raise item
            documents, seconds, work = item
            return Chunk(documents, self._result(work), seconds)
        except BaseException as error:
            self.close()
            renewed = self._feed.executors is not self._executors  # by another shard
            if not isinstance(error, BrokenProcessPool) and not (
                renewed and isinstance(error, GIVEN_UP)
            ):
                raise
            why = (
                str(error)
                if isinstance(error, _NotStarted)
                else self._feed.why_dead(self._executors)
            )
            self._feed.renew(self._executors)
            raise HelperDied(
                f"a tokenizer process {why}; what it said is on stderr. Is there enough memory for "
                "--tokenizer-workers? (A script that calls afn_ray.run with them must be a file, "
                "and needs if __name__ == '__main__')"
            ) from error

    def is_ready(self) -> bool:
        """True if the next chunk, an error or the end is there without a wait."""
        if self._stopped.is_set():
            return True
        if not self._first:
            with contextlib.suppress(Empty):
                self._first.append(self._ready.get_nowait())
        if not self._first:
            return False
        (item,) = self._first
        return not isinstance(item, tuple) or item[2].prepared.done()

    def _result(self, work: _Work) -> Prepared:
        """Wait for the result of ``work``.

        A pool may never notice that its process was killed while it answered, so this checks the
        processes every ``ANSWER_S``.
        """
        while True:
            try:
                if work.started is not None and work.started.done():
                    work.started.result()
                return work.prepared.result(timeout=ANSWER_S)
            except FutureTimeoutError:
                if work.prepared.done():
                    continue
                if not all(p.is_alive() for e in self._executors for p in _processes(e)):
                    raise BrokenProcessPool("a process died and its pool did not notice") from None
                waited = time.monotonic() - work.submitted
                if work.started is not None and not work.started.done() and waited > START_S:
                    raise _NotStarted(f"has not started in {waited:,.0f} s") from None

    def __enter__(self) -> Chunks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reader and drop the chunks that were not taken."""
        self._stopped.set()
        while self._first:
            _cancel(self._first.pop())
        while self._reader.is_alive():  # it may wait for room in the queue
            with contextlib.suppress(Empty):
                _cancel(self._ready.get(timeout=0.05))

    def _read(self, documents: Iterable[Document]) -> None:
        """Read chunks, submit them and queue them, until the end, an error or ``close``."""
        try:
            began = time.monotonic()
            for chunk in in_chunks(documents):
                seconds = time.monotonic() - began
                if self._stopped.is_set():
                    return
                self._ready.put((chunk, seconds, self._feed.submit(chunk, self._oom_retries)))
                began = time.monotonic()
            self._ready.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the chunks are taken
            self._ready.put(error)


def _cancel(item: Any) -> None:
    """Give up the work of an item that nobody takes."""
    # Only on a thread: a process pool that breaks fails at a cancelled chunk.
    if isinstance(item, tuple) and item[2].started is None:
        item[2].prepared.cancel()


def _processes(executor: Executor) -> list[multiprocessing.process.BaseProcess]:
    """Processes of a pool; there are none before its first chunk.

    The attribute is private: Python before 3.14 has no public way to end a pool's processes.
    """
    return list((getattr(executor, "_processes", None) or {}).values())


def _is_ready(started: Future[None] | None) -> bool:
    """True if a process has started without an error."""
    return (
        started is not None
        and started.done()
        and not started.cancelled()
        and started.exception() is None
    )


def _kill(processes: Sequence[multiprocessing.process.BaseProcess]) -> None:
    """Kill ``processes``."""
    for process in processes:
        process.kill()


def _ending(code: int) -> str:
    """Meaning of the exit code of a process."""
    if code >= 0:
        return f"exit code {code}"
    return f"signal {-code}, {signal.strsignal(-code) or 'unknown'}" + (
        ", as for want of memory" if code == -9 else ""
    )


def in_chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """``documents`` in lists of about ``CHUNK_BYTES`` of text."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text) + 64
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
