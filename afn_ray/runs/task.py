"""Task of a worker: all that it needs to process the shards of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from afn_ray.config import RunConfig
from afn_ray.schema import (
    Series,
    fingerprint,
)


@dataclass(frozen=True, slots=True)
class Task:
    """All inputs of a worker that processes shards of one run; small and picklable."""

    config: RunConfig
    layers: tuple[int, ...]
    # recorded series in the order of the tables: strength first, by layer
    series: tuple[Series, ...]
    dtype: str  # dtype of the matrix products
    device: str
    measure_id: str
    identity: dict[str, str]  # the model's identity, from ``model.identity``
    outliers: tuple[tuple[int, ...], ...] = ()  # per layer, dimensions that a signal leaves out
    neuron_layers: tuple[int, ...] = ()  # layers whose neurons are recorded
    # per neuron layer, the least strength of tokens with recorded neurons; empty: all tokens
    neurons_above: tuple[float, ...] = ()
    tagged: bool = False  # the corpus is labelled
    run: str = ""  # name of the run, for logs
    worker: int = 0  # number of the worker, for logs


def in_dtype(task: Task, measure: dict[str, Any], dtype: str) -> tuple[Task, dict[str, Any]]:
    """``task`` and ``measure`` with matrix products in ``dtype``."""
    measure = measure | {"dtype": dtype}
    return replace(task, dtype=dtype, measure_id=fingerprint(measure)), measure


def with_outliers(
    task: Task, measure: dict[str, Any], outliers: Sequence[Sequence[int]]
) -> tuple[Task, dict[str, Any]]:
    """``task`` and ``measure`` with ``outliers``, the dimensions of each layer to leave out."""
    measure = measure | {"outliers": [list(dims) for dims in outliers]}
    return replace(
        task, outliers=tuple(map(tuple, outliers)), measure_id=fingerprint(measure)
    ), measure


def with_neurons_above(
    task: Task, measure: dict[str, Any], above: Sequence[float]
) -> tuple[Task, dict[str, Any]]:
    """``task`` and ``measure`` that record neurons of strong tokens alone.

    ``above`` holds a strength for each of ``neuron_layers``; weaker tokens have no neurons
    recorded.
    """
    measure = measure | {"neurons_above": list(above)}
    return replace(task, neurons_above=tuple(above), measure_id=fingerprint(measure)), measure


def with_labels(
    task: Task, measure: dict[str, Any], labels: str | None
) -> tuple[Task, dict[str, Any]]:
    """``task`` and ``measure`` for tags in the column ``labels``; None: a corpus without tags."""
    if labels is None:
        return task, measure
    measure = measure | {"labels": labels}
    return replace(task, tagged=True, measure_id=fingerprint(measure)), measure
