"""Decide which precision is safe: compare half precision with float32 on a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from afn_ray.errors import ModelError, OutOfMemory, StoreError
from afn_ray.schema import SPECIAL
from afn_ray.text import count

if TYPE_CHECKING:  # torch is loaded where a calibration runs, not where its decision is read
    from afn_ray.runs.measurer import Measurer
    from afn_ray.runs.task import Task
    from afn_ray.runs.values import Float32s

CALIBRATION_TOKENS = 16_384
"""Tokens that the calibration measures; 0.2 % of them is 33."""
LEAST_TOKENS = 1_000
"""Smallest usable sample, in tokens: a smaller one cannot show a change of one label in 500."""
CALIBRATION_S = 60.0
"""Longest time that the calibration measures in float32, in seconds; it then uses the tokens so
far.
"""
MAX_FLIPS = 0.002
"""Share of changed HIGH labels from which on a precision is not safe."""
MAX_MEDIAN_ERROR = 5e-4
"""Median relative error of strengths from which on a precision is not safe."""
FLOAT16_RANGE = 65504 / 4
"""Largest safe magnitude of a float16 product, a quarter of its range.

Other texts than the calibration's may have larger products.
"""


@dataclass(frozen=True, slots=True)
class Trial:
    """One half precision compared with float32 on the calibration's
    tokens, special tokens apart.
    """

    dtype: str
    safe: bool
    why: str  # why it is not safe; empty when it is safe
    # layer -> share of tokens whose HIGH label changes
    flips: dict[str, float] = field(default_factory=dict)
    # layer -> median relative error of strengths
    median_error: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0  # largest magnitude of a product


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtype of a run's products, and the evidence for it."""

    dtype: str
    asked: str
    device: str  # device of the calibration
    why: str
    n_tokens: int  # tokens of the calibration; 0 where no calibration ran
    trials: tuple[Trial, ...] = ()

    @property
    def against(self) -> str:
        """Reason why the calibration finds the chosen precision unsafe;
        "" unless the config asked for it.
        """
        return next((t.why for t in self.trials if t.dtype == self.dtype), "")

    def is_safe_at(self, layers: Sequence[int]) -> bool:
        """True if a trial found the dtype safe at all ``layers``."""
        asked = {str(layer) for layer in layers}
        for trial in self.trials:
            if trial.dtype == self.dtype and trial.safe and asked <= {*trial.flips}:
                return True
        return False

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def from_json(value: Mapping[str, Any]) -> Precision:
    """The inverse of ``Precision.to_json``; a schema version beside it is left out.

    Raises ``StoreError`` for any other value.
    """
    names = value.keys() - {"schema_version"}
    try:
        trials = tuple(Trial(**trial) for trial in value["trials"])
        return Precision(**{name: value[name] for name in names} | {"trials": trials})
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"the store's record of its precision is damaged, or another version's: {error}"
        ) from error


def describe(precision: Precision) -> str:
    """One line for people: the dtype, and the calibration's figures for it."""
    text = f"matrix products in {precision.dtype} on {precision.device}: {precision.why}"
    for trial in precision.trials:
        if trial.dtype == precision.dtype and trial.flips:
            text += (
                f" (against float32 on {count(precision.n_tokens, 'token')} "
                f"{max(trial.flips.values()):.2%} of the labels change, median relative error "
                f"{max(trial.median_error.values()):.1e})"
            )
    return text


def candidates(asked: str, device: str) -> tuple[str, ...]:
    """Half precisions to try on ``device``, the best first.

    On a GPU float16 is as fast as bfloat16 and ten times closer to float32.
    """
    if asked != "auto":
        return () if asked == "float32" else (asked,)
    from afn_ray import model

    order = ("float16", "bfloat16") if device == "cuda" else ("bfloat16",)
    return tuple(d for d in order if model.has_fast_products(d, device))


def decide(task: Task, texts: Sequence[str]) -> Precision:
    """Measure ``texts`` in float32 and in half precision; ``auto`` takes the first safe one.

    A precision is safe if less than ``MAX_FLIPS`` of the tokens change their HIGH label at any
    layer, each against the Q3 of its own precision, and the median relative error is under
    ``MAX_MEDIAN_ERROR``. A float16 product must also stay within ``FLOAT16_RANGE``. A precision
    that the config names is taken in any case, with the same figures. Errors of memory and of the
    device are raised: they say nothing about a precision.
    """
    from afn_ray import model
    from afn_ray.runs.worker import with_signals

    task = with_signals(task)
    asked = task.config.dtype
    names = candidates(asked, task.device)
    if not names:
        why = "asked for" if asked == "float32" else "half-precision products are no faster"
        return Precision("float32", asked, task.device, why, 0)
    chunks, reference = _reference(_in_dtype(task, "float32"), texts)
    model.free_memory()
    n = reference.shape[1]
    if n < LEAST_TOKENS:
        why = f"the sample has {count(n, 'token')}, too few to decide"
        return Precision("float32" if asked == "auto" else asked, asked, task.device, why, n)
    trials: list[Trial] = []
    for name in names:
        trials.append(_try(_in_dtype(task, name), chunks, reference))
        model.free_memory()  # for the next model, here or in a worker
        if trials[-1].safe:
            break
    if asked != "auto":
        slow = (
            "" if model.has_fast_products(asked, task.device) else ", though no faster than float32"
        )
        return Precision(asked, asked, task.device, f"asked for{slow}", n, tuple(trials))
    if trials[-1].safe:
        return Precision(
            trials[-1].dtype, asked, task.device, "safe on the sample", n, tuple(trials)
        )
    why = "; ".join(f"{t.dtype} is not safe: {t.why}" for t in trials)
    return Precision("float32", asked, task.device, why, n, tuple(trials))


