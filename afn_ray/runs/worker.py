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

``runs/worker`` then publishes the files by ``store/shard_files``, which writes commit.json last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray import logs, model
from afn_ray.config import TOP_NEURONS, RunConfig, resolve_layers
from afn_ray.corpus import reading
from afn_ray.errors import ConfigError, Interrupted, ModelError, OutOfMemory, ShardError
from afn_ray.model.signals import Neurons, Signal, States, find_signals, series
from afn_ray.reduce import neurons
from afn_ray.reduce.histogram import Summary, round_strengths
from afn_ray.runs.progress import Progress
from afn_ray.runs.task import Task, in_dtype
from afn_ray.schema import (
    SCHEMA_VERSION,
    SPECIAL,
    STRENGTH,
    Document,
    Series,
    Shard,
    neurons_column,
    token_neurons_schema,
)
from afn_ray.store import disk, records, shard_files
from afn_ray.store.commits import COUNTS, Commit
from afn_ray.store.layout import SCRATCH_PREFIX
from afn_ray.tokens import culprits, encode, windows
from afn_ray.tokens.feed import Chunk, Feed, Prepared, Preparer, Recipe

Values = npt.NDArray[np.float32]
Result = TypeVar("Result")

PROBES = (
    "A",
    "The quick brown fox jumps over the lazy dog.",
    "Strength is a norm; a norm is not a meaning, yet.",
)
"""Texts of the self-check at load."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}
"""Default size of one forward pass by device, in tokens.

Larger batches on a CPU gain 4 % and need memory. A GPU needs enough work for all of its units.
"""
LONG_PROBE_TOKENS = 640
"""Length of the longest text in the self-check, in tokens.

It exceeds most attention windows and is still measured quickly.
"""
SUBMITTED = 4
"""Largest number of batches queued on a GPU after the one whose result is awaited."""
MOST_NUMBERS = 640
"""Largest number of values measured per token.

A chunk of a quarter of a million tokens then takes 0.6 GB, and a few chunks are in flight.
"""
WRITTEN_BEHIND = 2
"""Largest number of chunks that wait for the writing thread; bounds memory."""
NONE_MEASURED = 5
"""Fewest failed documents that fail the shard when it has no measured token.

A fault in all of them is probably not the fault of a document.
"""

_log = logging.getLogger(__name__)


def prepare(
    config: RunConfig, files: model.ModelFiles, device: str, dtype: str
) -> tuple[Task, dict[str, Any]]:
    """Return the task of ``config`` and its measure: everything that changes a recorded value.

    ``device`` is "cpu" or "cuda", the workers' device. ``dtype`` is the dtype of the matrix
    products, already decided. Raises ``ModelError`` or ``ConfigError``.
    """
    layers = resolve_layers(config.layers, files.depth)
    window = _window_tokens(config, files)
    if window > files.context_tokens:
        raise ModelError(
            f"window_tokens is {window}, but {files.name} takes at most {files.context_tokens}"
        )
    tokenizer = model.load_tokenizer(files)
    identity = model.identity(files, tokenizer)
    encoder = encode.TextEncoder(tokenizer, files.num_embeddings)
    _, overlap = windows.window_sizes(window, config.overlap_tokens, encoder.template)
    signals, names = find_signals(config.signals, config.top_neurons)
    recorded = tuple(series(layers, signals))
    neuron_layers = tuple(k for k in layers if k and any(isinstance(s, Neurons) for s in signals))
    if nowhere := [s.name for s in signals if all(k < s.first_layer for k in layers)]:
        raise ConfigError(
            f"signals has {nowhere[0]}, which the embeddings (layer 0) have not; name another "
            "layer too, "
            f"layers is {config.layers}"
        )
    if (num_rows := len(recorded) + 2 * config.top_neurons * len(neuron_layers)) > MOST_NUMBERS:
        raise ConfigError(
            f"signals and layers ask for {num_rows} numbers of each token, expected at most "
            f"{MOST_NUMBERS}: name fewer layers, or fewer --top-neurons (each is two)"
        )
    measure = {
        "schema_version": SCHEMA_VERSION,
        "model": identity,
        "model_type": files.model_type,
        "layers": list(layers),
        "signals": names,
        "series": [list(s) for s in recorded],
        "window_tokens": window,
        "overlap_tokens": overlap,
        "offsets": config.offsets,
        **(
            {"neuron_layers": list(neuron_layers), "top_neurons": config.top_neurons}
            if neuron_layers
            else {}
        ),
    }
    task = Task(config, layers, recorded, "", device, "", identity, neuron_layers=neuron_layers)
    return in_dtype(task, measure, dtype)


def wants_outliers(task: Task) -> bool:
    """Whether a signal of ``task`` leaves out outlier dimensions."""
    return any("outliers" in s.needs for s in find_signals(task.config.signals)[0])


def with_signals(task: Task, signals: str = STRENGTH) -> Task:
    """``task`` that measures ``signals``, names of columns, and nothing else."""
    recorded = tuple(series(task.layers, find_signals(signals)[0]))
    config = replace(task.config, signals=signals, neurons_of="all", top_neurons=TOP_NEURONS)
    return replace(task, config=config, series=recorded, neuron_layers=(), neurons_above=())


def _window_tokens(config: RunConfig, files: model.ModelFiles) -> int:
    """Tokens in a window: the config's value, else the model's context up to the default."""
    return config.window_tokens or min(files.context_tokens, model.DEFAULT_WINDOW_TOKENS)


def find_model(config: RunConfig) -> model.ModelFiles:
    """Files of the config's model on this machine."""
    return model.find_model(
        config.model,
        config.revision,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        allow_untested=config.allow_untested,
    )


