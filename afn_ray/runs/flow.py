"""Chunks of several shards in one model: their batches queue on the device without a gap.

The batches of a chunk are submitted before those of the chunk before it are collected, and those of
the next shard before the last ones of this shard. A batch has tokens of one chunk alone, so no value
depends on what else is queued.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import numpy as np

from afn_ray import model
from afn_ray.model.engine import Read
from afn_ray.reduce.histogram import round_strengths
from afn_ray.runs.progress import Counters
from afn_ray.runs.values import Values
from afn_ray.tokens.feed import Chunk, Chunks
from afn_ray.tokens.windows import TokenBatch

SUBMITTED = 4
"""Largest number of batches of a shard queued on a GPU after the one whose result is awaited.

A shard that follows another one may queue as many behind the last ones of that shard.
"""
POLL_S = 0.2
"""Pause between two checks whether the worker is stopped, of a thread that waits for its turn."""

Alone = Callable[[Chunk, Exception | None], tuple[Chunk, Values]]
"""Function that measures one chunk with nothing else of its shard in the model.

The error is the one that the chunk has raised already, if any.
"""


class Passage:
    """A chunk on its way through the model, with the values that are collected so far."""

    def __init__(
        self, chunk: Chunk, num_series: int, num_neurons: int, *, counts: bool = True
    ) -> None:
        """``counts``: whether progress counts the chunk's documents as measured."""
        prepared = chunk.prepared
        self.chunk = chunk
        self.error: Exception | None = None  # of one of its batches
        self.num_left = len(prepared.batches)  # batches that are not collected
        self.measured = 0.0  # documents that progress counts so far
        self.num_documents = len(prepared.n_windows) if counts else 0
        self.num_tokens = len(prepared.encoded.token_ids)
        self._num_series = num_series
        self._values = np.full((num_series + num_neurons, self.num_tokens), np.nan, np.float32)
        self._numbers = np.zeros((num_neurons, self.num_tokens), np.int32)

    def add(self, batch: TokenBatch, read: Read) -> None:
        """Round the values of ``batch`` and put them at their tokens."""
        # One row at a time: rounding needs several times a row's memory.
        for row, values in zip(self._values, read.values, strict=True):
            row[batch.rows] = round_strengths(values[batch.kept])
        self._numbers[:, batch.rows] = read.numbers[:, batch.kept]
        self.num_left -= 1

    def values(self) -> Values:
        """The values of all tokens, once no batch is left."""
        assert not self.num_left, "every batch is collected"
        series, neurons = np.split(self._values, [self._num_series])
        return Values(series, self._numbers, neurons)

    def result(self) -> tuple[Chunk, Values]:
        """The chunk and its values, once no batch is left; the passage does not keep the values."""
        values = self.values()
        del self._values, self._numbers
        return self.chunk, values


class Device:
    """The model on its device, which the threads of several shards use.

    A thread submits batches while it has the ``turn``, and collects its own at any time.
    """

    def __init__(
        self,
        submit: Callable[[TokenBatch], model.Pending],
        shape: tuple[int, int],
        num_queued: int,
        counters: Counters,
        check_stopped: Callable[[], None],
    ) -> None:
        """``submit`` starts a forward pass; ``shape`` is the number of series and of neurons of a
        token. ``num_queued`` batches of a thread may follow the one that it waits for.
        ``check_stopped`` raises ``Interrupted`` once the worker is to stop.
        """
        self.submit, self.check_stopped = submit, check_stopped
        self.num_queued = num_queued
        self._shape, self._counters = shape, counters
        self._turn = threading.RLock()
        self._counting = threading.Lock()
        self._num_batches = 0  # on the device
        self._num_busy = 0  # 1 while a thread has the turn and its text, else 0
        self._num_waiting = 0  # threads that wait for text
        self._since = time.monotonic()  # of the last change of these three

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the right to submit batches, which one thread at a time has."""
        while not self._turn.acquire(timeout=POLL_S):
            self.check_stopped()
        self._change(busy=1)
        try:
            yield
        finally:
            self._change(busy=-1)
            self._turn.release()

    @contextmanager
    def waiting(self, *, in_turn: bool) -> Iterator[None]:
        """Wait for text in this context; ``in_turn``: the thread has the turn."""
        self._change(waiting=1, busy=-in_turn)
        try:
            yield
        finally:
            self._change(waiting=-1, busy=in_turn)

    def measure(self, chunk: Chunk, *, counts: bool) -> Values:
        """Values of all tokens of ``chunk``; none of its batches is left on the device.

        ``counts``: whether progress counts the chunk's documents as measured.
        """
        queue = Queue(self)
        passage = self.begin(chunk, counts=counts)
        try:
            with self.turn():
                for batch in chunk.prepared.batches:
                    queue.submit(passage, batch)
                while queue:
                    queue.collect()
            return passage.values()
        except BaseException:
            self.uncount(passage)
            raise
        finally:
            queue.drop()

    def begin(self, chunk: Chunk, *, counts: bool = True) -> Passage:
        """A passage for ``chunk``."""
        passage = Passage(chunk, *self._shape, counts=counts)
        with self._counting:
            self._counters.tokenize_s += chunk.prepared.seconds
        if not passage.num_left:  # there is no token
            self._count(passage, passage.num_documents)
        return passage

    def add_batch(self) -> None:
        """Count a batch that is about to be submitted."""
        self._change(batches=1)

    def remove_batch(self) -> None:
        """Count a batch that has left the device, or failed there."""
        self._change(batches=-1)

    def count_batch(self, passage: Passage, batch: TokenBatch) -> None:
        """Count the tokens of a batch that is collected, and its share of the documents."""
        with self._counting:
            self._counters.tokens += len(batch.rows)
            self._counters.forward_tokens += batch.forward_tokens
        self._count(passage, passage.num_documents * len(batch.rows) / passage.num_tokens)

    def uncount(self, passage: Passage) -> None:
        """Take back the documents of a passage that is given up: they are measured again."""
        self._count(passage, -passage.measured)

    def _count(self, passage: Passage, num_documents: float) -> None:
        passage.measured += num_documents
        with self._counting:
            self._counters.measured += num_documents

    def _change(self, *, batches: int = 0, busy: int = 0, waiting: int = 0) -> None:
        """Count the time until now for the model or for the wait for text; then change the state."""
        with self._counting:
            now = time.monotonic()
            if self._num_batches:
                self._counters.model_s += now - self._since
            elif self._num_waiting and not self._num_busy:
                self._counters.wait_s += now - self._since
            self._since = now
            self._num_batches += batches
            self._num_busy += busy
            self._num_waiting += waiting


class Queue:
    """The batches of one thread on the device, the oldest first."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._batches: deque[tuple[Passage, TokenBatch, model.Pending]] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def submit(self, passage: Passage, batch: TokenBatch) -> None:
        """Submit ``batch``, then collect the oldest ones while too many are queued."""
        self._device.check_stopped()
        self._device.add_batch()
        try:
            pending = self._device.submit(batch)
        except BaseException as error:
            self._device.remove_batch()
            _remember(passage, error)
            raise
        self._batches.append((passage, batch, pending))
        while len(self._batches) > self._device.num_queued:
            self.collect()

    def collect(self) -> None:
        """Wait for the oldest batch and add its values to its passage."""
        passage, batch, pending = self._batches.popleft()
        try:
            passage.add(batch, pending.result())
            self._device.count_batch(passage, batch)
        except BaseException as error:
            _remember(passage, error)
            raise
        finally:
            self._device.remove_batch()

    def drop(self) -> None:
        """Forget all batches, whose values nobody needs."""
        while self._batches:
            self._batches.popleft()
            self._device.remove_batch()