def _in_dtype(task: Task, dtype: str) -> Task:
    return replace(task, measure=replace(task.measure, dtype=dtype))


def _groups(texts: Sequence[str]) -> list[list[str]]:
    """The beginnings of ``texts`` in groups of about a quarter of the calibration.

    The calibration thus ends near its intended size.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for whole in texts:
        text = whole[:CALIBRATION_TOKENS]
        groups[-1].append(text)
        size += len(text)
        if size >= CALIBRATION_TOKENS:  # four characters are about one token
            groups.append([])
            size = 0
    return [g for g in groups if g]


def _reference(task: Task, texts: Sequence[str]) -> tuple[list[list[str]], Float32s]:
    """Chunks of ``texts``, as many as the calibration takes, and their strengths.

    Strengths are [n_layers, n_tokens], without special tokens.
    """
    from afn_ray.runs.measurer import Measurer

    num_layers = len(task.measure.layers)
    found = [np.empty((num_layers, 0), np.float32)]
    chunks: list[list[str]] = []
    n = 0
    measurer = Measurer(task)
    for chunk in _groups(texts):
        chunks.append(chunk)
        found.append(_strengths(measurer, chunk))
        n += found[-1].shape[1]
        if n >= CALIBRATION_TOKENS or measurer.counters.model_s > CALIBRATION_S:
            break
    return chunks, np.concatenate(found, axis=1)


def _strengths(measurer: Measurer, chunk: list[str]) -> Float32s:
    """Strengths of the tokens of ``chunk`` without special ones, [n_layers, n_tokens].

    Raises ``OutOfMemory`` where a batch does not fit.
    """
    try:
        measured = measurer.measure(chunk, [False] * len(chunk))
    except OutOfMemory as error:
        dtype = measurer.task.measure.dtype
        raise OutOfMemory(
            f"the calibration in {dtype} stopped: {error}. Give a smaller --batch-tokens"
        ) from error
    return measured.strengths[:, (measured.encoded.flags & SPECIAL) == 0]


def _try(task: Task, chunks: Sequence[list[str]], reference: Float32s) -> Trial:
    """Measure ``chunks`` in the task's dtype and compare the strengths with ``reference``.

    The caller frees the memory: in this function the model is still in use.
    """
    from afn_ray import model
    from afn_ray.runs.measurer import Measurer

    try:
        measurer = Measurer(task)
        with measurer.model.watched() as peak:
            found = [_strengths(measurer, chunk) for chunk in chunks]
    # RuntimeError: an operator without this dtype
    except (ModelError, RuntimeError) as error:
        if model.is_out_of_memory(error.__cause__ or error) or model.is_device_fault(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Trial(task.measure.dtype, False, lines[0])
    return _compared(task, np.concatenate(found, axis=1), reference, peak())


def _compared(task: Task, got: Float32s, reference: Float32s, largest: float) -> Trial:
    """The trial whose strengths are ``got`` and whose largest product is ``largest``."""
    if got.shape != reference.shape:
        return Trial(
            task.measure.dtype, False, "it cannot take a text that float32 takes", peak=largest
        )
    if not np.isfinite(got).all():
        return Trial(
            task.measure.dtype, False, "it gives strengths that are not finite", peak=largest
        )
    flips, errors = {}, {}
    for layer, a, b in zip(task.measure.layers, reference, got, strict=True):
        highs = [v >= np.quantile(v, 0.75, method="inverted_cdf") for v in (a, b)]
        flips[str(layer)] = float(np.mean(highs[0] != highs[1]))
        relative = np.abs(b - a) / np.maximum(np.abs(a), 1e-30)
        errors[str(layer)] = float(np.median(relative))
    worst = max(flips.values())
    median = max(errors.values())
    against = []
    if task.measure.dtype == "float16" and not largest <= FLOAT16_RANGE:
        against.append(f"a product reaches {largest:,.0f}, too near its range of 65,504")
    if not worst < MAX_FLIPS:
        against.append(f"{worst:.2%} of the labels change, {MAX_FLIPS:.1%} may")
    if not median < MAX_MEDIAN_ERROR:
        against.append(f"the median relative error is {median:.1e}, {MAX_MEDIAN_ERROR:.0e} may be")
    return Trial(task.measure.dtype, not against, ", ".join(against), flips, errors, largest)
