"""Task of a worker: all that it needs to process the shards of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from afn_ray.config import RunConfig
from afn_ray.measure import Measure
from afn_ray.schema import Series

TOKENS, NEURONS = "tokens", "neurons"
"""Tables that have parts; the third one is ``layout.VECTORS``."""


class MeasurePart(NamedTuple):
    """Values of tokens at one layer that are recorded together."""

    table: str  # table of a shard that has them
    series: Series  # in ``tokens``; in the others its signal is the table's name


class Donor(NamedTuple):
    """Another measure whose shards have some parts of a task."""

    measure_id: str
    parts: tuple[MeasurePart, ...]
    generations: Mapping[str, int]
    """Generations of its shards, by id, that are not the first."""


@dataclass(frozen=True, slots=True)
class Composition:
    """Origin of the parts of a task whose shards are composed of what the store has."""

    donors: tuple[Donor, ...]
    rest: Task | None
    """Task that measures the parts that no donor has, and others; None: the donors have all."""
    missing: tuple[MeasurePart, ...] = ()
    """Parts that no donor has."""


@dataclass(frozen=True, slots=True)
class Task:
    """All inputs of a worker that processes shards of one run; small and picklable."""

    config: RunConfig
    measure: Measure
    device: str
    run: str = ""  # name of the run, for logs
    worker: int = 0  # number of the worker, for logs
    composition: Composition | None = None  # None: the worker measures all parts