def text_encoder(files: model.ModelFiles) -> encode.TextEncoder:
    """Encoder of texts into the tokens of ``files``."""
    return encode.TextEncoder(model.load_tokenizer(files))


class Processor:
    """A loaded model and tokenizer that turn shards into commits.

    Several threads may each process a shard. One shard at a time holds the model, while the next
    one is read and tokenized and the previous one is written and uploaded. Reading, tokenizing and
    writing have threads of their own; with ``tokenizer_workers``, tokenizing has processes. The
    number of chunks that wait before and after the model is bounded.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.progress = Progress()
        sweep_scratch(task.config)
        config = task.config
        files = find_model(config)
        tokenizer = model.load_tokenizer(files)
        identity = model.identity(files, tokenizer)
        if identity != task.identity:
            differing = sorted(
                k for k in {*identity, *task.identity} if identity.get(k) != task.identity.get(k)
            )
            raise ModelError(
                f"model {config.model} differs on this worker from the one planned: "
                f"{', '.join(differing)}"
            )
        window = _window_tokens(config, files)
        batch_tokens = config.batch_tokens or BATCH_TOKENS[task.device]
        self.model = model.Model(
            files, task.layers, task.dtype, task.device, batch_tokens, task.outliers
        )
        encoder = encode.TextEncoder(tokenizer, self.model.num_embeddings)
        self.signals, _ = find_signals(config.signals, config.top_neurons)
        needs = frozenset(need for signal in self.signals for need in signal.needs)
        probes = _probes(encoder, window)
        self._probe = min(probes, key=len)
        model.prepare(self.model, probes, needs)
        self.progress.why_padded = self.model.why_padded or ""
        recipe = Recipe(
            tokenizer.to_str(),
            window,
            config.overlap_tokens,
            batch_tokens,
            self.model.causal,
            self.model.packed,
            self.model.num_embeddings,
        )
        # rows of the measured values: the series, then numbers and values of neurons
        self._num_rows = len(task.series) + 2 * config.top_neurons * len(task.neuron_layers)
        self.preparer = Preparer(recipe, encoder)
        self.feed = Feed(self.preparer, config.tokenizer_workers)
        self._device = threading.Lock()  # held by the shard that uses the model
        self._counting = threading.Lock()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Make shards in process end soon with ``Interrupted``."""
        self._stopped.set()

    def close(self) -> None:
        """End the tokenizer's thread or processes."""
        self.feed.close()

    def process(self, shard: Shard, oom_retries: int = 0) -> Commit:
        """Measure every token of ``shard`` and commit it; return the commit that counts.

        Another attempt may have committed the shard first; its commit is then returned.
        ``oom_retries``: how often the token budget is halved, for a shard that ran out of memory.
        Raises ``ShardError`` for a fault of this shard alone (``CorpusChanged``: its file has
        changed), ``Interrupted`` for a full disk, ``Unavailable`` where the store or the corpus
        does not answer, and ``StoreError`` where the store fails.
        """
        attempt = uuid.uuid4().hex[:16]
        known: dict[str, Any] = {"run": self.task.run, "worker": self.task.worker}
        known |= {"shard": shard.id, "attempt": attempt}
        logs.tell(
            _log,
            "attempt_began",
            f"reads {shard.slices[0].uri}",
            **known,
            bytes=shard.num_bytes,
            halvings=oom_retries,  # the field's name in logs
        )
        began = time.monotonic()
        try:
            commit = self._process(shard, oom_retries, attempt)
        except BaseException as error:
            logs.tell(
                _log,
                "attempt_failed",
                f"{type(error).__name__}: {error}",
                level=logging.WARNING,
                **known,
                seconds=round(time.monotonic() - began, 3),
            )
            raise
        ours = commit.attempt == attempt
        message = (
            "is committed" if ours else f"attempt {commit.attempt} had committed the shard before"
        )
        logs.tell(
            _log,
            "attempt_committed" if ours else "attempt_lost",
            message,
            **known,
            counts=commit.counts,
            seconds=round(time.monotonic() - began, 3),
        )
        return commit

    def _process(self, shard: Shard, oom_retries: int, attempt: str) -> Commit:
        """Return the shard's commit, which the store has or this attempt makes."""
        config = self.task.config
        commit = shard_files.read_commit(
            config.store, self.task.measure_id, shard.id, shard.generation
        )
        if commit is not None:
            return commit  # by another run, or by an attempt whose answer was lost
        counts = dict.fromkeys(COUNTS, 0)
        summary = Summary(self.task.series, self.task.tagged)
        pairs = neurons.PairSummary(self.task.neuron_layers)
        documents = (d for piece in shard.slices for d in reading.read(piece, config.read_options))
        origin = {"measure": self.task.measure_id, "shard": shard.id, "attempt": attempt}
        with _scratch_folder(config) as folder:
            with records.ShardFiles(
                folder,
                self.task.series,
                self.task.neuron_layers,
                config.offsets,
                origin,
                self.task.tagged,
            ) as files:
                seconds = self._measure_and_write(
                    documents, oom_retries, files, summary, pairs, counts
                )
                files.summary.write_each(summary.tables())
                if files.pairs is not None:
                    files.pairs.write_each(pairs.tables())
            made_by = {"device": self.task.device, **model.VERSIONS}
            return shard_files.publish(
                config.store,
                self.task.measure_id,
                shard,
                attempt,
                files.tables(),
                counts,
                round(seconds, 3),
                made_by,
            )

    def _measure_and_write(
        self,
        documents: Iterator[Document],
        oom_retries: int,
        files: records.ShardFiles,
        summary: Summary,
        pairs: neurons.PairSummary,
        counts: dict[str, int],
    ) -> float:
        """Measure and write all ``documents``; return the seconds that the model was held.

        Raises ``ShardError`` where no token is measured and ``NONE_MEASURED`` documents or more
        failed.
        """
        behind: deque[Future[list[str]]] = deque()
        num_at_fault, first = 0, ""

        def finish() -> None:
            nonlocal num_at_fault, first
            problems = behind.popleft().result()
            num_at_fault += len(problems)
            first = first or "".join(problems[:1])

        with (
            self.feed.chunks(documents, oom_retries) as chunks,
            ThreadPoolExecutor(1, "afn-write") as writer,
        ):
            with self._turn():
                began = waiting = time.monotonic()
                for chunk in chunks:
                    self.progress.wait_s += time.monotonic() - waiting
                    self.progress.read_s += chunk.read_s
                    chunk, values = self._measure_chunk(chunk, oom_retries)
                    behind.append(
                        writer.submit(self._record, chunk, values, files, summary, pairs, counts)
                    )
                    if len(behind) > WRITTEN_BEHIND:
                        finish()
                    waiting = time.monotonic()
                seconds = time.monotonic() - began
            while behind:
                finish()
        if num_at_fault >= NONE_MEASURED and not counts["tokens"]:
            raise ShardError(
                f"none of {num_at_fault:,} documents could be measured, so the fault may be none "
                f"of theirs: {first}"
            )
        return seconds

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the model, which one shard at a time may use."""
        while not self._device.acquire(timeout=0.2):
            self._check_stopped()
        try:
            yield
        finally:
            self._device.release()

    def mean_squares(self, texts: list[str]) -> npt.NDArray[np.float64]:
        """Mean square of each hidden dimension over tokens: float64 [n_layers, hidden_size].

        The tokens are those of ``texts``, special ones apart.
        """

        def squares(prepared: Prepared) -> npt.NDArray[np.float64]:
            total, n = np.zeros((len(self.task.layers), self.model.files.hidden_size)), 0
            for batch in prepared.batches:
                states = self.model.measure(batch.ids, batch.lengths, (States(),))[:, batch.kept]
                states = states[:, prepared.encoded.flags[batch.rows] & SPECIAL == 0]
                total += (states.astype(np.float64) ** 2).sum(axis=1)
                n += states.shape[1]
            return total / max(1, n)

        replaced = [False] * len(texts)
        return self._without_culprits(
            texts, replaced, 0, self.preparer.prepare(texts, replaced), squares
        )[1]

    def _check_stopped(self) -> None:
        """Raise ``Interrupted`` after ``stop``."""
        if self._stopped.is_set():
            raise Interrupted("stopped; the same command resumes")

    def measure(self, texts: list[str], replaced: list[bool]) -> Measured:
        """Measure all series of every token of ``texts``, which are encoded and batched together.

        A text that fails has no tokens; ``encoded.problems`` holds the reason. ``replaced`` marks
        texts in which U+FFFD stands for invalid UTF-8.
        """
        prepared = self.preparer.prepare(texts, replaced)
        prepared, values = self._without_culprits(texts, replaced, 0, prepared, self.values)
        return Measured(prepared.encoded, values, len(self.task.layers))

    def _measure_chunk(self, chunk: Chunk, oom_retries: int) -> tuple[Chunk, Values]:
        """``chunk`` and its ``values``, without the documents that the model cannot process."""
        texts, replaced = (
            [d.text for d in chunk.documents],
            [d.num_replaced > 0 for d in chunk.documents],
        )
        prepared, values = self._without_culprits(
            texts, replaced, oom_retries, chunk.prepared, self.values
        )
        return replace(chunk, prepared=prepared), values

    def _without_culprits(
        self,
        texts: list[str],
        replaced: list[bool],
        oom_retries: int,
        prepared: Prepared,
        run: Callable[[Prepared], Result],
    ) -> tuple[Prepared, Result]:
        """Return ``prepared`` and ``run(prepared)``, with failing texts packed as empty ones.

        A text is at fault where it fails alone while the model still measures a probe. An error
        that occurs for every text, or only for several together, is raised unchanged.
        """
        measured = self.progress.measured
        try:
            return prepared, run(prepared)
        except Exception as error:
            if not _may_blame(error) or not self._takes_probe():
                raise
            refused = prepared.encoded.problems
            suspects = [i for i, n in enumerate(np.diff(prepared.encoded.bounds).tolist()) if n]

            def attempt(some: list[int]) -> None:
                self.progress.measured = measured  # these texts are measured again later
                run(
                    self.preparer.prepare(
                        [texts[i] for i in some], [replaced[i] for i in some], oom_retries
                    )
                )

            found = culprits.find_culprits(attempt, suspects, _may_blame)
            if not found or not self._takes_probe():
                raise
        self.progress.measured = measured
        why = {
            i: f"the model cannot take it: {culprits.first_line(error)}"
            for i, error in found.items()
        }
        prepared = self.preparer.prepare(texts, replaced, oom_retries, refused | why)
        return prepared, run(prepared)

    def _takes_probe(self) -> bool:
        """Whether the model still measures a probe of the self-check."""
        ids = np.asarray(self._probe, np.int64)
        try:
            return bool(np.isfinite(self.model.measure(ids, [len(ids)], self.signals)).all())
        except Exception as error:
            if not _may_blame(error):
                raise
            return False

    def values(self, prepared: Prepared) -> Values:
        """Measured values, rounded: float32 [n_measured, n_tokens].

        The rows are the series, then for each neuron layer the neurons' numbers and their values.
        Raises ``OutOfMemory`` where a batch does not fit.
        """
        try:
            return self._values(prepared)
        except Exception as error:
            if model.is_out_of_memory(error):
                raise OutOfMemory(
                    f"a batch did not fit into the memory of {self.task.device}: {error}"
                ) from error
            raise

    def seconds(self, prepared: Prepared, signals: Sequence[Signal]) -> float:
        """Seconds that the forward passes of ``prepared`` take with ``signals``."""
        began = time.monotonic()
        for batch in prepared.batches:
            self.model.measure(batch.ids, batch.lengths, signals)
        return time.monotonic() - began

    def _values(self, prepared: Prepared) -> Values:
        began = time.monotonic()
        self.progress.tokenize_s += prepared.seconds
        result = np.full((self._num_rows, len(prepared.encoded.token_ids)), np.nan, np.float32)
        under_way: deque[tuple[windows.TokenBatch, model.Pending]] = deque()
        num_texts, num_tokens = len(prepared.n_windows), len(prepared.encoded.token_ids)
        if not num_tokens:
            self.progress.measured += num_texts

        def take() -> None:
            batch, pending = under_way.popleft()
            result[:, batch.rows] = pending.result()[:, batch.kept]
            self.progress.tokens += len(batch.rows)
            self.progress.measured += num_texts * len(batch.rows) / num_tokens

        for batch in prepared.batches:
            self._check_stopped()
            under_way.append((batch, self.model.submit(batch.ids, batch.lengths, self.signals)))
            self.progress.forward_tokens += batch.forward_tokens
            if self.task.device == "cpu" or len(under_way) > SUBMITTED:
                take()
        while under_way:
            take()
        self.progress.model_s += time.monotonic() - began
        for row in result:  # one row at a time: rounding needs several times a row's memory
            row[:] = round_strengths(row)
        return result

    def _record(
        self,
        read: Chunk,
        values: Values,
        files: records.ShardFiles,
        summary: Summary,
        pairs: neurons.PairSummary,
        counts: dict[str, int],
    ) -> list[str]:
        """Write the rows of one chunk and add it to the summaries.

        Returns the reasons of the documents that were read and could not be measured.
        """
        began = time.monotonic()
        first_doc = counts["documents"]
        chunk, prepared, encoded = read.documents, read.prepared, read.prepared.encoded
        n_tokens = np.diff(encoded.bounds)
        values, tops = np.split(values, [len(self.task.series)])
        bad = np.zeros(len(chunk), bool)
        bad[encoded.docs[~(values >= 0).all(axis=0) | np.isinf(values).any(axis=0)]] = True
        bad[encoded.docs[~(np.abs(tops) < neurons.LIMIT).all(axis=0)]] = True
        problems = encoded.problems | {
            i: self._why_bad(values[:, encoded.docs == i]) for i in np.flatnonzero(bad).tolist()
        }
        status = [
            f"quarantined: {d.problem or problems[i]}"
            if d.problem is not None or i in problems
            else "ok"
            if n_tokens[i]
            else "empty"
            for i, d in enumerate(chunk)
        ]
        losses = [_loss(d, rejected=i in problems) for i, d in enumerate(chunk)]
        keep = ~bad[encoded.docs]
        n_tokens = np.where(bad, 0, n_tokens)
        by_series = dict(zip(self.task.series, values, strict=True))
        docs, flags = encoded.docs + np.int32(first_doc), encoded.flags
        tags = pa.nulls(len(flags), pa.string())
        if self.task.tagged:
            tags = pa.array(
                encode.find_tags(encoded, [d.text for d in chunk], [d.tags for d in chunk]),
                pa.string(),
            )
        table = records.make_table(
            {
                "doc": docs,
                "position": encoded.positions,
                "token_id": encoded.token_ids,
                "flags": flags,
                "surface": prepared.surfaces,
                "tag": tags,
                "start": encoded.start,
                "end": encoded.end,
                **{s.name: x for s, x in by_series.items()},
            },
            files.tokens.schema,
        )
        if bad.any():
            table = table.filter(pa.array(keep))
        files.tokens.write(table)
        values_of = {s: x[keep] for s, x in by_series.items()}
        summary.add(
            docs[keep], encoded.token_ids[keep], flags[keep], values_of, tags.filter(pa.array(keep))
        )
        if files.neurons is not None:
            which, lists = self._neurons(tops, by_series, docs, encoded.positions, flags, keep)
            files.neurons.write(lists)
            pairs.add(encoded.token_ids[which], flags[which], lists)
        files.documents.write(
            records.make_table(
                {
                    "doc": np.arange(first_doc, first_doc + len(chunk)),
                    "doc_id": [d.doc_id for d in chunk],
                    "source": [d.source for d in chunk],
                    "offset": [d.offset for d in chunk],
                    "n_tokens": n_tokens,
                    "n_windows": prepared.n_windows,
                    "n_chars": [len(d.text) for d in chunk],
                    "n_replaced": [d.num_replaced for d in chunk],
                    "lost_bytes": [num_bytes for num_bytes, _ in losses],
                    "lost_documents": [num_documents for _, num_documents in losses],
                    "text_sha256": [
                        None if d.problem is not None else hashlib.sha256(d.text.encode()).digest()
                        for d in chunk
                    ],
                    "status": status,
                    **{
                        f"mean_{s.name}": _document_means(encoded, flags, x, n_tokens)
                        for s, x in by_series.items()
                    },
                },
                files.documents.schema,
            )
        )
        for name, value in (
            ("documents", len(chunk)),
            ("empty", status.count("empty")),
            ("tokens", int(keep.sum())),
            ("quarantined", sum(s.startswith("quarantined") for s in status)),
            ("special", int((flags[keep] & SPECIAL).sum())),
            ("windows", int(prepared.n_windows.sum())),
            ("forward_tokens", sum(b.forward_tokens for b in prepared.batches)),
            ("chars", sum(len(d.text) for d in chunk)),
            ("replaced", sum(d.num_replaced for d in chunk)),
            ("lost_bytes", sum(num_bytes for num_bytes, _ in losses)),
            ("lost_documents", sum(num_documents or 0 for _, num_documents in losses)),
            ("lost_unknown", sum(num_documents is None for _, num_documents in losses)),
        ):
            counts[name] += value
        with self._counting:  # the next shard may write at the same time
            self.progress.documents += len(chunk)
            self.progress.write_s += time.monotonic() - began
        return list(problems.values())

    def _neurons(
        self,
        tops: Values,
        by_series: Mapping[Series, Values],
        docs: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        flags: npt.NDArray[np.uint8],
        keep: npt.NDArray[np.bool_],
    ) -> tuple[npt.NDArray[np.int64], pa.Table]:
        """Rows with recorded neurons, and their table as in ``token_neurons_schema``."""
        layers, above = self.task.neuron_layers, self.task.neurons_above
        normal = (flags & SPECIAL) == 0
        high = (
            [by_series[Series(STRENGTH, k)] >= q3 for k, q3 in zip(layers, above, strict=True)]
            if above
            else []
        )
        which = np.flatnonzero(keep & (normal & np.any(high, axis=0)) if above else keep)
        lists = {
            neurons_column(k): neurons.lists_of(part[:, which], high[at][which] if above else None)
            for at, (k, part) in enumerate(zip(layers, np.split(tops, len(layers)), strict=True))
        }
        columns = {"doc": docs[which], "position": positions[which], **lists}
        return which, records.make_table(columns, token_neurons_schema(layers))

    def _why_bad(self, values: Values) -> str:
        """Reason why the values of a document, [n_series, n_tokens], are refused."""
        wrong = np.flatnonzero((~(values >= 0) | np.isinf(values)).any(axis=1))
        if not len(wrong):
            return (
                f"the model gave a neuron of {neurons.LIMIT:,.0f} or more, or one that is not "
                "finite"
            )
        at = wrong[0]
        what = "negative" if (values[at] < 0).any() else f"not finite in {self.task.dtype}"
        return f"the model gave a {self.task.series[at].signal} that is {what}"


def _may_blame(error: BaseException) -> bool:
    """Whether a text may have caused ``error`` in a forward pass."""
    return (
        culprits.is_of_input(error)
        and not model.is_out_of_memory(error)
        and not model.is_device_fault(error)
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens of some texts with their measured values, rounded: float32 [n_series, n_tokens]."""

    encoded: encode.Encoded
    values: Values
    n_layers: int

    @property
    def strengths(self) -> Values:
        """The values of strength, [n_layers, n_tokens]; strength is the first signal."""
        return self.values[: self.n_layers]


