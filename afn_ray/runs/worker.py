"""One shard from start to finish: read, encode, measure, record, commit. Knows nothing of Ray.

The hot path, in order, with what each module takes in and gives out::

    runs/worker       in: Task, Shard                       out: Commit
    corpus/<format>   in: FileSlice, ReadOptions            out: Documents, one at a time
    tokens/encode     in: texts of a chunk of documents     out: Encoded: ids, offsets, flags
    tokens/windows    in: Encoded, token budget             out: TokenBatches: ids, lengths
    model/engine      in: ids int64 [n_tokens], lengths     out: float32 [n_measured, n_tokens]
    model/signals     in: Site: one block's hidden states   out: float32 [..., rows] a column
    reduce/histogram  in: token ids, flags, rounded values  out: Summary: a histogram a type
    store/records     in: columns of tokens and documents   out: Parquet files in local scratch

``runs/measurer`` calls the tokenizer and the model, ``runs/flow`` queues the batches of several
shards on the device, and ``runs/recorder`` writes the rows and adds them to the summaries.
``runs/worker`` then publishes the files by ``store/shard_files``, which writes commit.json last.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from afn_ray import kept, logs, model
from afn_ray.config import TOP_NEURONS, RunConfig, resolve_layers
from afn_ray.corpus import reading, selection
from afn_ray.corpus_values import Document, Shard
from afn_ray.errors import AfnError, ConfigError, DeviceFault, ModelError, OutOfMemory, ShardError
from afn_ray.measure import Measure
from afn_ray.model.signals import Neurons, find_signals, series
from afn_ray.provenance import software
from afn_ray.runs import scratch
from afn_ray.runs.flow import Flow, forget_locals
from afn_ray.runs.measurer import Measurer, window_tokens
from afn_ray.runs.recorder import Part, Recorder
from afn_ray.runs.task import Task
from afn_ray.runs.token_filter import row_filter
from afn_ray.runs.values import Values
from afn_ray.schema import STRENGTH
from afn_ray.store import records, shard_files
from afn_ray.store.commits import Commit
from afn_ray.tokens import encode, languages, windows
from afn_ray.tokens.feed import Chunk, Feed

MOST_NUMBERS = 640
"""Largest number of values measured per token.

A chunk of a quarter of a million tokens then takes 0.6 GB, and a few chunks are in flight.
"""
MOST_MEANS = 1 << 18
"""Largest number of dimensions of all mean states, which the measure holds: 1.4 MB of text."""
MOST_SUMMED = 1 << 24
"""Largest number of sums of hidden states: layers by types by dimensions, 8 bytes each.

A shard in process has them several times.
"""
RECORDERS = 3
"""Number of threads that make rows and summaries, for all shards of a worker.

One uses about 0.1 us of CPU time a token (``afn bench feed``).
"""
WRITTEN_BEHIND = 2
"""Number of chunks that may always wait to be written."""
WAITING_BYTES = 256 << 20
"""Size of measured chunks up to which more of them wait, in bytes; bounds memory.

It is about a second of a GPU at 3 M tokens a second.
"""
TOKEN_BYTES = 80
"""Memory of a waiting token beside its values, in bytes: ids, offsets, places in batches, text."""
LASTING_HALVINGS = 2
"""Largest number of halvings of the token budget that a worker keeps for later shards.

A shard that never fits must not slow down the others much.
"""
NONE_MEASURED = 5
"""Fewest failed documents that fail the shard when it has no measured token.