def _remember(passage: Passage, error: BaseException) -> None:
    if isinstance(error, Exception):
        passage.error = error


class Flow:
    """The chunks of one shard in the model.

    The thread takes its turn with its first text at hand, and passes it on when the last batch is
    submitted; so another shard's batches follow at once.
    """

    def __init__(self, device: Device, chunks: Chunks, alone: Alone) -> None:
        self._device, self._chunks, self._alone = device, chunks, alone
        self._queue = Queue(device)
        self._passages: deque[Passage] = deque()  # not yielded yet, in order
        self.turn_s = 0.0  # seconds for which this shard has had the turn

    def measure(self) -> Generator[tuple[Chunk, Values], None, None]:
        """Yield each chunk with its values, in order; to be closed in the same thread.

        After an error of the model, the chunks that are not complete are measured one at a time.
        """
        try:
            while True:
                try:
                    yield from self._run()
                    return
                except Exception:
                    if all(passage.error is None for passage in self._passages):
                        raise  # of the text
                    yield from self._one_by_one()
        finally:
            self._give_up()

    def _run(self) -> Iterator[tuple[Chunk, Values]]:
        chunk = self._next_chunk(in_turn=False)
        if chunk is not None:
            with self._device.turn():
                began = time.monotonic()
                try:
                    while chunk is not None:
                        yield from self._submit(chunk)
                        chunk = self._next_chunk(in_turn=True)
                finally:
                    self.turn_s += time.monotonic() - began
        while self._queue:
            self._queue.collect()
            yield from self._complete()

    def _submit(self, chunk: Chunk) -> Iterator[tuple[Chunk, Values]]:
        """Submit the batches of ``chunk``; yield what is complete by the time of the next chunk."""
        passage = self._device.begin(chunk)
        self._passages.append(passage)
        for batch in chunk.prepared.batches:
            self._queue.submit(passage, batch)
            yield from self._complete()
        yield from self._complete()
        while self._queue and not self._chunks.is_ready():
            self._queue.collect()
            yield from self._complete()

    def _next_chunk(self, *, in_turn: bool) -> Chunk | None:
        """Wait for the next chunk; None at the end."""
        with self._device.waiting(in_turn=in_turn):
            return next(self._chunks, None)

    def _complete(self) -> Iterator[tuple[Chunk, Values]]:
        """Yield the first chunks as far as they are complete."""
        while self._passages and not self._passages[0].num_left:
            yield self._passages.popleft().result()  # this frame keeps no reference to it

    def _one_by_one(self) -> Iterator[tuple[Chunk, Values]]:
        """Measure the chunks that are not complete again, each alone.

        Raises the error of the one that failed, unless some of its texts are at fault.
        """
        passages = self._give_up()
        failed = next(p for p in passages if p.error is not None)
        with self._device.turn():
            repaired = self._alone(failed.chunk, failed.error)
            for passage in passages:
                yield repaired if passage is failed else self._alone(passage.chunk, None)

    def _give_up(self) -> list[Passage]:
        """Drop all batches on the device; return the passages that were not complete."""
        self._queue.drop()
        passages = list(self._passages)
        self._passages.clear()
        for passage in passages:
            self._device.uncount(passage)
        return passages
