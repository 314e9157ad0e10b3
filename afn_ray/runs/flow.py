"""Chunks of several shards in one model: their batches queue on the device without a gap.

The batches of a chunk are submitted before those of the chunk before it are collected, and those of
the next shard before the last ones of this shard. A batch has tokens of one chunk alone, so no
value depends on what else is queued.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import numpy as np

from afn_ray import model
from afn_ray.errors import OutOfMemory
from afn_ray.model.pending import Read
from afn_ray.reduce.histogram import round_strengths
from afn_ray.reduce.mean_vectors import StateSums
from afn_ray.runs.progress import Counters
from afn_ray.runs.values import Float32s, Values
from afn_ray.schema import STATE_LIMIT
from afn_ray.tokens.feed import Chunk, Chunks
from afn_ray.tokens.windows import TokenBatch

SUBMITTED = 4
"""Largest number of batches of a shard queued on a GPU after the one whose result is awaited.

A shard that follows another one may queue as many behind the last ones of that shard.
"""
POLL_S = 0.2
"""Pause between two checks whether the worker is stopped, of a thread that waits for its turn."""

MeasureAlone = Callable[[Chunk, Exception | None], tuple[Chunk, Values]]
"""Function that measures one chunk with nothing else of its shard in the model.

The error is the one that the chunk has raised already, if any.
"""


class PendingChunk:
    """A chunk whose batches are measured, with the values that are collected so far."""

    def __init__(
        self, chunk: Chunk, num_series: int, num_neurons: int, *, counts: bool = True
    ) -> None:
        """``counts``: whether progress counts the chunk's documents as measured."""
        prepared = chunk.prepared
        self.chunk = chunk
        self.error: Exception | None = None  # of one of its batches, except those of memory
        self.num_left = len(prepared.batches)  # batches that are not collected
        self.measured = 0.0  # documents that progress counts so far
        self.num_documents = len(prepared.n_windows) if counts else 0
        self.num_tokens = len(prepared.encoded.token_ids)
        self._num_series = num_series
        self._values = np.full((num_series + num_neurons, self.num_tokens), np.nan, np.float32)
        self._numbers = np.zeros((num_neurons, self.num_tokens), np.int32)
        self._sums = StateSums()

    def add(self, batch: TokenBatch, read: Read) -> None:
        """Round the values of ``batch`` and put them at their tokens.

        Raises ``ValueError`` for values that no run records, if states are added up: the document
        cannot be taken out of a sum later, so it is found and measured without.
        """
        if read.sums is not None:
            _check_recordable(read.values[:, batch.kept], self._num_series)
            self._sums.add(*read.sums)
        # One row at a time: rounding needs several times a row's memory.
        for row, values in zip(self._values, read.values, strict=True):
            row[batch.rows] = round_strengths(values[batch.kept])
        self._numbers[:, batch.rows] = read.numbers[:, batch.kept]
        self.num_left -= 1

    def values(self) -> Values:
        """The values of all tokens, once no batch is left."""
        assert not self.num_left, "every batch is collected"
        series, neurons = np.split(self._values, [self._num_series])
        return Values(series, self._numbers, neurons, self._sums)

    def result(self) -> tuple[Chunk, Values]:
        """The chunk and its values, once no batch is left; the values are not kept here."""
        values = self.values()
        del self._values, self._numbers, self._sums
        return self.chunk, values


def _check_recordable(values: Float32s, num_series: int) -> None:
    """Raise ``ValueError`` for ``values`` [n_values, n_tokens] that a record would refuse.

    The first ``num_series`` rows are series, the others neurons.
    """
    series = values[:num_series]
    neurons = values[num_series:]
    if not (series >= 0).all() or not (series < STATE_LIMIT).all():
        raise ValueError(f"a value is not from 0 to {STATE_LIMIT:,.0f}, or not finite")
    if not (np.abs(neurons) < STATE_LIMIT).all():
        raise ValueError(f"a neuron is {STATE_LIMIT:,.0f} or more, or not finite")