A fault in all of them is probably not the fault of a document.
"""

_log = logging.getLogger(__name__)


def prepare(config: RunConfig, files: model.ModelFiles, device: str, dtype: str) -> Task:
    """Return the task of ``config``, for a corpus without labels and detected languages.

    ``device`` is "cpu" or "cuda", the workers' device. ``dtype`` is the dtype of the matrix
    products, already decided. Raises ``ModelError`` or ``ConfigError``.
    """
    layers = resolve_layers(config.layers, files.depth)
    window = window_tokens(config, files)
    if window > files.context_tokens:
        raise ModelError(
            f"window_tokens is {window}, but {files.name} takes at most {files.context_tokens}"
        )
    tokenizer, identity = model.load_identified(files)
    encoder = encode.TextEncoder(tokenizer, files.num_embeddings)
    _, overlap = windows.window_sizes(window, config.overlap_tokens, encoder.template)
    signals, names = find_signals(config.signals, config.top_neurons)
    recorded = tuple(series(layers, signals))
    has_neurons = any(isinstance(signal, Neurons) for signal in signals)
    neuron_layers = tuple(k for k in layers if k and has_neurons)
    for signal in signals:
        if all(k < signal.first_layer for k in layers):
            raise ConfigError(
                f"signals has {signal.name}, which the embeddings (layer 0) have not; name another "
                f"layer too, layers is {config.layers}"
            )
    if (num_rows := len(recorded) + 2 * config.top_neurons * len(neuron_layers)) > MOST_NUMBERS:
        raise ConfigError(
            f"signals and layers ask for {num_rows} numbers of each token, expected at most "
            f"{MOST_NUMBERS}: name fewer layers, or fewer --top-neurons (each is two)"
        )
    num_means = len(layers) * files.hidden_size
    if num_means > MOST_MEANS and any("mean" in s.needs for s in signals):
        raise ConfigError(
            f"signals has centred_mean, or another one that needs mean states, and {len(layers)} "
            f"layers of {files.hidden_size:,} dimensions make {num_means:,} numbers, expected at "
            f"most {MOST_MEANS:,}: name fewer layers"
        )
    num_summed = len(layers) * config.mean_vectors * files.hidden_size
    if num_summed > MOST_SUMMED:
        most = MOST_SUMMED // (len(layers) * files.hidden_size)
        raise ConfigError(
            f"mean_vectors is {config.mean_vectors}, but {len(layers)} layers of "
            f"{files.hidden_size:,} dimensions allow at most {most}: name fewer types or layers"
        )
    measure = Measure(
        model=tuple(identity.items()),
        model_type=files.model_type,
        layers=layers,
        signals=tuple(names),
        series=recorded,
        window_tokens=window,
        overlap_tokens=overlap,
        offsets=config.offsets,
        dtype=dtype,
        neuron_layers=neuron_layers,
        top_neurons=config.top_neurons if neuron_layers else 0,
    )
    return Task(config, measure, device)


def wants(task: Task, need: str) -> bool:
    """True if a signal of ``task`` needs ``need``, one of ``signals.NEEDS``."""
    return any(need in s.needs for s in find_signals(task.config.signals)[0])


def with_signals(task: Task, signals: str = STRENGTH) -> Task:
    """``task`` that measures ``signals``, names of columns, and nothing else."""
    found, names = find_signals(signals)
    measure = replace(
        task.measure,
        signals=tuple(names),
        series=tuple(series(task.measure.layers, found)),
        neuron_layers=(),
        top_neurons=0,
        neurons_above=(),
        mean_types=(),
    )
    config = replace(
        task.config, signals=signals, neurons_of="all", top_neurons=TOP_NEURONS, mean_vectors=0
    )
    return replace(task, config=config, measure=measure)


def attempt(
    task: Task,
    shard: Shard,
    oom_retries: int,
    finish: Callable[[Path, str], shard_files.Attempt],
) -> Commit:
    """Make one attempt at ``shard`` and commit it; return the commit that counts.

    ``finish`` writes the tables into a folder on scratch, for an attempt of a name. Another attempt
    may have committed the shard first; its commit is then returned. Raises ``ShardError`` for a
    fault of this shard alone (``CorpusChanged``: its file has changed), ``DeviceFault`` for one of
    any shard that uses the device, ``Interrupted`` for a full disk, ``Unavailable`` where the store
    or the corpus does not answer, and ``StoreError`` where the store fails.
    """
    name = uuid.uuid4().hex[:16]
    known: dict[str, Any] = {"run": task.run, "worker": task.worker}
    known |= {"shard": shard.id, "attempt": name}
    logs.report(
        _log,
        "attempt_began",
        f"reads {shard.slices[0].uri}",
        **known,
        bytes=shard.num_bytes,
        halvings=oom_retries,  # the field's name in logs
    )
    began = time.monotonic()
    try:
        commit = _committed(task, shard, name, finish)
    except BaseException as error:
        forget_locals(error)  # the attempt's texts and values end here, not with its error
        logs.report(
            _log,
            "attempt_failed",
            f"{type(error).__name__}: {error}",
            level=logging.WARNING,
            **known,
            seconds=round(time.monotonic() - began, 3),
        )
        if not isinstance(error, AfnError) and model.is_device_fault(error):
            # Batches of several shards are on the device, and any of them may have caused it.
            raise DeviceFault(f"{type(error).__name__}: {error}") from error
        raise
    ours = commit.attempt == name
    message = "is committed" if ours else f"attempt {commit.attempt} had committed the shard before"
    logs.report(
        _log,
        "attempt_committed" if ours else "attempt_lost",
        message,
        **known,
        counts=commit.counts,
        seconds=round(time.monotonic() - began, 3),
    )
    return commit


def _committed(
    task: Task, shard: Shard, name: str, finish: Callable[[Path, str], shard_files.Attempt]
) -> Commit:
    """The shard's commit, which the store has or the attempt ``name`` makes."""
    store = task.config.store
    measure_id = task.measure.id
    commit = shard_files.read_commit(store, measure_id, shard.id, shard.generation)
    if commit is not None:
        return commit  # by another run, or by an attempt whose answer was lost
    with scratch.attempt_folder(task.config) as folder:
        return shard_files.publish(store, measure_id, shard, finish(folder, name))