def _probes(encoder: encode.TextEncoder, window: int) -> list[list[int]]:
    """Token sequences of the self-check, each with its template.

    The last one is as long as a window, or nearly.
    """
    width = min(window, LONG_PROBE_TOKENS)
    problems = encoder.encode(PROBES).problems
    able = [text for i, text in enumerate(PROBES) if i not in problems]
    encoded = encoder.encode([*able, " ".join(able * (1 + width // 16))])
    suffix = list(encoder.template.suffix)
    found = [encoded.token_ids[a:b].tolist() for a, b in itertools.pairwise(encoded.bounds)]
    return [
        ids if len(ids) <= width else ids[: width - len(suffix)] + suffix
        for ids in found
        if len(ids) > 2
    ]


def _loss(document: Document, *, rejected: bool) -> tuple[int, int | None]:
    """Bytes and documents of the file that are lost with ``document``.

    ``rejected``: the text was read but not measured. None documents: their number is unknown.
    """
    if rejected:
        return max(1, len(document.text.encode())), 1
    if document.problem is None and not document.lost_bytes:
        return 0, 0
    return document.lost_bytes, document.lost_documents


def _document_means(
    encoded: encode.Encoded,
    flags: npt.NDArray[np.uint8],
    values: npt.NDArray[np.float32],
    n_tokens: npt.NDArray[np.int64],
) -> pa.Array:
    """Mean value of each document's tokens, special tokens apart; null where there are none."""
    counted = (flags & SPECIAL) == 0
    weights = counted.astype(np.float64)
    n = np.bincount(encoded.docs, weights, len(n_tokens))
    total = np.bincount(
        encoded.docs, np.where(counted, values, 0).astype(np.float64), len(n_tokens)
    )
    none = (n == 0) | (n_tokens == 0)
    return pa.array((total / np.where(none, 1, n)).astype(np.float32), mask=none)


@contextmanager
def _scratch_folder(config: RunConfig) -> Iterator[Path]:
    """A folder for one attempt's unfinished files, locked while its process lives."""
    root = disk.scratch_folder(config.scratch)
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=root))
            )
            lock = stack.enter_context((folder / "new-lock").open("w"))
            if disk.lock(lock):
                Path(lock.name).rename(folder / "lock")  # visible only once it is held
        except OSError as error:
            if error.errno in disk.FULL:
                raise Interrupted(
                    f"no space left in the scratch folder {root}; make room, or give another "
                    "--scratch or TMPDIR, and "
                    "run the same command again: it resumes"
                ) from error
            raise ConfigError(f"scratch folder {root}: {error.strerror}") from error
        yield folder


def sweep_scratch(config: RunConfig) -> None:
    """Remove scratch folders that killed workers left on this machine: those with a free lock."""
    for lock in disk.scratch_folder(config.scratch).glob(f"{SCRATCH_PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock.open() as file:  # held, gone, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
