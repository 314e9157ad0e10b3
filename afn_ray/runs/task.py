"""Task of a worker: all that it needs to process the shards of a run."""

from __future__ import annotations

from dataclasses import dataclass

from afn_ray.config import RunConfig
from afn_ray.measure import Measure


@dataclass(frozen=True, slots=True)
class Task:
    """All inputs of a worker that processes shards of one run; small and picklable."""

    config: RunConfig
    measure: Measure
    device: str
    run: str = ""  # name of the run, for logs
    worker: int = 0  # number of the worker, for logs
