"""Measure texts with a loaded model: encode, pack into batches, forward passes, rounded values."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from afn_ray import model
from afn_ray.config import RunConfig
from afn_ray.errors import Interrupted, ModelError
from afn_ray.mean_texts import from_text
from afn_ray.model.signals import Signal, States, find_signals
from afn_ray.model.type_sums import Chooser
from afn_ray.runs.flow import Flow, Turns
from afn_ray.runs.progress import Counters
from afn_ray.runs.task import Task
from afn_ray.runs.values import Float32s, Values
from afn_ray.schema import SPECIAL
from afn_ray.tokens import culprits, encode
from afn_ray.tokens.feed import Chunk, Chunks, Prepared, Preparer, Recipe
from afn_ray.tokens.windows import TokenBatch

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
SINK_MEDIANS = 10.0
"""Strength over which a token is no part of a mean state, in medians of its layer."""
LONG_PROBE_TOKENS = 640
"""Length of the longest text in the self-check, in tokens.

It exceeds most attention windows and is still measured quickly.
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens of some texts with their measured values, rounded: float32 [n_series, n_tokens]."""

    encoded: encode.Encoded
    values: Float32s
    n_layers: int

    @property
    def strengths(self) -> Float32s:
        """The values of strength, [n_layers, n_tokens]; strength is the first signal."""
        return self.values[: self.n_layers]


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts that are measured together."""

    texts: Sequence[str]
    replaced: Sequence[bool]  # texts in which U+FFFD stands for invalid UTF-8
    oom_retries: int = 0  # how often the token budget is halved

    def some(self, which: Sequence[int]) -> _Texts:
        """The texts numbered ``which``."""
        texts = [self.texts[i] for i in which]
        return _Texts(texts, [self.replaced[i] for i in which], self.oom_retries)


def window_tokens(config: RunConfig, files: model.ModelFiles) -> int:
    """Tokens in a window: the config's value, else the model's context up to the default."""
    return config.window_tokens or min(files.context_tokens, model.DEFAULT_WINDOW_TOKENS)


def find_model_files(config: RunConfig) -> model.ModelFiles:
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