class Turns:
    """The turns of several shards' threads to use one model on its device.

    A thread submits batches while it has the turn, and collects its own at any time.
    """

    def __init__(
        self,
        submit: Callable[[TokenBatch], model.Pending],
        num_values: tuple[int, int],
        device: str,
        counters: Counters,
        check_stopped: Callable[[], None],
    ) -> None:
        """``submit`` starts a forward pass. ``num_values``: numbers of series and of neurons that
        each token has. ``device`` is "cpu" or "cuda". ``check_stopped`` raises ``Interrupted`` once
        the worker is to stop.
        """
        self.submit, self.check_stopped = submit, check_stopped
        # batches of a thread that may follow the one that it waits for
        self.num_queued = SUBMITTED if device == "cuda" else 0
        self._num_values = num_values
        self._device = device
        self._counters = counters
        self._turn = threading.RLock()
        self._counting = threading.Lock()
        self._num_batches = 0  # on the device
        self._num_busy = 0  # threads that have the turn: 0 or 1, or more if one took it again
        self._num_waiting = 0  # threads that wait for text
        self._since = time.monotonic()  # of the last change of these three

    def take(self) -> None:
        """Wait for the turn, the right to submit batches, which one thread at a time has.

        A thread that has the turn may take it again, and then passes it on as often.
        """
        while not self._turn.acquire(timeout=POLL_S):
            self.check_stopped()
        self._change(busy=1)

    def pass_on(self) -> None:
        """Give the turn to another thread."""
        self._change(busy=-1)
        self._turn.release()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for text in this context, without the turn."""
        self._change(waiting=1)
        try:
            yield
        finally:
            self._change(waiting=-1)

    def free(self, error: BaseException) -> None:
        """Free what a batch holds in memory that has failed with ``error``.

        Its activations are locals of the frames in the traceback, so they would stay on the device
        as long as the error. Raises ``OutOfMemory`` if the batch did not fit.
        """
        forget_locals(error)
        if not model.is_out_of_memory(error):
            return
        for each in _with_causes(error):
            each.__traceback__ = None  # a frame also refers to its function, and so to a closure
        model.free_memory()
        reason = str(error) or type(error).__name__
        raise OutOfMemory(
            f"a batch did not fit into the memory of {self._device}: {reason}"
        ) from error

    def measure(self, chunk: Chunk, *, counts: bool) -> Values:
        """Values of all tokens of ``chunk``; none of its batches is left on the device.

        ``counts``: whether progress counts the chunk's documents as measured. Raises
        ``OutOfMemory`` where a batch does not fit.
        """
        queue = Queue(self)
        pending = self.begin(chunk, counts=counts)
        try:
            self.take()
            try:
                for batch in chunk.prepared.batches:
                    queue.submit(pending, batch)
                while queue:
                    queue.collect()
            finally:
                self.pass_on()
            return pending.values()
        except BaseException:
            self.uncount(pending)
            raise
        finally:
            queue.drop()

    def begin(self, chunk: Chunk, *, counts: bool = True) -> PendingChunk:
        """``chunk`` with room for its values. Raises ``OutOfMemory`` where there is none."""
        try:
            pending = PendingChunk(chunk, *self._num_values, counts=counts)
        except MemoryError as error:
            self.free(error)
            raise
        with self._counting:
            self._counters.tokenize_s += chunk.prepared.seconds
        if not pending.num_left:  # there is no token
            self._count(pending, pending.num_documents)
        return pending

    def add_batch(self) -> None:
        """Count a batch that is about to be submitted."""
        self._change(batches=1)

    def remove_batch(self) -> None:
        """Count a batch that has left the device, or failed there."""
        self._change(batches=-1)

    def count_batch(self, pending: PendingChunk, batch: TokenBatch) -> None:
        """Count the tokens of a batch that is collected, and its share of the documents."""
        with self._counting:
            self._counters.tokens += len(batch.rows)
            self._counters.forward_tokens += batch.forward_tokens
        self._count(pending, pending.num_documents * len(batch.rows) / pending.num_tokens)

    def uncount(self, pending: PendingChunk) -> None:
        """Take back the documents of a chunk that is not completed: they are measured again."""
        self._count(pending, -pending.measured)

    def _count(self, pending: PendingChunk, num_documents: float) -> None:
        pending.measured += num_documents
        with self._counting:
            self._counters.measured += num_documents

    def _change(self, *, batches: int = 0, busy: int = 0, waiting: int = 0) -> None:
        """Count the time until now for the model or for the wait for text;
        then change the state.
        """
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

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._batches: deque[tuple[PendingChunk, TokenBatch, model.Pending]] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def submit(self, pending: PendingChunk, batch: TokenBatch) -> None:
        """Submit ``batch``, then collect the oldest ones while too many are queued."""
        self._turns.check_stopped()
        self._turns.add_batch()
        try:
            reading = self._turns.submit(batch)
        except BaseException as error:
            self._turns.remove_batch()
            self._turns.free(error)
            _remember(pending, error)
            raise
        self._batches.append((pending, batch, reading))
        while len(self._batches) > self._turns.num_queued:
            self.collect()

    def collect(self) -> None:
        """Wait for the oldest batch and add its values to those of its chunk."""
        pending, batch, reading = self._batches.popleft()
        try:
            pending.add(batch, reading.result())
            self._turns.count_batch(pending, batch)
        except BaseException as error:
            self._turns.free(error)
            _remember(pending, error)
            raise
        finally:
            self._turns.remove_batch()

    def drop(self) -> None:
        """Drop all batches without their values."""
        while self._batches:
            self._batches.popleft()
            self._turns.remove_batch()


def _remember(pending: PendingChunk, error: BaseException) -> None:
    if isinstance(error, Exception):
        pending.error = error


def forget_locals(error: BaseException) -> None:
    """Clear the local variables of all finished frames in the tracebacks of ``error``.

    The tracebacks keep their lines. Without this, what the frames refer to may live until the next
    garbage collection, since a frame often refers to the error that it raised.
    """
    for each in _with_causes(error):
        traceback.clear_frames(each.__traceback__)


def _with_causes(error: BaseException) -> list[BaseException]:
    """``error`` and all errors that led to it."""
    found: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        this = left.pop()
        if this is not None and not any(this is other for other in found):
            found.append(this)
            left += [this.__cause__, this.__context__]
    return found


class Flow:
    """The chunks of one shard in the model.

    The thread takes its turn with text at hand, and passes it on when no more text is ready, when
    the caller waits, and when the last batch is submitted; another shard's batches follow at once.
    """

    def __init__(self, turns: Turns, chunks: Chunks, measure_alone: MeasureAlone) -> None:
        self._turns = turns
        self._chunks = chunks
        self._measure_alone = measure_alone
        self._queue = Queue(turns)
        self._pending: deque[PendingChunk] = deque()  # not yielded yet, in order
        self._turn_began: float | None = None  # time; None: this shard has not the turn
        self.turn_s = 0.0  # seconds for which this shard has had the turn

    def measure(self) -> Generator[tuple[Chunk, Values], None, None]:
        """Yield each chunk with its values, in order; to be closed in the same thread.

        After an error of the model, the chunks that are not complete are measured one at a time.
        Raises ``OutOfMemory`` where a batch does not fit.
        """
        try:
            while True:
                try:
                    yield from self._run()
                    return
                except Exception:
                    if all(pending.error is None for pending in self._pending):
                        raise  # of the text or of memory
                    yield from self._one_by_one()
        finally:
            self._drop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let other shards have the turn in this context, in which the
        caller of ``measure`` waits.
        """
        had_turn = self._turn_began is not None
        self._pass_on()
        yield
        if had_turn:
            self._take()

    def _run(self) -> Iterator[tuple[Chunk, Values]]:
        chunk = self._next_chunk()
        while chunk is not None:
            with self._turn():
                yield from self._submit(chunk)
                while self._chunks.is_ready() and (chunk := next(self._chunks, None)):
                    yield from self._submit(chunk)
            while self._queue and not self._chunks.is_ready():
                yield from self._collect()
            chunk = self._next_chunk()
        while self._queue:
            yield from self._collect()

    def _submit(self, chunk: Chunk) -> Iterator[tuple[Chunk, Values]]:
        """Submit the batches of ``chunk``; yield what is complete by then."""
        pending = self._turns.begin(chunk)
        self._pending.append(pending)
        for batch in chunk.prepared.batches:
            self._queue.submit(pending, batch)
            yield from self._complete()
        yield from self._complete()

    def _collect(self) -> Iterator[tuple[Chunk, Values]]:
        """Collect the oldest batch; yield what is then complete."""
        self._queue.collect()
        yield from self._complete()

    def _next_chunk(self) -> Chunk | None:
        """Wait for the next chunk; None at the end."""
        with self._turns.waiting():
            return next(self._chunks, None)

    def _complete(self) -> Iterator[tuple[Chunk, Values]]:
        """Yield the first chunks as far as they are complete."""
        while self._pending and not self._pending[0].num_left:
            yield self._pending.popleft().result()  # this frame keeps no reference to it

    def _one_by_one(self) -> Iterator[tuple[Chunk, Values]]:
        """Measure the chunks that are not complete again, each alone.

        Raises the error of the one that failed, unless some of its texts are at fault.
        """
        dropped = self._drop()
        failed = next(p for p in dropped if p.error is not None)
        with self._turn():
            repaired = self._measure_alone(failed.chunk, failed.error)
            for pending in dropped:
                if pending is failed:
                    yield repaired
                else:
                    yield self._measure_alone(pending.chunk, None)

    def _drop(self) -> list[PendingChunk]:
        """Drop all batches on the device; return the chunks that were not complete."""
        self._queue.drop()
        dropped = list(self._pending)
        self._pending.clear()
        for pending in dropped:
            self._turns.uncount(pending)
        return dropped

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Have the turn in this context, except while the flow is paused."""
        self._take()
        try:
            yield
        finally:
            self._pass_on()

    def _take(self) -> None:
        """Wait for the turn."""
        self._turns.take()
        self._turn_began = time.monotonic()

    def _pass_on(self) -> None:
        """Pass the turn on, if this shard has it."""
        if self._turn_began is not None:
            self.turn_s += time.monotonic() - self._turn_began
            self._turn_began = None
            self._turns.pass_on()