def shard_tables(task: Task, shard: Shard, folder: Path, name: str) -> records.ShardFiles:
    """The tables of ``task`` in ``folder``, for the attempt ``name`` at ``shard``."""
    measure = task.measure
    kept_fields = kept.fields_of(task.config.read_options.keep)
    files = records.ShardFiles(
        folder,
        measure.series,
        measure.neuron_layers,
        measure.offsets,
        origin={"measure": measure.id, "shard": shard.id, "attempt": name},
        of_corpus=records.CorpusColumns(measure.tagged, kept_fields, measure.detected),
    )
    if measure.mean_types:
        files.record_vectors()
    return files


class Processor:
    """A loaded model and tokenizer that turn shards into commits.

    Several threads may each process a shard. One shard at a time submits to the model, while the
    next one is read and tokenized and the previous one is written and uploaded (``runs/flow``).
    Reading, tokenizing and writing have threads of their own; with ``tokenizer_workers``,
    tokenizing has processes. Rows and summaries are made by ``RECORDERS`` threads, so one shard's
    writer keeps up with a GPU. The chunks that wait before and after the model are bounded.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        languages.check(task.measure.languages)
        scratch.sweep(task.config)
        self.measurer = Measurer(task)
        self.counters = self.measurer.counters
        self.feed = Feed(self.measurer.preparer, task.config.tokenizer_workers or 0)
        self._oom_retries = 0  # of the token budget of every shard, since a larger one did not fit
        self._makers = ThreadPoolExecutor(RECORDERS, "afn-record")
        self._counting = threading.Lock()

    def stop(self) -> None:
        """Make shards in process end soon with ``Interrupted``."""
        self.measurer.stop()

    def close(self) -> None:
        """End the tokenizer's thread or processes, and the threads that make rows."""
        self.feed.close()
        self._makers.shutdown(wait=True, cancel_futures=True)

    def process(self, shard: Shard, oom_retries: int = 0) -> Commit:
        """Measure every token of ``shard`` and commit it; return the commit that counts.

        ``oom_retries``: how often the token budget is halved, for a shard that ran out of memory.
        Raises as ``attempt`` does.
        """
        oom_retries = max(oom_retries, self._oom_retries)

        def measure(folder: Path, name: str) -> shard_files.Attempt:
            return self.record(shard, oom_retries, folder, name)

        return attempt(self.task, shard, oom_retries, measure)

    def record(
        self, shard: Shard, oom_retries: int, folder: Path, name: str
    ) -> shard_files.Attempt:
        """Measure every token of ``shard`` for the attempt ``name``; write its tables to
        ``folder``.

        After a failure of memory, later shards begin with a smaller token budget. All batches of a
        shard have the same.
        """
        oom_retries = max(oom_retries, self._oom_retries)
        try:
            return self._record(shard, oom_retries, folder, name)
        except OutOfMemory:
            self._remember_halvings(oom_retries + 1)
            raise

    def _remember_halvings(self, halvings: int) -> None:
        """Halve the token budget of later shards at least this often, up to a limit."""
        with self._counting:
            self._oom_retries = max(self._oom_retries, min(halvings, LASTING_HALVINGS))

    def _record(
        self, shard: Shard, oom_retries: int, folder: Path, name: str
    ) -> shard_files.Attempt:
        measure = self.task.measure
        options = self.task.config.read_options
        unselected = selection.Unselected()
        read = (d for piece in shard.slices for d in reading.read(piece, options))
        documents = selection.selected(read, unselected)
        with shard_tables(self.task, shard, folder, name) as files:
            recorder = Recorder(measure, files, row_filter(shard.options.record))
            seconds = self._measure_and_record(documents, oom_retries, recorder)
            recorder.finish()
        if options.selects:
            recorder.counts |= unselected.counts()
        return shard_files.Attempt(
            name,
            files.tables(),
            recorder.counts,
            round(seconds, 3),
            made_by={
                "device": self.task.device,
                **software(),
                **model.VERSIONS,
                **self.measurer.model.maker,
            },
        )

    def _measure_and_record(
        self, documents: Iterator[Document], oom_retries: int, recorder: Recorder
    ) -> float:
        """Measure and record all ``documents``; return the seconds for which it had the model.

        Raises ``ShardError`` where no token is measured and ``NONE_MEASURED`` documents or more
        failed.
        """
        unwritten: deque[tuple[Future[None], int]] = deque()  # each with the chunk's size
        first = 0  # number of the chunk's first document
        with (
            self.feed.chunks(documents, oom_retries) as chunks,
            ThreadPoolExecutor(1, "afn-write") as writer,
        ):
            flow = self.measurer.flow(chunks, oom_retries)
            with closing(flow.measure()) as measured:
                for chunk, values in measured:
                    made = self._makers.submit(self._make, recorder, chunk, values, first)
                    written = writer.submit(self._write, recorder, made)
                    unwritten.append((written, _num_bytes(chunk, values)))
                    first += len(chunk.documents)
                    del chunk, values, made  # the waiting chunks are bounded, this one included
                    _wait_for_room(unwritten, flow)
            for written, _ in unwritten:
                written.result()
        if recorder.num_refused >= NONE_MEASURED and not recorder.counts["tokens"]:
            raise ShardError(
                f"none of {recorder.num_refused:,} documents could be measured, so the fault may "
                f"be none of theirs: {recorder.first_refusal}"
            )
        return flow.turn_s

    def _make(self, recorder: Recorder, chunk: Chunk, values: Values, first: int) -> Part:
        """``recorder.make``, on one of the threads that make rows."""
        began = time.monotonic()
        part = recorder.make(chunk, values, first)
        with self._counting:  # other chunks are made at the same time
            self.counters.read_s += chunk.read_s
            self.counters.write_s += time.monotonic() - began
        return part

    def _write(self, recorder: Recorder, made: Future[Part]) -> None:
        """Write a part when it is made, on the shard's writing thread."""
        part = made.result()
        began = time.monotonic()
        recorder.write(part)
        with self._counting:  # the next shard may write at the same time
            self.counters.documents += part.counts["documents"]
            self.counters.write_s += time.monotonic() - began


def _num_bytes(chunk: Chunk, values: Values) -> int:
    """Memory of ``chunk`` and its ``values``, in bytes."""
    num_tokens = len(chunk.prepared.encoded.token_ids)
    arrays = (values.series, values.neurons, values.neuron_values, values.sums)
    return TOKEN_BYTES * num_tokens + sum(array.nbytes for array in arrays)


def _wait_for_room(unwritten: deque[tuple[Future[None], int]], flow: Flow) -> None:
    """Take off what is written; wait while more than ``WAITING_BYTES`` are not.

    Other shards have their turn in the model meanwhile. Raises the first error of the writing.
    """
    while unwritten:
        waits = len(unwritten) > WRITTEN_BEHIND and sum(n for _, n in unwritten) > WAITING_BYTES
        if not waits and not unwritten[0][0].done():
            return
        written, _ = unwritten.popleft()
        if not written.done():
            with flow.paused():
                wait([written])
        written.result()