class Measurer:
    """A loaded model and tokenizer that measure texts.

    Threads may measure the chunks of a shard each, by ``flow``; otherwise one thread measures.
    """

    def __init__(self, task: Task) -> None:
        """Load the model of ``task``. Raises ``ModelError`` for another one than was planned."""
        self.task = task
        self.counters = Counters()
        config, measure = task.config, task.measure
        files = find_model_files(config)
        tokenizer, identity = model.load_identified(files)
        _check_identity(task, identity)
        window = window_tokens(config, files)
        batch_tokens = config.batch_tokens or BATCH_TOKENS[task.device]
        self.model = model.Model(
            files, measure.layers, measure.dtype, task.device, batch_tokens, measure.outliers
        )
        if measure.means:
            self.model.subtract([from_text(text, files.hidden_size) for text in measure.means])
        encoder = encode.TextEncoder(tokenizer, self.model.num_embeddings)
        self.signals, _ = find_signals(config.signals, config.top_neurons)
        needs = frozenset(need for signal in self.signals for need in signal.needs)
        probes = _probes(encoder, window)
        self._probe = min(probes, key=len)
        self._chooser: Chooser | None = None
        if measure.mean_types:
            self._chooser = Chooser(measure.mean_types, self.model.num_embeddings)
        model.prepare(self.model, probes, needs)
        self.counters.why_padded = self.model.why_padded or ""
        self.counters.why_slow = self.model.why_slow
        recipe = Recipe(
            tokenizer.to_str(),
            window,
            config.overlap_tokens,
            batch_tokens,
            self.model.causal,
            self.model.packed,
            self.model.num_embeddings,
            measure.detected,
        )
        self.preparer = Preparer(recipe, encoder)
        self._stopped = threading.Event()
        self.turns = Turns(
            self._submit,
            (len(measure.series), measure.top_neurons * len(measure.neuron_layers)),
            task.device,
            self.counters,
            self.check_stopped,
        )

    def _submit(self, batch: TokenBatch) -> model.Pending:
        """Start the forward pass of ``batch``."""
        if self._chooser is None:
            return self.model.submit(batch.ids, batch.lengths, self.signals)
        chosen = self._chooser.choose(batch.ids, batch.kept)
        return self.model.submit(batch.ids, batch.lengths, self.signals, chosen=chosen)

    def stop(self) -> None:
        """End the measurement in process soon, with ``Interrupted``."""
        self._stopped.set()

    def check_stopped(self) -> None:
        """Raise ``Interrupted`` after ``stop``."""
        if self._stopped.is_set():
            raise Interrupted("stopped; the same command resumes")

    def measure(self, texts: list[str], replaced: list[bool]) -> Measured:
        """Measure all series of every token of ``texts``, which are encoded and batched together.

        A text that fails has no tokens; ``encoded.problems`` holds the reason. ``replaced`` marks
        texts in which U+FFFD stands for invalid UTF-8.
        """
        given = _Texts(texts, replaced)
        prepared, values = self._without_culprits(given, self._prepare(given), self.values)
        return Measured(prepared.encoded, values.series, len(self.task.measure.layers))

    def flow(self, chunks: Chunks, oom_retries: int) -> Flow:
        """The way of a shard's ``chunks`` through the model.

        Its chunks are without the documents that the model cannot process.
        """

        def alone(chunk: Chunk, error: Exception | None) -> tuple[Chunk, Values]:
            return self._measure_chunk(chunk, oom_retries, error)

        return Flow(self.turns, chunks, alone)

    def _measure_chunk(
        self, chunk: Chunk, oom_retries: int, error: Exception | None
    ) -> tuple[Chunk, Values]:
        """``chunk`` and its values, without the documents that the model cannot process.

        ``error`` is what the chunk has raised already.
        """
        texts = [d.text for d in chunk.documents]
        replaced = [d.num_replaced > 0 for d in chunk.documents]
        given = _Texts(texts, replaced, oom_retries)
        prepared, values = self._without_culprits(given, chunk.prepared, self.values, error)
        return replace(chunk, prepared=prepared), values

    def mean_squares(self, texts: list[str]) -> npt.NDArray[np.float64]:
        """Mean square of each hidden dimension over tokens: float64 [n_layers, hidden_size].

        The tokens are those of ``texts``, special ones apart.
        """

        def squares(prepared: Prepared, counts: bool) -> npt.NDArray[np.float64]:
            total = np.zeros((len(self.task.measure.layers), self.model.files.hidden_size))
            n = 0
            for states in self._states(prepared):
                total += (states.astype(np.float64) ** 2).sum(axis=1)
                n += states.shape[1]
            return total / max(1, n)

        given = _Texts(texts, [False] * len(texts))
        _, found = self._without_culprits(given, self._prepare(given), squares)
        return found

    def mean_states(self, texts: list[str]) -> npt.NDArray[np.float64]:
        """Mean hidden state over tokens: float64 [n_layers, hidden_size].

        The tokens are those of ``texts``, without special ones and sinks: at each layer those over
        ``SINK_MEDIANS`` times the median strength, which alone would decide the mean.
        """

        def mean(prepared: Prepared, counts: bool) -> npt.NDArray[np.float64]:
            shape = (len(self.task.measure.layers), self.model.files.hidden_size)
            total = np.zeros(shape)
            n = np.zeros((shape[0], 1))
            norms = [np.linalg.norm(states, axis=2) for states in self._states(prepared)]
            if not sum(found.shape[1] for found in norms):
                return total
            most = SINK_MEDIANS * np.median(np.concatenate(norms, axis=1), axis=1)
            for states in self._states(prepared):
                is_kept = np.linalg.norm(states, axis=2) <= most[:, None]
                total += (states.astype(np.float64) * is_kept[:, :, None]).sum(axis=1)
                n += is_kept.sum(axis=1)[:, None]
            return np.asarray(total / np.maximum(1, n))

        given = _Texts(texts, [False] * len(texts))
        _, found = self._without_culprits(given, self._prepare(given), mean)
        return found

    def _states(self, prepared: Prepared) -> Iterator[Float32s]:
        """Hidden states of each batch's tokens without special ones, [n_layers, n, hidden_size]."""
        for batch in prepared.batches:
            states = self.model.measure(batch.ids, batch.lengths, (States(),))[:, batch.kept]
            yield states[:, prepared.encoded.flags[batch.rows] & SPECIAL == 0]

    def values(self, prepared: Prepared, counts: bool = True) -> Values:
        """Measured values of all tokens. Raises ``OutOfMemory`` where a batch does not fit.

        ``counts``: whether progress counts the texts as measured.
        """
        return self.turns.measure(Chunk([], prepared, 0.0), counts=counts)

    def seconds(self, prepared: Prepared, signals: Sequence[Signal]) -> float:
        """Seconds that the forward passes of ``prepared`` take with ``signals``."""
        began = time.monotonic()
        for batch in prepared.batches:
            self.model.measure(batch.ids, batch.lengths, signals)
        return time.monotonic() - began

    def _prepare(self, given: _Texts, refused: Mapping[int, str] | None = None) -> Prepared:
        """``given`` encoded and packed; those in ``refused`` as empty texts, with the reason."""
        return self.preparer.prepare(given.texts, given.replaced, given.oom_retries, refused)

    def _without_culprits(
        self,
        given: _Texts,
        prepared: Prepared,
        run: Callable[[Prepared, bool], Result],
        error: Exception | None = None,
    ) -> tuple[Prepared, Result]:
        """Return ``prepared`` and ``run(prepared)``, with failing texts packed as empty ones.

        A text is at fault where it fails alone while the model still measures a probe. An error
        that occurs for every text, or only for several together, is raised unchanged. ``error`` is
        what ``run(prepared)`` has raised already. The second argument of ``run`` is whether
        progress counts the texts; they are not counted while they are tried.
        """
        if error is None:
            try:
                return prepared, run(prepared, True)
            except Exception as raised:
                if not _may_blame(raised):
                    raise  # a local variable would keep it, and all that it refers to
                error = raised
        if not _may_blame(error) or not self._takes_probe():
            raise error
        n_tokens = np.diff(prepared.encoded.bounds).tolist()
        suspects = [i for i, n in enumerate(n_tokens) if n]

        def run_some(which: Sequence[int]) -> object:
            return run(self._prepare(given.some(which)), False)

        found = culprits.find_culprits(run_some, suspects, _may_blame)
        if not found or not self._takes_probe():
            raise error
        refused = dict(prepared.encoded.problems)
        for i, reason in found.items():
            refused[i] = f"the model cannot take it: {culprits.first_line(reason)}"
        prepared = self._prepare(given, refused)
        return prepared, run(prepared, True)

    def _takes_probe(self) -> bool:
        """True if the model still measures a probe of the self-check."""
        ids = np.asarray(self._probe, np.int64)
        try:
            values = self.model.measure(ids, [len(ids)], self.signals)
        except Exception as error:
            if not _may_blame(error):
                raise
            return False
        return bool(np.isfinite(values).all())


def _check_identity(task: Task, found: dict[str, str]) -> None:
    """Raise ``ModelError`` unless ``found`` is the identity of the model of ``task``."""
    planned = dict(task.measure.model)
    if found == planned:
        return
    differing = sorted(k for k in {*found, *planned} if found.get(k) != planned.get(k))
    raise ModelError(
        f"model {task.config.model} differs on this worker from the one planned: "
        f"{', '.join(differing)}"
    )


def _may_blame(error: BaseException) -> bool:
    """True if a text may have caused ``error`` in a forward pass."""
    return (
        culprits.is_of_input(error)
        and not model.is_out_of_memory(error)
        and not model.is_device_fault(error)
    )


def _probes(encoder: encode.TextEncoder, window: int) -> list[list[int]]:
    """Token sequences of the self-check, each with its template.

    The last one is as long as a window, or nearly.
    """
    width = min(window, LONG_PROBE_TOKENS)
    problems = encoder.encode(PROBES).problems
    able = [text for i, text in enumerate(PROBES) if i not in problems]
    encoded = encoder.encode([*able, " ".join(able * (1 + width // 16))])
    suffix = list(encoder.template.suffix)
    probes: list[list[int]] = []
    for begin, end in itertools.pairwise(encoded.bounds):
        ids = encoded.token_ids[begin:end].tolist()
        if len(ids) > width:
            ids = ids[: width - len(suffix)] + suffix
        if len(ids) > 2:
            probes.append(ids)
    return probes
